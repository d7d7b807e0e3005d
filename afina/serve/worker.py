"""The one thread that has the model: it loads it, then adds a token to the texts being written, again and again.

Requests live on the thread of the event loop. What crosses over is little: prompts go into a `Batcher`, which takes
them from any thread, and after each step one call brings what is new to the loop, where all else in this file happens.
Each served name (the base, each adapter) has a batcher of its own; the steps take turns, and the adapter changes
between them.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from afina.errors import DataError
from afina.serve.errors import RequestError, internal, loading
from afina.serve.metrics import Gauge, Metrics

if TYPE_CHECKING:
    from afina.engine.batcher import Batcher
    from afina.engine.lora import Adapter
    from afina.engine.model import GPT
    from afina.engine.row import Row
    from afina.engine.sampling import Sampling
    from afina.loaders.text.tokenizer import Tokenizer


@dataclass
class Served:
    """A model by the name that requests give; ``adapter``: None for the base alone."""

    name: str
    adapter: Adapter | None
    batcher: Batcher


class Loaded(NamedTuple):
    """What loading gives: one base, its tokenizer, and by name what is served of it, the first of them by default.

    ``activate`` makes an adapter the active one, and ``batcher`` a batcher for one served name.
    """

    model: GPT
    tokenizer: Tokenizer
    adapters: Mapping[str, Adapter | None]
    activate: Callable[[Adapter | None], None]
    batcher: Callable[[], Batcher]


class _News(NamedTuple):
    """What a step added to a row, as of its end."""

    row: Row
    text: str
    tokens: int
    finish_reason: str | None


@dataclass(eq=False)
class Text:
    """One text being written: what is certain of it so far."""

    row: Row
    batcher: Batcher
    writing: Writing
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None


@dataclass(eq=False)
class Writing:
    """The texts of one request. ``changed`` is set when there is something new in one of them, or in ``failure``."""

    served: Served
    texts: list[Text] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: RequestError | None = None
    gone: bool = False

    def fail(self, failure: RequestError) -> None:
        self.failure = self.failure or failure
        self.changed.set()

    @property
    def done(self) -> bool:
        return all(text.finish_reason for text in self.texts)


class Worker:
    """The thread and what it serves. ``log`` takes lines about what went wrong."""

    def __init__(self, load: Callable[[], Loaded], capacity: int, metrics: Metrics, log: Callable[[str], None]) -> None:
        self._load, self._capacity, self.metrics, self._log = load, capacity, metrics, log
        self._thread = threading.Thread(target=self._run, name="afina-worker", daemon=True)
        self._wake, self._stop = threading.Event(), False
        self._texts: dict[int, Text] = {}  # by the id of their rows
        self._row_seconds = 1.0  # that a text took lately
        self.loaded: Loaded | None = None
        self.served: dict[str, Served] = {}
        self.failure: BaseException | None = None  # of loading
        self.created = int(time.time())
        gauges = {
            "model_loaded": Gauge("1 when the model is there.", lambda: float(self.loaded is not None)),
            "texts_running": Gauge("Texts being written.", lambda: self._sum("running")),
            "texts_waiting": Gauge("Texts waiting for a place.", lambda: self._sum("waiting")),
            "cache_bytes": Gauge("Bytes of keys and values held.", lambda: self._sum("cache_bytes")),
        }
        metrics.gauges |= gauges

    def _sum(self, name: str) -> float:
        return float(sum(getattr(served.batcher, name) for served in self.served.values()))

    def start(self, loop: asyncio.AbstractEventLoop, when_loaded: Callable[[], None]) -> None:
        """Load the model; ``when_loaded`` is called on the loop when it is there, or when it cannot be."""
        self._loop, self._when_loaded = loop, when_loaded
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End the thread after its step; returns whether it ended in time."""
        self._stop = True
        self._wake.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # On the loop's thread

    def find(self, name: str | None) -> Served:
        """The model of a request; None stands for the first one. Raises RequestError."""
        if self.loaded is None:
            raise loading()
        if name is None:
            return next(iter(self.served.values()))
        if name not in self.served:
            known = ", ".join(self.served)
            raise RequestError(
                f"there is no model {name[:100]!r} here; expected one of {known}", "model", status=404,
                code="model_not_found",
            )  # fmt: skip
        return self.served[name]

    def submit(
        self, served: Served, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], *, echo: bool, param: str
    ) -> Writing:
        """Begin a text for each sampling of each prompt, in that order. Raises RequestError; then none is begun."""
        count = len(prompts) * len(samplings)
        if len(self._texts) + count > self._capacity:
            seconds = max(1, min(60, math.ceil(self._row_seconds * len(self._texts) / self._capacity)))
            told = f"{len(self._texts)} texts are being written or wait, of {self._capacity} that may"
            raise RequestError(f"{told}: try again later", status=429, code="queue_full", retry_after=seconds)
        writing, batcher = Writing(served), served.batcher
        try:
            for prompt in prompts:
                for sampling in samplings:
                    row = batcher.submit(prompt, sampling, echo_logprobs=echo)
                    writing.texts.append(Text(row, batcher, writing))
                    self._texts[id(row)] = writing.texts[-1]
        except DataError as problem:
            raise RequestError(str(problem), param) from problem
        finally:
            if len(writing.texts) < count:
                self.cancel(writing)
        self._wake.set()
        return writing

    def cancel(self, writing: Writing) -> None:
        """Give up those of a request's texts that are not done."""
        for text in writing.texts:
            if self._texts.pop(id(text.row), None) is not None:
                self.metrics.cancelled.add()
                text.batcher.cancel(text.row)
        self._wake.set()

    def fail_all(self, failure: RequestError) -> None:
        """Tell every request that is not done why it ends now."""
        for text in list(self._texts.values()):
            text.writing.fail(failure)

    def _deliver(self, news: Sequence[_News]) -> None:
        for row, certain, tokens, finish_reason in news:
            text = self._texts.get(id(row))
            if text is None:  # given up meanwhile
                continue
            self.metrics.generated_tokens.add(tokens - text.tokens)
            text.text, text.tokens, text.finish_reason = certain, tokens, finish_reason
            if finish_reason is not None:
                del self._texts[id(row)]
                self._count(row, tokens)
                if finish_reason == "error":
                    self._log(f"a text of {text.writing.served.name} failed: {type(row.error).__name__}")
                    text.writing.fail(internal())
            text.writing.changed.set()

    def _count(self, row: Row, tokens: int) -> None:
        self.metrics.prompt_tokens.add(row.prompt_tokens)
        self.metrics.cached_tokens.add(row.cached_tokens)
        if row.first_token is not None and row.last_token is not None:
            self.metrics.first_token.add(row.first_token - row.submitted)
            if tokens > 1:
                self.metrics.each_token.add((row.last_token - row.first_token) / (tokens - 1))
            self._row_seconds += 0.1 * (row.last_token - row.submitted - self._row_seconds)

    def _broken(self, name: str, batcher: Batcher, problem: Exception) -> None:
        place = problem.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f" at {place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
        self._log(f"a step of {name} failed: {type(problem).__name__}{where}")
        for text in [text for text in self._texts.values() if text.batcher is batcher]:
            del self._texts[id(text.row)]
            text.finish_reason = "error"
            text.writing.fail(internal())

    # On the worker's thread

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        try:
            loaded = self._load()
            ready: dict[str, Served] = {}
            for name, adapter in loaded.adapters.items():
                loaded.activate(adapter)  # a batcher packs the weights that it finds
                ready[name] = Served(name, adapter, loaded.batcher())
            self.served, self.loaded = ready, loaded
        except BaseException as problem:  # told on the main thread, in one line, as that of any verb
            self.failure = problem
        self._call(self._when_loaded)
        if self.failure is not None:
            return
        while not self._stop:
            busy = [served for served in self.served.values() if not served.batcher.idle]
            for served in busy:
                self._step(loaded, served)
            if not busy:
                self._wake.wait()
                self._wake.clear()

    def _step(self, loaded: Loaded, served: Served) -> None:
        try:
            if loaded.model.adapter is not served.adapter:
                loaded.activate(served.adapter)
            rows = served.batcher.step()
            news = [_News(row, row.text, len(row.new), row.finish_reason) for row in rows]
        except Exception as problem:  # the boundary of a batch: its texts fail, and the server goes on
            broken, served.batcher = served.batcher, loaded.batcher()
            self._call(self._broken, served.name, broken, problem)
            return
        if news:
            self._call(self._deliver, news)
