"""Attention, both passes: causal, grouped heads, packed documents, window, softcap; beside torch and other projects.

    python benchmarks/bench_attention.py --quick
    python benchmarks/bench_attention.py --cases hd128 --providers afina flash cudnn flex

Providers: afina (Triton), afina-gluon (Gluon, for Hopper), afina-sdpa (torch's kernels through our interface),
afina-torch, eager (all scores, as transformers writes it), compile, flash, cudnn, efficient
(scaled_dot_product_attention on one of its backends),
varlen (torch's packed FlashAttention), flex (FlexAttention, compiled), flash-attn, fla. scaled_dot_product_attention
knows no packed documents: as they are of one length here, it gets them as a batch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any, NamedTuple

import costs
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU, Case, Function, Unavailable, compiled, main, provider, randn, wide
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from afina.kernels.attention import attention, attention_reference, gluon_runs

REFERENCE_SCORES = 1 << 28  # of the reference at a time


class Shape(NamedTuple):
    """Rows of one length, or with `lengths` documents packed into one row."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    softcap: float | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def documents(self) -> tuple[int, ...]:
        return self.lengths or (self.length,) * self.batch

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.documents)], dtype=torch.int32)


# Tokens: 16k a case. On a CPU: models of hidden size 192, 576 and 768, and documents of 8 to 40 tokens.
SHORT = tuple(8 + 37 * i % 33 for i in range(85))
SHAPES = {
    "gpu": {
        "hd128 causal 8k": Shape(2, 8192, 16, 16, 128),
        "hd128 causal 16k": Shape(1, 16384, 16, 16, 128),
        "hd64 causal 16k": Shape(1, 16384, 16, 16, 64),
        "hd128 gqa4 causal 16k": Shape(1, 16384, 16, 4, 128),
        "hd128 packed 32x512": Shape(1, 16384, 16, 16, 128, lengths=(512,) * 32),
        "hd128 window1024 16k": Shape(1, 16384, 16, 16, 128, window=1024),
        "hd128 softcap50 8k": Shape(2, 8192, 16, 16, 128, softcap=50.0),
    },
    "cpu": {
        f"{heads}+{kv_heads} heads of {dim} {name}": Shape(batch, length, heads, kv_heads, dim, lengths=lengths)
        for heads, kv_heads, dim in ((6, 2, 32), (9, 3, 64), (12, 12, 64))
        for name, batch, length, lengths in (
            ("2x1024", 2, 1024, None),
            ("8x256", 8, 256, None),
            ("100x20", 100, 20, None),
            ("packed", 1, sum(SHORT), SHORT),
        )
    },
    "tiny": {
        "hd16 causal": Shape(1, 33, 2, 1, 16),
        "hd16 packed": Shape(1, 48, 2, 1, 16, lengths=(16,) * 3),
        "hd16 window softcap": Shape(1, 40, 2, 2, 16, window=7, softcap=5.0),
    },
}


