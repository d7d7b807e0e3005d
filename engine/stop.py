"""Stopping a run by a signal: the loop is told, and goes on until it has saved.

with StopRequest() as stop:
    ...                        # polls stop.requested before each micro-batch
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from afina.signals import ENDING, is_free


class Stop(Protocol):
    """What a run asks before each micro-batch: whether it has been told to stop."""

    @property
    def requested(self) -> object: ...


class StopRequest:
    """While entered, SIGINT and what else ends a process (``afina/signals.py``) only set ``requested``; the loop polls
    it, saves, and stops.

    More signals change nothing, so none can cut a save short. SIGHUP and the like are left to whoever takes or ignores
    them already. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.requested is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            others = [number for number in ENDING if number != signal.SIGTERM and is_free(number)]
            for number in (signal.SIGINT, signal.SIGTERM, *others):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: the handler was not Python's and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number)
            text = "stopping after this micro-batch, with a checkpoint to --resume from"
        else:
            text = "already stopping, the checkpoint is being saved; please wait"
        # os.write: a handler may run in the middle of a print, whose buffer cannot be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, f"\nafina: {signal.Signals(number).name}: {text}\n".encode())
