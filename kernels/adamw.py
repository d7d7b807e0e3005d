"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), in place.

p <- p (1 - lr wd)        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

m is exp_avg and v is exp_avg_sq; t is the step. On a GPU one launch updates all parameters (`adamw_triton.py`);
elsewhere torch's fused update does (`adamw_torch.py`). All arithmetic is fp32, or fp64 for float64 parameters. Bytes
moved for one parameter with 2-byte gradients:
    fp32 parameter and moments, and a 16-bit copy for the model           4 + 4 + 4 read and written, 2, 2        28
    bf16 parameter, bf16 moments                                          2 + 2 + 2 read and written, 2           14
    bf16 parameter, 8-bit moments                                         2 + 1 + 1 read and written, 2           10
A bf16 parameter has 8 bits of mantissa: rounded to nearest, it does not move under updates below 1/512 of it. There are
two remedies. One is the fp32 parameter with its copy. The other is stochastic rounding (Gupta et al. 2015,
https://arxiv.org/abs/1502.02551), which rounds up with the probability of the part that is cut off: 16 random bits are
added below the mantissa of bf16. They are a function of the seed, the step and the element's place.

8-bit moments (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861) are dynamic codes in blocks of 256 with their
absmax (`blockwise.py`). They depart from the paper in one thing: a v above 0 never rounds to 0, because the next update
would then be divided by eps alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afina.kernels.adamw_torch import Lists, Moment, Options, update_torch
from afina.kernels.adamw_triton import Group, data, update_triton
from afina.kernels.backend import choose
from afina.kernels.blockwise import State8
from afina.kernels.launch import cdiv


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
    """Apply the formulas above in place, in the parameters' dtype, which the moments have too; `adamw_` says more."""
    beta1, beta2 = betas
    for param, raw, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs):
        grad = raw.to(param.dtype)
        param.mul_(1 - lr * weight_decay)
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@dataclass(eq=False)
class _Plan:
    """What one set of parameters, moments and copies needs at every step, after they were checked to fit together."""

    memory: list[int]
    shapes: list[torch.Size]
    devices: list[torch.device]
    groups: list[Group]
    refs: list[Any]


# The key of a plan is the identities of its tensors and the dtypes of the gradients. A plan is dropped as soon as one
# of its tensors is.
_plans: dict[tuple[Any, ...], _Plan] = {}


