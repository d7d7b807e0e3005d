"""Short training runs: the range test that chooses method and rate, and the learning curve over the rows.

Every run is a run of `engine/train.py` in a temporary folder, with the settings of the recipe that is advised later:
the same loop, schedule and choice of the best step, only shorter.

The range test: the method's usual rate first, then three times and a third of it, and on in the direction of the lower
loss while it falls, `MAX_RATES` at most; each run takes the same few steps over the same rows in the same order, from
the same weights, and is judged by the loss on the tuning rows. So the optimum is inside the range, or the time is over.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afina.advise.evidence import Trial
from afina.engine.nonfinite import NonFiniteError
from afina.engine.runtime import flushed_denormals
from afina.engine.train import Interrupted, open_run
from afina.engine.train_config import TrainConfig
from afina.loaders.data.dataset import Data, TokenSet

Clock = Callable[[], float]
FACTOR = 3.0  # between neighbouring rates
MAX_RATES = 5  # tried for one method


class Deadline:
    """Asks a run to stop once a moment of ``clock`` has passed."""

    def __init__(self, end: float, clock: Clock) -> None:
        self.end, self.clock = end, clock

    @property
    def requested(self) -> bool:
        return self.clock() >= self.end


@dataclass(frozen=True)
class ShortRun:
    """What a run left: its best model's folder, the lowest loss on the tuning rows (nats a token), and how it went.

    ``falling``: its last evaluation was its lowest, by more than one part in a hundred below the one before.
    """

    best: Path
    learning_rate: float
    loss: float
    steps: int
    falling: bool


class Runs:
    """Runs with shared settings and tuning rows, in folders that go when ``folder`` goes.

    ``seconds_per_step`` is, for each method, that of its last run; ``overhead`` is what the last run took besides its
    steps: loading, evaluating and saving. ``clock`` tells all times, in seconds.
    """

    def __init__(
        self, settings: dict[str, Any], train: TokenSet, tune: TokenSet, folder: Path, clock: Clock = time.monotonic
    ) -> None:
        self.settings, self.train, self.tune, self.folder, self.clock = settings, train, tune, folder, clock
        self.count = 0
        self.seconds_per_step: dict[str, float] = {}
        self.overhead = 0.0

    def run(
        self, method: str, rate: float, steps: int, rows: NDArray[np.int64], *, evaluations: int, end: float
    ) -> ShortRun | None:
        """Train on these training rows; None where ``end`` came before the tuning rows were measured. Raises
        NonFiniteError where their loss was never finite."""
        began, wall = self.clock(), time.monotonic()
        self.count += 1
        output = self.folder / f"run-{self.count}"
        config = TrainConfig.resolve(
            overrides=self.settings
            | {
                "method": method,
                "learning_rate": rate,
                "max_steps": steps,
                "eval_steps": math.ceil(steps / evaluations),
                "save_steps": 10 * steps,
                "output_dir": str(output),
            }
        )
        data = Data(self.train.select(rows), self.tune, {})
        with open_run(config, quiet=True, data=data) as run, flushed_denormals():
            run.begin()
            with contextlib.suppress(Interrupted):
                run.loop(Deadline(end, self.clock), show_bar=False)
            if run.progress.evaluated_step <= 0:
                return None
            metrics = run.finish().metrics
        logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        # The log's seconds are those of the wall. The first step of a process allocates: the median leaves it out.
        took = self.clock() - began
        pace = took / (time.monotonic() - wall)
        seconds = [pace * row["seconds"] for row in logged if "seconds" in row]
        self.seconds_per_step[method] = statistics.median(seconds)
        self.overhead = max(0.0, took - sum(seconds))
        losses = [math.nan if row["dev_loss"] is None else row["dev_loss"] for row in logged if "dev_loss" in row]
        falling = len(losses) > 1 and losses[-1] < 0.99 * min(losses[:-1])
        return ShortRun(output / "best", rate, metrics["dev_loss"], metrics["steps"], falling)


@contextlib.contextmanager
def short_runs(
    settings: dict[str, Any], train: TokenSet, tune: TokenSet, clock: Clock = time.monotonic
) -> Iterator[Runs]:
    """Hold a temporary folder for runs with these settings of ``TrainConfig``."""
    with tempfile.TemporaryDirectory(prefix="afina-advise-") as folder:
        yield Runs(settings, train, tune, Path(folder), clock)


def range_test(
    runs: Runs, usual: dict[str, float], *, steps: int, end: float, say: Callable[[str], None]
) -> tuple[list[Trial], dict[str, ShortRun]]:
    """Try rates for each method, from its ``usual`` one on; return every trial, and each method's best run.

    The time until ``end`` is shared evenly among the methods that are left, and no run is begun that would not end in
    it. A method without a finite loss is not among the best.
    """
    trials: list[Trial] = []
    best: dict[str, ShortRun] = {}
    clock = runs.clock
    for number, (method, first) in enumerate(usual.items()):
        until = clock() + (end - clock()) / (len(usual) - number)
        losses: dict[float, float] = {}
        took = 0.0
        waiting = [(first, 1.0), (first * FACTOR, FACTOR), (first / FACTOR, 1 / FACTOR)]
        while waiting and len(losses) < MAX_RATES and clock() + took <= until:
            rate, onward = waiting.pop(0)
            began = clock()
            try:
                done = runs.run(method, rate, steps, np.arange(len(runs.train)), evaluations=1, end=until)
                if done is None:  # the time is over
                    break
            except NonFiniteError:
                done = None
            took = clock() - began
            losses[rate] = done.loss if done is not None else math.nan
            trials.append(Trial(method, rate, steps, losses[rate]))
            say(f"range test: {method} at {rate:.2g}, {steps} steps: loss {losses[rate]:.3f}")
            if done is not None and (method not in best or done.loss < best[method].loss):
                best[method] = done
                if onward != 1.0:  # the optimum may lie further that way, and not the other
                    waiting = [(rate * onward, onward)]
    return trials, best
