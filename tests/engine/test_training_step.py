"""engine/training_step.py: the arithmetic of a step, and that the host waits for nothing in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import fit, lines

import afina
from afina.engine import optim, train, training_step
from afina.engine.objectives import sft
from afina.engine.optim import AdamW
from afina.engine.training_step import accumulate
from afina.kernels.adamw import adamw_
from afina.loaders.data.batches import Batches
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def gradient(model_dir: str, rows: str, batch_size: int, accumulation: int, clip: float) -> dict[str, torch.Tensor]:
    """The gradient of the last, partial step of an epoch of 36 rows in steps of 8."""
    tokenizer = load_tokenizer(model_dir)
    data = prepare(rows, tokenizer, max_length=64, val_size=0.1, seed=42, progress=False)
    model = afina.load_model(model_dir).train()
    batches = Batches(data.train, batch_size=batch_size, accumulation=accumulation, seed=1)
    micro_batches = batches.step(batches.steps_per_epoch - 1)
    assert sum(len(mb.rows) for mb in micro_batches) == 4
    optimizer = AdamW(model, decay=set())
    accumulate(model, micro_batches)
    optimizer.clip_(clip)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulation_does_not_change_the_gradient(small_model: str, small_rows: str, clip: float) -> None:
    whole = gradient(small_model, small_rows, 8, 1, clip)
    assert len(whole) == len(dict(afina.load_model(small_model).named_parameters()))
    for batch_size, accumulation in ((2, 4), (1, 8)):
        parts = gradient(small_model, small_rows, batch_size, accumulation, clip)
        for name, grad in whole.items():
            assert (grad - parts[name]).norm() <= 1e-6 * grad.norm(), name


def test_a_step_clips_its_whole_gradient_once(small_model: str, small_rows: str) -> None:
    """However its rows fall into micro-batches: the weights after an update with the clip active."""
    data = prepare(small_rows, load_tokenizer(small_model), max_length=64, val_size=0.1, seed=42, progress=False)
    left = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        model = afina.load_model(small_model).train()
        optimizer = AdamW(model, decay=set(), eps=1.0)  # an update that is proportional to the gradient, nearly
        step = training_step.TrainingStep(model, optimizer, sft, max_grad_norm=0.05, in_backward=False)
        batches = Batches(data.train, batch_size=batch_size, accumulation=accumulation, seed=1)
        polls: list[int] = []
        figures = step.update(batches.step(0), 1.0, poll=lambda polls=polls: polls.append(1), settle=lambda: None)
        assert len(polls) == accumulation
        assert float(figures[1]) > 0.1
        left.append((figures, {name: p.detach() for name, p in model.named_parameters()}))
        assert all(p.grad is None for p in model.parameters())
    assert torch.allclose(left[0][0], left[1][0], rtol=1e-5)
    before = dict(afina.load_model(small_model).named_parameters())
    for name, weight in left[0][1].items():
        moved = weight - before[name]
        assert (weight - left[1][1][name]).norm() <= 1e-3 * moved.norm(), name


def test_packing_changes_nothing_but_the_speed(small_model: str, small_rows: str, tmp_path: Path) -> None:
    packed, padded = (fit(small_model, small_rows, tmp_path / str(p), packing=p) for p in (True, False))
    assert lines(packed, "loss") == pytest.approx(lines(padded, "loss"), abs=1e-5)
    assert lines(packed, "dev_loss") == pytest.approx(lines(padded, "dev_loss"), abs=1e-5)
    assert packed.metrics["tokens"] == padded.metrics["tokens"] == packed.metrics["processed_tokens"]
    assert padded.metrics["processed_tokens"] > padded.metrics["tokens"]


READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")  # these wait for a GPU


def test_on_a_gpu_nothing_is_read_between_backward_and_update(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host reads there would stop it until the GPU is done. The result of the step before, which has long come
    by then, is all that it looks at."""
    read: list[torch.Tensor] = []
    between: list[list[torch.Tensor]] = []  # what was read before each update, after the last backward pass
    results: list[torch.Tensor] = []
    backward, launched = torch.Tensor.backward, training_step.LaunchedStep.__init__

    def watched(name: str) -> Any:
        method = getattr(torch.Tensor, name)
        return lambda tensor, *args: (read.append(tensor), method(tensor, *args))[1]

    def ran_backward(tensor: torch.Tensor) -> None:
        backward(tensor)
        read.clear()

    def updated(*args: Any, **kwargs: Any) -> None:
        between.append(list(read))
        adamw_(*args, **kwargs)

    def launch(step: training_step.LaunchedStep, *args: Any) -> None:
        launched(step, *args)
        results.append(step.figures)

    monkeypatch.setattr(train.Run, "deferred", True)
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    monkeypatch.setattr(torch.Tensor, "backward", ran_backward)
    monkeypatch.setattr(optim, "adamw_", updated)
    monkeypatch.setattr(training_step.LaunchedStep, "__init__", launch)
    fit(small_model, small_rows, tmp_path / "run", gradient_accumulation_steps=2, eval_steps=4, weight_decay=0.0)
    assert len(between) == len(results) == 8
    for step, tensors in enumerate(between):
        # An evaluation begins with a look at the last step, so after it nothing is left to read.
        expected = [results[step - 1]] if step not in (0, 4) else []
        assert [id(tensor) for tensor in tensors] == [id(tensor) for tensor in expected], step
