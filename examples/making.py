"""What the data scripts of the use cases share: seeded draws, how alike two texts are, and files as bytes.

The same seed gives the same bytes on every Python version, because only ``Random.random`` is used.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Draw:
    """Seeded choices that do not depend on the Python version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def index(self, length: int) -> int:
        return int(self._random.random() * length)

    def one(self, items: Sequence[T]) -> T:
        return items[self.index(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        return sorted(items, key=lambda _: self._random.random())

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different ones, in the order in which they stand."""
        chosen = set(self.shuffled(range(len(items)))[:count])
        return [item for number, item in enumerate(items) if number in chosen]


def words(text: str) -> frozenset[str]:
    """The set of lower-case words of a text, the unit in which overlap is measured."""
    return frozenset(re.findall(r"[^\W\d_]+", text.lower()))


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard index of two word sets, from 0.0 to 1.0."""
    return len(a & b) / len(a | b)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV or TSV file, by the path's suffix, with "\\n" at the end of a line."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path.write_text(file.getvalue(), encoding="utf-8", newline="\n")
