"""What is printed cannot give orders to a terminal, however it came in."""

from __future__ import annotations

import sys

import pytest

from afina.printable import CUT, printable, readable


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    for number in range(sys.maxunicode + 1):
        if not (found := printable(chr(number))).isprintable():
            pytest.fail(f"U+{number:04X} is printed as {found!r}")
    assert printable("\x1b]0;owned\x07\n\u202eabc\ud800é日") == r"\x1b]0;owned\x07\n\u202eabc\ud800é日"


def test_a_text_to_read_keeps_its_lines_and_its_language() -> None:
    assert readable("a\nb\tc\r\x9b1m\x1b[31m\u202e") == "a\nb\tc\\r\\x9b1m\\x1b[31m\\u202e"
    family = "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645\u00a0\u3000e\u0301\n"
    assert readable(family) == readable(family, styled=True) == family
    ours = "\r50%\x1b[1m bold\x1b[0m \x1b[38;5;12m"
    assert readable(ours, styled=True) == ours
    orders = ("\x1b]0;title\x07", "\x1b[2J", "\x1bc", "\x1b[1", "\x1b", "\x9d0;a\x9c", "\u2066a\u2069", "\ud800")
    for order in orders:
        for styled in (False, True):
            found = readable(f"a{order}b\n", styled=styled)
            assert found == f"a{printable(order)}b\n"


def test_long_values_lose_their_middle() -> None:
    assert printable("abc", limit=3) == "abc"
    found = printable("a" * 1000 + "é\x00" + "z" * 1000, limit=30)
    assert found == "a" * 20 + CUT + "z" * 10
    assert len(printable("\x00" * 10_000_000, limit=100)) <= 4 * 100 + len(CUT)
