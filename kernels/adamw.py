"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), in place.

p <- p (1 - lr wd)        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afina.kernels.backend import choose


def adamw_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    beta1, beta2 = betas
    for param, raw, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs):
        grad = raw.to(param.dtype)
        param.mul_(1 - lr * weight_decay)
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    backend: str | None = None,
) -> None:
    """One AdamW update of all `params` and their moments, in place; `step` counts from 1, this update included.

    Moments have their parameter's dtype; a gradient of another dtype is converted. Raises ValueError for lists of
    different lengths, shapes that differ, step < 1.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError(
            f"params: {len(params)} tensors, but {len(grads)} grads, {len(exp_avgs)} exp_avgs, "
            f"{len(exp_avg_sqs)} exp_avg_sqs"
        )
    if step < 1:
        raise ValueError(f"step: expected a count from 1, found {step}")
    if not params:
        return
    choose("adamw", backend, params[0])
    for i, param in enumerate(params):
        for name, others in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
            if others[i].shape != param.shape:
                raise ValueError(
                    f"{name}[{i}]: expected the parameter's shape {tuple(param.shape)}, found {tuple(others[i].shape)}"
                )
    # torch's fused update walks memory without regard to strides.
    dense = [[x.contiguous() for x in xs] for xs in (params, exp_avgs, exp_avg_sqs)]
    steps = [torch.tensor(float(step), device=params[0].device)] * len(params)
    torch._fused_adamw_(
        dense[0],
        [grad.to(param.dtype).contiguous() for param, grad in zip(params, grads)],
        dense[1],
        dense[2],
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    for xs, copies in zip((params, exp_avgs, exp_avg_sqs), dense):
        for x, copy in zip(xs, copies):
            if copy is not x:
                x.copy_(copy)
