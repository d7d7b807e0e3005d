"""The head's cross-entropy in chunks or tiles of logits: the matrix products, and between them the rows of either path.

Rows are matrix rows: one of `hidden` and one of the logits for each position. Rows to ignore are dropped before the
first product; `cross_entropy.py` says what is computed, and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.backend import multiplies, wide_dtype
from afina.kernels.cross_entropy_torch import Options, loss_rows, loss_tile
from afina.kernels.cross_entropy_triton import launch_loss
from afina.kernels.launch import cdiv

# On the CPU a chunk's logits should stay in the last-level cache and still give the matrix products enough rows.
CHUNK_BYTES = 16 << 20
CHUNK_ROWS = (256, 4096)
CPU_PITCH = 1000  # From so many columns on, the rows of a chunk's logits are aligned.
# On a GPU the products want thousands of rows, whatever the vocabulary. A chunk has the larger number of rows where
# their logits take no more than these bytes.
GPU_CHUNK_BYTES = 1_100_000_000
GPU_CHUNK_SHARE = 64  # of a GPU's memory, where that is more: 1.3 GB on an H100, 2.3 on an H200
GPU_CHUNK_ROWS = (2048, 4096)
# The lean mode holds one tile of logits, and those rows of a gradient that are being summed in fp32.
TILE_BYTES = {"torch": 16 << 20, "triton": 32 << 20}  # The torch path makes another tile or two on the way.
SUM_BYTES = 24 << 20
SUM_ROWS = (256, 4096)


class _Gradients(NamedTuple):
    """The gradients of a call, None for those that nobody wants."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Head(NamedTuple):
    """The head's inputs, of which only the n rows that are not ignored count."""

    hidden: Tensor  # (N, C)
    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    where: Tensor | None  # (n,) the places in `hidden` of the rows that count; None if all do
    targets: Tensor  # (n,)
    rates: Tensor | None  # (N,) what the gradients of the rows are multiplied by
    options: Options
    compute: torch.dtype  # of the matrix products
    scale: float  # of every gradient
    learns: bool  # whether the gradient of `weight` is wanted

    def at(self, rows: slice) -> slice | Tensor:
        """The places in `hidden` of these of the n rows."""
        return rows if self.where is None else self.where[rows]

    def rows(self, rows: slice) -> Tensor:
        """These of the n rows, in the dtype of the products."""
        return self.hidden[self.at(rows)].to(self.compute)

    def rate(self, rows: slice) -> Tensor | None:
        """The rates of these of the n rows."""
        return None if self.rates is None else self.rates[self.at(rows)]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return x on the device; the host does not wait for the copy."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)


def _spans(size: int, step: int) -> Iterator[slice]:
    """Cut range(size) into slices of `step`, of which the last may be shorter."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _multiple(n: int) -> int:
    """Round n down to a multiple of 64, so that rows are aligned; an n below 64 stays as it is, or becomes 1."""
    return max(1, n - n % 64 if n > 64 else n)


def _product(h: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Set out = h @ matrix^T, computed in the dtype of h and matrix."""
    return torch.mm(h, matrix.t(), out=out) if h.dtype == out.dtype else out.copy_(h @ matrix.t())


