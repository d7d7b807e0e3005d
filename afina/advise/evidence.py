"""What advice rests on: the figures that were measured, as plain values. `measure` fills it, `verdict` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from afina.engine.intervals import Paired

BOUNDED_BY_100 = ("chrf", "bleu")  # sacrebleu's scales; every other metric goes from 0 to 1


class Score(NamedTuple):
    """A way of doing the task, and its score on the judging rows with a 95 % interval, in the metric's own unit."""

    name: str
    value: float
    low: float
    high: float


class Trial(NamedTuple):
    """A run of the range test: ``loss`` is the mean in nats a token on the tuning rows; NaN where it did not stay
    finite."""

    method: str
    learning_rate: float
    steps: int
    loss: float


class Point(NamedTuple):
    """A run of the learning curve: its ``steps``, and how many it should have had.

    ``loss``: nats a token on the judging rows, ``score`` there too (None where only the loss can be judged).
    ``falling``: when its steps were over the loss on the tuning rows was still going down.
    """

    rows: int
    steps: int
    wanted: int
    epochs: float
    loss: float
    score: Score | None
    falling: bool


@dataclass(frozen=True)
class Evidence:
    """All that was measured; whatever was not is None or empty.

    ``rows``: usable ones, in three parts: ``train_rows``, ``tune_rows`` (they choose rate, method, simple method and
    the best step) and ``judge_rows`` (nothing was chosen on them; ``scored_rows`` of them were answered).
    ``duplicates``: exact ones, left out. ``contradictory``: rows whose input stands elsewhere with another answer.
    ``trivial``: the answer that looks at no input. ``simple``: methods without a network, the chosen one first.
    ``gains``: differences of the same rows' scores, positive where the first is better:
    "prompt - trivial", "simple - trivial", "tuned - trivial", "tuned - prompt", "tuned - simple", "simple - prompt",
    "all - third" (the curve's last two points), "loss" (base minus tuned, nats a token) and "lora - full" (losses on
    the tuning rows at each method's best rate).
    ``minutes_needed``: the time in which the run on all rows would have had all its steps, where it had not.
    ``rows_loss``, ``reference_loss``: the base model's, nats a token, on the judging rows and on ordinary English.
    """

    task: str
    metric: str
    task_reason: str
    rows: int
    train_rows: int
    tune_rows: int
    judge_rows: int
    scored_rows: int = 0
    duplicates: int = 0
    contradictory: int = 0
    parameters: int = 0
    rows_loss: float | None = None
    reference_loss: float | None = None
    trivial: Score | None = None
    prompts: tuple[Score, ...] = ()
    simple: tuple[Score, ...] = ()
    trials: tuple[Trial, ...] = ()
    method: str | None = None
    learning_rate: float | None = None
    curve: tuple[Point, ...] = ()
    gains: dict[str, Paired] = field(default_factory=dict)
    seconds: float = 0.0
    minutes_needed: int | None = None

    @property
    def unit(self) -> float:
        """What a perfect score is in the metric's unit."""
        return 100.0 if self.metric in BOUNDED_BY_100 else 1.0

    @property
    def prompt(self) -> Score | None:
        """The better of the base model's scores."""
        return max(self.prompts, key=lambda score: score.value, default=None)

    @property
    def tuned(self) -> Point | None:
        """The run on all training rows, or the one on the most that there was time for."""
        return self.curve[-1] if self.curve else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; named tuples become objects."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                if hasattr(value, "_asdict"):
                    return {key: plain(item) for key, item in value._asdict().items()}
                return [plain(item) for item in value]
            if isinstance(value, Mapping):
                return {key: plain(item) for key, item in value.items()}
            return round(value, 6) if isinstance(value, float) else value

        names = asdict(self).keys()
        return {name: plain(getattr(self, name)) for name in names}
