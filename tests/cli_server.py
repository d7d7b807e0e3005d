"""The real command line without paying for ``import torch`` at each run: a process that has it forks one child a run.

The child is what ``python -m afina`` would be after its imports: ``afina.cli.main.run`` on the arguments, in a
process of its own that can be killed, signalled and limited.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys
import afina.engine.train
import torch.fx.experimental.symbolic_shapes  # torch imports it at the first run

from afina.cli.main import run

for line in sys.stdin:
    job = json.loads(line)
    if (pid := os.fork()) == 0:
        for handle, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), handle)
        sys.stdin = open(os.devnull)
        os.chdir(job["cwd"])
        exec(job["prelude"], {})
        try:
            status = run(job["arguments"])
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Finished:
    """How a run ended: its exit status (-9: killed) and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line of its error."""
        (line,) = (line for line in self.stderr.splitlines() if line.startswith("afina: error:"))
        return line

    @property
    def result(self) -> dict[str, Any]:
        """What ``--json`` printed last."""
        return json.loads(self.stdout.splitlines()[-1])


class Cli:
    """Runs of ``afina`` in ``folder``, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "AFINA_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *arguments: str | Path, prelude: str = "") -> None:
        """Begin a run. ``prelude`` is Python that its process executes first: a limit, a fault to inject."""
        job = {"arguments": [str(a) for a in arguments], "prelude": prelude, "cwd": str(self.folder)}
        job |= {name: str(self.folder / f".{name}") for name in ("stdout", "stderr")}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        self.pid = int(self._server.stdout.readline())

    def wait(self) -> Finished:
        """Wait for the end of the run that was begun."""
        assert self._server.stdout is not None
        status = int(self._server.stdout.readline())
        return Finished(status, *((self.folder / f".{name}").read_text() for name in ("stdout", "stderr")))

    def run(self, *arguments: str | Path, prelude: str = "") -> Finished:
        self.start(*arguments, prelude=prelude)
        return self.wait()

    def alive(self) -> bool:
        """Whether the run still goes on (a zombie that the server has not yet collected does not)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def when(self, condition: Callable[[], bool], timeout: float = 60) -> bool:
        """Wait until the condition holds (True) or the run has ended (False)."""
        limit = time.monotonic() + timeout
        while not condition():
            if not self.alive():
                return False
            assert time.monotonic() < limit, "the condition never held"
            time.sleep(0.0005)
        return True

    def signal(self, number: int) -> None:
        """Send a signal, unless the run has ended."""
        if self.alive():
            os.kill(self.pid, number)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
