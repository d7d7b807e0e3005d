"""What the report needs models for, in order of worth, within a budget: what does not fit is left out and said.

First whether the model forgot, since the verdict asks for it; then the losses of single tokens of a few dev rows; what
changed in the weights; and at last answers to some dev rows, which take the longest.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from afina.engine.questions import answers_of
from afina.engine.task_results import Comparison, TaskResult, compare
from afina.engine.tasks import guess_task, run_task
from afina.engine.token_view import TokenView, token_texts, view_row
from afina.engine.weights import hf_tensors
from afina.errors import AfinaError, DataError
from afina.loaders.data.dataset import permutation
from afina.report.budget import Budget, OutOfTime, reading_seconds
from afina.report.facts import RunFacts
from afina.report.forgetting import changes, encode_reference, judge_forgetting, read_passages, reference_losses
from afina.report.run_models import RunModels
from afina.report.verdict import Forgetting
from afina.report.weights_change import WeightsChange, adapter_change, whole_change

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.render import Example
    from afina.loaders.text.tokenizer import Tokenizer

SHOWN_EACH, SHOWN_SAME = 6, 3  # rows won, and as many lost; rows unchanged
SAME_CHANGE = 0.01  # nats a token: a row whose loss moved by less is unchanged
TOKEN_SPAN, TOKENS_BEFORE = 160, 24  # tokens shown of a row; those before the first that is learnt
ANSWERED, FIRST_ANSWERED = 40, 8  # dev rows answered; those that show how long it takes
# Of the time, for the forgetting probe; and the fewest passages that an interval over passages makes sense for.
PROBE_SHARE, MIN_PASSAGES = 0.6, 8
ENOUGH_TO_ANSWER = 2.0  # seconds; answers are written in one go, and with less there is no use in beginning
OUT_OF_TIME = "it would have taken more than its share of the training's time"

PARTS = {
    "rows": "the text of dev rows won and lost",
    "forgetting": "whether the model forgot",
    "tokens": "the loss of single tokens",
    "weights": "what changed in the weights",
    "answers": "answers before and after",
}
Piece = tuple[str, bool]  # text, and whether it is learnt


@dataclass(frozen=True)
class ShownRow:
    """A dev row: its mean loss (nats a token) before and after, and its text."""

    where: str
    tokens: int
    before: float
    after: float
    pieces: list[Piece]


@dataclass(frozen=True)
class TokenRow:
    """A dev row token by token, as both models see it: a span of it from ``start``, of ``length`` tokens in all."""

    where: str
    start: int
    length: int
    before: Sequence[TokenView]
    after: Sequence[TokenView]


@dataclass(frozen=True)
class Answers:
    """What both models answer to some of the ``of`` dev rows, as ``task``, and ``why`` as that."""

    task: str
    why: str
    before: TaskResult
    after: TaskResult
    comparison: Comparison
    of: int


@dataclass
class Measured:
    """What was measured. ``rows_won`` and so on: how many dev rows the loss fell in. ``missing``: of each part of
    ``PARTS`` that is not there, why."""

    won: list[ShownRow] = field(default_factory=list)
    lost: list[ShownRow] = field(default_factory=list)
    same: list[ShownRow] = field(default_factory=list)
    forgetting: Forgetting | None = None
    passages: Sequence[float] = ()  # the change of each reference passage, nats a token
    tokens: list[TokenRow] = field(default_factory=list)
    weights: WeightsChange | None = None
    answers: Answers | None = None
    missing: dict[str, str] = field(default_factory=dict)


def measure(facts: RunFacts, budget: Budget, *, device: str | None = None, reference: Path | None = None) -> Measured:
    """Measure what the budget allows. Raises DataError for a ``reference`` text that cannot be used."""
    if reference is not None:
        read_passages(reference)  # a wrong request is no missing part
    models, found = RunModels(facts, budget, device), Measured()
    work = {
        "rows": lambda: _rows(models, found),
        "forgetting": lambda: _forgetting(models, found, reference),
        "tokens": lambda: _tokens(models, found),
        "weights": lambda: _weights(models, found),
        "answers": lambda: _answers(models, found, took.get("forgetting", 0.0)),
    }
    took: dict[str, float] = {}
    for name, part in work.items():
        begun = time.monotonic()
        try:
            budget.poll()
            part()
            took[name] = time.monotonic() - begun
        except OutOfTime:
            found.missing[name] = OUT_OF_TIME
        except (AfinaError, OSError) as problem:
            found.missing[name] = " ".join(str(problem).split())
    return found


def _changes(facts: RunFacts) -> NDArray[np.float64]:
    """How much the mean loss of each dev row changed, nats a token. Raises DataError where it was not measured."""
    rows = facts.dev_rows
    if rows is None or rows.after is None:
        raise DataError("the run has no dev rows that were measured both before and after training")
    return (rows.after - rows.before) / rows.tokens


def _rows(models: RunModels, found: Measured) -> None:
    """The dev rows that won and lost the most, with their text."""
    change, rows = _changes(models.facts), models.facts.dev_rows
    order = np.argsort(change, kind="stable")

    def shown(numbers: NDArray[Any]) -> list[ShownRow]:
        assert rows is not None
        assert rows.after is not None
        before, after = rows.before / rows.tokens, rows.after / rows.tokens
        return [
            ShownRow(
                rows.where[n],
                int(rows.tokens[n]),
                float(before[n]),
                float(after[n]),
                _pieces(models.tokenizer, *models.dev.row(n)),
            )
            for n in numbers.tolist()
        ]

    found.won = shown(order[change[order] < -SAME_CHANGE][:SHOWN_EACH])
    found.lost = shown(order[change[order] > SAME_CHANGE][::-1][:SHOWN_EACH])
    found.same = shown(order[np.abs(change[order]) <= SAME_CHANGE][:SHOWN_SAME])


def _pieces(tokenizer: Tokenizer, ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> list[Piece]:
    """A row's text in pieces that are learnt, or not."""
    pieces: list[Piece] = []
    for text, learnt in zip(token_texts(tokenizer, ids.tolist()), loss_mask.tolist()):
        if pieces and pieces[-1][1] == learnt:
            pieces[-1] = (pieces[-1][0] + text, learnt)
        else:
            pieces.append((text, learnt))
    return pieces


