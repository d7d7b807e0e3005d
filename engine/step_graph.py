"""A training step as CUDA graphs: launches that are captured once, and repeated by one call.

A step of a small model is thousands of kernels of a few microseconds, and its time is that of launching them. A graph
repeats what was launched while it was captured: the same kernels, with the same numbers, on the same addresses. So
what changes from step to step lies in memory that stays where it is: the micro-batch (`buckets.py`), the gradients, the
learning rate and the number of the update. There is a graph for each bucket (forward and backward pass of one
micro-batch, which adds to the gradients) and one for the update (clip, finite or not, AdamW, gradients back to 0).

What nothing here can prove is proved where it runs: every graph is captured on padding alone, and its first replay, on
real rows, is compared with the ordinary step on them; the update with the ordinary one on a few matrices. Whatever was
kept as it was at capture shows there. A graph that differs, or cannot be captured, is given up for the run, which goes
on as without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from afina.engine.buckets import Bucket, StaticInputs
from afina.engine.captured import Graph
from afina.engine.optim import AdamW, gradient_norm
from afina.loaders.data.batches import MicroBatch

MAX_GRAPHS = 16  # buckets; a micro-batch of yet another one takes a larger one that is there, or the ordinary step
# The most that a replay may differ from the ordinary step, of the loss, and of a gradient's norm and sum by its norm:
# shapes are padded, so products may round differently. What is stale differs by its whole size.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
FLOOR = 1e-3  # of the norm of all gradients: below it a gradient is rounding alone


class GraphError(RuntimeError):
    """A graph that does not do what the ordinary step does."""


class GraphedUpdate:
    """The update of ``optimizer`` from gradients that stay where they are, in a graph.

    Attributes:
        grads: name -> gradient, of 0 between steps.
        loss: fp32 (), the sum of a step's losses so far.
        figures: fp32 (2,), the loss and the gradient's norm of the last update.
    """

    def __init__(self, optimizer: AdamW, *, max_grad_norm: float, graph: Callable[[], Graph]) -> None:
        self.optimizer, self.max_grad_norm, device = optimizer, max_grad_norm, optimizer.device
        self.grads = {name: torch.zeros_like(p) for name, p in optimizer.params.items()}
        self.loss, self.figures = torch.zeros((), device=device), torch.zeros(2, device=device)
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.ones((), dtype=torch.int64, device=device)
        self._graph, self._ready = graph(), False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """In this context the parameters' gradients are these."""
        for name, p in self.optimizer.params.items():
            p.grad = self.grads[name]
        try:
            yield
        finally:
            for p in self.optimizer.params.values():
                p.grad = None

    def clear(self) -> None:
        """Forget what has been added so far."""
        torch._foreach_zero_(list(self.grads.values()))
        self.loss.zero_()

    def prepare(self) -> None:
        """Capture the update; nothing moves by that, since a loss that is not finite forbids it."""
        if not self._ready:
            self.loss.fill_(torch.nan)
            with self.attached():
                self._graph.capture(self._program)
            self.clear()
            self._ready = True

    def apply(self, lr: float) -> Tensor:
        """Move the weights at learning rate ``lr``, the optimizer counting one update more; return the figures."""
        self.optimizer.num_updates += 1
        self.lr.fill_(lr)
        self.count.fill_(self.optimizer.num_updates)
        self._graph.replay()
        figures = self.figures.clone()  # they are read when the next step may be under way
        self.clear()
        return figures

    def _program(self) -> None:
        norm = self.optimizer.clip_(self.max_grad_norm)
        self.figures.copy_(torch.stack([self.loss, norm]))
        self.optimizer.step(self.lr, skip=~self.figures.isfinite().all(), count=self.count)


