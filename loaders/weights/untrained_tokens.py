"""The tokens that a model has never met, told from the rows of its embedding matrix.

A token that no text had is moved by nothing but what moves all the others: the output layer pushes it away from every
context (where embeddings are tied), weight decay shrinks it, or it lies where it was put. So such rows are alike, and
some are known: the bytes that UTF-8 cannot hold, and rows that are the same to the last bit. Every row that lies as
close to the middle of these as they do themselves is one of them (after Land and Bartolo, "Fishing for Magikarp:
Automatically Detecting Under-trained Tokens in Large Language Models", 2024, whose reference rows are of that kind).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from afina.loaders.text.tokenizer import BYTE_LETTERS, Tokenizer
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.peft import find_base, is_adapter
from afina.loaders.weights.source import Weights, open_weights

NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
IMPOSSIBLE = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no UTF-8 text has
LEAST = 3  # rows that make a reference
CHUNK = 1 << 22  # values read at once
SPREAD = 2.0  # times as far from the middle as the farthest row of the reference
SAME, TIGHT = 0.02, 0.25  # distances from the middle, in units of the middle's own from the mean of all rows
LOW = 1.05  # times the largest norm of the reference, where that is no cluster, but all of it shorter than others


def untrained_tokens(source: str | Path, tokenizer: Tokenizer, *, allow_nonfinite: bool = False) -> NDArray[np.bool_]:
    """Return which ids the model at ``source`` has not learnt, (vocabulary of the tokenizer,) bool.

    Two passes over the embedding matrix in pieces of 16 MiB; all False where there is no reference, or where its rows
    have nothing in common. Raises WeightsError.
    """
    place = resolve(source)
    files = open_weights(find_base(place)[1] if is_adapter(place) else place, allow_nonfinite=allow_nonfinite)
    name = next((name for name in files.names() if name.endswith(NAMES)), None)
    result = np.zeros(tokenizer.vocab_size, np.bool_)
    if name is None or files.shape(name)[0] < tokenizer.vocab_size:
        return result
    rows = len(result)
    norms, total, contents = np.empty(rows), np.zeros(files.shape(name)[1]), list[int]()
    for start, values in _pieces(files, name, rows):
        norms[start : start + len(values)] = np.linalg.norm(values, axis=1)
        total += values.sum(axis=0, dtype=np.float64)
        contents += [hash(row.tobytes()) for row in values]
    reference = _reference(tokenizer, contents)
    result[norms == 0] = True
    if len(reference) < LEAST:
        return result
    chosen = np.zeros(rows, np.bool_)
    chosen[reference] = True
    middle = np.zeros_like(total)
    for start, values in _pieces(files, name, rows):
        middle += values[chosen[start : start + len(values)]].sum(axis=0, dtype=np.float64)
    middle /= len(reference)
    distances = np.empty(rows)
    for start, values in _pieces(files, name, rows):
        distances[start : start + len(values)] = np.linalg.norm(values - middle, axis=1)
    distances /= max(float(np.linalg.norm(middle - total / rows)), 1e-12)
    spread = float(distances[reference].max())
    if spread <= TIGHT:
        return result | (distances <= max(SAME, SPREAD * spread))
    bound = LOW * norms[reference].max()
    return result | (norms <= bound) if bound < np.percentile(norms[~chosen], 1) else result


def _pieces(files: Weights, name: str, rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the number of the first row and some rows (n, C) float32, all of them in turn."""
    width = files.shape(name)[1]
    step = max(1, CHUNK // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        out = torch.empty(stop - start, width)
        files.read_into(name, out, rows=slice(start, stop))
        yield start, out.numpy()


def _reference(tokenizer: Tokenizer, contents: list[int]) -> NDArray[np.int64]:
    """Ids that no text has: bytes that are impossible in UTF-8, else those whose row is the most frequent one."""
    spelt = [spelling for byte in IMPOSSIBLE for spelling in (BYTE_LETTERS[byte], f"<0x{byte:02X}>")]
    ids = {number for text in spelt if (number := tokenizer.token_id(text)) is not None}
    if len(ids) < LEAST:
        content, times = Counter(contents).most_common(1)[0]
        ids = {number for number, found in enumerate(contents) if found == content} if times >= LEAST else set()
    return np.array(sorted(ids), np.int64)
