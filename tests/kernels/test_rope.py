"""Rotary embedding beside the product of complex numbers that it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    DRAWN,
    TRITON_DTYPES,
    assert_low_precision,
    assert_near,
    assert_same_bits,
    draw,
    evaluate,
    strided,
    upstream,
)
from torch import Tensor

from afina.kernels.cases import allowed_error
from afina.kernels.norm import rms_norm, rms_norm_reference
from afina.kernels.rope import rope, rope_reference
from afina.kernels.rope_torch import TorchRope
from afina.kernels.rope_triton import _tokens


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


def assert_turned_back(got: list[Any], want: list[Tensor], scale: float = 1.0) -> None:
    """fp32 values that were turned and turned back are scale * `want`, within what the roundings allow.

    cos, sin, two products and a sum are each rounded by half an eps, once in each direction, and a result is made of
    two values: 2 * 2 * (1 + 1 + 1) * eps / 2 of the largest, and cos^2 + sin^2 is off by two eps itself.
    """
    for a, b in zip(got, want):
        error = (a.double() - scale * b.double()).abs().max()
        assert error <= 8 * torch.finfo(torch.float32).eps * scale * b.abs().max()


def views() -> tuple[list[Tensor], Tensor, Tensor]:
    """q and k inside one fused buffer, and fp32 angles."""
    qkv = draw(2, 9, 6, 20, dtype=torch.float32)
    angles = draw(9, 8, dtype=torch.float32)
    return [qkv[:, :, :4], qkv[:, :, 4:5]], angles.cos(), angles.sin()


def test_the_torch_path_saves_the_angles_only() -> None:
    inputs, cos, sin = views()
    leaves = [x.detach().requires_grad_() for x in inputs]
    wide_cos = torch.cat([cos, cos, torch.ones(9, 4)], dim=-1).unsqueeze(-2)
    q, _ = TorchRope.apply(*leaves, wide_cos, sin.unsqueeze(-2))
    assert [x.shape for x in q.grad_fn.saved_tensors] == [(9, 1, 20), (9, 1, 8)]


def test_heads_are_copied_only_where_no_view_has_them_side_by_side() -> None:
    x = draw(2, 3, 5, 4, 8)
    for view, copied in ((x[0], False), (x[0, :, :, 1:3], False), (x, False), (x.transpose(0, 3), True), (x.mT, True)):
        tokens = _tokens(view)
        assert torch.equal(tokens, view.reshape(-1, *view.shape[-3:]))
        assert tokens.stride(-1) == 1
        assert (tokens.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copied


def test_new_contiguous_tensors_same_bits_twice() -> None:
    inputs, cos, sin = views()
    before = [x.clone() for x in inputs]
    out = rope(*inputs, cos, sin)
    assert all(x.is_contiguous() for x in out)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert_same_bits(partial(rope, cos=cos, sin=sin), inputs)
    assert_turned_back(list(rope(*out, cos, -sin)), inputs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input(frozen: int) -> None:
    inputs, cos, sin = views()
    leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
    sum(y.square().sum() for y in rope(*leaves, cos, sin)).backward()  # type: ignore[union-attr]
    assert leaves[frozen].grad is None
    assert_turned_back([leaves[1 - frozen].grad], [inputs[1 - frozen]], scale=2.0)


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
        ("k", {"k": torch.ones(2, 3, 1, 4)}),
        ("cos", {"cos": torch.ones(3)}),
        ("cos", {"cos": torch.ones(2, 3, 2), "sin": torch.ones(2, 3, 2)}),
        ("q_weight", {"q_weight": torch.ones(3), "k_weight": torch.ones(4)}),
        ("k_weight", {"q_weight": torch.ones(4), "k_weight": torch.ones(2, 4)}),
        ("k_weight", {"q_weight": torch.ones(4)}),
        ("q_weight", {"k_weight": torch.ones(4)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_validation(name: str, change: dict[str, Tensor]) -> None:
    good = {"q": torch.ones(3, 2, 4), "k": torch.ones(3, 1, 4), "cos": torch.ones(3, 2), "sin": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        rope(**(good | change))  # type: ignore[arg-type]


SIZES = {
    "lead": st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    "length": st.sampled_from([0, 1, 5]),
    "heads": st.sampled_from([(1, 1), (5, 2), (8, 1), (2, 3)]),
    "half": st.sampled_from([1, 3, 8, 9]),
    "rest": st.sampled_from([0, 1, 6]),
    "shared": st.booleans(),
    "dtype": st.sampled_from(TRITON_DTYPES),
    "kind": st.sampled_from(["dense", "strided", "broadcast"]),
}


def tensors(
    lead: tuple[int, ...], length: int, heads: tuple[int, int], half: int, rest: int, shared: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, their weights, cos and sin."""
    inputs = [draw(*lead, length, h, 2 * half + rest, seed=h) for h in heads]
    inputs += [draw(2 * half + rest, seed=i) for i in (8, 9)]
    angles = draw(*(() if shared else lead), length, half, seed=7, dtype=torch.float32).to(DEVICE) * 4
    return [x.to(DEVICE) for x in inputs], angles.cos(), angles.sin()


@settings(DRAWN, max_examples=40)
@given(**SIZES)
def test_triton(dtype: torch.dtype, kind: str, **sizes: Any) -> None:
    (q, k, *_), cos, sin = tensors(**sizes)
    formula = partial(rope_reference, cos=cos.to(dtype), sin=sin.to(dtype))
    reference = partial(rope_reference, cos=cos.double(), sin=sin.double())
    assert_low_precision(partial(rope, cos=cos, sin=sin, backend="triton"), formula, reference, [q, k], dtype, kind)


