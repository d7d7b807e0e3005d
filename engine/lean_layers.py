"""A model's computation of one token a row on a CPU, without what training asks of it.

A step of a small model takes as long as its calls do: modules that look for hooks and parameters, shapes of a sequence
for each single token, what a backward pass would need, and ten microseconds for each operation of torch, however small.
``LeanStep`` finds all of that once, and computes from the same packed weights what ``GPT`` does. Products with weights
and activations are torch's; what lies between them is numpy's, whose calls take a few times less, and done in place.

No number depends on the rows beside it: numpy computes each number of an array alone, or sums a row in an order that
follows from its length, and a row's products with its keys and values have the shapes that they have without others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afina.engine.kv_pool import KVPool
from afina.engine.linear import Linear
from afina.engine.model import GPT, Layer, Norm
from afina.kernels.backend import wide_dtype
from afina.kernels.decode import counted

# Multiplications of a product up to which numpy computes it. BLAS libraries take no threads of their own for so few
# (OpenBLAS: 2^18); from there on torch does it, in the threads that it was given.
SMALL = 1 << 18

Array = NDArray[np.floating]  # float32, or float64 where the model is
Function = Callable[[Array], Array]


class LeanStep:
    """``step(table)`` is what ``DecodeStep`` gives for int64 (4, B) on the CPU, whose rows of length 0 are at the end.
    Norms have the weights that they had when this was made. Under 16 bits only products and what is stored have them:
    sums and norms are wide."""

    def __init__(self, model: GPT, pool: KVPool, longest: int) -> None:
        self.model, self.longest = model, longest
        self.casts = Casts(model.dtype)
        self.layers = [LeanLayer(layer, pool, self.casts) for layer in model.layers]
        norm = _norm(model.norm, self.casts)
        assert norm is not None
        self.norm = norm

    def __call__(self, table: Tensor) -> Tensor:
        casts, model = self.casts, self.model
        _, starts, lengths, places = table.numpy()
        positions, totals = torch.from_numpy(np.maximum(lengths - 1, 0)), table[2]
        residual = casts.array(model.embedded(table[0], positions, totals, self.longest))
        angles = [Angles.of(*rope.looked_up(positions, totals, self.longest)) for rope in model.ropes]
        rows = [row for row in zip(starts.tolist(), lengths.tolist(), strict=True) if row[1]]
        seen: dict[int | None, Seen] = {}  # by the window
        branch = None
        with np.errstate(all="ignore"):  # what is not finite shows in the logits
            for layer in self.layers:
                if layer.window not in seen:
                    seen[layer.window] = Seen(rows, layer, residual.dtype)
                residual, branch = layer(residual, branch, angles, places, seen[layer.window])
            assert branch is not None
            residual += branch
            return model.logits(casts.tensor(self.norm(residual)))


class Casts:
    """Between torch's tensors in a model's dtype and numpy's arrays in one that numpy has. ``same``: the two are one,
    and so is the memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        wide = wide_dtype(dtype)
        self.same = dtype == wide
        self.array: Callable[[Tensor], Array] = Tensor.numpy if self.same else lambda x: x.to(wide).numpy()
        self.tensor: Callable[[Array], Tensor] = (
            torch.from_numpy if self.same else lambda x: torch.from_numpy(x).to(dtype)
        )

    def memory(self, x: Tensor) -> Any:
        """What is to be written to: an array, if there can be one."""
        return x.numpy() if self.same else x


class Angles(NamedTuple):
    """What turns each row's heads: x -> x * cos + [second half of x, first half of x] * signed."""

    cos: Array  # (B, 1, 1, h)
    signed: Array  # (B, 1, 2, h): [-sin, sin]

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> Angles:
        """cos and sin (B, h)."""
        signed = sin[:, None, None].numpy().repeat(2, 2)
        np.negative(signed[:, :, 0], out=signed[:, :, 0])
        return cls(cos[:, None, None].numpy(), signed)

    def turn_(self, x: Array) -> None:
        """Turn x (B, H, D) in place; what is wider than the angles stays as it is."""
        half = self.cos.shape[-1]
        halves = x[..., : 2 * half].reshape(*x.shape[:2], 2, half)  # the same memory
        other = halves[:, :, ::-1] * self.signed
        halves *= self.cos
        halves += other


