"""Advice from end to end on a tiny model: what is measured, within its time, and what is refused."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import saved

from afina.advise import curve, training
from afina.advise.measure import Advice, advise
from afina.advise.parts import Request
from afina.advise.recipe import recipe_text
from afina.advise.training import passes
from afina.advise.verdict import FULL, LORA, PROMPT, ROWS, SIMPLER, VERDICTS
from afina.engine.train import finetune
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("own_cache")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "open", "settings", "page", "card"]


@pytest.fixture(scope="module", autouse=True)
def _short_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "STEPS_WANTED", 40)
        patch.setattr(training, "RANGE_STEPS", (5, 10))
        patch.setattr(curve, "MAX_RATES", 3)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("models") / "tiny"))


def rows_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(count: int, *, shuffled: bool = False) -> list[dict[str, Any]]:
    """Texts whose label is told by one of their words, or by nothing."""
    rng = random.Random(count)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS[:10], k=6)
        rows.append({"text": " ".join([*words, "page" if "fox" in words else "card"]), "label": "no"})
        rows[-1]["label"] = rng.choice(["yes", "no"]) if shuffled else "yes" if "fox" in words else "no"
    return rows


def asked(data: str, model: str, minutes: float = 0.3, **changes: Any) -> Advice:
    """Times are the process's: what else the machine does has no part in them."""
    lines: list[str] = []
    request = Request(data, model, minutes=minutes, reading={"max_length": 96}, clock=time.process_time, **changes)
    advice = advise(request, lines.append)
    assert lines
    assert all("\n" not in line for line in lines)
    return advice


@pytest.fixture(scope="module")
def classified(model: str, tmp_path_factory: pytest.TempPathFactory) -> Advice:
    return asked(rows_of(tmp_path_factory.mktemp("rows"), labelled(80)), model)


def test_what_is_measured(classified: Advice) -> None:
    evidence, decision, recipe = classified.evidence, classified.decision, classified.recipe
    assert evidence.task == "classify"
    assert (evidence.rows, evidence.train_rows, evidence.tune_rows, evidence.judge_rows) == (80, 56, 8, 16)
    assert evidence.scored_rows == 16
    assert [score.name for score in evidence.prompts] == ["zero-shot", "few-shot"]
    assert evidence.simple[0].name == "TF-IDF + logistic regression"
    assert evidence.rows_loss is not None
    assert evidence.reference_loss is not None
    assert {trial.method for trial in evidence.trials} == {"lora", "full"}
    assert [point.rows for point in evidence.curve] == [17, 56]
    ways = ("prompt - trivial", "simple - trivial", "simple - prompt")
    tuned = ("tuned - trivial", "tuned - prompt", "tuned - simple")
    assert evidence.gains.keys() >= {*ways, *tuned, "all - third", "loss", "lora - full"}
    assert evidence.gains["loss"].low > 0
    assert decision.verdict in VERDICTS
    assert recipe is not None
    assert recipe["method"] == evidence.method
    assert evidence.learning_rate == recipe["learning_rate"]
    assert evidence.learning_rate in [t.learning_rate for t in evidence.trials if t.method == evidence.method]
    json.dumps(evidence.to_dict())


def test_the_recipe_is_one_that_training_takes(classified: Advice, tmp_path: Path) -> None:
    text = recipe_text(classified)
    assert text.startswith("# Verdict of afina advise: ")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    config = TrainConfig.resolve(path)
    assert config.to_dict() | {"learning_rate": classified.evidence.learning_rate} == config.to_dict()
    assert set(yaml.safe_load(text)) >= {"model", "data", "output_dir", "method", "epochs"}


def test_labels_that_follow_from_nothing(model: str, tmp_path: Path) -> None:
    rows = labelled(90, shuffled=True)
    advice = asked(rows_of(tmp_path, rows + rows[:3]), model)
    assert advice.evidence.duplicates == 3
    assert advice.decision.verdict == ROWS


def test_texts_without_answers_are_judged_by_their_loss(model: str, tmp_path: Path) -> None:
    rng = random.Random(5)
    texts = [{"text": "open the " + " ".join(rng.choices(WORDS[:3], k=12))} for _ in range(100)]
    advice = asked(rows_of(tmp_path, texts), model)
    assert advice.evidence.metric == "loss"
    assert advice.evidence.prompts == advice.evidence.simple == ()
    assert advice.decision.verdict in (LORA, FULL)


def test_what_is_clear_without_training_trains_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Training, "measure", None)
    few = asked(rows_of(tmp_path, labelled(12)), model)
    assert few.decision.verdict == ROWS
    assert few.recipe is None
    sure = asked(rows_of(tmp_path, labelled(600)), model, 1)
    assert sure.decision.verdict in (SIMPLER, PROMPT)
    assert sure.recipe is None
    with pytest.raises(ConfigError, match="no recipe"):
        recipe_text(sure)


def test_the_time_is_kept(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that would go on for ever end within a tenth of the time asked for, and use most of it."""
    monkeypatch.setattr(training, "EPOCHS", (1e6, 1e6))
    data = rows_of(tmp_path, labelled(80))
    data = rows_of(tmp_path, labelled(80))
    seconds = 7.0
    try:
        advice = asked(data, model, seconds / 60)
    except ConfigError:  # "too short": this machine is slow
        seconds = 30.0
        advice = asked(data, model, seconds / 60)
    assert 0.5 * seconds < advice.evidence.seconds < 1.1 * seconds
    assert advice.evidence.curve[-1].rows == 56
    assert advice.evidence.curve[-1].steps > 20


def test_too_little_time_says_how_much_is_needed(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--minutes 0\.001 is too short: .*; give at least \d+"):
        asked(rows_of(tmp_path, labelled(80)), model, 0.001)


def test_unknown_and_unfit_tasks(model: str, tmp_path: Path) -> None:
    data = rows_of(tmp_path, labelled(80))
    with pytest.raises(ConfigError, match=r"task is 'clasify'.*did you mean 'classify'"):
        asked(data, model, task="clasify")
    with pytest.raises(DataError, match=r"line .*candidates"):
        asked(data, model, task="retrieve")
    texts = rows_of(tmp_path, [{"text": f"open page {n}"} for n in range(40)])
    with pytest.raises(DataError, match=r"rows\.jsonl: line \d+: has no answer in words to score; use --task loss"):
        asked(texts, model, task="generate")


def test_an_adapter_is_refused_before_anything_is_measured(model: str, tmp_path: Path) -> None:
    data = rows_of(tmp_path, labelled(30))
    finetune(model=model, data=data, output_dir=str(tmp_path / "run"), method="lora", max_steps=1, quiet=True)
    with pytest.raises(ConfigError, match="is an adapter of"):
        asked(data, str(tmp_path / "run"))


def test_passes() -> None:
    assert passes(16, 8) == 10  # no more than ten
    assert passes(80, 8) == 4  # 40 steps
    assert passes(100_000, 8) == 2  # no fewer than two
