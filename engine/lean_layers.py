"""A layer's computation of one token a row on a CPU, without what training asks of it.

A step of a small model takes as long as its calls do: modules that look for hooks and parameters, shapes of a sequence
for each single token, what a backward pass would need. ``LeanLayer`` finds all of that once, and computes from the same
packed weights what ``Layer.forward`` does, in as few operations as need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from afina.engine.linear import Linear
from afina.engine.model import Layer, Norm
from afina.kernels.rope_torch import turned

if TYPE_CHECKING:
    from afina.engine.kv_pool import StepCache

Function = Callable[[Tensor], Tensor]
Angles = tuple[Tensor, Tensor]  # those of ``rope_torch.laid_out`` for each row: (B, 1, D_rot)


class LeanLayer:
    """``lean(residual, branch, angles, cache)`` is what ``Layer.forward`` gives for tensors (B, C) of B rows, whose
    keys and values ``cache`` has. Norms have the weights that they had when this was made."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, Layer)
        attn, mlp = layer.attn, layer.mlp
        self.index, self.rope, self.parallel = attn.index, attn.rope, layer.parallel
        self.heads, self.kv_heads, self.head_dim = attn.heads, attn.kv_heads, attn.head_dim
        self.options = attn.options
        self.qkv, self.o = _product(attn.qkv), _product(attn.o)
        self.wide, self.down, self.act = _product(mlp.gate_up if mlp.gated else mlp.up), _product(mlp.down), mlp.act
        self.attn_norm, self.mlp_norm = _norm(layer.attn_norm), _norm(layer.mlp_norm)
        self.attn_post_norm, self.mlp_post_norm = _norm(layer.attn_post_norm), _norm(layer.mlp_post_norm)
        self.q_norm, self.k_norm, self.norm_heads = _norm(attn.q_norm), _norm(attn.k_norm), attn.norm_heads

    def __call__(
        self, residual: Tensor, branch: Tensor | None, angles: Sequence[Angles], cache: StepCache
    ) -> tuple[Tensor, Tensor]:
        if branch is not None:
            residual = residual + branch
        y = residual if self.attn_norm is None else self.attn_norm(residual)
        attended = self._attended(y, angles, cache)
        if self.attn_post_norm is not None:
            attended = self.attn_post_norm(attended)
        if not self.parallel:
            residual = residual + attended
        y = residual if self.mlp_norm is None else self.mlp_norm(residual)
        branch = self.down(self.act(self.wide(y)))
        if self.mlp_post_norm is not None:
            branch = self.mlp_post_norm(branch)
        return residual, attended + branch if self.parallel else branch

    def _attended(self, y: Tensor, angles: Sequence[Angles], cache: StepCache) -> Tensor:
        count, queries, keys = len(y), self.heads, self.kv_heads
        heads = self.qkv(y).view(count, -1, self.head_dim)
        both = heads.narrow(1, 0, queries + keys)
        if self.q_norm is not None and self.k_norm is not None:
            parts = [both.narrow(1, 0, queries), both.narrow(1, queries, keys)]
            if not self.norm_heads:
                parts = [part.flatten(1) for part in parts]
            normed = self.q_norm(parts[0]), self.k_norm(parts[1])
            both = torch.cat([part.view(count, -1, self.head_dim) for part in normed], 1)
        if self.rope is not None:
            both = turned(both, *angles[self.rope])
        q, k, v = both.narrow(1, 0, queries), both.narrow(1, queries, keys), heads.narrow(1, queries + keys, keys)
        return self.o(cache.attend_rows(self.index, q, k, v, **self.options).view(count, -1))


def _product(layer: Linear) -> Function:
    """A layer's product; its weight and adapter are looked up in each call, since both may be exchanged."""

    def product(x: Tensor) -> Tensor:
        packed = layer.packed
        return layer(x) if packed is None else packed(layer, x)

    return product


def _norm(norm: Norm | None) -> Function | None:
    if norm is None or norm.layer or norm.weight.dtype != torch.float32:
        return norm
    scale = norm.weight.detach() + norm.offset if norm.offset else norm.weight.detach()
    part, eps = 1 / norm.weight.numel(), torch.tensor(norm.eps)

    def rms(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(eps, size, size, value=part).rsqrt_()).mul_(scale)

    return rms
