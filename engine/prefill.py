"""How a prompt enters the cache: in chunks, of which those that are known already are copied.

Where a prompt is cut follows from the prompt alone, so the sizes of all that is computed of it do, and its numbers are
the same bits in any company. It is cut behind each turn of a conversation, so that prompts with the same system message
or the same earlier turns share them, and into no more than ``size`` tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afina.engine.kv_pool import ChunkCache, KVPool
from afina.engine.row import Row
from afina.engine.sampler import TokenLogprob, logprobs_of

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

ECHOED = 32  # prompt positions whose logits exist at a time
TURN = 32  # tokens that are worth a chunk of their own: it costs about what a step does
REST = 8  # less is no turn: only what opens the answer


class Prefill:
    """Computes prompts for a batcher, ``size`` tokens at a time. ``long_after``: the longest row whose positions
    LongRoPE turns by the angles of short ones."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, pool: KVPool, *, size: int, long_after: int) -> None:
        self.model, self.tokenizer, self.pool = model, tokenizer, pool
        self.size, self.long_after = size, long_after
        self.device = model.device
        self.turn_ends = frozenset(tokenizer.eos_ids)

    def boundaries(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Where the chunks of ``ids`` end, each with a digest of what decides the numbers of its tokens: their ids and
        those before, the boundaries, LongRoPE's angles, and the adapter that computes them."""
        digest = hashlib.blake2b(repr((len(ids) > self.long_after, id(self.model.adapter))).encode(), digest_size=16)
        first = 0
        while first < len(ids):
            end = self._end(ids, first)
            digest.update(repr(ids[first:end]).encode())
            yield end, digest.digest()
            first = end

    def _end(self, ids: Sequence[int], first: int) -> int:
        """Where the chunk that begins at ``first`` ends: with a turn, the first that is long enough, or when it is
        full."""
        end = min(first + self.size, len(ids))
        turns = (at + 1 for at in range(first + TURN - 1, min(end, len(ids) - REST)) if ids[at] in self.turn_ends)
        return next(turns, end)

    def chunk(self, row: Row) -> tuple[Tensor | None, int]:
        """Copy what is known of a row's prompt, and compute one chunk of the rest -> the hidden state (C,) of the
        prompt's last token if that is reached, and how many tokens were computed."""
        hidden = None if row.echo else self._copied(row)
        if not row.keys or row.span is None:
            return hidden, 0
        (end, key), *row.keys = row.keys
        count = end - row.done
        ids = torch.tensor([row.filling[row.done : end]], device=self.device)
        cache = ChunkCache(self.pool, row.span, row.done, len(row.filling))
        if row.echo:
            states = self.model.hidden(ids, cache=cache)[0]
            self._echo(row, states)
        else:
            states = self.model.hidden(ids, cache=cache, positions=torch.tensor([count - 1], device=self.device))
        row.done = end
        self.pool.record(row.span, key)
        if not row.keys:
            row.span.last = states[-1].clone()
        return row.span.last, count

    def _copied(self, row: Row) -> Tensor | None:
        """Copy the longest beginning of a row's prompt that another row has computed, chunk by chunk as this one would;
        the hidden state (C,) of the last token if that is all."""
        first, source, span = row.done, None, row.span
        assert span is not None
        while row.keys and (found := self.pool.find(row.keys[0][1], whole=len(row.keys) == 1)) is not None:
            source = found
            (row.done, key), *row.keys = row.keys
            self.pool.record(span, key)
        if source is None:
            return None
        self.pool.copy(source, span, first, row.done)
        row.cached_tokens += row.done - first
        span.last = None if row.keys else source.last
        return span.last

    def _echo(self, row: Row, states: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens that ``states`` (t, C), the latest chunk's, predict."""
        found = row.prompt_logprobs
        if found is None or len(found) == len(row.prompt):
            return
        if not found:
            found.append(TokenLogprob(row.prompt[0], None, [], 0))
        for part in states.split(ECHOED):
            tokens = row.prompt[len(found) : len(found) + len(part)]
            scores = logprobs_of(self.model.logits(part[: len(tokens)]), tokens, row.sampling.logprobs or 0)
            for token, (logprob, top) in zip(tokens, scores, strict=True):
                found.append(TokenLogprob(token, logprob, top, len(self.tokenizer.decode(row.prompt[: len(found)]))))
