"""Methods without a network: what they answer, from the training rows alone.

They are the ones that a reviewer would ask for first, no more: what they score is what a fine-tuned model has to beat.
Words are looked at as TF-IDF of single words and pairs (scikit-learn's `TfidfVectorizer` with sublinear counts).

An answer is a tuple of texts, the best first: all candidates in order where a row has some, else one text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from afina.engine.scores import exact_match, reciprocal_rank, rouge_l, sentence_scores, token_f1
from afina.errors import ConfigError
from afina.loaders.text.render import Example

MAX_LABELS = 200  # distinct answers beyond which they are no labels
MAX_FITTED = 200_000  # rows times labels that logistic regression is fitted on: about ten seconds on one core


Answer = tuple[str, ...]


class Pair(NamedTuple):
    """A row as these methods see it: the text that is asked, the text to answer, and what there is to choose from."""

    question: str
    answer: str
    candidates: tuple[str, ...] | None = None

    @property
    def choice(self) -> tuple[str, ...]:
        """What there is to choose from, the answer among it."""
        return self.candidates or (self.answer,)


def pair_of(example: Example) -> Pair | None:
    """The row as a question and an answer; None where it has no answer in words (a text, a call of a tool)."""
    if example.messages is None:
        return Pair(example.prompt or "", example.completion, example.candidates) if example.completion else None
    *asked, last = example.messages
    if last["role"] != "assistant" or not last.get("content"):
        return None
    question = "\n".join(str(message.get("content") or "") for message in asked)
    return Pair(question, str(last["content"]), example.candidates)


def trivial_answers(train: Sequence[Pair], asked: Sequence[Pair], *, seed: int = 0) -> tuple[str, list[Answer]]:
    """The name and the answers of what looks at no input: the most frequent answer, or, where no answer comes twice,
    that of any row; of candidates, any order."""
    rng = random.Random(seed)
    if any(pair.candidates for pair in asked):
        return "any order", [tuple(rng.sample(pair.choice, len(pair.choice))) for pair in asked]
    answer, count = Counter(pair.answer for pair in train).most_common(1)[0]
    if count > 1:
        return "the most frequent answer", [(answer,)] * len(asked)
    return "the answer of any other row", [(rng.choice(train).answer,) for _ in asked]


def simple_answers(train: Sequence[Pair], asked: Sequence[Pair], *, seed: int = 0) -> dict[str, list[Answer]]:
    """The answers of each method that fits the rows, by its name.

    Candidates: those most like the question first. Else: the answer of the nearest row, and where answers come again
    and again (half as many as rows at most) logistic regression with the answers as classes, else the question itself.
    Raises ConfigError where scikit-learn is not installed.
    """
    if any(pair.candidates for pair in asked):
        return {"TF-IDF likeness of question and candidate": _most_alike(train, asked)}
    copies: dict[str, list[Answer]] = {"copy of the question": [(pair.question,) for pair in asked]}
    vectorizer = _vectorizer()
    try:
        known = vectorizer.fit_transform([pair.question for pair in train])
    except ValueError:  # no question holds a word
        return copies
    given = vectorizer.transform([pair.question for pair in asked])
    nearest = np.asarray((given @ known.T).argmax(axis=1)).ravel()
    found: dict[str, list[Answer]] = {"TF-IDF nearest row's answer": [(train[number].answer,) for number in nearest]}
    labels = len({pair.answer for pair in train})
    if 2 <= labels <= min(MAX_LABELS, len(train) // 2):
        return {"TF-IDF + logistic regression": _regression(known, given, train, labels, seed)} | found
    return found | copies


def scored(metric: str, answers: Sequence[Answer], asked: Sequence[Pair]) -> list[float]:
    """The score of each answer by a task's main metric, in its own unit, as `run_task` scores a model's."""
    wanted = [pair.answer.strip() for pair in asked]
    first = [answer[0].strip() for answer in answers]
    if metric == "mrr@10":
        return [
            reciprocal_rank([text.strip() for text in answer].index(text_wanted) + 1)
            for answer, text_wanted in zip(answers, wanted, strict=True)
        ]
    if metric == "chrf":
        return sentence_scores(metric, first, wanted)
    function = {"rouge_l": rouge_l, "token_f1": token_f1}.get(metric, exact_match)
    return [function(one, other) for one, other in zip(first, wanted, strict=True)]


def check_installed() -> None:
    """Raise ConfigError where scikit-learn is missing."""
    _vectorizer()


def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as problem:
        raise ConfigError(
            "advise compares with simple methods from scikit-learn, which is not installed: pip install 'afina[eval]'"
        ) from problem
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")


def _regression(known: Any, given: Any, train: Sequence[Pair], labels: int, seed: int) -> list[Answer]:
    from sklearn.linear_model import LogisticRegression

    answers = np.array([pair.answer for pair in train], dtype=object)
    if len(train) * labels > MAX_FITTED:
        some = np.array(random.Random(seed).sample(range(len(train)), MAX_FITTED // labels))
        known, answers = known[some], answers[some]
    if len(set(answers.tolist())) < 2:
        return [(str(answers[0]),)] * given.shape[0]
    model = LogisticRegression(C=30.0, max_iter=300)
    return [(str(answer),) for answer in model.fit(known, answers).predict(given)]


def _most_alike(train: Sequence[Pair], asked: Sequence[Pair]) -> list[Answer]:
    vectorizer = _vectorizer()
    texts = [pair.question for pair in train] + [text for pair in train for text in pair.choice]
    try:
        vectorizer.fit(texts)
    except ValueError:  # no text holds a word
        return [pair.choice for pair in asked]
    ordered = []
    for pair in asked:
        likeness = vectorizer.transform(pair.choice) @ vectorizer.transform([pair.question]).T
        order = np.argsort(-likeness.toarray().ravel(), kind="stable")
        ordered.append(tuple(pair.choice[number] for number in order))
    return ordered
