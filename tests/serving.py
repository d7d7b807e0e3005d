"""A server in a process of its own, and plain HTTP to ask it: what the tests of `afina serve` share."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from conftest import REPO


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, whose shape is that of OpenAI's."""
        assert self.headers["content-type"] == "application/json"
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert "\n" not in error["message"]
        return error


class Served:
    """A process that serves on ``port``; ``lines`` is what it has written to standard error."""

    def __init__(self, *command: str, environment: dict[str, str] | None = None) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO}:{REPO / 'tests'}", **(environment or {})}
        env.pop("AFINA_API_KEY", None) if environment is None else None
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=env, cwd=REPO,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait(lambda: any("listening on" in line for line in self.lines))
        (found,) = (m for line in self.lines if (m := re.search(r"listening on http://(\S+):(\d+)", line)))
        self.host, self.port = found[1].strip("[]"), int(found[2])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it never came; the log: {self.lines}"
            assert self.process.poll() is None or condition(), f"the server has ended: {self.lines}"
            time.sleep(0.005)

    def ready(self) -> Served:
        self.wait(lambda: self.ask("GET", "/health").status == 200)
        return self

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request; ``body``: bytes as they are, or a value as JSON. Underscores in names of headers are dashes."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            fields.setdefault("content-type", "application/json")
        try:
            connection.request(method, path, data, fields)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.ask("POST", path, body, **headers)

    @contextmanager
    def stream(self, path: str, body: dict[str, Any], **headers: str) -> Iterator[Iterator[Any]]:
        """The events of a stream as they come, "[DONE]" as None; leaving the block closes the connection."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request(
            "POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json", **headers}
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"

        def events() -> Iterator[Any]:
            for line in answer:
                if line.strip():
                    assert line.startswith(b"data: ")
                    data = line.removeprefix(b"data: ").decode().strip()
                    yield None if data == "[DONE]" else json.loads(data)

        try:
            yield events()
        finally:
            answer.close()
            connection.close()

    def raw(self, data: bytes, *, seconds: float = 10) -> bytes:
        """What comes back for these bytes until the server closes the connection."""
        with socket.create_connection((self.host, self.port), timeout=seconds) as connection:
            connection.sendall(data)
            found = b""
            while part := connection.recv(65536):
                found += part
            return found

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics").body.decode()
        return sum(float(m[1]) for m in re.finditer(rf"^afina_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def end(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        """Send a signal; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()


def fake(**settings: Any) -> Served:
    """A server whose model is a fake: see `fake_batcher`. UPPER-CASE names are constants of `afina.serve.config`."""
    return Served(str(Path(__file__).with_name("fake_batcher.py")), json.dumps({"port": 0, **settings}))
