"""A row that was looked into, token by token: where it lies, what a model makes of it, and beside it a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afina.engine.token_view import TokenView


@dataclass(frozen=True)
class InspectedRow:
    """``number`` and ``where``: the row of the files, from 1, and its line. ``piece`` of ``pieces``: which part of it,
    as training cuts a long text. ``document``: its place among the rows that are packed together, from 0, and ``start``
    that of its first token in the packed sequence. ``before``: the same tokens as the base sees them."""

    number: int
    where: str
    piece: int
    pieces: int
    document: int
    start: int
    views: Sequence[TokenView]
    before: Sequence[TokenView] | None = None

    @property
    def text(self) -> str:
        return "".join(view.text for view in self.views)

    @property
    def learnt(self) -> int:
        return sum(view.trained for view in self.views)

    @property
    def title(self) -> str:
        part = f", piece {self.piece:,} of {self.pieces:,}" if self.pieces > 1 else ""
        return f"row {self.number:,}{part} ({self.where}): {len(self.views):,} tokens, {self.learnt:,} of them learnt"

    @property
    def losses(self) -> str:
        """The mean loss of the learnt tokens, as `afina eval` has it, beside the base's."""
        loss = mean_loss(self.views)
        if self.before is None:
            return f"mean loss of the learnt tokens {loss:.4f}"
        base = mean_loss(self.before)
        return f"mean loss of the learnt tokens: base {base:.4f}, model {loss:.4f}, change {loss - base:+.4f}"

    def to_dict(self) -> dict[str, Any]:
        """The row without its tokens, as plain data."""
        found = {"document": self.document, "row": self.number, "where": self.where}
        found |= {"piece": self.piece, "pieces": self.pieces, "start": self.start, "tokens": len(self.views)}
        found |= {"trained": self.learnt, "text": self.text, "loss": mean_loss(self.views)}
        return found | ({} if self.before is None else {"base_loss": mean_loss(self.before)})

    def tokens(self) -> list[dict[str, Any]]:
        """Each token as plain data; under ``base`` what the base makes of it."""
        found = []
        for n, view in enumerate(self.views):
            token = {"document": self.document, "position": view.position, "id": view.id, "text": view.text}
            token |= {"piece": view.piece, "trained": view.trained, **_predicted(view)}
            if self.before is not None:
                token["base"] = _predicted(self.before[n])
            found.append(token)
        return found


def _predicted(view: TokenView) -> dict[str, Any]:
    top = [each._asdict() for each in view.top]
    return {"loss": view.loss, "probability": view.probability, "rank": view.rank, "top": top}


def mean_loss(views: Sequence[TokenView]) -> float:
    """Mean over the learnt tokens, of which training's rows have at least one, in nats."""
    losses = [view.loss for view in views if view.trained and view.loss is not None]
    return sum(losses) / len(losses)
