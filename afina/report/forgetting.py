"""Whether a model forgot: its loss on text that has nothing to do with the rows it learnt, before and after.

PEFT's method comparison measures the same (https://github.com/huggingface/peft/pull/2925), on passages of Wikipedia.
Ours is ``afina/data/reference.txt``: 24 passages on as many subjects, written for this project, so that it is there
offline. The mean is over tokens, the interval over passages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import afina
from afina.engine.intervals import paired, ratio
from afina.engine.likelihood import row_losses
from afina.errors import DataError
from afina.loaders.data.batches import EncodedRows
from afina.loaders.text.encode import encode_rendered
from afina.loaders.text.render import Example, render_example
from afina.report.verdict import Forgetting

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

OWN = Path(afina.__file__).resolve().parent / "data" / "reference.txt"
MAX_BYTES = 1 << 20  # some 200,000 words: far more than the mean needs
MAX_TOKENS = 512  # of a passage; a longer one is cut into several
MIN_PASSAGES = 5


@dataclass(frozen=True)
class Reference:
    """Reference text as tokens. ``name``: its file. ``rows``: its passages."""

    name: str
    rows: EncodedRows

    def part(self, share: float) -> Reference:
        """This share of the passages, evenly spread; all of them where it is 1 or more."""
        size = len(self.rows)
        kept = min(size, int(share * size))
        chosen = [n * size // kept for n in range(kept)]
        ids, masks = self.rows.ids, self.rows.loss_masks
        return Reference(self.name, EncodedRows([ids[n] for n in chosen], [masks[n] for n in chosen]))


def read_passages(path: Path) -> list[str]:
    """The passages of a text file, which blank lines divide. Raises DataError where it cannot be read, is larger than
    1 MB or has fewer than five."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: more than 1 MB of reference text: a few thousand words are enough, so cut it")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path}: the reference text cannot be read ({reason}): check --reference") from problem
    passages = [" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if len(passages) < MIN_PASSAGES:
        raise DataError(
            f"{path}: {len(passages)} passages of reference text, expected {MIN_PASSAGES} or more: divide it by blank "
            "lines, or add text"
        )
    return passages


def encode_reference(tokenizer: Tokenizer, path: Path | None, max_positions: int) -> Reference:
    """The passages of ``path`` (default: the package's own) as training would render texts. Raises DataError, also for
    a character that the tokenizer cannot spell."""
    rendered = [render_example(tokenizer, Example(text=passage)) for passage in read_passages(path or OWN)]
    all_ids, _ = encode_rendered(tokenizer, rendered)
    size = min(MAX_TOKENS, max_positions)
    pieces = [ids[start : start + size] for ids in all_ids for start in range(0, len(ids), size)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # nothing predicts a first token
    masks = [np.arange(len(piece)) > 0 for piece in pieces]
    return Reference("the package's reference text" if path is None else str(path), EncodedRows(pieces, masks))


def reference_losses(
    model: GPT, reference: Reference, *, batch_size: int = 8, poll: Callable[[], None] | None = None
) -> NDArray[np.float64]:
    """The sum of the losses (nats) of each passage, and its loss tokens: (passages, 2)."""
    losses = row_losses(model, reference.rows, batch_size=batch_size, poll=poll)
    return np.array([(row.sum(dtype=np.float64), len(row)) for row in losses])


def judge_forgetting(before: NDArray[np.float64], after: NDArray[np.float64], name: str) -> Forgetting:
    """What ``reference_losses`` of two models come to. Raises DataError where a loss is not finite."""
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise DataError(f"the loss on {name} is not finite")
    found = paired(before, after, ratio)
    return Forgetting(ratio(before), ratio(after), found, len(before), int(before[:, 1].sum()), name)


def changes(before: NDArray[np.float64], after: NDArray[np.float64]) -> Sequence[float]:
    """The change of each passage's mean loss, in nats a token."""
    return ((after[:, 0] - before[:, 0]) / before[:, 1]).tolist()
