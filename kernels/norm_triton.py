"""RMSNorm and LayerNorm in Triton: the kernels and their launches; the formulas stand in `norm.py`.

A row is a matrix row, C values. A program takes several short rows or one long one. A row too long for the registers of
one program (over 16,384 columns forward, 8,192 backward) is cut into blocks of columns, after a pass for the means over
it. Weight gradients are summed in two steps, so that they are the same bits each time: a fixed number of programs walk
their shares of the rows and write one fp32 row each, and those rows are summed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.launch import cdiv, config, jit, launch, power_of_two, tl


class View(NamedTuple):
    """Rows (N / inner, inner, C), each contiguous, and how far apart they lie; ptr is None where there is no tensor."""

    ptr: Any
    outer_stride: int
    inner_stride: int


class Affine(NamedTuple):
    """What a normalised row is multiplied by, weight (C,) + offset, and the bias (C,) that is added, or None."""

    weight: Any
    bias: Any
    offset: float


class Statistics(NamedTuple):
    """The mean (N,) of each row, or None for RMSNorm, and its rstd (N,); both fp32."""

    mean: Any
    rstd: Any


@jit
def _start(view, row, inner):
    """Find where a row starts, in elements from the view's pointer."""
    outer = row // inner
    return outer.to(tl.int64) * view.outer_stride + (row - outer * inner).to(tl.int64) * view.inner_stride


@jit
def _load_weight(affine, column, width):
    """Load weight + offset as fp32."""
    return tl.load(affine.weight + column, mask=column < width, other=0.0).to(tl.float32) + affine.offset


