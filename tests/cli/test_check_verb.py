"""`afina check` as a user runs it: what it prints, its JSON and exit status, the cleaned copy, wrong requests."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import saved

from afina.cli.main import run

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("models") / "tiny"))


def write(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


CLEAN = [pair(f"where is the {thing}", f" the {thing} is here") for thing in ("fox", "dog", "card", "café", "page")]


def check(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = run(["check", *argv])
    return status, *capsys.readouterr()


def test_clean_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    path = write(tmp_path / "rows.jsonl", *CLEAN)
    status, out, err = check(capsys, path, "--model", model)
    assert (status, err) == (0, "")
    first, *_ = out.splitlines()
    assert first == f"{path}: 5 rows of prompt/completion, 5 usable (4 train, 1 dev)"
    assert "no problem found" in out
    assert "\n  where is the fox\u27e6 the fox is here<|endoftext|>\u27e7\n" in out
    assert "\x1b" not in out
    status, out, _ = check(capsys, path)
    assert status == 0
    assert "--model M counts tokens" in out
    assert "\n  where is the fox\u27e6 the fox is here\u27e7\n" in out


def test_each_problem_is_told_with_its_lines_and_how_to_mend_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    path = write(tmp_path / "rows.jsonl", *CLEAN, "{bad", CLEAN[1], pair("where is the  Fox", CLEAN[0]["completion"]))
    status, out, _ = check(capsys, path, "--json", "--model", model)
    assert status == 1
    result = json.loads(out.splitlines()[-1])
    assert result["ok"] is False
    assert (result["rows"], result["usable"]) == (8, 6)
    assert [(p["name"], p["severity"], p["count"], p["lines"]) for p in result["problems"]] == [
        ("unreadable_rows", "error", 1, [6]),
        ("near_duplicates", "warning", 1, [8]),
        ("duplicates", "note", 1, [7]),
    ]
    assert re.search(r"^error   unreadable_rows \(1\): .*\n        lines 6\n", out, re.MULTILINE)
    assert re.search(
        r"^note    duplicates \(1\): .*\n        lines 7\n        line 7 repeats line 2\n", out, re.MULTILINE
    )
    assert out.count("mend: ") == 3


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warned = write(tmp_path / "warned.jsonl", *CLEAN, pair("lost\ufffd", "letter"))
    assert check(capsys, warned)[0] == 0
    assert check(capsys, warned, "--strict")[0] == 1
    noted = write(tmp_path / "noted.jsonl", *CLEAN, CLEAN[0])
    assert check(capsys, noted, "--strict")[0] == 0
    bad = write(tmp_path / "bad.jsonl", *CLEAN, "bad")
    assert check(capsys, bad)[0] == 1
    assert check(capsys, bad, "--skip_bad_lines")[0] == 0
    assert check(capsys, bad, "--skip_bad_lines", "--strict")[0] == 1


def test_the_settings_of_training_reach_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    path = write(tmp_path / "rows.jsonl", *({"q": row["prompt"], "a": row["completion"]} for row in CLEAN))
    columns = ("--columns", "prompt=q,completion=a")
    status, out, _ = check(
        capsys, path, *columns, "--model", model, "--max-length", "8", "--on_long", "error", "--json"
    )
    assert status == 1
    assert json.loads(out.splitlines()[-1])["problems"][-1]["name"] == "too_long"
    status, out, _ = check(capsys, path, *columns, "--model", model, "--train_on_prompt", "--val_size", "0.5")
    assert "(3 train, 2 dev)" in out or "(2 train, 3 dev)" in out
    assert "\u27e6where is the fox the fox is here<|endoftext|>\u27e7" in out
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    talks = [{"messages": [{**turn, "content": f"{turn['content']} {i}"} for turn in turns]} for i in range(4)]
    talk = write(tmp_path / "talk.jsonl", *talks)
    out = check(capsys, talk, "--model", model, "--roles_to_train", "user,assistant")[1]
    assert "\u27e6one 0" in out


def test_the_cleaned_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", *CLEAN, "bad", CLEAN[0])
    out_file = str(tmp_path / "out.jsonl")
    status, out, _ = check(capsys, path, "--fix", out_file, "--json")
    assert status == 1  # it speaks of the file that was checked
    fix = json.loads(out.splitlines()[-1])["fix"]
    assert fix == {
        "output": out_file,
        "rows": 5,
        "changes": {"duplicates": {"count": 1, "lines": [7]}, "unreadable_rows": {"count": 1, "lines": [6]}},
    }
    assert "dropped 1 for duplicates: lines 7" in out
    assert [json.loads(line) for line in Path(out_file).read_text(encoding="utf-8").splitlines()] == CLEAN
    status, out, _ = check(capsys, out_file, "--fix", str(tmp_path / "again.jsonl"))
    assert (status, "nothing had to be changed" in out) == (0, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["none.jsonl"], "no such file"),
        (["rows.txt2"], "no such file"),
        (["empty.jsonl"], "no usable row"),
        (["keys.jsonl"], "no usable row"),
        (["rows.jsonl", "--fix", "rows.jsonl", "--overwrite"], "never changed"),
        (["rows.jsonl", "--fix", "keys.jsonl"], "exists already"),
        (["rows.jsonl", "--fix", "out.csv"], "ends in .jsonl"),
        (["rows.jsonl", "--val_file", "none.jsonl"], "no such file"),
        (["rows.jsonl", "--similarity", "2"], "--similarity"),
        (["rows.jsonl", "--max_length", "0"], "--max_length"),
        (["rows.jsonl", "--on_long", "cut"], "--on_long"),
        (["rows.jsonl", "--model", "none/at-all/x"], "none/at-all/x"),
        (["rows.jsonl", "--columns", "frage=x"], "no key of a schema"),
        (["rows.jsonl", "--fixx", "a"], "did you mean '--fix'"),
        ([], "required"),
    ],
)
def test_wrong_requests(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", *CLEAN)
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "keys.jsonl", {"a": 1})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    status, out, err = check(capsys, *flags)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("afina: error: ")
    assert words in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_colour_only_on_a_terminal_and_nothing_that_it_would_obey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "\x1b[2J\u202eabc\u200b"
    rows = [pair(f"x{evil}", f"red{evil}\nmore"), *CLEAN, {**pair("y" * 2000, "z"), evil: 1}]
    path = write(tmp_path / "rows.jsonl", *rows)
    out = check(capsys, path)[1]
    assert not re.search("[\x00-\x09\x0b-\x1f\u200b\u202e]", out)
    assert "\\u202e" in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    coloured = check(capsys, path)[1]
    assert "\x1b[32mred[2J\\u202eabc\\u200b\x1b[0m\n  \x1b[32mmore\x1b[0m" in coloured
    assert set(re.findall("\x1b\\[[^m]*m", coloured)) <= {f"\x1b[{n}m" for n in (0, 2, 31, 32, 33, 36)}
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in check(capsys, path)[1]


def test_long_rows_are_shown_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", pair("y" * 2000, "z" * 900), *CLEAN)
    out = check(capsys, path)[1]
    assert "\u2026 (1,600 characters) \u2026" in out
    assert "\u2026 (500 characters) \u2026" in out
    turns = [{"role": role, "content": str(n)} for n in range(30) for role in ("user", "assistant")]
    talk = write(tmp_path / "talk.jsonl", {"messages": turns}, {"messages": turns[:2]})
    out = check(capsys, talk)[1]
    assert "\u2026" in out
    assert len(out) < 2000
