"""A metric that picks the best model: measured on the same rows, without disturbing training, exact when resumed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import saved

from afina.engine import dev_metric, scores, train
from afina.engine.checkpoint import load_checkpoint
from afina.engine.tasks import run_task
from afina.engine.train import RunResult, check_run, finetune
from afina.engine.train_config import EVAL_METRICS, TrainConfig
from afina.engine.weights import load_model
from afina.errors import ConfigError, DataError
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer

WORDS = ("fox", "dog", "card", "page")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 rows whose answer is the first word of the question."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    chosen = [draw.choice(WORDS) for _ in range(60)]
    texts = [{"text": f"{word} {i}", "label": word} for i, word in enumerate(chosen)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return str(path)


def fit(model: str, rows: str, out: Path, **changes: Any) -> RunResult:
    settings: dict[str, Any] = {"max_length": 64, "max_steps": 8, "batch_size": 8, "learning_rate": 3e-3, "threads": 1}
    settings |= {"val_size": 0.3, "eval_steps": 2, "save_steps": 2} | changes
    flags = {name: settings.pop(name) for name in ("resume",) if name in settings}
    return finetune(quiet=True, **flags, model=model, data=rows, output_dir=str(out), **settings)


def lines(result: RunResult, key: str) -> list[Any]:
    read = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in read if key in line]


def test_the_highest_metric_picks_the_best_model_and_of_equals_the_lower_loss(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls at every step of this run, so it alone would take the last one."""
    given = [0.9, 0.2, 0.5, 0.5, 0.4, 0.1, 0.3]  # what was before the first step is not among the candidates
    figures = iter(given)
    monkeypatch.setattr(dev_metric.DevMetric, "measure", lambda self, model, poll: next(figures))
    result = fit(model, rows, tmp_path / "run", eval_metric="accuracy", eval_steps=1, max_steps=6)
    losses = lines(result, "dev_loss")
    assert losses == sorted(losses, reverse=True)
    assert lines(result, "dev_accuracy") == given
    assert lines(result, "best") == [False, True, True, True, False, False, False]
    assert result.metrics["best_step"] == 3
    assert (result.metrics["dev_metric_before"], result.metrics["dev_metric"]) == (0.9, 0.5)
    assert result.metrics["dev_loss"] == losses[3]


def test_patience_counts_evaluations_without_a_higher_metric(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.1, 0.5, 0.4, 0.4, 0.9])
    monkeypatch.setattr(dev_metric.DevMetric, "measure", lambda self, model, poll: next(figures))
    result = fit(model, rows, tmp_path / "run", eval_metric="accuracy", eval_steps=1, early_stopping_patience=2)
    assert (result.metrics["steps"], result.metrics["best_step"], result.metrics["stopped_early"]) == (3, 1, True)


def test_the_figure_is_that_of_the_saved_model(model: str, rows: str, tmp_path: Path) -> None:
    result = fit(model, rows, tmp_path / "run", eval_metric="accuracy", max_steps=4, learning_rate=0.02)
    assert result.metrics["dev_metric"] > result.metrics["dev_metric_before"]
    dev = prepare(rows, load_tokenizer(model), max_length=64, val_size=0.3, seed=42, progress=False).dev
    examples = [row.example for row in dev.source_rows()]
    best, tokenizer = load_model(str(result.best)), load_tokenizer(str(result.best))
    again = run_task(best, tokenizer, examples, "classify", intervals=False).metrics["accuracy"]
    assert again == pytest.approx(result.metrics["dev_metric"])


def test_training_is_not_disturbed(model: str, rows: str, tmp_path: Path) -> None:
    plain = fit(model, rows, tmp_path / "plain", method="lora", lora_dropout=0.1)
    measured = fit(model, rows, tmp_path / "measured", method="lora", lora_dropout=0.1, eval_metric="exact_match")
    for key in ("loss", "grad_norm", "dev_loss"):
        assert lines(measured, key) == lines(plain, key)
    assert "dev_metric" not in plain.metrics


class Stop:
    """A signal that arrives after so many polls."""

    def __init__(self, polls: int) -> None:
        self.left = polls

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("polls", [4, 12])
def test_stopped_and_resumed_is_the_same_run_bit_for_bit(
    model: str, rows: str, tmp_path: Path, polls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"eval_metric": "rouge_l", "early_stopping_patience": 3}
    straight = fit(model, rows, tmp_path / "straight", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", lambda: Stop(polls))
        with pytest.raises(train.Interrupted):
            fit(model, rows, tmp_path / "run", **options)
    resumed = fit(model, rows, tmp_path / "run", resume=True, **options)
    for key in ("loss", "dev_loss", "dev_rouge_l", "best"):
        assert lines(resumed, key) == lines(straight, key)
    last = straight.metrics["steps"]
    ours, theirs = (
        load_checkpoint(r.output_dir / f"checkpoint-{last}").tensors("weights") for r in (resumed, straight)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    same = ("dev_metric", "dev_metric_before", "dev_loss", "best_step", "stopped_early")
    assert {k: resumed.metrics[k] for k in same} == {k: straight.metrics[k] for k in same}


def test_rows_are_bounded_seeded_and_the_same_each_time(model: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev_metric, "METRIC_ROWS", 7)
    tokenizer = load_tokenizer(model)
    dev = prepare(rows, tokenizer, max_length=64, val_size=0.5, progress=False).dev
    one, same, other = (dev_metric.DevMetric("accuracy", tokenizer, dev, seed=seed) for seed in (1, 1, 2))
    assert len(one.examples) == 7
    assert one.examples == same.examples != other.examples
    assert one.options == sorted(WORDS)  # of all dev rows


def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"one two {i}"}) + "\n" for i in range(9)))
    given: dict[str, Any] = {"model": model, "output_dir": str(tmp_path / "run")}
    with pytest.raises(DataError, match=r"eval_metric rouge_l: .*text\.jsonl: line \d: has no answer"):
        check_run(TrainConfig(**given, data=str(tmp_path / "text.jsonl"), eval_metric="rouge_l"))
    with pytest.raises(DataError, match=r"eval_metric mrr@10: .* has no candidates"):
        check_run(TrainConfig(**given, data=rows, eval_metric="mrr@10"))
    with pytest.raises(ConfigError, match=r"did you mean 'accuracy'"):
        TrainConfig(**given, data=rows, eval_metric="acuracy")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    scores._sacrebleu.cache_clear()
    with pytest.raises(ConfigError, match="sacrebleu, which is not installed"):
        check_run(TrainConfig(**given, data=rows, eval_metric="chrf"))
    assert not (tmp_path / "run").exists()


def test_every_metric_is_one_of_its_task(model: str) -> None:
    from afina.loaders.text.render import Example

    examples = [Example(prompt="one", completion=c, candidates=("a", "b")) for c in "ab"]
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    for name, task in EVAL_METRICS.items():
        found = run_task(loaded, tokenizer, examples, task, intervals=False)
        assert name in found.metrics
        assert found.intervals == {}