def normalised(q: Tensor, k: Tensor, *weights: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
    q, k = (rms_norm_reference(x, w, **options) for x, w in zip((q, k), weights))
    return rope_reference(q, k, cos, sin)


def with_weights(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, **options: Any) -> Any:
    return rope(q, k, q_weight=q_weight, k_weight=k_weight, **options)


@pytest.mark.slow
@settings(DRAWN, max_examples=50)
@given(offset=st.sampled_from([0.0, 1.0]), **SIZES)
def test_triton_normalises_heads(offset: float, dtype: torch.dtype, kind: str, **sizes: Any) -> None:
    inputs, cos, sin = tensors(**sizes)
    options = {"eps": 0.01, "weight_offset": offset}
    assert_low_precision(
        partial(with_weights, cos=cos, sin=sin, backend="triton", **options),
        partial(normalised, cos=cos.to(dtype), sin=sin.to(dtype), **options),
        partial(normalised, cos=cos.double(), sin=sin.double(), **options),
        inputs, dtype, kind,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_normalises_as_two_ops(dtype: torch.dtype) -> None:
    """The same bits: models keep their values."""
    inputs, cos, sin = tensors((2,), 5, (4, 2), 4, 2, True)
    inputs = [x.to(dtype) for x in inputs]

    def two(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (rms_norm(x, w, eps=0.1, weight_offset=1.0, backend="torch") for x, w in ((q, q_weight), (k, k_weight)))
        return rope(q, k, cos, sin, backend="torch")

    one = partial(with_weights, cos=cos, sin=sin, eps=0.1, weight_offset=1.0, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(evaluate(one, inputs), evaluate(two, inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [False, True])
def test_triton_views_of_a_fused_buffer(weights: bool) -> None:
    """Strides of batch, token and head may be any. Results are new, repeat bit for bit, and turn back to q and k."""
    qkv = draw(2, 9, 6, 20, dtype=torch.float32).to(DEVICE)
    angles = draw(2, 9, 8, dtype=torch.float32).to(DEVICE)
    affine = [draw(20, seed=i, dtype=torch.float32).to(DEVICE) for i in (1, 2)] if weights else []
    for arrange in (lambda x: x, lambda x: x.flip(1).transpose(1, 2).contiguous().transpose(1, 2)):
        whole = arrange(qkv)
        before, inputs = whole.clone(), [whole[:, :, :4], whole[:, :, 4:5]]

        function = partial(with_weights if weights else rope, cos=angles.cos(), sin=angles.sin(), backend="triton")
        formula = partial(normalised if weights else rope_reference, cos=angles.cos(), sin=angles.sin())
        exact = partial(formula, cos=angles.cos().double(), sin=angles.sin().double())
        assert_low_precision(function, formula, exact, inputs + affine, torch.float32)
        got = evaluate(function, inputs + affine)
        assert all(x.is_contiguous() for x in got)
        assert torch.equal(whole, before)
        assert_same_bits(function, inputs + affine)
        if not weights:
            assert_turned_back(list(rope(*got[:2], angles.cos(), -angles.sin(), backend="triton")), inputs)


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {3}, {2, 3}, {0, 1}])
def test_triton_frozen_inputs_and_mixed_dtypes(frozen: set[int]) -> None:
    """Each gradient has its own tensor's dtype; those of fp32 weights are never rounded to 16 bits."""
    inputs, cos, sin = tensors((2,), 5, (4, 2), 4, 2, False)
    inputs = [x.to(torch.bfloat16 if i < 2 else torch.float32) for i, x in enumerate(inputs)]
    grads = []
    for backend, dtype in (("triton", None), ("torch", None), ("torch", torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        outs = with_weights(*leaves, cos=cos, sin=sin, backend=backend)
        torch.autograd.backward(outs, [upstream(x, "dense") for x in outs])
        grads.append([leaf.grad for leaf in leaves])
    for i, (got, plain, want) in enumerate(zip(*grads)):
        if i in frozen:
            assert got is None
        else:
            assert got is not None
            assert got.dtype == inputs[i].dtype
            assert (got.double() - want).abs().max() <= allowed_error(plain, want, inputs[i].dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where the interpreter divides by zero
def test_triton_extreme_values() -> None:
    angles = draw(3, 4, dtype=torch.float32).to(DEVICE)
    ones = torch.ones(10, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    big = torch.full((3, 2, 10), 1e4, device=DEVICE, dtype=torch.float16)
    for x in (big, torch.zeros_like(big)):
        got = evaluate(partial(with_weights, cos=cos, sin=sin, backend="triton"), [x, x[:, :1], ones, ones])
        assert all(y.isfinite().all() for y in got)
    # Without eps a head that is not there divides by zero, and must not reach the sums of those that are.
    x = draw(3, 3, 10, dtype=torch.float32).to(DEVICE)
    for backend in ("triton", "torch"):
        got = evaluate(partial(with_weights, cos=cos, sin=sin, eps=0.0, backend=backend), [x, x[:, :1], ones, ones])
        assert all(y.isfinite().all() for y in got)
    x[1, 1, 3] = torch.nan
    for option in ({}, {"q_weight": ones, "k_weight": ones}):
        q, k = rope(x, x[:, :1], cos, sin, backend="triton", **option)
        assert q[1, 1].isnan().any()
        assert q[[0, 2]].isfinite().all()
        assert q[1, [0, 2]].isfinite().all()
        assert k.isfinite().all()
