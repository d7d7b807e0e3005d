"""What is not finite: a step's loss or gradient, or a weight; what a run does about it, and what it says.

A step whose loss or gradient is not finite moves nothing, which is decided on the device, and is named here when its
result is looked at. A few in a row end the run, and a weight that is not finite is never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from afina.engine.metrics import Progress
from afina.engine.model import GPT

MAX_BAD_STEPS = 3  # non-finite steps in a row before the run stops
MANY_SKIPPED = 3  # a run that skipped one step in so many says so at its end


class NonFiniteError(RuntimeError):
    """The loss or gradient stayed NaN or infinite for ``MAX_BAD_STEPS`` steps in a row, or a weight has become so."""


def lower_rate(lr: float) -> str:
    """A setting that may go well where the peak rate ``lr`` did not."""
    return f"--learning_rate {lr / 3:.2g}"


def go_on(*, saved_step: int, lr: float, replaces: bool) -> str:
    """What to do when the weights have gone wrong at the peak rate ``lr``, as they would again, bit for bit.

    ``saved_step``: that of the last checkpoint, 0 for none. ``replaces``: whether the run was to overwrite another.
    """
    if saved_step:
        return (
            f"go on from the checkpoint of step {saved_step:,} at a lower rate than {lr:g}: --resume {lower_rate(lr)}"
        )
    kept = ", the run that was to be overwritten is as it was" if replaces else ""
    return f"begin again at a lower rate than {lr:g} (there is no checkpoint yet{kept}): --overwrite {lower_rate(lr)}"


def report_skipped(
    step: int, rows: Sequence[str], *, whole: bool, in_a_row: int, go_on: str, log: Callable[[str], None]
) -> None:
    """Name the rows of a step whose loss or gradient is not finite, the ``in_a_row``-th without one that is.

    Raises NonFiniteError after ``MAX_BAD_STEPS`` of them, and for one that was not skipped as a ``whole``: in the
    backward pass, below weights that had moved already. ``go_on`` is what `go_on` says.
    """
    where = f"{', '.join(rows[:10])}{' ...' if len(rows) > 10 else ''}"
    if not whole:
        raise NonFiniteError(
            f"step {step:,}: a gradient is not finite, and optim_in_backward has moved the weights above it; its "
            f"rows: {where}. Nothing of this is saved: look at those rows, or {go_on}; with "
            "--optim_in_backward false besides, such a step is skipped as a whole"
        )
    log(f"step {step:,}: loss or gradient not finite, weights left as they were; its rows: {where}")
    if in_a_row >= MAX_BAD_STEPS:
        raise NonFiniteError(
            f"{MAX_BAD_STEPS} steps in a row without a finite loss and gradient, the last one step {step:,} with "
            f"{where}; look at those rows, or {go_on}"
        )


def check_weights(model: GPT, *, step: int, go_on: str) -> None:
    """Raise NonFiniteError where a weight that trains has become NaN or infinite: what is on the disk stays as it is.
    ``go_on`` is what `go_on` says."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not bool(torch.stack([torch.isfinite(p).all() for _, p in trained]).all()):
        bad = next(name for name, p in trained if not torch.isfinite(p).all())
        raise NonFiniteError(f"step {step:,}: {bad} is not finite, so nothing was saved; {go_on}")


def many_skipped(progress: Progress, *, lr: float, folder: Path) -> str | None:
    """The warning of a run that skipped many of its steps; None of one that did not."""
    if progress.skipped < 2 or progress.skipped * MANY_SKIPPED < max(1, progress.step):
        return None
    return (
        f"WARNING: {progress.skipped:,} of {progress.step:,} steps were skipped, their loss or gradient not "
        "finite: this model has learnt from the other rows alone; look at the rows that metrics.jsonl names, "
        f"or begin a new run with a lower rate, say {lower_rate(lr)}, which may go on from this one's best "
        f"model (--model {folder})"
    )
