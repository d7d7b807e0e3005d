"""The process: a socket that is open before the model is loaded, uvicorn on it, and an orderly end.

After SIGTERM or SIGINT readiness goes first: `/health` says 503 and no request for texts is begun, while those that run
are finished, for as long as the grace time lets them. A second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from afina.errors import ConfigError
from afina.serve.app import State, build
from afina.serve.config import HEADER_BYTES, KEEP_ALIVE_SECONDS, LEAVE_SECONDS, ServeConfig
from afina.serve.errors import draining
from afina.serve.guard import Guard
from afina.serve.metrics import Metrics
from afina.serve.protocol import Protocol
from afina.serve.worker import Loaded, Worker

POLL_SECONDS = 0.05
STOP_SECONDS = 0.5  # that the end waits for the worker's last step
BACKLOG = 128
SEND_BYTES = 1 << 18
# Threads give each other the interpreter this often: the worker comes back from native code many times a token, and
# must not wait 5 ms each time until the thread that sends to clients gives way.
SWITCH_SECONDS = 0.0005


def serve(config: ServeConfig, load: Callable[[], Loaded], log: Callable[[str], None]) -> dict[str, float]:
    """Serve what ``load`` gives until a signal ends it; returns what was counted.

    ``load`` is called on the worker's thread. Raises ConfigError where the address cannot be had, whatever ``load``
    raises, and KeyboardInterrupt after SIGINT.
    """
    listener = listen(config.host, config.port)
    sys.setswitchinterval(SWITCH_SECONDS)
    server = Server(config, load, log, listener)
    asyncio.run(server.run())
    server.worker.stop(STOP_SECONDS)
    if server.worker.failure is not None:
        raise server.worker.failure
    # What an interpreter with torch does at its end takes seconds on a busy machine, which the grace time may not have;
    # and the worker may be inside native code, which must not find the interpreter gone. Nothing is left to be saved.
    atexit.register(os._exit, 130 if server.interrupted else 0)
    if server.interrupted:
        raise KeyboardInterrupt
    metrics = server.worker.metrics
    return {
        "requests": sum(metrics.requests.values.values()),
        "prompt_tokens": metrics.prompt_tokens.values[()],
        "generated_tokens": metrics.generated_tokens.values[()],
    }


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as problem:
        raise ConfigError(f"--host {host}: is no address of this machine ({problem}): try 127.0.0.1") from None
    family, kind, proto, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What the kernel takes for a client that does not read; every connection inherits it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as problem:
        listener.close()
        if problem.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port}: is in use on {host}: choose another, or 0 for a free one") from None
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on ({problem.strerror})") from None
    return listener


class Server:
    """One run of the server on a socket that listens."""

    def __init__(
        self, config: ServeConfig, load: Callable[[], Loaded], log: Callable[[str], None], listener: socket.socket
    ) -> None:
        self.config, self._log, self._listener = config, log, listener
        metrics = Metrics()
        self.worker = Worker(load, config.capacity, metrics, log)
        self.state = State(config, self.worker, log)
        self.guard = Guard(build(self.state), config, metrics, log)
        self.interrupted = False
        self._ending: asyncio.Task[None] | None = None
        # It would write warnings of its own, and exceptions with the text of requests in them.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self.guard,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,
                backlog=BACKLOG,
            )
        )

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        host, port = self._listener.getsockname()[:2]
        self._log(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading the model")
        self.worker.start(loop, self._when_loaded)
        await self._uvicorn.serve(sockets=[self._listener])

    def _when_loaded(self) -> None:
        if self.worker.failure is not None:
            self._uvicorn.should_exit = True
        else:
            self._log(f"ready: {', '.join(self.worker.served)}")

    def _signalled(self, number: int) -> None:
        self.interrupted = number == signal.SIGINT
        if self._ending is None:
            self.state.draining = True
            self._ending = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.worker.fail_all(draining())

    async def _drain(self) -> None:
        """Let what runs finish, and after the grace time tell it why it ends."""
        loop = asyncio.get_running_loop()
        self._log(f"stopping: {self.guard.in_flight} requests run, at most {self.config.grace:g} s are left to them")
        end = loop.time() + self.config.grace - LEAVE_SECONDS
        while self.guard.in_flight and loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)
        self.worker.fail_all(draining())
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are this module's: uvicorn would raise them once more at its end, and the process die of them."""
        yield
