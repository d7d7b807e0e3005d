"""RMSNorm and LayerNorm, with and without the residual add, beside torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DRAWN, assert_low_precision, assert_near, assert_same_bits, draw, evaluate, strided
from torch import Tensor

from afina.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

KINDS = st.sampled_from(["dense", "strided", "broadcast"])
SHAPES = st.tuples(st.lists(st.integers(0, 4), max_size=2), st.integers(1, 40)).map(lambda pair: (*pair[0], pair[1]))


def with_residual(norm: Any) -> Any:
    return lambda x, residual, *rest: (norm(x + residual, *rest), x + residual)


@DRAWN
@given(
    shape=SHAPES,
    offset=st.sampled_from([0.0, 1.0]),
    eps=st.sampled_from([1e-6, 0.5]),
    residual=st.booleans(),
    kind=KINDS,
)
def test_rms_norm(shape: tuple[int, ...], offset: float, eps: float, residual: bool, kind: str) -> None:
    x, r, w = draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2)

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm_reference(x, w, eps=eps, weight_offset=offset)

    def oracle(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w + offset, eps)

    lay = strided if kind == "strided" else torch.clone
    if residual:
        inputs = [lay(x), lay(r), lay(w)]
        got = evaluate(lambda x, r, w: rms_norm(x, w, eps=eps, weight_offset=offset, residual=r), inputs, kind)
        wants = [evaluate(with_residual(f), [x, r, w], kind) for f in (reference, oracle)]
    else:
        got = evaluate(lambda x, w: rms_norm(x, w, eps=eps, weight_offset=offset), [lay(x), lay(w)], kind)
        wants = [evaluate(f, [x, w], kind) for f in (reference, oracle)]
    for want in wants:
        assert_near(got, want, 1e-8)


@DRAWN
@given(shape=SHAPES, bias=st.booleans(), eps=st.sampled_from([1e-5, 0.5]), residual=st.booleans(), kind=KINDS)
def test_layer_norm(shape: tuple[int, ...], bias: bool, eps: float, residual: bool, kind: str) -> None:
    x, r = draw(*shape), draw(*shape, seed=1)
    affine = [draw(shape[-1], seed=2), draw(shape[-1], seed=3)][: 1 + bias]

    def reference(x: Tensor, *affine: Tensor) -> Tensor:
        return layer_norm_reference(x, *affine, eps=eps)

    def oracle(x: Tensor, *affine: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *affine, eps=eps)

    lay = strided if kind == "strided" else torch.clone
    if residual:
        inputs = [lay(t) for t in (x, r, *affine)]
        got = evaluate(lambda x, r, *affine: layer_norm(x, *affine, eps=eps, residual=r), inputs, kind)
        wants = [evaluate(with_residual(f), [x, r, *affine], kind) for f in (reference, oracle)]
    else:
        got = evaluate(lambda x, *affine: layer_norm(x, *affine, eps=eps), [lay(t) for t in (x, *affine)], kind)
        wants = [evaluate(f, [x, *affine], kind) for f in (reference, oracle)]
    for want in wants:
        assert_near(got, want, 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, r, w, b = draw(17, 96) * 4, draw(17, 96, seed=1), draw(96, seed=2), draw(96, seed=3)

    def formula(x: Tensor, w: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    assert_low_precision(rms_norm, formula, rms_norm_reference, [x, w], dtype)
    plain, exact = with_residual(formula), with_residual(rms_norm_reference)
    assert_low_precision(lambda x, r, w: rms_norm(x, w, residual=r), plain, exact, [x, r, w], dtype)
    assert_low_precision(
        layer_norm, lambda x, w, b: F.layer_norm(x, (96,), w, b), layer_norm_reference, [x, w, b], dtype
    )


def test_mixed_dtypes_keep_their_own() -> None:
    x, w = draw(3, 8, dtype=torch.bfloat16), draw(8, dtype=torch.float32)
    for norm in (rms_norm, layer_norm):
        y, dx, dw = evaluate(norm, [x, w])
        assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_statistics_are_wide() -> None:
    """The squares of these overflow fp16."""
    x = torch.full((2, 64), 1000.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=torch.float16)), torch.ones_like(x))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_one_output_used_frozen_inputs_and_repeats(norm: Any) -> None:
    x, r, w = draw(5, 7), draw(5, 7, seed=1), draw(7, seed=2)
    for used in (0, 1):
        got = evaluate(lambda x, r, u=used: norm(x, w, residual=r)[u], [x, r])
        want = evaluate(lambda x, r, u=used: (norm(x + r, w), x + r)[u], [x, r])
        assert_near(got, want)
    leaf = w.clone().requires_grad_()
    assert_near(torch.autograd.grad(norm(x, leaf).sum(), leaf), [norm(x, torch.ones_like(w)).sum(0)])  # x is frozen
    assert_same_bits(lambda x, r, w: norm(x, w, residual=r), [x.float(), r.float(), w.float()])


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.ones(2, 4, dtype=torch.int64)}),
        ("x", {"x": torch.tensor(1.0)}),
        ("weight", {"weight": torch.ones(3)}),
        ("weight", {"weight": torch.ones(1, 4)}),
        ("residual", {"residual": torch.ones(1, 4)}),
        ("residual", {"residual": torch.ones(2, 4, dtype=torch.float64)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_validation(norm: Any, name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        norm(**({"x": torch.ones(2, 4), "weight": torch.ones(4)} | change))


def test_validation_of_the_bias() -> None:
    with pytest.raises(ValueError, match=r"^bias: "):
        layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(2, 4))
