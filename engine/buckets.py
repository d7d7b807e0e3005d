"""Packed micro-batches of a few fixed sizes, in memory that stays where it is: what a CUDA graph is captured on.

A micro-batch has as many tokens and loss positions as its rows happen to have. A graph has the sizes that it was
captured with, so a micro-batch takes the smallest bucket that holds it, and the rest is padding that cannot change a
result: each token of it is a document of its own, and its targets have no weight. The sizes are a power of two times
1, 1.25, 1.5 or 1.75, so no more than a fifth of a bucket is padding (above 256 tokens), and a tenth of it on average.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afina.engine.model import IGNORE, next_tokens
from afina.loaders.data.batches import MicroBatch

STEP = 64  # tokens: the smallest size, and what all are multiples of


def bucket_size(count: int) -> int:
    """The smallest size that holds ``count``: a multiple of 64, and above 256 of a quarter of a power of two."""
    quarter = max(STEP, 1 << max(0, (count - 1).bit_length() - 3))
    return max(1, -(-count // quarter)) * quarter


class Bucket(NamedTuple):
    """The sizes of a graph: packed tokens, and positions with a loss (as many where the head runs on all of them)."""

    tokens: int
    targets: int

    @classmethod
    def of(cls, batch: MicroBatch) -> Bucket:
        """The bucket that a packed micro-batch takes."""
        tokens = bucket_size(batch.input_ids.numel())
        return cls(tokens, min(tokens, bucket_size(batch.loss_tokens)))

    def holds(self, other: Bucket) -> bool:
        """Whether what takes ``other`` fits into this one too."""
        return self.tokens >= other.tokens and self.targets >= other.targets


class Inputs(NamedTuple):
    """What ``GPT.weighted_loss`` takes of a micro-batch, in the sizes of a bucket."""

    input_ids: Tensor  # int64 (1, tokens)
    spans: Tensor  # int32 (2, tokens): where each token's document starts and where it ends
    targets: Tensor  # int64 (targets,), -100 in the padding
    weights: Tensor  # fp32 (targets,), 0 in the padding
    positions: Tensor  # int64 (targets,): where the targets stand; not read where every token has one


def inputs_of(batch: MicroBatch | None, bucket: Bucket, divisor: int) -> Inputs:
    """A packed micro-batch on the CPU, padded to a bucket that holds it, each loss over ``divisor``; or padding alone.

    The padding has token 0, in documents of one token. Its targets stand at positions spread over all tokens, where
    they add gradients of exactly 0.
    """
    place = torch.arange(bucket.tokens, dtype=torch.int32)
    ids, spans = torch.zeros(1, bucket.tokens, dtype=torch.int64), torch.stack([place, place + 1])
    targets = torch.full((bucket.targets,), IGNORE)
    positions = torch.arange(bucket.targets)
    if batch is not None:
        assert batch.cu_seqlens is not None
        count = batch.input_ids.numel()
        ids[0, :count] = batch.input_ids[0]
        bounds = batch.cu_seqlens
        spans[:, :count] = torch.stack((bounds[:-1], bounds[1:])).repeat_interleave(bounds.diff(), dim=1)
        wanted = next_tokens(batch.labels, bounds)
        if bucket.targets == bucket.tokens:
            targets[:count] = wanted
        else:
            found = (wanted != IGNORE).nonzero().squeeze(1)
            targets[: len(found)], positions[: len(found)] = wanted[found], found
    weights = (targets != IGNORE).float() / max(1, divisor)
    return Inputs(ids, spans, targets, weights, positions)


class StaticInputs:
    """The inputs of a bucket on ``device``, whose contents change and whose memory does not."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self.bucket = bucket
        self.inputs = Inputs(*(x.to(device) for x in inputs_of(None, bucket, 1)))
        self.positions = None if bucket.targets == bucket.tokens else self.inputs.positions

    def fill(self, batch: MicroBatch, divisor: int) -> None:
        """Take in a micro-batch that the bucket holds. On a GPU the copies are on their way when this returns, from
        pinned memory, and the host does not wait for them."""
        for mine, new in zip(self.inputs, inputs_of(batch, self.bucket, divisor), strict=True):
            mine.copy_(new.pin_memory() if mine.is_cuda else new, non_blocking=True)


def static_bytes(bucket: Bucket) -> int:
    """What ``StaticInputs`` take of the device: token, span, and target, weight and position."""
    return (8 + 2 * 4) * bucket.tokens + (8 + 4 + 8) * bucket.targets
