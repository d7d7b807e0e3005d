"""Keys and values of many rows in one memory of fixed size: each row has a span as long as it can become.

A span is one piece, so a row's attention reads it as it lies. It is given out when a row is admitted, first fit, and
taken back when the row is done. What it holds stays until the room is needed: a later prompt that begins with the same
tokens copies it. What may be copied ends at a boundary of the prompt's chunks, and its key is a digest of all tokens up
to there and of where the boundaries before it were: only then would computing it again give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.engine.model_config import ModelConfig
from afina.kernels.attention import attention
from afina.kernels.decode import decode_attention

CPU_BYTES = 1 << 30  # what a cache takes at most where nobody says it; a GPU gives half of what is free


@dataclass(eq=False)
class Span:
    """Room for ``stop - start`` tokens of one row. ``keys`` are those of the boundaries that are computed in it."""

    start: int
    stop: int
    running: bool = True
    used: int = 0
    keys: list[bytes] = field(default_factory=list)
    last: Tensor | None = None  # (C,): the hidden state of the prompt's last token, once that is computed


class Places(NamedTuple):
    """Where the tokens of one forward pass go, as ``GPT.hidden`` asks for it: see ``kv_cache.Slots``."""

    positions: Tensor  # (B, T) int64: of each token in its row
    totals: Tensor  # (B, T) int64: how long the row is taken to be, which matters for LongRoPE
    longest: int


class KVPool:
    """Room for ``tokens`` tokens; ``nbytes`` is what it takes. One more token is there to write to in vain."""

    def __init__(self, config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.tokens = tokens
        shape = (config.num_layers, 2, config.num_kv_heads, tokens + 1, config.head_dim)
        self.memory = torch.empty(shape, device=device, dtype=dtype)
        self.memory[..., -1, :] = 0
        self.layers = [(keys.transpose(0, 1), values.transpose(0, 1)) for keys, values in self.memory]
        self.spans: list[Span] = []  # in the order of their places
        self.known: dict[bytes, list[Span]] = {}
        self.clock = itertools.count(1)

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @staticmethod
    def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """What the keys and values of one token take."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize

    def take(self, length: int, keep: Span | None = None) -> Span | None:
        """A span of ``length`` tokens, or None while running rows leave no such room. The spans of rows that are done
        make room for it, the longest unused first and ``keep`` last."""
        while (at := self._hole(length)) is None:
            done = [span for span in self.spans if not span.running]
            if not done:
                return None
            self._remove(min(done, key=lambda span: (span is keep, span.used)))
        index, start = at
        span = Span(start, start + length)
        self.spans.insert(index, span)
        return span

    def give_back(self, span: Span, *, keep: bool) -> None:
        """The row of a span is done; ``keep``: what it holds may serve others, until the room is needed."""
        span.running, span.used = False, next(self.clock)
        if not keep or not span.keys:
            self._remove(span)

    def clear(self) -> None:
        """Give up what the spans of rows that are done hold."""
        for span in [span for span in self.spans if not span.running]:
            self._remove(span)

    def _hole(self, length: int) -> tuple[int, int] | None:
        start = 0
        for index, span in enumerate(self.spans):
            if span.start - start >= length:
                return index, start
            start = span.stop
        return (len(self.spans), start) if self.tokens - start >= length else None

    def _remove(self, span: Span) -> None:
        self.spans.remove(span)
        self.forget(span)

    def forget(self, span: Span) -> None:
        """What a span holds is not to be copied any more."""
        for key in span.keys:
            self.known[key].remove(span)
            if not self.known[key]:
                del self.known[key]
        span.keys, span.last = [], None

    def record(self, span: Span, key: bytes) -> None:
        """A chunk more of a span is computed; ``key`` says which tokens it begins with now."""
        span.keys.append(key)
        self.known.setdefault(key, []).append(span)

    def find(self, key: bytes, *, whole: bool) -> Span | None:
        """A span that begins with the tokens of ``key``; ``whole``: whose prompt ends with them."""
        found = self.known.get(key, ())
        return next((span for span in found if not whole or (span.last is not None and span.keys[-1] == key)), None)

    def copy(self, source: Span, target: Span, first: int, last: int) -> None:
        """Copy the tokens ``first:last`` of one span to another."""
        source.used = next(self.clock)
        size = last - first
        into, out_of = target.start + first, source.start + first
        self.memory[..., into : into + size, :] = self.memory[..., out_of : out_of + size, :]


class ChunkCache:
    """A chunk of one row's prompt goes into its span: the cache that ``GPT.hidden`` takes for ids (1, T)."""

    def __init__(self, pool: KVPool, span: Span, done: int, total: int) -> None:
        self.pool, self.start, self.done, self.total = pool, span.start, done, total

    def slots(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Places:
        count = input_ids.shape[1]
        positions = torch.arange(self.done, self.done + count, device=input_ids.device)[None]
        return Places(positions, torch.full_like(positions, self.total), self.total)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Places, **options: Any) -> Tensor:
        keys, values = self.pool.layers[layer]
        first = self.start + self.done
        end = first + k.shape[1]
        keys[first:end] = k[0]
        values[first:end] = v[0]
        return attention(q, keys[None, self.start : end], values[None, self.start : end], **options)

    def advance(self, input_ids: Tensor, slots: Places) -> None:
        """The batcher counts itself."""

    def restart(self, input_ids: Tensor, slots: Places) -> None:
        """Never: the batcher watches LongRoPE's limit itself, row by row."""


class StepCache(ChunkCache):
    """One token more for each of several rows: the cache that ``GPT.hidden`` takes for ids (B, 1).

    Each tensor is int64 (B,). ``lengths`` counts the new token; a row of length 0 is none: it fills the batch up.
    """

    def __init__(self, pool: KVPool, starts: Tensor, lengths: Tensor, places: Tensor, longest: int) -> None:
        self.pool, self.starts, self.lengths, self.places = pool, starts, lengths.int(), places
        self.positions = (lengths - 1).clamp(min=0)[:, None]
        self.totals, self.longest = lengths[:, None], longest

    def slots(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Places:
        return Places(self.positions, self.totals, self.longest)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Places, **options: Any) -> Tensor:
        keys, values = self.pool.layers[layer]
        keys.index_copy_(0, self.places, k[:, 0])
        values.index_copy_(0, self.places, v[:, 0])
        return decode_attention(
            q[:, 0], keys, values, self.lengths, starts=self.starts, longest=self.longest, **options
        )[:, None]
