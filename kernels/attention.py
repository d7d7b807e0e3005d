"""Softmax attention: causal or not, grouped heads, packed documents, sliding window, softcap; forward and backward.

A query at position i of its document sees the keys j <= i (causal) with j > i - window:
    s_ij = scale * q_i . k_j       s <- softcap * tanh(s / softcap)       o_i = sum_j softmax(s_i)_j v_j
With p = softmax(s), delta_i = do_i . o_i, ds = p * (do v^T - delta) (* 1 - (s / softcap)^2):
    dv = p^T do       dq = scale * ds k       dk = scale * ds^T q
FLOPs: 4 Hq D a visible pair forward, 10 backward with s computed again. Saved: q, k, v, o (FlashAttention,
https://arxiv.org/abs/2205.14135); scores exist for one block of queries at a time, so memory is linear in length.

Packed documents of like length are padded on the right to a rectangle (which a causal query never sees) and go
through as one batch; a rectangle takes its padding from the document itself, so no document can touch another.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.backend import check_floating, check_like, choose, document_offsets

# Scores of one block of queries (all heads of a rectangle): small enough to stay in cache.
BLOCK_SCORES = 1 << 19


class _Options(NamedTuple):
    causal: bool
    window: int | None
    softcap: float | None
    scale: float


class _Bucket(NamedTuple):
    """Documents laid out as a rectangle (documents, length)."""

    documents: int
    length: int
    start: int  # of the first document where `gather` is None: the rectangle is a view of the tokens
    gather: Tensor | None  # (documents * length,) token of each place; a document's last token fills its padding
    tokens: Tensor | None  # tokens of the bucket
    places: Tensor | None  # and their places in the rectangle

    def take(self, x: Tensor) -> Tensor:
        """(tokens, H, D) -> (documents, length, H, D)."""
        if self.gather is None:
            rows = x[self.start : self.start + self.documents * self.length]
        else:
            rows = x.index_select(0, self.gather)
        return rows.unflatten(0, (self.documents, self.length))

    def put(self, rectangle: Tensor, out: Tensor) -> None:
        """The reverse, without the padding."""
        rows = rectangle.flatten(0, 1)
        if self.tokens is None:
            out[self.start : self.start + rows.shape[0]] = rows
        elif self.places is None:
            out.index_copy_(0, self.tokens, rows)
        else:
            out.index_copy_(0, self.tokens, rows.index_select(0, self.places))


@lru_cache(maxsize=32)
def _plan(offsets: tuple[int, ...], exact: bool, device: torch.device) -> tuple[_Bucket, ...]:
    """Buckets of documents whose lengths are within a quarter of the longest's (equal with `exact`)."""
    documents = sorted(((end - start, start) for start, end in pairwise(offsets) if end > start), reverse=True)
    buckets = []
    while documents:
        length = documents[0][0]
        shortest = length if exact else length - length // 4
        count = sum(1 for size, _ in documents if size >= shortest)
        group, documents = sorted(documents[:count], key=lambda pair: pair[1]), documents[count:]
        starts = torch.tensor([start for _, start in group])
        sizes = torch.tensor([size for size, _ in group])
        full = int(sizes.min()) == length
        if full and bool((starts.diff() == length).all()):
            buckets.append(_Bucket(count, length, group[0][1], None, None, None))
            continue
        place = torch.arange(length).expand(count, length)
        gather = (starts.unsqueeze(1) + place.minimum(sizes.unsqueeze(1) - 1)).flatten().to(device)
        if full:
            buckets.append(_Bucket(count, length, 0, gather, gather, None))
            continue
        places = (place < sizes.unsqueeze(1)).flatten().nonzero().squeeze(1).to(device)
        buckets.append(_Bucket(count, length, 0, gather, gather[places], places))
    return tuple(buckets)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The formulas above, one document at a time, all scores at once; fp32 inside (fp64 for fp64)."""
    if cu_seqlens is not None:
        options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
        offsets = cu_seqlens.tolist()
        pieces = [
            attention_reference(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0]
            for a, b in pairwise(offsets)
        ]
        return torch.cat(pieces) if pieces else torch.zeros_like(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    length, keys = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide).repeat_interleave(group, 2))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~_visible(0, length, 0, keys, keys - length, causal, window, q.device)
    p = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v.to(wide).repeat_interleave(group, 2)).to(q.dtype)


def _visible(
    i0: int, i1: int, j0: int, j1: int, shift: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which of the keys j0..j1 each of the queries i0..i1 sees; query i stands at position i + shift."""
    i = torch.arange(i0 + shift, i1 + shift, device=device).unsqueeze(1)
    j = torch.arange(j0, j1, device=device)
    seen = (j <= i) if causal else torch.ones(i1 - i0, j1 - j0, dtype=torch.bool, device=device)
    return seen if window is None else seen & (j > i - window)


