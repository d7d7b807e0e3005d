"""The cleaned copy: what it drops and mends, that nothing else changes, and that nothing is left to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afina.errors import ConfigError, DataError
from afina.loaders.data import check_fix
from afina.loaders.data.check import check_data
from afina.loaders.data.check_fix import fix_data, json_line, mend_row
from afina.loaders.data.files import SpelledFloat, clean_text
from afina.loaders.data.rows import read_rows

pytestmark = pytest.mark.usefixtures("own_cache")
FIXED = {"unreadable_rows", "empty_rows", "duplicates", "near_duplicates", "mojibake", "control_characters"}
FIXED |= {"dev_rows_in_train", "near_dev_rows_in_train"}


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def test_what_is_dropped_and_what_is_mended(tmp_path: Path) -> None:
    kept = row("Where is the station?", "Behind the old church.", id=7, price=1.5, tags=["a"])
    path = write(
        tmp_path / "rows.jsonl",
        kept,
        "{broken",
        row("Where is the station?", "Behind the old church.", id=8),
        row("where is the  Station", "behind the old church."),
        row("nothing", " "),
        row("Wo ist es schÃ¶n?", "Ãœberall.", note="schÃ¶n"),
        row("A bell\x07?", "No\x00ne."),
    )
    before = path.read_bytes()
    fixed = fix_data(path, tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [
        kept,
        row("Wo ist es schön?", "Überall.", note="schÃ¶n"),  # what training does not read stays as it is
        row("A bell?", "None."),
    ]
    assert fixed.rows == 3
    assert fixed.changes == {
        "unreadable_rows": [2],
        "duplicates": [3],
        "near_duplicates": [4],
        "empty_rows": [5],
        "mojibake": [6],
        "control_characters": [7],
    }
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_rows_that_are_equal_once_they_are_mended(tmp_path: Path) -> None:
    """And their lines are those of the file that was given."""
    path = write(
        tmp_path / "rows.jsonl", "bad", row("schÃ¶n?", "ja, schÃ¶n"), row("schön?", "ja, schön"), row("\x01", "\x01")
    )
    fixed = fix_data(path, tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [row("schön?", "ja, schön")]
    assert fixed.changes == {"unreadable_rows": [1], "mojibake": [2], "duplicates": [3], "empty_rows": [4]}


def test_rows_of_the_dev_file(tmp_path: Path) -> None:
    rows = [
        row(f"What is the name of the {thing}?", f"The {thing} has none.") for thing in ("river", "mountain", "lake")
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    dev = write(tmp_path / "dev.jsonl", rows[1], row("What is the name of the lake", "The lake has none."))
    fixed = fix_data(path, tmp_path / "out.jsonl", val_file=dev)
    assert read(tmp_path / "out.jsonl") == rows[:1]
    assert fixed.changes == {"dev_rows_in_train": [2], "near_dev_rows_in_train": [3]}
    with pytest.raises(DataError, match="no row would be left"):
        fix_data(dev, tmp_path / "none.jsonl", val_file=path)
    assert not (tmp_path / "none.jsonl").exists()


def test_what_nobody_can_decide_stays(tmp_path: Path) -> None:
    rows = [row("Is it?", "yes"), row("Is it?", "no"), row("lost\ufffd", "letter"), row("«cafÃ©»\x80", "stuck")]
    fixed = fix_data(write(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == rows
    assert fixed.changes == {}


@pytest.mark.parametrize("kind", ["csv", "json", "columns", "messages"])
def test_other_kinds_of_files_keep_their_keys(tmp_path: Path, kind: str) -> None:
    path, settings, expected = tmp_path / f"rows.{kind}", {}, [row("a", "b"), row("c", "d")]
    if kind == "csv":
        path.write_text("prompt,completion\na,b\na,b\nc,d\n")
    elif kind == "json":
        path.write_text(json.dumps([row("a", "b"), row("a", "b"), row("c", "d")]))
    elif kind == "columns":
        expected = [{"Frage": "a", "Antwort": "schön"}]
        path = write(tmp_path / "rows.jsonl", {"Frage": "a", "Antwort": "schÃ¶n"})
        settings = {"columns": {"prompt": "Frage", "completion": "Antwort"}}
    else:
        turn = {"role": "assistant", "content": "dÃ©jÃ\xa0 vu"}
        expected = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "déjà vu"}]}]
        path = write(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "x"}, turn]})
    fix_data(path, tmp_path / "out.jsonl", **settings)
    assert read(tmp_path / "out.jsonl") == expected


def test_numbers_keep_their_spelling() -> None:
    number = SpelledFloat(19.9)
    number.spelling = "19.90"
    line = json_line({"a": number, "b": [number, 2, float("nan")], "c": "19.90"})
    assert line == '{"a": 19.90, "b": [19.90, 2, null], "c": "19.90"}'


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows.jsonl", "never changed"),
        ("dev.jsonl", "never changed"),
        ("out.csv", "ends in .jsonl"),
        ("out.jsonl.gz", "ends in .jsonl"),
        ("none/out.jsonl", "no folder"),
        ("there.jsonl", "exists already"),
        ("folder.jsonl", "is a folder"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_places_it_must_not_go(tmp_path: Path, name: str, words: str, overwrite: bool) -> None:
    for file in ("rows.jsonl", "dev.jsonl", "there.jsonl"):
        write(tmp_path / file, row(file, "b"))
    (tmp_path / "folder.jsonl").mkdir()
    if name == "there.jsonl" and overwrite:
        fix_data(tmp_path / "rows.jsonl", tmp_path / name, overwrite=True)
        assert read(tmp_path / name) == [row("rows.jsonl", "b")]
        return
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl") if path.is_file()}
    with pytest.raises(ConfigError, match=words):
        fix_data(tmp_path / "rows.jsonl", tmp_path / name, val_file=tmp_path / "dev.jsonl", overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl") if path.is_file()} == before


def test_more_places(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", row("a", "b"))
    with pytest.raises(ConfigError, match="would be read with it"):
        fix_data(folder, folder / "out.jsonl")
    (tmp_path / "book.txt").write_text("a text")
    with pytest.raises(ConfigError, match="plain text"):
        fix_data(tmp_path / "book.txt", tmp_path / "out.jsonl")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", row("a", "b"))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check_fix, "mend_row", fail)
    with pytest.raises(DataError, match="No space left"):
        fix_data(path, tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


CLEAN = ["the", "cat", "Café", "naïve", "ñ", "café", "19.90", "3", "5", "a-b", "“q”", "déjà", "Привет", "日本", "?"]
WORDS = st.sampled_from([*CLEAN, "\t", "Ã©", "â€™", "Ã©tÃ©", "\ufffd", "\x07", "\u200b"])
TEXTS = st.lists(WORDS, max_size=9).map(" ".join)
ROWS = st.lists(st.builds(row, TEXTS, TEXTS, n=st.sampled_from([1, 1.5, None, True, "x"])), min_size=1, max_size=12)


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_no_row_is_invented_or_altered_and_nothing_is_left_to_do(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
    try:
        list(read_rows(path, skip_bad_lines=True))
    except DataError:
        return  # nothing but empty rows
    try:
        fixed = fix_data(path, out, overwrite=True)
    except DataError:  # no row would be left
        assert not any(clean_text(mend_row(one, set())[0]["completion"]) for one in rows)
        return
    written = read(out)
    assert fixed.rows == len(written)
    mended = [mend_row(one, set()) for one in rows]
    at = 0
    for one in written:  # in their order, each a row of the file: as it was, where it was clean
        at = next(i for i in range(at, len(rows)) if mended[i][0] == one) + 1
        assert mended[at - 1][1] or one == rows[at - 1]
    dropped = len(rows) - len(written)
    reasons = {
        name: len(lines) for name, lines in fixed.changes.items() if name not in ("mojibake", "control_characters")
    }
    assert sum(reasons.values()) == dropped
    left = {problem.name for problem in check_data(out).problems} & FIXED
    assert left <= {"mojibake"}  # which cannot all be read back
    again = fix_data(out, tmp_path / "again.jsonl", overwrite=True)
    assert (again.changes, read(tmp_path / "again.jsonl")) == ({}, written)
