"""Tables as text: which character separates the fields, and the rows of CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Set
from itertools import chain
from typing import NamedTuple

from afina.loaders.jsonfile import show

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
Line = tuple[int, str, str]  # number, text, and what is wrong with it


class BadHeaderError(ValueError):
    """A table whose columns cannot be told, or whose rows: the message opens with the line."""


class TableRow(NamedTuple):
    """A row of a table: the line it starts on, its fields by column, or what is wrong with it."""

    line: int
    fields: dict[str, str]
    problem: str = ""


def find_delimiter(header: str, names: Set[str]) -> str:
    """Return what separates the columns of a CSV file with this first line: the comma, unless another one fits better.

    It fits better when it yields more of the column names that are looked for (``names``, in lower case). Where none
    yields any, another one is taken only if it finds several columns and the comma a single one. Prose is never looked
    at, so that semicolons within texts decide nothing.
    """

    def fit(delimiter: str) -> tuple[int, bool]:
        try:
            fields = next(csv.reader([header], delimiter=delimiter, strict=True), [])
        except csv.Error:  # a quoted name that goes on in the next line, with this delimiter
            return 0, False
        return sum(field.strip().lower() in names for field in fields), len(fields) > 1

    return max(DELIMITERS, key=fit)  # the first of equals, and the comma stands first


def _announced(line: str) -> str:
    """The delimiter that Excel's own first line ``sep=;`` names, or ""."""
    line = line.rstrip("\r\n").strip('"')
    return line[4:] if line[:4].lower() == "sep=" and len(line) == 5 else ""


def _next_filled(lines: Iterator[Line]) -> Line:
    return next((line for line in lines if line[1].strip() or line[2]), (0, "", ""))


def table_rows(lines: Iterator[Line], *, tabs: bool, names: Set[str], max_row: int) -> Iterator[TableRow | str]:
    """Yield the rows of a table, and before them, as a text, which delimiter is used if it is not the usual one.

    CSV is read as RFC 4180 has it, with the delimiter that `find_delimiter` finds or a first line ``sep=;`` names. With
    ``tabs`` (TSV) a line is a row, and quotes count only around a whole field. ``names``: column names that are looked
    for; a TSV of two columns whose first line has none of them has no header and is text<TAB>label.
    Raises BadHeaderError.
    """
    csv.field_size_limit(max_row)
    names = {name.lower() for name in names}
    faults: list[str] = []
    last = size = began = 0

    def texts(lines: Iterable[Line]) -> Iterator[str]:
        nonlocal last, size
        for last, text, problem in lines:
            size += len(text)
            if size > max_row:
                raise BadHeaderError(f"line {began}: a row of more than {max_row:,} characters: close its quotes")
            if problem:
                faults.append(f"{problem} (line {last})")
            yield text

    rows: Iterator[list[str]]
    if tabs:
        rows = ([_unquoted(field) for field in text.rstrip("\r\n").split("\t")] for text in texts(lines))
    else:
        first = _next_filled(lines)
        if delimiter := _announced(first[1]):
            first = _next_filled(lines)
        else:
            delimiter = find_delimiter(first[1], names)
        if delimiter != ",":
            yield f"fields separated by {DELIMITERS.get(delimiter, show(delimiter))}"
        last = first[0] - 1
        rows = csv.reader(texts(chain([first], lines)), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line, problem, fields = last + 1, "", list[str]()
        began, size = line, 0
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
            if not problem and not any(map(str.strip, fields)):
                continue  # an empty line before the header
            header = [name.strip() for name in fields]
            named = [name for name in header if name]
            if problem or len(set(named)) < len(named):
                problem = problem or f"two columns have the same name: {show(header)}"
                raise BadHeaderError(f"line {line}: {problem}: mend the header")
            if not tabs or len(header) != 2 or names & {name.lower() for name in header}:
                continue
            header = ["text", "label"]
        if not problem and len(fields) != len(header) and any(fields):
            problem = f"{len(fields)} fields where the header has {len(header)}"
        if problem or any(fields):
            yield TableRow(line, dict(zip(header, fields)), problem)


def _unquoted(field: str) -> str:
    """A TSV field without its quotes, where some other program quoted it as in CSV; prose with quotes stays."""
    if len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', ""):
        return field[1:-1].replace('""', '"')
    return field
