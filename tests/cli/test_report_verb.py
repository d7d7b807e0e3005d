"""afina report, and the report of afina train, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_checks import check_page
from tiny_model import saved

from afina.cli.main import run

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run folder, the JSON that training printed, and all that it printed."""
    folder = tmp_path_factory.mktemp("run")
    saved(folder / "model")
    lines = [{"prompt": f"one two {i}", "completion": f" three {i}"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--threads", "1"]
    argv += ["--output_dir", str(folder / "run"), "--max_steps", "6", "--learning_rate", "1e-3", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **options: printed.append(" ".join(map(str, parts))))
        assert run(argv) == 0
    return folder / "run", json.loads(printed[-1]), "\n".join(printed)


def test_training_says_the_verdict(trained: tuple[Path, dict[str, Any], str]) -> None:
    folder, result, printed = trained
    assert result["report"] == str(folder / "report.html")
    assert result["verdict"] in ("better", "worse", "no difference")
    assert f"\n{result['verdict_line']}\nreport: {folder}/report.html\n" in printed
    check_page((folder / "report.html").read_text())


def test_the_verb(trained: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, result, _ = trained
    assert run(["report", str(folder), "--minutes", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"report", "verdict", "line", "dev", "forgot", "forgetting", "missing"} <= found.keys()
    assert (found["report"], found["verdict"]) == (str(folder / "report.html"), result["verdict"])
    assert found["dev"]["after"] == pytest.approx(result["dev_loss"])
    assert found["forgot"] is None
    assert run(["report", str(folder), "--minutes", "0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == found["line"]
    assert any(line.startswith("left out, forgetting: ") for line in out)
    assert out[-1] == str(folder / "report.html")


def test_own_reference_text(
    trained: tuple[Path, dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(f"the quick brown fox {word}" for word in ("one", "two", "three", "four", "five")))
    assert run(["report", str(trained[0]), "--reference", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["forgetting"]["source"] == str(text)
    assert found["forgetting"]["passages"] == 5
    assert found["forgot"] in ("yes", "no", "unclear")
    assert found["missing"] == {}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--minutes", "-1"], "--minutes is '-1'; expected a number from 0 on"),
        (["--minutes", "nan"], "--minutes is 'nan'; expected a number"),
        (["--reference", "nowhere.txt"], "nowhere.txt: the reference text cannot be read"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--minuets", "1"], "--minuets is not an option of afina report (did you mean '--minutes'?)"),
    ],
)
def test_wrong_requests(
    trained: tuple[Path, dict[str, Any], str], flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = trained[0] / "report.html"
    before = page.read_bytes()
    assert run(["report", str(trained[0]), *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err
    assert page.read_bytes() == before


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) == 2
    assert "is no run folder (no run.json there): give the --output_dir of afina train" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
