"""Where a run stands, as a checkpoint holds it beside the optimizer's tensors: written, and taken back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from afina.engine.checkpoint import STATE, Checkpoint
from afina.engine.metrics import Progress
from afina.engine.optim import AdamW
from afina.errors import RunError, WeightsError
from afina.manifest import check_manifest


def run_state(progress: Progress, optimizer: AdamW, device: torch.device) -> dict[str, Any]:
    """The ``meta`` of a checkpoint: counters, and the state of the random numbers of the CPU and of ``device``."""
    meta = {
        "progress": {k: v if math.isfinite(v) else None for k, v in asdict(progress).items()},
        "updates": optimizer.num_updates,
        "rng": torch.get_rng_state().tolist(),
    }
    if device.type == "cuda":  # dropout draws there
        meta["cuda_rng"] = torch.cuda.get_rng_state(device).tolist()
    return meta


def restore(checkpoint: Checkpoint, optimizer: AdamW, device: torch.device) -> Progress:
    """Take back what a checkpoint holds: weights, moments and random numbers; returns the counters, of which the step
    gives the order of the data. Raises RunError, before anything is changed, for a state that is not of this run."""
    meta = checkpoint.meta
    try:
        progress = Progress.read(meta.get("progress"))
        size = len(torch.get_rng_state())
        if (type(meta.get("updates")), len(rng := bytes(meta.get("rng", ())))) != (int, size):
            raise ValueError(f"it needs updates (a count) and rng ({size:,} bytes)")
        gpu_rng = bytes(meta.get("cuda_rng", ()))
    except (TypeError, ValueError) as problem:
        mend = "go on with the version that run.json names, or begin again with --overwrite"
        raise RunError(f"{checkpoint.path / STATE}: not a state of this version ({problem}): {mend}") from problem
    try:
        state = {group: checkpoint.tensors(group) for group in checkpoint.groups}
        optimizer.load_state(state, meta["updates"])
    except ValueError as problem:
        raise RunError(f"{checkpoint.path}: {problem}") from problem
    torch.set_rng_state(torch.tensor(list(rng), dtype=torch.uint8))
    if gpu_rng and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(list(gpu_rng), dtype=torch.uint8), device)
    return progress


def check_best(progress: Progress, best: Path, log: Callable[[str], None]) -> None:
    """A best model that is gone or damaged does not count: the next evaluation makes another."""
    if progress.best_step < 0:
        return
    problem = f"{best} is gone"
    try:
        if best.is_dir():
            check_manifest(best)
            return
    except WeightsError as error:
        problem = str(error)
    log(f"{problem}; the next evaluation makes another best model")
    progress.best_step, progress.best_dev_loss, progress.best_dev_metric = -1, math.inf, 0.0
    progress.evaluated_step = -1  # so that a run at its end has one
