"""engine/step_graph.py: steps by graphs are the ordinary steps, and a graph that keeps something as it was at its
capture is found out before it moves a weight. On a CPU, by the graphs of fake_graph.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from fake_graph import FakeGraph, count_launches
from fake_graph import fake_graphs as fake_graphs
from test_buckets import batch, model
from test_model import TINY
from torch import Tensor

from afina.engine import step_graph
from afina.engine.buckets import Bucket, StaticInputs, inputs_of
from afina.engine.model import GPT, IGNORE
from afina.engine.objectives import sft
from afina.engine.optim import AdamW
from afina.engine.step_graph import GraphedStep, GraphedUpdate, check_update
from afina.engine.training_step import TrainingStep, accumulate
from afina.loaders.data.batches import MicroBatch

pytestmark = pytest.mark.usefixtures("fake_graphs")

# Three buckets; the second step has two micro-batches, and the last comes to a bucket that is there.
STEPS = [
    [batch(share=0.3)],
    [batch(lengths=(40, 30, 20)), batch(share=1.0)],
    [batch(lengths=(100, 90), share=0.3)],
    [batch(lengths=(40, 30, 21))],
]
RATES = (1e-2, 3e-2, 2e-2, 5e-3)


@dataclass
class Trained:
    """What a few steps leave."""

    gpt: GPT
    optimizer: AdamW
    step: TrainingStep
    figures: list[Tensor] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)

    def run(self, steps: list[list[MicroBatch]] = STEPS) -> Trained:
        for micro_batches, lr in zip(steps, RATES):
            self.figures.append(self.step.update(micro_batches, lr, poll=lambda: None, settle=lambda: None))
        return self


def loss_of(gpt: GPT) -> Callable[[StaticInputs], Tensor]:
    def loss(static: StaticInputs) -> Tensor:
        ids, spans, targets, weights, _ = static.inputs
        return gpt.weighted_loss(ids, targets, weights, spans=spans, positions=static.positions)

    return loss


def prepared(*, graphed: bool, loss: Callable[[GPT], Callable[[StaticInputs], Tensor]] = loss_of) -> Trained:
    gpt = model()
    optimizer = AdamW(gpt, decay=gpt.decay_parameters(), eps=1e-3, weight_decay=0.1)
    step = TrainingStep(gpt, optimizer, sft, max_grad_norm=0.5, in_backward=False)
    trained = Trained(gpt, optimizer, step)
    if graphed:
        step.graphs = GraphedStep(
            optimizer,
            loss=loss(gpt),
            reference=lambda mb: accumulate(gpt, [mb]),
            max_grad_norm=0.5,
            dtype=torch.float32,
            graph=FakeGraph,
            log=trained.log.append,
            passed=lambda: trained.passed.append(1),
        )
    return trained


def assert_same(one: Trained, other: Trained, within: float) -> None:
    start = dict(model().named_parameters())
    for a, b in zip(one.figures, other.figures, strict=True):
        assert torch.allclose(a, b, rtol=max(within, 1e-7), atol=0, equal_nan=True)
    for (name, a), b in zip(one.gpt.named_parameters(), other.gpt.parameters(), strict=True):
        assert (a - b).norm() <= within * (a - start[name]).norm(), name
    assert one.optimizer.num_updates == other.optimizer.num_updates


def test_graphs_repeat_the_ordinary_steps() -> None:
    """Other rows, rates, buckets and numbers of micro-batches at each step; all of them replayed, none run."""
    ordinary, graphed = prepared(graphed=False).run(), prepared(graphed=True).run()
    assert graphed.log == []
    assert graphed.passed == [1]
    assert graphed.step.graphs is not None
    assert len(graphed.step.graphs.buckets) == 3
    # Two buckets with a first look and two micro-batches, one with one; 4 updates, and 4 of the check on small tensors.
    assert sorted(graph.replays for graph in FakeGraph.made) == [2, 3, 3, 4, 4]
    assert_same(ordinary, graphed, 1e-4)
    assert all(p.grad is None for p in graphed.gpt.parameters())


def test_a_step_that_is_not_finite_moves_nothing_and_the_next_one_does() -> None:
    graphed = prepared(graphed=True).run(STEPS[:1])
    before = {name: x.clone() for group in graphed.optimizer.state().values() for name, x in group.items()}
    weight = graphed.gpt.norm.weight.data
    kept = weight.clone()
    weight.fill_(math.inf)
    figures = graphed.step.update(STEPS[0], 1e-2, poll=lambda: None, settle=lambda: None)
    assert not figures.isfinite().all()
    weight.copy_(kept)
    graphed.optimizer.num_updates -= 1  # as the loop does when it has looked at the figures
    after = {name: x for group in graphed.optimizer.state().values() for name, x in group.items()}
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    ordinary = prepared(graphed=False).run(STEPS[:1])
    for trained in (ordinary, graphed):
        trained.step.update(STEPS[1], 3e-2, poll=lambda: None, settle=lambda: None)
    graphed.figures = ordinary.figures
    assert_same(ordinary, graphed, 1e-4)


def test_what_stops_a_step_leaves_it_undone() -> None:
    """Between two micro-batches, and when the last step turns out to be one too many: the next step is as ever."""

    class Stopped(BaseException):
        pass

    def stop(polls: list[int]) -> None:
        polls.append(1)
        if len(polls) == 2:
            raise Stopped

    ordinary, graphed = prepared(graphed=False).run(), prepared(graphed=True).run(STEPS[:1])
    polls: list[int] = []
    with pytest.raises(Stopped):
        graphed.step.update(STEPS[1], 3e-2, poll=lambda: stop(polls), settle=lambda: None)
    with pytest.raises(Stopped):
        graphed.step.update(STEPS[1], 3e-2, poll=lambda: None, settle=lambda: stop([1]))
    for micro_batches, lr in list(zip(STEPS, RATES))[1:]:
        graphed.figures.append(graphed.step.update(micro_batches, lr, poll=lambda: None, settle=lambda: None))
    assert_same(ordinary, graphed, 1e-4)


def test_when_there_are_enough_graphs_a_larger_one_serves_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 1)
    steps = [STEPS[1][:1], STEPS[0], [batch(lengths=(100, 90))], STEPS[3]]
    ordinary, graphed = prepared(graphed=False).run(steps), prepared(graphed=True).run(steps)
    assert graphed.log == []
    # The first look, and the steps but the third, which no bucket holds.
    assert sorted(graph.replays for graph in FakeGraph.made) == [3, 4, 4]
    assert_same(ordinary, graphed, 1e-4)


def fixed(what: str) -> type[GraphedUpdate]:
    """The update with its rate, its count, or whether it is skipped as they were at the capture."""

    class Fixed(GraphedUpdate):
        rate = 7e-3

        def _program(self) -> None:
            norm = self.optimizer.clip_(self.max_grad_norm)
            self.figures.copy_(torch.stack([self.loss, norm]))
            skip = ~self.figures.isfinite().all()
            lr, count = self.lr, self.count
            if what == "rate":
                lr = torch.tensor(self.rate, dtype=torch.float64)
            if what == "count":
                count = torch.tensor(self.optimizer.num_updates + 1)
            if what == "skip":
                skip = torch.tensor(False)
            if what == "clip":
                for grad in self.grads.values():
                    grad.mul_(0.5)
            self.optimizer.step(lr, skip=skip, count=count)

    return Fixed


@pytest.mark.parametrize("what", ["rate", "count", "skip", "clip"])
def test_an_update_that_is_as_it_was_at_its_capture_is_given_up(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graph, "GraphedUpdate", fixed(what))
    assert_given_up(prepared(graphed=True).run())


def test_numbers_of_the_host_are_refused_with_tensors_or_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that is a Python float, a count that is a Python integer: AdamW in the way that eager steps call it."""

    class Numbers(GraphedUpdate):
        def _program(self) -> None:
            norm = self.optimizer.clip_(self.max_grad_norm)
            self.figures.copy_(torch.stack([self.loss, norm]))
            updates = self.optimizer.num_updates
            self.optimizer.step(7e-3, skip=None if self._ready else torch.tensor(True))
            self.optimizer.num_updates = updates

    monkeypatch.setattr(step_graph, "GraphedUpdate", Numbers)
    assert_given_up(prepared(graphed=True).run())