def _forgetting(models: RunModels, found: Measured, path: Path | None) -> None:
    """On all passages, or on as many as there is time for."""
    reference = encode_reference(models.tokenizer, path, models.max_positions)
    if models.budget.limited:
        tokens = sum(len(ids) for ids in reference.rows.ids)
        share = PROBE_SHARE * models.budget.left / max(1e-9, reading_time(models.facts, tokens))
        reference = reference.part(share)
        if len(reference.rows) < MIN_PASSAGES:
            raise OutOfTime
    before, after = models.both(lambda model: reference_losses(model, reference, poll=models.budget.poll))
    found.forgetting = judge_forgetting(before, after, reference.name)
    found.passages = changes(before, after)


def _tokens(models: RunModels, found: Measured) -> None:
    """The row that lost the most, the one that won the most, and two between them."""
    order = np.argsort(_changes(models.facts), kind="stable").tolist()
    chosen = list(dict.fromkeys(order[round(share * (len(order) - 1))] for share in (1.0, 0.0, 0.67, 0.33)))

    length = sum(len(models.dev.row(number)[0]) for number in chosen)
    models.budget.need(reading_time(models.facts, length))

    def views(model: GPT) -> list[list[TokenView]]:
        seen = []
        for number in chosen:
            models.budget.poll()
            seen.append(view_row(model, models.tokenizer, *models.dev.row(number), top=3))
        return seen

    before, after = models.both(views)
    for number, one, two in zip(chosen, before, after):
        first = next(view.position for view in one if view.trained)
        start = max(0, min(first - TOKENS_BEFORE, len(one) - TOKEN_SPAN))
        span = slice(start, start + TOKEN_SPAN)
        found.tokens.append(TokenRow(models.dev.where(number), start, len(one), one[span], two[span]))


def reading_time(facts: RunFacts, tokens: int) -> float:
    """About how many seconds both models need to read so many tokens: forward takes a third of a training step on the
    same tokens, half of one where an adapter trains."""
    speed = facts.total("tokens") / facts.seconds if facts.seconds else 0.0
    return tokens / speed if speed else 0.0


def _weights(models: RunModels, found: Measured) -> None:
    poll = models.budget.poll
    if models.adapted:
        try:
            base = models.base
        except AfinaError:  # what the adapter says itself is worth showing
            base = None
        if base is not None:
            models.budget.need(reading_seconds(base))
        found.weights = adapter_change(models.best, base, poll=poll)
        return
    if (base := models.base) is None:
        found.weights = whole_change(hf_tensors(models.random_start()), models.best, poll=poll)
        return
    models.budget.need(reading_seconds(base, models.best))
    found.weights = whole_change(base, models.best, poll=poll)


def _answers(models: RunModels, found: Measured, probe: float) -> None:
    """Answers to some dev rows. A few show how long one takes, and so how many there is time for.

    ``probe``: the seconds that asking for forgetting took: some two thousand tokens read by both models take about as
    long as a few short answers.
    """
    examples = [row.example for row in models.dev.source_rows()]
    task, why = guess_task(str(models.data.report.get("schema", "")), examples)
    if task == "loss":
        raise DataError(f"{why}, so there is nothing to answer")
    options = sorted({answer.strip() for answer in answers_of(examples, task)}) if task == "classify" else None
    if any(example.candidates is not None for example in examples):
        options = None  # each row brings its own
    chosen = permutation(len(examples), models.config.seed)[:ANSWERED].tolist()

    def answered(model: GPT, numbers: list[int], intervals: bool = True) -> TaskResult:
        rows: list[Example] = [examples[number] for number in sorted(numbers)]
        poll = models.budget.poll
        return run_task(model, models.tokenizer, rows, task, options=options, intervals=intervals, poll=poll)

    if models.budget.limited:
        models.budget.need(max(ENOUGH_TO_ANSWER, probe))
        begun = time.monotonic()
        models.both(lambda model: answered(model, chosen[:FIRST_ANSWERED], intervals=False))
        row = (time.monotonic() - begun) / min(FIRST_ANSWERED, len(chosen))
        chosen = chosen[: max(FIRST_ANSWERED, int(0.8 * models.budget.left / row))]
    before, after = models.both(lambda model: answered(model, chosen))
    found.answers = Answers(task, why, before, after, compare(before, after), len(examples))
