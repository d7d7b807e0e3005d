"""AdamW on the torch path: what runs on CPUs, in float64, and wherever Triton is not used; formulas in `adamw.py`.

torch's fused update does the arithmetic. It takes tensors of one dtype only, so bf16 and 8-bit moments beside another
parameter, and whatever is to be rounded stochastically, are updated in an fp32 copy, which is then rounded back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.blockwise import State8

Moment = Tensor | State8


class Lists(NamedTuple):
    """The parameters of an update, and what belongs to them: the i-th members of all five lists go together."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Moment]
    exp_avg_sqs: Sequence[Moment]
    copies: Sequence[Tensor | None]

    def of(self, members: Sequence[int]) -> Lists:
        """The lists of these members alone."""
        lists: Any = self
        return Lists(*([xs[i] for i in members] for xs in lists))


class Options(NamedTuple):
    """The settings of an update, as `adamw_` takes them."""

    step: int | Tensor  # both are numbers, or both tensors on the device, int64 () and float64 ()
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    seed: int | None


def update_torch(lists: Lists, options: Options, skip: Tensor | None = None) -> None:
    """Update parameters that share their dtypes in place, unless `skip`, bool (), is true.

    Where the step is a tensor, nothing is read on the host. Raises ValueError where that cannot be.
    """
    params, grads, exp_avgs, exp_avg_sqs, copies = lists
    dtype, device = params[0].dtype, params[0].device
    generator = None
    same = isinstance(exp_avgs[0], Tensor) and exp_avgs[0].dtype == dtype
    if isinstance(options.step, Tensor):
        if options.seed is not None or not same:
            raise ValueError(
                "step: a tensor needs the Triton kernels, or moments of their parameter's dtype and no seed"
            )
    elif options.seed is not None:
        # A generator on a CPU takes 32 bits of a seed, so seed and step are mixed into as many.
        generator = torch.Generator(device).manual_seed((options.seed + 2654435761 * options.step) % 2**32)
    work = dtype if same and not (generator and dtype == torch.bfloat16) else torch.float32
    held: tuple[Sequence[Moment], ...] = (params, exp_avgs, exp_avg_sqs)
    dense = [[_dense(x, work) for x in xs] for xs in held]
    torch._fused_adamw_(
        dense[0],
        [_dense(grad, work) for grad in grads],
        dense[1],
        dense[2],
        [],
        [torch.as_tensor(options.step, dtype=torch.float32, device=device)] * len(params),
        amsgrad=False,
        maximize=False,
        lr=options.lr,
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=options.weight_decay,
        eps=options.eps,
        found_inf=None if skip is None else skip.float(),
    )
    if given := [copy for copy in copies if copy is not None]:  # Members of a group have all a copy, or none has.
        torch._foreach_copy_(given, dense[0])
    for xs, updated in zip(held, dense):
        for x, new in zip(xs, updated):
            if isinstance(x, State8):
                x.quantize_(new)
            elif new is not x:
                x.copy_(_stochastic(new, generator) if generator and x.dtype == torch.bfloat16 else new)


def _dense(x: Moment, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype` and contiguous, since the fused update walks memory without regard to strides."""
    x = x.dequantize() if isinstance(x, State8) else x
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def _stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 `x` to bf16, up or down with the probabilities that make the mean exact."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits = (x.view(torch.int32) + noise) >> 16
    return torch.where(x.isfinite(), bits.to(torch.int16).view(torch.bfloat16), x.to(torch.bfloat16))
