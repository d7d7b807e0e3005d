"""The rows that advice is about, divided into those that are learnt, those that choose, and those that judge.

The judging rows are those of the dev file, or held out as training holds out its dev rows; nothing is chosen on them
but the better of two prompts. The tuning rows choose the simple method, the rate, the method and the best step of every
run. The training rows are what remains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from afina.advise.baselines import Pair, pair_of
from afina.engine.train_config import TrainConfig
from afina.loaders.data.check import check_data
from afina.loaders.data.dataset import Data, TokenSet, permutation, prepare
from afina.loaders.text.render import Example
from afina.loaders.text.tokenizer import Tokenizer

MAX_JUDGE, MAX_TUNE = 300, 64  # rows


@dataclass(frozen=True)
class Request:
    """What advice is asked for. ``reading``: settings of ``TrainConfig`` that say how rows are read and batched.
    ``clock`` tells the seconds that ``minutes`` are counted in."""

    data: str
    model: str
    minutes: float | None = None
    task: str = "auto"
    reading: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Rows:
    """The rows in their three parts, as tokens and, in the same order, as examples.

    ``contradictory``: rows whose input stands elsewhere with another answer, where answers are labels, of which only
    one can be right.
    """

    report: dict[str, Any]
    train: TokenSet
    tune: TokenSet
    judge: TokenSet
    examples: dict[str, list[Example]]
    max_length: int
    contradictory: int

    @property
    def total(self) -> int:
        return len(self.train) + len(self.tune) + len(self.judge)

    @cached_property
    def unanswered(self) -> str | None:
        """Where the first row without an answer in words was read; None where all have one."""
        rows = (example for part in self.examples.values() for example in part)
        return next((example.where for example in rows if pair_of(example) is None), None)

    @cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """The rows as questions and answers; those without an answer are left out."""
        return {
            part: [pair for example in examples if (pair := pair_of(example)) is not None]
            for part, examples in self.examples.items()
        }


def read(request: Request, tokenizer: Tokenizer, max_positions: int) -> Rows:
    """The usable rows, divided. Raises DataError where there are none, or only one."""
    settings = TrainConfig.resolve(overrides=request.reading | {"data": request.data, "model": "-", "output_dir": "-"})
    length = min(settings.max_length, max_positions)

    def prepared(share: float) -> Data:
        return prepare(
            request.data,
            tokenizer,
            max_length=length,
            on_long=settings.on_long,
            train_on_prompt=settings.train_on_prompt,
            val_file=settings.val_file,
            val_size=share,
            seed=request.seed,
            columns=settings.columns,
            skip_bad_lines=settings.skip_bad_lines,
            roles=settings.roles_to_train,
            progress=False,
        )

    data = prepared(0.0)
    total = len(data.train)
    if settings.val_file is None:
        judge = min(MAX_JUDGE, round(total / (5 if total >= 50 else 3)))
        data = prepared(min(0.5, max(1, judge) / total))
    judging = [row.example for row in data.dev.source_rows()]
    chosen = np.sort(permutation(len(data.dev), request.seed, 4)[:MAX_JUDGE])
    order = permutation(len(data.train), request.seed, 1)
    tune = min(MAX_TUNE, max(1, round(total / 10)), len(data.train) - 1)
    examples = [row.example for row in data.train.source_rows()]
    parts = {"tune": np.sort(order[:tune]), "train": np.sort(order[tune:])}
    given = {
        name: [examples[n] for n in numbers] for name, numbers in parts.items() if len(examples) == len(data.train)
    }
    given["judge"] = [judging[n] for n in chosen] if len(judging) == len(data.dev) else judging
    found = check_data(
        request.data,
        columns=settings.columns,
        skip_bad_lines=settings.skip_bad_lines,
        roles=settings.roles_to_train,
        similarity=0,
    )
    conflicts = [p.count for p in found.problems if p.name == "conflicting_answers" and found.labels]
    return Rows(
        data.report,
        data.train.select(parts["train"]),
        data.train.select(parts["tune"]),
        data.dev.select(chosen),
        given,
        length,
        sum(conflicts),
    )
