"""Cross-entropy of a language model's head, without ever holding the logits of a batch.

For a row with target t and logits x = cap(hidden . weight^T + bias), cap(a) = softcap * tanh(a / softcap) if given:
    lse = log sum_j exp(x_j)
    loss = lse - (1 - s) x_t - s mean(x) + z lse^2              s = label_smoothing, z = z_loss
    dloss/dx_j = (1 + 2 z lse) p_j - (1 - s) [j = t] - s / V    p = softmax(x)
A row is a matrix row here: one of hidden (N, C) and of the logits (N, V) for each position whose next token is learnt.
Rows to ignore are dropped before the first product. The others go in chunks: a chunk's logits give its losses, their
gradient is written over them, and that gives the chunk's share of d hidden and d weight. So the forward pass also makes
the gradients (it needs the softmax for the loss anyway), and the backward pass only multiplies them by the upstream
gradient. With reduction "none" that gradient differs by row and is not known yet, so the backward pass runs the chunks
again. This takes 6 N V C FLOPs with both gradients, 4 N V C without one of them, and room for one chunk of logits
beside the gradients.
`lean` holds a tile of the logits instead of a chunk. It makes the losses tile by tile first, then each tile again for
the gradients, which takes 8 N V C FLOPs; where the fp32 sum of all of d hidden would not fit, each tile is made once
more for d weight alone, 10 N V C.
The idea is that of Liger Kernel (https://arxiv.org/abs/2410.10989) and Cut Cross-Entropy
(https://arxiv.org/abs/2411.09009).

This file has the reference, the public functions and their autograd; `cross_entropy_chunks.py` the matrix products and
what is held between them, `cross_entropy_triton.py` and `cross_entropy_torch.py` the rows of logits on either path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import as_rows, check_floating, check_like, check_shape, choose, wide_dtype
from afina.kernels.cross_entropy_chunks import head_loss, to_device
from afina.kernels.cross_entropy_torch import Options, loss_rows
from afina.kernels.cross_entropy_triton import launch_loss, scaled
from afina.kernels.saved import Saved

REDUCTIONS = ("mean", "sum", "none")


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
    """Compute the formulas above, written plainly; logits (N, V), targets (N,), the options as in `cross_entropy`."""
    x = logits.to(wide_dtype(logits.dtype))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    kept = targets != ignore_index
    inside = (targets >= 0) & (targets < x.shape[1])
    lse = torch.logsumexp(x, dim=1)
    target_logit = x.gather(1, targets.long().where(inside, 0).unsqueeze(1)).squeeze(1)
    loss = lse - (1 - label_smoothing) * target_logit - label_smoothing * x.mean(1) + z_loss * lse.square()
    loss = loss.where(inside, torch.nan).where(kept, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / max(1, int(kept.sum())) if reduction == "mean" else loss.sum()


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Compute the same of the logits that hidden (N, C), weight (V, C) and bias (V,) make."""
    wide = wide_dtype(hidden.dtype)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return cross_entropy_reference(logits, targets, **options)


