"""Rotary positions, also with the RMSNorm of each head in the same pass (QK-norm), beside torch and other projects.

    python benchmarks/bench_rope.py --quick

Providers: afina (Triton), afina-torch, eager (as transformers writes it), compile, liger, fla (rope alone, a call
each for q and k). With QK-norm the others run their norm first.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import NamedTuple

import costs
import torch
from harness import DEVICE, Case, Function, Unavailable, compiled, main, provider, randn, reference
from torch import Tensor

from afina.kernels.norm import rms_norm_reference
from afina.kernels.rope import rope, rope_reference

EPS = 1e-6


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int


SHAPES = {
    "gpu": [Shape(2, 4096, 32, 8, 128)],
    "cpu": [Shape(8, 256, 6, 2, 32), Shape(8, 256, 9, 3, 64), Shape(8, 256, 12, 12, 64)],
    "tiny": [Shape(2, 7, 3, 1, 16)],
}


def half(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), -1)


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    if weights:
        q, k = (norm(x, weight) for x, weight in zip((q, k), weights))
    cos, sin = (torch.cat((x, x), -1).unsqueeze(1).to(q.dtype) for x in (cos, sin))
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    if weights:
        q, k = (rms_norm_reference(x, weight, eps=EPS) for x, weight in zip((q, k), weights))
    return rope_reference(q, k, cos, sin)


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if not weights:
        return rope(q, k, cos, sin, backend=backend)
    return rope(q, k, cos, sin, q_weight=weights[0], k_weight=weights[1], eps=EPS, backend=backend)


def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Function:
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope

    wide = [torch.cat((x, x), -1).unsqueeze(0).to(q.dtype) for x in (cos, sin)]

    def call() -> list[Tensor]:
        # It writes over q and k, and over their gradients; they are its own copies.
        pair = [liger_rms_norm(x, w, EPS, in_place=False) for x, w in zip((q, k), weights)] if weights else [q, k]
        turned = liger_rope(*(x.transpose(1, 2) for x in pair), *wide)
        return [x.transpose(1, 2) for x in turned]

    return call


def fla(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> Function:
    from fla.modules.rotary import rotary_embedding

    if weights:
        raise Unavailable("no QK-norm in the pass")
    tables = [x.to(q.dtype) for x in (cos, sin)]
    return lambda: [rotary_embedding(x, *tables) for x in (q, k)]


def case(shape: Shape, normed: bool) -> Case:
    def inputs() -> list[Tensor]:
        q, k = (randn(shape.batch, shape.length, n, shape.dim, grad=True) for n in (shape.heads, shape.kv_heads))
        frequency = 1e4 ** -torch.linspace(0, 1, shape.dim // 2, device=DEVICE)
        angles = torch.arange(shape.length, device=DEVICE).unsqueeze(1) * frequency
        weights = [(1 + randn(shape.dim, scale=0.1)).requires_grad_() for _ in range(2 if normed else 0)]
        return [q, k, angles.cos(), angles.sin(), *weights]

    name = f"{shape.batch}x{shape.length} {shape.heads}+{shape.kv_heads} heads of {shape.dim}"
    tokens, heads = shape.batch * shape.length, shape.heads + shape.kv_heads
    return Case(
        "rope",
        f"qk-norm {name}" if normed else name,
        inputs,
        lambda inputs: [torch.randn_like(x) for x in inputs[:2]],
        reference(exact),
        {
            "afina": provider(partial(ours, backend="triton")),
            "afina-torch": provider(partial(ours, backend="torch")),
            "eager": provider(eager),
            "compile": lambda *x: partial(compiled(eager), *x),
            "liger": liger,
            "fla": fla,
        },
        costs.rope(tokens, heads, shape.dim, shape.dim, normed, randn(0).itemsize),
    )


def cases(scale: str) -> list[Case]:
    return [case(shape, normed) for shape in SHAPES[scale] for normed in (False, True)]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
