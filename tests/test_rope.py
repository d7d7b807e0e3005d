"""Rotary embedding beside the product of complex numbers that it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DRAWN, assert_low_precision, assert_near, assert_same_bits, draw, evaluate, strided, upstream
from torch import Tensor

from afina.kernels.rope import rope, rope_reference


def turned(x: Tensor, angles: Tensor) -> Tensor:
    h = angles.shape[-1]
    z = torch.complex(x[..., :h], x[..., h : 2 * h]) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    return torch.cat([z.real, z.imag, x[..., 2 * h :]], -1)


@DRAWN
@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    length=st.integers(0, 5),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 2)),
    half=st.integers(1, 5),
    rest=st.integers(0, 4),
    shared=st.booleans(),
    kind=st.sampled_from(["dense", "strided", "broadcast"]),
)
def test_is_a_complex_product(
    lead: tuple[int, ...], length: int, heads: tuple[int, int], half: int, rest: int, shared: bool, kind: str
) -> None:
    """Partial rotary (rest > 0), angles shared by the batch or not, any strides; and backward turns back."""
    q, k = (draw(*lead, length, h, 2 * half + rest, seed=h) for h in heads)
    angles = draw(*(() if shared else lead), length, half, seed=7) * 4
    cos, sin = angles.cos(), angles.sin()
    inputs = [strided(x) if kind == "strided" else x for x in (q, k)]
    got = evaluate(partial(rope, cos=cos, sin=sin), inputs, kind)
    want = [turned(q, angles), turned(k, angles)]
    back = [turned(upstream(x, kind), -angles) for x in want]
    assert_near(got, want + back)
    assert_near(got, evaluate(partial(rope_reference, cos=cos, sin=sin), [q, k], kind))


def views() -> tuple[list[Tensor], Tensor, Tensor]:
    """q and k inside one fused buffer, and fp32 angles."""
    qkv = draw(2, 9, 6, 20, dtype=torch.float32)
    angles = draw(9, 8, dtype=torch.float32)
    return [qkv[:, :, :4], qkv[:, :, 4:5]], angles.cos(), angles.sin()


def test_new_contiguous_tensors_same_bits_twice() -> None:
    inputs, cos, sin = views()
    before = [x.clone() for x in inputs]
    out = rope(*inputs, cos, sin)
    assert all(x.is_contiguous() for x in out)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert_same_bits(partial(rope, cos=cos, sin=sin), inputs)
    assert_near(rope(*out, cos, -sin), inputs, 1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input(frozen: int) -> None:
    inputs, cos, sin = views()
    leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
    sum(y.square().sum() for y in rope(*leaves, cos, sin)).backward()  # type: ignore[union-attr]
    assert leaves[frozen].grad is None
    assert_near([leaves[1 - frozen].grad], [2 * leaves[1 - frozen].detach()], 1e-5)  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    inputs, cos, sin = views()
    formula = partial(rope_reference, cos=cos.to(dtype), sin=sin.to(dtype))
    reference = partial(rope_reference, cos=cos.double(), sin=sin.double())
    assert_low_precision(partial(rope, cos=cos, sin=sin), formula, reference, inputs, dtype)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.ones(3, 2, 4, dtype=torch.int64)}),
        ("q", {"q": torch.ones(4, 2, 4)}),
        ("q", {"q": torch.ones(3, 4)}),
        ("k", {"k": torch.ones(3, 1, 3)}),
        ("k", {"k": torch.ones(2, 1, 4)}),
        ("sin", {"sin": torch.ones(3, 1)}),
        ("sin", {"sin": torch.ones(3, 2, dtype=torch.float64)}),
        ("cos", {"cos": torch.ones(3, 2, dtype=torch.bfloat16)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_validation(name: str, change: dict[str, Tensor]) -> None:
    good = {"q": torch.ones(3, 2, 4), "k": torch.ones(3, 1, 4), "cos": torch.ones(3, 2), "sin": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        rope(**(good | change))  # type: ignore[arg-type]
