"""What a check remembers of the rows that are read: where each was, hashes of what it asks and answers, and its faults.

A few hundred bytes a row, whatever its length; the texts wait on the disk (`Texts`). It is told of each row by the very
pass that tokenises for training (`Watcher`), or, without a tokenizer, by the reader.
"""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from afina.loaders.data.files import kind_of_file
from afina.loaders.data.mojibake import CONTROL, INVISIBLE, REPLACEMENT, is_mojibake, mend
from afina.loaders.data.near_duplicates import Texts
from afina.loaders.data.rows import KEYS, Row
from afina.loaders.text.render import Example

LABEL_LENGTH = 64  # characters of a label at most
MAX_LABELS = 1000
LISTED = 10  # places that a problem lists
_FATES = ("", "duplicates", "bad_lines", "dropped", "truncated", "split", "untrained", "kept")


class Place(NamedTuple):
    """Where a problem is: the file and the line (of a Parquet file the row)."""

    path: Path
    line: int


class Tally:
    """How often something was found, and where first."""

    def __init__(self) -> None:
        self.count = 0
        self.places: list[Place] = []
        self.notes: list[str] = []

    def add(self, path: Path, line: int, note: str = "") -> None:
        self.count += 1
        if len(self.places) < LISTED:
            self.places.append(Place(path, line))
            self.notes += [note] if note else []


class Parts(NamedTuple):
    """What a row asks and what it answers, as texts: the first turn that is learnt and what stands before it."""

    prompt: str
    answer: str
    context: str  # all that is not learnt
    learnt: str  # all that is


def parts_of(example: Example) -> Parts:
    """The parts of a row. A text is all prompt and no answer."""
    if example.text is not None:
        return Parts(example.text, "", example.text, "")
    if example.messages is None:
        prompt, answer = example.prompt or "", example.completion or ""
        return Parts(prompt, answer, prompt, answer)
    trained = example.trained or frozenset()
    texts = [_text_of(message) for message in example.messages]
    first = min(trained, default=len(texts))
    tools = [json.dumps(example.tools, sort_keys=True)] if example.tools else []
    roles = [f"{message['role']}: {text}" for message, text in zip(example.messages, texts)]
    return Parts(
        "\n".join(tools + roles[:first]),
        texts[first] if first < len(texts) else "",
        "\n".join(text for number, text in enumerate(texts) if number not in trained),
        "\n".join(texts[number] for number in sorted(trained)),
    )


def _text_of(message: Any) -> str:
    content = message["content"] or ""
    calls = message.get("tool_calls")
    return f"{content}{json.dumps(calls, sort_keys=True)}" if calls else content


def texts_of(row: Row, columns: Collection[str]) -> Iterator[str]:
    """The texts under the keys of a row that are read. ``columns``: the file's own names of such keys."""
    for key, value in row.raw.items():
        if key in columns or key.strip().lower() in KEYS:
            yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