def slices(shape: Shape) -> Iterator[tuple[int, slice, slice, slice]]:
    """(row, tokens, query heads, their key head) of pieces whose scores the reference computes at a time."""
    group = shape.heads // shape.kv_heads
    starts = [0, *accumulate(shape.documents)] if shape.lengths else [0, shape.length]
    for row, (start, end) in product(range(shape.batch), pairwise(starts)):
        count = max(1, min(group, REFERENCE_SCORES // max(1, (end - start) ** 2)))
        for key, first in product(range(shape.kv_heads), range(0, group, count)):
            heads = slice(key * group + first, key * group + min(first + count, group))
            yield row, slice(start, end), heads, slice(key, key + 1)


def expected(shape: Shape, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The reference, a document and some heads at a time: all scores together would not fit."""
    q, k, v = (x.detach().to(wide()) for x in inputs)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for row, tokens, heads, keys in slices(shape):
        leaves = [x[row : row + 1, tokens, h].requires_grad_() for x, h in ((q, heads), (k, keys), (v, keys))]
        piece = attention_reference(*leaves, window=shape.window, softcap=shape.softcap)
        grads = torch.autograd.grad(piece, leaves, upstream[0][row : row + 1, tokens, heads].to(wide()))
        out[row : row + 1, tokens, heads] = piece.detach()
        for total, grad, h in zip((dq, dk, dv), grads, (heads, keys, keys)):
            total[row : row + 1, tokens, h] += grad
    return [out, dq, dk, dv]


def ours(shape: Shape, backend: str | None) -> Callable[..., Function]:
    options: dict[str, Any] = {"window": shape.window, "softcap": shape.softcap, "backend": backend}

    def make(q: Tensor, k: Tensor, v: Tensor) -> Function:
        if shape.lengths is None:
            return lambda: attention(q, k, v, **options)
        cu = shape.offsets  # on the CPU, where the model keeps them
        return lambda: attention(q[0], k[0], v[0], cu_seqlens=cu, **options)[None]

    return make


def on_gluon(shape: Shape) -> Callable[..., Function]:
    make = ours(shape, "gluon")

    def refused_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Function:
        if not gluon_runs(q.device):
            raise Unavailable("the Gluon kernels are for GPUs of compute capability 9")
        return make(q, k, v)

    return refused_elsewhere


def rectangle(shape: Shape, x: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, H, T, D), documents of one length as rows."""
    if shape.lengths:
        if len(set(shape.lengths)) > 1:
            raise Unavailable("no packed documents of different lengths")
        x = x.view(len(shape.lengths), shape.lengths[0], *x.shape[2:])
    return x.transpose(1, 2)


def padded(shape: Shape, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of rectangles; packed documents of different lengths are padded to the longest."""
    if shape.lengths is None or len(set(shape.lengths)) == 1:
        return lambda *x: function(*(rectangle(shape, one) for one in x)).transpose(1, 2).reshape(x[0].shape)
    longest, count = max(shape.lengths), len(shape.lengths)
    place = torch.arange(longest) < torch.tensor(shape.lengths)[:, None]
    places = place.flatten().nonzero().squeeze(1).to(DEVICE)

    def call(*packed: Tensor) -> Tensor:
        rows = (x.new_zeros(count * longest, *x.shape[2:]).index_copy(0, places, x[0]) for x in packed)
        out = function(*(x.unflatten(0, (count, longest)).transpose(1, 2) for x in rows))
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)[None]

    return call


def visible(length: int, window: int | None) -> Tensor:
    i = torch.arange(length, device=DEVICE)
    seen = i <= i.unsqueeze(1)
    return seen if window is None else seen & (i > i.unsqueeze(1) - window)


def eager(shape: Shape) -> Callable[..., Tensor]:
    hidden = ~visible(max(shape.documents), shape.window)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if shape.softcap is not None:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        p = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1, dtype=torch.float32)
        return p.to(q.dtype) @ v

    return padded(shape, call)


def sdpa(shape: Shape, backend: SDPBackend | None) -> Callable[..., Function]:
    if shape.softcap is not None:

        def refuse(*x: Tensor) -> Function:
            raise Unavailable("scaled_dot_product_attention has no softcap")

        return refuse
    mask = None if shape.window is None else partial(visible, shape.length, shape.window)

    def make(q: Tensor, k: Tensor, v: Tensor) -> Function:
        seen = None if mask is None else mask()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=q.shape[1] != k.shape[1]
            )

        call = padded(shape, attend)
        if backend is None:
            return lambda: call(q, k, v)

        def chosen() -> Tensor:
            with sdpa_kernel(backend):
                return call(q, k, v)

        return chosen

    return make


def flex(shape: Shape) -> Callable[..., Function]:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document = None
        if shape.lengths:
            lengths = torch.tensor(shape.lengths)
            document = torch.arange(len(lengths)).repeat_interleave(lengths).to(DEVICE)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = i >= j
            if shape.window is not None:
                seen = seen & (i - j < shape.window)
            return seen if document is None else seen & (document[i] == document[j])

        def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert shape.softcap is not None
            return shape.softcap * torch.tanh(score / shape.softcap)

        blocks = create_block_mask(mask, None, None, shape.length, shape.length, device=DEVICE.type)
        call = compiled(
            partial(
                flex_attention,
                score_mod=None if shape.softcap is None else cap,
                block_mask=blocks,
                enable_gqa=shape.heads != shape.kv_heads,
            )
        )
        return lambda: call(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return make


def varlen(shape: Shape) -> Callable[..., Function]:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Function:
        from torch.nn.attention.varlen import varlen_attn

        if shape.softcap is not None:
            raise Unavailable("varlen_attn has no softcap")
        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = {"enable_gqa": True} if shape.heads != shape.kv_heads else {}
        # Newer ones say causal by a window without keys to the right.
        if "is_causal" in known and shape.window is None:
            options["is_causal"] = True
        else:
            options["window_size"] = (-1 if shape.window is None else shape.window - 1, 0)
        if missing := set(options) - set(known):
            raise Unavailable(f"varlen_attn of torch {torch.__version__} has no {min(missing)}")
        cu, longest = shape.offsets.to(DEVICE), max(shape.documents)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return lambda: varlen_attn(*flat, cu, cu, longest, longest, **options).view(q.shape)

    return make


def flash_attn(shape: Shape) -> Callable[..., Function]:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Function:
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        window = (-1 if shape.window is None else shape.window - 1, 0)
        options = {"causal": True, "window_size": window, "softcap": shape.softcap or 0.0}
        if shape.lengths is None:
            return lambda: flash_attn_func(q, k, v, **options)
        cu, longest = shape.offsets.to(DEVICE), max(shape.documents)
        return lambda: flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, longest, longest, **options)[None]

    return make


def fla(shape: Shape) -> Callable[..., Function]:
    def make(q: Tensor, k: Tensor, v: Tensor) -> Function:
        from fla.ops.attn.parallel import parallel_attn

        if shape.softcap is not None:
            raise Unavailable("no softcap")
        cu = shape.offsets.long().to(DEVICE) if shape.lengths else None
        return lambda: parallel_attn(q, k, v, window_size=shape.window, cu_seqlens=cu)

    return make


def case(name: str, shape: Shape) -> Case:
    def inputs() -> list[Tensor]:
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        return [randn(shape.batch, shape.length, n, shape.dim, grad=True) for n in heads]

    providers: dict[str, Callable[..., Any]] = {"afina": ours(shape, "triton"), "afina-sdpa": ours(shape, "sdpa")}
    if shape.window is None and shape.softcap is None:
        providers["afina-gluon"] = on_gluon(shape)
    if GPU:
        providers |= {
            "flash": sdpa(shape, SDPBackend.FLASH_ATTENTION),
            "cudnn": sdpa(shape, SDPBackend.CUDNN_ATTENTION),
            "efficient": sdpa(shape, SDPBackend.EFFICIENT_ATTENTION),
            "varlen": varlen(shape),
            "flash-attn": flash_attn(shape),
            "fla": fla(shape),
        }
    else:
        providers["sdpa"] = sdpa(shape, None)
    providers |= {
        "afina-torch": ours(shape, "torch"),
        "eager": lambda *x: provider(eager(shape))(*x),
        "flex": flex(shape),
        "compile": lambda *x: partial(compiled(eager(shape)), *x),
    }
    return Case(
        "attention",
        name,
        inputs,
        lambda inputs: [torch.randn_like(inputs[0])],
        partial(expected, shape),
        providers,
        costs.attention(
            shape.documents, shape.heads, shape.kv_heads, shape.dim, window=shape.window, itemsize=randn(0).itemsize
        ),
    )


def cases(scale: str) -> list[Case]:
    return [case(name, shape) for name, shape in SHAPES[scale].items()]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