class _LinearCrossEntropy(torch.autograd.Function):
    """The head on either path: the forward pass makes the gradients too, unless the reduction is "none"."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Options,
        wanted: tuple[bool, ...],
        weights: Tensor | None,
    ) -> Tensor:
        ctx.options, ctx.weighted = options, weights is not None
        if options.reduction == "none":
            losses, _ = head_loss(hidden, weight, bias, targets, options, (False, False, False))
            ctx.save_for_backward(hidden, weight, bias, targets)
            return losses
        loss, gradients = head_loss(hidden, weight, bias, targets, options, wanted, weights, weights is not None)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Any
        if ctx.options.reduction == "none":
            hidden, weight, bias, targets = ctx.saved_tensors
            _, gradients = head_loss(hidden, weight, bias, targets, ctx.options, ctx.needs_input_grad[:3], upstream)
        elif ctx.options.backend == "triton":
            gradients = [scaled(g, upstream) for g in ctx.saved_tensors]
        else:
            gradients = ctx.saved_tensors
            if ctx.weighted or upstream.item() != 1.0:  # the host reads nothing
                gradients = [None if g is None else g * upstream.to(g.dtype) for g in gradients]
        return (*gradients, None, None, None, None)


class _TritonCrossEntropy(torch.autograd.Function):
    """Whole logits in Triton: the forward pass writes the gradient into a tensor of its own."""

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
        launch_loss(rows, grad, targets.contiguous(), None, rates, options, losses=losses)
        ctx.save_for_backward(grad)
        if options.reduction == "none":
            return losses
        return losses.sum() if rate is None else losses.sum().mul_(rate)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return scaled(grad, upstream), None, None, None


class _TorchCrossEntropy(torch.autograd.Function):
    """Whole logits in torch: the forward pass writes the gradient over a copy of them."""

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
    row_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the cross-entropy (nats) of softmax(hidden @ weight^T + bias) with targets, and never store the logits.

    hidden (N, C), weight (V, C) of hidden's dtype, targets (N,) int64 or int32, bias (V,). The loss is fp32 (fp64 for
    fp64): its mean over the rows that are not ignored, their sum, or (N,) with 0 for ignored rows. If all rows are
    ignored, the loss and all gradients are 0. A target outside [0, V) other than `ignore_index` gives NaN, not an
    exception.

    targets may be on the CPU though hidden is on a GPU: then nothing waits for the GPU. Where they are on the GPU, one
    wait for the list of the rows that are not ignored cannot be avoided.

    row_weights, fp32 (N,): the loss is the sum of the rows' losses, each times its weight, and the reduction has to be
    "sum". Then no row is left out, those to ignore having no weight; their hidden and logits must be finite. With
    targets on hidden's device nothing is read on the host, so that a CUDA graph can repeat it.

    Besides the gradients the function holds a chunk of logits, on a GPU up to 1.1 GB or a 64th of its memory, and that
    gradient in fp32 where several chunks add to a 16-bit weight's gradient; or a single chunk that takes no more room
    than both. `lean` holds at most 100 MB instead (for C up to 24,576; and 40 bytes a row): a tile of logits of at most
    32 MiB, the rows of a gradient that are being summed, and copies of rows. It takes a third more FLOPs, or two thirds
    if both gradients are wanted of more rows than 6 million / C (at most 4,096). Raises ValueError for wrong shapes,
    dtypes, devices, reduction, softcap, smoothing or backend.
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
    targets = targets.long()
    if row_weights is not None:
        check_shape("row_weights", row_weights, targets.shape)
        if reduction != "sum":
            raise ValueError(f"reduction: expected 'sum' with row_weights, found {reduction!r}")
        targets = to_device(targets, hidden.device)
        kept = targets != ignore_index
        targets, row_weights = targets.where(kept, 0), row_weights.where(kept, 0.0)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, options, wanted, row_weights)


def saved(dtype: torch.dtype, width: int) -> Saved:
    """What `linear_cross_entropy` keeps of each row of hidden (N, width) but for "none": its gradient, made already.

    The gradients of weight and bias are made with the loss too.
    """
    return Saved((), width * dtype.itemsize)


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
    """Compute the cross-entropy (nats) of logits (N, V) with targets (N,).

    Dtypes, reductions, ignored rows, odd targets and errors are those of `linear_cross_entropy`.
    """
    backend = choose("cross_entropy", backend, logits)
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits: expected (N, V), found {tuple(logits.shape)}")
    options = _check(logits, targets, ignore_index, reduction, softcap, label_smoothing, z_loss, backend)
    function = _TritonCrossEntropy if backend == "triton" else _TorchCrossEntropy
    wanted = torch.is_grad_enabled() and logits.requires_grad
    return function.apply(logits, to_device(targets.long(), logits.device), options, wanted)


def _check(
    rows: Tensor, targets: Tensor, ignore_index: int, reduction: str, softcap: float | None, label_smoothing: float,
    z_loss: float, backend: str, lean: bool = False,
) -> Options:  # fmt: skip
    """Check what both functions take, and put it together; `rows` are hidden (N, C) or logits (N, V)."""
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
