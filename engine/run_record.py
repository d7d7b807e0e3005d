"""What a run writes down of itself beside its metrics: the facts it depends on, its rows, and what it will take."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from afina.engine.cuda_graph import decide
from afina.engine.memory import MemoryPlan, plan
from afina.engine.model import GPT
from afina.engine.optim import AdamW
from afina.engine.run_inputs import device_of
from afina.engine.train_config import TrainConfig
from afina.loaders.data.dataset import Data


def facts(data: Data, model: GPT) -> dict[str, Any]:
    """What the run depends on beyond its settings. The hash of a model takes time."""
    count = model.config.num_parameters()
    return {"data_sha256": data.fingerprint, "model_sha256": model.fingerprint, "parameters": count}


def data_facts(data: Data) -> dict[str, Any]:
    """What became of the rows, and how long those are, in tokens, that are trained on."""
    lengths = data.train.lengths
    p50, p95 = (int(value) for value in np.quantile(lengths, [0.5, 0.95], method="higher"))
    return {**data.report, "train_lengths": {"p50": p50, "p95": p95, "max": int(lengths.max())}}


def bytes_needed(model: GPT, optimizer: AdamW, *, checkpoints: int) -> dict[str, int]:
    """The room on the disk that ``RunFolder.begin`` asks for: the optimizer's state for every checkpoint kept,
    ``checkpoints`` in all, and the one being written, and the best model in fp32."""
    state = sum(tensor.nbytes for group in optimizer.state().values() for tensor in group.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    best = 4 * (trainable if model.adapter else model.config.num_parameters())
    return {"bytes_needed": state * (checkpoints + 1) + best, "first_bytes": state + best}


def predicted_memory(config: TrainConfig, model: GPT, optimizer: AdamW, data: Data) -> MemoryPlan:
    """What a step will take if its longest rows come together."""
    rows, count = data.train, config.batch_size
    longest = heapq.nlargest(count, rows.lengths.tolist())
    tokens = sum(longest) if config.packing else longest[0] * len(longest)
    loss_tokens = sum(heapq.nlargest(count, rows.loss_tokens.tolist()))
    return plan(
        model,
        optimizer,
        tokens=tokens,
        loss_tokens=min(tokens, loss_tokens),
        lean_loss=config.lean_loss,
        in_backward=config.optim_in_backward,
        offload_params=config.offload_params,
        graphs=decide(config, device_of(model, config))[0],
        accumulates=config.gradient_accumulation_steps > 1,
        longest=longest[0],
    )
