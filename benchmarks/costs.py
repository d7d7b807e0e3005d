"""What each op must do at least, from its shapes: floating-point operations, and bytes of device memory.

Operations are those of the matrix products (two for each multiply and add); element-wise work is not counted, and
what a backward pass computes again is. Bytes count each input read once and each output written once, so no version
moves fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    flops: float
    bytes: float

    def plus(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


Costs = dict[str, Cost]  # pass -> cost


def both(forward: Cost, backward: Cost) -> Costs:
    return {"forward": forward, "backward": backward, "both": forward.plus(backward)}


def visible_pairs(lengths: Sequence[int], causal: bool = True, window: int | None = None) -> int:
    """Pairs of a query and a key it sees, in documents of these lengths that do not see each other."""
    if not causal:
        return sum(n * n for n in lengths)
    pairs = 0
    for n in lengths:
        width = n if window is None else min(n, window)
        pairs += width * (width + 1) // 2 + (n - width) * width
    return pairs


def attention(
    lengths: Sequence[int],
    heads: int,
    kv_heads: int,
    dim: int,
    causal: bool = True,
    window: int | None = None,
    itemsize: int = 2,
) -> Costs:
    """Two products of 2 D a pair and head forward; backward three more and the scores again. LSE, fp32, is saved."""
    pairs, tokens = visible_pairs(lengths, causal, window), sum(lengths)
    q, kv, lse = itemsize * tokens * heads * dim, itemsize * tokens * kv_heads * dim, 4 * tokens * heads
    forward = Cost(4 * heads * dim * pairs, q + 2 * kv + q + lse)
    # q, k, v, o, do and LSE are read; dq, dk, dv written.
    return both(forward, Cost(10 * heads * dim * pairs, 3 * q + 2 * kv + lse + q + 2 * kv))


def linear_cross_entropy(rows: int, kept: int, width: int, vocab: int, itemsize: int = 2) -> Costs:
    """Three products of 2 N V C over the rows that are not ignored; where they are computed is up to the version."""
    values = rows * width + vocab * width
    return {"both": Cost(6 * kept * vocab * width, 2 * itemsize * values + 8 * rows)}


def cross_entropy(rows: int, vocab: int, itemsize: int = 2) -> Costs:
    """Logits read, their gradient written."""
    return {"both": Cost(0, 2 * itemsize * rows * vocab + 8 * rows)}


def norm(rows: int, width: int, residual: bool, vectors: int = 1, itemsize: int = 2) -> Costs:
    """x (and a residual) -> y (and their sum); backward dy (and the sum's gradient) and x -> dx, which serves both.

    vectors: weight, or weight and bias.
    """
    matrix, vector = itemsize * rows * width, itemsize * vectors * width
    return both(
        Cost(0, (4 if residual else 2) * matrix + vector),
        Cost(0, (4 if residual else 3) * matrix + itemsize * width + vector),
    )


def rope(tokens: int, heads: int, dim: int, rotated: int, norm: bool = False, itemsize: int = 2) -> Costs:
    """q and k (`heads` in all) read and written once each way; with the norms backward reads them too."""
    matrix, tables = itemsize * tokens * heads * dim, 4 * tokens * rotated
    weights = 2 * itemsize * dim if norm else 0
    return both(Cost(0, 2 * matrix + tables + weights), Cost(0, (3 if norm else 2) * matrix + tables + 2 * weights))


def glu(rows: int, width: int, itemsize: int = 2) -> Costs:
    """[gate | up] (N, 2 I) -> (N, I); backward reads that and dy, and writes both gradients."""
    return both(Cost(0, 3 * itemsize * rows * width), Cost(0, 5 * itemsize * rows * width))


def linear(rows: int, width: int, out: int, itemsize: int = 2) -> Costs:
    """x (rows, width) and W (out, width) -> y; dy -> dx and dW."""
    sizes = itemsize * (rows * width + out * width + rows * out)
    return both(Cost(2 * rows * width * out, sizes), Cost(4 * rows * width * out, 2 * sizes - itemsize * rows * out))


def adamw(count: int, param: float = 4, moment: float = 4, grad: float = 2, copy: float = 0) -> Costs:
    """A weight and two moments read and written, a gradient read, a copy written: their bytes an element."""
    return {"forward": Cost(0, count * (2 * param + 4 * moment + grad + copy))}


def nf4(count: int, blocksize: int = 64, nested: int = 256, itemsize: int = 2) -> Costs:
    """Half a byte of code and a share of the scales (8 bits a block, 32 a block of blocks) -> one element."""
    blocks = -(-count // blocksize)
    return {"forward": Cost(0, -(-count // 2) + blocks + 4 * -(-blocks // nested) + itemsize * count)}


def decode(lengths: Sequence[int], heads: int, kv_heads: int, dim: int, itemsize: int = 2) -> Costs:
    """The caches of all rows read once; q read and the output written."""
    keys = sum(lengths)
    q = itemsize * len(lengths) * heads * dim
    return {"forward": Cost(4 * keys * heads * dim, 2 * itemsize * keys * kv_heads * dim + 2 * q)}


def training_flops(parameters: int, layers: int, heads: int, dim: int, length: int, frozen: int = 0) -> float:
    """Of a token in a causal row of `length`, forward and backward: 6 a parameter that multiplies (tied embeddings do),
    4 a frozen one, which has no gradient of its own, and three times attention's forward products; what is computed
    again does not count."""
    return 6 * parameters + 4 * frozen + 3 * layers * attention([length], heads, heads, dim)["forward"].flops / length
