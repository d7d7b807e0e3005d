"""A row by its number: the one that the file has there, and the reason where training leaves it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_tokenizer

from afina.errors import DataError
from afina.loaders.data.dataset import Data, prepare
from afina.loaders.data.row_lookup import find_rows

pytestmark = pytest.mark.usefixtures("own_cache")
TOKENIZER = tiny_tokenizer()
GOOD = [{"prompt": f"one {n}", "completion": f" two {n}"} for n in range(4)]


def prepared(path: Path, text: str, **settings: Any) -> Data:
    path.write_text(text)
    return prepare(path, TOKENIZER, **{"max_length": 64, "val_size": 0.0, "progress": False} | settings)


def json_lines(*rows: Any) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def texts(data: Data, *numbers: int) -> list[str]:
    found = find_rows(data, TOKENIZER, numbers)
    assert [row.number for row in found] == list(numbers)
    for row in found:
        for piece in row.pieces:
            assert data.train.where(piece) == row.where
    return [TOKENIZER.decode(data.train.row(piece)[0]) for row in found for piece in row.pieces]


def test_rows_are_counted_as_the_file_has_them(tmp_path: Path) -> None:
    empty = {"prompt": "one", "completion": ""}
    # Blank lines are no rows; an empty row and a bad one are.
    data = prepared(
        tmp_path / "rows.jsonl", json_lines(GOOD[0], "\n", empty, "{bad\n", GOOD[1], GOOD[2]), skip_bad_lines=True
    )
    assert texts(data, 1, 5, 4) == ["one 0 two 0<|endoftext|>", "one 2 two 2<|endoftext|>", "one 1 two 1<|endoftext|>"]
    assert find_rows(data, TOKENIZER, [4])[0].where.endswith("rows.jsonl: line 5")
    for number in (2, 3):
        with pytest.raises(DataError, match=f"row {number} is empty or was skipped"):
            find_rows(data, TOKENIZER, [number])
    with pytest.raises(DataError, match=r"rows\.jsonl: has 5 rows, no row 6: rows are counted from 1"):
        find_rows(data, TOKENIZER, [1, 6])


def test_rows_of_an_array_may_share_a_line(tmp_path: Path) -> None:
    data = prepared(tmp_path / "rows.json", json.dumps(GOOD))
    assert texts(data, 3) == ["one 2 two 2<|endoftext|>"]


def test_rows_of_several_files_are_counted_on(tmp_path: Path) -> None:
    for name, rows in (("a.jsonl", GOOD[:2]), ("b.jsonl", GOOD[2:])):
        (tmp_path / name).write_text(json_lines(*rows))
    data = prepare(tmp_path, TOKENIZER, max_length=64, val_size=0.0)
    assert texts(data, 3) == ["one 2 two 2<|endoftext|>"]
    assert find_rows(data, TOKENIZER, [3])[0].where == f"{tmp_path / 'b.jsonl'}: line 1"


def test_a_long_text_has_several_pieces(tmp_path: Path) -> None:
    long = {"text": " ".join(f"one two {n}" for n in range(40))}
    data = prepared(tmp_path / "rows.jsonl", json_lines({"text": "seven"}, long, {"text": "eight"}), max_length=16)
    (row,) = find_rows(data, TOKENIZER, [2])
    assert len(row.pieces) == len(data.train) - 2 > 2
    first, second = (data.train.row(piece)[0] for piece in row.pieces[:2])
    assert first[-1] == second[0]
    assert texts(data, 3) == ["eight<|endoftext|>"]


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    book = "".join(f"line {n} of a book of many lines\n" for n in range(30_000))  # read in several pieces
    data = prepared(tmp_path / "book.txt", book, max_length=64)
    (row,) = find_rows(data, TOKENIZER, [1])
    assert row.pieces == list(range(len(data.train)))
    assert len({data.train.where(piece) for piece in row.pieces}) > 1
    with pytest.raises(DataError, match="has 1 row, no row 2"):
        find_rows(data, TOKENIZER, [2])


def test_a_row_that_is_left_out_says_why(tmp_path: Path) -> None:
    long = {"prompt": "one " * 80, "completion": " two"}
    data = prepared(tmp_path / "rows.jsonl", json_lines(GOOD[0], long, GOOD[1], GOOD[0]), max_length=32)
    with pytest.raises(
        DataError, match=r"line 2: row 2 is left out of training: it has \d+ tokens, more than max_length 32"
    ):
        find_rows(data, TOKENIZER, [2])
    with pytest.raises(DataError, match=r"row 4 is left out of training: it is an exact copy of row 1 \(line 1\)"):
        find_rows(data, TOKENIZER, [4])


def test_the_truncated_row_is_the_one_that_is_trained(tmp_path: Path) -> None:
    long = {"prompt": "one " * 80, "completion": " two"}
    data = prepared(tmp_path / "rows.jsonl", json_lines(long), max_length=16, on_long="truncate")
    (text,) = texts(data, 1)
    assert text.endswith("one one  two<|endoftext|>")
    assert len(data.train.row(0)[0]) == 16
