"""Which rows make up a step, in an order that depends only on the seed and the step's number, and their tensors.

A micro-batch is ``batch_size`` rows. Packed, they lie one after another in one sequence (1, T) with `cu_seqlens`, and
attention keeps them apart; else they are padded at the end to (B, T). Either way the model computes the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afina.loaders.data.dataset import TokenSet, permutation

IGNORE = -100


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a token set as tensors.

    ``input_ids`` int64 (1, T) packed or (B, T) padded at the end with 0. ``labels`` int64, aligned with ``input_ids``
    (the model shifts them); -100 where nothing is learnt: prompts, padding, the first token of each row.
    ``cu_seqlens`` int32 (B + 1,), the boundaries of packed rows, or None. ``rows``: their numbers in the token set.
    ``loss_tokens``: labels that are not -100. ``tokens``: tokens that are not padding.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    rows: list[int]
    loss_tokens: int
    tokens: int


class Batches:
    """The micro-batches of each optimizer step, as a pure function of the step's number: resuming needs nothing else.

    Every epoch is a permutation of all rows, of its own; its last step may have fewer rows.
    """

    def __init__(
        self, token_set: TokenSet, *, batch_size: int, accumulation: int = 1, seed: int = 0, packing: bool = True
    ) -> None:
        if batch_size < 1 or accumulation < 1:
            raise ValueError(f"batch_size {batch_size} and accumulation {accumulation} must be at least 1")
        self.token_set, self.batch_size, self.seed, self.packing = token_set, batch_size, seed, packing
        self.rows_per_step = batch_size * accumulation
        self.steps_per_epoch = math.ceil(len(token_set) / self.rows_per_step)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def step(self, index: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step ``index``, counted from 0 over all epochs."""
        rows = self.rows(index)
        return [
            collate(self.token_set, rows[start : start + self.batch_size], packing=self.packing)
            for start in range(0, len(rows), self.batch_size)
        ]

    def rows(self, index: int) -> list[int]:
        """The rows of optimizer step ``index``, in order."""
        epoch, step = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.token_set), self.seed, epoch)
        return self._order[step * self.rows_per_step : (step + 1) * self.rows_per_step].tolist()


class Rows(Protocol):
    """Rows of token ids with what has a loss: a ``TokenSet``, or ``EncodedRows``."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]: ...


@dataclass(frozen=True)
class EncodedRows:
    """Rows in memory: of each its ids (T,) int32 and which of them have a loss (T,) bool, never the first."""

    ids: Sequence[NDArray[np.int32]]
    loss_masks: Sequence[NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        return self.ids[number], self.loss_masks[number]


def eval_batches(token_set: Rows, *, batch_size: int, packing: bool = True) -> Iterator[MicroBatch]:
    """All rows once, in order."""
    for start in range(0, len(token_set), batch_size):
        yield collate(token_set, range(start, min(start + batch_size, len(token_set))), packing=packing)


def collate(token_set: Rows, rows: Sequence[int], *, packing: bool) -> MicroBatch:
    """Make tensors of ``rows`` of a token set."""
    pairs = [token_set.row(row) for row in rows]
    lengths = [len(ids) for ids, _ in pairs]
    cu = None
    if packing:
        flat = np.concatenate([ids for ids, _ in pairs]).astype(np.int64)
        labels = np.where(np.concatenate([loss_mask for _, loss_mask in pairs]), flat, IGNORE)[None]
        inputs = flat[None]
        cu = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    else:
        inputs = np.zeros((len(pairs), max(lengths)), np.int64)
        labels = np.full_like(inputs, IGNORE)
        for row, (ids, loss_mask) in enumerate(pairs):
            inputs[row, : len(ids)] = ids
            labels[row, : len(ids)] = np.where(loss_mask, ids, IGNORE)
    count = int((labels != IGNORE).sum())
    return MicroBatch(torch.from_numpy(inputs), torch.from_numpy(labels), cu, list(rows), count, sum(lengths))
