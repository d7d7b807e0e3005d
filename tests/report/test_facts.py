"""afina/report/facts.py: a run folder read as it is, whole or cut off; what is none is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from afina.engine.run_folder import FORMAT
from afina.errors import RunError
from afina.report.facts import read_run
from afina.report.sections import data, recipe, time_and_memory, training

CONFIG = {"model": "m", "data": "d.jsonl", "output_dir": "out"}


def run_folder(folder: Path, lines: list[Any] = (), **record: Any) -> Path:  # type: ignore[assignment]
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"format": FORMAT, "config": CONFIG, **record}))
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


LINES = [
    {"step": 0, "dev_loss": 3.0, "best": False},
    {"step": 1, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5, "tokens": 10},
    {"step": 2, "loss": None, "lr": 0.1, "grad_norm": None, "seconds": 0.25, "tokens": 20, "skipped": True},
    {"step": 2, "dev_loss": 2.0, "best": True},
]


def test_steps_and_evaluations_are_told_apart(tmp_path: Path) -> None:
    facts = read_run(run_folder(tmp_path, LINES, total_steps=8))
    assert facts.series(facts.steps, "loss") == [(1, 2.5)]
    assert facts.dev_losses == [(0, 3.0), (2, 2.0)]
    assert (facts.best_step, facts.dev_loss(2), facts.last_step) == (2, 2.0, 2)
    assert (facts.seconds, facts.total("tokens")) == (0.75, 30)
    assert facts.state == "not finished: step 2 of 8"


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    facts = read_run(run_folder(tmp_path, LINES, finished={"stopped_early": True}))
    assert facts.state == "finished after 2 steps, early: the dev loss fell no further"


def test_half_a_line_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    run_folder(tmp_path, LINES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": "3", "lr": 1}\n{"step": 3, "lo')
    assert read_run(tmp_path).last_step == 2


def test_a_run_without_metrics_and_its_best_folder(tmp_path: Path) -> None:
    run_folder(tmp_path)
    (tmp_path / "best").mkdir()
    facts = read_run(tmp_path / "best")
    assert (facts.folder, facts.last_step, facts.data, facts.finished) == (tmp_path, 0, {}, {})


@pytest.mark.parametrize("record", ["", "{}", '{"format": "afina-run-1"}', '{"format": "afina-run-1", "config": 5}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, record: str) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(RunError) as found:
        read_run(tmp_path)
    assert str(tmp_path) in str(found.value)
    assert "\n" not in str(found.value)


def test_a_config_of_another_version_is_one_line(tmp_path: Path) -> None:
    run_folder(tmp_path, config={**CONFIG, "no_such_setting": 1})
    with pytest.raises(RunError, match="not one of this version"):
        read_run(tmp_path)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run folder \(no run.json there\): give the --output_dir"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", [None, 5, "x", [], [1, {}], {"versions": 5}, {"versions": {"torch": []}}])
def test_a_record_of_somebody_else(wrong: Any, tmp_path: Path) -> None:
    """Fields of another kind than ours are as good as absent."""
    parts = dict.fromkeys(("started", "resumed", "facts", "data", "finished", "total_steps"), wrong)
    facts = read_run(run_folder(tmp_path, [*LINES, {"step": 3, "loss": 1e300, "lr": 1e300, "seconds": 1e300}], **parts))
    told = time_and_memory(facts) + recipe(facts) + data(facts) + training(facts)
    assert "training" in told
    assert isinstance(facts.versions, dict)


def test_what_was_lowered_on_the_way_is_told(tmp_path: Path) -> None:
    resumed = [{"step": 8, "lowered": {"learning_rate": [0.001, 0.00033]}}, {"step": 9, "lowered": {"a": 1}}]
    told = time_and_memory(read_run(run_folder(tmp_path, LINES, resumed=resumed)))
    assert "at step 8 (learning_rate 0.001 -&gt; 0.00033), at step 9" in told
