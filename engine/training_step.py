"""One training step: its micro-batches run through the model and the objective, and the weights move once.

The objective's sum of losses is divided by the loss tokens of the *whole step*, so the result does not depend on how
rows fall into micro-batches; gradients add up, are clipped once, and move the weights once. Whether they move, which a
loss or gradient that is not finite forbids, is decided on the device, and the host does not wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from afina.engine.model import GPT
from afina.engine.objectives import Objective, sft
from afina.engine.optim import AdamW
from afina.engine.optim_in_backward import UpdatesInBackward
from afina.engine.step_graph import GraphedStep
from afina.loaders.data.batches import MicroBatch


def accumulate(
    model: GPT,
    micro_batches: list[MicroBatch],
    objective: Objective = sft,
    *,
    poll: Callable[[], None] | None = None,
    before_backward: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Add the gradient of a step's loss, the mean over all its loss tokens, to ``.grad``; return that loss, fp32 ().

    ``poll`` is called before each micro-batch and may raise to stop; ``before_backward`` with a micro-batch's share of
    the loss before its backward pass.
    """
    loss_tokens = sum(mb.loss_tokens for mb in micro_batches)
    total = torch.zeros((), device=model.device)
    for mb in micro_batches:
        if poll:
            poll()
        loss, _ = objective(model, mb, divisor=loss_tokens)
        if before_backward:
            before_backward(loss)
        loss.backward()
        total += loss.detach()
    return total


class TrainingStep:
    """The step of a run: ``update`` moves the weights once.

    Args:
        model, optimizer, objective: What is trained, by what, for what.
        max_grad_norm: The global 2-norm that gradients are clipped to; 0 leaves them as they are.
        in_backward: Whether each weight moves as soon as its gradient is there; then a step has one micro-batch.
        graphs: What runs those steps that it can as CUDA graphs.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: AdamW,
        objective: Objective,
        *,
        max_grad_norm: float,
        in_backward: bool,
        graphs: GraphedStep | None = None,
    ) -> None:
        self.graphs = graphs
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.max_grad_norm, self.in_backward = max_grad_norm, in_backward

    def update(
        self, micro_batches: list[MicroBatch], lr: float, *, poll: Callable[[], None], settle: Callable[[], None]
    ) -> Tensor:
        """Move the weights at learning rate ``lr``; return the loss and the gradient's norm before clipping, fp32 (2,).
        Where one of them is not finite, the weights have stayed.

        ``poll`` is called before each micro-batch, and what it raises leaves everything as it was. ``settle`` is called
        when the work of this step is on its way and before its update: it has to make sure that the result of the last
        step, of which the optimizer must know whether it was skipped, has been looked at.
        """
        if self.graphs is not None:
            figures = self.graphs.update(micro_batches, lr, poll=poll, settle=settle)
            if figures is not None:
                return figures
        try:
            act = self._update_in_backward if self.in_backward else self._update
            return act(micro_batches, lr, poll, settle)
        finally:
            self.optimizer.zero_grad()

    def _update(
        self, micro_batches: list[MicroBatch], lr: float, poll: Callable[[], None], settle: Callable[[], None]
    ) -> Tensor:
        """As ``update``, by gradients that add up first."""
        away = self.optimizer.host_gradients

        def poll_and_land() -> None:
            poll()
            if away is not None:
                away.land()

        with contextlib.nullcontext() if away is None else away.leaving():
            loss = accumulate(self.model, micro_batches, self.objective, poll=poll_and_land)
        settle()
        figures = torch.stack([loss, self.optimizer.clip_(self.max_grad_norm)])
        self.optimizer.step(lr, skip=~figures.isfinite().all())
        return figures

    def _update_in_backward(
        self, micro_batches: list[MicroBatch], lr: float, poll: Callable[[], None], settle: Callable[[], None]
    ) -> Tensor:
        """As ``update``, each weight as soon as its gradient is there."""
        updates = UpdatesInBackward(self.optimizer, lr)

        def begin(loss: Tensor) -> None:
            settle()
            updates.begin(loss)

        with updates.attached():
            loss = accumulate(self.model, micro_batches, self.objective, poll=poll, before_backward=begin)
        return torch.stack([loss, updates.norm()])


class LaunchedStep:
    """A training step on its way: on a GPU its ``figures``, the loss and the gradient's norm, fp32 (2,), are still to
    come. Their copy to the host starts at once, behind the step's own work, and nothing waits for it but ``result``."""

    def __init__(self, micro_batches: list[MicroBatch], lr: float, figures: Tensor) -> None:
        self.micro_batches, self.lr = micro_batches, lr
        self.figures = figures.to("cpu", non_blocking=True)  # into pinned memory, where they come from a GPU
        self.arrival: torch.cuda.Event | None = None
        if figures.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(figures.device))

    def result(self) -> tuple[float, float]:
        """The loss and the gradient's norm, once they are there."""
        if self.arrival is not None:
            self.arrival.synchronize()
        loss, grad_norm = self.figures.tolist()
        return loss, grad_norm
