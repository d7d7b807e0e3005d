"""The verdict on a run, in one line: better, no difference or worse on the dev rows, with its interval; forgot or not.

A word other than "no difference" needs a paired 95 % interval that leaves out zero (``engine/intervals.py``), and that
the model forgot (or did not) one that lies on one side of ``FORGOT``. docs/report.md has the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from afina.engine.dev_rows import DevRows, MetricRows
from afina.engine.intervals import SAMPLES, Paired, Statistic, mean, paired, ratio, verdict
from afina.engine.scores import score_of_counts
from afina.engine.task_results import macro_f1_of_numbers

FEW_ROWS = 30  # with fewer dev rows an interval is itself uncertain, and the page says so
ENOUGH = 6  # fewer rows that all moved one way are no rarer than 1 in 20 by chance: nothing that happens would be proof
# Nats a token on reference text. By the exponent 0.076 that Kaplan et al. (2020) measured for loss against size, a
# model at 3 nats has to be 1.5 times as large to gain 0.1: a model that loses that much is one of a smaller kind.
FORGOT = 0.1
UNKNOWN = "unknown"
DRAWS, MIN_SAMPLES = 20_000_000, 400  # of many rows fewer samples: there the interval is narrow, and surer of itself


@dataclass(frozen=True)
class Judged:
    """A figure before and after, on the same rows. ``found``: what changed, or None where nothing can be compared."""

    name: str
    before: float | None
    after: float | None
    rows: int
    found: Paired | None
    higher_is_better: bool = False

    @property
    def word(self) -> str:
        """ "better", "worse", "no difference" or "unknown"."""
        return UNKNOWN if self.found is None else verdict(self.found, higher_is_better=self.higher_is_better)

    @property
    def line(self) -> str:
        if self.found is None or self.before is None or self.after is None:
            return f"Unknown: the {self.name} was not measured before and after"
        unit = "" if self.higher_is_better else " nats a token"
        figures = f"{self.name} {self.before:.3f} before, {self.after:.3f} after"
        interval = (
            f"change {self.found.difference:+.3f}{unit}, 95 % interval {self.found.low:+.3f} to {self.found.high:+.3f}"
        )
        rows = f"{self.rows:,} dev row{'s' * (self.rows != 1)}"
        few = f"; only {rows}, so take it with care" if self.rows < FEW_ROWS else f", {rows}"
        told = self.word.capitalize() if self.rows >= ENOUGH else "Too few rows to tell"
        return f"{told}: {figures} ({interval}{few})"

    def to_dict(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"figure": self.name, "before": self.before, "after": self.after, "rows": self.rows}
        if self.found is None:
            return figures
        return figures | (self.found._asdict() if self.higher_is_better else _of_losses(self.found))


@dataclass(frozen=True)
class Forgetting:
    """The mean loss on reference text (nats a token), before and after, over ``passages`` of ``tokens`` in all."""

    before: float
    after: float
    found: Paired
    passages: int
    tokens: int
    source: str  # the text's name

    @property
    def word(self) -> str:
        """ "yes", "no" or "unclear": on which side of ``FORGOT`` the interval lies, if on one."""
        if self.found.low > FORGOT:
            return "yes"
        return "no" if self.found.high < FORGOT else "unclear"

    @property
    def line(self) -> str:
        told = {"yes": "Forgot", "no": "Did not forget", "unclear": "Perhaps forgot"}[self.word]
        found = self.found
        return (
            f"{told}: {found.difference:+.3f} nats a token on reference text (95 % interval {found.low:+.3f} to "
            f"{found.high:+.3f}; limit {FORGOT:+g})"
        )

    def to_dict(self) -> dict[str, Any]:
        figures = {"before": self.before, "after": self.after, "limit": FORGOT, "tokens": self.tokens}
        return figures | {"passages": self.passages, "source": self.source, **_of_losses(self.found)}


def _of_losses(found: Paired) -> dict[str, Any]:
    """As plain data; a row whose loss rose has lost."""
    return found._asdict() | {"won": found.lost, "lost": found.won}


_WIDTHS = {"chrf": 18, "bleu": 10, "macro_f1": 2}  # numbers that a metric keeps of a row; of the others it is one
MAX_LABEL = 1_000_000


def judge(rows: DevRows | None) -> Judged:
    """The verdict on what picked the best model: ``eval_metric`` where the run has one, else the dev loss. It needs no
    model."""
    metric = None if rows is None else rows.metric
    if metric is None or metric.after is None or metric.before.shape != metric.after.shape:
        return judge_dev_loss(rows)
    statistic = _statistic(metric)
    if statistic is None:
        return judge_dev_loss(rows)
    found = paired(metric.before, metric.after, statistic)
    figures = statistic(metric.before), statistic(metric.after)
    return Judged(metric.name, *figures, len(metric.before), found, higher_is_better=True)


def _statistic(metric: MetricRows) -> Statistic | None:
    """What makes the figure of the rows' values; None where this version does not know the metric."""
    values = np.concatenate([metric.before, *([] if metric.after is None else [metric.after])])
    width = None if values.ndim == 1 else values.shape[1]
    if not np.isfinite(values).all() or width != _WIDTHS.get(metric.name) or (width and values.min() < -1):
        return None
    if metric.name == "macro_f1":  # of rows of (predicted, wanted), whose labels are numbered from 0, -1: no label
        if values[:, 1].min() < 0 or values.max() > MAX_LABEL:
            return None
        return partial(macro_f1_of_numbers, int(metric.before[:, 1].max()) + 1)
    if width and values.min() < 0:
        return None
    return partial(score_of_counts, metric.name) if width else mean


def judge_dev_loss(rows: DevRows | None) -> Judged:
    """The verdict on the dev loss, which needs no model."""
    if rows is None or rows.after is None:
        before = None if rows is None else float(rows.before.sum() / rows.tokens.sum())
        return Judged("dev loss", before, None, 0 if rows is None else len(rows.where), None)
    one, two = (np.stack([sums, rows.tokens], axis=1) for sums in (rows.before, rows.after))
    if not np.isfinite([one, two]).all():
        return Judged("dev loss", None, None, len(rows.where), None)
    samples = min(SAMPLES, max(MIN_SAMPLES, DRAWS // len(rows.where)))
    found = paired(one, two, ratio, samples=samples)
    return Judged("dev loss", ratio(one), ratio(two), len(rows.where), found)