@jit
def _load_sum(x, residual, x_at, residual_at, inside):
    """Load x + residual as fp32, rounded as the sum is returned, since the backward pass will find it so."""
    value = tl.load(x.ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    if residual.ptr is not None:
        value += tl.load(residual.ptr + residual_at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.ptr.dtype.element_ty).to(tl.float32)
    return value


@jit
def _norm_statistics(x, residual, stats, inner, width, eps, BLOCK: tl.constexpr):
    """Compute the statistics of one row that is longer than a tile."""
    row = tl.program_id(0)
    x_row = _start(x, row, inner)
    residual_row = _start(residual, row, inner)
    mean = 0.0
    squares = 0.0
    for start in range(0, width, BLOCK):
        # Load a block of the row.
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = _load_sum(x, residual, x_row + column, residual_row + column, inside)
        # Add it to the mean and to the sum of squared deviations so far.
        if stats.mean is not None:
            # Two parts' means and squared deviations give the whole's (Chan, Golub and LeVeque 1979).
            count = tl.minimum(width - start, BLOCK)
            step = tl.sum(value) / count - mean
            value = tl.where(inside, value - mean - step, 0.0)
            squares += step * step * start * (count / (start + count))
            mean += step * (count / (start + count))
        squares += tl.sum(value * value)
    # Store.
    tl.store(stats.rstd + row, tl.rsqrt(squares / width + eps))
    if stats.mean is not None:
        tl.store(stats.mean + row, mean)


@jit(do_not_specialize=["rows"])
def _norm_forward(
    x, residual, affine, y, total, stats, rows, inner, width, eps, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS whole rows; with SPLIT, one block of their columns, given their statistics.

    x and residual are Views; y and total, which is x + residual or None, are (N, C) and contiguous.
    """
    # Load the sum.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    x_at = _start(x, row, inner) + column
    value = _load_sum(x, residual, x_at, _start(residual, row, inner) + column, inside)
    out = row.to(tl.int64) * width + column
    if total is not None:
        tl.store(total + out, value.to(total.dtype.element_ty), mask=inside)

    # Statistics: loaded where a pass over the row has made them, else computed here.
    if stats.mean is not None:
        if SPLIT:
            mean = tl.load(stats.mean + row, mask=row < rows, other=0.0)
        else:
            mean = tl.sum(value, 1)[:, None] / width
            tl.store(stats.mean + row, mean, mask=row < rows)
        value = tl.where(inside, value - mean, 0.0)
    if SPLIT:
        rstd = tl.load(stats.rstd + row, mask=row < rows, other=0.0)
    else:
        rstd = tl.rsqrt(tl.sum(value * value, 1)[:, None] / width + eps)
        tl.store(stats.rstd + row, rstd, mask=row < rows)

    # Scale, shift and store.
    result = value * rstd * _load_weight(affine, column, width)
    if affine.bias is not None:
        result += tl.load(affine.bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + out, result.to(y.dtype.element_ty), mask=inside)


@jit
def _load_terms(dy, x, stats, dy_at, x_at, row, rows, inside):
    """Load dy, compute the normalised row again, and load rstd; what lies outside is 0."""
    upstream = tl.load(dy.ptr + dy_at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x.ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(stats.rstd + row, mask=row < rows, other=0.0)
    if stats.mean is not None:
        value = tl.where(inside, value - tl.load(stats.mean + row, mask=row < rows, other=0.0), 0.0)
    return upstream, value * rstd, rstd


@jit
def _norm_means(dy, x, affine, stats, means, inner, width, BLOCK: tl.constexpr):
    """Compute means (N, 2), mean(g * n) and mean(g), of one row that is longer than a tile."""
    row = tl.program_id(0)
    dy_row = _start(dy, row, inner)
    x_row = _start(x, row, inner)
    gn_sum = tl.zeros((BLOCK,), tl.float32)
    g_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        upstream, normal, _ = _load_terms(dy, x, stats, dy_row + column, x_row + column, row, row + 1, inside)
        g = upstream * _load_weight(affine, column, width)
        gn_sum += g * normal
        g_sum += g
    tl.store(means + row.to(tl.int64) * 2, tl.sum(gn_sum) / width)
    tl.store(means + row.to(tl.int64) * 2 + 1, tl.sum(g_sum) / width)


@jit(do_not_specialize=["rows"])
def _norm_backward(
    dy, dtotal, x, affine, stats, means, dx, dweight, dbias, rows, inner, width, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Compute dx of this program's share of the rows, ROWS at a time, and its row of dweight and dbias (programs, C).

    dy, dtotal and x are Views; dtotal, the gradient of x + residual, may be absent, and dweight and dbias are None
    where they are not wanted. means, from `_norm_means`, is None where whole rows fit a tile.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight = _load_weight(affine, column, width)
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        # Load.
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < width)
        dy_at = _start(dy, row, inner) + column
        x_at = _start(x, row, inner) + column
        upstream, normal, rstd = _load_terms(dy, x, stats, dy_at, x_at, row, rows, inside)

        # Add to this program's share of the weight gradients.
        weight_sum += upstream * normal
        bias_sum += upstream

        # Compute dx by the formulas above.
        g = upstream * weight
        if means is not None:
            grad = g - normal * tl.load(means + row.to(tl.int64) * 2, mask=row < rows, other=0.0)
        else:
            grad = g - normal * (tl.sum(g * normal, 1)[:, None] / width)
        if stats.mean is not None:
            if means is not None:
                grad -= tl.load(means + row.to(tl.int64) * 2 + 1, mask=row < rows, other=0.0)
            else:
                grad -= tl.sum(g, 1)[:, None] / width
        grad *= rstd
        if dtotal.ptr is not None:
            dtotal_at = _start(dtotal, row, inner) + column
            grad += tl.load(dtotal.ptr + dtotal_at, mask=inside, other=0.0).to(tl.float32)

        # Store.
        tl.store(dx + row.to(tl.int64) * width + column, grad.to(dx.dtype.element_ty), mask=inside)
    out = tl.program_id(0).to(tl.int64) * width + column
    if dweight is not None:
        tl.store(dweight + out, tl.sum(weight_sum, 0)[None, :], mask=column < width)
    if dbias is not None:
        tl.store(dbias + out, tl.sum(bias_sum, 0)[None, :], mask=column < width)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs(options: dict[str, Any], device: torch.device) -> int:
    """Return how many programs share a backward pass that sums weight gradients: device and launch table decide it.

    Takes PROGRAMS_PER_SM out of the launch options.
    """
    return options.pop("PROGRAMS_PER_SM") * _multiprocessors(device)


def _tile(kernel: str, device: torch.device, width: int) -> tuple[int, int, dict[str, Any]]:
    """Return the columns and the rows of a tile, and the other options of the launch."""
    options = dict(config(kernel, device, size=width))
    tile = options.pop("TILE")
    block = min(power_of_two(width), tile)
    return block, tile // block, options


def _inner(x: Tensor) -> int:
    """Return how many rows of x (..., C) lie evenly apart before a jump, as heads of a QKV buffer do; 1 if all do."""
    return 1 if x.dim() < 3 or x.stride(-3) == x.shape[-2] * x.stride(-2) else x.shape[-2]


def _rows(x: Tensor, inner: int) -> Tensor:
    """View x (..., C) as (N / inner, inner, C) with contiguous rows, copied only where its strides allow no view."""
    rows = x.reshape(-1, inner, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _view(rows: Tensor | None) -> View:
    return View(None, 0, 0) if rows is None else View(rows, rows.stride(0), rows.stride(1))


def launch_forward(
    x: Tensor, residual: Tensor | None, affine: Affine, eps: float, layer: bool
) -> tuple[Tensor, Tensor | None, Tensor, Statistics]:
    """Normalise x (..., C), or x + residual; `layer`: LayerNorm.

    Returns y, x + residual or None, x as (N / inner, inner, C), and the statistics.
    """
    width, inner = x.shape[-1], _inner(x)
    rows = _rows(x, inner)
    views = (_view(rows), _view(None if residual is None else _rows(residual, inner)))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    count = rows.shape[0] * inner
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    stats = Statistics(torch.empty_like(rstd) if layer else None, rstd)
    block, height, options = _tile("norm_forward", x.device, width)
    if block < width:
        launch(_norm_statistics, (count,), *views, stats, inner, width, eps, BLOCK=block, **options)
    launch(
        _norm_forward, (cdiv(count, height), cdiv(width, block)), *views, affine, y, total, stats, count, inner, width,
        eps, SPLIT=block < width, BLOCK=block, ROWS=height, **options,
    )  # fmt: skip
    return y, total, rows, stats


def launch_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, inner: int, affine: Affine, stats: Statistics,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute dx like x, and the fp32 gradients (C,) of weight and bias that are wanted, None for the others.

    dy (..., C) and dtotal like it are the gradients of y and of x + residual; x is what was normalised, in any shape.
    """
    width, count = dy.shape[-1], stats.rstd.numel()
    dx = torch.empty(dy.shape, dtype=x.dtype, device=x.device)
    x_view, dy_view = _view(_rows(x, inner)), _view(_rows(dy, inner))
    dtotal_view = _view(None if dtotal is None else _rows(dtotal, inner))
    block, height, options = _tile("norm_backward", x.device, width)
    most = programs(options, x.device)
    means = None
    if block < width:
        means = torch.empty(count, 2, dtype=torch.float32, device=x.device)
        launch(_norm_means, (count,), dy_view, x_view, affine, stats, means, inner, width, BLOCK=block, **options)
    shares = min(cdiv(count, height), most) if any(wanted) else cdiv(count, height)
    parts = [torch.empty(shares, width, dtype=torch.float32, device=x.device) if want else None for want in wanted]
    launch(
        _norm_backward, (shares, cdiv(width, block)), dy_view, dtotal_view, x_view, affine, stats, means, dx, *parts,
        count, inner, width, BLOCK=block, ROWS=height, **options,
    )  # fmt: skip
    dweight, dbias = (None if part is None else part.sum(0) for part in parts)
    return dx, dweight, dbias
