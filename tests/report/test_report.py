"""afina/report/report.py: real runs, whole and adapters, finished and stopped, and what is missing when files moved."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_checks import Page, check_page
from tiny_model import CONFIG, saved, tiny_tokenizer

import afina
from afina.engine.dev_rows import read_dev_rows
from afina.engine.train import RunResult
from afina.errors import DataError, RunError
from afina.manifest import write_manifest
from afina.report import finetune as roof
from afina.report import measure as measuring
from afina.report.budget import Budget, OutOfTime
from afina.report.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
SCRIPT = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "password", "settings", "page", "card", "one")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, rows to learn, and dev rows of which one holds a script."""
    folder = tmp_path_factory.mktemp("report")
    saved(folder / "model")
    draw = random.Random(0)
    rows = [
        {"prompt": f"{n} {draw.choice(WORDS)}", "completion": " " + " ".join(draw.choices(WORDS, k=5))}
        for n in range(60)
    ]
    rows[45]["completion"] = f" one {SCRIPT}"
    for name, part in (("train", rows[:40]), ("dev", rows[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFINA_CACHE", str(folder / "cache"))
        yield folder


def train(place: Path, name: str, **changes: Any) -> RunResult:
    settings: dict[str, Any] = {
        "model": str(place / "model"), "data": str(place / "train.jsonl"), "val_file": str(place / "dev.jsonl"),
        "output_dir": str(place / name), "max_length": 96, "max_steps": 12, "eval_steps": 4, "learning_rate": 3e-3,
        "threads": 1,
    }  # fmt: skip
    return afina.finetune(quiet=True, **settings | changes)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return train(place, "whole").output_dir


@pytest.fixture(scope="module")
def adapter(place: Path) -> Path:
    return train(place, "adapter", method="lora", lora_r=4, learning_rate=1e-2).output_dir


def page_of(folder: Path) -> Page:
    return check_page((folder / "report.html").read_text())


def test_training_ends_with_a_report(whole: Path) -> None:
    """Its verdict is there although there was no time for models."""
    text = page_of(whole).text
    assert re.search(r"(Better|Worse|No difference): dev loss \d", text)
    assert "took" not in text
    record = json.loads((whole / "run.json").read_text())
    assert record["finished"]["steps"] == record["total_steps"] == 12
    assert record["data"]["train_rows"] == 40
    assert record["data"]["train_lengths"]["max"] <= 96


def test_the_result_has_the_verdict(place: Path) -> None:
    metrics = train(place, "again").metrics
    assert metrics["report"] == str(place / "again" / "report.html")
    assert metrics["verdict"] in ("better", "worse", "no difference")
    assert metrics["verdict_line"].lower().startswith(metrics["verdict"])


def test_the_dev_rows_of_a_run(whole: Path) -> None:
    rows = read_dev_rows(whole)
    assert rows is not None
    assert rows.after is not None
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["dev_loss"] for line in lines if "dev_loss" in line}
    assert rows.before.sum() / rows.tokens.sum() == pytest.approx(losses[0])
    assert rows.after.sum() / rows.tokens.sum() == pytest.approx(losses[rows.step])
    assert losses[rows.step] == min(losses[step] for step in losses if step)


@pytest.fixture(scope="module")
def measured(whole: Path) -> Page:
    """The whole report: nothing is left out."""
    assert write_report(whole).found.missing == {}
    return page_of(whole)


def test_a_full_report_has_every_part(measured: Page) -> None:
    assert "Not measured" not in measured.text
    for told in ("nats a token on reference text", "By rouge_l:", "Change relative to the matrix's size", "over 0.1%"):
        assert told in measured.text
    for chart in ("loss", "rate", "gradient", "dev-loss", "changes", "relative", "passages", "answers-metrics"):
        assert f"{chart}-title" in measured.ids


def test_a_script_in_a_row_is_shown_and_not_run(measured: Page) -> None:
    assert SCRIPT in measured.text


def test_the_same_run_gives_the_same_bytes(whole: Path, measured: Page) -> None:
    write_report(whole)
    assert (whole / "report.html").read_text() == measured.source


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium")
def test_in_a_browser(whole: Path, measured: Page, tmp_path: Path) -> None:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--no-first-run", "--enable-logging=stderr", f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{whole}/report.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = Page(done.stdout)
    assert "<title>ran</title>" not in done.stdout
    assert SCRIPT in dom.text
    assert "script" not in [tag for tag, _ in dom.tags]
    assert dom.ids == measured.ids


def test_an_adapter(adapter: Path) -> None:
    report = write_report(adapter)
    assert report.found.missing == {}
    page = page_of(adapter)
    assert {"relative-title", "ranks-title", "spectra-title"} <= set(page.ids)
    weights = report.found.weights
    assert weights is not None
    assert weights.adapter
    assert len(weights.matrices) == 14
    # With the adapter off, the base is what the run began from; with it on, what the run kept.
    rows, forgetting = read_dev_rows(adapter), report.found.forgetting
    assert forgetting is not None
    assert forgetting.before != forgetting.after
    shown = report.found.tokens[0]
    number = rows.where.index(shown.where)  # type: ignore[union-attr]
    for views, sums in ((shown.before, rows.before), (shown.after, rows.after)):  # type: ignore[union-attr]
        assert sum(view.loss or 0.0 for view in views if view.trained) == pytest.approx(sums[number], rel=1e-4)


def moved(run: Path, place: Path, name: str) -> Path:
    """A copy of a run whose model and data are named where they are not any more."""
    copy = place / name
    shutil.copytree(run, copy)
    for file in (copy / "run.json", copy / "best" / "adapter_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace(str(place / "model"), str(place / "gone")))
    if (copy / "best" / "adapter_config.json").exists():
        write_manifest(copy / "best", {})  # as if it had been trained there
    return copy


def test_an_adapter_whose_base_has_moved(adapter: Path, place: Path) -> None:
    report = write_report(moved(adapter, place, "moved-adapter"))
    assert report.judged.word == write_report(adapter, seconds=0).judged.word
    assert report.found.missing.keys() == {"forgetting", "tokens", "answers"}
    assert all("gone" in why for why in report.found.missing.values())
    assert report.found.weights is not None  # what the adapter says itself
    assert report.found.weights.relative is None
    text = page_of(place / "moved-adapter").text
    assert "have no relative change: the base is not there" in text


def test_a_run_whose_data_changed(whole: Path, place: Path) -> None:
    rows = (place / "dev.jsonl").read_text()
    (place / "dev.jsonl").write_text(rows.replace("one", "two"))
    try:
        report = write_report(whole)
    finally:
        (place / "dev.jsonl").write_text(rows)
    assert report.judged.word != "unknown"
    assert report.found.missing.keys() == {"rows", "tokens", "answers"}
    assert all("not those that the run was trained on" in why for why in report.found.missing.values())
    assert report.found.forgetting is not None


def test_a_run_whose_model_changed(whole: Path, place: Path) -> None:
    weights = place / "model" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-2] + bytes([kept[-2] ^ 1]) + kept[-1:])
    try:
        report = write_report(whole)
    finally:
        weights.write_bytes(kept)
    assert {"forgetting", "tokens", "answers"} <= report.found.missing.keys()
    assert "not the model that the run was trained from" in report.found.missing["forgetting"]


def test_a_run_that_was_stopped_before_its_first_best(whole: Path, place: Path) -> None:
    copy = place / "stopped"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("best", "checkpoint-*", "report.html"))
    record = json.loads((copy / "run.json").read_text())
    record.pop("finished")
    (copy / "run.json").write_text(json.dumps(record))
    (copy / "metrics.jsonl").write_text("".join((copy / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]))
    rows = json.loads((copy / "dev_rows.json").read_text())
    rows |= {"step": None, "rows": [row | {"loss": None} for row in rows["rows"]]}
    (copy / "dev_rows.json").write_text(json.dumps(rows))
    report = write_report(copy)
    assert report.judged.word == "unknown"
    assert report.found.missing.keys() == set(measuring.PARTS)
    text = page_of(copy).text
    assert "not finished: step 2 of 12" in text
    assert "without a best model yet" in text


