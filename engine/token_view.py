"""A row token by token: what each token adds to the text, and how well the model predicts it from those before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from afina.engine.text_stream import REPLACEMENT
from afina.loaders.text.tokenizer import BYTE_LETTERS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}
CHUNK = 1 << 24  # logits held at once: 64 MiB in fp32
WINDOW = 64  # tokens that are decoded together to find what each of them adds


class Alternative(NamedTuple):
    """A token that the model could have put in a place, its text by itself and its probability there."""

    id: int
    text: str
    probability: float


class TokenView(NamedTuple):
    """One token of a row.

    ``position``: its place in its document, from 0. ``text``: what it adds to the decoded text (see `token_texts`).
    ``trained``: whether it has a loss. ``loss``: -log of its probability given the tokens before it, in nats; ``rank``:
    1 where no token of the vocabulary is likelier; ``top``: the likeliest tokens. They are also there for tokens that
    are not trained; None, and no alternatives, for the first token, which nothing predicts. ``piece``: the token by
    itself, as ``top`` shows tokens.
    """

    position: int
    id: int
    text: str
    trained: bool
    loss: float | None
    probability: float | None
    rank: int | None
    top: tuple[Alternative, ...]
    piece: str


@torch.no_grad()
def view_row(
    model: GPT, tokenizer: Tokenizer, ids: ArrayLike, loss_mask: ArrayLike, *, top: int = 5, chunk: int = CHUNK
) -> list[TokenView]:
    """Return each token of a row, ids (T,) with loss_mask (T,) bool as `TokenSet.row` gives them, as `model` sees it.

    The hidden states are computed once in the model's dtype; logits and all statistics in fp32, ``chunk`` of them at a
    time, so neither a long row nor a large vocabulary needs much memory. No random number is drawn, and the model's
    train or eval mode stays as it was. Raises ConfigError where the row is longer than learned positions reach.
    """
    numbers = np.asarray(ids, dtype=np.int64)
    trained = np.asarray(loss_mask, dtype=np.bool_)
    if numbers.ndim != 1 or trained.shape != numbers.shape:
        raise ValueError(f"ids and loss_mask: expected both (T,), found {numbers.shape} and {trained.shape}")
    input_ids = torch.from_numpy(numbers)[None].to(model.device)
    was_training = model.training
    model.eval()
    try:
        hidden = model.hidden(input_ids)[0, :-1]
    finally:
        model.train(was_training)
    texts, pieces = token_texts(tokenizer, numbers.tolist()), TokenPieces(tokenizer)
    predicted: list[tuple[float | None, float | None, int | None, tuple[Alternative, ...]]] = [(None, None, None, ())]
    for logits, targets in _logits(model, hidden, input_ids[0, 1:], chunk):
        target = logits.gather(1, targets[:, None])
        normaliser = logits.logsumexp(1)
        losses = normaliser - target[:, 0]
        ranks = (logits > target).sum(1) + 1
        best, best_ids = logits.topk(min(top, logits.shape[1]), dim=1)
        chances = (best - normaliser[:, None]).exp()
        columns = (losses, (-losses).exp(), ranks, best_ids, chances)
        for loss, probability, rank, row_ids, row_chances in zip(*(column.tolist() for column in columns)):
            alternatives = tuple(Alternative(i, pieces[i], p) for i, p in zip(row_ids, row_chances))
            predicted.append((loss, probability, rank, alternatives))
    each = zip(numbers.tolist(), texts, trained.tolist(), predicted)
    return [TokenView(n, i, text, t, *figures, pieces[i]) for n, (i, text, t, figures) in enumerate(each)]


def _logits(model: GPT, hidden: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits, fp32 (n, V), of so many positions at a time that they are about ``chunk``, and their targets.

    bf16 products would be rounded to 8 bits: several tokens would share a rank, and a loss be off by a few hundredths.
    The head becomes fp32 in parts of as many values.
    """
    head, cap = model.head_weight, model.config.logit_softcap
    positions, columns = max(1, chunk // head.shape[0]), max(1, chunk // head.shape[1])
    for start in range(0, len(hidden), positions):
        x = hidden[start : start + positions].float()
        parts = [x @ rows.float().T for rows in head.split(columns)]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        yield logits if cap is None else torch.tanh(logits / cap) * cap, targets[start : start + positions]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the decoded text: joined, exactly ``tokenizer.decode(ids)``.

    A character that several tokens spell, byte by byte, belongs to the one that completes it, and the tokens before
    add ""; so no half or wrong character appears. Bytes that are no character in the whole row (it begins or ends
    inside one, where a long text was cut) are U+FFFD, as decoding has them.
    """
    whole = tokenizer.decode(ids)
    ends = _ends(tokenizer, ids, whole, WINDOW)
    ends[-1] = len(whole)  # what a decoder that looks back further than a window changed meanwhile is the last token's
    return [whole[start:end] for start, end in pairwise(ends)]


def _ends(tokenizer: Tokenizer, ids: Sequence[int], whole: str, window: int) -> list[int]:
    """0, and for each token how much of the text ``whole`` is certain with it.

    Decoding every beginning of a row takes time that grows with the square of its length. So what is certain is left
    behind after ``window`` tokens, but for one token: some tokenizers strip the space of a first word.
    """
    ends = [0]
    first, start, skip = 0, 0, 0  # tokens from `first` on decode to `skip` characters, then the text from `start` on
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[first:count])[skip:]
        certain = whole.startswith(text, start)
        known = whole[start : start + len(text)]
        length = len(known) if certain else next((n for n, (a, b) in enumerate(zip(text, known)) if a != b), len(known))
        ends.append(max(ends[-1], start + length))
        if certain and count - first > window:
            alone = tokenizer.decode(ids[count - 1 : count])
            if REPLACEMENT not in alone:  # else bytes of the next character might join it
                first, start, skip = count - 1, ends[-1], len(alone)
    return ends


class TokenPieces(dict[int, str]):
    """The text of each token by itself, for those that are asked for.

    It is taken behind a letter, where no tokenizer strips a space. A byte of a token that is no whole character is
    written ``\\xe2``, a token without text by its name, an id without a token (there are rows of the embedding for it,
    to make their number round) by its number.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.before = tokenizer.encode("a", add_special=False)
        self.skip = len(tokenizer.decode(self.before))

    def __missing__(self, number: int) -> str:
        name = self.tokenizer.token(number)
        if name is None:
            self[number] = f"<id {number}>"
            return self[number]
        text = self.tokenizer.decode([*self.before, number])[self.skip :]
        if REPLACEMENT in text and LETTER_BYTES.keys() >= set(name):
            text = bytes(LETTER_BYTES[letter] for letter in name).decode(errors="backslashreplace")
        elif not text or (REPLACEMENT in text and REPLACEMENT not in name):
            text = name
        self[number] = text
        return text
