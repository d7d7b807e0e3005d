"""Files of rows: JSONL, JSON arrays, CSV, TSV, Parquet and plain text, streamed as one record after another.

Nothing here knows what a row means. A record that cannot be read comes with its problem instead of a value, so that the
caller can list the bad lines or skip them.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence, Set
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from afina.errors import DataError, nearest
from afina.loaders.jsonfile import NotFiniteError, has_half_characters, show, strict_decoder

MAX_LINE = 16 * 2**20  # bytes of a line, and characters of an element of a JSON array
PIECE = 1 << 14  # characters of plain text handled at once
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
EXPECTED = "expected .jsonl, .json, .csv, .tsv, .parquet or .txt"
_BLANKS = re.compile(r"(?<![ \t])[ \t]+\n")  # the look behind keeps it linear on long runs
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")  # all but tab and line break; byte-order marks
Source = str | Path | Sequence[str | Path]


class Record(NamedTuple):
    """One record: its line (of a Parquet file its row), its value or its problem; ``more``: the document goes on."""

    line: int
    value: dict[str, Any]
    problem: str = ""
    more: bool = False


def data_files(source: Source) -> list[Path]:
    """Return the files that ``source`` (a file, a folder of files of one kind, or several of these) stands for.

    Raises DataError for what does not exist, is no data file, or mixes kinds.
    """
    if not isinstance(source, str | Path):
        files = [file for item in source for file in data_files(item)]
    else:
        path = Path(source)
        try:
            if path.is_dir():
                names = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
                files = [path / name for name in names if name.lower().endswith(SUFFIXES)]
                if not files:
                    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
                    raise DataError(f"{path}: no data file in this folder (found {found}): {EXPECTED}")
            elif not path.is_file():
                if path.exists():
                    raise DataError(f"{path}: neither a file nor a folder: {EXPECTED}")
                near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
                raise DataError(f"{path}: no such file{near}: check the path of the data")
            elif path.suffix.lower() not in SUFFIXES:
                raise DataError(f"{path}: unknown file type {path.suffix or '(no extension)'}: {EXPECTED}")
            else:
                files = [path]
        except OSError as problem:  # no permission, a name too long
            raise unreadable(path, problem) from problem
    kinds = {file.suffix.lower().replace(".ndjson", ".jsonl") for file in files}
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else "no file"
        raise DataError(f"{source_name(source)}: {found}: name one file, or several of one kind")
    return files


def source_name(source: Source) -> str:
    """What ``source`` is called in messages."""
    return str(source) if isinstance(source, str | Path) else ", ".join(map(str, source))


def unreadable(path: Path, problem: Exception) -> DataError:
    """The error to raise for a file that the system would not open or read."""
    reason = getattr(problem, "strerror", None) or problem
    return DataError(f"{path}: cannot be read ({reason}): check its name, permissions and disk")


class Reader:
    """Iterates over the records of one file; ``done`` counts the bytes read so far, for progress bars."""

    def __init__(self, path: Path, names: Set[str]) -> None:
        """``names``: keys that a header may hold; a .tsv whose first line has none is text<TAB>label."""
        self.path, self.names, self.done = path, names, 0

    def __iter__(self) -> Iterator[Record]:
        kind = self.path.suffix.lower()
        try:
            if kind == ".parquet":
                yield from self._parquet()
                return
            with self.path.open("rb") as file:
                if kind == ".txt":
                    yield from self._text(file)
                elif kind == ".json" and _first_character(file) == b"[":
                    yield from self._array(file)
                elif kind in (".csv", ".tsv"):
                    yield from self._table(file, kind)
                else:
                    yield from self._json_lines(file, kind)
        except OSError as problem:
            raise unreadable(self.path, problem) from problem
        except UnicodeDecodeError as problem:
            raise DataError(f"{self.path}: {_first_fault(self.path)}: save the file as UTF-8") from problem

    def _lines(self, file: io.BufferedReader) -> Iterator[tuple[int, str, str]]:
        """Yield (line number, text, problem) for each line."""
        for number in count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            start = self.done
            self.done += len(line)
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                    self.done += len(line)
                yield number, "", f"longer than {MAX_LINE >> 20} MiB"
                continue
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, start = line[3:], 3
            try:
                yield number, line.decode(), ""
            except UnicodeDecodeError as fault:
                at = f"byte {fault.start + 1} of the line (byte {start + fault.start + 1} of the file)"
                yield number, line.decode("utf-8", "replace"), f"{at} is not UTF-8"

    def _json_lines(self, file: io.BufferedReader, kind: str) -> Iterator[Record]:
        for number, text, problem in self._lines(file):
            if problem:
                yield Record(number, {}, problem)
            elif text := text.rstrip():
                try:
                    record = _checked(number, _JSON.decode(text), text)
                except (ValueError, RecursionError) as fault:
                    if kind == ".json":
                        raise self._no_array(number, _reason(fault)) from fault
                    record = Record(number, {}, _reason(fault))
                yield record

    def _no_array(self, line: int, what: str) -> DataError:
        expected = "expected an array of objects, or an object on each line (JSONL)"
        return DataError(f"{self.path}: line {line}: {what}: {expected}")

    def _array(self, file: io.BufferedReader) -> Iterator[Record]:
        """Decode a JSON array element by element: the file is never in memory as a whole."""
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        buffer, at, line = "", 0, 1

        def read_on() -> bool:
            nonlocal buffer, at
            chunk = text.read(max(1 << 20, len(buffer) - at))
            self.done = file.tell()
            buffer, at = buffer[at:] + chunk, 0
            return bool(chunk)

        def peek() -> str:
            """The next character that is no space, "" at the end of the file."""
            nonlocal at, line
            while True:
                while at < len(buffer) and buffer[at] in " \t\r\n":
                    line += buffer[at] == "\n"
                    at += 1
                if at < len(buffer) or not read_on():
                    return buffer[at : at + 1]

        def element(place: int) -> Record:
            nonlocal at, line
            while True:
                try:
                    value, end = _JSON.raw_decode(buffer, at)
                    break
                except json.JSONDecodeError as problem:
                    fault = line + buffer.count("\n", at, problem.pos)
                    cut_off = problem.msg.startswith("Unterminated") or problem.pos > len(buffer) - 16
                    if not cut_off or len(buffer) - at > MAX_LINE or not read_on():
                        raise self._no_array(fault, problem.msg) from problem
                except (ValueError, RecursionError) as problem:
                    raise self._no_array(line, _reason(problem)) from problem
            record = _checked(place, value, buffer, at, end)
            line += buffer.count("\n", at, end)
            at = end
            return record

        peek()
        at += 1  # the opening bracket
        mark = "]" if peek() == "]" else ","
        at += mark == "]"
        while mark == ",":
            peek()
            place = line
            yield element(place)
            mark = peek()
            at += 1
        if mark != "]":
            raise self._no_array(line, f"found {show(mark)}, no comma or ]" if mark else "the file ends in the array")
        if peek():
            raise self._no_array(line, "text after the closing bracket")

    def _table(self, file: io.BufferedReader, kind: str) -> Iterator[Record]:
        """CSV as RFC 4180 has it, or TSV: one line a row, tabs between fields, quotes only around a whole field."""
        csv.field_size_limit(MAX_LINE)
        faults: list[str] = []
        last = 0

        def texts() -> Iterator[str]:
            nonlocal last
            for last, text, problem in self._lines(file):
                if problem:
                    faults.append(f"{problem} (line {last})")
                yield text

        rows = (
            csv.reader(texts(), strict=True)
            if kind == ".csv"
            else (list(map(_unquoted, text.rstrip("\r\n").split("\t"))) for text in texts())
        )
        header: list[str] = []
        while True:
            line, problem, fields = last + 1, "", []
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as fault:
                problem = f"not valid CSV: {fault}"
            if faults:
                problem = faults[0]
                faults.clear()
            if not header:
                header = [name.strip() for name in fields]
                if problem or len(set(header)) < len(header):
                    problem = problem or f"two columns have the same name: {show(header)}"
                    raise DataError(f"{self.path}: line {line}: {problem}: mend the header")
                if kind == ".csv" or len(header) != 2 or self.names & set(header):
                    continue
                header = ["text", "label"]
            if not problem and len(fields) != len(header) and any(fields):
                problem = f"{len(fields)} fields where the header has {len(header)}"
            if problem or any(fields):
                yield Record(line, dict(zip(header, fields)), problem)

    def _parquet(self) -> Iterator[Record]:
        try:
            arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        except ImportError as problem:
            mend = "pip install 'afina[parquet]', or save the rows as JSONL"
            raise DataError(f"{self.path}: reading Parquet needs pyarrow: {mend}") from problem
        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                labels = _label_names(file.schema_arrow.metadata or {})
                size, rows = self.path.stat().st_size, max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=1024):
                    for value in batch.to_pylist():
                        number += 1
                        for key, names in labels.items():
                            if isinstance(value.get(key), int) and 0 <= value[key] < len(names):
                                value[key] = names[value[key]]
                        yield Record(number, value)
                    self.done = size * number // rows
        except (arrow.ArrowException, UnicodeDecodeError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise DataError(f"{self.path}: not a Parquet file that can be read ({reason}): write it again") from problem

    def _text(self, file: io.BufferedReader) -> Iterator[Record]:
        """Plain text in pieces that end with a paragraph, a line or a word."""
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        line, buffer, held = 1, "", Record(0, {})
        while chunk := text.read(PIECE):
            self.done = file.tell()
            *pieces, buffer = cut_text(buffer + chunk)
            for piece in pieces:
                if (cleaned := clean_text(piece, end=False)).strip():
                    if held.line:
                        yield held
                    held = Record(line, {"text": cleaned}, more=True)
                line += piece.count("\n")
        last = clean_text(buffer)
        if held.line:
            yield held._replace(more=bool(last))
        if last:
            yield Record(line, {"text": last})


def clean_text(text: str, *, end: bool = True) -> str:
    """Return ``text`` in Unicode NFC, without spaces at the ends of lines, carriage returns and control characters.

    Line breaks and indentation stay. ``end=False`` keeps the last line's spaces. Unicode Standard Annex 15.
    """
    # Looking for what is to be changed is many times faster than changing.
    if not text.isprintable():
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not text.replace("\n", "").replace("\t", "").isprintable():
            text = _CONTROL.sub("", text)
        if " \n" in text or "\t\n" in text:
            text = _BLANKS.sub("\n", text)
    text = unicodedata.normalize("NFC", text)
    return text.rstrip(" \t\n") if end else text


def cut_text(text: str) -> list[str]:
    """Cut a text into pieces of at most PIECE characters, after a blank line, a line or a word where there is one."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = start + PIECE
        for mark in ("\n\n", "\n", " "):
            # The last blank is left to the next word, as tokenizers join them; line breaks stay together.
            found = text.rfind(mark, start + PIECE // 2, end)
            if found >= 0:
                end = found if mark == " " else found + len(mark)
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits: write it as text")
    return int(digits)


_JSON = strict_decoder(parse_int=_integer)


def _reason(problem: Exception) -> str:
    if isinstance(problem, json.JSONDecodeError):
        return f"not valid JSON: {problem.msg} (column {problem.colno})"
    if isinstance(problem, NotFiniteError):
        return f"{problem}, and JSON has no other"
    return "nested too deeply" if isinstance(problem, RecursionError) else str(problem)


def _checked(line: int, value: Any, text: str, start: int = 0, end: int | None = None) -> Record:
    """The record of a JSON value that stands in ``text`` from ``start`` to ``end``."""
    if not isinstance(value, dict):
        return Record(line, {}, f"holds {show(value)} where an object {{...}} was expected")
    if text.find("\\u", start, end) >= 0 and has_half_characters(value):
        return Record(line, {}, "a \\u escape is half a character (a lone surrogate)")
    return Record(line, value)


def _first_character(file: io.BufferedReader) -> bytes:
    """Look at the start of a file for its first character that is no space, and go back."""
    start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    file.seek(0)
    return start


def _unquoted(field: str) -> str:
    """A TSV field without its quotes, where some other program quoted it as in CSV; prose with quotes stays."""
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field


def _label_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of the classes of integer label columns, as the `datasets` library leaves them in a Parquet file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {key: value["names"] for key, value in features.items() if value.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _first_fault(path: Path) -> str:
    """Where a file stops being UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, before = 1, 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(1 << 20)
            held = decoder.getstate()[0]
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as problem:
                line += problem.object.count(b"\n", 0, problem.start)
                return f"line {line}: byte {before - len(held) + problem.start + 1} of the file is not UTF-8"
            before += len(chunk)
            if not chunk:
                return "not UTF-8"
