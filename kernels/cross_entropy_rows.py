"""The rows of the cross-entropy on plain torch: what runs on CPUs and in float64, between the matrix products.

Each function is `cross_entropy.py`'s Triton kernel again, in operations over whole chunks or tiles of logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    ignore_index: int
    reduction: str
    softcap: float | None
    label_smoothing: float
    z_loss: float
    backend: str
    lean: bool


def loss_rows(x: Tensor, targets: Tensor, options: Options, room: Tensor | None = None) -> Tensor:
    """Losses (n,) of the logits x (n, V); x is overwritten by their gradient. Targets here are never ignored ones.

    `room` (n, P): the contiguous memory that x is the first V columns of, where V is not a round number.
    """
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
    if room is None:
        torch.softmax(x, dim=1, out=x)
    else:  # over whole rows: of x alone it would first make a copy
        room[:, x.shape[1] :] = -torch.inf
        torch.softmax(room, dim=1, out=room)
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


def torch_tile(
    x: Tensor, grad: Tensor | None, targets: Tensor, bias: Tensor | None, rates: Tensor | None, options: Options, *,
    losses: Tensor | None = None, stats: Tensor, first: int, vocab: int,
) -> None:  # fmt: skip
    """What `cross_entropy._launch` does for the lean mode; x is overwritten in either case."""
    softcap, smoothing, z_loss = options.softcap, options.label_smoothing, options.z_loss
    if bias is not None:
        x += bias[first : first + x.shape[1]]
    slope = None
    if softcap is not None:
        x.div_(softcap).tanh_()
        slope = None if grad is None else 1 - x * x
        x.mul_(softcap)
    local = targets - first
    found = (local >= 0) & (local < x.shape[1])
    valid = (targets >= 0) & (targets < vocab)
    column = local.where(found, 0).unsqueeze(1)
    highest, exp_sum, at_target, total = stats.unbind(1)
    if losses is not None:
        if first == 0:
            stats.zero_()
            highest.fill_(torch.finfo(x.dtype).min)
        at_target.copy_(x.gather(1, column).squeeze(1).where(found, at_target))
        total += x.sum(1)
        top = torch.maximum(highest, x.amax(1))
        exp_sum.mul_((highest - top).exp_()).add_(x.sub_(top.unsqueeze(1)).exp_().sum(1))
        highest.copy_(top)
        loss = highest - at_target
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (highest - total / vocab)
        loss += exp_sum.log()
        if z_loss:
            loss += z_loss * (highest + exp_sum.log()).square()
        losses.copy_(loss.where(valid, torch.nan))
        return
    x.sub_(highest.unsqueeze(1)).exp_()
    x.mul_(((1 + 2 * z_loss * (highest + exp_sum.log())) / exp_sum).unsqueeze(1))
    if smoothing:
        x.sub_(smoothing / vocab)
    x.scatter_add_(1, column, (found.to(x.dtype) * (smoothing - 1)).unsqueeze(1))
    if slope is not None:
        x.mul_(slope)
    rate = torch.ones_like(highest).where(valid, torch.nan)
    x.mul_((rate if rates is None else rate * rates).unsqueeze(1))
