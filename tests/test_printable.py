"""What is printed cannot give orders to a terminal, however it came in."""

from __future__ import annotations

import sys

import pytest

from afina.printable import CUT, printable


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    for number in range(sys.maxunicode + 1):
        if not (found := printable(chr(number))).isprintable():
            pytest.fail(f"U+{number:04X} is printed as {found!r}")
    assert printable("\x1b]0;owned\x07\n\u202eabc\ud800é日") == r"\x1b]0;owned\x07\n\u202eabc\ud800é日"
    assert printable("a\nb\tc\r\x9b1m", lines=True) == "a\nb\tc\\r\\x9b1m"


def test_long_values_lose_their_middle() -> None:
    assert printable("abc", limit=3) == "abc"
    found = printable("a" * 1000 + "é\x00" + "z" * 1000, limit=30)
    assert found == "a" * 20 + CUT + "z" * 10
    assert len(printable("\x00" * 10_000_000, limit=100)) <= 4 * 100 + len(CUT)
