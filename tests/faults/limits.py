"""Running one hostile case in a process of its own, under limits that the kernel enforces: CPU time and memory."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SLACK = 5.0  # seconds of waiting for each second of CPU time: the machine may have other work


class Outcome(NamedTuple):
    """What became of a case: "refused: TypedError: ...", "accepted", "untyped: ...", "memory", "time", "died: ..."."""

    verdict: str
    seconds: float  # of CPU time
    megabytes: float  # that its resident memory grew by

    @property
    def fine(self) -> bool:
        return self.verdict.startswith(("refused", "accepted"))


def _pages() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_limited(case: Callable[[], object], *, seconds: int, megabytes: int, typed: type[Exception]) -> Outcome:
    """Call ``case`` in a child that may use so many CPU ``seconds``, and ``megabytes`` beside what this process has.

    Whatever it raises that is no ``typed`` error is a fault, as is its death.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a library says as it dies
        try:
            verdict = _limited(case, seconds, megabytes, typed)
        except BaseException as problem:
            verdict = f"untyped: {type(problem).__name__}: {problem}"
        usage = resource.getrusage(resource.RUSAGE_SELF)
        line = f"{usage.ru_utime + usage.ru_stime} {verdict}"
        os.write(writing, line.encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(writing)
    start = time.monotonic()
    ready, _, _ = select.select([reading], [], [], SLACK * seconds + 5)
    if not ready:
        os.kill(child, signal.SIGKILL)
    text = os.read(reading, 4096).decode("utf-8", "replace")
    os.close(reading)
    _, status, usage = os.wait4(child, 0)
    grown = usage.ru_maxrss / 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if text:
        used, _, verdict = text.partition(" ")
        return Outcome(verdict, float(used), max(grown, 0.0))
    waited = time.monotonic() - start
    cause = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    late = cause in (signal.SIGXCPU, signal.SIGKILL)
    return Outcome("time" if late else f"died: signal {cause}", min(waited, seconds), max(grown, 0.0))


def _limited(case: Callable[[], object], seconds: int, megabytes: int, typed: type[Exception]) -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    space = _pages() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    try:
        case()
    except typed as problem:
        text = str(problem)
        if isinstance(problem.__cause__, MemoryError) or "\n" in text or len(text) > 2000:
            return f"untyped: {type(problem).__name__}: {text[:200]!r}"
        return f"refused: {type(problem).__name__}: {text}"
    except MemoryError:
        return "memory"
    return "accepted"
