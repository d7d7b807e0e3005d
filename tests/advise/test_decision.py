"""Evidence -> verdict: every branch, both sides of every threshold."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from afina.advise.evidence import Evidence, Point, Score, Trial
from afina.advise.verdict import (
    COLLECT,
    FULL,
    LORA,
    MIN_JUDGE,
    MIN_TRAIN,
    PROMPT,
    ROWS,
    SIMPLER,
    VERDICTS,
    before_training,
    decide,
)
from afina.engine.intervals import Paired


def gain(difference: float, half: float = 0.01, p: float = 0.001) -> Paired:
    return Paired(difference, difference - half, difference + half, p, 10, 5, 5)


def evidence(
    *, trivial: float = 0.5, prompt: float = 0.6, simple: float = 0.7, tuned: float = 0.8, half: float = 0.01,
    rise: float = 0.0, **changes: Any,
) -> Evidence:  # fmt: skip
    """Scores with one half-width for all differences; all three ways beat the trivial answer unless told otherwise."""

    def score(name: str, value: float) -> Score:
        return Score(name, value, value - half, value + half)

    found = Evidence(
        task="classify",
        metric="accuracy",
        task_reason="told so",
        rows=200,
        train_rows=140,
        tune_rows=20,
        judge_rows=40,
        scored_rows=40,
        trivial=score("the most frequent answer", trivial),
        prompts=(score("zero-shot", prompt), score("few-shot", prompt - 0.05)),
        simple=(score("TF-IDF + logistic regression", simple),),
        method="lora",
        learning_rate=1e-3,
        curve=(
            Point(42, 50, 50, 9.5, 0.9, score("training on 42 rows", tuned - rise), False),
            Point(140, 100, 100, 5.7, 0.5, score("training on 140 rows", tuned), False),
        ),
        gains={
            "prompt - trivial": gain(prompt - trivial, half),
            "simple - trivial": gain(simple - trivial, half),
            "simple - prompt": gain(simple - prompt, half),
            "tuned - trivial": gain(tuned - trivial, half),
            "tuned - prompt": gain(tuned - prompt, half),
            "tuned - simple": gain(tuned - simple, half),
            "all - third": gain(rise, half),
            "loss": gain(0.4, half),
        },
    )
    return replace(found, **changes)


def by_loss(lowered: float, rise: float = 0.0) -> Evidence:
    points = tuple(Point(rows, 50, 50, 1.0, 2.0, None, False) for rows in (42, 140))
    gains = {"loss": gain(lowered), "all - third": gain(rise)}
    found = evidence(metric="loss", task="loss", prompts=(), curve=points, gains=gains)
    return replace(found, trivial=None, simple=())


TABLE = {
    "training beats both": (evidence(), LORA),
    "and full is better": (evidence(method="full"), FULL),
    "training is the only thing that works": (evidence(prompt=0.5, simple=0.5), LORA),
    "the prompt is as good": (evidence(prompt=0.8, simple=0.6), PROMPT),
    "the prompt is better": (evidence(prompt=0.9), PROMPT),
    "a simple method is as good": (evidence(simple=0.8), SIMPLER),
    "a simple method is better": (evidence(simple=0.9), SIMPLER),
    "both as good as training: the prompt needs no rows": (evidence(prompt=0.8, simple=0.81), PROMPT),
    "a simple method that is better than the prompt": (evidence(prompt=0.8, simple=0.85, tuned=0.85), SIMPLER),
    "a prompt that does not beat chance is no way": (evidence(prompt=0.505, simple=0.6, tuned=0.6), SIMPLER),
    "a simple method that does not beat chance is none": (evidence(prompt=0.6, simple=0.505, tuned=0.6), PROMPT),
    "training is above chance, but by less than matters": (evidence(prompt=0.5, simple=0.5, tuned=0.515), ROWS),
    "training is the only way above chance": (evidence(prompt=0.51, simple=0.515, tuned=0.525, half=0.001), LORA),
    "a gain below the smallest": (evidence(prompt=0.785, half=0.005), PROMPT),
    "a gain above the smallest": (evidence(prompt=0.775, half=0.005), LORA),
    "a gain that may be chance": (evidence(simple=0.75, half=0.06), COLLECT),
    "a loss, but more rows would pass it": (evidence(simple=0.85, rise=0.1), COLLECT),
    "a loss, and more rows would not make up for it": (evidence(simple=0.9, rise=0.05), SIMPLER),
    "a loss, and the rise may be chance": (evidence(simple=0.85, rise=0.1, half=0.11), SIMPLER),
    "nothing beats chance": (evidence(prompt=0.5, simple=0.49, tuned=0.505), ROWS),
    "nothing beats chance, but it rises": (evidence(prompt=0.5, simple=0.49, tuned=0.505, rise=0.05), COLLECT),
    "few rows to learn from": (evidence(train_rows=MIN_TRAIN - 1), ROWS),
    "just enough rows to learn from": (evidence(train_rows=MIN_TRAIN), LORA),
    "few rows to judge on": (evidence(judge_rows=MIN_JUDGE - 1), ROWS),
    "just enough rows to judge on": (evidence(judge_rows=MIN_JUDGE), LORA),
    "rows that contradict each other": (evidence(contradictory=61), ROWS),
    "rows of which some contradict each other": (evidence(contradictory=60), LORA),
    "a prompt that leaves nothing to gain": (evidence(prompt=0.99, tuned=1.0), PROMPT),
    "a simple method that leaves nothing to gain": (evidence(simple=0.985, tuned=1.0), SIMPLER),
    "a perfect prompt on too few rows to be sure": (evidence(prompt=0.96, tuned=1.0), LORA),
    "no run ended": (evidence(curve=()), ROWS),
    "texts: the loss falls": (by_loss(0.3), LORA),
    "texts: it does not": (by_loss(0.005), ROWS),
    "texts: it does not yet": (by_loss(0.005, rise=0.1), COLLECT),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_verdict(case: str) -> None:
    found, wanted = TABLE[case]
    decision = decide(found)
    assert decision.verdict == wanted, decision.reasons
    assert decision.reasons
    assert all(decision.reasons)


def test_the_table_has_every_verdict() -> None:
    assert {wanted for _, wanted in TABLE.values()} == set(VERDICTS)


def test_a_metric_out_of_a_hundred_gets_the_same_verdict() -> None:
    for case, (found, wanted) in TABLE.items():
        if found.metric == "loss":
            continue
        hundred = replace(
            found,
            metric="chrf",
            trivial=scaled(found.trivial),
            prompts=tuple(map(scaled, found.prompts)),
            simple=tuple(map(scaled, found.simple)),
            curve=tuple(point._replace(score=scaled(point.score)) for point in found.curve),
            gains={name: Paired(*(100 * v for v in g[:3]), *g[3:]) for name, g in found.gains.items()},
        )
        assert decide(hundred).verdict == wanted, case
        assert decide(hundred).reasons[0].replace("100", "1").count("points") == decide(found).reasons[0].count(
            "points"
        )


def scaled(score: Score | None) -> Score:
    assert score is not None
    return Score(score.name, *(100 * value for value in score[1:]))


def test_a_difference_that_the_test_cannot_tell_from_chance_is_no_gain() -> None:
    """The interval of a few rows is too sure of itself; the permutation test is not."""
    gains = evidence().gains
    sure, unsure = (gains | {"tuned - simple": gain(0.1, p=p)} for p in (0.05, 0.06))
    assert decide(evidence(gains=sure)).verdict == LORA
    assert decide(evidence(gains=unsure)).verdict == COLLECT


def test_a_perfect_score_needs_rows_to_be_believed() -> None:
    """Ten right of ten may still be seven of ten in truth: that does not spare the training run."""
    few = evidence(prompts=(Score("zero-shot", 1.0, 0.69, 1.0),))
    many = evidence(prompts=(Score("zero-shot", 1.0, 0.96, 1.0),))
    assert before_training(few) is None
    assert before_training(many) is not None


def test_reasons_say_what_was_measured() -> None:
    told = " ".join(decide(evidence(rise=0.1)).reasons)
    for part in ("0.8 ", "0.7 ", "10.0 points", "from 42 to 140 rows"):
        assert part in told
    unfinished = evidence(simple=0.9)
    falling = replace(unfinished, curve=tuple(point._replace(falling=True) for point in unfinished.curve))
    assert "still falling" in " ".join(decide(falling).reasons)
    assert "still falling" not in " ".join(decide(unfinished).reasons)
    assert "--minutes 7" in " ".join(decide(replace(falling, minutes_needed=7)).reasons)
    assert "a larger model" in " ".join(decide(evidence(prompt=0.5, simple=0.49, tuned=0.505)).reasons)


def test_evidence_as_plain_values() -> None:
    found = replace(evidence(), trials=(Trial("lora", 1e-3, 20, float("nan")),))
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["prompts"][0] == {"name": "zero-shot", "value": 0.6, "low": 0.59, "high": 0.61}
    assert plain["gains"]["tuned - simple"]["difference"] == pytest.approx(0.1)
    assert plain["curve"][1]["score"]["value"] == 0.8
    assert plain["trials"][0]["method"] == "lora"
