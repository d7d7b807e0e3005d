"""How rows are divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_tokenizer

from afina.advise.parts import MAX_JUDGE, MAX_TUNE, Request, Rows, read
from afina.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


def divided(folder: Path, rows: list[dict[str, Any]], **reading: Any) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(Request(str(path), "-", reading=reading), tiny_tokenizer(), 96)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}\n", "completion": f"answer {n}"} for n in range(count)]


@pytest.mark.parametrize(
    ("count", "train", "tune", "judge"),
    [(2, 1, 0, 1), (30, 17, 3, 10), (49, 28, 5, 16), (50, 35, 5, 10), (200, 140, 20, 40), (2000, 1636, 64, 300)],
)
def test_sizes(tmp_path: Path, count: int, train: int, tune: int, judge: int) -> None:
    rows = divided(tmp_path, numbered(count))
    assert (len(rows.train), len(rows.tune), len(rows.judge)) == (train, tune, judge)
    assert rows.total == count
    assert tune <= MAX_TUNE
    assert judge <= MAX_JUDGE


def test_no_row_is_in_two_parts_and_examples_go_with_their_tokens(tmp_path: Path) -> None:
    rows = divided(tmp_path, numbered(60))
    seen: list[str] = []
    tokenizer = tiny_tokenizer()
    for part, token_set in (("train", rows.train), ("tune", rows.tune), ("judge", rows.judge)):
        for number, (example, pair) in enumerate(zip(rows.examples[part], rows.pairs[part], strict=True)):
            assert example.where == token_set.where(number)
            assert pair.answer in tokenizer.decode(token_set.row(number)[0].tolist())
            seen.append(pair.question)
    assert len(set(seen)) == len(seen) == 60
    assert rows.unanswered is None


def test_a_dev_file_judges(tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps({"prompt": f"other {n}\n", "completion": f"{n}"}) + "\n" for n in range(400)))
    rows = divided(tmp_path, numbered(60), val_file=str(dev))
    assert (len(rows.train), len(rows.tune), len(rows.judge)) == (54, 6, MAX_JUDGE)
    assert all(example.where.startswith(str(dev)) for example in rows.examples["judge"])
    assert [example.where for example in rows.examples["judge"]] == [rows.judge.where(n) for n in range(MAX_JUDGE)]


def test_contradictions_count_where_answers_are_labels(tmp_path: Path) -> None:
    labels = [{"text": f"film {n // 2}", "label": "ab"[n % 2 if n < 8 else 0]} for n in range(80)]
    assert divided(tmp_path, labels).contradictory == 8
    texts = [{"prompt": f"film {n // 2}", "completion": f"answer {n} of its own"} for n in range(80)]
    assert divided(tmp_path, texts).contradictory == 0


def test_rows_without_an_answer_in_words(tmp_path: Path) -> None:
    rows = divided(tmp_path, [{"text": f"some text {n}"} for n in range(40)])
    assert rows.unanswered is not None
    assert rows.unanswered.startswith(str(tmp_path / "rows.jsonl"))


def test_a_long_text_is_divided_by_its_pieces(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    rows = read(Request(str(tmp_path / "book.txt"), "-"), tiny_tokenizer(), 96)
    assert rows.total > 10
    assert rows.unanswered is not None


def test_a_single_row_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one usable row"):
        divided(tmp_path, numbered(1))
