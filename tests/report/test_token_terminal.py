"""Tokens in the terminal: colour only where there is one, columns only as there is room, controls never as they are."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from test_tokens import BASE, VIEWS

from afina.report import token_terminal
from afina.report.inspected import InspectedRow
from afina.report.token_terminal import Terminal, lines_of, packing_table, table, text_view, width

ROW = InspectedRow(3, "rows.jsonl: line 4", 1, 1, 0, 0, VIEWS, BASE)
ESCAPE = re.compile("\x1b\\[[0-9;]*m")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "colours"),
    [
        (io.StringIO(), {}, 0),
        (io.StringIO(), {"COLORTERM": "truecolor"}, 0),
        (Screen(), {}, 256),
        (Screen(), {"COLORTERM": "truecolor"}, 1 << 24),
        (Screen(), {"COLORTERM": "truecolor", "NO_COLOR": "1"}, 0),
        (Screen(), {"TERM": "dumb"}, 0),
    ],
)
def test_colour_only_in_a_terminal_that_wants_it(stream: io.StringIO, environ: dict[str, str], colours: int) -> None:
    terminal = Terminal.of(stream, environ)
    assert terminal.colours == colours
    assert (terminal.columns is None) != stream.isatty()
    text = "\n".join(lines_of(ROW, terminal))
    assert bool(ESCAPE.search(text)) == bool(colours)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", ESCAPE.sub("", text))
    assert "\\x1b[0m\\u202e" in text


def test_without_colour_the_learnt_parts_are_marked() -> None:
    assert text_view(VIEWS, None, Terminal(0, None)) == "a[[<script>alert(1)</script>&\"'↵\n\\x1b[0m\\u202eb]]"


def test_a_background_ends_before_its_line() -> None:
    for line in text_view(VIEWS, BASE, Terminal(256, 80)).split("\n"):
        assert line.endswith("\x1b[0m")


def test_colours_of_both_kinds() -> None:
    assert Terminal(1 << 24, 80).painted("x", "change-0") == "\x1b[48;2;12;96;163;38;2;255;255;255mx\x1b[0m"
    assert Terminal(256, 80).painted("x", "change-0") == "\x1b[48;5;25;38;5;231mx\x1b[0m"


@pytest.mark.parametrize("before", [None, BASE])
def test_a_table_fits_the_terminal(before: list[object] | None) -> None:
    heads = {}
    for columns in (40, 60, 80, 120, 200):
        lines = list(table(VIEWS, before, Terminal(0, columns)))  # type: ignore[arg-type]
        heads[columns] = lines[0].split()
        body = [line for line in lines if not line.startswith("(")]
        assert len(body) == 1 + len(VIEWS)
        assert max(map(width, body)) <= columns
        assert {"*", "text", "loss"} <= set(heads[columns])
        if before:
            assert "change" in heads[columns]
    for narrow, wide in pairwise(heads.values()):
        assert len(narrow) <= len(wide)
    assert heads[200].count("likeliest") == (2 if before else 1)
    unlimited = list(table(VIEWS, before, Terminal(0, None)))  # type: ignore[arg-type]
    assert "..." not in "".join(unlimited)
    assert "\\x1b[31m\\u202e" in unlimited[2]


def test_widths() -> None:
    assert [width(text) for text in ("abc", "世界", "e\u0301", "🙂")] == [3, 4, 1, 2]
    assert token_terminal.cut("世界世界", 7) == "世界..."
    assert token_terminal.cut("世界", 4) == "世界"


def test_how_rows_lie_in_a_packed_sequence() -> None:
    second = InspectedRow(9, "rows.jsonl: line 12", 2, 3, 1, 4, VIEWS[:2])
    lines = list(packing_table([ROW, second]))
    assert [line.split() for line in lines[1:3]] == [
        ["0", "3", "0", "to", "3", "0", "to", "3", "3", "rows.jsonl:", "line", "4"],
        ["1", "9", "piece", "2", "4", "to", "5", "0", "to", "1", "1", "rows.jsonl:", "line", "12"],
    ]
    assert lines[3].startswith("cu_seqlens [0, 4, 6]")
