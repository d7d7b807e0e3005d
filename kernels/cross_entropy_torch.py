"""The torch path of the cross-entropy: what runs on CPUs and in float64, between the matrix products.

Each function does in operations over whole chunks or tiles of logits what the Triton kernel of
`cross_entropy_triton.py` does row by row. Rows are matrix rows: one row of logits is one position's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What a call asks for, checked; both paths take it. `softcap` is None where the logits are not capped."""

    ignore_index: int
    reduction: str
    softcap: float | None
    label_smoothing: float
    z_loss: float
    backend: str
    lean: bool


def loss_rows(
    x: Tensor, targets: Tensor, options: Options, room: Tensor | None = None, rates: Tensor | None = None
) -> Tensor:
    """Compute the losses (n,) of the logits x (n, V), and overwrite x by their gradient, times the rates (n,) if given.

    targets (n,) are not ignored ones. `room` (n, P) is the contiguous memory that x is the first V columns of; it is
    given where V is not a round number.
    """
    softcap, smoothing, z_loss = options.softcap, options.label_smoothing, options.z_loss
    slope = None
    if softcap is not None:
        x.div_(softcap).tanh_()
        slope = 1 - x * x
        x.mul_(softcap)
    inside = (targets >= 0) & (targets < x.shape[1])
    column = targets.where(inside, 0).unsqueeze(1)
    target_logit = x.gather(1, column).squeeze(1)
    mean = x.mean(1) if smoothing else None
    maximum = x.amax(1)
    # In place: the CPU and CUDA kernels read a row's maximum and sum before they write it (a test watches this).
    if room is None:
        torch.softmax(x, dim=1, out=x)
    else:  # The whole rows are taken, since of x alone torch would first make a copy.
        room[:, x.shape[1] :] = -torch.inf
        torch.softmax(room, dim=1, out=room)
    lse = maximum - x.amax(1).log_()
    loss = lse - target_logit if mean is None else lse - (1 - smoothing) * target_logit - smoothing * mean
    if z_loss:
        loss += z_loss * lse.square()
        x.mul_((1 + 2 * z_loss * lse).unsqueeze(1))
    if smoothing:
        x.sub_(smoothing / x.shape[1])
    x.scatter_add_(1, column, torch.full_like(target_logit, smoothing - 1).unsqueeze(1))
    if slope is not None:
        x.mul_(slope)
    if rates is not None:  # and the pass over x that they cost anyway serves targets outside, too
        x.mul_(rates.where(inside, torch.nan).unsqueeze(1))
        return loss.where(inside, torch.nan)
    if not inside.all():
        outside = ~inside
        loss[outside] = torch.nan
        x[outside] = torch.nan
    return loss


def loss_tile(
    x: Tensor, grad: Tensor | None, targets: Tensor, bias: Tensor | None, rates: Tensor | None, options: Options, *,
    losses: Tensor | None = None, stats: Tensor, first: int, vocab: int,
) -> None:  # fmt: skip
    """Do what `cross_entropy_triton.launch_loss` does in the lean mode; unlike there, x is always overwritten.

    x (n, columns) are the columns from `first` on of `vocab`; targets (n,), bias (vocab,), rates (n,), losses (n,).
    stats (n, 4) holds of the columns up to these the maximum m_i, the sum l_i of exponentials, the target's logit and
    the sum of the logits. Without `losses` they are those of the whole row, and x becomes the gradient.
    """
    softcap, smoothing, z_loss = options.softcap, options.label_smoothing, options.z_loss
    # Scores: the bias and the cap.
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
    m_i, l_i, target_logit, x_sum = stats.unbind(1)
    if losses is not None:
        # Online softmax: the columns before these are rescaled by alpha where these hold a larger logit.
        if first == 0:
            stats.zero_()
            m_i.fill_(torch.finfo(x.dtype).min)
        target_logit.copy_(x.gather(1, column).squeeze(1).where(found, target_logit))
        x_sum += x.sum(1)
        m_new = torch.maximum(m_i, x.amax(1))
        alpha = (m_i - m_new).exp_()
        l_i.mul_(alpha).add_(x.sub_(m_new.unsqueeze(1)).exp_().sum(1))
        m_i.copy_(m_new)
        # The loss, which is right only once the last columns are in it.
        loss = m_i - target_logit
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (m_i - x_sum / vocab)
        loss += l_i.log()
        if z_loss:
            loss += z_loss * (m_i + l_i.log()).square()
        losses.copy_(loss.where(valid, torch.nan))
        return
    # The gradient, from the statistics of the whole row.
    x.sub_(m_i.unsqueeze(1)).exp_()
    x.mul_(((1 + 2 * z_loss * (m_i + l_i.log())) / l_i).unsqueeze(1))
    if smoothing:
        x.sub_(smoothing / vocab)
    x.scatter_add_(1, column, (found.to(x.dtype) * (smoothing - 1)).unsqueeze(1))
    if slope is not None:
        x.mul_(slope)
    rate = torch.ones_like(m_i).where(valid, torch.nan)
    x.mul_((rate if rates is None else rate * rates).unsqueeze(1))
