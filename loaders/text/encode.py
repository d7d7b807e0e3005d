"""Rendered rows to ids, and which of them are trained.

Where a token starts in its text decides that. The `tokenizers` library can note it for every token, which takes longer;
for a byte-level BPE it follows from the ids, since each stands for a known number of the text's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray

from afina.loaders.text.render import Rendered
from afina.loaders.text.tokenizer import Tokenizer

FEW_ROWS = 256  # for fewer, the table of all tokens' sizes, up to 0.1 s to make, would not pay
Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


class Encoded(NamedTuple):
    """Rows one behind another: ``ids`` (N,) int32, which are ``trained`` (N,) bool, and ``lengths`` (rows,) int64."""

    ids: Ids
    trained: Mask
    lengths: NDArray[np.int64]

    def rows(self) -> tuple[list[Ids], list[Mask]]:
        """Each row's ids (T,) and mask (T,), as views."""
        ends = np.cumsum(self.lengths)
        places = [slice(start, end) for start, end in zip((ends - self.lengths).tolist(), ends.tolist())]
        return [self.ids[place] for place in places], [self.trained[place] for place in places]


def encode_rendered(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> tuple[list[Ids], list[Mask]]:
    """Return, for each row, its ids (T,) int32 and which of them are trained (T,) bool: `encode_rows`, row by row."""
    return encode_rows(tokenizer, rendered).rows()


def encode_rows(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> Encoded:
    """Return the ids of rows and which of them are trained. Raises DataError for what no token spells.

    A token is trained if it starts inside a trained range. One that starts before a range and reaches into it belongs
    to the prompt; one that starts inside and reaches past the end is trained.
    """
    texts = [row.text for row in rendered]
    partly = any(row.spans != ((0, len(row.text)),) for row in rendered)  # else no place matters
    sizes = _sizes(tokenizer) if partly and len(texts) >= FEW_ROWS else None
    encodings = tokenizer.encodings(texts, offsets=partly and sizes is None)
    numbers = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, numbers), np.int64, len(numbers))
    ids = np.fromiter(chain.from_iterable(numbers), np.int32, int(lengths.sum()))
    if not partly:
        return Encoded(ids, np.ones(len(ids), np.bool_), lengths)
    edges = None if sizes is None else _edges_by_size(rendered, lengths, sizes[ids])
    if edges is None:
        if sizes is not None:  # a text was changed on the way to its tokens
            encodings = tokenizer.encodings(texts, offsets=True)
        edges = list(_edges_by_offset(rendered, encodings))
    trained = np.zeros(len(ids), np.bool_)
    for first, last in zip(edges[::2], edges[1::2]):
        trained[first:last] = True
    return Encoded(ids, trained, lengths)


@lru_cache(maxsize=8)
def _sizes(tokenizer: Tokenizer) -> NDArray[np.int64] | None:
    sizes = tokenizer.byte_sizes()
    return None if sizes is None else np.array(sizes)


def _edges_by_size(
    rendered: Sequence[Rendered], lengths: NDArray[np.int64], sizes: NDArray[np.int64]
) -> list[int] | None:
    """For each start and end of a trained range, the first of all rows' tokens that starts there or after it.

    ``lengths``: tokens of each row; ``sizes``: bytes of each token. None where a row's tokens are not its bytes.
    """
    edges, base, ends = [], 0, []
    for row in rendered:
        text = row.text
        if not (plain := text.isascii()) and not is_normalized("NFC", text):
            return None
        places = [min(edge, len(text)) if plain else len(text[:edge].encode()) for span in row.spans for edge in span]
        edges += [base + place for place in places]
        base += len(text) if plain else len(text.encode())
        ends.append(base)
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    if not np.array_equal(borders[np.cumsum(lengths)], ends):
        return None
    found: list[int] = np.searchsorted(borders[:-1], edges).tolist()
    return found


def _edges_by_offset(rendered: Sequence[Rendered], encodings: Sequence[Any]) -> Iterator[int]:
    """The same from what the library has noted."""
    base = 0
    for row, encoding in zip(rendered, encodings):
        for edge in chain.from_iterable(row.spans):
            yield base + (len(encoding) if edge >= len(row.text) else _first_from(encoding, edge))
        base += len(encoding)


def _first_from(encoding: Any, position: int) -> int:
    """The first token that starts at ``position`` or after it."""
    if position == 0:
        return 0
    token = encoding.char_to_token(position)  # a scan in native code: far cheaper than a list of all offsets
    if token is None:  # no token covers this character (a normalizer removed it)
        return next((i for i, (start, end) in enumerate(encoding.offsets) if start >= position), len(encoding))
    while token < len(encoding) and encoding.token_to_chars(token)[0] < position:
        token += 1
    return int(token)
