"""The optimizer inside the backward pass: a weight moves as soon as its gradient is there, and the gradient goes.

So no more than a matrix's gradient is ever held (that of the head's weight waits for the embedding's where they are
one), as in LOMO (Lv et al. 2023, https://arxiv.org/abs/2306.09782), here with AdamW. It is the ordinary update of the
same gradients, to the bit; `adamw_bf16` draws the bits of its roundings for each parameter anew, so there they are
other ones. What must be known of all gradients at once is not known in time: their norm cannot clip them, and there is
one micro-batch a step.

A step that is not finite: nothing moves if its loss is not. If a gradient is the first that is not, the weights above
it have moved already; it stays, and so do those whose turn comes later. Such a step cannot be taken back: without its
gradient an update cannot be inverted, and what would help (all gradients, or the weights and moments of before) is the
memory that is saved here. So the run stops there, with its newest checkpoint whole (`train.py`). From it the ordinary
update skips that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from afina.engine.optim import AdamW, global_norm, gradient_norm


class UpdatesInBackward:
    """The updates of one backward pass at learning rate ``lr``, begun by ``begin`` when the loss is there."""

    def __init__(self, optimizer: AdamW, lr: float) -> None:
        self.optimizer, self.lr = optimizer, lr
        self.skip: Tensor | None = None
        self.norms: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The backward pass in this context is the one."""
        hooks = [
            p.register_post_accumulate_grad_hook(partial(self._update, name, draw))
            for draw, (name, p) in enumerate(self.optimizer.params.items())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, loss: Tensor) -> None:
        """Count the update, which is skipped where ``loss``, fp32 (), is not finite: on the device, without a wait."""
        self.optimizer.num_updates += 1
        self.skip = ~loss.detach().isfinite()

    @torch.no_grad()
    def _update(self, name: str, draw: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        assert self.skip is not None
        self.norms[name] = gradient_norm(parameter.grad)
        self.skip = self.skip | ~self.norms[name].isfinite()
        self.optimizer.update([name], self.lr, skip=self.skip, draw=draw)
        parameter.grad = None

    def norm(self) -> Tensor:
        """The 2-norm of all gradients, fp32 (), as ``AdamW.clip_`` gives it."""
        return global_norm([self.norms[name] for name in self.optimizer.params if name in self.norms])
