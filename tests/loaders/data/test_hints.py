"""Hints: what a file or a line that is no row probably is, and what bad lines are counted under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from afina.errors import DataError, nearest
from afina.loaders.data.hints import BadLines, bad_kind, by_kind, json_kind, preference_hint, rated_hint
from afina.loaders.data.rows import read_rows

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]


def by_columns(orient: str) -> Any:
    """What pandas' to_json(orient=...) writes for ROWS."""
    return {
        "columns": {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]},
        "index": {str(i): row for i, row in enumerate(ROWS)},
        "split": {"columns": list(ROWS[0]), "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]},
        "list": {key: [row[key] for row in ROWS] for key in ROWS[0]},
        "table": {"schema": {"fields": []}, "data": ROWS},
    }[orient]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("orient", ["columns", "index", "split", "list", "table"])
def test_tables_of_pandas_are_named(tmp_path: Path, orient: str, indent: int | None, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(by_columns(orient), indent=indent))
    with pytest.raises(DataError) as refused:
        list(read_rows(path))
    assert str(refused.value).startswith(f"{path}: is a table ")
    assert str(refused.value).endswith('write rows instead, df.to_json(path, orient="records", lines=True)')


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", ["data", "train", "rows", "examples"])
def test_rows_inside_an_object_are_named(tmp_path: Path, key: str, indent: int | None) -> None:
    path = tmp_path / "a.json"
    for value in ({key: ROWS}, {"version": "1.1", key: ROWS}):
        path.write_text(json.dumps(value, indent=indent))
        with pytest.raises(DataError) as refused:
            list(read_rows(path))
        words = f"is an object that holds its rows under {key!r}: write them alone, jq -c '.{key}[]' FILE > rows.jsonl"
        assert str(refused.value) == f"{path}: {words}"


@pytest.mark.parametrize(
    "row",
    [
        {"0": {"a": 1}, "prompt": "q", "completion": "a"},
        {"data": [{"a": 1}], "prompt": "q", "completion": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"columns": ["a"], "text": "t"},
    ],
)
def test_a_row_is_a_row_whatever_it_looks_like(tmp_path: Path, row: dict[str, Any]) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        assert len(list(read_rows(tmp_path / name))) == 1


def test_a_large_table_is_named_though_it_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": {str(i): "word " * 1000 for i in range(4000)}}))
    assert path.stat().st_size > 16 << 20
    with pytest.raises(DataError, match="is a table by columns"):
        list(read_rows(path))


def test_what_is_no_object_or_unknown_has_no_hint() -> None:
    starts = ["", "[", '{"messages": []}', '{"prompt": "q"}', "{'a': 1}", '{"a": {"rows": [{"prompt": "q"}]}}']
    assert [json_kind(start) for start in starts] == [""] * 6


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("message 2 (assistant): content is missing or null: expected a text", "content is missing or null"),
        ("message 1: role 'User' (did you mean 'user'?): expected system, user", "role ..."),
        ("not valid JSON: Extra data (column 34)", "not valid JSON: Extra data"),
        ("byte 11 of the line (byte 26 of the file) is not UTF-8", "byte N of the line is not UTF-8"),
        ("3 fields where the header has 2", "N fields where the header has N"),
        ("holds ['text'] where an object {...} was expected", "no object {...}"),
        ("key 'a' is given twice in one object", "key ... is given twice in one object"),
        ("'NaN' is not a finite number, and JSON has no other", "is not a finite number"),
        ("found the keys 'a', 'b', 'a' (did you mean 'c'?); expected one of", "found the keys ..."),
        ("longer than 16 MiB", "longer than N MiB"),
        ("[", "..."),
        ("", "unreadable"),
    ],
)
def test_bad_lines_are_counted_by_what_they_have_in_common(reason: str, kind: str) -> None:
    assert bad_kind(reason) == kind


def test_bad_lines_in_one_message() -> None:
    bad = BadLines()
    bad.add(3, "content is null", "content is null")
    assert bad.message() == "line 3: content is null: mend the file, or leave them out with skip_bad_lines"
    for number in range(4, 40):
        bad.add(number, "not valid JSON", "not valid JSON", "a comma?" if number == 9 else "")
    assert len(bad) == 37
    assert bad.message().startswith("37 bad lines (not valid JSON: 36; content is null: 1): line 3: content is null; ")
    assert bad.message().endswith("line 22: not valid JSON; and more: a comma?, or leave them out with skip_bad_lines")
    assert by_kind(dict.fromkeys("fedcba", 1)) == "a: 1; b: 1; c: 1; d: 1; e: 1; ..."


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
            "completion=chosen",
            {"prompt": "q", "completion": "good"},
        ),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK]}, "messages=chosen", {"messages": (ASK, ANSWER)}),
        ({"prompt": "q", "chosen": [ASK, ANSWER], "rejected": [ASK]}, "messages=chosen", {"messages": (ASK, ANSWER)}),
        ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [ASK]}, "completion=chosen", {"messages": (ASK, ANSWER)}),
        ({"chosen": "Human: q Bot: a", "rejected": "Human: q"}, "text=chosen", {"text": "Human: q Bot: a"}),
        (
            {"question": "q", "response_j": "a", "response_k": "b"},
            "prompt=question,completion=response_j",
            {"prompt": "q", "completion": "a"},
        ),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "completion=completion",
            {"prompt": "q", "completion": "a"},
        ),
    ],
)
def test_preference_data_is_named_and_what_its_message_says_works(
    tmp_path: Path, row: dict[str, Any], columns: str, expected: dict[str, Any]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError) as refused:
        list(read_rows(path))
    assert "preference data" in str(refused.value) or "rated answers, good and bad" in str(refused.value)
    assert str(refused.value).endswith(f"--columns {columns}")
    (found,) = read_rows(path, columns=dict(pair.split("=") for pair in columns.split(",")))
    names = ("text", "prompt", "completion", "messages")
    assert {name: value for name in names if (value := getattr(found.example, name)) is not None} == expected


def test_what_is_no_preference_data_has_no_hint() -> None:
    assert preference_hint({"prompt": "q", "chosen": "a"}) == ""
    assert preference_hint({"prompt": "q", "chosen": 3, "rejected": 4}).endswith("write rows of prompt and completion")
    assert "reward or ranking data" in preference_hint({"response_0": "a", "response_1": "b", "better_response_id": 0})
    assert rated_hint({"prompt": "q", "completion": "a", "label": "good"}) == ""
    assert rated_hint({"prompt": "q", "completion": "a", "label": 1}) == ""
    assert rated_hint({"prompt": "q", "completion": "a", "label": "True"}) != ""  # as a CSV has it


def test_a_name_is_never_suggested_for_itself() -> None:
    assert nearest("prompt", ["prompt", "prompts"]) == " (did you mean 'prompts'?)"
    assert nearest("prompt", ["prompt"]) == ""
