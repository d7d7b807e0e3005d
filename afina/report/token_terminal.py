"""Tokens in the terminal: the text in colour, and a table as wide as there is room."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TextIO

from afina.printable import printable
from afina.report.tokens import (
    CHANGE_LABELS,
    LOSS_LABELS,
    ON_LIGHT,
    alternatives,
    change,
    level_class,
    numbers,
    quoted,
)

if TYPE_CHECKING:
    from afina.engine.token_view import TokenView
    from afina.report.inspected import InspectedRow

MAX_WORD = 20  # columns of a token's text in the table
MIN_TOP = 24  # columns below which the likeliest tokens are left out
RESET, DIM = "\x1b[0m", "\x1b[2m"
_PAIRS = {f"loss-{n}": pair for n, pair in enumerate(ON_LIGHT.loss)}
_PAIRS |= {f"change-{n}": pair for n, pair in enumerate(ON_LIGHT.change)}


@dataclass(frozen=True)
class Terminal:
    """What lines are written for: ``colours`` 0 (none), 256 or 1 << 24; ``columns`` None where nothing limits them."""

    colours: int
    columns: int | None

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str] = os.environ) -> Terminal:
        """The one behind ``stream``: no colour and no limit where it is none, no colour either with NO_COLOR."""
        if not stream.isatty():
            return cls(0, None)
        columns = shutil.get_terminal_size().columns
        if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
            return cls(0, columns)
        return cls(1 << 24 if environ.get("COLORTERM") in ("truecolor", "24bit") else 256, columns)

    def painted(self, text: str, name: str) -> str:
        """``text`` on the background of a level's class, dimmed where that is ""."""
        if not self.colours or not text:
            return text
        if not name:
            return f"{DIM}{text}{RESET}"
        background, ink = _PAIRS[name]
        return f"\x1b[48;{self._code(background)};38;{self._code(ink)}m{text}{RESET}"

    def _code(self, colour: str) -> str:
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
        if self.colours > 256:
            return f"2;{red};{green};{blue}"
        # The cube of 6 x 6 x 6 colours, whose steps are at 0, 95, 135, 175, 215 and 255.
        near = [min(range(6), key=lambda n: abs((0, 95, 135, 175, 215, 255)[n] - part)) for part in (red, green, blue)]
        return f"5;{16 + 36 * near[0] + 6 * near[1] + near[2]}"


def lines_of(row: InspectedRow, terminal: Terminal) -> Iterator[str]:
    """All that is shown of a row: what it is, its text, the legend, the mean loss, and the table of its tokens."""
    yield row.title
    yield ""
    yield text_view(row.views, row.before, terminal)
    yield ""
    yield legend(terminal, changes=row.before is not None)
    yield row.losses
    yield ""
    yield from table(row.views, row.before, terminal)


def text_view(views: Sequence[TokenView], before: Sequence[TokenView] | None, terminal: Terminal) -> str:
    """The text with a background for each learnt token; without colour, learnt stretches stand between [[ and ]]. What
    adds no text, being a part of a character, is in the table alone."""
    parts, inside = [], False
    for n, view in enumerate(views):
        if not terminal.colours and view.trained != inside:
            parts.append("[[" if view.trained else "]]")
            inside = view.trained
        name = level_class(view, None if before is None else before[n])
        # A background must end before its line does, else terminals fill the line with it.
        text = "\n".join(terminal.painted(printable(line), name) for line in view.text.replace("\n", "↵\n").split("\n"))
        parts.append(text)
    return "".join(parts) + "]]" * inside


def legend(terminal: Terminal, *, changes: bool) -> str:
    if not terminal.colours:
        return "[[learnt]], * in the table; the table shows parts of a character by their bytes"
    labels, scale = (CHANGE_LABELS, "change") if changes else (LOSS_LABELS, "loss")
    name = "change of the loss, in nats: " if changes else "probability of the token: "
    items = " ".join(terminal.painted(f" {label} ", f"{scale}-{n}") for n, label in enumerate(labels))
    return f"{name}{items} {terminal.painted('not learnt', '')} (* in the table: learnt)"


class Column(NamedTuple):
    """A column of the table: its head and cells, and whether they stand at the left."""

    head: str
    cells: list[str]
    left: bool = False

    @property
    def width(self) -> int:
        return max(map(width, [self.head, *self.cells]))

    def narrowed(self, columns: int) -> Column:
        return self._replace(cells=[cut(cell, columns) for cell in self.cells])

    def lines(self) -> list[str]:
        return [pad(cell, self.width, left=self.left) for cell in [self.head, *self.cells]]


def table(views: Sequence[TokenView], before: Sequence[TokenView] | None, terminal: Terminal) -> Iterator[str]:
    """A line for each token. Where there is no room for all columns, those go first that say least."""
    columns = [
        Column("pos", [str(view.position) for view in views]),
        Column("id", [str(view.id) for view in views]),
        Column("*", ["*" if view.trained else "" for view in views]),
        Column("text", [quoted(view.text or view.piece) for view in views], left=True),
    ]
    if terminal.columns is not None:
        columns[-1] = columns[-1].narrowed(MAX_WORD)
    sides = {"": views} if before is None else {"base ": before, "": views}
    for name, side in sides.items():
        found = zip(*map(numbers, side))
        columns += [Column(name + head, list(column)) for head, column in zip(("loss", "prob", "rank"), found)]
    if before is not None:
        columns.append(Column("change", [change(view, old) for view, old in zip(views, before)]))
    tops = [Column(f"{name}likeliest", [alternatives(v.top) for v in side], left=True) for name, side in sides.items()]
    if terminal.columns is not None:
        room = terminal.columns
        for expendable in ("base prob", "base rank", "prob", "id", "rank", "base loss", "pos"):
            if _taken(columns) > room:
                columns = [column for column in columns if column.head != expendable]
        room -= _taken(columns)
        tops = tops if room >= len(tops) * (MIN_TOP + 2) else tops[-1:] if room >= MIN_TOP + 2 else []
        tops = [column.narrowed(room // len(tops) - 2) for column in tops]
    for cells in zip(*(column.lines() for column in columns + tops)):
        yield "  ".join(cells).rstrip()
    if not tops:
        yield "(the likeliest tokens need a wider terminal, --html or --json)"


def _taken(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + 2 * (len(columns) - 1)


def width(text: str) -> int:
    """Columns that a text takes: two for wide characters, none for marks that stand on the one before."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def cut(text: str, columns: int) -> str:
    if width(text) <= columns:
        return text
    while width(text) > columns - 3:
        text = text[:-1]
    return text + "..."


def pad(text: str, columns: int, *, left: bool) -> str:
    spaces = " " * (columns - width(text))
    return text + spaces if left else spaces + text


def packing_table(rows: Sequence[InspectedRow]) -> Iterator[str]:
    """How the rows lie in one packed sequence: a line for each document."""
    heads = ["document", "row", "tokens of the sequence", "positions", "learnt", "read from"]
    cells = [heads]
    for row in rows:
        end = row.start + len(row.views)
        part = f" piece {row.piece}" if row.pieces > 1 else ""
        span, positions = f"{row.start} to {end - 1}", f"0 to {len(row.views) - 1}"
        cells.append([str(row.document), f"{row.number}{part}", span, positions, str(row.learnt), row.where])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        yield "  ".join(pad(cell, size, left=n == 5) for n, (cell, size) in enumerate(zip(line, widths))).rstrip()
    bounds = ", ".join(map(str, [*(row.start for row in rows), rows[-1].start + len(rows[-1].views)]))
    yield f"cu_seqlens [{bounds}]: attention sees one document at a time, and the first token of each has no loss"
