"""kernels/fp8_linear.py: the rounding to 8 bits, and the layer beside its formula; on a GPU, the tensor cores' products
beside the emulation."""

from __future__ import annotations

from itertools import product as every

import pytest
import torch
from torch import Tensor

from afina.kernels import fp8_linear as file
from afina.kernels.fp8_linear import GRADIENTS, LARGEST, VALUES, fits, fp8_linear, product, quantize_rows, unavailable

CPU = torch.device("cpu")
EIGHT = {VALUES: (4, 3, -6), GRADIENTS: (5, 2, -14)}  # bits of exponent and mantissa, and the smallest normal exponent


def plain_round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of the format, of two the even one, from its definition, in fp64."""
    _, mantissa, smallest = EIGHT[dtype]
    _, exponent = torch.frexp(x.abs())
    step = torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=smallest) - mantissa)
    return (x / step).round() * step


@pytest.mark.parametrize("dtype", [VALUES, GRADIENTS])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_rows_are_scaled_by_powers_of_two_and_rounded_to_nearest(dtype: torch.dtype, source: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator) * torch.logspace(-20, 20, 64)[:, None]
    x = x.to(source)
    got, scale = quantize_rows(x, dtype)
    assert got.dtype == dtype
    assert scale.shape == (64, 1)
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    scaled = x.double() / scale.double()
    most = scaled.abs().amax(1)
    assert (most <= LARGEST[dtype] * (1 + 2**-23)).all()
    assert (most > LARGEST[dtype] / 2).all()  # The scale is no larger than it must be.
    assert torch.equal(got.double(), plain_round(scaled, dtype))
    # A transposed matrix is read as it lies, and comes out in rows.
    turned, turned_scale = quantize_rows(x.t().contiguous().t(), dtype)
    assert turned.is_contiguous()
    assert torch.equal(turned.float(), got.float())
    assert torch.equal(turned_scale, scale)


def test_rows_at_the_ends_of_the_range() -> None:
    x = torch.zeros(5, 16)
    x[1, 0], x[2, 0], x[3, 0], x[4, 0] = 448.0, torch.finfo(torch.float32).tiny, torch.inf, torch.nan
    got, scale = quantize_rows(x, VALUES)
    assert scale[0] == scale[1] == 1
    assert got[1, 0] == 448
    back = got.float() * scale
    assert not back[:1].any()
    assert back[2, 0] <= x[2, 0]
    assert back[2].isfinite().all()
    assert back[3:].isnan().any(1).all()
    got, scale = quantize_rows(torch.full((1, 16), 2.0**127), VALUES)
    assert (got.float() * scale == 2.0**127).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_and_its_gradients_are_the_formula(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w, b, dy = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((2, 5, 32), (48, 32), (48,), (2, 5, 48))
    )  # fmt: skip
    inputs = [t.clone().requires_grad_() for t in ((x, w, b) if bias else (x, w))]
    y = fp8_linear(*inputs)
    y.backward(dy)

    def dense(t: Tensor, eight: torch.dtype) -> Tensor:
        q, scale = quantize_rows(t, eight)
        return q.double() * scale.double()

    rows, grads = x.flatten(0, 1), dy.flatten(0, 1)
    want = dense(rows, VALUES) @ dense(w, VALUES).t() + (b.double() if bias else 0)
    dx = dense(grads, GRADIENTS) @ dense(w.t(), VALUES).t()
    expected = [(y, want), (inputs[0].grad, dx), (inputs[1].grad, grads.double().t() @ rows.double())]
    expected += [(inputs[2].grad, grads.double().sum(0))] if bias else []
    eps = torch.finfo(dtype).eps
    for found, exact in expected:
        assert found is not None
        assert found.dtype == dtype
        # A sum of up to 48 products in fp32, rounded to the dtype, and once more with a bias.
        error = (found.detach().double().view(exact.shape) - exact).abs().max()
        assert error <= (2 * eps + 48 * torch.finfo(torch.float32).eps) * 2 * exact.abs().max()
    # It is no bf16 product in disguise: three bits of mantissa are seen.
    plain = rows.double() @ w.double().t()
    assert (y.detach().double().flatten(0, 1) - plain - (b.double() if bias else 0)).abs().max() > 2**-6


def test_what_is_not_wanted_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[torch.dtype]()
    real = file.quantize_rows
    monkeypatch.setattr(file, "quantize_rows", lambda x, dtype: calls.append(dtype) or real(x, dtype))
    x, w = torch.randn(4, 16), torch.randn(16, 16, requires_grad=True)
    fp8_linear(x, w).sum().backward()
    assert calls == [VALUES, VALUES]
    assert w.grad is not None


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((4, 16), (16, 32)), r"weight: expected \(N, 16\)"),
        (((4, 24), (16, 24)), r"multiples of 16, found \(16, 24\)"),
        (((4, 16), (16, 16), (8,)), "bias: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fp8_linear(*(torch.zeros(shape) for shape in shapes))


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="weight: expected x's dtype"):
        fp8_linear(torch.zeros(4, 16), torch.zeros(16, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="backend: expected one of scaled_mm, emulated, found 'triton'"):
        fp8_linear(torch.zeros(4, 16), torch.zeros(16, 16), backend="triton")
    assert fits(torch.zeros(32, 16))
    assert not fits(torch.zeros(16, 8))


def test_devices_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is asked for its capability, and its product compared, before it is trusted."""
    assert unavailable(CPU) == "a cpu has no FP8 products"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    assert unavailable(gpu) == "this GPU has no FP8 products (its capability is 8.6, they begin at 8.9)"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "randn", lambda *shape, device, real=torch.randn: real(*shape))
    real = file.product
    wrong = {
        "failed": lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no such kernel\nat line 3")),
        "is wrong": lambda a, b, out, backend, fast: 1.5 * real(a, b, out, "emulated", fast=fast),
    }
    for words, function in wrong.items():
        unavailable.cache_clear()

        def tried(a: object, b: object, out: object, backend: str, *, fast: bool, f: object = function) -> object:
            return (f if backend == "scaled_mm" else real)(a, b, out, backend, fast=fast)  # type: ignore[operator]

        monkeypatch.setattr(file, "product", tried)
        found = unavailable(gpu)
        assert found is not None
        assert words in found
        assert "\n" not in found
    unavailable.cache_clear()


SHAPES = list(every((VALUES, GRADIENTS), ((1, 16, 16), (77, 256, 128), (512, 1024, 96))))


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "shape"), SHAPES)
def test_the_tensor_cores_beside_the_emulation(first: torch.dtype, shape: tuple[int, int, int]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := unavailable(device):
        pytest.skip(reason)
    m, k, n = shape
    a, b = (torch.randn(size, device=device).to(torch.bfloat16) for size in ((m, k), (n, k)))
    factors = quantize_rows(a, first), quantize_rows(b, VALUES)
    got = product(*factors, torch.bfloat16, "scaled_mm", fast=False)
    want = product(*factors, torch.float32, "emulated", fast=False)
    # bf16's rounding, and sums that keep 14 bits.
    assert ((got.float() - want).abs() <= 2**-8 * want.abs() + 2**-12 * k**0.5 * 4).all()
