"""Files of rows: JSONL, JSON arrays, CSV, TSV, Parquet and plain text, streamed as one record after another.

Nothing here knows what a row means. A record that cannot be read comes with its problem instead of a value, so that the
caller can list the bad lines or skip them.
"""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from afina.errors import DataError, nearest
from afina.loaders.data.encodings import first_fault, open_utf8
from afina.loaders.data.hints import FOREIGN, is_saved_dataset, json_fault, json_kind, no_object_hint
from afina.loaders.data.parquet import parquet_rows
from afina.loaders.data.tables import BadHeaderError, table_rows
from afina.loaders.jsonfile import finite, has_half_characters, show, strict_decoder

MAX_LINE = 16 * 2**20  # bytes of a line, and characters of an element of a JSON array
PIECE = 1 << 14  # characters of plain text handled at once
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
EXPECTED = "expected .jsonl, .json, .csv, .tsv, .txt (each also as .gz) or .parquet"
# What stands beside the rows in a folder and holds none.
_PAPERS = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|requirements)\b.*|dataset_infos?\.json", re.IGNORECASE
)
_BLANKS = re.compile(r"(?<![ \t])[ \t]+\n")  # the look behind keeps it linear on long runs
# Signs outside of ASCII that are neither letters nor digits, as all marks are: more in a row than are ever stacked.
_MANY_MARKS = re.compile(r"[^\w\s\x00-\x7f]{256,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")  # all but tab and line break; byte-order marks
Source = str | Path | Sequence[str | Path]


class Record(NamedTuple):
    """One record: its line (of a Parquet file its row), its value, or its problem and how to mend it.

    ``more``: the document goes on in the next record.
    """

    line: int
    value: dict[str, Any]
    problem: str = ""
    more: bool = False
    mend: str = ""


def kind_of_file(path: Path) -> str:
    """The suffix that says what a data file holds, in lower case: ".csv" also for .csv.gz, ".jsonl" for .ndjson."""
    name = path.name.lower().removesuffix(".gz").replace(".ndjson", ".jsonl")
    return Path(name).suffix


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
                if mend := is_saved_dataset(path):
                    raise DataError(f"{path}: a folder that datasets.save_to_disk wrote: export its rows, {mend}")
                inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
                files = [p for p in inside if p.is_file() and p.name.lower().endswith(SUFFIXES)]
                files = [p for p in files if not _PAPERS.fullmatch(p.name)]
                if not files:
                    names = [f"{p.name}/" if p.is_dir() else p.name for p in inside]
                    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
                    raise DataError(f"{path}: no data file in this folder (found {found}): {EXPECTED}")
            elif not path.is_file():
                if path.exists():
                    raise DataError(f"{path}: neither a file nor a folder: {EXPECTED}")
                near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
                raise DataError(f"{path}: no such file{near}: check the path of the data")
            elif path.suffix.lower() in FOREIGN:
                kind, mend = FOREIGN[path.suffix.lower()]
                raise DataError(f"{path}: {kind} is not read: {mend} ({EXPECTED})")
            elif not path.name.lower().endswith(SUFFIXES):
                raise DataError(f"{path}: unknown file type {path.suffix or '(no extension)'}: {EXPECTED}")
            else:
                files = [path]
        except OSError as problem:  # no permission, a name too long
            raise unreadable(path, problem) from problem
    kinds = {kind_of_file(file) for file in files}
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
    """Iterates over the records of one file.

    ``taken``: what had to be found out about the file to read it, in words: an encoding, a delimiter.
    ``start``: its first characters.
    """

    def __init__(self, path: Path, names: Set[str]) -> None:
        """``names``: keys that a header may hold, by which a .csv's delimiter and a .tsv's header are recognised."""
        self.path, self.names, self.taken, self.start = path, names, list[str](), ""
        self._done = 0

    @property
    def done(self) -> int:
        """Bytes of the file that were read so far, for progress bars."""
        return self._done

    def __iter__(self) -> Iterator[Record]:
        kind = kind_of_file(self.path)
        try:
            if kind == ".parquet":
                yield from self._parquet()
                return
            self._source, file = open_utf8(self.path)
            with file:
                self.taken += self._source.taken
                self.start = file.peek(1 << 16).decode(errors="replace")
                for record in self._records(file, kind):
                    self._done = self._source.consumed
                    yield record
                self._done = self._source.consumed
        except OSError as problem:
            raise unreadable(self.path, problem) from problem
        except UnicodeDecodeError as problem:
            raise DataError(f"{self.path}: {': '.join(first_fault(self.path))}") from problem
        except BadHeaderError as problem:
            raise DataError(f"{self.path}: {problem}") from problem

    def _records(self, file: io.BufferedReader, kind: str) -> Iterator[Record]:
        if kind == ".txt":
            yield from self._text(file)
        elif kind in (".csv", ".tsv"):
            for row in table_rows(self._lines(file), tabs=kind == ".tsv", names=self.names, max_row=MAX_LINE):
                if isinstance(row, str):
                    self.taken.append(row)
                elif row.problem:
                    yield Record(row.line, row.fields, row.problem, mend=self._utf8_mend(row.problem))
                else:
                    yield Record(row.line, row.fields)
        elif self.start.lstrip().startswith("[") and (kind == ".json" or not _opens_with_a_list(self.start)):
            self.taken += ["read as a JSON array"] * (kind == ".jsonl")
            yield from self._array(file)
        else:
            yield from self._json_lines(file, kind)

    @property
    def likeness(self) -> str:
        """What a file whose first record is no row probably is, and how to mend it; "" where nothing is known."""
        return json_kind(self.start) if kind_of_file(self.path) in (".json", ".jsonl") else ""

    def _lines(self, file: io.BufferedReader, *, empty: bool = True) -> Iterator[tuple[int, str, str]]:
        """Yield (line number, text, problem) for each line; without ``empty``, not for each of a run of empty ones."""
        start, number = self._source.mark, 0
        while True:
            number += 1
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            size = len(line)
            if size > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                    size += len(line)
                yield number, "", f"longer than {MAX_LINE >> 20} MiB"
            else:
                try:
                    yield number, line.decode(), ""
                except UnicodeDecodeError as fault:
                    place = f"byte {start + fault.start + 1} of {self._source.whole}"
                    at = f"byte {fault.start + 1} of the line ({place})"
                    yield number, line.decode("utf-8", "replace"), f"{at} {_NOT_UTF8}"
            start += size
            if not empty and line == b"\n":  # a small archive can hold a hundred million of them
                ahead = file.peek()
                skipped = len(ahead) - len(ahead.lstrip(b"\n"))
                file.read(skipped)
                number, start = number + skipped, start + skipped

    def _utf8_mend(self, problem: str) -> str:
        return self._utf8_hint if _NOT_UTF8 in problem else ""

    @cached_property
    def _utf8_hint(self) -> str:
        return first_fault(self.path)[1]

    def _json_lines(self, file: io.BufferedReader, kind: str) -> Iterator[Record]:
        for number, text, problem in self._lines(file, empty=False):
            if problem:
                yield Record(number, {}, problem, mend=self._utf8_mend(problem))
            elif text := text.rstrip():
                try:
                    record = _checked(number, _JSON.decode(text), text)
                except (ValueError, RecursionError) as fault:
                    problem, mend = json_fault(fault, text)
                    if kind == ".json":
                        if likeness := self.likeness:
                            raise DataError(f"{self.path}: {likeness}") from fault
                        raise self._no_array(number, problem, mend) from fault
                    record = Record(number, {}, problem, mend=mend)
                yield record

    def _no_array(self, line: int, what: str, hint: str = "") -> DataError:
        expected = "expected an array of objects, or an object on each line (JSONL)"
        return DataError(f"{self.path}: line {line}: {what}: {expected}{'; ' * bool(hint)}{hint}")

    def _array(self, file: io.BufferedReader) -> Iterator[Record]:
        """Decode a JSON array element by element: the file is never in memory as a whole."""
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        buffer, at, line = "", 0, 1

        def read_on() -> bool:
            nonlocal buffer, at
            chunk = text.read(max(1 << 20, len(buffer) - at))
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
                        _, hint = json_fault(problem, buffer[at : problem.pos + 10])
                        raise self._no_array(fault, problem.msg, hint) from problem
                except (ValueError, RecursionError) as problem:
                    raise self._no_array(line, *json_fault(problem)) from problem
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

    def _parquet(self) -> Iterator[Record]:
        number, size = 0, self.path.stat().st_size
        for rows, share in parquet_rows(self.path, MAX_LINE):
            for value in rows:
                number += 1
                problem = "" if value is not None else f"longer than {MAX_LINE >> 20} MiB"
                yield Record(number, value or {}, problem)
            self._done = int(size * share)

    def _text(self, file: io.BufferedReader) -> Iterator[Record]:
        """Plain text in pieces that end with a paragraph, a line or a word."""
        text = io.TextIOWrapper(file, encoding="utf-8")
        line, buffer, held = 1, "", Record(0, {})
        while chunk := text.read(PIECE):
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
    text = text if text.isascii() else _composed(text)
    return text.rstrip(" \t\n") if end else text


