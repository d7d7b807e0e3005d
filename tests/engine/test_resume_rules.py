"""engine/resume_rules.py: which differences a run that goes on may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afina.engine.resume_rules import FREE_ON_RESUME, LOWER_ON_RESUME, lowered, refuse_differences
from afina.engine.train_config import TrainConfig
from afina.errors import RunError

CONFIG: dict[str, Any] = {"learning_rate": 1e-3, "seed": 42, "epochs": 3.0}


def differences(before: Any, config: dict[str, Any], facts: dict[str, Any] | None = None) -> str:
    """What the refusal names, or "" where there is none."""
    record = {"config": before, "facts": {"data_sha256": "a", "parameters": 1}}
    try:
        refuse_differences(Path("out/run.json"), record, config, facts or record["facts"])
    except RunError as error:
        return str(error)
    return ""


def test_they_are_settings() -> None:
    names = TrainConfig.__dataclass_fields__.keys()
    assert names >= FREE_ON_RESUME | LOWER_ON_RESUME


def test_the_rate_may_fall_and_not_rise() -> None:
    assert differences(CONFIG, {**CONFIG, "learning_rate": 3e-4, "epochs": 9}) == ""
    assert lowered(CONFIG, {**CONFIG, "learning_rate": 3e-4, "seed": 1}) == {"learning_rate": [1e-3, 3e-4]}
    assert lowered(CONFIG, CONFIG) == {}
    raised = differences(CONFIG, {**CONFIG, "learning_rate": 2e-3, "epochs": 9, "seed": 1})
    assert "learning_rate: 0.001 -> 0.002 (it may only become lower); seed: 42 -> 1. Put" in raised
    assert "epochs" not in raised


@pytest.mark.parametrize("was", [None, "0.1", True, [1], {}, float("nan")])
def test_what_is_no_rate_cannot_be_lowered(was: Any) -> None:
    """A record of somebody else's."""
    assert "learning_rate: " in differences({**CONFIG, "learning_rate": was}, CONFIG)


def test_contents_must_be_the_same_and_files_may_move() -> None:
    before = {**CONFIG, "data": "here.jsonl"}
    assert differences(before, {**CONFIG, "data": "there.jsonl"}) == ""
    assert "data_sha256: 'a' -> 'b'" in differences(before, before, {"data_sha256": "b", "parameters": 1})


@pytest.mark.parametrize("before", [None, [], "x"])
def test_a_damaged_record(before: Any) -> None:
    assert differences(before, CONFIG).startswith("out/run.json is damaged")