class GraphedStep:
    """The steps of a run by graphs, as long as they do what the ordinary ones do.

    Args:
        optimizer: Its parameters are the model's that train.
        loss: The loss of a bucket's inputs, fp32 (), as a fixed sequence of launches.
        reference: Adds the gradient of a micro-batch's mean loss to ``.grad`` in the ordinary way, and returns the
            loss.
        dtype: What the model computes in, which ``TOLERANCE`` goes by.
        graph: Makes a graph that has not captured anything.
        log: Is told, in one line, of what was given up.
        passed: Is called once all checks of the first step have gone well.
    """

    def __init__(
        self,
        optimizer: AdamW,
        *,
        loss: Callable[[StaticInputs], Tensor],
        reference: Callable[[MicroBatch], Tensor],
        max_grad_norm: float,
        dtype: torch.dtype,
        graph: Callable[[], Graph],
        log: Callable[[str], None],
        passed: Callable[[], None],
    ) -> None:
        self.updates = GraphedUpdate(optimizer, max_grad_norm=max_grad_norm, graph=graph)
        self.loss, self.reference, self.tolerance = loss, reference, TOLERANCE[dtype]
        self._make, self.log, self.passed = graph, log, passed
        self.buckets: dict[Bucket, tuple[StaticInputs, Graph]] = {}
        self.given_up = self._told = False

    def update(
        self, micro_batches: list[MicroBatch], lr: float, *, poll: Callable[[], None], settle: Callable[[], None]
    ) -> Tensor | None:
        """As ``TrainingStep.update``; None, with nothing done, where this step has to run in the ordinary way."""
        if self.given_up:
            return None
        try:
            ready = [found for batch in micro_batches if (found := self._of(batch)) is not None]
            self.updates.prepare()
        except RuntimeError as problem:  # of a capture, of memory, or of the check
            self._give_up(problem)
            return None
        if len(ready) < len(micro_batches):
            return None
        loss_tokens = sum(batch.loss_tokens for batch in micro_batches)
        try:
            for batch, (inputs, graph) in zip(micro_batches, ready, strict=True):
                poll()
                inputs.fill(batch, loss_tokens)
                graph.replay()
            settle()
        except BaseException:
            self.updates.clear()
            raise
        if not self._told:
            self._told = True
            self.passed()
        return self.updates.apply(lr)

    def _of(self, batch: MicroBatch) -> tuple[StaticInputs, Graph] | None:
        """Inputs and graph that hold a micro-batch; None where there are ``MAX_GRAPHS``, and none holds it."""
        bucket = Bucket.of(batch)
        if bucket in self.buckets:
            return self.buckets[bucket]
        if len(self.buckets) >= MAX_GRAPHS:
            larger = [each for each in self.buckets if each.holds(bucket)]
            return self.buckets[min(larger)] if larger else None
        if not self.buckets:
            check_update(self.updates.optimizer, self._make)
        inputs, graph = StaticInputs(bucket, self.updates.optimizer.device), self._make()
        with self.updates.attached():
            graph.capture(lambda: self._program(inputs))
        self.updates.clear()
        self._check(batch, inputs, graph)
        self.buckets[bucket] = inputs, graph
        return inputs, graph

    def _program(self, inputs: StaticInputs) -> None:
        loss = self.loss(inputs)
        loss.backward()
        self.updates.loss.add_(loss.detach())

    def _check(self, batch: MicroBatch, inputs: StaticInputs, graph: Graph) -> None:
        """Compare the first replay with the ordinary step on the same rows. Raises GraphError."""
        inputs.fill(batch, batch.loss_tokens)
        graph.replay()
        found = _measured(self.updates.loss, self.updates.grads)
        self.updates.clear()
        with self.updates.attached():  # for want of room for a second set of gradients
            expected = _measured(self.reference(batch), self.updates.grads)
        self.updates.clear()
        least = FLOOR * sum(norm**2 for norm, _ in expected.values()) ** 0.5
        for name, (norm, total) in found.items():
            norm_wanted, total_wanted = expected[name]
            allowed = self.tolerance * (abs(norm_wanted) + (least if name else 0.0))
            # Written so that NaN differs, too.
            if not (abs(norm - norm_wanted) <= allowed and abs(total - total_wanted) <= allowed):
                what = f"the gradient of {name}" if name else "the loss"
                raise GraphError(f"{what} is not that of the ordinary step ({norm:.6g} for {norm_wanted:.6g})")

    def _give_up(self, problem: RuntimeError) -> None:
        self.given_up = True
        self.buckets.clear()
        self.updates.clear()
        self.updates.grads.clear()  # their memory goes, with that of the graphs
        reason = " ".join(str(problem).split())[:200]
        self.log(f"cuda_graph: {reason}; steps go on one launch at a time")


def _measured(loss: Tensor, grads: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Of each gradient the norm and the sum, by name; of "" the loss, twice."""
    rows = [loss.detach().expand(2)]
    rows += [torch.stack([gradient_norm(grad), grad.sum(dtype=torch.float32)]) for grad in grads.values()]
    return dict(zip(["", *grads], map(tuple, torch.stack(rows).tolist()), strict=True))


def check_update(optimizer: AdamW, graph: Callable[[], Graph]) -> None:
    """Compare graphed updates with ordinary ones, on a few small tensors under the same settings.

    Three updates, at rates of their own, and between them one that is skipped. Raises GraphError.
    """
    dtypes = sorted({p.dtype for p in optimizer.params.values()}, key=str)
    draw = torch.Generator().manual_seed(1)
    values = [torch.randn(size, generator=draw).to(dtype) for dtype in dtypes for size in ((40, 256), (3,))]
    kinds = [optimizer.like(_module(values, optimizer.device)) for _ in range(2)]
    ordinary, graphed = kinds[0], GraphedUpdate(kinds[1], max_grad_norm=1.0, graph=graph)
    graphed.prepare()
    for lr, loss in ((1e-2, 1.0), (3e-2, torch.nan), (2e-2, 1.0), (5e-3, 1.0)):
        for name, p in ordinary.params.items():
            p.grad = torch.randn(p.shape, generator=draw).to(p)
            graphed.grads[name].copy_(p.grad)
        graphed.loss.fill_(loss)
        norm = ordinary.clip_(1.0)
        skip = torch.full((), loss != loss, device=optimizer.device)
        ordinary.step(lr, skip=skip)
        found = graphed.apply(lr)
        for each in kinds if loss != loss else ():
            each.num_updates -= 1
        if not torch.allclose(found[1], norm, rtol=1e-3):
            raise GraphError("the gradient's norm is not that of the ordinary step")
    for (name, one), other, start in zip(ordinary.params.items(), kinds[1].params.values(), values, strict=True):
        start = start.to(one)
        if not (one - other).norm() <= 1e-2 * (one - start).norm():
            raise GraphError(f"the update of a tensor of {one.dtype} ({name}) is not that of the ordinary step")


def _module(values: list[Tensor], device: torch.device) -> nn.Module:
    """Parameters of these values."""
    module = nn.Module()
    for i, value in enumerate(values):
        module.register_parameter(f"tensor{i}", nn.Parameter(value.to(device, copy=True)))
    return module
