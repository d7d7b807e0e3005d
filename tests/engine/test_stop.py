"""engine/stop.py: signals set a flag, say so, and their handlers come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from afina.engine.stop import StopRequest
from afina.signals import ENDING


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_whatever_ends_a_process_only_asks_a_run_to_stop(number: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested == number


def test_stop_request() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_stop_request_says_what_it_does(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    first, second = capfd.readouterr().err.split("\n\n")
    assert "SIGINT: stopping after this micro-batch" in first
    assert "SIGTERM: already stopping, the checkpoint is being saved" in second


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_it_does_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM) is before, bool(stop)))

    run: Callable[[], None] = work
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(True, False)]
