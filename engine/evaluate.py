"""How good a model is on rows it has not learnt: loss, perplexity, bits per byte, and metrics of a task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from afina.loaders.batches import eval_batches

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.dataset import TokenSet


@torch.no_grad()
def evaluate_loss(
    model: GPT,
    token_set: TokenSet,
    *,
    batch_size: int = 8,
    packing: bool = True,
    text_bytes: int | None = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Mean loss (nats per trained token) over all rows, with ``tokens``, ``perplexity`` and, given the UTF-8 size of
    what is predicted, ``bits_per_byte``.

    Each token weighs the same whatever batch it falls in. Logits are never kept, no random number is drawn, gradients
    and the model's train or eval mode stay as they were. ``poll`` is called before each batch and may raise to stop.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in eval_batches(token_set, batch_size=batch_size, packing=packing):
            if poll:
                poll()
            batch = batch.to(device)
            total += model.loss(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens, reduction="sum").item()
            tokens += batch.trained
    finally:
        model.train(was_training)
    loss = total / tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
    if text_bytes:
        result["bits_per_byte"] = total / math.log(2) / text_bytes
    return result


def exact_match(predictions: Sequence[str], references: Sequence[str], *, ignore_case: bool = False) -> float:
    """Share of predictions equal to their reference, surrounding whitespace aside."""
    pairs = zip(_plain(predictions, ignore_case), _plain(references, ignore_case), strict=True)
    return sum(p == r for p, r in pairs) / len(references)


def classification(
    predictions: Sequence[str], references: Sequence[str], *, ignore_case: bool = False
) -> dict[str, Any]:
    """Accuracy, and macro-F1: the plain mean of F1 over the labels that the references hold.

    A prediction that is no such label counts as wrong (and is counted in ``unknown``); it belongs to no label's F1 as a
    false positive.
    """
    predicted, wanted = _plain(predictions, ignore_case), _plain(references, ignore_case)
    support, guesses = Counter(wanted), Counter(predicted)
    right = Counter(w for p, w in zip(predicted, wanted, strict=True) if p == w)
    f1 = [2 * right[label] / (support[label] + guesses[label]) for label in support]
    return {
        "accuracy": sum(right.values()) / len(wanted),
        "macro_f1": sum(f1) / len(f1),
        "labels": len(support),
        "unknown": sum(count for label, count in guesses.items() if label not in support),
    }


def _plain(texts: Sequence[str], ignore_case: bool) -> list[str]:
    return [text.strip().casefold() if ignore_case else text.strip() for text in texts]
