"""What the kernels' tests share: outputs and gradients in one list, and how near to the reference they must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

DRAWN = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values, every second place of a larger tensor, its dimensions laid out in reverse."""
    reverse = list(reversed(range(x.dim())))
    room = torch.full([2 * n for n in reversed(x.shape)], torch.nan, dtype=x.dtype)
    view = room[tuple(slice(None, None, 2) for _ in reverse)].permute(reverse)
    view.copy_(x)
    return view


def upstream(out: Tensor, kind: str) -> Tensor:
    """A gradient that every dtype holds exactly, never 0 or 1: odd numbers / 4."""
    if kind == "broadcast":
        return torch.tensor(-1.75, dtype=out.dtype).expand(out.shape)
    odd = torch.randint(0, 8, out.shape, generator=torch.Generator().manual_seed(out.dim())) * 2 - 7
    return strided(odd.to(out.dtype) / 4) if kind == "strided" else odd.to(out.dtype) / 4


def evaluate(function: Callable[..., Any], inputs: Sequence[Tensor], kind: str = "dense") -> list[Tensor]:
    """The outputs of function(*inputs), then the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    made = function(*leaves)
    outs = made if isinstance(made, tuple) else (made,)
    grads = torch.autograd.grad(outs, leaves, [upstream(out, kind) for out in outs])
    return [*(out.detach() for out in outs), *grads]


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        assert a.shape == b.shape, i
        assert a.dtype == b.dtype, i
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"result {i}: {text}")


def assert_same_bits(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(evaluate(function, inputs), evaluate(function, inputs)))


def assert_low_precision(
    function: Callable[..., Any],
    formula: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """In `dtype`, an error against the fp64 reference of at most twice that of torch's formula, and a rounding."""
    low = [x.to(dtype) for x in inputs]
    exact = evaluate(reference, [x.double() for x in low])
    for i, (got, plain, want) in enumerate(zip(evaluate(function, low), evaluate(formula, low), exact)):
        assert got.dtype in (dtype, torch.float32), i
        error, allowed = ((x.double() - want).abs().max() for x in (got, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * want.abs().max(), i
