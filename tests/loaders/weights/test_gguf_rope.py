"""Llama 3.1's scaling of RoPE out of the factors that a GGUF file has of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import Raw, build

from afina.engine.model_config import RopeConfig
from afina.engine.rope_tables import inverse_frequencies
from afina.errors import ConfigError
from afina.loaders.weights.gguf_file import GGUFFile
from afina.loaders.weights.gguf_rope import ROPE_FACTORS, llama3_scaling, rope_factors

Scaling = tuple[int, float, float, float, float, int]  # dim, theta, factor, low, high, original length


def factors_of(dim: int, theta: float, factor: float, low: float, high: float, original: int) -> list[float]:
    rope = {
        "kind": "llama3", "dim": dim, "theta": theta, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, "original_max_positions": original,
    }  # fmt: skip
    return rope_factors({"ropes": (rope,)})


def scaling_of(folder: Path, factors: Any, dim: int, theta: float) -> dict[str, Any]:
    data = np.array(factors, dtype=np.float32).tobytes()
    (folder / "m").write_bytes(build([], [Raw(ROPE_FACTORS, (len(factors),), 0, data)]).data)
    return llama3_scaling(GGUFFile(folder / "m"), dim, theta)


def frequencies(dim: int, theta: float, scaling: dict[str, Any]) -> torch.Tensor:
    return inverse_frequencies(
        RopeConfig(
            "llama3",
            theta,
            dim,
            factor=scaling["factor"],
            original_max_positions=scaling["original_max_position_embeddings"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
        )
    )


@pytest.mark.parametrize(
    "made",
    [
        (128, 500_000.0, 8.0, 1.0, 4.0, 8192),  # Llama 3.1 8B and 70B
        (64, 500_000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 1B
        (128, 500_000.0, 32.0, 1.0, 4.0, 8192),  # Llama 3.2 3B
        (64, 500_000.0, 8.0, 1.0, 4.0, 131_072),
        (128, 10_000.0, 2.5, 1.0, 4.0, 3000),  # no power of two
        (128, 500_000.0, 8.0, 1.0, 8.0, 8192),
        (128, 500_000.0, 8.0, 1.0, 2.5, 4096),
        (24, 10_000.0, 8.0, 1.0, 4.0, 32),  # few pairs, of which one is in the middle
        (8, 500_000.0, 8.0, 1.0, 4.0, 8192),  # and none
    ],
)
def test_scalings_come_back(made: Scaling, tmp_path: Path) -> None:
    dim, theta, factor, low, high, original = made
    found = scaling_of(tmp_path, factors_of(*made), dim, theta)
    expected = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    exact = expected | {"rope_type": "llama3", "original_max_position_embeddings": original}
    if dim > 8:
        assert found == exact
    assert torch.equal(frequencies(dim, theta, found), frequencies(dim, theta, exact))


def test_only_the_ratios_of_the_three_lengths_count(tmp_path: Path) -> None:
    made = (128, 500_000.0, 8.0, 2.0, 8.0, 8192)  # the same as 1, 4 and 4096
    found = scaling_of(tmp_path, factors_of(*made), 128, 500_000.0)
    assert (found["low_freq_factor"], found["high_freq_factor"]) == (1.0, 4.0)
    assert found["original_max_position_embeddings"] == 4096


def test_as_llama_cpps_converter_computes_them(tmp_path: Path) -> None:
    """In float32, by wavelengths."""
    dim, base, factor, low, high, original = 128, 500_000.0, 8.0, 1.0, 4.0, 8192
    factors = []
    for freq in 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * np.pi / freq
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    found = scaling_of(tmp_path, factors, dim, base)
    assert (found["factor"], found["high_freq_factor"], found["original_max_position_embeddings"]) == (8.0, 4.0, 8192)


def test_no_scaling(tmp_path: Path) -> None:
    assert scaling_of(tmp_path, [1.0] * 32, 64, 1e4) == {}


def test_all_scaled_alike(tmp_path: Path) -> None:
    """Linear scaling is Llama 3.1's with an original length that no pair turns in."""
    found = scaling_of(tmp_path, [8.0] * 32, 64, 1e4)
    assert torch.allclose(frequencies(64, 1e4, found), 1e4 ** -(torch.arange(0, 64, 2) / 64) / 8, rtol=1e-6)


GOOD = factors_of(64, 500_000.0, 8.0, 1.0, 4.0, 8192)
REFUSED: dict[str, tuple[list[float], str]] = {
    "another size": (GOOD[:-1], r"is F32 \(31,\), expected F32 \(32,\)"),
    "NaN": ([*GOOD[:-1], float("nan")], "not finite or below 1"),
    "below 1": ([0.5, *GOOD[1:]], "not finite or below 1"),
    "one is off": ([*GOOD[:14], GOOD[14] * 1.01, *GOOD[15:]], "of no scaling as in Llama 3.1"),
    "a line": (np.linspace(1, 8, 32).tolist(), "of no scaling"),
    "backwards": (GOOD[::-1], "of no scaling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_factors_of_another_kind(case: str, tmp_path: Path) -> None:
    factors, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=rf"tensor rope_freqs.weight .*{expected}.*: use the model in another format"):
        scaling_of(tmp_path, factors, 64, 500_000.0)


def test_random_factors_are_refused_or_reproduced(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        factors = np.sort(np.exp(rng.normal(scale=2, size=32) ** 2)) if rng.random() < 0.5 else 1 + rng.random(32)
        with pytest.raises(ConfigError, match="use the model in another format"):
            scaling_of(tmp_path, factors, 64, float(10 ** rng.uniform(2, 7)))
