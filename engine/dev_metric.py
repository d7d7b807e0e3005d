"""A task's figure on some dev rows while a model trains: what ``eval_metric`` picks the best model by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from afina.engine.questions import answers_of, candidates_of, options_of
from afina.engine.scores import bleu
from afina.engine.tasks import run_task
from afina.engine.train_config import EVAL_METRICS
from afina.errors import DataError
from afina.loaders.data.dataset import TokenSet, permutation

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

METRIC_ROWS = 100


class DevMetric:
    """One metric of a task on the same ``METRIC_ROWS`` dev rows at most, chosen by a seed, whenever it is asked for.

    Raises ConfigError where the metric's package is missing, DataError where a row does not fit the task.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, dev: TokenSet, *, seed: int) -> None:
        self.name, self.task, self.tokenizer = name, EVAL_METRICS[name], tokenizer
        examples = [row.example for row in dev.source_rows()]
        self.options: list[str] | None = None
        try:
            answers = answers_of(examples, self.task)
            if self.task == "classify":  # among the labels of all dev rows, not only of those that are measured
                self.options = sorted({label for row in options_of(examples, answers, None) for label in row})
            elif self.task == "retrieve":
                candidates_of(examples, answers)
        except DataError as problem:
            raise DataError(f"eval_metric {name}: {problem}") from None
        if name in ("chrf", "bleu"):
            bleu([""], [""])  # says what is missing before a run begins
        chosen = sorted(permutation(len(examples), seed)[:METRIC_ROWS].tolist())
        self.examples = [examples[number] for number in chosen]
        self.values = np.empty(0)  # what the figure of the last measurement is made of, for each of these rows

    def measure(self, model: GPT, *, poll: Callable[[], object] | None = None) -> float:
        """The metric of the model as it is; its weights, its mode and the random numbers stay as they were."""
        found = run_task(
            model, self.tokenizer, self.examples, self.task, options=self.options, intervals=False, poll=poll
        )
        self.values = found.samples[self.name].values
        return found.metrics[self.name]
