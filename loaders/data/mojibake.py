"""Letters that a wrong decoder made: UTF-8 that was read as Windows-1252 or Latin-1, and how it is read back.

"CafÃ©" is "Café": its two bytes C3 A9 were taken for two characters. Reading back is exact where every character
stands for one byte and these bytes are UTF-8; a text is changed only then, and only with evidence that it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that it cannot read: the letter itself is lost
# What training takes out of a text, but for the carriage return, which is the end of a line on Windows.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
# Zero-width and direction characters that no script needs; joiners and marks that writing uses are not among them.
INVISIBLE = re.compile("[\u00ad\u200b\u2060-\u2064\u202a-\u202e\u2066-\u2069]")

# Bytes 80 to 9F as Windows-1252 shows them; five have no character there and stay what Latin-1 makes of them.
_HIGH = {byte: bytes([byte]).decode("cp1252", "replace") for byte in range(0x80, 0xA0)}
_HIGH = {byte: chr(byte) if shown == REPLACEMENT else shown for byte, shown in _HIGH.items()}
_BYTES = {ord(shown): byte for byte, shown in _HIGH.items()}
_REST = "".join(map(re.escape, _HIGH.values())) + "\x80-\xbf"  # what a byte after the first may look like
# Two bytes, three and four, by their first.
_SEQUENCE = re.compile(f"[\xc2-\xdf][{_REST}]|[\xe0-\xef][{_REST}]{{2}}|[\xf0-\xf4][{_REST}]{{3}}")
# Those that texts are full of: accented letters, quotation marks and dashes, emoji, a byte-order mark.
_USUAL = re.compile(
    f"[\xc2\xc3][{_REST}]|\xe2(?:\u20ac|\x80|\u201a|\x82|\u201e|\x84)[{_REST}]|\xf0\u0178[{_REST}]{{2}}|\xef\xbb\xbf"
)
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
MANY = 3  # sequences of an unusual kind that are no coincidence
TURNS = 3  # how often a text can have been read wrongly, one time upon the other


def is_mojibake(text: str) -> bool:
    """Whether a text holds what looks like UTF-8 read as Windows-1252 or Latin-1, mendable or not."""
    return not text.isascii() and (mend(text) != text or any(_is_evident(run) for run in _BEYOND_ASCII.finditer(text)))


def mend(text: str) -> str:
    """Return the text read back where that is exact, as it is elsewhere.

    Read back is the whole of it, or else each run of characters beyond ASCII by itself, so that a wrong letter beside a
    right one is found too. Evidence is one of the usual sequences, or `MANY` of others.
    """
    if text.isascii():
        return text
    for _ in range(TURNS):
        if not (_USUAL.search(text) or len(_SEQUENCE.findall(text)) >= MANY):
            break
        whole = _read_back(text)
        mended = whole if whole is not None else _BEYOND_ASCII.sub(_mend_run, text)
        if mended == text:
            break
        text = mended
    return text


def mend_value(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with ``change`` made to the texts in it, keys aside."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: mend_value(item, change) for key, item in value.items()}
    return [mend_value(item, change) for item in value] if isinstance(value, list) else value


def _is_evident(run: re.Match[str]) -> bool:
    """Whether a run of characters beyond ASCII is wrong by itself, whatever the text around it is.

    A capital before a sign can be meant ("IRMÃ»"), so such a pair counts behind a small letter, or twice; the longer
    sequences stand for nothing else.
    """
    usual = _USUAL.findall(run[0])
    return len(usual) > 1 or (len(usual) == 1 and (len(usual[0]) > 2 or run.string[: run.start()][-1:].islower()))


def _mend_run(run: re.Match[str]) -> str:
    mended = _read_back(run[0]) if _is_evident(run) else None
    return run[0] if mended is None else mended


def _read_back(text: str) -> str | None:
    """What the bytes of a text, one a character, are as UTF-8; None where they are none."""
    data = bytearray()
    for character in text:
        byte = _BYTES.get(ord(character), ord(character))
        if byte > 0xFF:
            return None
        data.append(byte)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
