"""What training minimises. An objective is a function of a model and a batch; the loop knows nothing else about it.

It returns the sum of the batch's losses and the number of loss tokens that the sum runs over. Training divides by the
loss tokens of a whole step and evaluation by those of a whole set, so neither depends on how rows fall into batches.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.engine.train_config import TrainConfig
    from afina.loaders.data.batches import MicroBatch


class Objective(Protocol):
    """``objective(model, batch)`` -> (the sum of the losses, fp32 (); the number of loss tokens).

    ``divisor``: what the sum is divided by before it is returned. It is known before the batch runs, so that the
    gradient comes out of the backward pass with its final scale.
    """

    def __call__(self, model: GPT, batch: MicroBatch, *, divisor: int | None = None) -> tuple[Tensor, int]: ...


def sft(
    model: GPT,
    batch: MicroBatch,
    *,
    divisor: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lean: bool = False,
) -> tuple[Tensor, int]:
    """Supervised fine-tuning: the cross-entropy (nats) of each loss token, given the tokens before it.

    ``label_smoothing`` s takes s of the target's weight and spreads it over the vocabulary; ``z_loss`` z adds
    z * logsumexp(logits)^2 to each loss; ``lean`` takes less memory and more time for the same loss. The formulas are
    those of ``kernels/cross_entropy.py``.
    """
    # Labels and boundaries stay on the CPU: what they say about shapes is read there, not off the GPU.
    ids = batch.input_ids.to(model.device, non_blocking=True)
    loss = partial(
        model.loss,
        ids,
        batch.labels,
        cu_seqlens=batch.cu_seqlens,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        lean=lean,
    )
    if divisor is None:
        return loss(reduction="sum"), batch.loss_tokens
    # The head computes its gradients together with the loss, and multiplies them by the upstream gradient afterwards.
    # For a mean that is exactly 1 where a step has one micro-batch, and the pass over the gradients is left out.
    return loss(reduction="mean") * (batch.loss_tokens / divisor), batch.loss_tokens


def training_objective(config: TrainConfig) -> Objective:
    """What a run with these settings minimises. The dev loss is plain ``sft``, so that it compares across settings."""
    return partial(sft, label_smoothing=config.label_smoothing, z_loss=config.z_loss, lean=config.lean_loss)
