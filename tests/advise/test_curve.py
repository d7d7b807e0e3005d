"""The range test's search, and short runs within their time."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import LINES, saved

from afina.advise.curve import FACTOR, MAX_RATES, Deadline, ShortRun, range_test, short_runs
from afina.engine.nonfinite import NonFiniteError
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


class Planted:
    """Stands for `Runs`: the loss is a parabola over the logarithm of the rate, each run takes a second."""

    def __init__(self, best: dict[str, float], finite_to: float = math.inf) -> None:
        self.best, self.finite_to, self.now = best, finite_to, 0.0
        self.train = range(4)

    def clock(self) -> float:
        return self.now

    def run(self, method: str, rate: float, steps: int, *rest: Any, end: float, **more: Any) -> ShortRun | None:
        self.now += 1
        if rate > self.finite_to:
            raise NonFiniteError
        if self.now > end:
            return None
        return ShortRun(Path(method), rate, math.log(rate / self.best[method]) ** 2, steps, False)


def search(runs: Planted, usual: dict[str, float], end: float = 100.0) -> tuple[list[Any], dict[str, ShortRun]]:
    return range_test(runs, usual, steps=20, end=end, say=lambda text: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("off", [FACTOR**2, FACTOR, 1.0, 1 / FACTOR, FACTOR**-3])
def test_the_search_goes_where_the_loss_falls(off: float) -> None:
    trials, best = search(Planted({"lora": 1e-3 * off}), {"lora": 1e-3})
    assert best["lora"].learning_rate == pytest.approx(1e-3 * off)
    assert len(trials) <= MAX_RATES
    assert len({trial.learning_rate for trial in trials}) == len(trials)


def test_the_search_ends_when_its_rates_are_used_up() -> None:
    trials, best = search(Planted({"lora": 1e6}), {"lora": 1e-3})
    assert len(trials) == MAX_RATES
    assert best["lora"].learning_rate == max(trial.learning_rate for trial in trials)


def test_a_rate_that_diverges_is_no_choice() -> None:
    trials, best = search(Planted({"lora": 1.0}, finite_to=2e-3), {"lora": 1e-3})
    assert best["lora"].learning_rate == 1e-3
    assert [math.isfinite(trial.loss) for trial in trials] == [True, False, True]
    assert search(Planted({"lora": 1.0}, finite_to=0.0), {"lora": 1e-3})[1] == {}


def test_methods_share_the_time() -> None:
    trials, best = search(Planted({"lora": 1e6, "full": 1e6}), {"lora": 1e-3, "full": 1e-4}, end=6.0)
    assert [trial.method for trial in trials] == ["lora"] * 3 + ["full"] * 3
    assert set(best) == {"lora", "full"}


def test_a_deadline_passes() -> None:
    times = iter([1.0, 2.0, 3.0])
    deadline = Deadline(2.0, lambda: next(times))
    assert [deadline.requested for _ in range(3)] == [False, True, True]


def short(tmp_path: Path, clock: Callable[[], float]) -> Any:
    model = saved(tmp_path / "tiny")
    rows = [{"prompt": line[:cut] + "\n", "completion": line} for line in LINES for cut in (3, 5, 7, 9, 11, 13)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(tmp_path / "rows.jsonl", load_tokenizer(model), max_length=96, val_size=0.25, progress=False)
    settings = {"model": str(model), "data": "rows", "max_length": 96}
    return short_runs(settings, data.train, data.dev, clock)


def test_runs_learn_from_the_rows_named_and_leave_nothing(tmp_path: Path) -> None:
    """A clock of whole seconds, one more each time it is asked: what is planned with it is exact."""
    ticks = itertools.count()
    with short(tmp_path, lambda: float(next(ticks))) as runs:
        done = runs.run("lora", 1e-2, 6, np.arange(4), evaluations=2, end=math.inf)
        assert done is not None
        assert done.best.is_dir()
        assert (done.steps, done.learning_rate) == (6, 1e-2)
        assert done.loss < 100
        assert runs.seconds_per_step["lora"] > 0
        assert runs.overhead >= 0
        recipe = (done.best.parent / "recipe.yaml").read_text()
        assert "max_steps: 6" in recipe
        logged = [json.loads(line) for line in (done.best.parent / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in logged if "dev_loss" in row] == [0, 3, 6]
        assert {row["trained_tokens"] for row in logged if "loss" in row} == {int(runs.train.loss_tokens[:4].sum())}
        folder = runs.folder
    assert not folder.exists()


def test_a_run_ends_with_its_time(tmp_path: Path) -> None:
    ticks = itertools.count()
    with short(tmp_path, lambda: float(next(ticks))) as runs:
        assert runs.run("lora", 1e-2, 50, np.arange(4), evaluations=1, end=8.0) is None  # before it measured anything
        done = runs.run("lora", 1e-2, 50, np.arange(4), evaluations=25, end=next(ticks) + 30)
        assert done is not None
        assert 2 <= done.steps < 30