def _accumulate(total: Tensor, a: Tensor, b: Tensor, alpha: float, first: bool) -> None:
    """Add alpha a @ b to the total, or set it to that if `first`; an fp32 total may be of 16-bit factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1, alpha=alpha)
    elif total.is_cuda:
        _mixed_product(a.dtype, a.device)(total, a, b, 0 if first else 1, alpha)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1, alpha=alpha)


def _fused(total: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    """Set total = beta total + alpha a @ b in one product with an fp32 sum."""
    torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)


def _beside(total: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float, **options: Any) -> None:
    """Set total = beta total + alpha a @ b, with the product in a tensor of its own."""
    product = torch.mm(a, b, **options)
    if beta:
        total.add_(product, alpha=alpha)
    else:
        torch.mul(product, alpha, out=total)


@cache
def _mixed_product(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int, float], None]:
    """Find the best way that this torch has of adding a product of 16-bit matrices to an fp32 one.

    Each is tried once on ones, since a torch may lack it, or take the arguments and still give another sum.
    """
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


def head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: Options, wanted: tuple[bool, ...],
    rates: Tensor | None = None, every: bool = False,
) -> tuple[Tensor, _Gradients]:  # fmt: skip
    """Compute the loss, and those of its gradients by (hidden, weight, bias) that are wanted.

    hidden (N, C), weight (V, C), bias (V,), targets (N,) int64. The loss is of the reduction of the options; with rates
    (N,) the gradients are those of sum(rates * losses), and with `every`, which takes a target for each row and reads
    nothing on the host, so is the loss.
    """
    rows, device = hidden.shape[0], hidden.device
    # This is the one wait for the GPU, and there is none if the targets are on the CPU.
    index = None if every else (targets != options.ignore_index).nonzero().squeeze(1)
    count = rows if index is None else index.numel()
    dense = count == rows
    targets = to_device(targets.contiguous() if index is None or dense else targets[index], device)
    wide = wide_dtype(hidden.dtype)
    compute = _compute_dtype(hidden, options.backend)
    scale = 1.0 / max(1, count) if options.reduction == "mean" else 1.0
    where = None if index is None or dense else to_device(index, device)
    head = _Head(hidden, weight, bias, where, targets, rates, options, compute, scale, wanted[1])
    losses = torch.zeros(rows, dtype=wide, device=device)
    new = torch.empty if count else torch.zeros
    size = _chunk_rows(weight.shape, count, compute, options.backend, wanted[1], _room(device))
    # A single chunk's product is the weight's gradient: nothing is added to it, so it may be rounded at once.
    whole = weight.dtype if options.lean else compute if count <= size else wide
    gradients = _Gradients(
        (new if dense else torch.zeros)(hidden.shape, dtype=hidden.dtype, device=device) if wanted[0] else None,
        new(weight.shape, dtype=whole, device=device) if wanted[1] else None,
        torch.zeros(weight.shape[0], dtype=wide, device=device) if wanted[2] else None,
    )
    (_run_tiles if options.lean else _run_chunks)(head, losses, gradients)
    if every and rates is not None:
        losses = losses * rates
    return losses if options.reduction == "none" else losses.sum() * scale, _Gradients(
        gradients.hidden,
        None if gradients.weight is None else gradients.weight.to(weight.dtype),
        None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype),
    )


def workspace_bytes(weight: Tensor, rows: int, *, learns: bool, softcap: float | None, backend: str) -> int:
    """How much `head_loss` takes, unless it is lean, beside its arguments and the gradients that it returns.

    weight (V, C) may be on meta; `rows` are those that count, and `learns` says whether its gradient is wanted.
    """
    vocab, compute, wide = weight.shape[0], _compute_dtype(weight, backend), wide_dtype(weight.dtype)
    size = _chunk_rows(weight.shape, rows, compute, backend, learns, _room(weight.device))
    logits = min(size, rows) * _pitch(vocab, backend) * (compute if backend == "triton" else wide).itemsize
    if backend == "torch" and softcap is not None:
        logits *= 3  # The torch path makes the slope of the cap in two steps.
    copy = weight.numel() * compute.itemsize if compute != weight.dtype else 0
    total = compute if rows <= size else wide  # what the gradient is summed in
    return logits + copy + (weight.numel() * total.itemsize if learns and total != weight.dtype else 0)


def _compute_dtype(hidden: Tensor, backend: str) -> torch.dtype:
    """The dtype of the matrix products.

    On a CPU without instructions for them torch's products of 16-bit types are slow, so the torch path runs in fp32.
    """
    slow = hidden.device.type == "cpu" and backend == "torch" and not multiplies(hidden.dtype)
    return wide_dtype(hidden.dtype) if slow else hidden.dtype


def _pitch(vocab: int, backend: str) -> int:
    """How far apart the rows of a chunk's logits lie.

    They start at multiples of 128 bytes, which cuBLAS and Triton need to load 16 bytes at a time; without them, the
    product with a vocabulary of 50,257 takes half as long again on a CPU.
    """
    return 64 * cdiv(vocab, 64) if backend == "triton" or vocab > CPU_PITCH else vocab


def _room(device: torch.device) -> int:
    """How many bytes of logits a chunk may have, by the GPU's memory; for a tensor on meta that of the GPU here."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return GPU_CHUNK_BYTES
    gpu = device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return max(GPU_CHUNK_BYTES, torch.cuda.get_device_properties(gpu).total_memory // GPU_CHUNK_SHARE)


def _chunk_rows(
    shape: Sequence[int], count: int, compute: torch.dtype, backend: str, learns: bool, room: int = GPU_CHUNK_BYTES
) -> int:
    """How many of `count` rows of logits are made at a time.

    shape: (V, C) of the weight; `learns`: whether its gradient is wanted; `room`: the bytes that a chunk may have.
    """
    vocab, width = shape
    if backend == "torch":
        return max(CHUNK_ROWS[0], min(CHUNK_ROWS[1], CHUNK_BYTES // (4 * max(1, vocab))))
    few, many = GPU_CHUNK_ROWS
    # Another chunk costs something only where its share must be added to the weight's gradient.
    most = many if learns and many * vocab * compute.itemsize <= room else few
    # Several chunks sum a 16-bit gradient in fp32, V x C of 4 bytes: 2 C more rows of logits take no more room.
    if learns and compute.itemsize == 2 and count <= most + 2 * width:
        most = max(most, 128 * cdiv(count, 128))
    # Chunks of nearly one size are faster than whole ones and a sliver at the end.
    return min(most, 128 * cdiv(cdiv(count, max(1, cdiv(count, most))), 128)) or most


def _run_chunks(head: _Head, losses: Tensor, gradients: _Gradients) -> None:
    """Fill `losses` (N,) and the gradients chunk by chunk: rows of `hidden`, each with all columns of its logits."""
    (vocab, _), count, wide, device = head.weight.shape, head.targets.numel(), losses.dtype, losses.device
    size = _chunk_rows(head.weight.shape, count, head.compute, head.options.backend, head.learns, _room(device))
    triton, pitch = head.options.backend == "triton", _pitch(vocab, head.options.backend)
    dhidden, dweight, dbias = gradients
    matrix = head.weight.to(head.compute)
    room = torch.empty(min(size, count), pitch, dtype=head.compute if triton else wide, device=device)
    for rows in _spans(count, size):
        h, here, targets, rate = head.rows(rows), head.at(rows), head.targets[rows], head.rate(rows)
        x = _product(h, matrix, room[: h.shape[0], :vocab])
        if triton:
            found = torch.empty(h.shape[0], dtype=wide, device=device)
            grad = None if all(g is None for g in gradients) else x
            launch_loss(x, grad, targets, head.bias, rate, head.options, losses=found)
        else:
            if head.bias is not None:
                x += head.bias
            found = loss_rows(x, targets, head.options, room[: h.shape[0]] if pitch > vocab else None, rate)
        losses[here] = found
        grad = x.to(head.compute)
        if dhidden is not None:
            dhidden[here] = torch.addmm(h, grad, matrix, beta=0, alpha=head.scale).to(dhidden.dtype)
        if dweight is not None:
            _accumulate(dweight, grad.t(), h, head.scale, rows.start == 0)
        if dbias is not None:
            dbias.add_(x.sum(0, dtype=wide), alpha=head.scale)


def _run_tiles(head: _Head, losses: Tensor, gradients: _Gradients) -> None:
    """Fill `losses` (N,) and the gradients tile by tile, as the lean mode does.

    A tile of the logits has `held` rows and `other` columns, or in the last pass `held` columns and fewer rows; the
    gradient that belongs to what is held is summed in fp32.
    """
    (vocab, width), count, wide, device = head.weight.shape, head.targets.numel(), losses.dtype, losses.device
    dhidden, dweight, dbias = gradients
    compute, options, scale = head.compute, head.options, head.scale
    step, dtype = (launch_loss, compute) if options.backend == "triton" else (loss_tile, wide)
    held = max(SUM_ROWS[0], min(SUM_ROWS[1], _multiple(SUM_BYTES // (wide.itemsize * max(1, width)))))
    # Where the weight is converted, its converted rows take room too, so there are no more of them than held rows.
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

    # A gradient's rows are summed in fp32 and rounded once. Where all rows of hidden are held, every tile serves both
    # gradients; otherwise there is a pass for each gradient.
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
    # Where some rows are ignored, those of a tile are copied out of hidden, and these copies take room too.
    most = min(other, held * wide.itemsize // compute.itemsize)
    for columns in _spans(vocab, held):
        total = torch.empty(columns.stop - columns.start, width, dtype=wide, device=device)
        for rows in _spans(count, most):
            h = head.rows(rows)
            x = gradient(h, rows, columns, held, None if by_rows else dbias)
            _accumulate(total, x.t(), h, scale, rows.start == 0)
        dweight[columns] = total.to(dweight.dtype)
