"""The rows of the cross-entropy in Triton: what runs on GPUs between the matrix products of `cross_entropy_chunks.py`.

One program takes one row of logits, a matrix row. It passes over the row once for the maximum and the sum of
exponentials (the online softmax, https://arxiv.org/abs/1805.02867) and once more to write the gradient, so a row of
16-bit logits moves 6 V bytes. The formulas stand in `cross_entropy.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.cross_entropy_torch import Options
from afina.kernels.launch import cdiv, config, jit, launch, tl

LOWEST = tl.constexpr(-3.4028234663852886e38)


class View(NamedTuple):
    """Rows that lie `stride` elements apart, each of them contiguous; ptr is None where there is no such tensor."""

    ptr: Any
    stride: int


class Formula(NamedTuple):
    """The terms of the loss beside the likelihood; softcap and smoothing are None where they are not used."""

    softcap: float | None
    smoothing: float | None
    z_loss: float


@jit
def _load(logits, bias, column, inside, softcap):
    """Load logits of a row as fp32, with the bias and the cap applied, and the slope of the cap there.

    They are -inf where `inside` is false; `inside` is None where all columns exist.
    """
    x = tl.load(logits + column, mask=inside).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, mask=inside).to(tl.float32)
    slope = 1.0
    if softcap is not None:
        # tanh is taken of |x|: so nothing overflows, and the slope stays exact where the cap is reached.
        e = tl.exp(tl.abs(x) * (-2.0 / softcap))
        r = 1.0 / (1.0 + e)
        high = softcap * (1.0 - e) * r
        x = tl.where(x < 0.0, -high, high)
        slope = 4.0 * e * r * r
    if inside is not None:
        x = tl.where(inside, x, float("-inf"))
    return x, slope


@jit
def _online_softmax(logits, bias, column, inside, formula, m_i, l_i, x_sum):
    """Add a tile (DEPTH, LANES) to each lane's running maximum m_i, sum l_i of exp(x - m_i), and sum of x.

    The lanes are joined only at the end of the row, so until then no thread waits for another.
    """
    x, _ = _load(logits, bias, column, inside, formula.softcap)
    m_new = tl.maximum(m_i, tl.max(x, 0))
    alpha = tl.exp(m_i - m_new)
    l_i = l_i * alpha + tl.sum(tl.exp(x - m_new[None, :]), 0)
    if formula.smoothing is not None:
        x_sum += tl.sum(x if inside is None else tl.where(inside, x, 0.0), 0)
    return m_new, l_i, x_sum


@jit
def _store_gradient(logits, dlogits, bias, column, inside, target_column, m_i, coefs, softcap):
    """Write the gradient of a tile; the target's stays in fp32 until all of its terms are in it."""
    softmax_coef, target_coef, smoothing_coef = coefs
    x, slope = _load(logits, bias, column, inside, softcap)
    grad = softmax_coef * tl.exp(x - m_i) - smoothing_coef
    grad = tl.where(column == target_column, grad - target_coef, grad) * slope
    tl.store(dlogits + column, grad.to(dlogits.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["first", "ignore_index"])
def _loss_kernel(
    logits, dlogits, bias, targets, losses, stats, rates, first, width, vocab, ignore_index, formula,
    DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute the loss of one row and write its gradient, given its columns from `first` to `first` + `width` of V.

    logits, dlogits (rows, width) and rates (rows,) are Views; dlogits may be the logits, and is None where no gradient
    is wanted. rates are what the gradients of the rows are multiplied by. stats (rows, 4) holds of the columns up to
    these the maximum, the sum of exponentials, the target's logit and the sum of the logits. Without `losses` stats
    are taken to hold those of the whole row, and only the gradient is made.
    """
    # Places: the row, and the tiles (DEPTH, LANES) that cut it; the last one is not whole.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    logits_row = logits.ptr + row * logits.stride
    if stats is not None:
        stats += row * 4
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = width // (DEPTH * LANES)
    tail = whole * (DEPTH * LANES) + tile
    if dlogits.ptr is not None:
        dlogits_row = dlogits.ptr + row * dlogits.stride

    # An ignored row has no loss and no gradient, whatever its logits are.
    if target == ignore_index:
        if losses is not None:
            tl.store(losses + row, 0.0)
        if dlogits.ptr is not None:
            for i in range(whole + 1):
                column = i * (DEPTH * LANES) + tile
                zeros = tl.zeros_like(column).to(dlogits_row.dtype.element_ty)
                tl.store(dlogits_row + column, zeros, mask=column < width)
        return

    valid = (target >= 0) & (target < vocab)
    target_column = (target - first).to(tl.int32)
    if losses is not None:
        # Load the target's logit first: the scan ends in a barrier, and after it a faster warp may already have
        # written a gradient over that logit.
        found = valid & (target >= first) & (target < first + width)
        target_logit, _ = _load(logits_row, bias, target_column, found, formula.softcap)

        # Online softmax: one pass over the row, lane by lane.
        lane_m = tl.full([LANES], LOWEST, tl.float32)
        lane_l = tl.zeros([LANES], tl.float32)
        lane_sum = tl.zeros([LANES], tl.float32)
        for i in range(whole):
            column = i * (DEPTH * LANES) + tile
            lane_m, lane_l, lane_sum = _online_softmax(
                logits_row, bias, column, None, formula, lane_m, lane_l, lane_sum
            )
        lane_m, lane_l, lane_sum = _online_softmax(
            logits_row, bias, tail, tail < width, formula, lane_m, lane_l, lane_sum
        )
        m_i = tl.max(lane_m, 0)
        l_i = tl.sum(lane_l * tl.exp(lane_m - m_i), 0)
        x_sum = tl.sum(lane_sum, 0)
        if stats is not None:
            # Join the columns before these, and leave the result for those after them.
            more = first > 0
            m_before = tl.load(stats, mask=more, other=LOWEST)
            l_before = tl.load(stats + 1, mask=more, other=0.0)
            m_new = tl.maximum(m_before, m_i)
            l_i = l_before * tl.exp(m_before - m_new) + l_i * tl.exp(m_i - m_new)
            m_i = m_new
            target_logit = tl.where(found, target_logit, tl.load(stats + 2, mask=more, other=0.0))
            x_sum += tl.load(stats + 3, mask=more, other=0.0)
            tl.store(stats, m_i)
            tl.store(stats + 1, l_i)
            tl.store(stats + 2, target_logit)
            tl.store(stats + 3, x_sum)
    else:
        m_i = tl.load(stats)
        l_i = tl.load(stats + 1)
    log_sum = tl.log(l_i)
    lse = m_i + log_sum

    if losses is not None:
        # The loss: logits are subtracted from each other before anything is added, since both may be large.
        loss = m_i - target_logit
        if formula.smoothing is not None:
            loss = (1.0 - formula.smoothing) * loss + formula.smoothing * (m_i - x_sum / vocab)
        loss += log_sum + formula.z_loss * lse * lse
        tl.store(losses + row, tl.where(valid, loss, float("nan")))

    if dlogits.ptr is not None:
        # The gradient: its coefficients are those of the row, then a second pass over the row stores it.
        rate = tl.where(valid, 1.0, float("nan"))
        if rates.ptr is not None:
            rate *= tl.load(rates.ptr + row * rates.stride).to(tl.float32)
        softmax_coef = rate * (1.0 + 2.0 * formula.z_loss * lse) / l_i
        target_coef = rate
        smoothing_coef = 0.0
        if formula.smoothing is not None:
            target_coef = rate * (1.0 - formula.smoothing)
            smoothing_coef = rate * formula.smoothing / vocab
        coefs = (softmax_coef, target_coef, smoothing_coef)
        # It goes backwards: the end of the row was read last, and may still be in the L2 cache.
        _store_gradient(logits_row, dlogits_row, bias, tail, tail < width, target_column, m_i, coefs, formula.softcap)
        for i in range(whole):
            column = (whole - 1 - i) * (DEPTH * LANES) + tile
            _store_gradient(logits_row, dlogits_row, bias, column, None, target_column, m_i, coefs, formula.softcap)


@jit
def _scale_kernel(x, factors, width, size, BLOCK: tl.constexpr):
    """Multiply x (size,) in place, each run of `width` values by its factor; a run whose factor is 1 is not touched."""
    run = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors.ptr + run * factors.stride).to(tl.float32)
    if factor != 1.0:
        x += run * width
        end = tl.minimum(width, size - run * width).to(tl.int32)
        for start in range(0, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < end
            value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(x + column, value.to(x.dtype.element_ty), mask=inside)


def _view(x: Tensor | None) -> View:
    return View(None, 0) if x is None else View(x, x.stride(0))


def launch_loss(
    x: Tensor, grad: Tensor | None, targets: Tensor, bias: Tensor | None, rates: Tensor | None, options: Options, *,
    losses: Tensor | None = None, stats: Tensor | None = None, first: int = 0, vocab: int = 0,
) -> None:  # fmt: skip
    """Run the loss kernel on the logits x (n, columns), the columns from `first` on of `vocab` (0: x is whole rows).

    The gradient goes into `grad` (n, columns), which may be x; targets (n,), bias (vocab,), rates (n,) of any stride,
    losses (n,), stats (n, 4). Without `losses` only the gradient is made, from the stats of whole rows.
    """
    formula = Formula(options.softcap, options.label_smoothing or None, options.z_loss)
    launch(
        _loss_kernel, (x.shape[0],), _view(x), _view(grad), bias if bias is None else bias[first:], targets, losses,
        stats, _view(rates), first, x.shape[1], vocab or x.shape[1], options.ignore_index, formula,
        **config("cross_entropy", x.device, dtype=x.dtype),
    )  # fmt: skip


def scaled(gradient: Tensor | None, factors: Tensor) -> Tensor | None:
    """Return the contiguous gradient times a scalar, or (N, V) times (N,).

    It is scaled in place, unless the graph is kept and the gradient may be asked for again.
    """
    if gradient is None:
        return None
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    width, stride = (gradient.shape[1], factors.stride(0)) if factors.dim() else (1 << 16, 0)
    grid = (cdiv(gradient.numel(), max(1, width)),)
    options = config("cross_entropy_scale", gradient.device)
    launch(_scale_kernel, grid, gradient, View(factors, stride), width, gradient.numel(), **options)
    return gradient
