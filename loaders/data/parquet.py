"""Rows of a Parquet file, in batches whose memory is bounded whatever the file says of itself.

A column is stored compressed, encoded in runs and by a dictionary: a few hundred bytes can stand for gigabytes. So what
a row group claims is looked at before it is read, texts keep their dictionary until their rows are wanted, and rows
become Python values a few megabytes at a time (https://parquet.apache.org/docs/file-format).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afina.errors import DataError

BATCH_ROWS = 1024
BATCH_BYTES = 32 * 2**20  # of the values of a batch
FREE_BYTES = 256 * 2**20  # that a column of a row group may decode to, whatever it takes in the file
MAX_RATIO = 500  # of a larger one's decoded size to that in the file; text compresses ten- to fiftyfold
Row = dict[str, Any]
_VALUE = 8  # bytes of a decoded number


def parquet_rows(path: Path, max_row: int) -> Iterator[tuple[list[Row | None], float]]:
    """Yield the rows in batches, each with the share of the rows that is read then; None stands for a row of more than
    ``max_row`` bytes. Raises DataError.

    Integers that name a class become its name. A value that Python has none for (a date of the year 20000, nanoseconds)
    is its text.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as problem:
        mend = "pip install 'afina[parquet]', or save the rows as JSONL"
        raise DataError(f"{path}: reading Parquet needs pyarrow: {mend}") from problem
    try:
        with parquet.ParquetFile(path) as file:
            columns = [file.schema.column(i) for i in range(len(file.schema))]
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            done, total, held = 0, max(1, file.metadata.num_rows), path.stat().st_size
            made = 0
            labels = _label_names(file.schema_arrow.metadata or {})
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                _check_size(path, facts)
                size = max(1, facts.total_byte_size // max(1, facts.num_rows))
                rows = max(1, min(BATCH_ROWS, BATCH_BYTES // size))
                for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                    made += sum(map(_bytes, batch.columns))
                    if made > FREE_BYTES and made > MAX_RATIO * held:
                        raise DataError(f"{path}: {held:,} bytes stand for {made:,} and more: leave out what repeats")
                    for values in _values(batch, max_row):
                        done += len(values)
                        yield [_labelled(value, labels) for value in values], done / total
    except (arrow.ArrowException, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise DataError(f"{path}: not a Parquet file that can be read ({reason}): write it again") from problem


def _check_size(path: Path, group: Any) -> None:
    for number in range(group.num_columns):
        column = group.column(number)
        decoded = max(column.total_uncompressed_size, _VALUE * column.num_values)
        if decoded > FREE_BYTES and decoded > MAX_RATIO * column.total_compressed_size:
            found = (
                f"{column.total_compressed_size:,} bytes of column {column.path_in_schema!r:.80} stand for {decoded:,}"
            )
            raise DataError(f"{path}: {found}: write it again with smaller row groups, or leave the column out")


def _values(batch: Any, max_row: int) -> Iterator[list[Row | None]]:
    """The rows of a batch as Python values, in parts of at most BATCH_BYTES."""
    size = sum(map(_bytes, batch.columns))
    if size > BATCH_BYTES and batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _values(batch.slice(0, half), max_row)
        yield from _values(batch.slice(half), max_row)
    elif size > max_row and batch.num_rows == 1:
        yield [None]
    else:
        names = batch.schema.names
        yield [dict(zip(names, row)) for row in zip(*map(_python, batch.columns))]


def _bytes(array: Any) -> int:
    """About how many bytes the values of an array take, those of a dictionary once for each place."""
    arrow = importlib.import_module("pyarrow")
    compute, kind = importlib.import_module("pyarrow.compute"), array.type
    if arrow.types.is_dictionary(kind):
        if not (arrow.types.is_string(kind.value_type) or arrow.types.is_binary(kind.value_type)):
            return int(array.nbytes)
        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return int(compute.sum(lengths).as_py() or 0) + _VALUE * len(array)
    if arrow.types.is_nested(kind) and hasattr(array, "flatten") and not arrow.types.is_union(kind):
        inner = array.flatten()
        return _VALUE * len(array) + sum(map(_bytes, inner if isinstance(inner, list) else [inner]))
    return int(array.nbytes)


def _python(array: Any) -> list[Any]:
    """The values of an array; dates and times as texts where Python has no value for one of them."""
    try:
        found: list[Any] = array.to_pylist()
    except (ArithmeticError, ImportError, ValueError):
        try:
            found = array.cast(_textual(array.type)).to_pylist()
        except (NotImplementedError, ValueError):  # as which pyarrow's own errors count
            found = [None] * len(array)
    return found


def _textual(kind: Any) -> Any:
    """A type with texts in place of its dates and times."""
    arrow = importlib.import_module("pyarrow")
    if arrow.types.is_temporal(kind):
        return arrow.string()
    if arrow.types.is_list(kind):
        return arrow.list_(_textual(kind.value_type))
    if arrow.types.is_struct(kind):
        return arrow.struct([(field.name, _textual(field.type)) for field in kind])
    return kind


def _labelled(row: Row | None, labels: dict[str, list[str]]) -> Row | None:
    for key, names in labels.items():
        if row is not None and isinstance(row.get(key), int) and 0 <= row[key] < len(names):
            row[key] = names[row[key]]
    return row


def _label_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of the classes of integer label columns, as the `datasets` library leaves them in a Parquet file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {key: value["names"] for key, value in features.items() if value.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {key: names for key, names in found.items() if isinstance(names, list)}
