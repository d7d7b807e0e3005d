"""How sure a figure is: bootstrap intervals over rows, and a paired test of two models on the same rows.

The percentile bootstrap (Efron and Tibshirani 1993) draws as many rows as there are, with replacement, and takes the
figure again; the middle 95 % of these figures are the interval. The test (Fisher's randomisation; Riezler and Maxwell
2005 for scores of a corpus) exchanges the two models' results in random rows: p is how often chance alone gives a
difference as large as the one found. Seeded, with raw random bits that are the same in every version of numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Statistic = Callable[[Values], float]
LEVEL = 0.95
SAMPLES = 2000
_AT_ONCE = 1 << 21  # numbers that are drawn at a time


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """What changed from one model to another on the same rows: ``difference`` (after - before) with its 95 % interval,
    ``p`` two-sided, and in how many rows the value rose, fell and stayed."""

    difference: float
    low: float
    high: float
    p: float
    won: int
    lost: int
    tied: int


def mean(values: Values) -> float:
    """The mean of values (rows,)."""
    return float(values.mean())


def ratio(values: Values) -> float:
    """The sum of the first column over that of the second, of values (rows, 2): a mean over what rows hold many of."""
    total, count = values.sum(0)
    return float(total / count)


def bootstrap(values: ArrayLike, statistic: Statistic = mean, *, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """``statistic`` of values (rows,) or (rows, k) and its 95 % percentile interval over rows.

    Rows that are all 0 or all 1 leave the bootstrap no spread, so a mean of those takes the exact bound of Clopper and
    Pearson (1934) instead. Raises ValueError where there is no row.
    """
    rows = _rows(values)
    found = statistic(rows)
    if statistic is mean and (rows == rows[0]).all() and rows[0] in (0.0, 1.0):
        far = ((1 - LEVEL) / 2) ** (1 / len(rows))
        return Interval(found, *((far, 1.0) if found else (0.0, 1 - far)))
    return Interval(found, *_middle(_resampled(rows, statistic, samples, seed)))


def paired(
    before: ArrayLike, after: ArrayLike, statistic: Statistic = mean, *, samples: int = SAMPLES, seed: int = 0
) -> Paired:
    """``after`` - ``before`` of two models' values on the same rows, each (rows,) or (rows, k).

    A row is won where its own statistic rose. Raises ValueError where the rows are not as many, or none.
    """
    one, two = _rows(before), _rows(after)
    if one.shape != two.shape:
        raise ValueError(f"values of the same rows have one shape; found {one.shape} and {two.shape}")
    difference = statistic(two) - statistic(one)
    both = np.stack([one, two], axis=1)  # (rows, 2, ...)

    def change(pairs: Values) -> float:
        return statistic(pairs[:, 1]) - statistic(pairs[:, 0])

    if statistic is mean:  # a mean of differences: no need to draw pairs
        low, high = _middle(_resampled(two - one, mean, samples, seed))
    else:
        low, high = _middle(_resampled(both, change, samples, seed))
    # A rounding of a sum must not make an equal difference look smaller.
    reached = abs(difference) * (1 - 1e-9)
    flips = _flips(len(one), samples, seed)
    if statistic is mean:
        differences = two - one
        changes = np.array([float(np.where(flip, -differences, differences).mean()) for flip in flips])
    else:
        changes = np.array([change(np.where(_like(flip, both), both[:, ::-1], both)) for flip in flips])
    as_large = int((np.abs(changes) >= reached).sum())
    moved = np.array([statistic(b[None]) - statistic(a[None]) for a, b in zip(one, two)])
    won, lost = int((moved > 0).sum()), int((moved < 0).sum())
    return Paired(difference, low, high, (as_large + 1) / (samples + 1), won, lost, len(one) - won - lost)


def verdict(found: Paired, *, higher_is_better: bool = True) -> str:
    """ "better", "worse" or "no difference": the interval of the difference leaves 0 out, and p is at most 0.05 (the
    bootstrap of a handful of rows is too sure of itself, the test is not)."""
    if found.low <= 0 <= found.high or found.p > 1 - LEVEL:
        return "no difference"
    return "better" if (found.difference > 0) == higher_is_better else "worse"


def _rows(values: ArrayLike) -> Values:
    rows = np.asarray(values, np.float64)
    if rows.ndim == 0 or not len(rows):
        raise ValueError("no row to measure")
    return rows


def _middle(figures: Values) -> tuple[float, float]:
    low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(rows: Values, statistic: Callable[[Values], float], samples: int, seed: int) -> Values:
    """``statistic`` of ``samples`` sets of rows drawn with replacement."""
    bits, count = _bits(seed, 0), len(rows)
    found: list[Any] = []
    while len(found) < samples:
        sets = min(samples - len(found), max(1, _AT_ONCE // count))
        drawn = (bits.random_raw(sets * count) % np.uint64(count)).astype(np.intp).reshape(sets, count)
        found += rows[drawn].mean(1).tolist() if statistic is mean else [statistic(rows[one]) for one in drawn]
    return np.array(found)


def _flips(count: int, samples: int, seed: int) -> Sequence[NDArray[np.bool_]]:
    """For each sample, in which of ``count`` rows the two models change places."""
    bits = _bits(seed, 1)
    words = -(-count // 64)
    raw = bits.random_raw(samples * words).reshape(samples, words).astype("<u8").view(np.uint8)
    return [np.unpackbits(row, count=count).astype(np.bool_) for row in raw]


def _like(flip: NDArray[np.bool_], values: Values) -> NDArray[np.bool_]:
    return flip.reshape(-1, *[1] * (values.ndim - 1))


def _bits(seed: int, purpose: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence([seed % 2**64, purpose]))
