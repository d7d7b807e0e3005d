"""A batcher without a model, with the interface of `afina.engine.batcher`: for tests of queues, time and failures."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from afina.engine.sampling import Sampling
from afina.errors import DataError


class FakeRow(SimpleNamespace):
    """One row: it writes the letters of the alphabet, one a step."""


class FakeBatcher:
    """``seconds``: what a step takes. A prompt that holds 666 makes a step fail, one that holds 667 its own row."""

    def __init__(self, max_rows: int = 2, seconds: float = 0.001) -> None:
        self.max_rows, self.seconds = max_rows, seconds
        self.rows: list[Any] = []
        self.lock = threading.Lock()
        self.cache_bytes, self.max_length = 0, 512
        self.steps = itertools.count(1)

    def submit(self, prompt: Sequence[int], sampling: Sampling, *, echo_logprobs: bool = False) -> Any:
        if 668 in prompt:
            raise DataError("the prompt holds 668")
        if 669 in prompt:
            raise RuntimeError("secret text of a prompt")
        row = FakeRow(
            prompt=list(prompt), limit=sampling.max_new_tokens, new=[], text="", finish_reason=None, error=None,
            logprobs=[], prompt_logprobs=[], prompt_tokens=len(prompt), cached_tokens=0, submitted=time.perf_counter(),
            first_token=None, last_token=None, left=False,
        )  # fmt: skip
        with self.lock:
            self.rows.append(row)
        return row

    def cancel(self, row: Any) -> None:
        row.left = True

    @property
    def idle(self) -> bool:
        return not self.rows

    @property
    def running(self) -> int:
        return min(len(self.rows), self.max_rows)

    @property
    def waiting(self) -> int:
        return max(0, len(self.rows) - self.max_rows)

    def step(self) -> list[Any]:
        time.sleep(self.seconds)
        with self.lock:
            self.rows = [row for row in self.rows if not row.left]
            rows = self.rows[: self.max_rows]
        for row in rows:
            if 666 in row.prompt:
                raise RuntimeError("secret text of a prompt")
            row.new.append(65 + len(row.new) % 26)
            row.text += chr(row.new[-1])
            row.first_token = row.first_token or time.perf_counter()
            row.last_token = time.perf_counter()
            if 667 in row.prompt:
                row.finish_reason, row.error = "error", ValueError("secret text of a prompt")
            elif len(row.new) == row.limit:
                row.finish_reason = "length"
        with self.lock:
            self.rows = [row for row in self.rows if row.finish_reason is None]
        return rows


def load(seconds: float = 0.001, wait: float = 0.0) -> Any:
    """What `afina.serve.server.serve` loads: the tokenizer of afina-tiny, and a fake batcher."""
    time.sleep(wait)
    from afina.loaders.text.source import load_tokenizer
    from afina.serve.worker import Loaded

    model: Any = SimpleNamespace(config=SimpleNamespace(max_positions=512, vocab_size=4096), adapter=None)
    batcher: Any = lambda: FakeBatcher(seconds=seconds)  # noqa: E731
    return Loaded(model, load_tokenizer("afina-tiny"), {"fake": None}, lambda adapter: None, batcher)


if __name__ == "__main__":
    import json
    import sys

    from afina.cli.serve import log
    from afina.serve import config, server

    settings = json.loads(sys.argv[1])
    speed = {name: settings.pop(name) for name in ("seconds", "wait") if name in settings}
    for constant in [name for name in settings if name.isupper()]:
        for module in (config, server, *[sys.modules[f"afina.serve.{name}"] for name in ("protocol", "body")]):
            if hasattr(module, constant):
                setattr(module, constant, settings[constant])
        del settings[constant]
    server.serve(config.ServeConfig(**settings), lambda: load(**speed), log)
