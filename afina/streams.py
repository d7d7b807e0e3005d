"""Standard streams that may be gone: a print that fails must not end hours of work.

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


class Unfailing(io.TextIOBase):
    """Writes text to a stream's file, at once; what cannot be written is lost without a word."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._number = stream, stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def write(self, text: str) -> int:
        data = text.encode(self.encoding, self.errors)
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._number, data) :]
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def fileno(self) -> int:
        return self._number


@contextlib.contextmanager
def unfailing_stderr() -> Iterator[None]:
    """Within, messages on standard error are ones that cannot fail. Other streams than a file's stay as they are."""
    stream = sys.stderr
    try:
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # it has no file, or is closed
                sys.stderr = Unfailing(stream)
        yield
    finally:
        sys.stderr = stream


def say(text: str) -> None:
    """Print a line of progress on standard error, if that can be done."""
    stream: Any = sys.stderr
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        if stream is not None:
            print(text, file=stream, flush=True)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is there, and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False
