"""NF4 beside bitsandbytes' own bits (golden/nf4.json), and the kernel beside the formula."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_nf4 import GOLDEN, digest, weight
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DEVICE, DRAWN, TRITON_DTYPES, draw, poisoned, strided
from torch import Tensor

from afina.kernels import nf4
from afina.kernels.blockwise import dynamic_code
from afina.kernels.launch import INTERPRETED
from afina.kernels.nf4 import CODE, NF4State, dequantize_nf4, nf4_reference, quantize_nf4

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
GOLDEN_CASES = json.loads(GOLDEN.read_text())["cases"]


# The largest error of a value, relative to the absmax of its block.
HALF_GAP = float(torch.tensor(CODE).diff().max()) / 2
NESTED_HALF_GAP = float(dynamic_code(True, torch.device("cpu")).diff().max()) / 2


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit; in the interpreter, which does not round to bf16 but cuts off, to one step of bf16."""
    assert got.dtype == want.dtype
    if INTERPRETED and got.dtype == torch.bfloat16:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: f"{case['dtype']}-{case['double_quant']}")
def test_bits_of_bitsandbytes(case: dict[str, Any]) -> None:
    w = weight(case["shape"], getattr(torch, case["dtype"])).to(DEVICE)
    packed, state = quantize_nf4(w, double_quant=case["double_quant"])
    got = {"packed": packed, "absmax": state.absmax, "code": state.code, "dequantized": dequantize_nf4(packed, state)}
    if case["double_quant"]:
        got |= {name: getattr(state, name) for name in ("offset", "nested_absmax", "nested_code")}
    assert {name: digest(x) for name, x in got.items()} == {name: case[name] for name in got}
    assert packed.shape == ((w.numel() + 1) // 2, 1)
    assert_same(dequantize_nf4(packed, state, backend="triton"), nf4_reference(packed, state))


@DRAWN
@given(
    count=st.sampled_from([0, 1, 2, 63, 64, 65, 129, 1001, 8225]),
    dtype=st.sampled_from(TRITON_DTYPES),
    blocksize=st.sampled_from([32, 64, 256, 4096]),
    double_quant=st.booleans(),
)
def test_triton(count: int, dtype: torch.dtype, blocksize: int, double_quant: bool) -> None:
    w = draw(count, dtype=dtype).to(DEVICE)
    with poisoned():
        packed, state = quantize_nf4(w, blocksize=blocksize, double_quant=double_quant)
        got, plain = (dequantize_nf4(packed, state, backend=backend) for backend in ("triton", "torch"))
    assert_same(got, plain)
    assert torch.equal(got, dequantize_nf4(packed, state, backend="triton"))
    assert (got.shape, got.dtype, state.shape, state.dtype) == (w.shape, dtype, tuple(w.shape), dtype)
    if not count:
        return
    # Half the widest gap between two codes, what rounding absmax to 8 bits adds, six roundings in fp32 (of the scaled
    # value, of absmax - offset, of both reciprocals and of the product and sum back), and that of the result.
    largest = torch.stack([block.abs().max() for block in w.double().split(blocksize)])
    bound = largest.repeat_interleave(blocksize)[:count]
    spread = (largest - largest.mean()).abs().max() if double_quant else 0
    error = (plain.double() - w.double()).abs()
    allowed = HALF_GAP * bound + NESTED_HALF_GAP * spread + 3 * torch.finfo(torch.float32).eps * largest.max()
    assert (error <= allowed + torch.finfo(dtype).eps / 2 * (bound + allowed)).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_nearest_code_and_midpoints(double_quant: bool) -> None:
    """Each code comes back as itself; a value between two takes the nearer, at the midpoint itself the lower."""
    code = torch.tensor(CODE)
    middle = (code[:-1] + code[1:]) / 2
    w = torch.cat([code, middle, torch.nextafter(middle, torch.tensor(2.0)), code[-1:] * 0]).view(-1, 1)
    packed, _ = quantize_nf4(w, double_quant=double_quant)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: len(w)]
    assert codes.tolist() == [*range(16), *range(15), *range(1, 16), 7]


@BACKENDS
def test_zeros(backend: str) -> None:
    for double_quant in (True, False):
        w = torch.zeros(3, 50, device=DEVICE)
        w[0, 0] = 2.0  # of the first block only
        packed, state = quantize_nf4(w, double_quant=double_quant)
        got = dequantize_nf4(packed, state, backend=backend)
        assert torch.equal(got[w == 0], w[w == 0])
        # absmax - offset is 4/3 for the block of the 2.0, and -2/3 for the two others.
        rounding = 4 * torch.finfo(torch.float32).eps
        assert abs(got[0, 0] - 2.0) <= (NESTED_HALF_GAP * 4 / 3 + rounding if double_quant else 0)


