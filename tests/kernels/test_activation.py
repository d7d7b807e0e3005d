"""SwiGLU and GeGLU beside torch's own activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
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
)
from torch import Tensor

from afina.kernels.activation import geglu, geglu_reference, swiglu, swiglu_reference

PAIRS = pytest.mark.parametrize(
    ("op", "reference", "act"),
    [(swiglu, swiglu_reference, F.silu), (geglu, geglu_reference, partial(F.gelu, approximate="tanh"))],
    ids=["swiglu", "geglu"],
)
Function = Callable[..., Tensor]


@PAIRS
@DRAWN
@given(
    shape=st.lists(st.integers(0, 5), max_size=3), half=st.integers(0, 9), kind=st.sampled_from(["dense", "strided"])
)
def test_against_reference(
    op: Function, reference: Function, act: Function, shape: list[int], half: int, kind: str
) -> None:
    x = draw(*shape, 2 * half) * 3
    got = evaluate(op, [strided(x) if kind == "strided" else x], kind)
    assert_near(got, evaluate(reference, [x], kind))
    assert got[0].is_contiguous()
    assert_near(got[:1], [act(x[..., :half]) * x[..., half:]])


@PAIRS
def test_layouts_and_repeats(op: Function, reference: Function, act: Function) -> None:
    row = draw(1, 10)
    wide = row.expand(4, 10)  # one row in memory
    for kind in ("broadcast", "strided"):
        assert_near(evaluate(op, [wide], kind), evaluate(reference, [wide], kind))
    assert_same_bits(op, [draw(7, 34, dtype=torch.float32)])


@PAIRS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(op: Function, reference: Function, act: Function, dtype: torch.dtype) -> None:
    assert_low_precision(op, reference, reference, [draw(9, 66) * 2], dtype)


@PAIRS
def test_extremes_stay_finite(op: Function, reference: Function, act: Function) -> None:
    x = torch.tensor([[-1e4, 1e4, 0.0, 3.0, 2.0, 1.0]])
    out, grad = evaluate(op, [x])
    assert torch.equal(out, torch.tensor([[0.0, 2e4, 0.0]]))
    assert grad.isfinite().all()


@PAIRS
def test_validation(op: Function, reference: Function, act: Function) -> None:
    for bad in (torch.ones(2, 3), torch.tensor(1.0), torch.ones(2, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^gate_up: "):
            op(bad)
    with pytest.raises(ValueError, match=r"^backend: "):
        op(torch.ones(2, 4), backend="cuda")


@DRAWN
@given(
    rows=st.sampled_from([0, 1, 3]),
    width=st.sampled_from([0, 1, 31, 32, 77]),
    dtype=st.sampled_from(TRITON_DTYPES),
    kind=st.sampled_from(["dense", "strided", "broadcast"]),
    gelu=st.booleans(),
)
def test_triton(rows: int, width: int, dtype: torch.dtype, kind: str, gelu: bool) -> None:
    function, reference = (geglu, geglu_reference) if gelu else (swiglu, swiglu_reference)
    gate_up = 4 * draw(2, rows, 2 * width, dtype=torch.float32).to(DEVICE)
    assert_low_precision(partial(function, backend="triton"), reference, reference, [gate_up], dtype, kind)


def test_triton_extreme_values_and_same_bits() -> None:
    gate_up = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4] + [3.0] * 5], device=DEVICE)
    for function, reference in ((swiglu, swiglu_reference), (geglu, geglu_reference)):
        triton = partial(function, backend="triton")
        assert_near(evaluate(triton, [gate_up]), evaluate(reference, [gate_up]), 1e-5)
        assert_same_bits(triton, [draw(3, 100, dtype=torch.float32).to(DEVICE)])
