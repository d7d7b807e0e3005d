"""Cross-entropy of a language model's head, without ever holding the logits of a batch.

For a row with target t and logits x = cap(hidden . weight^T + bias), cap(a) = softcap * tanh(a / softcap) if given:
    lse = log sum_j exp(x_j)
    loss = lse - (1 - s) x_t - s mean(x) + z lse^2              s = label_smoothing, z = z_loss
    dloss/dx_j = (1 + 2 z lse) p_j - (1 - s) [j = t] - s / V    p = softmax(x)
Rows to ignore are dropped before the first product. The others go in chunks: logits of a chunk -> its losses, and the
gradient written over the logits -> d hidden, d weight += . So the forward pass also makes the gradients (the softmax is
needed for the loss anyway) and the backward pass only multiplies by the upstream gradient. With reduction "none" that
gradient differs by row and is not known yet, so the backward pass runs the chunks again.
FLOPs: 6 N V C with both gradients, 4 without one of them. Memory: one chunk of logits + the gradients.
On a GPU the products are cuBLAS's, and one Triton kernel does the rest, a program a row: maximum and sum in one pass
over the row, the gradient in another, 6 V bytes a row of 16-bit logits.
`lean` holds a tile of the logits instead of a chunk: the losses tile by tile first, then each tile again for the
gradients, 8 N V C FLOPs; where the fp32 sum of all of d hidden would not fit, once more for d weight alone, 10.
The idea: Liger Kernel (https://arxiv.org/abs/2410.10989), Cut Cross-Entropy (https://arxiv.org/abs/2411.09009); the
maximum and the sum in one pass: https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import as_rows, check_floating, check_like, check_shape, choose, wide_dtype
from afina.kernels.cross_entropy_rows import Options, loss_rows, torch_tile
from afina.kernels.launch import cdiv, config, jit, launch, tl

REDUCTIONS = ("mean", "sum", "none")
# On the CPU a chunk's logits should stay in the last-level cache and still give the matrix products enough rows.
CHUNK_BYTES = 16 << 20
CHUNK_ROWS = (256, 4096)
CPU_PITCH = 1000  # columns from which on their rows are aligned
# On a GPU the products want thousands of rows, whatever the vocabulary: the most, if their logits take no more bytes.
GPU_CHUNK_BYTES = 1_100_000_000
GPU_CHUNK_ROWS = (2048, 4096)
# Lean: a tile of logits, and the rows of a gradient that are summed in fp32 at a time.
TILE_BYTES = {"torch": 16 << 20, "triton": 32 << 20}  # torch makes another tile or two on the way
SUM_BYTES = 24 << 20
SUM_ROWS = (256, 4096)
LOWEST = tl.constexpr(-3.4028234663852886e38)


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The formulas above, written plainly; logits (N, V), targets (N,)."""
    x = logits.to(wide_dtype(logits.dtype))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    kept = targets != ignore_index
    inside = (targets >= 0) & (targets < x.shape[1])
    lse = torch.logsumexp(x, dim=1)
    at_target = x.gather(1, targets.long().where(inside, 0).unsqueeze(1)).squeeze(1)
    loss = lse - (1 - label_smoothing) * at_target - label_smoothing * x.mean(1) + z_loss * lse.square()
    loss = loss.where(inside, torch.nan).where(kept, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / max(1, int(kept.sum())) if reduction == "mean" else loss.sum()


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    wide = wide_dtype(hidden.dtype)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return cross_entropy_reference(logits, targets, **options)


@jit
def _load(logits, bias, column, inside, softcap):
    """Logits in fp32 after bias and cap (-inf where not `inside`, None: all are), and the slope of the cap."""
    x = tl.load(logits + column, mask=inside).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, mask=inside).to(tl.float32)
    slope = 1.0
    if softcap is not None:
        # tanh of |x|: nothing overflows, and the slope stays exact where the cap is reached.
        e = tl.exp(tl.abs(x) * (-2.0 / softcap))
        r = 1.0 / (1.0 + e)
        high = softcap * (1.0 - e) * r
        x = tl.where(x < 0.0, -high, high)
        slope = 4.0 * e * r * r
    if inside is not None:
        x = tl.where(inside, x, float("-inf"))
    return x, slope


