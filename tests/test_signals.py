"""What ends a process ends it in order, from its first line on; what is ignored stays ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import REPO

from afina.signals import ENDING, Stopped, stopping


def test_each_raises_and_is_given_back() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    for number in ENDING:
        with pytest.raises(Stopped, match=f"stopped by {number.name}"), stopping():
            os.kill(os.getpid(), number)
    with stopping(), pytest.raises(Stopped), stopping():
        os.kill(os.getpid(), signal.SIGHUP)
    assert [signal.getsignal(number) for number in ENDING] == before


def test_others_handlers_and_ignored_signals_stay() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGHUP, ignored)
    assert seen == [signal.SIGUSR1]


def test_in_another_thread_nothing_is_taken() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with stopping():
                pass
        except BaseException as problem:
            failed.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_while_the_command_line_is_loaded(name: str) -> None:
    code = f"""
import builtins, os, signal, sys
import afina.__main__ as program

real = builtins.__import__

def sends(name, *rest):
    if name == "afina.cli.main":
        os.kill(os.getpid(), signal.{name})
    return real(name, *rest)

builtins.__import__ = sends
sys.argv = ["afina", "--version"]
sys.exit(program.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False)
    assert (done.returncode, done.stderr) == (130, f"afina: error: stopped by {name}\n")
