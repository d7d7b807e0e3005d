"""One prompt being continued, as its readers and the batcher see it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from torch import Tensor

from afina.engine.guesses import Guesses
from afina.engine.kv_pool import Span
from afina.engine.sampler import Chooser, TokenLogprob
from afina.engine.sampling import Sampling
from afina.engine.text_stream import TextStream

if TYPE_CHECKING:
    from afina.loaders.text.tokenizer import Tokenizer


class Row:
    """A prompt being continued. What a user may read grows with each step and is never taken back.

    ``new``: the tokens so far. ``logprobs``: one each, if the sampling asks for them, and one of the end token, which
    ``new`` does not have; ``prompt_logprobs``: those of the prompt. ``finish_reason``: None while it goes on, then
    "stop" (an end token or a stop string), "length", "cancelled" or "error", whose ``error`` says what.
    ``cached_tokens``: how many of the prompt's were not computed but copied. ``submitted``, ``first_token`` and
    ``last_token`` are times of ``time.perf_counter``.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer, limit: int, echo: bool) -> None:
        self.prompt, self.sampling, self.limit, self.echo = prompt, sampling, limit, echo
        self.new: list[int] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] | None = [] if echo else None
        self.prompt_tokens, self.cached_tokens = len(prompt), 0
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._lock = threading.Lock()
        self._stream = TextStream(tokenizer, prompt, sampling.stop)
        self._taken = 0
        # A stop string may be a control token, which the text does not show.
        self.ends = {*tokenizer.eos_ids, *(tokenizer.token_id(s) for s in sampling.stop)}
        # What the batcher keeps of it.
        self.span: Span | None = None
        self.chooser: Chooser | None = None
        self.filling: list[int] = prompt  # what is to be computed before the next token is chosen
        self.done = 0  # how many tokens are in the cache
        self.keys: list[tuple[int, bytes]] = []  # the boundaries of the chunks of ``filling``
        self.cancelled = False
        self.guesses = Guesses(prompt)

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits (1, V)."""
        assert self.chooser is not None
        return self.chooser.choose(logits)

    @property
    def text(self) -> str:
        """All of the text that is certain so far: never half a character nor a part of a stop string."""
        with self._lock:
            self._catch_up()
            return self._stream.text(final=self.finish_reason is not None)

    def _catch_up(self) -> bool:
        while self._taken < len(self.new) and not self._stream.stopped:
            self._stream.add(self.new[self._taken])
            self._taken += 1
        return self._stream.stopped

    def offset(self) -> int:
        """How long the text of all tokens so far is."""
        with self._lock:
            self._catch_up()
            return len(self._stream.text(final=True))

    def stopped(self) -> bool:
        """Whether the text holds a stop string."""
        if not self.sampling.stop:
            return False
        with self._lock:
            return self._catch_up()
