"""Keys and values of the tokens already seen, so that generation computes each token once."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from afina.engine.model_config import ModelConfig
from afina.engine.rope_tables import packed_positions
from afina.kernels.attention import attention
from afina.kernels.decode import decode_attention


@dataclass
class Slots:
    """Where the tokens of one forward pass go: (row, position) of each, shaped like the input ids, int64."""

    rows: Tensor
    positions: Tensor
    lengths: Tensor  # (B,) int32: tokens in each row afterwards
    cu_seqlens: Tensor | None
    longest: int  # no row is longer afterwards

    @property
    def totals(self) -> Tensor:
        """How long the row of each token is afterwards, int64, shaped like the input ids."""
        return self.lengths.long()[self.rows]


class Cache(Protocol):
    """What ``GPT.hidden`` asks of a cache: ``slots`` says where new tokens go, ``attend`` stores a layer's keys and
    values and attends to all that is stored, ``advance`` counts the new tokens once all layers have stored them. Where
    what is stored does not hold any more, ``restart`` gives what is to be computed again, and else None.

    The slots that it makes have ``positions`` and ``totals``, shaped like the ids, and ``longest``.
    """

    def slots(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Any: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Any, **options: Any) -> Tensor: ...

    def advance(self, input_ids: Tensor, slots: Any) -> None: ...

    def restart(self, input_ids: Tensor, slots: Any) -> tuple[Tensor, Tensor, Tensor] | None: ...


class KVCache:
    """Room for ``max_length`` tokens in each of ``batch`` rows, which may be of different length.

    ``lengths`` (B,) int32 counts the tokens of each row. Fill it by passing it to ``GPT.forward`` or ``GPT.hidden``:
    with input ids (B, T) every row grows by T tokens; with packed ids (1, T) and cu_seqlens of B documents, row i grows
    by document i (which may be empty). Without gradient.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch, max_length, config.num_kv_heads, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.max_length = max_length
        self.longest = 0
        # LongRoPE turns all positions of a sequence by other angles once it is longer than the original maximum. What
        # is cached is wrong then, so the ids are kept to compute it again.
        self.limits = [rope.original_max_positions for rope in config.ropes if rope.kind == "longrope"]
        self.ids = torch.zeros(batch, max_length, dtype=torch.int64, device=device) if self.limits else None

    def slots(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Slots:
        """Places for new tokens (B, T), or (1, T) packed. Raises ``ValueError`` where they do not fit."""
        batch = self.lengths.shape[0]
        before = self.lengths.long()
        if cu_seqlens is None:
            if input_ids.shape[0] != batch:
                raise ValueError(f"input_ids: expected {batch} rows as in the cache, found {input_ids.shape[0]}")
            grown = input_ids.shape[1]
            positions = before[:, None] + torch.arange(grown, device=input_ids.device)
            rows = torch.arange(batch, device=input_ids.device)[:, None].expand_as(positions)
            lengths = self.lengths + grown
        else:
            if cu_seqlens.numel() != batch + 1:
                found = cu_seqlens.numel() - 1
                raise ValueError(f"cu_seqlens: expected {batch} documents as the cache has rows, found {found}")
            document, within, _ = packed_positions(cu_seqlens, input_ids.shape[1])
            rows, positions = document[None], (before[document] + within)[None]
            counts = cu_seqlens.diff()
            lengths, grown = self.lengths + counts, int(counts.max())
        longest = self.longest + grown
        if longest > self.max_length:  # The sum is an upper bound; reading the rows themselves waits for the GPU.
            longest = int(lengths.max())
        if longest > self.max_length:
            raise ValueError(f"cache: {longest} tokens do not fit into max_length = {self.max_length}")
        return Slots(rows, positions, lengths, cu_seqlens, longest)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Slots, **options: Any) -> Tensor:
        """Store k and v (B, T, Hkv, D), and attend from q (B, T, Hq, D) to all that is stored -> like q."""
        keys, values = self.keys[layer], self.values[layer]
        keys[slots.rows, slots.positions] = k
        values[slots.rows, slots.positions] = v
        if slots.cu_seqlens is None and q.shape[1] == 1:
            return decode_attention(q[:, 0], keys, values, slots.lengths, **options)[:, None]
        if self.longest == 0:
            if slots.cu_seqlens is None:
                return attention(q, k, v, **options)
            return attention(q[0], k[0], v[0], cu_seqlens=slots.cu_seqlens, **options)[None]
        # This chunk follows others, and the rows differ in length: neighbours that are alike attend together.
        flat, starts = q.flatten(0, 1), slots.cu_seqlens
        if starts is None:
            starts = torch.arange(q.shape[0] + 1) * q.shape[1]
        bounds, pieces, first = starts.tolist(), [], 0
        shapes = [(stop - start, end) for start, stop, end in zip(bounds, bounds[1:], slots.lengths.tolist())]
        for (new, end), alike in itertools.groupby(shapes):
            last = first + len(list(alike))
            queries = flat[bounds[first] : bounds[last]].view(last - first, new, *flat.shape[1:])
            pieces.append(attention(queries, keys[first:last, :end], values[first:last, :end], **options).flatten(0, 1))
            first = last
        return torch.cat(pieces).view(q.shape)

    def advance(self, input_ids: Tensor, slots: Slots) -> None:
        """Count the new tokens, once all layers have stored them."""
        if self.ids is not None:
            self.ids[slots.rows, slots.positions] = input_ids
        self.lengths, self.longest = slots.lengths, slots.longest

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (n,) int64, in this order."""
        for tensors in (self.keys, self.values):
            for layer, x in enumerate(tensors):  # One layer at a time, so that old and new need not fit together.
                tensors[layer] = x[rows]
        self.lengths = self.lengths[rows]
        if self.ids is not None:
            self.ids = self.ids[rows]

    def fanned(self, rows: Tensor) -> KVCache:
        """A new cache of these rows (n,) int64, which may repeat, as one prompt does that goes on in several ways; this
        one stays as it is."""
        other = copy.copy(self)
        other.keys, other.values = list(self.keys), list(self.values)
        other.keep(rows)
        return other

    def restart(self, input_ids: Tensor, slots: Slots) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the new tokens make a row so long that what is cached of it no longer holds (LongRoPE), empty the
        cache, and give all tokens to compute again, the new ones included: packed ids (1, N), cu_seqlens (B + 1,), and
        the places of the new tokens among them, shaped like ``input_ids``. None where all holds."""
        if self.ids is None or not any(
            slots.longest > limit
            and bool(((self.lengths > 0) & (self.lengths <= limit) & (slots.lengths > limit)).any())
            for limit in self.limits
        ):
            return None
        self.advance(input_ids, slots)
        lengths = self.lengths.long()
        kept = torch.arange(self.max_length, device=lengths.device) < lengths[:, None]
        packed = self.ids[kept][None]
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        new = cu_seqlens[slots.rows] + slots.positions
        self.lengths, self.longest = torch.zeros_like(self.lengths), 0
        return packed, cu_seqlens.int(), new
