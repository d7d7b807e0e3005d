"""What is shown to a person: text from files, models and templates, with nothing in it that a terminal or a page obeys.

An escape sequence in a column's name can rename the window, hide a warning or write what looks like another message;
marks of direction turn the order of letters round; a value of megabytes scrolls away all that was said before it.
"""

from __future__ import annotations

LONGEST = 4000  # characters of one message
CUT = " [...] "


def printable(text: str, *, limit: int | None = None, lines: bool = False) -> str:
    """``text`` with what cannot be seen, or changes how the rest is shown, as escapes: controls, line breaks, marks of
    direction, characters without width, spaces that are not the common one, halves of characters.

    ``limit``: about how many characters may be left; the middle of a longer text goes. ``lines``: line ends and
    tabs stay.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - limit // 3] + CUT + text[len(text) - limit // 3 :]
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join([c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text])
