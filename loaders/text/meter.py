"""What a template may spend. Every value that it makes, reads or writes goes through a meter that counts steps.

A step is a turn of a loop, a call, 64 bytes of a value made, 256 characters read, or one item of a nested value that is
looked through before something walks it (JSON, a comparison, a sort, a hash, its text): a list that holds one list
twice, which holds another twice, and so on, is small until somebody walks it. So memory and time are bounded alike, on
any machine, in any thread, without a signal, a timer or a process. A clock of the thread's own CPU time catches what
takes long between two steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any

from jinja2.utils import Namespace

MAX_STEPS = 100_000  # of one rendering, besides STEPS_A_MESSAGE for each message and one for each of its characters
STEPS_A_MESSAGE = 1_000
MAX_SECONDS = 1.0  # of CPU time, besides a second for 8 million steps of messages
SPARE_OUTPUT = 1 << 20  # characters that a text may have besides four times the messages
MAX_DEPTH = 200  # of nested lists and objects: what walks them in C may have no bound of its own
_BIG = 1 << 64
_LOOK = 64  # steps between two looks at the clock
_BETWEEN = 4  # characters between two items of a list, as JSON and Python write it
_SEQUENCES = (list, tuple, KeysView, ValuesView, ItemsView)
_NESTED = (*_SEQUENCES, dict, Namespace)


class Runaway(RuntimeError):
    """A template went past one of its limits."""


class Meter:
    """Counts down ``steps``; ``limit``: characters (or items) of the longest value."""

    def __init__(self) -> None:
        self.limit, self.budget = SPARE_OUTPUT, 0
        self.stop()

    def stop(self) -> None:
        """Nothing may be spent until the next start: while a template is compiled, say."""
        self.steps = self._look_at = 0

    def start(self, messages: int, size: int) -> None:
        """Begin a rendering of so many ``messages`` of ``size`` characters in all."""
        given = STEPS_A_MESSAGE * messages + size
        self.budget = self.steps = MAX_STEPS + given
        self._look_at = self.steps - _LOOK
        # The clock starts at the first look at it: most renderings are over by then, and reading it is a system call.
        self._seconds, self._deadline = MAX_SECONDS + given / 8e6, math.inf
        self.limit = SPARE_OUTPUT + 4 * size

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < self._look_at:
            if self.steps < 0:
                raise Runaway(f"more than {self.budget:,} steps")
            now = time.thread_time()
            if now > self._deadline:
                raise Runaway(f"more than {MAX_SECONDS:g} seconds")
            self._deadline = min(self._deadline, now + self._seconds)
            self._look_at = self.steps - _LOOK

    def fits(self, size: int) -> None:
        """Refuse a text or list of so many characters or items before it is made."""
        if size > self.limit:
            raise Runaway(f"a text of more than {self.limit:,} characters")

    def made(self, value: Any) -> Any:
        """Account for a value that was just made, and return it."""
        if isinstance(value, str):
            size = len(value)
            if size > self.limit:
                self.fits(size)
            self.steps -= 1 + ((size if value.isascii() else 4 * size) >> 6)
            if self.steps < self._look_at:
                self.spend(0)
        elif isinstance(value, list | tuple | dict):
            self.fits(len(value))
            self.spend(1 + (len(value) >> 2))
            if value and isinstance(value, list) and isinstance(value[0], str):
                self.spend(len(value))  # parts of a text: each is an object of its own
        elif isinstance(value, int) and not -_BIG < value < _BIG:
            raise Runaway("a number too large to be meant")
        return value

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend()
            yield item

    def read(self, value: Any) -> Any:
        """Account for a value that something is about to walk (to compare or hash it, or to search in it), and return
        it."""
        if isinstance(value, str):
            self.steps -= 1 + (len(value) >> 8)
            if self.steps < self._look_at:
                self.spend(0)
        elif isinstance(value, _NESTED):
            self.weigh(value)
        else:
            self.spend(1 + (len(value) >> 3) if isinstance(value, range) else 1)
        return value

    def shown(self, value: Any) -> Any:
        """Account for a value that is about to be written, and return it."""
        if isinstance(value, str):
            return self.made(value)
        self.weigh(value)
        return value

    def weigh(self, value: Any, between: int = _BETWEEN, indent: int = 0) -> int:
        """How many characters the text of a value has at most, with so many ``between`` its items and an ``indent`` for
        each level. Raises Runaway where that is too long for any text."""
        size, left = 0, [(value, 0)]
        while left:
            item, depth = left.pop()
            self.spend()
            size += between + depth * indent
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, int):
                size += item.bit_length() // 3
            elif isinstance(item, dict):
                left += [(key, depth + 1) for key in item]
                left += [(each, depth + 1) for each in item.values()]
            elif isinstance(item, _SEQUENCES):
                left += [(each, depth + 1) for each in item]
            elif isinstance(item, Namespace):
                left.append((object.__getattribute__(item, "_Namespace__attrs"), depth + 1))
            if size > self.limit:
                raise Runaway(f"a text of more than {self.limit:,} characters")
            if depth > MAX_DEPTH:
                raise Runaway(f"a value nested more than {MAX_DEPTH} deep")
        self.spend(size >> 8)
        return size
