"""The methods without a network, on data where it is known what they can do."""

from __future__ import annotations

import random
import sys

import pytest

from afina.advise.baselines import Pair, check_installed, pair_of, scored, simple_answers, trivial_answers
from afina.errors import ConfigError
from afina.loaders.text.render import Example

LR, NEAREST, COPY = "TF-IDF + logistic regression", "TF-IDF nearest row's answer", "copy of the question"


def planted(count: int, *, seed: int, noise: bool = False) -> list[Pair]:
    """Reviews whose label hangs on one word of theirs, or on nothing."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(["good", "bad", "bad"])
        word = rng.choice({"good": ["lovely", "fine"], "bad": ["dull", "weak"]}[label])
        if noise:
            label = rng.choice(["good", "bad", "bad"])
        rows.append(
            Pair(f"a {rng.choice(['film', 'book', 'song'])} that is {word} and {rng.randint(0, 99)} long", label)
        )
    return rows


def accuracy(answers: list[tuple[str, ...]], asked: list[Pair]) -> float:
    return sum(scored("accuracy", answers, asked)) / len(asked)


def test_labels_that_hang_on_a_word() -> None:
    train, asked = planted(120, seed=1), planted(80, seed=2)
    name, constant = trivial_answers(train, asked)
    found = simple_answers(train, asked)
    assert name == "the most frequent answer"
    assert set(constant) == {("bad",)}
    assert list(found) == [LR, NEAREST]
    assert accuracy(found[LR], asked) == 1.0
    assert accuracy(constant, asked) == sum(pair.answer == "bad" for pair in asked) / 80


def test_labels_that_hang_on_nothing() -> None:
    train, asked = planted(120, seed=1, noise=True), planted(300, seed=2, noise=True)
    assert accuracy(simple_answers(train, asked)[LR], asked) < accuracy(trivial_answers(train, asked)[1], asked) + 0.05


def test_answers_of_their_own() -> None:
    train = [Pair(f"the colour of thing {n}", f"thing {n} is {n % 7} blue") for n in range(30)]
    asked = [Pair("the colour of thing 3", "thing 3 is 3 blue")]
    found = simple_answers(train, asked)
    assert list(found) == [NEAREST, COPY]
    assert found[NEAREST] == [("thing 3 is 3 blue",)]
    assert found[COPY] == [("the colour of thing 3",)]
    name, answers = trivial_answers(train, asked * 20)
    assert name == "the answer of any other row"
    assert len({answer for (answer,) in answers}) > 5


def test_candidates_are_put_in_order() -> None:
    pairs = [
        Pair(f"where is the {what}", f"the {what} is in the hall", tuple(f"the {w} is in the hall" for w in order))
        for what in ("lamp", "chair", "door")
        for order in (("lamp", "chair", "door"), ("door", "lamp", "chair"))
    ]
    (answers,) = simple_answers(pairs, pairs).values()
    assert scored("mrr@10", answers, pairs) == [1.0] * 6
    name, shuffled = trivial_answers(pairs, pairs * 50)
    assert name == "any order"
    mean = sum(scored("mrr@10", shuffled, pairs * 50)) / 300
    assert mean == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=0.08)


@pytest.mark.parametrize(
    ("metric", "value"), [("accuracy", 0), ("exact_match", 0), ("rouge_l", 0.5), ("token_f1", 0.5)]
)
def test_scores_are_those_of_the_task(metric: str, value: float) -> None:
    asked = [Pair("?", "red house")]
    assert scored(metric, [("red boat",)], asked) == [value]
    assert scored(metric, [(" red house ", "never looked at")], asked) == [1.0]


def test_translations_are_scored_out_of_a_hundred() -> None:
    asked = [Pair("?", "red house")]
    assert scored("chrf", [("red house",)], asked) == [100.0]
    assert 0.0 < scored("chrf", [("red boat",)], asked)[0] < 60.0


def test_questions_without_a_word() -> None:
    train, asked = [Pair("?", "a"), Pair("!", "b")], [Pair("...", "a")]
    assert simple_answers(train, asked) == {COPY: [("...",)]}
    choice = [Pair("?", "!", ("!", "..."))]
    assert list(simple_answers(choice, choice).values()) == [[("!", "...")]]


def test_one_label_among_the_rows_that_are_fitted() -> None:
    train = [Pair(f"word {n}", "same") for n in range(8)]
    assert list(simple_answers(train, train)) == [NEAREST, COPY]


def test_a_great_many_labels_are_fitted_on_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afina.advise.baselines.MAX_FITTED", 80)
    train = planted(120, seed=1)
    assert accuracy(simple_answers(train, train)[LR], train) > 0.9


def test_pairs_of_examples() -> None:
    system, user, assistant = ({"role": r, "content": r} for r in ("system", "user", "assistant"))
    assert pair_of(Example(messages=(system, user, assistant))) == Pair("system\nuser", "assistant")
    assert pair_of(Example(prompt="p", completion="c", candidates=("c", "d"))) == Pair("p", "c", ("c", "d"))
    assert pair_of(Example(text="t")) is None
    assert pair_of(Example(messages=(system, user))) is None
    assert pair_of(Example(messages=(user, assistant | {"content": None}))) is None


def test_scikit_learn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ConfigError, match=r"pip install 'afina\[eval\]'"):
        check_installed()
