"""Intervals cover what they should, the paired test holds its level, and both are the same on every run."""

from __future__ import annotations

import numpy as np
import pytest

from afina.engine.intervals import bootstrap, paired, ratio, verdict


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.2 * half)


def test_intervals_cover_the_truth_in_about_95_of_100_sets() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        found = bootstrap(draw.random(80) < 0.3, samples=400, seed=seed)
        hits += found.low <= 0.3 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.arange(30.0) % 7
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    # Raw bits, which numpy promises never to change; so these figures hold in every version of it.
    assert bootstrap([0.0, 1.0, 2.0, 4.0], samples=50, seed=5) == pytest.approx((1.75, 0.5, 2.94375))


def test_a_ratio_is_resampled_by_rows() -> None:
    """A row of many tokens counts as many: the mean of the rows' means would be 5.5."""
    pairs = [[10.0, 10.0], [10.0, 1.0]] * 20
    found = bootstrap(pairs, ratio)
    assert found.value == pytest.approx(20 / 11)
    assert found.low < 20 / 11 < found.high


def test_rows_without_spread_take_the_exact_bound() -> None:
    assert bootstrap([0.0] * 50) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 50)))
    assert bootstrap([1.0] * 50) == pytest.approx((1.0, 0.025 ** (1 / 50), 1.0))
    assert bootstrap([0.5] * 50) == (0.5, 0.5, 0.5)


def test_no_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="no row"):
        bootstrap([])
    with pytest.raises(ValueError, match="one shape"):
        paired([1.0, 2.0], [1.0])


def test_pairs_by_hand() -> None:
    before, after = [0.0] * 6 + [1.0] * 4, [1.0] * 6 + [1.0] * 3 + [0.0]
    found = paired(before, after, samples=20_000)
    assert found.difference == pytest.approx(0.5)
    assert (found.won, found.lost, found.tied) == (6, 1, 3)
    # Sign flips of seven rows: a difference of 5 rows or more either way in 2 * (1 + 7) of 2 ** 7.
    assert found.p == pytest.approx(16 / 128, abs=0.01)
    assert verdict(found) == "no difference"


def test_verdicts() -> None:
    many = np.arange(200) % 10
    better = paired(many < 3, many < 6)
    assert verdict(better) == "better"
    assert verdict(better, higher_is_better=False) == "worse"
    assert verdict(paired(many < 6, many < 3)) == "worse"
    assert verdict(paired(many, many)) == "no difference"
    # Three rows out of three: the bootstrap sees no spread, but chance alone does that one time in four.
    assert paired([0.0] * 3, [1.0] * 3)[:3] == (1.0, 1.0, 1.0)
    assert verdict(paired([0.0] * 3, [1.0] * 3)) == "no difference"


def test_the_test_holds_its_level_where_nothing_changed() -> None:
    draw = np.random.default_rng(2)
    found = [paired(*draw.normal(size=(2, 60)), samples=400, seed=seed).p for seed in range(200)]
    assert np.mean(np.array(found) <= 0.05) <= 0.09
    assert 0.4 <= np.mean(found) <= 0.6


def test_a_statistic_of_columns_is_paired_too() -> None:
    draw = np.random.default_rng(3)
    tokens = draw.integers(1, 50, 100).astype(float)
    before = np.stack([tokens * draw.normal(3.0, 0.3, 100), tokens], axis=1)
    after = before - np.stack([0.5 * tokens, np.zeros(100)], axis=1)
    found = paired(before, after, ratio, samples=500)
    assert found.difference == pytest.approx(-0.5)
    assert (found.low, found.high) == (pytest.approx(-0.5), pytest.approx(-0.5))
    assert (found.won, found.lost, found.tied) == (0, 100, 0)
    assert found.p == pytest.approx(1 / 501)