def _plan(lists: Lists) -> _Plan:
    """Return the plan for these lists; raises ValueError where their members do not fit together."""
    params, grads, exp_avgs, exp_avg_sqs, copies = lists
    fixed: list[Any] = [*params, *exp_avgs, *exp_avg_sqs, *copies]
    key = (*map(id, fixed), *[grad.dtype for grad in grads])
    tensors = fixed[: 3 * len(params)] + [x for x in copies if x is not None]
    if State8 in map(type, tensors):
        tensors = [y for x in tensors for y in ((x.codes, x.absmax) if isinstance(x, State8) else (x,))]
    memory = list(map(Tensor.data_ptr, tensors))
    shapes, devices = [grad.shape for grad in grads], [grad.device for grad in grads]
    plan = _plans.get(key)
    # Whoever sets the .data of a tensor changes its memory and its shape, but not its identity.
    if plan and plan.memory == memory and plan.shapes == shapes and plan.devices == devices:
        return plan
    groups: dict[Any, Group] = {}
    random_block = 0
    for i, (param, grad, exp_avg, exp_avg_sq, copy) in enumerate(zip(*lists)):
        _check(i, params[0].device, param, grad, exp_avg, exp_avg_sq, copy)
        dtypes = (param.dtype, grad.dtype, data(exp_avg).dtype, None if copy is None else copy.dtype)
        group = groups.setdefault(dtypes, Group([], []))
        group.members.append(i)
        group.random_blocks.append(random_block)
        random_block += cdiv(param.numel(), 4)

    def forget(_: Any, plans: dict[tuple[Any, ...], _Plan] = _plans) -> None:
        plans.pop(key, None)

    refs = [weakref.ref(x, forget) for x in fixed if x is not None]
    if len(_plans) >= 4096:  # Updates in the backward pass have a plan for each parameter.
        _plans.pop(next(iter(_plans)))
    plan = _plans[key] = _Plan(memory, shapes, devices, list(groups.values()), refs)
    return plan


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    copies: Sequence[Tensor | None] | None = None,
    seed: int | None = None,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Apply one AdamW update to all `params` and their moments, in place; `step` counts from 1, this update included.

    A gradient has the shape of its parameter and any floating point type. Both moments of a parameter have its dtype,
    or both are fp32, or both are `State8`; a float64 parameter allows float64 moments only. `copies[i]`, unless it is
    None, receives the new parameter in its own dtype. All tensors lie on one device.

    With a `seed`, from 0 to 2**32 - 1, bf16 parameters and bf16 moments are rounded stochastically. The same seed and
    step give the same bits, but only on one backend, as backends draw differently. Copies are rounded to nearest, and
    so is everything without a seed; a bf16 parameter then does not move under updates below 1/512 of it.

    Where `skip`, bool () on the device of the parameters, is true, nothing changes. The Triton kernels read it on the
    device, so that the host need not wait for it; the torch path reads it on the host.

    For a CUDA graph, which repeats launches with the numbers that they were made with, `step` and `lr` may be tensors
    on the device of the parameters, int64 () and float64 (): then the host reads nothing, and has no part in the
    result. The torch path can do so only where moments have their parameter's dtype and nothing is rounded
    stochastically.

    Raises ValueError for lists of different lengths, for shapes, dtypes or devices that do not fit, for a step below 1
    or one that is a tensor while lr is none, for another seed or skip, and for a backend that is unknown or cannot run.
    """
    if copies is None:
        copies = [None] * len(params)
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(copies):
        raise ValueError(
            f"params: {len(params)} tensors, but {len(grads)} grads, {len(exp_avgs)} exp_avgs, "
            f"{len(exp_avg_sqs)} exp_avg_sqs, {len(copies)} copies"
        )
    on_device = isinstance(step, Tensor)
    if on_device != isinstance(lr, Tensor):
        raise ValueError("step and lr: expected two numbers or two tensors, found one of each")
    if isinstance(step, Tensor) and isinstance(lr, Tensor):
        _check_clock(step, lr)
    elif step < 1:
        raise ValueError(f"step: expected a count from 1, found {step}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected None or 0 to 2**32 - 1, found {seed}")
    if skip is not None and (skip.dtype != torch.bool or skip.dim() > 0):
        raise ValueError(f"skip: expected None or a bool of shape (), found {skip.dtype} {tuple(skip.shape)}")
    if not params:
        return
    for name, x in (("skip", skip), ("step", step), ("lr", lr)):
        if isinstance(x, Tensor) and x.device != params[0].device:
            raise ValueError(f"{name}: expected on {params[0].device} as params[0], found on {x.device}")
    options = Options(step, lr, float(betas[0]), float(betas[1]), eps, weight_decay, seed)
    lists = Lists(params, grads, exp_avgs, exp_avg_sqs, copies)
    groups = _plan(lists).groups
    chosen = [choose("adamw", backend, params[group.members[0]]) for group in groups]
    if not on_device and skip is not None and "torch" in chosen and skip:
        return
    for group, name in zip(groups, chosen):
        own = lists if len(groups) == 1 else lists.of(group.members)
        if name == "triton":
            update_triton(group, own, options, skip)
        else:
            update_torch(own, options, skip if on_device else None)


def _check_clock(step: Tensor, lr: Tensor) -> None:
    for name, x, dtype in (("step", step, torch.int64), ("lr", lr, torch.float64)):
        if x.dtype != dtype or x.dim() > 0:
            raise ValueError(f"{name}: expected a number or {dtype} of shape (), found {x.dtype} {tuple(x.shape)}")


def _check(
    i: int, device: torch.device, param: Tensor, grad: Tensor, exp_avg: Moment, exp_avg_sq: Moment, copy: Tensor | None
) -> None:
    """Raise ValueError where the i-th members of the lists do not fit together."""
    if not param.is_floating_point():
        raise ValueError(f"params[{i}]: expected a floating point tensor, found {param.dtype}")
    first, second = (data(x) for x in (exp_avg, exp_avg_sq))
    for name, x in (("params", param), ("grads", grad), ("exp_avgs", first), ("exp_avg_sqs", second), ("copies", copy)):
        if x is None:
            continue
        if x.shape != param.shape:
            raise ValueError(
                f"{name}[{i}]: expected the parameter's shape {tuple(param.shape)}, found {tuple(x.shape)}"
            )
        if x.device != device:
            raise ValueError(f"{name}[{i}]: expected on {device} as params[0], found on {x.device}")
    for name, x in (("grads", grad), ("copies", copy)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name}[{i}]: expected a floating point tensor, found {x.dtype}")
    if isinstance(exp_avg, State8) and param.dtype != torch.float64:
        for name, state, signed in (("exp_avgs", exp_avg, True), ("exp_avg_sqs", exp_avg_sq, False)):
            if not isinstance(state, State8) or not state.fits(param, signed):
                raise ValueError(f"{name}[{i}]: expected as made by State8.zeros_like(params[{i}], signed={signed})")
    elif first.dtype != param.dtype and (first.dtype != torch.float32 or param.dtype == torch.float64):
        raise ValueError(f"exp_avgs[{i}]: expected {param.dtype}, torch.float32 or State8, found {first.dtype}")
    elif second.dtype != first.dtype:
        raise ValueError(f"exp_avg_sqs[{i}]: expected {first.dtype} as exp_avgs, found {second.dtype}")