def test_a_run_from_random_weights(place: Path) -> None:
    tiny_tokenizer().save(place / "tokenizer")
    (place / "tokenizer" / "config.json").write_text(json.dumps(CONFIG))
    folder = train(
        place, "random", model=None, init="random", config=str(place / "tokenizer" / "config.json"),
        tokenizer=str(place / "tokenizer"),
    ).output_dir  # fmt: skip
    report = write_report(folder)
    assert report.found.missing == {}
    assert report.found.weights is not None
    assert 0 < (report.found.weights.moved or 0) <= 1


def test_a_budget_leaves_out_what_does_not_fit(whole: Path) -> None:
    report = write_report(whole, seconds=0)
    assert report.judged.word != "unknown"
    assert report.found.missing.keys() == set(measuring.PARTS)
    assert "more than its share of the training's time" in page_of(whole).text
    few = write_report(whole, seconds=1.5)  # what is left is too little for answers
    assert few.found.missing.keys() <= set(measuring.PARTS)
    assert "answers" in few.found.missing


def test_budget() -> None:
    Budget(None).need(1e9)
    Budget(10).poll()
    with pytest.raises(OutOfTime):
        Budget(10).need(11)
    with pytest.raises(OutOfTime):
        Budget(-1).poll()
    assert not Budget(None).limited


def test_a_report_that_fails_loses_no_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("afina.report.report.measure", fails)
    result = train(place, "unlucky")
    assert result.metrics["report"] is None
    assert result.metrics["dev_loss"] > 0
    assert not (place / "unlucky" / "report.html").exists()
    assert roof.with_report(result, quiet=False).metrics["verdict"] is None
    assert capsys.readouterr().err == f"no report (planted); write it with afina report {place / 'unlucky'}\n"


def test_wrong_requests(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        write_report(tmp_path)
    before = (whole / "report.html").read_bytes()
    with pytest.raises(DataError, match="reference text cannot be read"):
        write_report(whole, reference=tmp_path / "absent.txt")
    assert (whole / "report.html").read_bytes() == before


def test_resuming_goes_on_with_the_rows_before(place: Path) -> None:
    straight = train(place, "straight", max_steps=8)
    train(place, "parts", max_steps=4, lr_scheduler_type="constant", warmup_steps=0)
    one = read_dev_rows(place / "parts")
    resumed = train(place, "parts", max_steps=8, lr_scheduler_type="constant", warmup_steps=0, resume=True)
    two, other = read_dev_rows(resumed.output_dir), read_dev_rows(straight.output_dir)
    assert one is not None
    assert two is not None
    assert other is not None
    assert one.before.tolist() == two.before.tolist() == other.before.tolist()
    assert two.step == resumed.metrics["best_step"] == 8
    record = json.loads((place / "parts" / "run.json").read_text())
    assert (record["finished"]["steps"], record["total_steps"], len(record["resumed"])) == (8, 8, 1)
