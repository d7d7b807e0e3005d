"""What is shown to a person: text from files, models and templates, with nothing in it that a terminal or a page obeys.

An escape sequence in a column's name can rename the window, hide a warning or write what looks like another message;
marks of direction turn the order of letters round; a value of megabytes scrolls away all that was said before it.
"""

from __future__ import annotations

import re

LONGEST = 4000  # characters of one message
CUT = " [...] "


def printable(text: str, *, limit: int | None = None) -> str:
    """``text`` with what cannot be seen, or changes how the rest is shown, as escapes: controls, line breaks, marks of
    direction, characters without width, spaces that are not the common one, halves of characters.

    ``limit``: about how many characters may be left; the middle of a longer text goes.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - limit // 3] + CUT + text[len(text) - limit // 3 :]
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text])


# Controls but for line end and tab, halves of characters, marks of direction, line and paragraph separators, invisible
# annotations and tags. What belongs to the writing of a language (joiners, spaces) is not among them.
_OBEYED = (
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff"
    "\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u206f\\ufff9-\\ufffb\\U000e0000-\\U000e007f]"
)
_TEXT = re.compile(_OBEYED)
_STYLED = re.compile(rf"\x1b\[[0-9;]*m|\r|{_OBEYED}")


def readable(text: str, *, styled: bool = False) -> str:
    """A longer text for people to read, with what a terminal would obey as escapes; lines stay lines. ``styled``:
    colours and the carriage returns of a progress bar stay too."""
    if text.isprintable():
        return text

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if styled and (len(found) > 1 or found == "\r") else found.encode("unicode_escape").decode()

    return (_STYLED if styled else _TEXT).sub(escaped, text)
