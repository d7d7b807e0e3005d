"""Llama 3.1's scaling of RoPE, which a GGUF file holds as a tensor of factors: there and back.

llama.cpp divides the angle of each pair by its factor, and knows nothing of how the factors were made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from afina.errors import ConfigError
from afina.loaders.families.common import Fields
from afina.loaders.weights.gguf_file import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"


def rope_factors(fields: Fields) -> list[float]:
    """The values of ``rope_freqs.weight``; none where the model's RoPE is not scaled as Llama 3.1's."""
    rope = fields["ropes"][0] if fields.get("ropes") else {}
    if rope.get("kind") != "llama3":
        return []
    names = ("dim", "theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
    return _llama3_factors(*(rope[name] for name in names))


def _llama3_factors(dim: int, theta: float, factor: float, low: float, high: float, original: float) -> list[float]:
    """What llama.cpp divides the angle of each pair by."""
    factors = []
    for i in range(0, dim, 2):
        turns = original / (2 * math.pi * theta ** (i / dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def llama3_scaling(file: GGUFFile, dim: int, theta: float) -> dict[str, Any]:
    """The scaling that the factors of ``rope_freqs.weight`` are of.

    With 1/factor = (1 - s) / F + s and s = clamp((L u - low) / (high - low), 0, 1), where u turns a pair makes at one
    position, F is the largest factor, and only the ratios of L, low and high count: low is 1, as in Llama 3.1. The
    middle pairs, 0 < s < 1, then give the other two. Raises ConfigError where no such scaling gives these factors.
    """

    def bad(found: str) -> ConfigError:
        return ConfigError(f"{file.path}: tensor {ROPE_FACTORS} {found}: use the model in another format")

    if file.kind(ROPE_FACTORS) != "F32" or file.shape(ROPE_FACTORS) != (dim // 2,):
        is_now = f"is {file.kind(ROPE_FACTORS)} {file.shape(ROPE_FACTORS)}"
        raise bad(f"{is_now}, expected F32 ({dim // 2},), half of the head's dimension")
    factors = file.read(ROPE_FACTORS).double().numpy()
    if not np.isfinite(factors).all() or factors.min() < 1 - 1e-6:
        raise bad("holds factors that are not finite or below 1")
    if factors.max() < 1 + 1e-6:
        return {}
    factor = float(factors.max())
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    turns = np.array([theta ** (-i / dim) / (2 * math.pi) for i in range(0, dim, 2)])
    middle = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    for high, original in _candidates(smooth, turns, middle):
        found = _llama3_factors(dim, theta, factor, 1.0, high, original)
        if np.allclose(found, factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise bad("holds factors that are of no scaling as in Llama 3.1")


def _candidates(smooth: Any, turns: Any, middle: Any) -> Iterator[tuple[float, int]]:
    """Values of high_freq_factor and original_max_position_embeddings that may have made ``smooth``."""
    highs = [4.0]  # of every Llama so far
    if middle.sum() >= 2:
        # A line through the first and the last: smooth = (L * turns - 1) / (high - 1).
        (first, *_, last), (begin, *_, end) = turns[middle].tolist(), smooth[middle].tolist()
        offset = begin - first * (end - begin) / (last - first) if first != last else 0.0
        high = 1 - 1 / offset if offset < 0 else 1.0
        highs += [x for digits in (1, 2, 3, 4, 17) if 1.001 < (x := float(f"{high:.{digits}g}")) < 1e6]
    for high in highs:
        if middle.any():
            length = float(np.median((smooth[middle] * (high - 1) + 1) / turns[middle]))
        else:  # from the first pair that is not scaled to the last that is: any length between does the same
            least = high / turns[smooth > 0.5].min(initial=math.inf)
            most = 1 / turns[smooth < 0.5].max(initial=0.0)
            length = 2.0 ** math.floor(math.log2(most)) if least <= most < math.inf else least
        if 1 <= length < 2**31:
            power = 2 ** round(math.log2(length))
            yield from ((high, power), (high, round(length)))
