"""What the kernels' tests share: outputs and gradients in one list, and how near to the reference they must be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from afina.kernels.cases import allowed_error

# Triton's kernels run on the GPU where there is one, else in the interpreter (conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# On a GPU each new shape or option may be another compilation.
DRAWN = settings(
    max_examples=8 if DEVICE.type == "cuda" else 25,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values, every second place of a larger tensor, its dimensions laid out in reverse."""
    reverse = list(reversed(range(x.dim())))
    room = torch.full([2 * n for n in reversed(x.shape)], torch.nan, dtype=x.dtype, device=x.device)
    view = room[tuple(slice(None, None, 2) for _ in reverse)].permute(reverse)
    view.copy_(x)
    return view


def upstream(out: Tensor, kind: str) -> Tensor:
    """A gradient that every dtype holds exactly, never 0 or 1: odd numbers / 4."""
    if kind == "broadcast":
        return out.new_tensor(-1.75).expand(out.shape)
    odd = (torch.randint(0, 8, out.shape, generator=torch.Generator().manual_seed(out.dim())) * 2 - 7).to(out.device)
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


GUARD = 64  # elements


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory taken uninitialised holds NaN (integers: their largest value), so what a kernel leaves out shows.

    Around it stand guards of the same, and whoever wrote over one is told at the end.
    """
    guarded: list[tuple[Tensor, float]] = []

    def poison(x: Tensor) -> Tensor:
        if x.dtype == torch.bool or not x.is_floating_point():
            bad = True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
        else:
            bad = torch.nan
        size = sum((n - 1) * step for n, step in zip(x.shape, x.stride())) + 1 if x.numel() else 0
        room = torch.full((size + 2 * GUARD,), bad, dtype=x.dtype, device=x.device)
        guarded.append((room, bad))
        return room.as_strided(x.shape, x.stride(), GUARD)

    plain = {"empty": torch.empty, "empty_like": torch.empty_like}
    new_empty = Tensor.new_empty
    try:
        for name, function in plain.items():
            setattr(torch, name, lambda *a, function=function, **k: poison(function(*a, **k)))
        Tensor.new_empty = lambda *a, **k: poison(new_empty(*a, **k))  # type: ignore[method-assign]
        yield
    finally:
        for name, function in plain.items():
            setattr(torch, name, function)
        Tensor.new_empty = new_empty  # type: ignore[method-assign]
    for room, bad in guarded:
        ends = torch.cat([room[:GUARD], room[-GUARD:]])
        whole = ends.isnan() if room.is_floating_point() else ends == bad
        assert whole.all(), "written outside of a tensor"


def assert_low_precision(
    function: Callable[..., Any],
    formula: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    kind: str = "dense",
) -> None:
    """In `dtype`, an error against the fp64 reference within the rule of `afina/kernels/cases.py`.

    Memory that `function` takes uninitialised is poisoned. `formula` runs in `dtype`, as torch computes it.
    """
    low = [strided(x.to(dtype)) if kind == "strided" else x.to(dtype) for x in inputs]
    exact = evaluate(reference, [x.double() for x in low], kind)
    with poisoned():
        ours = evaluate(function, low, kind)
    assert_no_worse(ours, evaluate(formula, low, kind), exact, dtype)


def assert_no_worse(
    got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """The rule of `assert_low_precision`, for results in `dtype`, those of torch's formula in it, and fp64 ones."""
    for i, (ours, torchs, want) in enumerate(zip(got, plain, exact, strict=True)):
        assert ours.dtype in (dtype, torch.float32), i
        assert ours.shape == want.shape, i
        if want.numel() == 0:
            continue
        error, allowed = float((ours.double() - want).abs().max()), allowed_error(torchs, want, dtype)
        assert error <= allowed, f"result {i}: {error} > {allowed}"  # NaN passes no comparison.
