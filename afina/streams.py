"""Standard streams that may be gone, or a terminal: a print that fails must not end hours of work, and none may give
orders to a terminal.

``2>&1 | head`` closes the pipe while a run goes on, a full disk refuses what is written to a file of messages, a
terminal goes with its connection, and a service manager may start a process without any streams.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from afina.printable import readable


def open_missing() -> None:
    """Give the process the standard streams that it was started without: what is written there goes nowhere.

    A file that is opened later would else take their place, and be written into by whatever writes to a stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115


class Shown(io.TextIOBase):
    """Writes text to a stream, with what a terminal would obey as escapes (`afina.printable.readable`)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._number = stream, stream.fileno()

    def write(self, text: str) -> int:
        self._stream.write(readable(text, styled=True))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return is_terminal(self._stream)

    def fileno(self) -> int:
        return self._number


class Unfailing(Shown):
    """The same, at once and into the stream's file; what cannot be written is lost without a word."""

    def write(self, text: str) -> int:
        data = readable(text, styled=True).encode(self.encoding, self.errors)
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._number, data) :]
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Within, messages on standard error cannot fail, and nothing that is printed is obeyed by a terminal: on standard
    output where that is one, on standard error in any case. Streams that have no file stay as they are."""
    stdout, stderr = sys.stdout, sys.stderr
    try:
        with contextlib.suppress(OSError, ValueError):  # it has no file, or is closed
            if isinstance(stderr, io.TextIOWrapper):
                sys.stderr = Unfailing(stderr)
        with contextlib.suppress(OSError, ValueError):
            if isinstance(stdout, io.TextIOWrapper) and stdout.isatty():
                sys.stdout = Shown(stdout)
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr


def say(text: str) -> None:
    """Print a line of progress on standard error, if that can be done."""
    stream: Any = sys.stderr
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        if stream is not None:
            print(readable(text), file=stream, flush=True)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is there, and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False
