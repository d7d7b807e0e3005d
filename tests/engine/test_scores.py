"""Scores: hand-worked cases, and the figures of scikit-learn, sacrebleu and rouge_score."""

from __future__ import annotations

import math
import random
import sys

import numpy as np
import pytest

from afina.engine import scores
from afina.errors import ConfigError

WORDS = ["the", "a", "card", "payment", "was", "declined;", "café", "Grüße", "It's", "25%", "—", "one_two", "three"]


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]


def test_exact_match() -> None:
    assert [scores.exact_match(p, r) for p, r in (("a", "a"), (" b\n", "b"), ("C", "c"))] == [1.0, 1.0, 0.0]
    assert scores.exact_match("STRASSE", "straße", ignore_case=True) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The cat sat.", "a cat sat", 1.0),  # case, punctuation and articles aside
        ("cat cat dog", "cat dog", 2 * 2 / 5),  # a word counts as often as both have it
        ("red", "blue", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("the", "cat", 0.0),
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert scores.token_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004: police ... the gunman
        ("the gunman kill police", "police kill the gunman", 0.5),  # in order: two of four
        ("a b c d e", "a x c y", 2 * 2 / 9),
        ("ABC, def!", "abc def", 1.0),
        ("", "abc", 0.0),
        ("Привет мир", "привет, мир", 1.0),  # letters of any script are words
    ],
)
def test_rouge_l_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert scores.rouge_l(prediction, reference) == pytest.approx(expected)


def test_rouge_l_is_that_of_rouge_score() -> None:
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for one, two in zip(sentences(60, 1), sentences(60, 2), strict=True):
        one, two = (text.encode("ascii", "ignore").decode() for text in (one, two))
        assert scores.rouge_l(one, two) == pytest.approx(rouge.score(two, one)["rougeL"].fmeasure)


def test_classification_by_hand() -> None:
    found = scores.classification(["a", "a", "z", "b"], ["a", "b", "b", "b"])
    # a: precision 1/2, recall 1 -> 2/3; b: precision 1, recall 1/3 -> 1/2; z is no label.
    assert found == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2),
        "labels": 2,
        "unknown": 1,
        "confusion": {"a": {"a": 1}, "b": {"a": 1, "b": 1, "z": 1}},
    }
    assert scores.classification(["z", "a"], ["a", "a"], ["a", "z"])["unknown"] == 0


def test_classification_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    wanted = draw.choices("abcde", k=300)
    predicted = [label if draw.random() < 0.6 else draw.choice("abcdefz") for label in wanted]
    found = scores.classification(predicted, wanted)
    labels = sorted(set(wanted))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, predicted))
    f1 = metrics.f1_score(wanted, predicted, labels=labels, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(f1)
    every = sorted({*wanted, *predicted})
    matrix = metrics.confusion_matrix(wanted, predicted, labels=every)
    ours = [[found["confusion"].get(w, {}).get(p, 0) for p in every] for w in every]
    assert ours == matrix.tolist()


def test_calibration_by_hand() -> None:
    found = scores.calibration([0.95, 0.85, 0.95, 0.1, 0.0], [1, 1, 0, 0, 0])
    bins = {(b["low"], b["high"]): (b["rows"], b["accuracy"]) for b in found["bins"]}
    assert bins == {(0.0, 0.1): (2, 0.0), (0.8, 0.9): (1, 1.0), (0.9, 1.0): (2, 0.5)}
    assert found["ece"] == pytest.approx((2 * 0.05 + 1 * 0.15 + 2 * 0.45) / 5)


def test_ranking_by_hand_and_of_scikit_learn() -> None:
    found = scores.ranking([1, 2, 11], [12, 4, 20])
    assert found["mrr@10"] == pytest.approx((1 + 1 / 2) / 3)
    assert [found[f"recall@{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 3)
    assert found["chance@1"] == pytest.approx((1 / 12 + 1 / 4 + 1 / 20) / 3)
    metrics = pytest.importorskip("sklearn.metrics")
    for rank in (1, 2, 7, 10, 11):
        gain, order = np.zeros((1, 20)), -np.arange(20.0)[None]
        gain[0, rank - 1] = 1
        assert scores.discounted_gain(rank) == pytest.approx(metrics.ndcg_score(gain, order, k=10))
        if rank <= 10:
            assert scores.reciprocal_rank(rank) == pytest.approx(
                metrics.label_ranking_average_precision_score(gain.astype(int), order)
            )


@pytest.mark.parametrize("name", ["chrf", "bleu"])
def test_corpus_scores_are_sacrebleus(name: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = sentences(40, 3), [a + " " + b for a, b in zip(sentences(40, 3), sentences(40, 4))]
    score, signature = getattr(scores, name)(predictions, references)
    assert score == getattr(sacrebleu, f"corpus_{name}")(predictions, [references]).score
    assert 0 < score < 100
    assert f"version:{sacrebleu.__version__}" in signature
    counts = scores.corpus_counts(name, predictions, references)
    assert scores.score_of_counts(name, counts) == pytest.approx(score)
    some = [5, 5, 7, 30]  # a resampled set
    again = getattr(scores, name)([predictions[i] for i in some], [references[i] for i in some])[0]
    assert scores.score_of_counts(name, counts[some]) == pytest.approx(again)
    if name == "chrf":
        own = scores.sentence_scores(name, predictions, references)
        assert own == [sacrebleu.sentence_chrf(p, [r]).score for p, r in zip(predictions, references)]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    scores._sacrebleu.cache_clear()
    assert not scores.has_sacrebleu()
    for function in (scores.chrf, scores.bleu):
        with pytest.raises(ConfigError, match=r"sacrebleu, which is not installed: pip install 'afina\[eval\]'"):
            function(["a"], ["a"])
