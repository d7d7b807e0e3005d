"""How well a model predicts rows it has not learnt: loss, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from afina.engine.intervals import ratio
from afina.engine.likelihood import row_losses
from afina.engine.task_results import Sample
from afina.loaders.data.batches import Rows

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of each row: ``sums`` (nats, fp64) over its loss tokens, ``tokens`` of them (int64), each (rows,)."""

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Nats per loss token: each token weighs the same, whatever its row."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return _perplexity(self._pairs)

    @property
    def _pairs(self) -> NDArray[np.float64]:
        return np.stack([self.sums, self.tokens], axis=1)

    def samples(self, sizes: NDArray[np.int64]) -> dict[str, Sample]:
        """What loss, perplexity and bits per byte are made of, for their intervals. ``sizes`` (rows,): UTF-8 bytes of
        what is predicted (``loss_text_bytes``); without any there are no bits per byte."""
        found = {"loss": Sample(self._pairs, ratio), "perplexity": Sample(self._pairs, _perplexity)}
        if sizes.any():
            found["bits_per_byte"] = Sample(np.stack([self.sums / math.log(2), sizes], axis=1), ratio)
        return found


def _perplexity(pairs: NDArray[np.float64]) -> float:
    return math.exp(min(ratio(pairs), 700.0))


def evaluate_loss(
    model: GPT,
    token_set: Rows,
    *,
    batch_size: int = 8,
    packing: bool = True,
    poll: Callable[[], object] | None = None,
) -> HeldOutLoss:
    """The cross-entropy of all rows, whatever the training objective adds to it (see ``row_losses``)."""
    losses = row_losses(model, token_set, batch_size=batch_size, packing=packing, poll=poll)
    sums = np.array([row.sum(dtype=np.float64) for row in losses])
    return HeldOutLoss(sums, np.array([len(row) for row in losses], np.int64))


def loss_text_bytes(token_set: Rows, tokenizer: Tokenizer) -> NDArray[np.int64]:
    """UTF-8 bytes of the text that is predicted in each row (rows,), control tokens aside: what the loss is spread over
    in bits per byte, a measure that does not depend on the tokenizer."""
    rows = (token_set.row(number) for number in range(len(token_set)))
    sizes = [len(tokenizer.decode(ids[loss_mask], skip_special=True).encode()) for ids, loss_mask in rows]
    return np.array(sizes, np.int64)
