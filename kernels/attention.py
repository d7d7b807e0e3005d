"""Softmax attention: causal or not, grouped heads, packed documents, sliding window, softcap; forward and backward.

A query at position i of its document sees the keys j <= i (causal) with j > i - window:
    s_ij = scale * q_i . k_j       s <- softcap * tanh(s / softcap)       o_i = sum_j softmax(s_i)_j v_j
With p = softmax(s), delta_i = do_i . o_i, ds = p * (do v^T - delta) (* 1 - (s / softcap)^2):
    dv = p^T do       dq = scale * ds k       dk = scale * ds^T q
Saved: q, k, v, o and the log-sum-exp of each row of scores, from which the backward pass computes p again
(FlashAttention-2, https://arxiv.org/abs/2307.08691). FLOPs: 4 Hq D a visible pair forward; 14 backward, 4 of them the
scores and do v^T a second time: dq has a kernel of its own, so that nothing is added up in an order left to chance.

A program of the kernels owns BLOCK_M consecutive queries (or BLOCK_N keys) of a head and takes the documents in them
one after the other, so no number of one document is ever multiplied by another's. What its rows see of a document
begins and ends at rising positions: only the tiles that some row sees are visited, and only those that not all rows see
whole (at the window's edge, the diagonal, the end) are masked. Softmax is to base 2, log2(e) folded into the scale.
Strides and head counts are compiled in: a tile's offsets then stand in its instructions, and not in scarce registers.

On CPUs and in float64 the blocked products of `attention_blocks.py` run instead.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from afina.kernels.attention_blocks import Bucket, Options, blocked_attention, plan_buckets, visible
from afina.kernels.backend import check_floating, check_like, choose, document_offsets, wide_dtype
from afina.kernels.launch import INTERPRETED, cdiv, config, jit, launch, power_of_two, tl

MAX_HEAD_DIM = 256  # of the Triton kernels
LOG2_E = 1.4426950408889634
TINY = 1e-37  # instead of a scale of 0, which would make -inf NaN
# Heads are taken together as long as what they read again and again (keys and values, say) stays in the L2 cache.
L2_BYTES = 16 << 20


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
            attention_reference(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0] for a, b in pairwise(offsets)
        ]
        return torch.cat(pieces) if pieces else torch.zeros_like(q)
    wide = wide_dtype(q.dtype)
    length, keys = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide).repeat_interleave(group, 2))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~visible(length, keys, keys - length, causal, window, q.device)
    p = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v.to(wide).repeat_interleave(group, 2)).to(q.dtype)


@jit
def _place(tiles, section, LAST_FIRST: tl.constexpr):
    """The head and the tile of this program: heads by the section, within it tile by tile, each of all its heads."""
    program = tl.program_id(0)
    first = program // (tiles * section) * section
    width = tl.minimum(section, tl.num_programs(0) // tiles - first)
    rest = program - first * tiles
    tile = rest // width
    if LAST_FIRST:
        tile = tiles - 1 - tile  # the longest rows first, so that none of them is left over at the end
    return first + rest % width, tile


@jit
def _tile(base, rows, stop, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """These rows of a matrix (.., D), 0 from row `stop` on."""
    column = tl.arange(0, BLOCK_D)
    pointers = base + (rows[:, None] * stride + column[None, :])
    if D == BLOCK_D:
        x = tl.load(pointers, mask=(rows < stop)[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=(rows < stop)[:, None] & (column < D)[None, :], other=0.0)
    # The interpreter multiplies matrices of bfloat16 wrongly.
    return x.to(tl.float32) if UPCAST else x


@jit
def _put_tile(base, x, rows, stop, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointers = base + (rows[:, None] * stride + column[None, :])
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(rows < stop)[:, None] & (column < D)[None, :])


@jit
def _keys_seen(first, last, start, end, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """By the queries first .. last of a document with the keys [start, end): from where to where by any of them, and
    from where to where by all."""
    begin = start
    all_from = start
    all_to = end
    stop = end
    if WINDOW:
        begin = tl.maximum(start, first + shift - window + 1)
        all_from = tl.maximum(start, last + shift - window + 1)
    if CAUSAL:
        all_to = tl.maximum(start, first + shift + 1)
        stop = tl.maximum(start, last + shift + 1)
    return begin, stop, all_from, all_to


@jit
def _queries_seeing(first, last, start, end, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The keys first .. last, of the queries [start, end) of their document: likewise."""
    begin = start
    all_from = start
    all_to = end
    stop = end
    if CAUSAL:
        begin = tl.maximum(start, first - shift)
        all_from = tl.maximum(start, last - shift)
    if WINDOW:
        all_to = tl.minimum(end, first - shift + window)
        stop = tl.minimum(end, last - shift + window)
    return begin, stop, all_from, all_to