def assert_given_up(graphed: Trained) -> None:
    """In one line, before anything has moved: the steps are the ordinary ones, to the bit."""
    assert graphed.step.graphs is not None
    assert graphed.step.graphs.given_up
    assert graphed.passed == []
    (line,) = graphed.log
    assert line.startswith("cuda_graph: ")
    assert line.endswith("; steps go on one launch at a time")
    assert_same(prepared(graphed=False).run(), graphed, 0.0)


def test_a_new_tensor_in_place_of_the_static_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(static: StaticInputs, rows: MicroBatch, divisor: int) -> None:
        static.inputs = inputs_of(rows, static.bucket, divisor)

    monkeypatch.setattr(StaticInputs, "fill", fill)
    graphed = prepared(graphed=True).run()
    assert_given_up(graphed)
    assert "the loss is not that of the ordinary step" in graphed.log[0]


def test_a_divisor_of_the_host_is_found_out() -> None:
    def loss_of_numbers(gpt: GPT) -> Callable[[StaticInputs], Tensor]:
        def loss(static: StaticInputs) -> Tensor:
            ids, spans, targets, weights, _ = static.inputs
            count = max(1, sum(target != IGNORE for target in targets.numpy()))  # numpy: read without torch
            weights = (weights > 0).float() / count
            return gpt.weighted_loss(ids, targets, weights, spans=spans, positions=static.positions)

        return loss

    assert_given_up(prepared(graphed=True, loss=loss_of_numbers).run())


