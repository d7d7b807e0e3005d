"""What a model's answers to a task are worth: metrics with intervals, and the comparison of two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from afina.engine.intervals import Interval, Paired, Statistic, Values, bootstrap, mean, paired, verdict
from afina.errors import DataError

MAIN = {  # the main metric of each task, higher is better
    "loss": "log_likelihood",
    "generate": "rouge_l",
    "translate": "chrf",
    "classify": "accuracy",
    "retrieve": "mrr@10",
    "chat": "rouge_l",
    "exact_match": "exact_match",
    "classification": "accuracy",
}
LOWER_IS_BETTER = {"loss", "perplexity", "bits_per_byte", "ece"}


class Sample(NamedTuple):
    """What a metric is made of: values (rows,) or (rows, k), and the statistic that makes it of them."""

    values: Values
    statistic: Statistic = mean


@dataclass(frozen=True)
class TaskResult:
    """What a model's answers are worth.

    ``metric`` is the task's main one, higher is better; ``metrics`` has all; ``intervals`` their 95 % bootstrap
    intervals over rows. ``scores``: the main metric of each row (of a corpus metric, the row's own). ``rows``: of each
    row where it stands, prompt, prediction, reference, score, and what the task has besides. ``details``: confusion
    matrix, calibration, signatures. ``samples``: what `compare` resamples.
    """

    task: str
    metric: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    scores: list[float]
    rows: list[dict[str, Any]]
    details: dict[str, Any]
    samples: dict[str, Sample] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A model against another on the same rows: what changed in each metric, which rows (by number from 0) the main
    metric won, lost and left, and the verdict on it: "better", "worse" or "no difference"."""

    metric: str
    differences: dict[str, Paired]
    won: list[int]
    lost: list[int]
    unchanged: list[int]
    verdict: str


def compare(before: TaskResult, after: TaskResult, *, seed: int = 0) -> Comparison:
    """``after`` against ``before``, row by row. Raises DataError where they are not of the same task and rows."""
    one, two = ([row["where"] for row in result.rows] for result in (before, after))
    if before.task != after.task or one != two:
        raise DataError("results of two models compare only where they are of the same task on the same rows")
    differences = paired_samples(before.samples, after.samples, seed=seed)
    changes = [b - a for a, b in zip(before.scores, after.scores, strict=True)]
    return Comparison(
        metric=after.metric,
        differences=differences,
        won=[number for number, change in enumerate(changes) if change > 0],
        lost=[number for number, change in enumerate(changes) if change < 0],
        unchanged=[number for number, change in enumerate(changes) if change == 0],
        verdict=verdict(differences[after.metric], higher_is_better=after.metric not in LOWER_IS_BETTER),
    )


def paired_samples(before: dict[str, Sample], after: dict[str, Sample], *, seed: int = 0) -> dict[str, Paired]:
    """What changed in the metrics that two models' results share, on the same rows."""
    return {
        name: paired(before[name].values, sample.values, sample.statistic, seed=seed)
        for name, sample in after.items()
        if name in before
    }


@dataclass
class Answered:
    """Rows with their answers, and what each metric is made of."""

    rows: list[dict[str, Any]]
    samples: dict[str, Sample]
    scores: list[float]
    metrics: dict[str, float] = field(default_factory=dict)  # those that have no interval
    details: dict[str, Any] = field(default_factory=dict)

    def result(self, task: str, metric: str, seed: int | None) -> TaskResult:
        """``seed``: of the intervals; None leaves them out."""
        found: dict[str, Interval] = {}
        if seed is not None:
            found = {name: bootstrap(*sample, seed=seed) for name, sample in self.samples.items()}
        rows = [{**row, "score": score} for row, score in zip(self.rows, self.scores, strict=True)]
        return TaskResult(
            task=task,
            metric=metric,
            metrics={name: statistic(values) for name, (values, statistic) in self.samples.items()} | self.metrics,
            intervals={name: (interval.low, interval.high) for name, interval in found.items()},
            scores=self.scores,
            rows=rows,
            details=self.details,
            samples=self.samples,
        )


def sample_of(values: Sequence[float]) -> Sample:
    return Sample(np.array(values, np.float64))


def f1_sample(predicted: Sequence[str], wanted: Sequence[str]) -> Sample:
    """Macro-F1 of rows: their labels as numbers that do not depend on the predictions, so that two models compare."""
    number = {label: i for i, label in enumerate(sorted(set(wanted)))}
    pairs = np.array([[number.get(p, -1), number[w]] for p, w in zip(predicted, wanted)], np.float64)
    return Sample(pairs, partial(macro_f1_of_numbers, len(number)))


def macro_f1_of_numbers(labels: int, values: Values) -> float:
    """As ``scores.macro_f1``, quicker: of (rows, 2) numbers predicted and wanted, -1 where no label was predicted."""
    predicted, wanted = values.T.astype(int)
    guesses, support = np.bincount(predicted[predicted >= 0], minlength=labels), np.bincount(wanted, minlength=labels)
    right = np.bincount(wanted[predicted == wanted], minlength=labels)
    there = support > 0
    return float((2 * right[there] / (support + guesses)[there]).mean())