@jit
def _is_edge(start, end, all_from, all_to, LEFT: tl.constexpr):
    """Whether a tile is not inside [all_from, all_to); without LEFT none begins before that."""
    if LEFT:
        return (start < all_from) | (end > all_to)
    else:
        return end > all_to


@jit
def _sees(query, key, stop, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query sees a key of its document, before `stop`, where the keys end that any of the queries sees."""
    if CAUSAL:
        seen = key <= query + shift
    else:
        seen = key < stop
    if WINDOW:
        seen = seen & (key > query + shift - window)
    return seen


@jit
def tanh(x, PRECISE: tl.constexpr):
    """From exp2 alone, which GPUs and the interpreter have; PRECISE: in fp32 near 0 too."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x))
    if PRECISE:
        # Near 0 that difference has lost its digits.
        square = x * x
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        y = tl.where(square < 0.0625, x * series, y)
    return y


@jit
def _forward_tile(
    query, k, v, acc, total, top, rows, at, stop, edge, k_token, v_token, shift, window, inner, outer, D: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys from `at` on: outputs `acc`, sums `total` and maxima `top` so far -> with them."""
    columns = tl.arange(0, BLOCK_N)
    key = _tile(k + tl.cast(at, tl.int64) * k_token, columns, stop - at, k_token, D, BLOCK_D, UPCAST)
    s = tl.dot(query, tl.trans(key), input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * inner, query.dtype == tl.float32)
    if edge:
        seen = _sees(rows[:, None], columns[None, :], stop - at, shift - at, window, CAUSAL, WINDOW)
        s = tl.where(seen, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * outer)
    base = tl.where(new_top == -float("inf"), 0.0, new_top)  # of a row that has seen nothing yet
    p = tl.exp2(s * outer - base[:, None])
    shrink = tl.exp2(top - base)
    value = _tile(v + tl.cast(at, tl.int64) * v_token, columns, stop - at, v_token, D, BLOCK_D, UPCAST)
    acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new_top


@jit
def _forward_rows(
    q, k, v, out, lse, q_token, k_token, v_token, out_token, first, row_stop, start, end, shift, window, inner, outer,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries [first, row_stop) of one head, of one document with the keys [start, end)."""
    begin, stop, all_from, all_to = _keys_seen(first, row_stop - 1, start, end, shift, window, CAUSAL, WINDOW)
    rows = first + tl.arange(0, BLOCK_M)
    query = _tile(q, rows, row_stop, q_token, D, BLOCK_D, UPCAST)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for at in range(begin, stop, BLOCK_N):
        edge = _is_edge(at, at + BLOCK_N, all_from, all_to, WINDOW)
        acc, total, top = _forward_tile(
            query, k, v, acc, total, top, rows, at, stop, edge, k_token, v_token, shift, window, inner, outer, D,
            BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_N
        )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    _put_tile(out, acc, rows, row_stop, out_token, D, BLOCK_D)
    tl.store(lse + rows, top + tl.log2(total), mask=rows < row_stop)


@jit(do_not_specialize=["queries", "keys", "section", "window"])
def _attention_forward(
    q, k, v, out, lse, spans, q_batch, q_token: tl.constexpr, q_head: tl.constexpr, k_batch, k_token: tl.constexpr,
    k_head: tl.constexpr, v_batch, v_token: tl.constexpr, v_head: tl.constexpr, queries, keys, heads: tl.constexpr,
    group: tl.constexpr, section, window, inner, outer, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (B, T, Hq, D) contiguous, lse (B, Hq, T) to base 2. spans (2, T): where each token's document starts, ends.

    Rows are counted from the program's first, so that their offsets fit into 32 bits.
    """
    place, tile = _place(tl.cdiv(queries, BLOCK_M), section, CAUSAL)
    batch = (place // heads).to(tl.int64)
    head = (place % heads).to(tl.int64)
    key_head = (place % heads // group).to(tl.int64)
    offset = tl.cast(tile, tl.int64) * BLOCK_M
    q += batch * q_batch + head * q_head + offset * q_token
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    out += ((batch * queries + offset) * heads + head) * D
    lse += (batch * heads + head) * queries + offset
    shift = keys - queries + tile * BLOCK_M
    first = 0
    stop = tl.minimum(BLOCK_M, queries - tile * BLOCK_M)
    if spans is None:
        _forward_rows(
            q, k, v, out, lse, q_token, k_token, v_token, heads * D, first, stop, 0, keys, shift, window, inner, outer,
            D, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M, BLOCK_N
        )  # fmt: skip
    else:
        while first < stop:
            start = tl.load(spans + offset + first)
            end = tl.load(spans + queries + offset + first)
            row_stop = tl.minimum(stop, end - tile * BLOCK_M)
            _forward_rows(
                q, k, v, out, lse, q_token, k_token, v_token, heads * D, first, row_stop, start, end, shift, window,
                inner, outer, D, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M, BLOCK_N
            )  # fmt: skip
            first = row_stop


@jit(do_not_specialize=["queries"])
def _attention_delta(
    out, dout, delta, do_batch, do_token: tl.constexpr, do_head: tl.constexpr, queries, heads: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (B, Hq, T): the sum of dout * out over a row."""
    place, tile = _place(tl.cdiv(queries, BLOCK_M), heads, False)
    batch = (place // heads).to(tl.int64)
    head = (place % heads).to(tl.int64)
    offset = tl.cast(tile, tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    stop = queries - tile * BLOCK_M
    out += ((batch * queries + offset) * heads + head) * D
    dout += batch * do_batch + head * do_head + offset * do_token
    o = _tile(out, rows, stop, heads * D, D, BLOCK_D, True)
    do = _tile(dout, rows, stop, do_token, D, BLOCK_D, True)
    tl.store(delta + (batch * heads + head) * queries + offset + rows, tl.sum(o * do, 1), mask=rows < stop)


@jit
def _dq_tile(
    query, grad, k, v, row_lse, row_delta, dq, rows, at, stop, edge, k_token, v_token, shift, window, inner, outer,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    key = _tile(k + tl.cast(at, tl.int64) * k_token, columns, stop - at, k_token, D, BLOCK_D, UPCAST)
    value = _tile(v + tl.cast(at, tl.int64) * v_token, columns, stop - at, v_token, D, BLOCK_D, UPCAST)
    s = tl.dot(query, tl.trans(key), input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * inner, query.dtype == tl.float32)
    p = tl.exp2(s * outer - row_lse[:, None])
    if edge:
        seen = _sees(rows[:, None], columns[None, :], stop - at, shift - at, window, CAUSAL, WINDOW)
        p = tl.where(seen, p, 0.0)
    if SOFTCAP:
        p = p - p * s * s
    minus_delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) - row_delta[:, None]
    ds = p * tl.dot(grad, tl.trans(value), minus_delta, input_precision="ieee")
    return tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")


@jit
def _dq_rows(
    q, k, v, dout, lse, delta, grad_q, q_token, k_token, v_token, do_token, grad_token, first, row_stop, start, end,
    shift, window, inner, outer, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin, stop, all_from, all_to = _keys_seen(first, row_stop - 1, start, end, shift, window, CAUSAL, WINDOW)
    rows = first + tl.arange(0, BLOCK_M)
    query = _tile(q, rows, row_stop, q_token, D, BLOCK_D, UPCAST)
    grad = _tile(dout, rows, row_stop, do_token, D, BLOCK_D, UPCAST)
    row_lse = tl.load(lse + rows, mask=rows < row_stop, other=0.0)
    row_delta = tl.load(delta + rows, mask=rows < row_stop, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(begin, stop, BLOCK_N):
        edge = _is_edge(at, at + BLOCK_N, all_from, all_to, WINDOW)
        dq = _dq_tile(
            query, grad, k, v, row_lse, row_delta, dq, rows, at, stop, edge, k_token, v_token, shift, window, inner,
            outer, D, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M, BLOCK_N
        )  # fmt: skip
    _put_tile(grad_q, dq * scale, rows, row_stop, grad_token, D, BLOCK_D)


@jit(do_not_specialize=["queries", "keys", "section", "window"])
def _attention_dq(
    q, k, v, dout, lse, delta, grad_q, spans, q_batch, q_token: tl.constexpr, q_head: tl.constexpr, k_batch,
    k_token: tl.constexpr, k_head: tl.constexpr, v_batch, v_token: tl.constexpr, v_head: tl.constexpr, do_batch,
    do_token: tl.constexpr, do_head: tl.constexpr, queries, keys, heads: tl.constexpr, group: tl.constexpr, section,
    window, inner, outer, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q (B, T, Hq, D) contiguous; as the forward pass, rows of queries against tiles of keys."""
    place, tile = _place(tl.cdiv(queries, BLOCK_M), section, CAUSAL)
    batch = (place // heads).to(tl.int64)
    head = (place % heads).to(tl.int64)
    key_head = (place % heads // group).to(tl.int64)
    offset = tl.cast(tile, tl.int64) * BLOCK_M
    q += batch * q_batch + head * q_head + offset * q_token
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    dout += batch * do_batch + head * do_head + offset * do_token
    grad_q += ((batch * queries + offset) * heads + head) * D
    lse += (batch * heads + head) * queries + offset
    delta += (batch * heads + head) * queries + offset
    shift = keys - queries + tile * BLOCK_M
    first = 0
    stop = tl.minimum(BLOCK_M, queries - tile * BLOCK_M)
    if spans is None:
        _dq_rows(
            q, k, v, dout, lse, delta, grad_q, q_token, k_token, v_token, do_token, heads * D, first, stop, 0, keys,
            shift, window, inner, outer, scale, D, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M, BLOCK_N
        )  # fmt: skip
    else:
        while first < stop:
            start = tl.load(spans + offset + first)
            end = tl.load(spans + queries + offset + first)
            row_stop = tl.minimum(stop, end - tile * BLOCK_M)
            _dq_rows(
                q, k, v, dout, lse, delta, grad_q, q_token, k_token, v_token, do_token, heads * D, first, row_stop,
                start, end, shift, window, inner, outer, scale, D, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M,
                BLOCK_N
            )  # fmt: skip
            first = row_stop


@jit
def _dkdv_tile(
    key, value, q, dout, lse, delta, dk, dv, rows, row_stop, at, stop, edge, q_token, do_token, shift, window, inner,
    outer, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries at .. at + BLOCK_M. All scores stand transposed, (keys, queries): Triton below 3.7.1 multiplies the
    transpose of a product wrongly on Hopper."""
    columns = tl.arange(0, BLOCK_M)
    query = _tile(q + tl.cast(at, tl.int64) * q_token, columns, stop - at, q_token, D, BLOCK_D, UPCAST)
    grad = _tile(dout + tl.cast(at, tl.int64) * do_token, columns, stop - at, do_token, D, BLOCK_D, UPCAST)
    column_lse = tl.load(lse + at + columns, mask=columns < stop - at, other=0.0)
    column_delta = tl.load(delta + at + columns, mask=columns < stop - at, other=0.0)
    s = tl.dot(key, tl.trans(query), input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * inner, key.dtype == tl.float32)
    p = tl.exp2(s * outer - column_lse[None, :])
    if edge:  # queries from `stop` on were read as 0 and add nothing
        p = tl.where(_sees(columns[None, :], rows[:, None], row_stop, shift + at, window, CAUSAL, WINDOW), p, 0.0)
    weights = p.to(grad.dtype)
    if SOFTCAP:
        p = p - p * s * s
    minus_delta = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) - column_delta[None, :]  # there, it takes no more registers
    dv = tl.dot(weights, grad, dv, input_precision="ieee")
    ds = p * tl.dot(value, tl.trans(grad), minus_delta, input_precision="ieee")
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@jit
def _dkdv_rows(
    q, k, v, dout, lse, delta, grad_k, grad_v, q_token, q_head, k_token, v_token, do_token, do_head, grad_token,
    queries, group, first, row_stop, start, end, shift, window, inner, outer, scale, D: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys [first, row_stop) of one head, of one document with the queries [start, end) of `group` heads."""
    begin, stop, all_from, all_to = _queries_seeing(first, row_stop - 1, start, end, shift, window, CAUSAL, WINDOW)
    rows = first + tl.arange(0, BLOCK_N)
    key = _tile(k, rows, row_stop, k_token, D, BLOCK_D, UPCAST)
    value = _tile(v, rows, row_stop, v_token, D, BLOCK_D, UPCAST)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # One loop over the tiles of all heads. Where a turn reads must not hang on a branch, or no load could run ahead.
    tiles = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
    at = begin
    row = 0  # of lse and delta: where the head's begin
    for _ in range(group * tiles):
        edge = _is_edge(at, at + BLOCK_M, all_from, all_to, CAUSAL)
        dk, dv = _dkdv_tile(
            key, value, q, dout, lse + row, delta + row, dk, dv, rows, row_stop, at, stop, edge, q_token, do_token,
            shift, window, inner, outer, D, BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M, BLOCK_N
        )  # fmt: skip
        last = at + BLOCK_M >= stop
        at = tl.where(last, begin, at + BLOCK_M)
        q += tl.where(last, q_head, 0)
        dout += tl.where(last, do_head, 0)
        row += tl.where(last, queries, 0)
    _put_tile(grad_k, dk * scale, rows, row_stop, grad_token, D, BLOCK_D)
    _put_tile(grad_v, dv, rows, row_stop, grad_token, D, BLOCK_D)


@jit(do_not_specialize=["queries", "keys", "section", "window"])
def _attention_dkdv(
    q, k, v, dout, lse, delta, grad_k, grad_v, spans, q_batch, q_token: tl.constexpr, q_head: tl.constexpr, k_batch,
    k_token: tl.constexpr, k_head: tl.constexpr, v_batch, v_token: tl.constexpr, v_head: tl.constexpr, do_batch,
    do_token: tl.constexpr, do_head: tl.constexpr, queries, keys, heads: tl.constexpr, group: tl.constexpr, section,
    window, inner, outer, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k, grad_v (B, S, Hkv, D) contiguous; the query heads that share a key head are taken in turn."""
    place, tile = _place(tl.cdiv(keys, BLOCK_N), section, False)
    key_heads = heads // group
    batch = (place // key_heads).to(tl.int64)
    head = (place % key_heads).to(tl.int64)
    offset = tl.cast(tile, tl.int64) * BLOCK_N
    q += batch * q_batch + head * group * q_head
    k += batch * k_batch + head * k_head + offset * k_token
    v += batch * v_batch + head * v_head + offset * v_token
    dout += batch * do_batch + head * group * do_head
    grad_k += ((batch * keys + offset) * key_heads + head) * D
    grad_v += ((batch * keys + offset) * key_heads + head) * D
    lse += (batch * heads + head * group) * queries
    delta += (batch * heads + head * group) * queries
    shift = keys - queries - tile * BLOCK_N
    first = 0
    stop = tl.minimum(BLOCK_N, keys - tile * BLOCK_N)
    if spans is None:
        _dkdv_rows(
            q, k, v, dout, lse, delta, grad_k, grad_v, q_token, q_head, k_token, v_token, do_token, do_head,
            key_heads * D, queries, group, first, stop, 0, queries, shift, window, inner, outer, scale, D, BLOCK_D,
            CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M, BLOCK_N
        )  # fmt: skip
    else:
        while first < stop:
            start = tl.load(spans + offset + first)
            end = tl.load(spans + keys + offset + first)
            row_stop = tl.minimum(stop, end - tile * BLOCK_N)
            _dkdv_rows(
                q, k, v, dout, lse, delta, grad_k, grad_v, q_token, q_head, k_token, v_token, do_token, do_head,
                key_heads * D, queries, group, first, row_stop, start, end, shift, window, inner, outer, scale, D,
                BLOCK_D, CAUSAL, WINDOW, SOFTCAP, UPCAST, BLOCK_M, BLOCK_N
            )  # fmt: skip
            first = row_stop


def _rows(x: Tensor) -> Tensor:
    """x with elements of a row side by side, and rows near enough for 32-bit offsets inside a tile."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 1 << 22 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """From one batch, one token, one head to the next."""
    strides = x.stride()
    return (0 if len(strides) == 3 else strides[0]), strides[-3], strides[-2]


def _tiles(kernel: str, inner: str, q: Tensor, options: Options) -> dict[str, Any]:
    """The kernel's row of the launch table. A softcap keeps a second tile of scores for its slope, for which `inner`,
    the side of the tile that the kernel's loop walks along, is halved: else registers spill."""
    block = config(kernel, q.device, dtype=q.dtype, size=q.shape[-1])
    return block if options.softcap is None else block | {inner: max(16, block[inner] // 2)}


class _TritonAttention(torch.autograd.Function):
    """q (B, T, Hq, D), k and v (B, S, Hkv, D); packed (T, H, D) with the spans of its documents."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, spans: Tensor | None) -> Tensor:
        if v.untyped_storage().data_ptr() != q.untyped_storage().data_ptr():
            # A view of the fused QKV buffer would keep it alive though q and k have been rotated elsewhere.
            v = v.contiguous()
        q, k, v = _rows(q), _rows(k), _rows(v)
        queries, heads, width = q.shape[-3:]
        batch, group = q.shape[:-3].numel(), heads // k.shape[-2]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
        # softcap * tanh(scale * x / softcap), or scale * x, as tanh(inner * x) * outer or x * outer.
        inner = 0.0 if options.softcap is None else options.scale / options.softcap
        outer = max(TINY, LOG2_E * (options.scale if options.softcap is None else options.softcap))
        ctx.constants = {
            "D": width,
            "BLOCK_D": power_of_two(width, 16),
            "CAUSAL": options.causal,
            "WINDOW": options.window is not None,
            "SOFTCAP": options.softcap is not None,
            "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
        }
        ctx.strides = (*_strides(q), *_strides(k), *_strides(v))
        ctx.numbers, ctx.scale, ctx.spans = (options.window or 0, inner, outer), options.scale, spans
        ctx.options = options
        block = _tiles("attention_forward", "BLOCK_N", q, options)
        section = group * max(1, L2_BYTES // max(1, 2 * k.shape[-3] * width * k.element_size()))
        launch(
            _attention_forward, (batch * heads * cdiv(queries, block["BLOCK_M"]),), q, k, v, out, lse, spans,
            *ctx.strides, queries, k.shape[-3], heads, group,
            min(section, batch * heads), *ctx.numbers, **ctx.constants, **block,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = _rows(dout)
        queries, heads, width = q.shape[-3:]
        batch, keys, key_heads = q.shape[:-3].numel(), k.shape[-3], k.shape[-2]
        group = heads // key_heads
        row_bytes = 2 * width * q.element_size()
        delta = torch.empty_like(lse)
        block = config("attention_delta", q.device, dtype=q.dtype, size=width)
        sizes = {name: ctx.constants[name] for name in ("D", "BLOCK_D")}
        grid = (batch * heads * cdiv(queries, block["BLOCK_M"]),)
        do_strides = _strides(dout)
        launch(_attention_delta, grid, out, dout, delta, *do_strides, queries, heads, **sizes, **block)
        inputs = (q, k, v, dout, lse, delta)
        strides = (*ctx.strides, *do_strides, queries, keys, heads, group)
        dq, dk, dv = None, None, None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
            block = _tiles("attention_dkdv", "BLOCK_M", q, ctx.options)
            section = min(batch * key_heads, max(1, L2_BYTES // max(1, group * queries * row_bytes)))
            launch(
                _attention_dkdv, (batch * key_heads * cdiv(keys, block["BLOCK_N"]),), *inputs, dk, dv, ctx.spans,
                *strides, section, *ctx.numbers, ctx.scale, **ctx.constants, **block,
            )  # fmt: skip
        if ctx.needs_input_grad[0]:
            dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            block = _tiles("attention_dq", "BLOCK_N", q, ctx.options)
            section = min(batch * heads, group * max(1, L2_BYTES // max(1, keys * row_bytes)))
            launch(
                _attention_dq, (batch * heads * cdiv(queries, block["BLOCK_M"]),), *inputs, dq, ctx.spans, *strides,
                section, *ctx.numbers, ctx.scale, **ctx.constants, **block,
            )  # fmt: skip
        return dq, dk, dv, None, None


class _Documents:
    """What follows from a cu_seqlens tensor, computed once for all layers and the backward pass."""

    def __init__(self, cu_seqlens: Tensor, tokens: int, version: int | None) -> None:
        self.version = version
        self.offsets = document_offsets(cu_seqlens, tokens)
        self.lengths = {b - a for a, b in pairwise(self.offsets) if b > a}
        self._made: dict[Any, Any] = {}

    def plan(self, exact: bool, device: torch.device) -> tuple[Bucket, ...]:
        """For the blocked products."""
        if (exact, device) not in self._made:
            self._made[exact, device] = plan_buckets(self.offsets, exact, device)
        return self._made[exact, device]

    def spans(self, cu_seqlens: Tensor, device: torch.device) -> Tensor:
        """(2, tokens) int32: where each token's document starts and where it ends."""
        if device not in self._made:
            bounds = cu_seqlens.to(device, non_blocking=True)
            ends = torch.stack((bounds[:-1], bounds[1:]))
            self._made[device] = ends.repeat_interleave(bounds.diff(), dim=1, output_size=self.offsets[-1])
        return self._made[device]


_documents = WeakIdKeyDictionary()


def _documents_of(cu_seqlens: Tensor, tokens: int) -> _Documents:
    """Read and checked once for each tensor and its values; on a GPU that waits for them."""
    version = None if cu_seqlens.is_inference() else cu_seqlens._version  # inference tensors do not count theirs
    found = _documents.get(cu_seqlens)
    if found is None or version is None or found.version != version or found.offsets[-1] != tokens:
        found = _documents[cu_seqlens] = _Documents(cu_seqlens, tokens, version)
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options, documents: _Documents | None) -> Tensor:
    """torch's own kernels; where they have several they choose, and their gradients may differ from run to run."""
    packed = documents is not None
    if documents is not None:
        length = max(documents.lengths, default=1)
        q, k, v = (x.unflatten(0, (x.shape[0] // length, length)) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = options.causal and q.shape[2] > 1  # one query sees all keys
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=options.scale, enable_gqa=grouped)
    out = out.transpose(1, 2)
    return out.flatten(0, 1) if packed else out


def _beyond_sdpa(q: Tensor, k: Tensor, options: Options, documents: _Documents | None) -> str | None:
    """What of the call torch's own attention cannot express."""
    if options.softcap is not None:
        return "softcap"
    if options.window is not None:
        return "window"
    if documents is not None:
        return "documents of several lengths" if len(documents.lengths) > 1 else None
    length, keys = q.shape[1], k.shape[1]
    if keys == 0 or (options.causal and keys != length and length > 1):
        return f"{length} queries with {keys} keys"
    return None


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

    Packed: q, k, v (T, H, D) with cu_seqlens int32 (n + 1,), the boundaries of n documents that do not see each other;
    on the CPU it is checked without a wait for the GPU, and the same tensor only once.
    causal: query i stands at position S - T + i and sees keys up to it; where S < T the first queries see none and
    give 0. window w (causal only): only the last w of those keys, itself included. scale defaults to D ** -0.5.
    backend: also "sdpa", torch's scaled_dot_product_attention, where it can express the call; by default it is taken
    on a GPU only where the launch table says so.
    Raises ValueError for shapes, dtypes, devices, boundaries or options that do not fit.
    """
    chosen = "sdpa" if backend == "sdpa" else choose("attention", backend, q)
    _check(q, k, v, causal, window, softcap, cu_seqlens)
    documents = None if cu_seqlens is None else _documents_of(cu_seqlens, q.shape[0])
    width = q.shape[-1]
    length = k.shape[1] if documents is None else max(documents.lengths, default=0)
    if window is not None and window >= length:
        window = None
    options = Options(causal, window, softcap, width**-0.5 if scale is None else scale)
    if chosen == "triton" and width > MAX_HEAD_DIM:
        if backend == "triton":
            raise ValueError(f"q: backend 'triton' takes heads of at most {MAX_HEAD_DIM} dimensions, found {width}")
        chosen = "torch"
    beyond = _beyond_sdpa(q, k, options, documents)
    if backend == "sdpa" and beyond is not None:
        raise ValueError(f"backend: 'sdpa' cannot compute attention with {beyond}; use 'triton' or 'torch'")
    if backend is None and chosen == "triton" and beyond is None:
        chosen = config("attention_backend", q.device, dtype=q.dtype, size=width)["backend"]
    if chosen == "sdpa":
        return _sdpa(q, k, v, options, documents)
    if chosen == "torch":
        plan = None if documents is None else documents.plan(not causal, q.device)
        return blocked_attention(q, k, v, options, plan)
    if options.scale < 0:  # the kernels look for the largest score before they scale it
        q, options = -q, options._replace(scale=-options.scale)
    spans = None if documents is None or cu_seqlens is None else documents.spans(cu_seqlens, q.device)
    return _TritonAttention.apply(q, k, v, options, spans)


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
