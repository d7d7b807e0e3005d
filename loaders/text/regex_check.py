"""Regular expressions that came with a tokenizer: is the time that they take bounded by the text's length?

The `tokenizers` library runs them in a library that tries one way after another, ten million at a place, and nobody can
interrupt it. Two things are asked of an expression before it is used. By its form: where a part may be repeated, there
is one way to repeat it (so no repetition of repetitions or of alternatives), no more than a few parts are optional,
repeated or have alternatives one behind another, and nothing refers back. What this leaves is tried, on longer and
longer texts of the characters that the expression names and of some others: it may take the square of a text's length,
as some published ones do with long numbers, but no more; then texts must be short.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache

import tokenizers
from tokenizers import Regex, pre_tokenizers

from afina.durable import remember, remembered

MAX_LENGTH = 10_000  # characters of an expression; the longest of published tokenizers have about 1,000
MAX_VARIABLE = 6  # parts of varying length one behind another; published ones have up to 4
MAX_TIMES = 1024  # of what is repeated so many times at most
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)  # characters of the texts that it is tried on
SQUARE_SECONDS = 0.3  # that the longest of them may take; published expressions that take the square take 0.03
NOTICED = 0.001  # seconds of such a text from which on its growth is looked at; most published expressions take 0.0003
LEAST_LIMIT = 0.008  # seconds that any of them may take
GROWTH = 24  # how many times as long eight times the characters take, from which on it is the square
SECONDS = 10.0  # that a text may take: it must be short where an expression takes the square
NOTE = "linear-expression"  # under which the cache knows what took no square: a trial takes a tenth of a second
_RULES = 2  # of the trial, to be counted up when it changes
_USUAL = "aA0 \n!\u00e9\u4e2d\u0301"
_SYNTAX = frozenset("\\()[]{}*+?|^$.<>:&-")
_NAMED = 16  # characters of the expression itself that it is tried on


class Unbounded(ValueError):
    """An expression that may take any time; the message says what of it."""


@lru_cache(maxsize=256)
def longest_for(pattern: str) -> int | None:
    """How many characters a text may have for a regular expression (Oniguruma's syntax) that takes the square of their
    number: what takes `SECONDS` at worst. None for one that takes their number. Raises Unbounded for any other."""
    if len(pattern) > MAX_LENGTH:
        raise Unbounded(f"{len(pattern):,} characters, expected at most {MAX_LENGTH:,}")
    if not _Reader(pattern).several_ways():
        return None
    key = {"pattern": pattern, "rules": _RULES, "tokenizers": tokenizers.__version__}
    if remembered(NOTE, key) is True:
        return None
    if seconds := _square_seconds(pattern):  # on a busy machine perhaps too long: not to be kept
        return int(SIZES[-1] * math.sqrt(SECONDS / seconds))
    remember(NOTE, key, True)
    return None


class _Reader:
    """Walks once through an expression, counting the parts of varying length in each sequence."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.place = pattern, 0
        self._several = False  # a repetition or an alternative was read

    def several_ways(self) -> bool:
        """Whether there may be several ways at a place, and not one look alone. Raises Unbounded for what may take any
        time."""
        self._alternatives(0)
        if self.place < len(self.pattern):
            raise Unbounded(f"an unopened group at character {self.place + 1}")
        return self._several

    def _next(self, *expected: str) -> bool:
        for text in expected:
            if self.pattern.startswith(text, self.place):
                self.place += len(text)
                return True
        return False

    def _alternatives(self, depth: int) -> tuple[int, bool]:
        """Read up to the end of a group: the most parts of varying length in a sequence, and if there are several."""
        if depth > 20:
            raise Unbounded("groups nested more than 20 deep")
        most, several = self._sequence(depth), False
        while self._next("|"):
            most, several = max(most, self._sequence(depth)), True
            self._several = True
        return most, several

    def _sequence(self, depth: int) -> int:
        variable = 0
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            inside, several = self._part(depth)
            least, most = self._times()
            if most > 1 and least != most and (inside or several):
                raise Unbounded(
                    f"a repetition of what is repeated or has alternatives, before character {self.place + 1}"
                )
            self._several |= least != most
            variable += (inside + several) * max(1, most) + (least != most)
            if variable > MAX_VARIABLE:
                raise Unbounded(f"more than {MAX_VARIABLE} parts of varying length one behind another")
        return variable

    def _part(self, depth: int) -> tuple[int, bool]:
        """Read a character, a class or a group; of a group what `_alternatives` says."""
        if self._next("("):
            if self._next("?"):
                self._kind()
            found = self._alternatives(depth + 1)
            if not self._next(")"):
                raise Unbounded("a group without an end")
            return found
        self._character()
        return 0, False

    def _character(self) -> None:
        """Read one character, an escape or a class."""
        if self._next("["):
            self._class()
        elif self._next("\\"):
            self._escape()
        else:
            self.place += 1

    def _kind(self) -> None:
        """What stands behind "(?": a plain group, one that looks around, one that is not left again, or options."""
        if self._next(":", "=", "!", ">", "<=", "<!"):
            return
        start = self.place
        while self.place < len(self.pattern) and self.pattern[self.place] in "imx-":
            self.place += 1
        if self.place == start or self.pattern[self.place : self.place + 1] not in (":", ")"):
            raise Unbounded(f"a group of an unknown kind at character {start + 1}")
        self._next(":")

    def _class(self) -> None:
        """The rest of a class in brackets, which may hold others."""
        self._next("^")
        self._next("]")
        while not self._next("]"):
            if self.place >= len(self.pattern):
                raise Unbounded("a class without an end")
            self._character()

    def _escape(self) -> None:
        letter = self.pattern[self.place : self.place + 1]
        if letter in "123456789gkKXR" or not letter:
            raise Unbounded(f"a reference or \\{letter} at character {self.place + 1}")
        self.place += 1
        if letter in "pPxu" and self._next("{"):
            end = self.pattern.find("}", self.place)
            self.place = len(self.pattern) if end < 0 else end + 1

    def _times(self) -> tuple[int, int]:
        """How often the part that was just read may stand: (least, most)."""
        least, most = 1, 1
        if self._next("*"):
            least, most = 0, MAX_TIMES
        elif self._next("+"):
            least, most = 1, MAX_TIMES
        elif self._next("?"):
            least, most = 0, 1
        elif self.pattern.startswith("{", self.place):
            end = self.pattern.find("}", self.place)
            numbers = self.pattern[self.place + 1 : end].split(",")
            if end > 0 and len(numbers) <= 2 and all((n.isdecimal() and len(n) < 7) or not n for n in numbers):
                self.place = end + 1
                least = int(numbers[0] or 0)
                most = least if len(numbers) == 1 else int(numbers[1] or MAX_TIMES)
                if most > MAX_TIMES:
                    raise Unbounded(f"a part {most:,} times, expected at most {MAX_TIMES:,}")
        else:
            return 1, 1
        self._next("?", "+")  # as few as possible, or all and none given back
        if self.pattern[self.place : self.place + 1] in ("*", "+", "?", "{"):
            raise Unbounded(f"a repetition of a repetition at character {self.place + 1}")
        return least, most


def _square_seconds(pattern: str) -> float:
    """The longest time of a text of ``SIZES[-1]`` characters, if it grew with their square; else 0. Raises Unbounded
    where it grew faster."""
    split, slowest = pre_tokenizers.Split(Regex(pattern), "isolated"), 0.0
    named = "".join([c for c in dict.fromkeys(pattern) if c not in _SYNTAX][:_NAMED])
    # What must stand in a match is looked for first, so it stands behind what does not match.
    ends = ("", "!", f"!{named}", f"!b0 \n{named[::-1]}")
    for character in dict.fromkeys([*_USUAL, *[c for c in named if c.isalnum()][:8]]):
        for end in ends:
            sizes = SIZES[:-2] if slowest else SIZES
            for size in sizes:
                limit = max(LEAST_LIMIT, SQUARE_SECONDS * (size / SIZES[-1]) ** 2)
                seconds = _seconds(split, character * size + end, NOTICED)
                if seconds > limit:
                    raise Unbounded(f"{size:,} times {character!r} take {seconds:.2f} s, expected at most {limit:.2f}")
            if seconds > NOTICED:
                slowest = max(slowest, _if_square(split, character, end, size, tries=1 if slowest else 3))
    return slowest


def _if_square(split: pre_tokenizers.Split, character: str, end: str, size: int, *, tries: int) -> float:
    """What so many characters would take of ``SIZES[-1]``, if their time grows with the square; else 0. Eight times the
    length takes eight times the time, or sixty-four times, and so in each of the ``tries``: now and then other
    processes slow a core down."""
    least = math.inf
    for _ in range(tries):
        short, long = (_seconds(split, character * length + end, math.inf) for length in (size // 4, 2 * size))
        if long <= GROWTH * short:
            return 0.0
        least = min(least, long)
    return least * (SIZES[-1] / (2 * size)) ** 2


def _seconds(split: pre_tokenizers.Split, text: str, plenty: float) -> float:
    """How long a text takes; where that is more than ``plenty``, the least of three times: another process may have had
    the core meanwhile."""
    least = math.inf
    for _ in range(3):
        started = time.thread_time()
        try:
            split.pre_tokenize_str(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:  # pyo3's PanicException is no Exception: it gave up after ten million ways
            raise Unbounded(" ".join(str(problem).split())[:100]) from problem
        least = min(least, time.thread_time() - started)
        if least <= plenty:
            break
    return least
