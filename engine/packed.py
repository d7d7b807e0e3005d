"""The packed weights of a model, for generation on a CPU, and which matrices get which layout (``layouts``).

A layout comes beside the weight. So either both are held for a while (``PackedModel``), or the plain one is given up
(``release``): the model then generates and evaluates, but cannot train.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from afina.engine.layouts import Half, Layout, OneDNN, Plain, Rows, fits_half, half_works, onednn_works
from afina.engine.linear import Linear, Lora

if TYPE_CHECKING:
    from afina.engine.model import GPT

# Numbers of a weight from which on a layout pays: calling it takes as long as a product of that size.
LEAST = 1 << 18
LEAST_HALF = 1 << 16
SAMPLE = 64  # rows that tell whether a model's weights are of 16 bits


def packed(weight: Tensor) -> Layout | None:
    """The quickest layout of a weight (O, C) on a CPU; None on a GPU."""
    if weight.device.type != "cpu":
        return None
    if weight.numel() >= LEAST_HALF and half_works() and fits_half(weight):
        return Half(weight)
    if weight.numel() >= LEAST and onednn_works(weight.dtype):
        return OneDNN(weight)
    return Plain(weight)


class PackedLora:
    """The adapters of one matrix, whose thin matrices are packed too."""

    def __init__(self, layer: Linear, lora: Lora) -> None:
        self.down = _thin(lora.A)
        self.blocks = [(part, at, _thin(lora.B[b, : part.rank].contiguous())) for part, at, b in lora.blocks()]
        self.gains = None if lora.magnitude is None else lora.gains(layer.dense(lora.A.dtype))

    def add_(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """Add to y = x W^T + b what the adapters make of x."""
        h = self.down(x)
        for part, at, up in self.blocks:
            y[..., part.start : part.stop].add_(up(h[..., at].contiguous()), alpha=part.scale)
        if self.gains is None:
            return y
        return y.mul_(self.gains) if bias is None else y.mul_(self.gains).add_(bias * (1 - self.gains))


def _thin(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x (..., C) -> x W^T for an adapter's matrix, whose bits so depend less on the number of rows."""
    return OneDNN(weight) if onednn_works(weight.dtype) else Plain(weight)


class PackedLinear:
    """What a ``Linear`` computes, from a packed weight; the active adapter is looked up in each call."""

    def __init__(self, layer: Linear, weight: Layout) -> None:
        self.weight = weight
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
        for _, layer in _plain(model):
            if (made := _packed_linear(layer)) is not None:
                self.layers.append((layer, made))
        self.head = packed(model.head_weight) if model.packed_head is None else None

    def __enter__(self) -> None:
        for layer, made in self.layers:
            layer.packed = made
        if self.head is not None:
            self.model.packed_head = self.head

    def __exit__(self, *problem: object) -> None:
        for layer, _ in self.layers:
            layer.packed = None
        if self.head is not None:
            self.model.packed_head = None


class HalfEmbedding(nn.Module):
    """An embedding (V, C) whose float32 weight is held in float16, ids (...) -> (..., C) float32; ``fits_half`` says
    for which it is right."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().half(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.get_buffer("weight")).float()


class HeadEmbedding(nn.Module):
    """An embedding (V, C), ids (...) -> (..., C), that has no memory of its own: its rows are the head's."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


def release(model: GPT, *, keep: Collection[str] = ()) -> None:
    """Pack a model's weights for good and let the plain ones go, but those of the parameters ``keep``, which something
    will exchange. The model generates as before, and has no loss and cannot train any more."""
    head = not {"embed.weight", "head.weight"} & set(keep)
    # Most memory is needed beside the largest matrix. So it is the first, unless the others will take less afterwards.
    first = not (half_works() and fits_half(model.head_weight[:SAMPLE]))
    if head and first:
        _release_head(model)
    for name, layer in _plain(model):
        if f"{name}.weight" not in keep and (made := _packed_linear(layer)) is not None:
            layer.packed = made
            layer.hold(None)
    if head and not first:
        _release_head(model)


def _release_head(model: GPT) -> None:
    model.packed_head = head = packed(model.head_weight)
    tied = model.config.tie_embeddings
    if head is None or (tied and isinstance(head, Plain)):  # which lies where the embedding does
        return
    if not tied:
        model.head.register_parameter("weight", None)
    if isinstance(head, Half) if tied else fits_half(model.embed.weight):
        model.embed = HalfEmbedding(model.embed.weight)
    elif tied and isinstance(head, OneDNN) and (rows := Rows.within(head, model.embed.weight)) is not None:
        model.embed = HeadEmbedding(rows)


def _packed_linear(layer: Linear) -> PackedLinear | None:
    weight = None if layer.weight is None else packed(layer.weight)
    return None if weight is None else PackedLinear(layer, weight)


def _plain(model: GPT) -> list[tuple[str, Linear]]:
    """The layers whose weights are parameters and not packed yet, with their names."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    return [(name, layer) for name, layer in linear if layer.packed is None and layer.weight is not None]
