"""What a run measures: the row of a step, the totals of the run, and the files that both are written to.

A new metric of a step is a key of ``step_row``; one of a run is a field of ``Progress`` and a key of ``run_metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from afina.engine.run_folder import RunFolder
from afina.errors import ConfigError
from afina.loaders.jsonfile import show

if TYPE_CHECKING:
    from afina.loaders.data.batches import MicroBatch


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint as JSON."""

    step: int = 0  # steps of the data order done, skipped ones included
    trained_tokens: int = 0
    seconds: float = 0.0  # spent in training steps
    tokens: int = 0  # real ones in training steps, padding aside
    processed_tokens: int = 0  # padding included
    loss_sum: float = 0.0  # of the steps that moved the weights
    bad_in_a_row: int = 0
    skipped: int = 0
    evaluated_step: int = -1  # last step whose dev loss was measured
    dev_loss_before: float = math.nan
    best_dev_loss: float = math.inf
    dev_metric_before: float = 0.0  # of eval_metric, where that is not the loss; never negative
    best_dev_metric: float = 0.0
    best_step: int = -1
    evals_since_best: int = 0
    stopped_early: bool = False

    @classmethod
    def read(cls, values: Any) -> Self:
        """What a checkpoint holds of it. Raises ValueError naming the first field that is not of this version."""
        fields = asdict(cls())
        if not isinstance(values, dict):
            raise ValueError("it has no progress")
        if differing := sorted(values.keys() ^ fields.keys()):
            raise ValueError(f"progress has {'no' if differing[0] in fields else 'a'} {differing[0]:.80}")
        for name, default in fields.items():
            value, kinds = values[name], (float, int, type(None)) if type(default) is float else (type(default),)
            if type(value) not in kinds:  # null stands for what JSON has no number for
                raise ValueError(f"progress has {name} = {show(value)}")
        return cls(**{name: value for name, value in values.items() if value is not None})

    def count(self, row: Mapping[str, Any]) -> None:
        """Add the row of a step to the totals."""
        self.seconds += row["seconds"]
        self.tokens += row["tokens"]
        self.processed_tokens += row["processed_tokens"]
        if row.get("skipped"):
            self.bad_in_a_row += 1
            self.skipped += 1
        else:
            self.bad_in_a_row = 0
            self.trained_tokens += row["trained_tokens"]
            self.loss_sum += row["loss"]


def step_row(
    step: int, loss: float, lr: float, grad_norm: float, micro_batches: Sequence[MicroBatch], seconds: float
) -> dict[str, Any]:
    """The metrics of training step ``step``, counted from 1, which took ``seconds``. ``loss`` is the objective's mean
    over the step's loss tokens, in nats; ``grad_norm`` is the norm before clipping."""
    loss_tokens, tokens = sum(mb.loss_tokens for mb in micro_batches), sum(mb.tokens for mb in micro_batches)
    return {
        "step": step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "trained_tokens": loss_tokens,
        "tokens": tokens,
        "processed_tokens": sum(mb.input_ids.numel() for mb in micro_batches),  # padding included
        "seconds": seconds,
        "tokens_per_second": round(tokens / seconds, 1),
        "trained_tokens_per_second": round(loss_tokens / seconds, 1),
    }


def run_metrics(progress: Progress, eval_metric: str = "loss") -> dict[str, Any]:
    """The metrics of the whole run, resumed parts included."""
    seconds = progress.seconds
    return {
        "steps": progress.step,
        "train_loss": progress.loss_sum / max(1, progress.step - progress.skipped),
        "dev_loss_before": progress.dev_loss_before,
        "dev_loss": progress.best_dev_loss,
        **(
            {"dev_metric_before": progress.dev_metric_before, "dev_metric": progress.best_dev_metric}
            if eval_metric != "loss"
            else {}
        ),
        "best_step": progress.best_step,
        "stopped_early": progress.stopped_early,
        "skipped_steps": progress.skipped,
        "trained_tokens": progress.trained_tokens,
        "tokens": progress.tokens,
        "processed_tokens": progress.processed_tokens,
        "tokens_per_second": round(progress.tokens / seconds, 1) if seconds else 0.0,
        "trained_tokens_per_second": round(progress.trained_tokens / seconds, 1) if seconds else 0.0,
        "train_seconds": round(seconds, 2),
    }


class MetricsWriter:
    """Writes rows to the run's ``metrics.jsonl`` and, with ``report_to`` "tensorboard", to event files beside it.

    Raises ConfigError where tensorboard, an optional extra, is asked for and not installed.
    """

    def __init__(self, folder: RunFolder, report_to: str) -> None:
        self.folder = folder
        self._summary_writer = _summary_writer() if report_to == "tensorboard" else None
        self.tensorboard: Any = None  # its files are begun with the first row: a run that is only checked leaves none
        self._place = folder.path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, whose "step" is an integer; event files take its finite floats."""
        self.folder.log(row)
        if self._summary_writer is None:
            return
        place = self.folder.path / "tensorboard"
        if self.tensorboard is None or self._place != place:
            self.close()  # the run has taken the place of the one that it overwrites, and its event files with it
            self.tensorboard, self._place = self._summary_writer(place), place
        for name, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                self.tensorboard.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()


def _summary_writer() -> Any:
    """Return tensorboard's class that writes event files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "report_to is 'tensorboard', which is not installed: pip install 'afina[tensorboard]'"
        ) from error
    return SummaryWriter