def _forward(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor | None]:
    """q (n, T, Hq, D), k and v (n, S, Hkv, D) -> o (n, T, Hq, D) and what the flash kernel's backward needs."""
    if _flash(q, k, options):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, options.causal, scale=options.scale
        )
        return out.transpose(1, 2), lse
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for rows, columns, p, _ in _blocks(q, k, options):
        out[:, rows] = _ungroup(torch.bmm(p, _heads(v[:, columns], p.dtype)), out[:, rows])
    return out, None


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    if lse is not None:
        group = q.shape[2] // k.shape[2]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(group, 1),
            v.transpose(1, 2).repeat_interleave(group, 1), out.transpose(1, 2), lse, 0.0, options.causal,
            scale=options.scale,
        )  # fmt: skip
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        if group > 1:
            dk, dv = (grad.unflatten(2, (k.shape[2], group)).sum(3) for grad in (dk, dv))
        return dq, dk, dv
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=wide, device=q.device)
    dv = torch.zeros(v.shape, dtype=wide, device=q.device)
    for rows, columns, p, slope in _blocks(q, k, options):
        g, o, qs = (_group(x[:, rows], k.shape[2], wide) for x in (do, out, q))
        ks, vs = _heads(k[:, columns], wide), _heads(v[:, columns], wide)
        ds = torch.bmm(g, vs.transpose(1, 2)).sub_((g * o).sum(-1, keepdim=True)).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        dv[:, columns] += _unheads(torch.bmm(p.transpose(1, 2), g), v.shape[0])
        dk[:, columns] += _unheads(torch.bmm(ds.transpose(1, 2), qs), k.shape[0]).mul_(options.scale)
        dq[:, rows] = _ungroup(torch.bmm(ds, ks).mul_(options.scale), dq[:, rows])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _flash(q: Tensor, k: Tensor, options: _Options) -> bool:
    """torch's CPU flash kernel has neither softcap nor window, and aligns causal queries to the keys' start."""
    return (
        options.softcap is None
        and options.window is None
        and q.device.type == "cpu"
        and q.shape[1] > 0
        and (not options.causal or q.shape[1] == k.shape[1])
        and k.shape[1] > 0
    )


def _blocks(q: Tensor, k: Tensor, options: _Options) -> Any:
    """For each block of queries: its rows, the columns they see, the probabilities (n * Hkv, G * rows, columns) and,
    with a softcap, its derivative 1 - (s / softcap)^2."""
    (n, length, _, _), (keys, heads) = q.shape, k.shape[1:3]
    shift = keys - length
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    size = max(16, BLOCK_SCORES // max(1, n * q.shape[2] * min(keys, (options.window or keys) + 64)))
    # Causal queries before the first key (T > S) see nothing; their output stays 0.
    for i0 in range(max(0, -shift) if options.causal else 0, length if keys else 0, size):
        i1 = min(length, i0 + size)
        j0 = 0 if options.window is None else max(0, i0 + shift - options.window + 1)
        j1 = i1 + shift if options.causal else keys
        qs = _group(q[:, i0:i1], heads, wide)
        s = torch.bmm(qs, _heads(k[:, j0:j1], wide).transpose(1, 2)).mul_(options.scale)
        slope = None
        if options.softcap is not None:
            s.div_(options.softcap).tanh_()
            slope = 1 - s * s
            s.mul_(options.softcap)
        hidden = ~_visible(i0, i1, j0, j1, shift, options.causal, options.window, q.device)
        s.view(n * heads, -1, i1 - i0, j1 - j0).masked_fill_(hidden, -torch.inf)
        yield slice(i0, i1), slice(j0, j1), torch.softmax(s, dim=-1), slope


def _heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, S, H, D) -> (n * H, S, D)."""
    return x.transpose(1, 2).flatten(0, 1).to(dtype)


def _unheads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (n, -1)).transpose(1, 2)


def _group(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(n, T, Hq, D) -> (n * Hkv, G * T, D): the queries that share a key head as the rows of one matrix."""
    n, dim = x.shape[0], x.shape[3]
    return x.to(dtype).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).reshape(n * heads, -1, dim)


