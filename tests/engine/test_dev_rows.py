"""engine/dev_rows.py: what is written is read again, before and after a best model; damaged files are one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from afina.engine.dev_rows import DEV_ROWS, DevRows, MetricRows, read_dev_rows
from afina.errors import RunError

ROWS = DevRows(["a.jsonl: line 1", "é: line 2"], np.array([3, 4]), np.array([6.5, 1 / 3]))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    ROWS.write(tmp_path)
    found = read_dev_rows(tmp_path)
    assert found is not None
    assert (found.where, found.tokens.tolist(), found.before.tolist()) == (ROWS.where, [3, 4], [6.5, 1 / 3])
    assert (found.after, found.step, found.metric) == (None, None, None)
    assert json.loads((tmp_path / DEV_ROWS).read_text())["rows"][0] == {
        "where": "a.jsonl: line 1", "tokens": 3, "loss_before": 6.5, "loss": None
    }  # fmt: skip


def test_the_best_model_keeps_what_was_before(tmp_path: Path) -> None:
    metric = MetricRows("accuracy", np.array([0.0, 1.0]))
    rows = DevRows(ROWS.where, ROWS.tokens, ROWS.before, metric=metric)
    rows.best(20, np.array([1.0, 2.0]), np.array([1.0, 1.0])).write(tmp_path)
    found = read_dev_rows(tmp_path)
    assert found is not None
    assert (found.step, found.before.tolist()) == (20, [6.5, 1 / 3])
    assert found.after is not None
    assert found.after.tolist() == [1.0, 2.0]
    assert found.metric is not None
    assert found.metric.after is not None
    assert (found.metric.name, found.metric.before.tolist(), found.metric.after.tolist()) == (
        "accuracy", [0.0, 1.0], [1.0, 1.0]
    )  # fmt: skip


def test_a_folder_without_has_none(tmp_path: Path) -> None:
    assert read_dev_rows(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"step": null, "metric": null, "rows": []}',
        '{"step": 1, "metric": null, "rows": [{"where": "x", "tokens": 0, "loss_before": 1.0, "loss": 1.0}]}',
        '{"step": "1", "metric": null, "rows": [{"where": "x", "tokens": 1, "loss_before": 1.0, "loss": 1.0}]}',
        '{"step": 1, "metric": 5, "rows": [{"where": "x", "tokens": 1, "loss_before": 1.0, "loss": 1.0}]}',
        '{"step": 1, "metric": null, "rows": [{"where": "x", "tokens": 1, "loss_before": "?", "loss": 1.0}]}',
        '{"step": 1, "metric": null, "rows": [{"where": "x", "tokens": 1, "loss_before": 1.0, "loss": [1.0]}]}',
        '{"step": 1, "metric": {"name": "x", "before": [1.0], "after": [1.0, 2.0]}, '
        '"rows": [{"where": "x", "tokens": 1, "loss_before": 1.0, "loss": 1.0}]}',
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / DEV_ROWS).write_text(content)
    with pytest.raises(RunError, match="damaged") as found:
        read_dev_rows(tmp_path)
    assert "\n" not in str(found.value)
