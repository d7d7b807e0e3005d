"""Whether a run's steps are CUDA graphs (`step_graph.py`): the setting, what rules it out, and what this GPU has shown.

``cuda_graph: true`` asks for them, and they are checked on the run's own first rows. ``auto`` takes them on a GPU where
such a check has passed before, under the same versions of torch, Triton and Afina. Nothing here is an error: what
cannot be a graph runs one launch at a time, as without, and says so in one line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from afina.durable import remember, remembered
from afina.engine.buckets import StaticInputs
from afina.engine.captured import CudaGraph, Graph, Shared
from afina.engine.model import GPT
from afina.engine.objectives import Objective
from afina.engine.optim import AdamW
from afina.engine.step_graph import GraphedStep
from afina.engine.train_config import TrainConfig
from afina.engine.training_step import accumulate
from afina.kernels import launch
from afina.kernels.backend import choose

NOTE = "cuda-graph"  # under which the cache knows where they have passed
# Settings that need the host in the middle of a step -> the values with which they do not.
PLAIN = {
    "optim_in_backward": (False,),
    "offload_optimizer": (False,),
    "offload_params": (False,),
    "activation_policy": ("auto", "keep", "selective", "full"),
    "packing": (True,),
    "attention_backend": ("auto", "triton"),
    "linear_dtype": ("auto",),
    "lora_dropout": (None, 0.0),
}


def ruled_out(config: TrainConfig, device: torch.device, changed: Mapping[str, Any] | None = None) -> str | None:
    """Why steps with these settings, of which some may be ``changed``, cannot be graphs on ``device``; None where they
    can."""
    if device.type != "cuda":
        return f"a CUDA graph needs a GPU, and this run is on {device.type}"
    for name, plain in PLAIN.items():
        if (found := (changed or {}).get(name, getattr(config, name))) not in plain:
            shown = str(found).lower() if isinstance(found, bool) else found
            return f"{name} is {shown}, which needs the host in the middle of a step"
    return None


def without_kernels(optimizer: AdamW, device: torch.device) -> str | None:
    """The op that torch computes on this GPU and that only our kernel can repeat; None where there is none."""
    sample = torch.empty(1, dtype=next(iter(optimizer.params.values())).dtype, device=device)
    needed = ["attention", *(["adamw"] if optimizer.variant != "adamw" else [])]
    return next((f"{op} does not run in Triton here" for op in needed if choose(op, None, sample) != "triton"), None)


def decide(config: TrainConfig, device: torch.device) -> tuple[bool, str | None]:
    """Whether the run's steps are to be graphs, and in one line why they are not though they were asked for."""
    if config.cuda_graph == "false":
        return False, None
    reason = ruled_out(config, device)
    if config.cuda_graph == "true":
        return reason is None, None if reason is None else f"{reason}; steps run one launch at a time"
    return reason is None and has_passed(device), None


def open_graphs(
    config: TrainConfig,
    model: GPT,
    optimizer: AdamW,
    objective: Objective,
    device: torch.device,
    log: Callable[[str], None],
    *,
    graph: Callable[[], Graph] | None = None,
) -> GraphedStep | None:
    """The graphs of a run; None where its steps are none. ``graph`` makes one, in place of those of the GPU."""
    if graph is None:
        if not decide(config, device)[0]:
            return None
        if (reason := without_kernels(optimizer, device)) is not None:
            log(f"cuda_graph: {reason}; steps run one launch at a time")
            return None
        reaches = not model.config.learned_positions or config.max_length <= model.config.max_positions
        if not reaches:  # the ordinary step says so when a row comes that is too long
            return None
        graph = partial(CudaGraph, Shared.on(device))

    def loss(static: StaticInputs) -> Tensor:
        ids, spans, targets, weights, _ = static.inputs
        return model.weighted_loss(
            ids,
            targets,
            weights,
            spans=spans,
            positions=static.positions,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            lean=config.lean_loss,
        )

    return GraphedStep(
        optimizer,
        loss=loss,
        reference=lambda batch: accumulate(model, [batch], objective),
        max_grad_norm=config.max_grad_norm,
        dtype=model.dtype,
        graph=graph,
        log=log,
        passed=lambda: remember(NOTE, _machine(device), True),
    )


def has_passed(device: torch.device) -> bool:
    """Whether graphs have passed their checks on this GPU before."""
    return remembered(NOTE, _machine(device)) is True


def _machine(device: torch.device) -> list[str | None]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    ours = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        ours = importlib.metadata.version("afina")
    return [name, torch.__version__, launch.VERSION, ours]
