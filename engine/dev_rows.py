"""What training measures of each dev row, before its first step and of the best model: ``dev_rows.json`` of a run.

The evaluations of a run compute the loss of every dev row anyway. Kept row by row, they say how sure the run's gain is
(a paired interval over rows, ``engine/intervals.py``) and which rows won or lost, and no model need be loaded again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from afina.durable import read_json, standing, write_text
from afina.errors import RunError

DEV_ROWS = "dev_rows.json"


@dataclass(frozen=True)
class MetricRows:
    """``eval_metric`` on some of the dev rows: what it is made of, a row each, (rows,) or (rows, k), before the first
    step and of the best model; that is None before the first evaluation after a step."""

    name: str
    before: NDArray[np.float64]
    after: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class DevRows:
    """The dev rows of a run, in the order of its dev set.

    ``where``: file and line of each; ``tokens`` (rows,) int64: its loss tokens; ``before`` and ``after`` (rows,) fp64:
    the sum of their losses in nats, before the first step and of the best model; that is None before the first
    evaluation after a step. ``step``: of the best model. ``metric``: where the run has an ``eval_metric``.
    """

    where: list[str]
    tokens: NDArray[np.int64]
    before: NDArray[np.float64]
    after: NDArray[np.float64] | None = None
    step: int | None = None
    metric: MetricRows | None = None

    def best(self, step: int, sums: NDArray[np.float64], metric: NDArray[np.float64] | None) -> DevRows:
        """The same with what the best model, that of ``step``, has."""
        kept = None if self.metric is None else replace(self.metric, after=metric)
        return replace(self, after=sums, step=step, metric=kept)

    def write(self, folder: Path) -> None:
        """Write ``dev_rows.json``, whole or not at all. A row is {"where", "tokens", "loss_before", "loss"}."""
        after = [None] * len(self.where) if self.after is None else self.after.tolist()
        rows = [
            {"where": where, "tokens": tokens, "loss_before": before, "loss": loss}
            for where, tokens, before, loss in zip(
                self.where, self.tokens.tolist(), self.before.tolist(), after, strict=True
            )
        ]
        metric = None
        if self.metric is not None:
            metric = {"name": self.metric.name, "before": self.metric.before.tolist()}
            metric["after"] = None if self.metric.after is None else self.metric.after.tolist()
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        head = f'"step": {json.dumps(self.step)}, "metric": {json.dumps(metric)}'
        write_text(folder / DEV_ROWS, f'{{{head}, "rows": [\n{lines}\n]}}\n')


def read_dev_rows(folder: Path) -> DevRows | None:
    """The dev rows of a run folder; None where it has none, being of a version that wrote none. Raises RunError."""
    path = standing(folder / DEV_ROWS)
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        rows, step = content["rows"], content["step"]
        where = [str(row["where"]) for row in rows]
        tokens = np.array([row["tokens"] for row in rows], np.int64)
        before = np.array([row["loss_before"] for row in rows], np.float64)
        after = None if step is None else np.array([row["loss"] for row in rows], np.float64)
        metric = None
        if (kept := content["metric"]) is not None:
            last = None if kept["after"] is None else np.array(kept["after"], np.float64)
            metric = MetricRows(str(kept["name"]), np.array(kept["before"], np.float64), last)
        if not rows or (tokens < 1).any() or type(step) not in (int, type(None)):
            raise ValueError("no rows, or rows without a loss token")
        if {a.shape for a in (before, tokens if after is None else after)} != {tokens.shape} or tokens.ndim != 1:
            raise ValueError("a row with several losses")
        if metric is not None and (not 1 <= metric.before.ndim <= 2 or not metric.before.size):
            raise ValueError("the metric's values are no rows")
        if metric is not None and metric.after is not None and metric.after.shape != metric.before.shape:
            raise ValueError("the metric of other rows after training than before")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{path} is damaged: expected rows of where, tokens, loss_before and loss") from error
    return DevRows(where, tokens, before, after, step, metric)
