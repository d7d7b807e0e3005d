"""Measures what advice rests on, within a given time, and hands it to the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from afina.advise.answers import Work
from afina.advise.baselines import check_installed
from afina.advise.evidence import Evidence
from afina.advise.parts import Request, read
from afina.advise.training import Training
from afina.advise.verdict import Decision, before_training, decide
from afina.engine.methods import refuse_adapter
from afina.engine.runtime import prepare_process
from afina.engine.tasks import TASKS
from afina.engine.weights import load_model
from afina.errors import ConfigError, nearest
from afina.loaders.text.render import Example
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import check_vocab

# Minutes without --minutes: for models below so many parameters, and for others.
SMALL_MODEL, SMALL, BIG = 20_000_000, 2.5, 15.0


@dataclass(frozen=True)
class Advice:
    """The verdict, what led to it, the settings of a run (None where none was measured), and the rows that stood in
    the few-shot prompt."""

    decision: Decision
    evidence: Evidence
    recipe: dict[str, Any] | None
    shots: list[Example]


def advise(request: Request, say: Callable[[str], None] = lambda text: None) -> Advice:
    """Measure, within the minutes asked for, whether and how to fine-tune; ``say`` receives a line for each step.

    Raises DataError for rows that cannot be used or scored, ConfigError for a task they do not fit, for too little
    time, and where scikit-learn is missing.
    """
    check_installed()
    if request.task not in TASKS:
        raise ConfigError(f"task is {request.task!r}; expected {', '.join(TASKS)}{nearest(request.task, TASKS)}")
    started = request.clock()
    prepare_process(threads=request.threads, seed=request.seed)
    tokenizer = load_tokenizer(request.model)
    model = load_model(request.model, dtype=request.dtype, device=request.device)
    check_vocab(tokenizer, model.config.vocab_size)
    if model.adapter is not None:
        refuse_adapter(request.model, model.adapter.config.base)
    parameters = model.config.num_parameters()
    minutes = request.minutes or (SMALL if parameters < SMALL_MODEL else BIG)
    rows = read(request, tokenizer, model.config.max_positions)
    work = Work(request, tokenizer, rows, started, 60 * minutes, say)
    evidence = work.without_training(model)
    del model  # room for the runs
    early = before_training(evidence)
    if early is not None:
        evidence = replace(evidence, seconds=request.clock() - started)
        return Advice(early, evidence, None, work.shots)
    evidence, recipe = Training(work).measure(evidence)
    evidence = replace(evidence, seconds=request.clock() - started)
    return Advice(decide(evidence), evidence, recipe, work.shots)
