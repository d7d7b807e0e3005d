"""afina/report/verdict.py: planted runs get the verdict that they deserve, and never a surer one."""

from __future__ import annotations

import numpy as np
import pytest

from afina.engine.dev_rows import DevRows, MetricRows
from afina.engine.intervals import Paired
from afina.report.verdict import ENOUGH, FORGOT, Forgetting, judge, judge_dev_loss


def planted(change: float, noise: float, rows: int = 100, seed: int = 0, **more: object) -> DevRows:
    """Dev rows whose mean loss changes by about ``change`` nats a token, each by a noise of its own besides."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 40, rows)
    before = draw.normal(3.0, 0.5, rows)
    after = before + change + draw.normal(0.0, noise, rows)
    where = [f"dev.jsonl: line {n + 1}" for n in range(rows)]
    return DevRows(where, tokens, before * tokens, after * tokens, 10, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "word"), [(-0.5, "better"), (0.5, "worse"), (0.0, "no difference"), (-0.005, "no difference")]
)
def test_planted_runs(change: float, word: str) -> None:
    judged = judge_dev_loss(planted(change, 0.3))
    assert judged.word == word
    assert judged.line.startswith(f"{word.capitalize()}: dev loss ")
    assert judged.found is not None
    assert judged.found.low < judged.found.difference < judged.found.high
    assert f"{judged.found.low:+.3f} to {judged.found.high:+.3f}, 100 dev rows)" in judged.line


def test_the_loss_is_that_of_all_tokens() -> None:
    rows = DevRows(["a", "b"], np.array([1, 9]), np.array([10.0, 9.0]), np.array([5.0, 9.0]), 1)
    judged = judge_dev_loss(rows)
    assert (judged.before, judged.after) == (1.9, 1.4)
    assert judged.to_dict()["difference"] == pytest.approx(-0.5)


def test_a_row_whose_loss_fell_has_won() -> None:
    found = judge_dev_loss(planted(-0.5, 0.01)).to_dict()
    assert (found["won"], found["lost"]) == (100, 0)


def test_a_few_rows_say_so_and_fewer_than_six_prove_nothing() -> None:
    assert "only 12 dev rows, so take it with care" in judge_dev_loss(planted(-0.5, 0.01, rows=12)).line
    for rows in range(1, 8):  # each of them much better
        judged = judge_dev_loss(planted(-0.5, 0.01, rows=rows))
        assert judged.word == ("better" if rows >= ENOUGH else "no difference")
        assert judged.line.startswith("Better: " if rows >= ENOUGH else "Too few rows to tell: ")


@pytest.mark.parametrize("rows", [None, DevRows(["a"], np.array([1]), np.array([2.0]))])
def test_what_was_not_measured_is_unknown(rows: DevRows | None) -> None:
    judged = judge(rows)
    assert judged.word == "unknown"
    assert judged.line.startswith("Unknown: ")


def test_a_loss_that_is_not_finite_is_unknown() -> None:
    rows = DevRows(["a", "b"], np.array([1, 1]), np.array([2.0, 2.0]), np.array([np.inf, 1.0]), 3)
    assert judge(rows).word == "unknown"


def test_the_metric_that_picked_the_model_decides() -> None:
    """The loss rose and the answers became right: by eval_metric the run is better."""
    before, after = np.zeros(60), (np.arange(60) % 3 > 0).astype(float)
    rows = planted(0.5, 0.1, metric=MetricRows("exact_match", before, after))
    judged = judge(rows)
    assert (judged.name, judged.word, judged.rows) == ("exact_match", "better", 60)
    assert judge_dev_loss(rows).word == "worse"
    assert judge(planted(0.5, 0.1, metric=MetricRows("exact_match", after, before))).word == "worse"


def test_metrics_of_the_corpus() -> None:
    pytest.importorskip("sacrebleu")
    from afina.engine.scores import chrf, corpus_counts

    wanted = ["the cat sat on the mat", "a dog barked"] * 10
    before, after = (corpus_counts("chrf", texts, wanted) for texts in (["no", "nothing"] * 10, wanted))
    judged = judge(planted(0.0, 0.1, metric=MetricRows("chrf", before, after)))
    assert judged.word == "better"
    assert judged.after == pytest.approx(chrf(wanted, wanted)[0])
    labels = np.arange(30) % 3
    right, wrong = (np.stack([guess, labels], axis=1).astype(float) for guess in (labels, np.zeros(30)))
    judged = judge(planted(0.0, 0.1, metric=MetricRows("macro_f1", wrong, right)))
    assert (judged.word, judged.after) == ("better", 1.0)
    assert judged.before == pytest.approx(1 / 6)


def test_a_metric_that_this_version_does_not_know() -> None:
    values = np.ones((20, 2))
    assert judge(planted(-0.5, 0.1, metric=MetricRows("other", values, values))).name == "dev loss"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (FORGOT + 0.01, FORGOT + 0.3, "yes"),
        (-0.05, FORGOT - 0.01, "no"),
        (0.02, FORGOT - 0.02, "no"),
        (FORGOT - 0.01, FORGOT + 0.1, "unclear"),
        (-0.3, -0.1, "no"),
    ],
)
def test_forgot_or_not_by_the_side_of_the_limit(low: float, high: float, word: str) -> None:
    found = Paired((low + high) / 2, low, high, 0.01, 1, 1, 0)
    forgetting = Forgetting(3.0, 3.0 + found.difference, found, 24, 2000, "text")
    assert forgetting.word == word
    told = {"yes": "Forgot", "no": "Did not forget", "unclear": "Perhaps forgot"}[word]
    assert forgetting.line.startswith(f"{told}: ")
