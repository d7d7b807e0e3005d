"""Weights laid out for the CPU's matrix instructions, for generation.

A plain weight is rearranged in each product, or read by code that a single row has for itself: a batch of a few rows
then costs three times one row, and gives other bits. oneDNN's inner product reads a weight that is rearranged once, as
torch.compile has it (https://pytorch.org/blog/accelerated-cpu-inference/): a few rows cost what one does, since both
wait for the memory, and on the CPUs we know a row's bits do not depend on their number (``row_exact`` measures that).

The layout is the size of the weight, and the weight comes back from it bit for bit. So either both are held for a while
(``PackedModel``), or the plain one is given up (``release``): the model then generates and evaluates, but cannot train.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from afina.engine.linear import Linear, Lora

if TYPE_CHECKING:
    from afina.engine.model import GPT

ROWS = 16  # the batch that the layout is chosen for
LEAST = 1 << 18  # numbers of a weight from which on it pays: oneDNN's call takes as long as a product of that size


class Packed:
    """A weight (O, C) laid out for products x W^T."""

    def __init__(self, weight: Tensor) -> None:
        self.data = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.nbytes = int(torch.ops.mkldnn._nbytes(self.data))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., C) -> x W^T + bias (..., O)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.data, bias, "none", [], "")

    def dense(self) -> Tensor:
        """W, in new memory."""
        return self.data.to_dense()


class PackedLora:
    """The adapters of one matrix, whose thin matrices are packed too."""

    def __init__(self, layer: Linear, lora: Lora) -> None:
        self.down = Packed(lora.A)
        self.blocks = [(part, at, Packed(lora.B[b, : part.rank].contiguous())) for part, at, b in lora.blocks()]
        self.gains = None if lora.magnitude is None else lora.gains(layer.dense(lora.A.dtype))

    def add_(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Add to y = x W^T + b what the adapters make of x."""
        h = self.down(x)
        for part, at, up in self.blocks:
            y[..., part.start : part.stop].add_(up(h[..., at].contiguous()), alpha=part.scale)
        if self.gains is None:
            return y
        return y.mul_(self.gains) if bias is None else y.mul_(self.gains).add_(bias * (1 - self.gains))


class PackedLinear:
    """What a ``Linear`` computes, from packed weights; the active adapter is looked up in each call."""

    def __init__(self, layer: Linear) -> None:
        assert layer.weight is not None
        self.weight = Packed(layer.weight)
        self.adapted: WeakKeyDictionary[Lora, PackedLora] = WeakKeyDictionary()

    def __call__(self, layer: Linear, x: Tensor) -> Tensor:
        y = self.weight(x, layer.bias)
        if layer.lora is None:
            return y
        if layer.lora not in self.adapted:
            self.adapted[layer.lora] = PackedLora(layer, layer.lora)
        return self.adapted[layer.lora].add_(y, x, layer.bias)


class PackedModel:
    """The packed weights of a model on a CPU, beside the plain ones. They are used inside ``with``; what is packed is
    what the weights were when this was made. Weights held in 4 bits stay as they are."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.layers: list[tuple[Linear, PackedLinear]] = []
        self.head: Packed | None = None
        if packable(model):
            self.layers = [(layer, PackedLinear(layer)) for _, layer in _worth_it(model)]
            if model.packed_head is None and model.head_weight.numel() >= LEAST:
                self.head = Packed(model.head_weight)

    def __enter__(self) -> None:
        for layer, packed in self.layers:
            layer.packed = packed
        if self.head is not None:
            self.model.packed_head = self.head

    def __exit__(self, *problem: object) -> None:
        for layer, _ in self.layers:
            layer.packed = None
        if self.head is not None:
            self.model.packed_head = None


def packable(model: GPT) -> bool:
    """Whether torch can pack the weights of this model: on a CPU, with oneDNN, in a dtype that it knows there."""
    weight = model.embed.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        Packed(torch.ones(2, 2, dtype=weight.dtype))(torch.ones(1, 2, dtype=weight.dtype))
    except (RuntimeError, AttributeError):  # no such operation in this build, or no such instructions in this CPU
        return False
    return True


def release(model: GPT, *, keep: Collection[str] = ()) -> None:
    """Pack a model's weights for good and let the plain ones go, but those of the parameters ``keep``, which something
    will exchange, and the embedding. The model generates and evaluates as before, and cannot train any more."""
    if not packable(model):
        return
    for name, layer in _worth_it(model):
        if f"{name}.weight" not in keep:
            layer.packed = PackedLinear(layer)
            layer.hold(None)
    if model.head_weight.numel() >= LEAST and not {"embed.weight", "head.weight"} & set(keep):
        model.packed_head = Packed(model.head_weight)


def _worth_it(model: GPT) -> list[tuple[str, Linear]]:
    """The layers that packing makes faster, with their names."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    return [(n, x) for n, x in linear if x.packed is None and x.weight is not None and x.weight.numel() >= LEAST]
