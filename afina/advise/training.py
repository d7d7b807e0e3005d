"""What training gives: the range test and the learning curve, planned within the time there is, and the recipe."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afina.advise.answers import Work, losses, score
from afina.advise.curve import Runs, ShortRun, range_test, short_runs
from afina.advise.evidence import Evidence, Point, Trial
from afina.advise.verdict import better
from afina.engine.intervals import Paired, paired
from afina.engine.methods import default_learning_rate
from afina.engine.model import GPT
from afina.engine.nonfinite import NonFiniteError
from afina.engine.weights import load_model
from afina.errors import ConfigError
from afina.loaders.data.dataset import permutation

FULL_MODEL = 100_000_000  # parameters below which full fine-tuning is tried beside LoRA
RANGE_UNTIL, RUNS_UNTIL = 0.45, 0.96  # shares of the time: when the range test ends, and the last run is scored
RANGE_STEPS = (10, 40)  # the least and the most steps of a run of the range test
SHARES = (1.0, 0.3, 0.1)  # of the training rows; the run on all of them comes first and has what time it needs
MIN_SHARE_ROWS = 8  # fewer rows make no point of the curve
EVALUATION_STEPS = 25  # of a run on the way, between evaluations, where it has so many
STEPS_WANTED, EPOCHS = 400, (2.0, 10.0)  # of a run; the fewest and the most passes over its rows


class Training:
    """The runs of one request, with what is left of its time."""

    def __init__(self, work: Work) -> None:
        self.work, self.rows, self.request = work, work.rows, work.request

    def measure(self, evidence: Evidence) -> tuple[Evidence, dict[str, Any] | None]:
        """The range test and the learning curve, and the settings of the run that they advise."""
        rows, reading = self.rows, self.request.reading
        settings = reading | {
            "model": self.request.model,
            "data": self.request.data,
            "max_length": rows.max_length,
            "dtype": self.request.dtype,
            "device": self.request.device,
            "seed": self.request.seed,
        }
        methods = ["lora", "full"] if evidence.parameters < FULL_MODEL else ["lora"]
        usual = {method: default_learning_rate(method, self.work.width)[0] for method in methods}
        with short_runs(settings, rows.train, rows.tune, self.work.clock) as runs:
            trials, best = self.range_test(runs, usual)
            if not best:
                return replace(evidence, trials=tuple(trials)), None
            method, gains = self.choose_method(best)
            rate = best[method].learning_rate
            evidence = replace(
                evidence, trials=tuple(trials), method=method, learning_rate=rate, gains=evidence.gains | gains
            )
            evidence = self.curve(runs, evidence)
        tuned = evidence.tuned
        if tuned is None:
            return evidence, None
        epochs = max(passes(rows.total, self.work.batch_size), tuned.epochs * (2 if tuned.falling else 1))
        recipe = {name: value for name, value in settings.items() if value not in ("auto", None)} | {
            "method": method,
            "learning_rate": rate,
            "epochs": round(epochs, 1),
            "early_stopping_patience": 3,
            "output_dir": "runs/advised",
        }
        return evidence, recipe

    def range_test(self, runs: Runs, usual: dict[str, float]) -> tuple[list[Trial], dict[str, ShortRun]]:
        """Every trial, and each method's best run; the number of its steps is what there is time for."""
        least, most = RANGE_STEPS
        end = self.work.moment(RANGE_UNTIL)
        # To see what a run takes, at a rate that cannot hurt.
        runs.run("lora", usual["lora"] / 1000, 3, np.arange(len(runs.train)), evaluations=1, end=math.inf)
        step, fixed = runs.seconds_per_step["lora"], runs.overhead
        room = end - self.work.clock()
        for methods in (list(usual), ["lora"]):  # three rates of each method at least
            steps = int((room / (3.5 * len(methods)) - fixed) / step)
            if steps >= least:
                break
        else:
            needed = (self.work.clock() - self.work.started + 3.5 * (fixed + least * step)) / RANGE_UNTIL / 60
            raise ConfigError(
                f"--minutes {self.work.seconds / 60:g} is too short: a training step takes {step:.2g} s here, a run "
                f"of {least} {fixed + least * step:.0f} s; give at least {math.ceil(needed)}"
            )
        usual = {method: usual[method] for method in methods}
        return range_test(runs, usual, steps=min(most, steps), end=end, say=self.work.say)

    def choose_method(self, best: dict[str, ShortRun]) -> tuple[str, dict[str, Paired]]:
        """Full where its loss on the tuning rows is lower than LoRA's beyond chance, else LoRA."""
        if len(best) == 1:
            return next(iter(best)), {}
        found = {method: losses(self.load(run.best), self.rows.tune) for method, run in best.items()}
        difference = paired(found["full"], found["lora"], seed=self.request.seed)
        return "full" if better(difference) else "lora", {"lora - full": difference}

    def load(self, source: Path) -> GPT:
        return load_model(source, dtype=self.request.dtype, device=self.request.device)

    def curve(self, runs: Runs, evidence: Evidence) -> Evidence:
        """Runs on a tenth, three tenths and all of the training rows, nested, each scored on the judging rows."""
        rows, seed = self.rows, self.request.seed
        order = permutation(len(rows.train), seed, 2)
        method, rate = str(evidence.method), float(evidence.learning_rate or 0.0)
        counts = [count for share in SHARES if (count := round(share * len(order))) >= MIN_SHARE_ROWS]
        points: list[Point] = []
        results: list[tuple[list[float], NDArray[np.float64]]] = []
        for count in counts:
            wanted, steps, until = self.steps(runs, method, count)
            if points and steps < RANGE_STEPS[0]:  # no time for it
                break
            some = np.sort(order[:count])
            evaluations = min(5, max(2, steps // EVALUATION_STEPS))
            try:
                done = runs.run(method, rate, max(1, steps), some, evaluations=evaluations, end=until)
            except NonFiniteError:
                done = None
            if done is None:
                continue
            model = self.load(done.best)
            after = losses(model, rows.judge)
            scores = list(self.work.answer(model, evidence.task, self.work.judged).scores) if self.work.judged else []
            del model
            told = score(f"training on {count:,} rows", scores) if scores else None
            epochs = round(done.steps * self.work.batch_size / count, 2)
            points.insert(0, Point(count, done.steps, wanted, epochs, float(after.mean()), told, done.falling))
            results.insert(0, (scores, after))
            shown = f", {evidence.metric} {told.value:.3f}" if told is not None else ""
            self.work.say(f"curve: {count:,} rows, {done.steps} steps: loss {after.mean():.3f}{shown}")
        if not points:
            return evidence
        gains = dict(evidence.gains)
        scores, after = results[-1]
        gains["loss"] = paired(after, self.work.base_losses, seed=seed)
        for name, others in self.work.scores.items():
            gains[f"tuned - {name}"] = paired(others, scores, seed=seed)
        tuned = points[-1]
        missing = (tuned.wanted - tuned.steps) * runs.seconds_per_step[method]
        minutes = math.ceil((self.work.clock() - self.work.started + missing) / 60) if missing > 0 else None
        # A run on fewer rows that was cut shorter than the one on all would tell of its time, not of the rows.
        if len(results) > 1 and points[-2].epochs > 0.9 * points[-1].epochs:
            fewer, before = results[-2]
            gains["all - third"] = paired(fewer, scores, seed=seed) if scores else paired(after, before, seed=seed)
        return replace(evidence, curve=tuple(points), gains=gains, minutes_needed=minutes)

    def steps(self, runs: Runs, method: str, count: int) -> tuple[int, int, float]:
        """The steps that a run on so many rows should have, those that there is time for, and when it must end."""
        now = self.work.clock()
        room = self.work.moment(RUNS_UNTIL) - now - 1.2 * self.work.scoring - runs.overhead
        wanted = math.ceil(passes(count, self.work.batch_size) * count / self.work.batch_size)
        return wanted, int(min(wanted, 0.95 * room / runs.seconds_per_step[method])), now + room


def passes(count: int, batch_size: int) -> float:
    """How often a run should go over ``count`` rows: as it takes for STEPS_WANTED steps, but within EPOCHS."""
    least, most = EPOCHS
    return min(max(STEPS_WANTED * batch_size / count, least), most)
