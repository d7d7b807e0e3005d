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
The idea: Liger Kernel (https://arxiv.org/abs/2410.10989), Cut Cross-Entropy (https://arxiv.org/abs/2411.09009).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import check_floating, check_like, check_shape, choose

REDUCTIONS = ("mean", "sum", "none")
# A chunk's logits should stay in the last-level cache and still give the matrix products enough rows.
CHUNK_BYTES = 16 << 20
CHUNK_ROWS = (256, 4096)


class _Options(NamedTuple):
    ignore_index: int
    softcap: float | None
    label_smoothing: float
    z_loss: float


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
    x = logits.to(_wide(logits.dtype))
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
    wide = _wide(hidden.dtype)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return cross_entropy_reference(logits, targets, **options)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _loss_rows(x: Tensor, targets: Tensor, options: _Options) -> Tensor:
    """Losses (n,) of the logits x (n, V); x is overwritten by their gradient. Targets here are never ignored ones."""
    softcap, smoothing, z_loss = options.softcap, options.label_smoothing, options.z_loss
    slope = None
    if softcap is not None:
        x.div_(softcap).tanh_()
        slope = 1 - x * x
        x.mul_(softcap)
    inside = (targets >= 0) & (targets < x.shape[1])
    column = targets.where(inside, 0).unsqueeze(1)
    at_target = x.gather(1, column).squeeze(1)
    mean = x.mean(1) if smoothing else None
    highest = x.amax(1)
    # In place: the CPU and CUDA kernels read a row's maximum and sum before they write it (a test watches this).
    torch.softmax(x, dim=1, out=x)
    lse = highest - x.amax(1).log_()
    loss = lse - at_target if mean is None else lse - (1 - smoothing) * at_target - smoothing * mean
    if z_loss:
        loss += z_loss * lse.square()
        x.mul_((1 + 2 * z_loss * lse).unsqueeze(1))
    if smoothing:
        x.sub_(smoothing / x.shape[1])
    x.scatter_add_(1, column, torch.full_like(at_target, smoothing - 1).unsqueeze(1))
    if slope is not None:
        x.mul_(slope)
    if not inside.all():
        outside = ~inside
        loss[outside] = torch.nan
        x[outside] = torch.nan
    return loss


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: _Options,
    wanted: tuple[bool, bool, bool],
    scale: float = 1.0,
    rates: Tensor | None = None,
) -> tuple[Tensor, _Gradients]:
    """Losses (N,), and for (hidden, weight, bias) the gradients that are wanted of scale * sum(losses), or with rates
    (N,) of scale * sum(rates * losses)."""
    rows, width, vocab = hidden.shape[0], hidden.shape[1], weight.shape[0]
    wide = _wide(hidden.dtype)
    # Low-precision matrix products are slow and round on a CPU; there they run in fp32.
    compute = wide if hidden.device.type == "cpu" else hidden.dtype
    losses = torch.zeros(rows, dtype=wide, device=hidden.device)
    new = hidden.new_zeros
    dhidden = hidden.new_zeros(rows, width) if wanted[0] else None
    dweight = new((vocab, width), dtype=wide) if wanted[1] else None
    dbias = new(vocab, dtype=wide) if wanted[2] else None
    kept = (targets != options.ignore_index).nonzero().squeeze(1)
    dense = kept.numel() == rows
    matrix = weight.to(compute)
    size = max(CHUNK_ROWS[0], min(CHUNK_ROWS[1], CHUNK_BYTES // (4 * max(1, vocab))))
    buffer = torch.empty(min(size, kept.numel()), vocab, dtype=wide, device=hidden.device)
    for start in range(0, kept.numel(), size):
        index = kept[start : start + size]
        here = slice(start, start + size) if dense else index
        h = hidden[here].to(compute)
        x = buffer[: index.numel()]
        if compute == wide:
            torch.mm(h, matrix.t(), out=x)
        else:
            x.copy_(h @ matrix.t())
        if bias is not None:
            x += bias
        losses[here] = _loss_rows(x, targets[here], options)
        if rates is not None:
            x.mul_(rates[here].unsqueeze(1))
        grad = x.to(compute)
        if dhidden is not None:
            dhidden[here] = torch.addmm(h, grad, matrix, beta=0, alpha=scale).to(hidden.dtype)
        if dweight is not None and compute == wide:
            dweight.addmm_(grad.t(), h, alpha=scale)
        elif dweight is not None:
            dweight.add_(grad.t() @ h, alpha=scale)
        if dbias is not None:
            dbias.add_(x.sum(0), alpha=scale)
    return losses, _Gradients(
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: _Options,
        reduction: str,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        ctx.options, ctx.reduction = options, reduction
        if reduction == "none":
            losses, _ = _run(hidden, weight, bias, targets, options, (False, False, False))
            ctx.save_for_backward(hidden, weight, bias, targets)
            return losses
        scale = 1.0
        if reduction == "mean":
            scale /= max(1, int((targets != options.ignore_index).sum()))
        losses, gradients = _run(hidden, weight, bias, targets, options, wanted, scale)
        ctx.save_for_backward(*gradients)
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Any
        if ctx.reduction == "none":
            hidden, weight, bias, targets = ctx.saved_tensors
            _, gradients = _run(hidden, weight, bias, targets, ctx.options, ctx.needs_input_grad[:3], 1.0, upstream)
        else:
            gradients = ctx.saved_tensors
            # loss.backward() asks for exactly 1: save the passes over the weight's gradient.
            if upstream.item() != 1.0:
                gradients = [None if g is None else g * upstream.to(g.dtype) for g in gradients]
        return (*gradients, None, None, None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, options: _Options, reduction: str) -> Tensor:
        kept = targets != options.ignore_index
        x = logits.detach().to(_wide(logits.dtype), copy=True)
        losses = _loss_rows(x, targets.where(kept, 0), options).where(kept, 0.0)
        ctx.scale = 1.0
        if reduction == "mean":
            ctx.scale /= max(1, int(kept.sum()))
        ctx.dtype = logits.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[0] else None, kept)
        return losses if reduction == "none" else losses.sum() * ctx.scale

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
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy (nats) of softmax(hidden @ weight^T + bias) with targets, the logits never stored.

    hidden (N, C), weight (V, C) of hidden's dtype, targets (N,) int64 or int32, bias (V,). The loss is fp32 (fp64 for
    fp64): its mean over the rows that are not ignored, their sum, or (N,) with 0 for ignored rows. All rows ignored:
    0 and zero gradients. A target outside [0, V) other than `ignore_index` gives NaN, not an exception.
    Raises ValueError for wrong shapes, dtypes, devices, reduction, softcap, smoothing or backend.
    """
    choose("linear_cross_entropy", backend, hidden)
    check_floating("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected (N, C), found {tuple(hidden.shape)}")
    check_like("weight", weight, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected (V, {hidden.shape[1]}), found {tuple(weight.shape)}")
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
    options = _check(hidden, targets, reduction, ignore_index, softcap, label_smoothing, z_loss)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets.long(), options, reduction)


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
    choose("cross_entropy", backend, logits)
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits: expected (N, V), found {tuple(logits.shape)}")
    options = _check(logits, targets, reduction, ignore_index, softcap, label_smoothing, z_loss)
    return _CrossEntropy.apply(logits, targets.long(), options, reduction)


def _check(
    rows: Tensor,
    targets: Tensor,
    reduction: str,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> _Options:
    check_shape("targets", targets, rows.shape[:1])
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32, found {targets.dtype}")
    if targets.device != rows.device:
        raise ValueError(f"targets: expected on {rows.device}, found on {targets.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {reduction!r}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected in [0, 1), found {label_smoothing}")
    return _Options(ignore_index, softcap, label_smoothing, z_loss)
