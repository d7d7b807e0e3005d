"""engine/schedule.py: golden learning rates, counted in weight updates."""

from __future__ import annotations

import math

import pytest

from afina.engine.schedule import lr_factor

# 20 updates, 4 of warm-up, worked out by hand from the formulas in the module's text.
WARM = [1 / 5, 2 / 5, 3 / 5, 4 / 5]
GOLDEN = {
    "constant": WARM + [1.0] * 16,
    "linear": WARM + [(16 - i) / 16 for i in range(16)],
    "cosine": WARM + [0.5 + 0.5 * math.cos(math.pi * i / 16) for i in range(16)],
    "wsd": WARM + [1.0] * 12 + [1.0, 0.75, 0.5, 0.25],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_20_steps(kind: str) -> None:
    assert [lr_factor(kind, s, 20, 4) for s in range(20)] == pytest.approx(GOLDEN[kind], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_min_ratio_lifts_the_end(kind: str) -> None:
    assert lr_factor(kind, 20, 20, 4, min_ratio=0.1) == pytest.approx(0.1)
    assert lr_factor(kind, 4, 20, 4, min_ratio=0.1) == 1.0


def test_no_warmup_starts_at_the_peak_and_never_leaves_the_unit_interval() -> None:
    for kind in GOLDEN:
        assert lr_factor(kind, 0, 1, 0) == 1.0
        assert all(0.0 <= lr_factor(kind, s, 7, 7) <= 1.0 for s in range(10))
