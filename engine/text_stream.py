"""The text of a row's new tokens while they come: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from afina.loaders.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoding puts for bytes that are no character (yet)
CONTEXT = 4  # tokens before the text that decoding sees: some tokenizers strip a first space
WINDOW = 32  # new tokens that are decoded again with each further one


class TextStream:
    """``add`` takes new tokens, ``text`` is what they say so far.

    Decoding all of them each time would take the square of their number. So text is settled from time to time: the
    tokens before a place are left behind once what stands on both sides of it, decoded apart, is what they say
    together.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.context = list(before[-CONTEXT:])
        self.settled = ""
        self.open: list[int] = []
        # A stop string of n bytes lies within the last n tokens; a few more keep the window's first character whole.
        self.reach = max((len(s.encode()) for s in stop), default=0) + CONTEXT
        self.tail: list[int] = []
        self.stopped = False
        self._cut: int | None = None

    def add(self, token: int) -> bool:
        """Take a token; whether a stop string is complete now."""
        self.open.append(token)
        if self.stop:
            self.tail = [*self.tail[1 - self.reach :], token]
            shown = self.tokenizer.decode(self.tail, skip_special=True)
            if any(s in shown for s in self.stop):
                self._cut = first_stop(self._decoded(), self.stop)
                self.stopped = self._cut is not None
        return self.stopped

    def _decoded(self) -> str:
        text = self.settled + self._piece(self.context, self.open)
        if len(self.open) > WINDOW:
            self._settle(text)
        return text

    def _piece(self, context: list[int], tokens: list[int]) -> str:
        """What ``tokens`` say behind ``context``."""
        start = self.tokenizer.decode(context, skip_special=True)
        text = self.tokenizer.decode(context + tokens, skip_special=True)
        return text[len(start) :] if text.startswith(start) else self.tokenizer.decode(tokens, skip_special=True)

    def _settle(self, text: str) -> None:
        """Leave the older tokens behind, if ``text``, what all say, parts there into two."""
        older, newer = self.open[:-CONTEXT], self.open[-CONTEXT:]
        first = self.settled + self._piece(self.context, older)
        context = (self.context + older)[-CONTEXT:]
        if REPLACEMENT not in first[-1:] and first + self._piece(context, newer) == text:
            self.settled, self.context, self.open = first, context, newer

    def text(self, *, final: bool) -> str:
        """What stands so far: up to the first stop string, whole characters only.

        Unless ``final``, an ending that could become a stop string is kept back.
        """
        text = self._decoded()
        cut = self._cut if self.stopped else first_stop(text, self.stop)
        if cut is not None:
            return text[:cut]
        text = text.rstrip(REPLACEMENT)
        if not final:
            held = (n for s in self.stop for n in range(len(s) - 1, 0, -1) if text.endswith(s[:n]))
            text = text[: len(text) - max(held, default=0)]
        return text


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins in ``text``, or None."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)
