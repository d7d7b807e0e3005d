"""The signals that ask a process to end, and what becomes of one that asks.

A lost connection sends SIGHUP, a scheduler SIGTERM, SIGUSR1 or SIGUSR2 before it kills, a limit on processor time
SIGXCPU. By default each kills at once, without a word. Here they do what Ctrl-C does: the work ends in order, and says
so. One that whoever started the process chose to ignore (nohup) stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C's asked the process to end."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(f"stopped by {signal.Signals(number).name}")


def is_free(number: signal.Signals) -> bool:
    """Whether nobody but us has said what becomes of a signal: it would kill, or raises `Stopped`."""
    return signal.getsignal(number) in (signal.SIG_DFL, stop)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Within, the signals of ``ENDING`` raise `Stopped`. Outside the main thread, where Python allows no handlers, they
    do what they did."""
    taken = [number for number in ENDING if threading.current_thread() is threading.main_thread() and is_free(number)]
    before = {number: signal.signal(number, stop) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