def _composed(text: str) -> str:
    """``text`` in NFC, but for runs of more marks than any language stacks: to put such a run in order takes the square
    of its length (Unicode Standard Annex 15, section 13, has 30 as the longest of its stream-safe format)."""
    if _MANY_MARKS.search(text) is None:
        return unicodedata.normalize("NFC", text)
    parts, start = [], 0
    for run in _MANY_MARKS.finditer(text):
        parts += [unicodedata.normalize("NFC", text[start : run.start()]), run[0]]
        start = run.end()
    return "".join([*parts, unicodedata.normalize("NFC", text[start:])])


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


class SpelledFloat(float):
    """A number with the spelling that it has in the file: as text, 19.90 is not 19.9."""

    spelling: str


def _spelled(literal: str) -> SpelledFloat:
    value = SpelledFloat(finite(literal))
    value.spelling = literal
    return value


def as_text(value: Any) -> str | None:
    """A text as it is, a finite number or a boolean as JSON spells it; None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        return None
    return getattr(value, "spelling", None) or json.dumps(value)


_JSON = strict_decoder(parse_int=_integer, parse_float=_spelled)
_NOT_UTF8 = "is not UTF-8"


def _opens_with_a_list(start: str) -> bool:
    """Whether the first line of a file is a whole JSON list and more lines follow: no array, but lists line by line."""
    line, _, rest = start.lstrip().partition("\n")
    try:
        return bool(json.loads(line) and rest.strip())
    except (ValueError, RecursionError):
        return False


def _checked(line: int, value: Any, text: str, start: int = 0, end: int | None = None) -> Record:
    """The record of a JSON value that stands in ``text`` from ``start`` to ``end``."""
    if not isinstance(value, dict):
        problem = f"holds {show(value)} where an object {{...}} was expected"
        return Record(line, {}, problem, mend=no_object_hint(value))
    if text.find("\\u", start, end) >= 0 and has_half_characters(value):
        return Record(line, {}, "a \\u escape is half a character (a lone surrogate)")
    return Record(line, value)
