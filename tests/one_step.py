"""What one training step of a model changes."""

from __future__ import annotations

import torch
from torch import Tensor

from afina.engine.model import GPT
from afina.engine.optim import AdamW


def changed_by_a_step(model: GPT, ids: Tensor) -> set[str]:
    """Names of the parameters that a step on ``ids`` moves; only what trains may have a gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model, decay=model.decay_parameters())
    model.train()
    model.loss(ids, ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in optimizer.params)
        assert (parameter.grad is None) == (not parameter.requires_grad), name
    optimizer.step(1e-3)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
