"""AdamW beside torch.optim.AdamW and the plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DRAWN, assert_near, draw, strided
from torch import Tensor

from afina.kernels.adamw import adamw_, adamw_reference_

OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}


def walk(
    update: Callable[..., None], params: list[Tensor], steps: int, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """The parameters and both moments after `steps` updates with drawn gradients of `dtype`."""
    params = [p.clone() for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(1, steps + 1):
        grads = [draw(*p.shape, seed=step, dtype=dtype) for p in params]
        update(params, grads, *moments, step=step, **(OPTIONS | options))
    return [*params, *moments[0], *moments[1]]


def test_twenty_steps_of_torch_optim() -> None:
    params = [draw(3, 5), draw(7), draw(1, 1), draw(0, 4)]
    own = [p.clone().requires_grad_() for p in params]
    oracle = torch.optim.AdamW(own, **OPTIONS, foreach=False, fused=False)
    for step in range(1, 21):
        for p in own:
            p.grad = draw(*p.shape, seed=step)
        oracle.step()
    got = walk(adamw_, params, 20, torch.float64)
    moments = [oracle.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in own]
    assert_near(got, [*(p.detach() for p in own), *moments])


@DRAWN
@given(
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=2), max_size=3),
    beta1=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.5]),
    grad=st.sampled_from([torch.float64, torch.bfloat16, torch.float32]),
)
def test_against_reference(shapes: list[list[int]], beta1: float, decay: float, grad: torch.dtype) -> None:
    params = [draw(*shape, seed=9) for shape in shapes]
    got, want = (walk(f, params, 3, grad, betas=(beta1, 0.99), weight_decay=decay) for f in (adamw_, adamw_reference_))
    assert_near(got, want)


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_fp32_and_repeats(grad: torch.dtype) -> None:
    params = [draw(33, 5, dtype=torch.float32), draw(3, dtype=torch.float32)]
    got, again = (walk(adamw_, params, 5, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    assert_near(got, walk(adamw_reference_, params, 5, grad), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    params = [draw(64, dtype=dtype)]
    exact = walk(adamw_reference_, [params[0].double()], 3, dtype)
    for got, plain, want in zip(walk(adamw_, params, 3, dtype), walk(adamw_reference_, params, 3, dtype), exact):
        error, allowed = ((x.double() - want).abs().max() for x in (got, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("layout", ["grad", "param", "broadcast", "all"])
def test_strides(layout: str) -> None:
    """A transposed, strided or broadcast tensor is updated at its own places."""
    values = [draw(4, 6, seed=1), draw(4, 6, seed=2), draw(4, 6, seed=3), draw(4, 6, seed=4).square()]
    if layout == "broadcast":
        values[1] = draw(1, 1).expand(4, 6)
    want = [x.clone() for x in values]
    adamw_reference_(*([x] for x in want), step=2, **OPTIONS)
    odd = {"grad": (1,), "param": (0,), "broadcast": (), "all": (0, 1, 2, 3)}[layout]
    got = [strided(x) if i in odd else x for i, x in enumerate(values)]
    adamw_(*([x] for x in got), step=2, **OPTIONS)
    assert_near([got[0], got[2], got[3]], [want[0], want[2], want[3]])


def test_parameters_that_need_gradients_and_empty_lists() -> None:
    leaf = draw(3).requires_grad_()
    before = leaf.detach().clone()
    adamw_([leaf], [draw(3)], [torch.zeros(3).double()], [torch.zeros(3).double()], step=1, **OPTIONS)
    assert leaf.is_leaf
    assert leaf.grad_fn is None
    assert not torch.equal(leaf.detach(), before)
    adamw_([], [], [], [], step=1, **OPTIONS)


def test_validation() -> None:
    def call(lists: list[list[Tensor]], **options: Any) -> None:
        adamw_(*lists, **({"step": 1} | OPTIONS | options))

    good = [[torch.ones(2)] for _ in range(4)]
    for step in (0, -1):
        with pytest.raises(ValueError, match=f"^step: .*{step}"):
            call(good, step=step)
        with pytest.raises(ValueError, match=r"^step: "):
            call([[], [], [], []], step=step)
    for i, name in enumerate(("grads", "exp_avgs", "exp_avg_sqs"), start=1):
        with pytest.raises(ValueError, match=r"^params: 1 tensors, but .*0 " + name):
            call([*good[:i], [], *good[i + 1 :]])
        with pytest.raises(ValueError, match=rf"^{name}\[0\]: "):
            call([*good[:i], [torch.ones(1)], *good[i + 1 :]])
    with pytest.raises(ValueError, match=r"^backend: "):
        call(good, backend="cuda")