def test_documents_that_stay_as_they_were_are_found_out() -> None:
    """A loss that is right for any rows of which each is a document of one token."""

    def loss_of_tokens(gpt: GPT) -> Callable[[StaticInputs], Tensor]:
        def loss(static: StaticInputs) -> Tensor:
            ids, spans, targets, weights, _ = static.inputs
            return gpt.weighted_loss(
                ids, targets, weights, spans=spans.clone().copy_(alone), positions=static.positions
            )

        alone = torch.stack([torch.arange(64), torch.arange(1, 65)]).int()
        return loss

    assert_given_up(prepared(graphed=True, loss=loss_of_tokens).run())


def test_a_branch_on_the_loss_is_found_out() -> None:
    def loss_with_branch(gpt: GPT) -> Callable[[StaticInputs], Tensor]:
        def loss(static: StaticInputs) -> Tensor:
            found = loss_of(gpt)(static)
            return found * 2 if found > 1e-3 else found

        return loss

    graphed = prepared(graphed=True, loss=loss_with_branch).run()
    assert_given_up(graphed)
    assert "not permitted when stream is capturing" in graphed.log[0]


def test_a_gradient_that_is_lost_is_found_out() -> None:
    """The loss is right, and one matrix gets no gradient."""

    def loss_without(gpt: GPT) -> Callable[[StaticInputs], Tensor]:
        def loss(static: StaticInputs) -> Tensor:
            weight = gpt.layers[0].attn.qkv.weight
            weight.requires_grad_(False)
            try:
                return loss_of(gpt)(static)
            finally:
                weight.requires_grad_(True)

        return loss

    graphed = prepared(graphed=True, loss=loss_without).run()
    assert_given_up(graphed)
    assert "the gradient of layers.0.attn.qkv.weight" in graphed.log[0]


def test_a_graph_that_cannot_be_captured_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(graph: FakeGraph, program: Callable[[], None]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(FakeGraph, "capture", capture)
    graphed = prepared(graphed=True).run()
    assert_given_up(graphed)
    assert graphed.log == ["cuda_graph: CUDA out of memory. Tried to allocate; steps go on one launch at a time"]


@pytest.mark.parametrize(
    "variant", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw_8bit", "adamw_bf16"))]
)
def test_the_check_of_the_update_passes_for_every_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels that a GPU runs, in Triton's interpreter."""
    monkeypatch.setenv("AFINA_BACKEND", "triton")
    gpt = model().bfloat16()
    check_update(AdamW(gpt, decay=gpt.decay_parameters(), variant=variant, seed=3), FakeGraph)
    assert [graph.replays for graph in FakeGraph.made] == [4]


@pytest.mark.parametrize("variant", ["adamw", "adamw_8bit", "adamw_bf16"])
@pytest.mark.parametrize("lean", [False, True])
def test_with_the_kernels_of_a_gpu_nothing_is_read_on_the_host(
    lean: bool, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches are counted instead of run: two layers more are as many launches more each."""
    monkeypatch.setenv("AFINA_BACKEND", "triton")
    counts = []
    for layers in (1, 2, 3):
        config = dataclasses.replace(TINY, num_layers=layers, layer_windows=(None,) * layers, layer_ropes=(0,) * layers)
        gpt = GPT(config, device="cpu", dtype=torch.bfloat16).train()
        updates = GraphedUpdate(
            AdamW(gpt, decay=gpt.decay_parameters(), variant=variant), max_grad_norm=1.0, graph=FakeGraph
        )
        static = StaticInputs(Bucket(64, 32), torch.device("cpu"))

        def program(gpt: GPT = gpt, updates: GraphedUpdate = updates, static: StaticInputs = static) -> None:
            ids, spans, targets, weights, positions = static.inputs
            gpt.weighted_loss(ids, targets, weights, spans=spans, positions=positions, lean=lean).backward()
            updates._program()

        with updates.attached():
            count_launches(program)  # tables are made
            counts.append(count_launches(program))
    assert counts[2] - counts[1] == counts[1] - counts[0] < 48, counts