class Seen:
    """Which tokens of the pool each row of a step attends to, as a layer's window lets it, and room for its queries and
    scores. The layers use it one after the other."""

    def __init__(self, rows: list[tuple[int, int]], layer: LeanLayer, dtype: np.dtype[Any]) -> None:
        heads, shape = layer.heads, (layer.kv_heads, layer.heads // layer.kv_heads)
        self.queries = np.empty((len(rows), heads, layer.head_dim), dtype)
        ranges = [counted(start, length, layer.window) for start, length in rows]
        self.counts = np.array([count for _, count in ranges for _ in range(heads)])
        ends = self.counts.cumsum()
        self.starts = ends - self.counts  # of each row's and head's scores
        self.scores = np.empty(ends[-1], dtype)
        # (the first token, the one after the last, queries (Hkv, G, D), scores (Hkv, G, S)) of each row. Its scores are
        # one piece: among others, too, they have the strides that they have alone.
        self.rows: list[tuple[int, int, Array, Array]] = []
        first = 0
        for (start, count), queries in zip(ranges, self.queries.reshape(len(rows), *shape, -1), strict=True):
            last = first + count * heads
            self.rows.append((start, start + count, queries, self.scores[first:last].reshape(*shape, count)))
            first = last


class LeanLayer:
    """``layer(residual, branch, angles, places, seen)`` is what ``Layer.forward`` gives for arrays (B, C) of B rows,
    whose new keys and values go to ``places``. ``residual`` is overwritten."""

    def __init__(self, layer: nn.Module, pool: KVPool, casts: Casts) -> None:
        assert isinstance(layer, Layer)
        attn, mlp = layer.attn, layer.mlp
        self.casts, self.rope, self.parallel = casts, attn.rope, layer.parallel
        self.heads, self.kv_heads, self.head_dim = attn.heads, attn.kv_heads, attn.head_dim
        self.window, self.softcap = attn.options["window"], attn.options["softcap"]
        self.scale = attn.head_dim**-0.5 if attn.options["scale"] is None else attn.options["scale"]
        memory = pool.memory[attn.index]
        self.written = casts.memory(memory.permute(2, 0, 1, 3))  # (N, 2, Hkv, D)
        self.keys = casts.memory(memory[0].transpose(1, 2))  # (Hkv, D, N)
        self.values = casts.memory(memory[1])  # (Hkv, N, D)
        self.qkv, self.o = _product(attn.qkv), _product(attn.o)
        self.wide, self.down, self.act = _product(mlp.gate_up if mlp.gated else mlp.up), _product(mlp.down), mlp.act
        self.attn_norm, self.mlp_norm = _norm(layer.attn_norm, casts), _norm(layer.mlp_norm, casts)
        self.attn_post_norm, self.mlp_post_norm = _norm(layer.attn_post_norm, casts), _norm(layer.mlp_post_norm, casts)
        self.q_norm, self.k_norm = _norm(attn.q_norm, casts), _norm(attn.k_norm, casts)
        self.norm_heads = attn.norm_heads

    def __call__(
        self, residual: Array, branch: Array | None, angles: list[Angles], places: NDArray[np.int64], seen: Seen
    ) -> tuple[Array, Array]:
        array, tensor = self.casts.array, self.casts.tensor
        if branch is not None:
            residual += branch
        y = residual if self.attn_norm is None else self.attn_norm(residual)
        heads = array(self.qkv(tensor(y))).reshape(len(y), -1, self.head_dim)
        self._stored(heads, angles, places)
        attended = array(self.o(tensor(self._attended(heads, seen))))
        if self.attn_post_norm is not None:
            attended = self.attn_post_norm(attended)
        if not self.parallel:
            residual += attended
        y = residual if self.mlp_norm is None else self.mlp_norm(residual)
        branch = array(self.down(self.act(self.wide(tensor(y)))))
        if self.mlp_post_norm is not None:
            branch = self.mlp_post_norm(branch)
        if self.parallel:
            branch += attended
        return residual, branch

    def _stored(self, heads: Array, angles: list[Angles], places: NDArray[np.int64]) -> None:
        """Norm and turn the queries and keys of ``heads`` (B, Hq + 2 Hkv, D); keys and values go to the pool."""
        queries, keys = self.heads, self.heads + self.kv_heads
        for norm, part in ((self.q_norm, heads[:, :queries]), (self.k_norm, heads[:, queries:keys])):
            if norm is not None:
                part[...] = norm(part if self.norm_heads else part.reshape(len(part), -1)).reshape(part.shape)
        if self.rope is not None:
            angles[self.rope].turn_(heads[:, :keys])
        new = heads[:, queries:].reshape(len(heads), 2, self.kv_heads, self.head_dim)
        self.written[places] = new if self.casts.same else self.casts.tensor(new)

    def _attended(self, heads: Array, seen: Seen) -> Array:
        """What each row's queries make of the keys and values that it sees: (B, Hq D), 0 for rows that are none."""
        count, scores, read = len(seen.rows), seen.scores, None if self.casts.same else self.casts.array
        np.multiply(heads[:count, : self.heads], self.scale, out=seen.queries)
        for first, last, queries, into in seen.rows:
            keys = self.keys[:, :, first:last]
            _multiply(queries, keys if read is None else read(keys), into)
        if self.softcap is not None:
            scores /= self.softcap
            np.tanh(scores, out=scores)
            scores *= self.softcap
        scores -= np.maximum.reduceat(scores, seen.starts).repeat(seen.counts)
        np.exp(scores, out=scores)
        out = np.zeros((len(heads), self.heads, self.head_dim), scores.dtype)
        outs = out.reshape(len(heads), self.kv_heads, -1, self.head_dim)
        for (first, last, _, weights), into in zip(seen.rows, outs):
            values = self.values[:, first:last]
            _multiply(weights, values if read is None else read(values), into)
        out[:count] /= np.add.reduceat(scores, seen.starts).reshape(count, -1, 1)
        return out.reshape(len(heads), -1)


def _multiply(a: Array, b: Array, out: Array) -> None:
    """a (H, M, K) times b (H, K, N), to ``out``."""
    if a.shape[1] * a.shape[2] * b.shape[2] <= SMALL:
        np.matmul(a, b, out=out)
    else:
        torch.bmm(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))


def _product(layer: Linear) -> Callable[[Tensor], Tensor]:
    """A layer's product; its weight and adapter are looked up in each call, since both may be exchanged."""

    def product(x: Tensor) -> Tensor:
        packed = layer.packed
        return layer(x) if packed is None else packed(layer, x)

    return product


def _norm(norm: Norm | None, casts: Casts) -> Function | None:
    """x (..., C) -> its norm, in new memory."""
    if norm is None:
        return None
    if norm.layer:
        return lambda x: casts.array(norm(casts.tensor(x)))
    # x / sqrt(mean(x^2) + eps) is sqrt(C) x / sqrt(sum(x^2) + C eps).
    width = norm.weight.numel()
    scale, eps = (casts.array(norm.weight.detach()) + norm.offset) * math.sqrt(width), norm.eps * width

    def rms(x: Array) -> Array:
        size = np.vecdot(x, x)[..., None]
        size += eps
        y = x / np.sqrt(size, out=size)
        y *= scale
        return y

    return rms
