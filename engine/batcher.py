"""Continuous batching: rows join a running batch when they come and leave it when they are done.

``Batcher.step`` is one iteration. Prompts are prefilled in chunks, a few in each step, so that a long one does not stop
the others; then every row that is decoding gets one token. A row's chunks, and the sizes of all that is computed of it,
follow from the row alone (``row_exact``), so on a CPU its text is the same, bit for bit, in any company.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afina.engine.decode_step import DecodeStep
from afina.engine.guesses import LEAST
from afina.engine.kv_pool import CPU_BYTES, KVPool
from afina.engine.packed import PackedModel
from afina.engine.prefill import Prefill
from afina.engine.row import Row
from afina.engine.row_exact import exact_sizes, padded
from afina.engine.sampler import Chooser, TokenLogprob, choose_together, logprobs_of
from afina.engine.sampling import Sampling
from afina.errors import AfinaError, ConfigError, DataError
from afina.kernels.backend import trusted

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

FEW = 4  # rows that cost little more than one, where weights are packed: both wait for the memory


class Batcher:
    """Runs the rows that are submitted; ``submit`` and ``cancel`` may be called from any thread, ``step`` from one.

    ``max_rows`` decode at a time. The keys and values of all rows take ``cache_bytes`` at most, from the beginning: by
    default 1 GiB (on a GPU half of what is free there), and no more than ``max_rows`` of the longest rows need. A row
    reserves room for its prompt and ``max_new_tokens`` of it. ``max_length`` is the longest row, prompt and text
    together: the model's context, if the cache has so much room.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 32,
        max_length: int | None = None,
        cache_bytes: int | None = None,
        prefill_chunk: int = 256,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.prefill_chunk = max_rows, prefill_chunk
        self.device, dtype = model.device, model.dtype
        context = model.config.max_positions
        each = KVPool.token_bytes(model.config, dtype)
        longest = context if max_length is None else min(max_length, context)
        bound = _default_bytes(self.device) if cache_bytes is None else cache_bytes
        tokens = min(bound // each - 1, max_rows * longest)
        if tokens < 2:
            raise ConfigError(
                f"cache_bytes is {bound}; expected {3 * each} or more: a token of this model takes {each}"
            )
        self.max_length = min(longest, tokens)
        self.pool = KVPool(model.config, tokens, self.device, dtype)
        self.step_of = DecodeStep(model, self.pool, self.max_length)
        self.packed = PackedModel(model)
        with self.packed, trusted() if self.device.type == "cpu" else nullcontext():
            self.sizes = exact_sizes(model, max_rows)
        self.long_after = min(
            (rope.original_max_positions for rope in model.config.ropes if rope.kind == "longrope"), default=context
        )
        self.prefill = Prefill(model, tokenizer, self.pool, size=prefill_chunk, long_after=self.long_after)
        self._waiting: deque[Row] = deque()
        self._filling: list[Row] = []
        self._decoding: list[Row] = []
        self._lock = threading.Lock()

    @property
    def cache_bytes(self) -> int:
        """What the keys and values take: the bound, reserved from the beginning."""
        return self.pool.nbytes

    @property
    def waiting(self) -> int:
        """Rows that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that have a place: their prompts are being prefilled, or they decode."""
        return len(self._filling) + len(self._decoding)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self.running

    def submit(self, prompt: Sequence[int], sampling: Sampling, *, echo_logprobs: bool = False) -> Row:
        """Queue a prompt. ``echo_logprobs``: the row's ``prompt_logprobs`` are wanted too.

        Raises DataError where it is empty or longer than rows may be, or holds or favours ids that the model lacks.
        """
        ids, vocab = list(prompt), self.model.config.vocab_size
        if not ids:
            raise DataError("the prompt is empty; expected at least one token to continue")
        if len(ids) >= self.max_length:
            reads = "the model reads" if self.max_length == self.model.config.max_positions else "a row holds"
            raise DataError(f"the prompt has {len(ids)} tokens and {reads} {self.max_length} at most: shorten it")
        wrong = next((token for token in (*ids, *sampling.logit_bias) if not 0 <= token < vocab), None)
        if wrong is not None:
            raise DataError(f"token {wrong} does not exist: the model knows those from 0 to {vocab - 1}")
        row = Row(
            ids, sampling, self.tokenizer, min(sampling.max_new_tokens, self.max_length - len(ids)), echo_logprobs
        )
        with self._lock:
            self._waiting.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """Stop a row; its place is free after the running step. Nothing happens to one that is done."""
        row.cancelled = True

    @torch.no_grad()
    def step(self) -> list[Row]:
        """One iteration: chunks of prompts, as many as fit into ``prefill_chunk`` tokens (one at least), then a token
        for each row that decodes. Returns the rows that have something new: tokens, or their end."""
        changed = self._drop_cancelled()
        self._admit()
        decoding = list(self._decoding)
        with self.packed, trusted() if self.device.type == "cpu" else nullcontext():
            changed += self._prefill()
            changed += self._decode(decoding)
        return changed

    def forget(self) -> None:
        """Give up what rows that are done have left for later ones; to be called when no row runs."""
        self.pool.clear()

    def _drop_cancelled(self) -> list[Row]:
        with self._lock:
            gone = [row for row in self._waiting if row.cancelled]
            for row in gone:
                self._waiting.remove(row)
        gone += [row for row in (*self._filling, *self._decoding) if row.cancelled]
        for row in gone:
            self._finish(row, "cancelled")
        return gone

    def _admit(self) -> None:
        """Give places to rows in the order in which they came."""
        while self._waiting and self.running < self.max_rows:
            row = self._waiting[0]
            span = self.pool.take(len(row.prompt) + row.limit)
            if span is None:
                return
            with self._lock:
                self._waiting.popleft()
            row.span, row.chooser = span, Chooser(row.prompt, row.sampling, self.model.config.vocab_size, self.device)
            row.keys = list(self.prefill.boundaries(row.filling))
            self._filling.append(row)

    def _prefill(self) -> list[Row]:
        changed, spent = [], 0
        for row in list(self._filling):
            count = row.keys[0][0] - row.done
            if spent and spent + count > self.prefill_chunk:
                break
            try:
                hidden, computed = self.prefill.chunk(row)
                spent += computed
                if hidden is None:
                    continue
                self._filling.remove(row)
                self._decoding.append(row)
                logits = self._logits(hidden[None])
                self._append(row, row.choose(logits), logits)
                changed.append(row)
            except (AfinaError, RuntimeError, ValueError, MemoryError) as problem:
                self._fail(row, problem)
                changed.append(row)
        return changed

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden (n, C) -> logits (n, V), computed in a batch of a size that is exact."""
        filled = hidden.new_zeros(padded(len(hidden), self.sizes), 1, hidden.shape[-1])
        filled[: len(hidden), 0] = hidden
        return self.model.logits(filled)[: len(hidden), 0]

    def _decode(self, rows: list[Row]) -> list[Row]:
        """One token more for each of these rows."""
        changed: list[Row] = []
        rows = [row for row in rows if not self._restarts(row)]
        for first in range(0, len(rows), self.sizes[-1]):
            changed += self._decode_batch(rows[first : first + self.sizes[-1]])
        return changed

    def _restarts(self, row: Row) -> bool:
        """Whether the next token makes a row so long that LongRoPE turns all of its positions by other angles: then
        everything is computed again."""
        if row.done != self.long_after or len(row.filling) > self.long_after:
            return False
        if row.span is not None:
            self.pool.forget(row.span)
        row.filling, row.done = [*row.prompt, *row.new], 0
        row.keys = list(self.prefill.boundaries(row.filling))
        self._decoding.remove(row)
        self._filling.append(row)
        return True

    def _decode_batch(self, rows: list[Row]) -> list[Row]:
        guessed = self._guessed(rows)
        try:
            logits = self._forward(rows, guessed)
            sampled = self._sampled(rows, guessed, logits)
        except (RuntimeError, MemoryError) as problem:
            if len(rows) == 1:
                self._fail(rows[0], problem)
                return rows
            return [row for each in rows for row in self._decode_batch([each])]
        best = logits.argmax(-1).tolist() if any(row.chooser.plain for row in rows if row.chooser) else []
        first = 0
        for row, guesses in zip(rows, guessed, strict=True):
            try:
                self._take(row, guesses, logits, best, first, sampled.get(first))
            except (AfinaError, RuntimeError, ValueError, MemoryError) as problem:
                self._fail(row, problem)
            first += 1 + len(guesses)
        return rows

    def _sampled(self, rows: list[Row], guessed: list[list[int]], logits: Tensor) -> dict[int, int]:
        """The next tokens of rows that draw them together, by the place of their logits. What is drawn behind a guess
        waits until it has come true."""
        places, choosers, place = [], [], 0
        for row, guesses in zip(rows, guessed, strict=True):
            if row.chooser is not None and not row.chooser.plain:
                places.append(place)
                choosers.append(row.chooser)
            place += 1 + len(guesses)
        if len(choosers) < 2:
            return {}
        found = choose_together(choosers, logits if len(places) == len(logits) else logits[places])
        return {places[row]: token for row, token in found.items()}

    def _take(
        self, row: Row, guesses: list[int], logits: Tensor, best: list[int], first: int, sampled: int | None
    ) -> None:
        """A row's next token, chosen from ``logits[first]``, and as many more as were guessed rightly; ``sampled`` is
        the first of them where it was drawn."""
        for at, guess in enumerate([*guesses, None], first):
            row.done += 1
            each = logits[at : at + 1]
            if row.chooser is not None and row.chooser.plain:
                token = best[at]
            else:
                token = row.choose(each) if sampled is None else sampled
            sampled = None
            self._append(row, token, each)
            if guess is not None:
                row.guesses.was(token == guess)
            if token != guess or row.finish_reason is not None:
                return

    def _guessed(self, rows: list[Row]) -> list[list[int]]:
        """Guesses of what each row's text goes on with, as many as a batch has room for: what would else only fill it
        up costs nothing, and up to FEW rows little more than one."""
        empty = padded(len(rows), self.sizes) - len(rows)
        room = min(max(FEW, len(rows) + empty), self.sizes[-1]) - len(rows)
        found = []
        for left, row in zip(range(len(rows), 0, -1), rows):
            share = -(-room // left)
            if row.guesses.rate < LEAST:
                share = min(share, empty)
            # None past the row's room, nor past where LongRoPE turns all positions by other angles.
            share = min(share, row.limit - len(row.new) - 1)
            if row.done < self.long_after:
                share = min(share, self.long_after - row.done - 1)
            found.append(row.guesses.next(share) if share > 0 else [])
            room, empty = room - len(found[-1]), max(0, empty - len(found[-1]))
        return found

    def _forward(self, rows: list[Row], guessed: list[list[int]]) -> Tensor:
        """The logits (n, V) behind the last token of each row, and behind each of its guesses."""
        table = []
        for row, guesses in zip(rows, guessed, strict=True):
            assert row.span is not None
            for at, token in enumerate([row.new[-1], *guesses], row.done):
                table.append([token, row.span.start, at + 1, row.span.start + at])
        count = len(table)
        table += [[0, 0, 0, self.pool.tokens]] * (padded(count, self.sizes) - count)
        return self.step_of(torch.tensor(table).t().contiguous())[:count]

    def _append(self, row: Row, token: int, logits: Tensor) -> None:
        """A row's next token is chosen, from logits (1, V)."""
        row.last_token = time.perf_counter()
        if row.first_token is None:
            row.first_token = row.last_token
        if row.sampling.logprobs is not None:
            ((logprob, top),) = logprobs_of(logits, [token], row.sampling.logprobs)
            row.logprobs.append(TokenLogprob(token, logprob, top, row.offset()))
        if token in row.ends:
            self._finish(row, "stop")
            return
        row.new.append(token)
        row.guesses.add(token)
        if row.stopped():
            self._finish(row, "stop")
        elif len(row.new) >= row.limit:
            self._finish(row, "length")

    def _fail(self, row: Row, problem: Exception) -> None:
        row.error = problem
        self._finish(row, "error")

    def _finish(self, row: Row, reason: str) -> None:
        row.finish_reason = reason
        for rows in (self._filling, self._decoding):
            if row in rows:
                rows.remove(row)
        if row.span is not None:
            self.pool.give_back(row.span, keep=reason != "error")
            row.span = None
        row.chooser = None


def _default_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_BYTES
