"""engine/metrics.py: the row of a step, totals that add up, and what is written where."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from afina.engine.metrics import MetricsWriter, Progress, run_metrics, step_row
from afina.engine.run_folder import RunFolder
from afina.errors import ConfigError
from afina.loaders.data.batches import MicroBatch


def batch(rows: int, length: int, tokens: int, loss_tokens: int) -> MicroBatch:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return MicroBatch(ids, ids, None, list(range(rows)), loss_tokens, tokens)


def test_the_row_of_a_step_by_hand() -> None:
    row = step_row(7, 2.5, 1e-3, 0.5, [batch(2, 10, 15, 6), batch(1, 4, 4, 3)], 2.0)
    assert row == {
        "step": 7,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "trained_tokens": 9,
        "tokens": 19,
        "processed_tokens": 24,
        "seconds": 2.0,
        "tokens_per_second": 9.5,
        "trained_tokens_per_second": 4.5,
    }


def test_totals_leave_out_the_losses_of_skipped_steps() -> None:
    progress = Progress()
    for step, loss in enumerate((3.0, math.nan, math.inf, 2.0), 1):
        row = step_row(step, loss, 1e-3, 1.0, [batch(1, 8, 8, 4)], 0.5)
        progress.step = step
        progress.count(row if math.isfinite(loss) else row | {"skipped": True})
        assert progress.bad_in_a_row == {1: 0, 2: 1, 3: 2, 4: 0}[step]
    found = run_metrics(progress)
    assert (found["steps"], found["skipped_steps"], found["train_loss"]) == (4, 2, 2.5)
    assert (found["trained_tokens"], found["tokens"], found["train_seconds"]) == (8, 32, 2.0)
    assert (found["tokens_per_second"], found["trained_tokens_per_second"]) == (16.0, 4.0)
    assert run_metrics(Progress())["tokens_per_second"] == 0.0  # no step was taken


class EventFiles:
    """Stands for torch's SummaryWriter, which needs a package that is not installed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scalars, self.closed = folder, list[tuple[str, float, int]](), False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def written(folder: Path, report_to: str) -> MetricsWriter:
    with RunFolder(folder) as run_folder:
        run_folder.begin({}, {})
        writer = MetricsWriter(run_folder, report_to)
        writer.write({"step": 1, "loss": 2.0, "grad_norm": math.nan, "tokens": 8})
        writer.write({"step": 1, "dev_loss": 3.0, "best": True})
        writer.close()
    return writer


def test_rows_go_to_metrics_jsonl(tmp_path: Path) -> None:
    assert written(tmp_path / "run", "none").tensorboard is None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 2.0, "grad_norm": None, "tokens": 8},
        {"step": 1, "dev_loss": 3.0, "best": True},
    ]


def test_event_files_take_the_finite_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = EventFiles
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    events = written(tmp_path / "run", "tensorboard").tensorboard
    assert events.scalars == [("loss", 2.0, 1), ("dev_loss", 3.0, 1)]
    assert events.folder == tmp_path / "run" / "tensorboard"
    assert events.closed


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'afina\[tensorboard\]'"):
        written(tmp_path / "run", "tensorboard")
