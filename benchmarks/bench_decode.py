"""Attention of one new token a sequence to its cache, beside torch and other projects' kernels. Forward only.

    python benchmarks/bench_decode.py --quick
    python benchmarks/bench_decode.py --cases B16 --providers afina flash

32 query heads on 8 key heads of 128; every row's cache is full. Providers: afina (Triton), afina-torch, eager (all
scores, as transformers writes it), flash, cudnn, efficient (scaled_dot_product_attention on one of its backends),
flash-attn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import costs
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU, Case, Function, main, provider, randn, reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from afina.kernels.decode import decode_attention, decode_attention_reference


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128


SHAPES = {
    "gpu": [Shape(batch, length) for length in (4096, 32768) for batch in (1, 16, 64)],
    "cpu": [Shape(8, 512, 9, 3, 64), Shape(1, 2048, 9, 3, 64)],
    "tiny": [Shape(3, 40, 4, 2, 16)],
}


def eager(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    k, v = (x.transpose(1, 2).repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v))
    p = torch.softmax(q.unsqueeze(2) @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1, dtype=torch.float32)
    return (p.to(q.dtype) @ v).squeeze(2)


def sdpa(backend: SDPBackend | None) -> Callable[..., Function]:
    def make(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Function:
        def call() -> Tensor:
            out = F.scaled_dot_product_attention(
                q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q.shape[1] != k.shape[2]
            )
            return out.squeeze(2)

        if backend is None:
            return call

        def chosen() -> Tensor:
            with sdpa_kernel(backend):
                return call()

        return chosen

    return make


def flash_attn(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Function:
    from flash_attn import flash_attn_with_kvcache

    return lambda: flash_attn_with_kvcache(q.unsqueeze(1), k, v, cache_seqlens=lengths).squeeze(1)


def case(shape: Shape) -> Case:
    def inputs() -> list[Tensor]:
        caches = (randn(shape.batch, shape.length, shape.kv_heads, shape.dim) for _ in range(2))
        lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=DEVICE)
        return [randn(shape.batch, shape.heads, shape.dim), *caches, lengths]

    providers: dict[str, Callable[..., Any]] = {
        "afina": provider(partial(decode_attention, backend="triton")),
        "afina-torch": provider(partial(decode_attention, backend="torch")),
        "eager": provider(eager),
    }
    if GPU:
        providers |= {
            "flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
            "flash-attn": flash_attn,
        }
    else:
        providers["sdpa"] = sdpa(None)
    return Case(
        "decode",
        f"B{shape.batch} S{shape.length}",
        inputs,
        lambda inputs: [],
        expected,
        providers,
        costs.decode([shape.length] * shape.batch, shape.heads, shape.kv_heads, shape.dim, randn(0).itemsize),
    )


def expected(inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """A row at a time: a wider copy of all caches may not fit."""
    q, k, v, lengths = inputs
    rows = range(len(q))
    one = reference(decode_attention_reference)
    return [torch.cat([one([x[i : i + 1] for x in (q, k, v, lengths)], [])[0] for i in rows])]


def cases(scale: str) -> list[Case]:
    return [case(shape) for shape in SHAPES[scale]]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
