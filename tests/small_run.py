"""Runs of a tiny model on a few rows, for tests of the training loop; conftest.py has the model and the rows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from afina.engine import training_step
from afina.engine.train import RunResult, finetune

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "password", "settings", "page", "card", "one")


def write_rows(folder: Path) -> Path:
    """40 prompt/completion rows; completions of 1 to 12 words, so that rows weigh very differently."""
    draw = random.Random(0)
    path = folder / "rows.jsonl"
    with path.open("w") as out:
        for i in range(40):
            prompt = f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
            completion = " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


def fit(model: str, rows: str, out: Path, **changes: Any) -> RunResult:
    """``finetune``, quietly, with 8 small steps unless ``changes`` say otherwise."""
    settings = {"max_length": 64, "max_steps": 8, "batch_size": 4, "learning_rate": 1e-3, "threads": 1} | changes
    flags = {name: settings.pop(name) for name in ("resume", "overwrite") if name in settings}
    return finetune(quiet=True, **flags, model=model, data=rows, output_dir=str(out), **settings)


def lines(result: RunResult, key: str) -> list[Any]:
    """The values of ``key`` in the run's metrics.jsonl."""
    read = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in read if key in line]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the losses of these (0-based) steps NaN."""
    accumulate, step = training_step.accumulate, iter(range(1000))

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = accumulate(*args, **kwargs)
        return loss * math.nan if next(step) in steps else loss

    monkeypatch.setattr(training_step, "accumulate", poisoned)


class Stop:
    """Stands for StopRequest, and asks to stop at the n-th poll."""

    def __init__(self, polls: int) -> None:
        self.left = polls

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0
