"""Positions of packed and cached tokens, and the rotary tables that follow from them.

Everything here is float32 whatever the model's dtype: a bf16 inverse frequency is off by up to 0.4 %, which at position
1,000 is whole turns. The arithmetic follows the order of the reference implementations, because at position 100,000 one
rounding of an inverse frequency is 0.01 rad.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.engine.model_config import RopeConfig

BLOCK = 512  # positions whose angles are turned into a table at a time


def inverse_frequencies(rope: RopeConfig, *, long: bool = False) -> Tensor:
    """The angle a position adds to each pair of dimensions: float32 (dim / 2,), on the CPU.

    ``long`` selects LongRoPE's factors for sequences past the original maximum; other kinds ignore it.
    """
    steps = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    powers = rope.theta**steps
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.long_factor if long else rope.short_factor, dtype=torch.float32) * powers)
    inv_freq = 1.0 / powers
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inv_freq
        longest = rope.original_max_positions / rope.low_freq_factor
        shortest = rope.original_max_positions / rope.high_freq_factor
        smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
        return torch.where(
            wavelength > longest, inv_freq / rope.factor, torch.where(wavelength < shortest, inv_freq, between)
        )
    if rope.kind == "yarn":
        # Pairs that turn more than beta_fast times over the original context keep their frequency, those that turn
        # less than beta_slow times are interpolated, with a linear ramp between.
        def pair_of(turns: float) -> float:
            return (rope.dim * math.log(rope.original_max_positions / (turns * 2 * math.pi))) / (
                2 * math.log(rope.theta)
            )

        low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        width = (high - low) or 0.001
        keep = 1 - torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width, 0, 1)
        return 1.0 / (rope.factor * powers) * (1 - keep) + inv_freq * keep
    return inv_freq


class RopeTables:
    """Computes cos and sin of one RoPE. It is no module, so that ``Module.to(dtype)`` never rounds the inverse
    frequencies, which it keeps for each device."""

    def __init__(self, rope: RopeConfig) -> None:
        self.rope = rope
        self._inv_freq: dict[tuple[torch.device, bool], Tensor] = {}
        self._made: dict[tuple[torch.device, bool], tuple[Tensor, Tensor]] = {}

    def inv_freq(self, device: torch.device, *, long: bool = False) -> Tensor:
        key = (device, long)
        if key not in self._inv_freq:
            self._inv_freq[key] = inverse_frequencies(self.rope, long=long).to(device)
        return self._inv_freq[key]

    def __call__(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """positions (..., T) and the lengths of the sequences they stand in, likewise -> cos, sin (..., T, dim / 2).

        The length matters for LongRoPE only, which turns every position of a long sequence by other angles.
        """
        at = positions[..., None].float()
        angles = at * self.inv_freq(positions.device)
        if self.rope.kind == "longrope":
            long = (lengths > self.rope.original_max_positions)[..., None]
            angles = torch.where(long, at * self.inv_freq(positions.device, long=True), angles)
        if self.rope.attention_factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.rope.attention_factor, angles.sin() * self.rope.attention_factor

    def looked_up(self, positions: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The same from tables, so that the numbers of a position do not depend on the others that are asked for:
        vector code and what it leaves over may round a cosine differently. No position is ``longest`` or more."""
        cos, sin = (F.embedding(positions, table) for table in self._tables(positions.device, longest, False))
        if self.rope.kind == "longrope" and longest > self.rope.original_max_positions:
            long = (lengths > self.rope.original_max_positions)[..., None]
            more = (F.embedding(positions, table) for table in self._tables(positions.device, longest, True))
            cos, sin = (torch.where(long, far, near) for far, near in zip(more, (cos, sin)))
        return cos, sin

    def _tables(self, device: torch.device, longest: int, long: bool) -> tuple[Tensor, Tensor]:
        """cos and sin (n, dim / 2) of the positions up to ``longest`` at least, made BLOCK positions at a time."""
        cos, sin = self._made.get((device, long), (None, None))
        while cos is None or sin is None or len(cos) < longest:
            first = 0 if cos is None else len(cos)
            at = torch.arange(first, first + BLOCK, device=device)[:, None].float()
            angles = at * self.inv_freq(device, long=long)
            more = [f(angles) * self.rope.attention_factor for f in (torch.cos, torch.sin)]
            cos, sin = more if cos is None or sin is None else map(torch.cat, ((cos, more[0]), (sin, more[1])))
            self._made[device, long] = cos, sin
        return cos, sin


def packed_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """(document, position in it, length of it) of each of ``total`` packed tokens: three int64 (total,) tensors."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    document = torch.repeat_interleave(lengths, output_size=total)
    positions = torch.arange(total, device=cu_seqlens.device) - starts[document]
    return document, positions, lengths[document]