@jit
def _scan(logits, bias, column, inside, softcap, smoothing, highest, exps, total):
    """Add a tile (DEPTH, LANES) to the running maxima, sums of exp(x - maximum) and sums of x of the lanes.

    Lanes are joined only at the row's end, so no thread waits for another on the way there.
    """
    x, _ = _load(logits, bias, column, inside, softcap)
    top = tl.maximum(highest, tl.max(x, 0))
    exps = exps * tl.exp(highest - top) + tl.sum(tl.exp(x - top[None, :]), 0)
    if smoothing is not None:
        total += tl.sum(x if inside is None else tl.where(inside, x, 0.0), 0)
    return top, exps, total


@jit
def _write(logits, dlogits, bias, column, inside, at, highest, boost, spike, level, softcap):
    """The gradient of a tile, the true class's in fp32 until it is whole."""
    x, slope = _load(logits, bias, column, inside, softcap)
    grad = boost * tl.exp(x - highest) - level
    grad = tl.where(column == at, grad - spike, grad) * slope
    tl.store(dlogits + column, grad.to(dlogits.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["first", "ignore_index"])
def _loss_kernel(
    logits, dlogits, bias, targets, losses, stats, rates, stride, dstride, rate_stride, first, width, vocab,
    ignore_index, softcap, smoothing, z_loss, SCAN: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row of logits (rows, width), the columns from `first` on of `vocab`: its loss, and its gradient into dlogits.

    dlogits may be logits, or None. rates: what the row's gradient is multiplied by. stats (rows, 4): the maximum, the
    sum of exponentials, the target's logit and the sum of the columns up to these; without SCAN, of the whole row, and
    then only the gradient is made.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    logits += row * stride
    if stats is not None:
        stats += row * 4
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = width // (DEPTH * LANES)
    tail = whole * (DEPTH * LANES) + tile
    if dlogits is not None:
        dlogits += row * dstride
    if target == ignore_index:
        if SCAN:
            tl.store(losses + row, 0.0)
        if dlogits is not None:
            for i in range(whole + 1):
                column = i * (DEPTH * LANES) + tile
                tl.store(dlogits + column, tl.zeros_like(column).to(dlogits.dtype.element_ty), mask=column < width)
        return

    valid = (target >= 0) & (target < vocab)
    at = (target - first).to(tl.int32)
    if SCAN:
        # Read first: after the scan, which ends in a barrier, a faster warp may already have written over it.
        found = valid & (target >= first) & (target < first + width)
        at_target, _ = _load(logits, bias, at, found, softcap)
        highs = tl.full([LANES], LOWEST, tl.float32)
        exps = tl.zeros([LANES], tl.float32)
        sums = tl.zeros([LANES], tl.float32)
        for i in range(whole):
            column = i * (DEPTH * LANES) + tile
            highs, exps, sums = _scan(logits, bias, column, None, softcap, smoothing, highs, exps, sums)
        highs, exps, sums = _scan(logits, bias, tail, tail < width, softcap, smoothing, highs, exps, sums)
        highest = tl.max(highs, 0)
        exp_sum = tl.sum(exps * tl.exp(highs - highest), 0)
        total = tl.sum(sums, 0)
        if stats is not None:
            # The columns before these.
            more = first > 0
            before = tl.load(stats, mask=more, other=LOWEST)
            exp_before = tl.load(stats + 1, mask=more, other=0.0)
            top = tl.maximum(before, highest)
            exp_sum = exp_before * tl.exp(before - top) + exp_sum * tl.exp(highest - top)
            highest = top
            at_target = tl.where(found, at_target, tl.load(stats + 2, mask=more, other=0.0))
            total += tl.load(stats + 3, mask=more, other=0.0)
            tl.store(stats, highest)
            tl.store(stats + 1, exp_sum)
            tl.store(stats + 2, at_target)
            tl.store(stats + 3, total)
    else:
        highest = tl.load(stats)
        exp_sum = tl.load(stats + 1)
    log_sum = tl.log(exp_sum)
    lse = highest + log_sum
    if SCAN:
        # Differences of logits first: both may be large.
        loss = highest - at_target
        if smoothing is not None:
            loss = (1.0 - smoothing) * loss + smoothing * (highest - total / vocab)
        loss += log_sum + z_loss * lse * lse
        tl.store(losses + row, tl.where(valid, loss, float("nan")))
    if dlogits is not None:
        rate = tl.where(valid, 1.0, float("nan"))
        if rates is not None:
            rate *= tl.load(rates + row * rate_stride).to(tl.float32)
        boost = rate * (1.0 + 2.0 * z_loss * lse) / exp_sum
        spike = rate
        level = 0.0
        if smoothing is not None:
            spike = rate * (1.0 - smoothing)
            level = rate * smoothing / vocab
        # Backwards: the end of the row was read last, and may still be in the L2 cache.
        _write(logits, dlogits, bias, tail, tail < width, at, highest, boost, spike, level, softcap)
        for i in range(whole):
            column = (whole - 1 - i) * (DEPTH * LANES) + tile
            _write(logits, dlogits, bias, column, None, at, highest, boost, spike, level, softcap)


@jit
def _scale_kernel(x, factors, factor_stride, width, size, BLOCK: tl.constexpr):
    """x (size,) in place, each run of `width` values times its factor; nothing is touched where that is 1."""
    run = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + run * factor_stride).to(tl.float32)
    if factor != 1.0:
        x += run * width
        end = tl.minimum(width, size - run * width).to(tl.int32)
        for start in range(0, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < end
            value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(x + column, value.to(x.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, grad: Tensor | None, targets: Tensor, bias: Tensor | None, rates: Tensor | None, options: Options, *,
    losses: Tensor | None = None, stats: Tensor | None = None, first: int = 0, vocab: int = 0,
) -> None:  # fmt: skip
    """Run the kernel on x (n, columns); without `losses`, only for the gradient, from the stats of whole rows."""
    launch(
        _loss_kernel, (x.shape[0],), x, grad, bias if bias is None else bias[first:], targets, losses, stats, rates,
        x.stride(0), 0 if grad is None else grad.stride(0), 0 if rates is None else rates.stride(0), first, x.shape[1],
        vocab or x.shape[1], options.ignore_index, options.softcap, options.label_smoothing or None, options.z_loss,
        SCAN=losses is not None, **config("cross_entropy", x.device, dtype=x.dtype),
    )  # fmt: skip


def _scaled(gradient: Tensor | None, factors: Tensor) -> Tensor | None:
    """The contiguous gradient times a scalar, or (N, V) times (N,), in place unless the graph is kept for more."""
    if gradient is None:
        return None
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    width, stride = (gradient.shape[1], factors.stride(0)) if factors.dim() else (1 << 16, 0)
    grid = (cdiv(gradient.numel(), max(1, width)),)
    options = config("cross_entropy_scale", gradient.device)
    launch(_scale_kernel, grid, gradient, factors, stride, width, gradient.numel(), **options)
    return gradient


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Head(NamedTuple):
    """The rows of `hidden` that are not ignored: where they are (None: they are all), their targets and rates."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    where: Tensor | None
    targets: Tensor
    rates: Tensor | None
    options: Options
    compute: torch.dtype
    scale: float
    learns: bool  # whether the gradient of `weight` is wanted

    def at(self, rows: slice) -> slice | Tensor:
        return rows if self.where is None else self.where[rows]

    def rows(self, rows: slice) -> Tensor:
        return self.hidden[self.at(rows)].to(self.compute)

    def rate(self, rows: slice) -> Tensor | None:
        return None if self.rates is None else self.rates[self.at(rows)]


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _multiple(n: int) -> int:
    """n rounded down to a multiple of 64, for aligned rows, where it is not smaller than that."""
    return max(1, n - n % 64 if n > 64 else n)


def _product(h: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """out = h @ matrix^T, computed in their dtype."""
    return torch.mm(h, matrix.t(), out=out) if h.dtype == out.dtype else out.copy_(h @ matrix.t())


def _accumulate(total: Tensor, a: Tensor, b: Tensor, alpha: float, first: bool) -> None:
    """total = alpha a @ b, and the total so far unless `first`; an fp32 total may have 16-bit factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1, alpha=alpha)
    elif total.is_cuda:
        _mixed_product(a.dtype, a.device)(total, a, b, 0 if first else 1, alpha)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1, alpha=alpha)


def _fused(total: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)


def _beside(total: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float, **options: Any) -> None:
    product = torch.mm(a, b, **options)
    if beta:
        total.add_(product, alpha=alpha)
    else:
        torch.mul(product, alpha, out=total)


@cache
def _mixed_product(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int, float], None]:
    """The best way that this torch has of adding a product of 16-bit matrices to an fp32 one, tried once."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    for product in (_fused, partial(_beside, out_dtype=torch.float32)):
        total = torch.ones(16, 16, device=device, dtype=torch.float32)
        try:
            product(total, ones.t(), ones, 1, 2.0)
        except (RuntimeError, TypeError):
            continue
        if bool((total == 33).all()):
            return product
    return _beside


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options, wanted: tuple[bool, ...],
    rates: Tensor | None = None,
) -> tuple[Tensor, _Gradients]:  # fmt: skip
    """The loss, and for (hidden, weight, bias) the gradients of it that are wanted, or with rates (N,) those of
    sum(rates * losses)."""
    # The one wait for the GPU, and none if the targets are on the CPU.
    index = (targets != options.ignore_index).nonzero().squeeze(1)
    rows, count, device = hidden.shape[0], index.numel(), hidden.device
    dense = count == rows
    targets = _to(targets.contiguous() if dense else targets[index], device)
    wide = wide_dtype(hidden.dtype)
    # torch's low-precision matrix products are slow and round on a CPU; its path runs in fp32 there.
    compute = wide if device.type == "cpu" and options.backend == "torch" else hidden.dtype
    scale = 1.0 / max(1, count) if options.reduction == "mean" else 1.0
    where = None if dense else _to(index, device)
    head = _Head(hidden, weight, bias, where, targets, rates, options, compute, scale, wanted[1])
    losses = torch.zeros(rows, dtype=wide, device=device)
    new = torch.empty if count else torch.zeros
    # A single chunk's product is the weight's gradient: nothing is added to it, so it may be rounded at once.
    whole = weight.dtype if options.lean else compute if count <= _chunk_rows(head) else wide
    gradients = _Gradients(
        (new if dense else torch.zeros)(hidden.shape, dtype=hidden.dtype, device=device) if wanted[0] else None,
        new(weight.shape, dtype=whole, device=device) if wanted[1] else None,
        torch.zeros(weight.shape[0], dtype=wide, device=device) if wanted[2] else None,
    )
    (_run_tiles if options.lean else _run_chunks)(head, losses, gradients)
    return losses if options.reduction == "none" else losses.sum() * scale, _Gradients(
        gradients.hidden,
        None if gradients.weight is None else gradients.weight.to(weight.dtype),
        None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
    )


def _chunk_rows(head: _Head) -> int:
    vocab, count = head.weight.shape[0], head.targets.numel()
    if head.options.backend == "torch":
        return max(CHUNK_ROWS[0], min(CHUNK_ROWS[1], CHUNK_BYTES // (4 * max(1, vocab))))
    few, many = GPU_CHUNK_ROWS
    # One chunk more only costs where its share must be added to the weight's gradient.
    most = many if head.learns and many * vocab * head.compute.itemsize <= GPU_CHUNK_BYTES else few
    # Chunks of one size rather than a sliver at the end.
    return min(most, 128 * cdiv(cdiv(count, max(1, cdiv(count, most))), 128)) or most


def _run_chunks(head: _Head, losses: Tensor, gradients: _Gradients) -> None:
    vocab, size, wide, device = head.weight.shape[0], _chunk_rows(head), losses.dtype, losses.device
    triton = head.options.backend == "triton"
    dhidden, dweight, dbias = gradients
    matrix = head.weight.to(head.compute)
    # Rows start at multiples of 128 bytes, which cuBLAS and Triton need to load 16 bytes at a time; without them, the
    # product with a vocabulary of 50,257 takes half as long again on a CPU.
    pitch = 64 * cdiv(vocab, 64) if triton or vocab > CPU_PITCH else vocab
    dtype = head.compute if triton else wide
    room = torch.empty(min(size, head.targets.numel()), pitch, dtype=dtype, device=device)
    for rows in _spans(head.targets.numel(), size):
        h, here, targets, rate = head.rows(rows), head.at(rows), head.targets[rows], head.rate(rows)
        x = _product(h, matrix, room[: h.shape[0], :vocab])
        if triton:
            found = torch.empty(h.shape[0], dtype=wide, device=device)
            grad = None if all(g is None for g in gradients) else x
            _launch(x, grad, targets, head.bias, rate, head.options, losses=found)
        else:
            if head.bias is not None:
                x += head.bias
            found = loss_rows(x, targets, head.options, room[: h.shape[0]] if pitch > vocab else None)
            if rate is not None:
                x.mul_(rate.unsqueeze(1))
        losses[here] = found
        grad = x.to(head.compute)
        if dhidden is not None:
            dhidden[here] = torch.addmm(h, grad, matrix, beta=0, alpha=head.scale).to(dhidden.dtype)
        if dweight is not None:
            _accumulate(dweight, grad.t(), h, head.scale, rows.start == 0)
        if dbias is not None:
            dbias.add_(x.sum(0, dtype=wide), alpha=head.scale)


def _run_tiles(head: _Head, losses: Tensor, gradients: _Gradients) -> None:
    """By tiles of the logits, of `held` rows (or columns) and `other` columns (or rows)."""
    (vocab, width), count, wide, device = head.weight.shape, head.targets.numel(), losses.dtype, losses.device
    dhidden, dweight, dbias = gradients
    compute, options, scale = head.compute, head.options, head.scale
    step, dtype = (_launch, compute) if options.backend == "triton" else (torch_tile, wide)
    held = max(SUM_ROWS[0], min(SUM_ROWS[1], _multiple(SUM_BYTES // (wide.itemsize * max(1, width)))))
    # Where the weight is converted, its converted rows take room too.
    most = 64 * cdiv(vocab, 64) if compute == head.weight.dtype else held
    held = min(held, max(1, count))
    other = min(most, _multiple(TILE_BYTES[options.backend] // (dtype.itemsize * held)))
    room = torch.empty(held * other, dtype=dtype, device=device)
    stats = torch.empty(count, 4, dtype=wide, device=device)
    found = torch.empty(count, dtype=wide, device=device)

    def logits(h: Tensor, columns: slice, pitch: int) -> Tensor:
        x = room[: h.shape[0] * pitch].view(h.shape[0], pitch)[:, : columns.stop - columns.start]
        return _product(h, head.weight[columns].to(compute), x)

    def gradient(h: Tensor, rows: slice, columns: slice, pitch: int, summed: Tensor | None) -> Tensor:
        x = logits(h, columns, pitch)
        step(x, x, head.targets[rows], head.bias, head.rate(rows), options, stats=stats[rows], first=columns.start,
             vocab=vocab)  # fmt: skip
        if summed is not None:
            summed[columns].add_(x.sum(0, dtype=wide), alpha=scale)
        return x.to(compute)

    for rows in _spans(count, held):
        h = head.rows(rows)
        for columns in _spans(vocab, other):
            step(logits(h, columns, other), None, head.targets[rows], head.bias, None, options, losses=found[rows],
                 stats=stats[rows], first=columns.start, vocab=vocab)  # fmt: skip
    losses[head.at(slice(0, count))] = found
    if all(g is None for g in gradients):
        return

    # A gradient's rows are summed in fp32 and rounded once: where all rows of hidden are few enough, every tile is used
    # for both gradients, else there is a pass for each.
    both = count <= held
    by_rows = both or dhidden is not None or dweight is None
    for rows in _spans(count if by_rows else 0, held):
        h = head.rows(rows)
        total = torch.empty(h.shape if dhidden is not None else 0, dtype=wide, device=device)
        for columns in _spans(vocab, other):
            x = gradient(h, rows, columns, other, dbias)
            if dhidden is not None:
                _accumulate(total, x, head.weight[columns].to(compute), scale, columns.start == 0)
            if dweight is not None and both and x.dtype == dweight.dtype:
                _accumulate(dweight[columns], x.t(), h, scale, True)
            elif dweight is not None and both:
                dweight[columns] = (x.t() @ h).mul_(scale).to(dweight.dtype)
        if dhidden is not None:
            dhidden[head.at(rows)] = total.to(dhidden.dtype)
    if dweight is None or both:
        return
    most = min(other, held * wide.itemsize // compute.itemsize)  # rows of hidden are copied where some are ignored
    for columns in _spans(vocab, held):
        total = torch.empty(columns.stop - columns.start, width, dtype=wide, device=device)
        for rows in _spans(count, most):
            h = head.rows(rows)
            x = gradient(h, rows, columns, held, None if by_rows else dbias)
            _accumulate(total, x.t(), h, scale, rows.start == 0)
        dweight[columns] = total.to(dweight.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Options,
        wanted: tuple[bool, ...],
    ) -> Tensor:
        ctx.options = options
        if options.reduction == "none":
            losses, _ = _run(hidden, weight, bias, targets, options, (False, False, False))
            ctx.save_for_backward(hidden, weight, bias, targets)
            return losses
        loss, gradients = _run(hidden, weight, bias, targets, options, wanted)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Any
        if ctx.options.reduction == "none":
            hidden, weight, bias, targets = ctx.saved_tensors
            _, gradients = _run(hidden, weight, bias, targets, ctx.options, ctx.needs_input_grad[:3], upstream)
        elif ctx.options.backend == "triton":
            gradients = [_scaled(g, upstream) for g in ctx.saved_tensors]
        else:
            gradients = ctx.saved_tensors
            # loss.backward() asks for exactly 1: save the passes over the weight's gradient.
            if upstream.item() != 1.0:
                gradients = [None if g is None else g * upstream.to(g.dtype) for g in gradients]
        return (*gradients, None, None, None)


class _TritonCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, options: Options, wanted: bool) -> Tensor:
        rows = as_rows(logits)
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) if wanted else None
        losses = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        rate = None
        if options.reduction == "mean":
            kept = (targets != options.ignore_index).sum(dtype=torch.float32)
            rate = kept.clamp_(min=1).reciprocal_()
        rates = None if rate is None else rate.expand(losses.shape)
        _launch(rows, grad, targets.contiguous(), None, rates, options, losses=losses)
        ctx.save_for_backward(grad)
        if options.reduction == "none":
            return losses
        return losses.sum() if rate is None else losses.sum().mul_(rate)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return _scaled(grad, upstream), None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, options: Options, wanted: bool) -> Tensor:
        kept = targets != options.ignore_index
        x = logits.detach().to(wide_dtype(logits.dtype), copy=True)
        losses = loss_rows(x, targets.where(kept, 0), options).where(kept, 0.0)
        ctx.scale = 1.0
        if options.reduction == "mean":
            ctx.scale /= max(1, int(kept.sum()))
        ctx.dtype = logits.dtype
        ctx.save_for_backward(x if wanted else None, kept)
        return losses if options.reduction == "none" else losses.sum() * ctx.scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        x, kept = ctx.saved_tensors
        rows = (upstream * ctx.scale).expand(kept.shape).unsqueeze(1)
        return (x * rows).masked_fill_(~kept.unsqueeze(1), 0.0).to(ctx.dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lean: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy (nats) of softmax(hidden @ weight^T + bias) with targets, the logits never stored.

    hidden (N, C), weight (V, C) of hidden's dtype, targets (N,) int64 or int32, bias (V,). The loss is fp32 (fp64 for
    fp64): its mean over the rows that are not ignored, their sum, or (N,) with 0 for ignored rows. All rows ignored:
    0 and zero gradients. A target outside [0, V) other than `ignore_index` gives NaN, not an exception.

    targets may be on the CPU though hidden is on a GPU: then nothing waits for the GPU. With targets there, one wait
    for the list of the rows that are not ignored cannot be avoided.

    Besides the gradients it holds a chunk of logits, on a GPU up to 1.1 GB, and where several chunks add to a 16-bit
    weight's gradient, that gradient in fp32. `lean` holds at most 100 MB instead (C up to 24,576; and 40 bytes a row):
    a tile of logits of at most 32 MiB, the rows of a gradient that are being summed, and copies of rows. It takes a
    third more FLOPs; two thirds if both gradients are wanted of more rows than 6 million / C (at most 4,096).
    Raises ValueError for wrong shapes, dtypes, devices, reduction, softcap, smoothing or backend.
    """
    backend = choose("linear_cross_entropy", backend, hidden)
    check_floating("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected (N, C), found {tuple(hidden.shape)}")
    check_like("weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected (V, {hidden.shape[1]}), found {tuple(weight.shape)}")
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
        if bias.device != hidden.device:
            raise ValueError(f"bias: expected on {hidden.device}, found on {bias.device}")
        bias = bias.contiguous()
    options = _check(hidden, targets, ignore_index, reduction, softcap, label_smoothing, z_loss, backend, lean)
    grad = torch.is_grad_enabled()
    wanted = tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets.long(), options, wanted)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy (nats) of logits (N, V) with targets (N,); everything else as `linear_cross_entropy`."""
    backend = choose("cross_entropy", backend, logits)
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits: expected (N, V), found {tuple(logits.shape)}")
    options = _check(logits, targets, ignore_index, reduction, softcap, label_smoothing, z_loss, backend)
    function = _TritonCrossEntropy if backend == "triton" else _CrossEntropy
    wanted = torch.is_grad_enabled() and logits.requires_grad
    return function.apply(logits, _to(targets.long(), logits.device), options, wanted)


def _check(
    rows: Tensor, targets: Tensor, ignore_index: int, reduction: str, softcap: float | None, label_smoothing: float,
    z_loss: float, backend: str, lean: bool = False,
) -> Options:  # fmt: skip
    check_shape("targets", targets, rows.shape[:1])
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32, found {targets.dtype}")
    if targets.device != rows.device and targets.device.type != "cpu":
        raise ValueError(f"targets: expected on {rows.device} or the CPU, found on {targets.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {reduction!r}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected in [0, 1), found {label_smoothing}")
    cap = None if softcap is None else float(softcap)
    return Options(ignore_index, reduction, cap, float(label_smoothing), float(z_loss), backend, lean)