class RowFacts:
    """The facts of the rows of one source, one after the other (see `afina.loaders.data.token_pass.Watcher`).

    Arrays have one value a row that was read, by its number: ``line``, ``file``, ``size`` (characters), ``tokens``,
    ``fate`` (a place in `_FATES`), ``prompt`` and ``answer`` (64-bit hashes, case and white space aside; prompt 0: the
    row asks nothing), ``text`` (its number in ``texts``, -1: not there), ``digest`` (16 bytes). ``cached``: the numbers
    of the rows that went to the token cache, in its order.
    """

    def __init__(self, texts: Texts | None, columns: Collection[str] = (), *, seed: int = 0) -> None:
        self.texts, self.columns = texts, columns
        self.paths: list[Path] = []
        self.line, self.prompt, self.answer = array("q"), array("Q"), array("Q")
        self.file, self.size, self.text, self.tokens = array("i"), array("i"), array("i"), array("i")
        self.fate, self.digests, self.cached = bytearray(), bytearray(), array("i")
        self.unreadable, self.empty, self.refused = Tally(), Tally(), Tally()
        self.texts_with = {name: Tally() for name in ("mojibake", "replacement", "control", "invisible")}
        self.mendable = 0
        self.labels: Counter[str] | None = Counter()
        self.shown: list[Row] = []
        self._random = random.Random(seed)

    # What the pass tells

    def left_out(self, path: Path, line: int, problem: str) -> None:
        (self.unreadable if problem else self.empty).add(path, line, problem)

    def read(self, row: Row) -> None:
        if not self.paths or self.paths[-1] != row.path:
            self.paths.append(row.path)
        self.line.append(row.line)
        self.file.append(len(self.paths) - 1)
        parts = parts_of(row.example)
        self.size.append(len(parts.context) + len(parts.learnt))
        self.tokens.append(0)
        self.fate.append(0)
        self.digests += row.digest
        self.text.append(-1)
        self.prompt.append(_hash(parts.prompt) if row.example.text is None and parts.prompt.strip() else 0)
        self.answer.append(_hash(parts.answer))
        self._count_label(row.example, parts.learnt)
        self._look_at_letters(row)
        if len(self.shown) < 2:
            self.shown.append(row)
        elif self._random.random() * (row.number + 1) < 1.0:  # any row but the first is as likely as another
            self.shown[1] = row
        if self.texts is not None and kind_of_file(row.path) != ".txt":
            self.text[-1] = len(self.texts)
            self.texts.add(parts.context, parts.learnt)

    def became(self, row: Row, fate: str, reason: str = "") -> None:
        self.fate[row.number] = _FATES.index(fate)
        if fate == "bad_lines":
            self.refused.add(row.path, row.line, reason)

    def mark(self, numbers: NDArray[np.int64], fate: str) -> None:
        """What became of several rows."""
        np.frombuffer(self.fate, np.uint8)[numbers] = _FATES.index(fate)

    def encoded(self, row: Row, tokens: int) -> None:
        self.tokens[row.number] += tokens

    def kept(self, rows: list[Row]) -> None:
        for row in rows:
            self.cached.append(row.number)
            if self.fate[row.number] == 0:
                self.fate[row.number] = _FATES.index("kept")

    # What is asked

    def __len__(self) -> int:
        return len(self.line)

    @property
    def digest(self) -> NDArray[np.bytes_]:
        """The digests of the rows as they were read, (rows,) S16."""
        return np.frombuffer(self.digests, "S16")

    def place(self, number: int) -> Place:
        return Place(self.paths[self.file[number]], self.line[number])

    def with_fate(self, *fates: str) -> NDArray[np.int64]:
        """The numbers of the rows that met one of these fates."""
        return np.flatnonzero(np.isin(np.frombuffer(self.fate, np.uint8), [_FATES.index(fate) for fate in fates]))

    # How the facts come about

    def _count_label(self, example: Example, answer: str) -> None:
        single = example.text is None and (example.trained is None or len(example.trained) == 1)
        if self.labels is None or not single or not answer:
            self.labels = None if not single else self.labels
            return
        self.labels[answer.strip()] += 1
        if len(answer) > LABEL_LENGTH or "\n" in answer.strip() or len(self.labels) > MAX_LABELS:
            self.labels = None

    def _look_at_letters(self, row: Row) -> None:
        found = set()
        mended = True
        for text in texts_of(row, self.columns):
            if text.isprintable() and text.isascii():
                continue
            found |= {"control"} if CONTROL.search(text) else set()
            if text.isascii():
                continue
            found |= {"invisible"} if INVISIBLE.search(text) else set()
            found |= {"replacement"} if REPLACEMENT in text else set()
            if is_mojibake(text):
                found.add("mojibake")
                mended &= not is_mojibake(mend(text))
        # The wrong letters of Latin-1 are control characters in part: they are one fault, not two.
        for name in found - ({"control"} if "mojibake" in found else set()):
            self.texts_with[name].add(row.path, row.line)
        self.mendable += "mojibake" in found and mended


def _hash(text: str) -> int:
    """64 bits of a text, never 0; case and white space aside."""
    folded = " ".join(text.casefold().split())
    return int.from_bytes(blake2b(folded.encode(errors="replace"), digest_size=8).digest(), "little") or 1