def test_pieces_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    w = draw(70, 61, dtype=torch.float32)
    packed, state = quantize_nf4(w)
    monkeypatch.setattr(nf4, "PIECE", 512)
    for same in (w, strided(w)):
        other, again = quantize_nf4(same)
        assert torch.equal(packed, other)
        assert torch.equal(state.absmax, again.absmax)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_double_quantisation_costs_little_and_saves_bits() -> None:
    w = draw(512, 256, dtype=torch.bfloat16)
    blocks = w.double().view(-1, 64)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    nearest = torch.stack([(blocks - code * absmax).abs() for code in CODE]).amin(dim=0)
    for double_quant in (False, True):
        packed, state = quantize_nf4(w, double_quant=double_quant)
        got = dequantize_nf4(packed, state).double().view(-1, 64)
        # Root mean squares: of what the nearest codes miss, of the rounding to bf16, and of what absmax misses.
        rounding = torch.finfo(torch.bfloat16).eps * rms(got) / 2
        missed = NESTED_HALF_GAP * float((absmax - absmax.mean()).abs().max()) if double_quant else 0.0
        assert rms(got - blocks) <= rms(nearest) + rounding + missed
        assert missed < rms(nearest) / 5
        held = [packed, state.absmax] + ([state.nested_absmax] if double_quant else [])
        bits = sum(8 * x.numel() * x.element_size() for x in held if x is not None) / w.numel()
        assert bits == (4 + 8 / 64 + 32 / (64 * 256) if double_quant else 4.5)


@BACKENDS
def test_out(backend: str) -> None:
    w = draw(33, 7, dtype=torch.float16).to(DEVICE)
    packed, state = quantize_nf4(w)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        out = torch.full((33, 7), torch.nan, dtype=dtype, device=DEVICE)
        assert dequantize_nf4(packed, state, out=out, backend=backend) is out
        assert_same(out, nf4_reference(packed, state, dtype))
    flat = dequantize_nf4(packed.view(-1), state, backend=backend)
    assert_same(flat, nf4_reference(packed, state))


def test_triton_writes_inside_its_output_only() -> None:
    for count in (1, 65, 150):
        packed, state = quantize_nf4(draw(count, dtype=torch.float32).to(DEVICE))
        room = torch.full((count + 300,), 5.0, device=DEVICE)
        dequantize_nf4(packed, state, out=room[:count], backend="triton")
        assert (room[count:] == 5).all()
        assert (room[:count] != 5).all()


def test_state_moves() -> None:
    for double_quant in (True, False):
        packed, state = quantize_nf4(draw(100, dtype=torch.float32), double_quant=double_quant)
        moved = state.to("meta")
        assert moved.absmax.device.type == moved.code.device.type == "meta"
        assert (moved.offset is None) == (not double_quant)
        assert torch.equal(dequantize_nf4(packed, state.to("cpu")), dequantize_nf4(packed, state))


def test_validation() -> None:
    good = torch.ones(3, 50)
    for bad in (good.double(), good.int(), good * torch.nan, good * torch.inf):
        with pytest.raises(ValueError, match=r"^weight: "):
            quantize_nf4(bad)
    with pytest.raises(ValueError, match=r"^blocksize: .*48"):
        quantize_nf4(good, blocksize=48)
    packed, state = quantize_nf4(good)
    for wrong in (packed[1:], packed.int()):
        with pytest.raises(ValueError, match=r"^packed: "):
            dequantize_nf4(wrong, state)
    for name, value in {
        "absmax": state.absmax.float(), "code": state.code[1:], "offset": None, "nested_absmax": torch.ones(2),
        "nested_code": state.nested_code.to("meta"), "blocksize": 48,  # type: ignore[union-attr]
    }.items():  # fmt: skip
        changed: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=rf"^state\.{name}: "):
            dequantize_nf4(packed, replace(state, **changed))
    for out in (torch.ones(50, 3), torch.ones(50, 3).t(), torch.ones(3, 50).int(), torch.ones(3, 50, device="meta")):
        with pytest.raises(ValueError, match=r"^out: "):
            dequantize_nf4(packed, state, out=out)
    with pytest.raises(ValueError, match=r"^backend: "):
        dequantize_nf4(packed, state, backend="cuda")
    assert isinstance(state, NF4State)
