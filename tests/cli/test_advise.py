"""The verb: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml
from tiny_model import saved

from afina.advise import training
from afina.cli.main import run

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advise")
    saved(folder / "tiny")
    rng = random.Random(3)
    words = ["the", "quick", "fox", "over", "lazy", "dog", "open", "page"]
    rows = [{"prompt": " ".join(rng.choices(words, k=3)) + "\n", "completion": " ".join(rng.choices(words, k=3))}
            for _ in range(60)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_advice_is_printed_and_its_recipe_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STEPS_WANTED", 40)
    monkeypatch.setattr(training, "RANGE_STEPS", (5, 10))
    recipe = folder / "recipe.yaml"
    argv = [
        "advise",
        str(folder / "rows.jsonl"),
        "--model",
        str(folder / "tiny"),
        "--minutes",
        "2",
        "--max_length",
        "64",
    ]
    assert run([*argv, "--recipe", str(recipe), "--json"]) == 0
    out, progress = capsys.readouterr()
    verdict, *_, last = out.splitlines()
    told = json.loads(last)
    assert verdict == f"verdict: {told['verdict']}"
    assert set(told) >= {"verdict", "evidence", "recipe"}
    assert f"- {told['reasons'][0]}" in out
    assert any(line.startswith("training on 42 rows") and "to" in line for line in out.splitlines())
    assert "zero-shot" in progress
    assert "range test" in progress
    assert yaml.safe_load(recipe.read_text()) == told["recipe"]
    assert told["recipe"]["max_length"] == 64


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["rows.jsonl"], "--model is missing"),
        (["rows.jsonl", "--model", "tiny", "--minutes", "soon"], "--minutes is 'soon'; expected a number above 0"),
        (["rows.jsonl", "--model", "tiny", "--minutes", "0"], "--minutes is '0'; expected a number above 0"),
        (["rows.jsonl", "--model", "tiny", "--recipe", "no/such/folder.yaml"], "no/such is no folder"),
        (["absent.jsonl", "--model", "tiny"], "absent.jsonl: no such file"),
        (["empty.jsonl", "--model", "tiny"], "empty.jsonl: no usable row"),
        (["one.jsonl", "--model", "tiny"], "only one usable row"),
    ],
)
def test_refused(
    argv: list[str], line: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").write_text("")
    (folder / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = sorted(folder.iterdir())
    assert run(["advise", *argv]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("afina: error: ")
    assert line in told
    assert sorted(folder.iterdir()) == before
