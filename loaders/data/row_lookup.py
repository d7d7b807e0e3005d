"""A row of the files by its number, as training has it; and where training has it not, why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from afina.errors import DataError
from afina.loaders.data.dataset import Data, TokenSet
from afina.loaders.data.rows import Row, read_rows
from afina.loaders.text.encode import encode_rendered
from afina.loaders.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class FoundRow:
    """A row of the files: its number, file and line, and which rows of the token set were made of it."""

    number: int
    where: str
    pieces: list[int]


def find_rows(data: Data, tokenizer: Tokenizer, numbers: Sequence[int]) -> list[FoundRow]:
    """Return the rows of these numbers, as ``data.train`` has them (of data prepared with ``val_size`` 0).

    Rows are counted from 1, as the files have them one after the other: those that training leaves out too, and a plain
    text file as one. Raises DataError for a number that there is not, and for a row that training leaves out, with the
    reason.
    """
    source, counts = data.train.source, Counter[str]()
    records: dict[int, list[Row]] = defaultdict(list)
    for row in read_rows(source.source, **source.reading, counts=counts):
        number = counts["rows"] + row.more  # a text that goes on is not counted yet
        if number > max(numbers):
            break
        if number in numbers:
            records[number].append(row)
    else:
        if (wrong := max(numbers)) > counts["rows"]:
            found = f"has {counts['rows']:,} row{'s' * (counts['rows'] != 1)}, no row {wrong:,}"
            raise DataError(f"{source.name}: {found}: rows are counted from 1, empty ones too")
    return [_found(number, records.get(number, []), data, tokenizer) for number in numbers]


def _found(number: int, records: list[Row], data: Data, tokenizer: Tokenizer) -> FoundRow:
    if not records:
        raise DataError(f"{data.train.source.name}: row {number:,} is empty or was skipped: nothing of it is learnt")
    where = records[0].where
    if pieces := data.train.made_of(records):
        return FoundRow(number, where, pieces)
    reason = _reason(number, records[0], data, tokenizer)
    raise DataError(f"{where}: row {number:,} is left out of training: {reason}")


def _reason(number: int, row: Row, data: Data, tokenizer: Tokenizer) -> str:
    if (first := _original(number, row, data.train)) is not None:
        return f"it is an exact copy of row {first[0]:,} (line {first[1].line}): inspect that one"
    (ids,), _ = encode_rendered(tokenizer, [row.rendered(tokenizer)])
    if len(ids) > (limit := data.report["max_length"]):
        return f"it has {len(ids):,} tokens, more than max_length {limit:,} has room for: raise max_length"
    return "none of its tokens is learnt; train_on_prompt learns the prompt too"


def _original(number: int, row: Row, token_set: TokenSet) -> tuple[int, Row] | None:
    """The row, with its number, that stands earlier in the files and is the same."""
    source, counts = token_set.source, Counter[str]()
    for other in read_rows(source.source, **source.reading, counts=counts):
        if counts["rows"] == number:
            break
        if other.digest == row.digest:
            return counts["rows"], other
    return None
