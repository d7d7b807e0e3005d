"""How many rows a decoding step may have, so that a row's numbers are the same bits whatever the other rows are.

A product of matrices chooses its code by its sizes: one row is a product of matrix and vector, whose sums go in another
order than those of sixteen rows, and the rows that fill no whole tile have code of their own. Which numbers of rows
give the same bits, no library promises. So it is measured, once for a model: each kind of layer computes the same rows
in batches of several sizes, and a batch is filled up to one of those sizes that agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from afina.engine.layouts import OneDNN, filled, onednn_works
from afina.engine.linear import Linear
from afina.engine.model import GPT, Layer

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 30, 32, 36, 48, 60, 64, 96, 128, 192, 256)
LEAST = 8  # what even a single row is compared with, so that it has the bits that it would have in a batch
TRIES = 4  # sizes that are tried as the largest: code for as many rows as 6 treats the last two of 32 by other code
COMPARED = 1 << 14  # numbers that a size is judged by, unless they take more than MOST of the largest batches
MOST = 16
POWERS = tuple(2**n for n in range(9))


def padded(count: int, sizes: Sequence[int]) -> int:
    """The least of ``sizes`` that holds ``count`` rows, or the largest."""
    return next((size for size in sizes if size >= count), sizes[-1])


_measured: WeakKeyDictionary[GPT, dict[object, tuple[int, ...]]] = WeakKeyDictionary()


def exact_sizes(model: GPT, most: int) -> tuple[int, ...]:
    """The numbers of rows up to about ``most``, rising, among which a row's bits do not depend on which is taken, nor
    on its place. Measured once for a model, its adapter and the number of threads. On a GPU nothing is promised: they
    are powers of two there, of which each is one captured graph."""
    if model.device.type == "cuda":
        return tuple(size for size in POWERS if size < 2 * most)
    # What is filled up anyway is filled up once, for the whole step.
    sizes = [size for size in SIZES if size == filled(size)] if _uses_onednn(model) else SIZES
    top = padded(max(most, LEAST), sizes)
    known = _measured.setdefault(model, {})
    key = top, torch.get_num_threads(), *_functions(model)
    if key not in known:
        known[key] = _measure(model, sizes, sizes.index(top))
    return known[key]


def _uses_onednn(model: GPT) -> bool:
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.packed is not None:
            thin = layer.lora is not None and onednn_works(model.dtype)
            if thin or isinstance(layer.packed.weight, OneDNN):
                return True
    return isinstance(model.packed_head, OneDNN)


@torch.no_grad()
def _measure(model: GPT, sizes: Sequence[int], at: int) -> tuple[int, ...]:
    """Of the sizes up to ``sizes[at]``, or up to one of the next ones, should a row's place matter in that."""
    for top in range(at, min(at + TRIES, len(sizes))):
        agree = set(sizes[: top + 1])
        for function, width in _functions(model).values():
            agree &= _agreeing(function, width, sorted(agree), model.dtype)
            if sizes[top] not in agree:
                break
        else:
            return tuple(sorted(agree))
    return (1,)


def _functions(model: GPT) -> dict[object, tuple[Callable[[Tensor], Tensor], int]]:
    """What is computed of each row alone, with the width of its input: one of each kind, by what makes it one."""
    found: dict[object, tuple[Callable[[Tensor], Tensor], int]] = {}
    for layer in model.layers:
        assert isinstance(layer, Layer)
        attn, mlp = layer.attn, layer.mlp
        parts = [attn.qkv, attn.o, mlp.gate_up if mlp.gated else mlp.up, mlp.down]
        key = tuple(_kind(part) for part in parts)
        if key in found:
            continue
        found[key] = mlp, parts[2].in_features
        for part in parts[:2]:
            found[_kind(part)] = part, part.in_features
    width = model.config.hidden_size
    found["head", type(model.packed_head)] = (lambda x: model.logits(model.norm.add(x, x)[0])), width
    return found


def _kind(layer: Linear) -> tuple[object, ...]:
    adapted = None if layer.lora is None else (tuple(layer.lora.parts), layer.lora.magnitude is not None)
    return (
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        layer.frozen_format,
        None if layer.packed is None else type(layer.packed.weight),
        adapted,
    )


def _agreeing(function: Callable[[Tensor], Tensor], width: int, sizes: Sequence[int], dtype: torch.dtype) -> set[int]:
    """The sizes with which ``function`` gives each row the bits that it has in the largest batch; none, not even the
    largest, where there the place of a row matters. So many rows are compared that differences in few places show."""
    top = sizes[-1]
    draw = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, 1, width, generator=draw).to(dtype)

    def computed(x: Tensor, size: int) -> Tensor:
        """The rows in batches of this size, but for the last ones, which make no whole batch."""
        return torch.cat([function(part) for part in x[: len(x) // size * size].split(size)])

    x = rows(top)
    batches = min(MOST, -(-COMPARED // max(1, function(x).numel())))
    x = rows(top * batches)
    expected = computed(x, top)
    moved = computed(x.roll(top // 2 + 1, 0), top).roll(-(top // 2 + 1), 0)
    if not torch.equal(moved, expected):
        return set()
    return {size for size in sizes if torch.equal(found := computed(x, size), expected[: len(found)])}