def _ungroup(x: Tensor, like: Tensor) -> Tensor:
    n, length, total, dim = like.shape
    return x.view(n, -1, total * n // x.shape[0], length, dim).permute(0, 3, 1, 2, 4).reshape(like.shape)


class _Attention(torch.autograd.Function):
    """q (n, T, Hq, D), or with offsets (T, Hq, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: _Options, plan: tuple[_Bucket, ...] | None
    ) -> Tensor:
        ctx.options, ctx.plan = options, plan
        if plan is None:
            out, lse = _forward(q, k, v, options)
            ctx.save_for_backward(q, k, v, out, lse)
            return out
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        saved = []
        for bucket in plan:
            rectangle, lse = _forward(bucket.take(q), bucket.take(k), bucket.take(v), options)
            bucket.put(rectangle, out)
            saved.append(lse)
        ctx.save_for_backward(q, k, v, out, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        if ctx.plan is None:
            return (*_backward(do, q, k, v, out, saved[0], ctx.options), None, None)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for bucket, lse in zip(ctx.plan, saved):
            rectangles = [bucket.take(x) for x in (do, q, k, v, out)]
            if bucket.places is not None:
                # Padding is no output: no gradient comes from it.
                real = rectangles[0].new_zeros(bucket.documents * bucket.length, 1, 1)
                real[bucket.places] = 1
                rectangles[0] = rectangles[0] * real.unflatten(0, (bucket.documents, bucket.length))
            for grad, rectangle in zip(grads, _backward(*rectangles, lse, ctx.options)):
                bucket.put(rectangle, grad)
        return (*grads, None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of q (B, T, Hq, D) to k and v (B, S, Hkv, D) -> (B, T, Hq, D); Hq a multiple of Hkv, any strides.

    Packed: q, k, v (T, H, D) with cu_seqlens int32 (n + 1,), the boundaries of n documents that do not see each other.
    causal: query i stands at position S - T + i and sees keys up to it; where S < T the first queries see none and
    give 0. window w (causal only): only the last w of those keys, itself included. scale defaults to D ** -0.5.
    Raises ValueError for shapes, dtypes, devices, boundaries or options that do not fit.
    """
    choose(backend, q)
    _check(q, k, v, causal, window, softcap, cu_seqlens)
    options = _Options(causal, window, softcap, q.shape[-1] ** -0.5 if scale is None else scale)
    if cu_seqlens is None:
        return _Attention.apply(q, k, v, options, None)
    plan = _plan(document_offsets(cu_seqlens, q.shape[0]), not causal, q.device)
    return _Attention.apply(q, k, v, options, plan)


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, cu_seqlens: Tensor | None
) -> None:
    check_floating("q", q)
    layout, dims = ("(B, T, H, D)", 4) if cu_seqlens is None else ("(T, H, D)", 3)
    if q.dim() != dims:
        raise ValueError(f"q: expected {layout}, found {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        check_like(name, x, "q", q)
        if x.dim() != dims or x.shape[-1] != q.shape[-1] or x.shape[: dims - 3] != q.shape[: dims - 3]:
            raise ValueError(f"{name}: expected {layout} to fit q {tuple(q.shape)}, found {tuple(x.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, found {tuple(v.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[-2]}, found {k.shape[-2]}")
    if cu_seqlens is not None and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected q's {q.shape[0]} tokens, found {k.shape[0]}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window: expected at least 1, with causal=True, found {window} with causal={causal}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
