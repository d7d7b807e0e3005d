"""The Triton kernels of attention, and their launches. `attention.py` has the formulas and calls these.

A program owns BLOCK_M consecutive queries (or BLOCK_N keys) of one head and takes the documents in them one after the
other, so no number of one document is ever multiplied by another's. The keys that a query sees begin and end at
positions that rise with the query's. Therefore a program visits only the tiles that some of its rows see, and masks
only those that not all of its rows see whole: at the window's edge, at the diagonal and at the end of the document.

The softmax is taken to base 2, with log2(e) folded into the scale, as GPUs have an instruction for exp2. A score is
tanh(pre_scale * q . k) * post_scale with a softcap, and post_scale * (q . k) without one.

Strides of tokens and heads, and the number of heads, are compiled in: the offsets of a tile then stand in its
instructions and take no registers. Lengths, the window and `l2_group` are arguments of their own, not parts of a tuple,
because `do_not_specialize` does not reach into tuples: in one, each kind of length would be compiled anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.attention_torch import Options
from afina.kernels.launch import INTERPRETED, cdiv, config, jit, launch, power_of_two, tl

LOG2_E = 1.4426950408889634
TINY = 1e-37  # It stands for a scale of 0, which would turn the -inf of a hidden score into NaN.
# Heads are taken together as long as what they read again and again (keys and values, say) stays in the L2 cache.
L2_BYTES = 16 << 20


class View(NamedTuple):
    """A tensor (batch, tokens, heads, D), or the part of it from a pointer on. The elements of D lie side by side."""

    ptr: Any
    stride_batch: Any  # Strides are in elements.
    stride_token: Any
    stride_head: Any


class Scales(NamedTuple):
    """What products of queries and keys are multiplied with: before the tanh, after it, and in dq and dk."""

    pre_scale: float
    post_scale: float
    grad_scale: float


class Shape(NamedTuple):
    """The sizes of a model's attention, which all kernels know when they are compiled."""

    HEADS: int  # of queries
    GROUP: int  # query heads that share a key head
    D: int
    BLOCK_D: int  # D, rounded up to a power of two
    UPCAST: bool  # The interpreter multiplies matrices of bfloat16 wrongly, so it gets them in fp32.


class Variant(NamedTuple):
    """The options that one compilation of a kernel is for, and its tiles."""

    CAUSAL: bool
    WINDOW: bool
    SOFTCAP: bool
    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile


class Seen(NamedTuple):
    """Positions that the rows of a tile see: [start, stop) by any of them, [whole_start, whole_stop) by all of them."""

    start: Any
    stop: Any
    whole_start: Any
    whole_stop: Any


# ---------------------------------------------------------------- What the kernels share


@jit
def _place(tiles, l2_group, LAST_FIRST: tl.constexpr):
    """The head (of all batches) and the tile that belong to this program.

    Programs start in the order of their number. They take `l2_group` heads at a time, and of these each tile of all
    heads before the next tile, so that what the heads read stays in the L2 cache. With LAST_FIRST the last tile, whose
    causal rows are the longest, comes first, so that no long program is left over at the end.
    """
    program = tl.program_id(0)
    first_head = program // (tiles * l2_group) * l2_group
    width = tl.minimum(l2_group, tl.num_programs(0) // tiles - first_head)
    rest = program - first_head * tiles
    tile = rest // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return first_head + rest % width, tile


@jit
def _moved(view, elements):
    """The part of a view that begins so many elements later."""
    return View(view.ptr + elements, view.stride_batch, view.stride_token, view.stride_head)


@jit
def _begun_at(view, batch, head, token):
    """The part of a view that begins at this batch, head and token; all three are 64-bit."""
    return _moved(view, batch * view.stride_batch + head * view.stride_head + token * view.stride_token)


@jit
def _contiguous(ptr, batch, tokens, token, HEADS: tl.constexpr, head, D: tl.constexpr):
    """The part that begins at this batch, token and head of a contiguous tensor (B, tokens, HEADS, D)."""
    ptr += ((batch * tokens + token) * HEADS + head) * D
    return View(ptr, tokens * HEADS * D, HEADS * D, D)


@jit
def _from_token(view, token):
    """The part of a view that begins at this token, with a 64-bit offset."""
    return _moved(view, tl.cast(token, tl.int64) * view.stride_token)


@jit
def _load_tile(view, row, stop, shape: tl.constexpr):
    """These rows of one head, (rows, BLOCK_D); from row `stop` and column D on they are 0."""
    column = tl.arange(0, shape.BLOCK_D)
    pointers = view.ptr + (row[:, None] * view.stride_token + column[None, :])
    inside = (row < stop)[:, None]
    if shape.D != shape.BLOCK_D:
        inside = inside & (column < shape.D)[None, :]
    x = tl.load(pointers, mask=inside, other=0.0)
    return x.to(tl.float32) if shape.UPCAST else x


@jit
def _store_tile(view, x, row, stop, shape: tl.constexpr):
    """Write these rows of one head, without those from `stop` on."""
    column = tl.arange(0, shape.BLOCK_D)
    pointers = view.ptr + (row[:, None] * view.stride_token + column[None, :])
    inside = (row < stop)[:, None] & (column < shape.D)[None, :]
    tl.store(pointers, x.to(view.ptr.dtype.element_ty), mask=inside)


@jit
def _keys_seen(first, last, start, end, shift, window, variant: tl.constexpr):
    """Which of the keys [start, end) of a document its queries first .. last see. Query i stands at key i + shift."""
    seen_start = start
    whole_start = start
    whole_stop = end
    seen_stop = end
    if variant.WINDOW:
        seen_start = tl.maximum(start, first + shift - window + 1)
        whole_start = tl.maximum(start, last + shift - window + 1)
    if variant.CAUSAL:
        whole_stop = tl.maximum(start, first + shift + 1)
        seen_stop = tl.maximum(start, last + shift + 1)
    return Seen(seen_start, seen_stop, whole_start, whole_stop)


@jit
def _queries_seeing(first, last, start, end, shift, window, variant: tl.constexpr):
    """Which of the queries [start, end) of a document see its keys first .. last. Query i stands at key i + shift."""
    seen_start = start
    whole_start = start
    whole_stop = end
    seen_stop = end
    if variant.CAUSAL:
        seen_start = tl.maximum(start, first - shift)
        whole_start = tl.maximum(start, last - shift)
    if variant.WINDOW:
        whole_stop = tl.minimum(end, first - shift + window)
        seen_stop = tl.minimum(end, last - shift + window)
    return Seen(seen_start, seen_stop, whole_start, whole_stop)


@jit
def _needs_mask(seen, start, stop, LEFT: tl.constexpr):
    """Whether some row does not see all of the tile [start, stop). Without LEFT no tile begins before whole_start."""
    if LEFT:
        return (start < seen.whole_start) | (stop > seen.whole_stop)
    else:
        return stop > seen.whole_stop


@jit
def _is_seen(query, key, stop, shift, window, variant: tl.constexpr):
    """Whether a query sees a key of its document, the last key that any query of the tile sees being stop - 1."""
    if variant.CAUSAL:
        seen = key <= query + shift
    else:
        seen = key < stop
    if variant.WINDOW:
        seen = seen & (key > query + shift - window)
    return seen


@jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh from exp2 alone, which GPUs and the interpreter have. With PRECISE its relative error is small near 0 too.

    Near 0 the difference of 1 and a number near 1 has lost its digits, so there a series takes its place.
    """
    y = 1.0 - 2.0 / (1.0 + tl.exp2(2.8853900817779268 * x))
    if PRECISE:
        square = x * x
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        y = tl.where(square < 0.0625, x * series, y)
    return y


# ---------------------------------------------------------------- Forward


@jit
def _forward_rows(
    q, k, v, out, lse, first, row_stop, start, end, shift, window, scales, shape: tl.constexpr, variant: tl.constexpr
):  # fmt: skip
    """The queries [first, row_stop) of one head against the keys [start, end) of their document."""
    BLOCK_M: tl.constexpr = variant.BLOCK_M
    BLOCK_N: tl.constexpr = variant.BLOCK_N
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    seen = _keys_seen(first, row_stop - 1, start, end, shift, window, variant)
    row = first + tl.arange(0, BLOCK_M)
    query = _load_tile(q, row, row_stop, shape)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for key_start in range(seen.start, seen.stop, BLOCK_N):
        needs_mask = _needs_mask(seen, key_start, key_start + BLOCK_N, variant.WINDOW)

        # Load the keys.
        column = tl.arange(0, BLOCK_N)
        key = _load_tile(_from_token(k, key_start), column, seen.stop - key_start, shape)

        # Scores, still without post_scale.
        s = tl.dot(query, tl.trans(key), input_precision="ieee")
        if variant.SOFTCAP:
            s = tanh(s * scales.pre_scale, query.dtype == tl.float32)

        # Mask, in the tiles that need it.
        if needs_mask:
            hidden_from = seen.stop - key_start
            visible = _is_seen(row[:, None], column[None, :], hidden_from, shift - key_start, window, variant)
            s = tl.where(visible, s, -float("inf"))

        # Online softmax: a row's maximum may rise, and then what was summed up so far shrinks by alpha.
        m_new = tl.maximum(m_i, tl.max(s, 1) * scales.post_scale)
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # A row that has seen nothing yet has no maximum.
        p = tl.exp2(s * scales.post_scale - base[:, None])
        alpha = tl.exp2(m_i - base)

        # Load the values and add them up. The sums of p follow the product: before it they would take more registers.
        value = _load_tile(_from_token(v, key_start), column, seen.stop - key_start, shape)
        acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None], input_precision="ieee")
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new

    # Store the output, 0 for a row that saw nothing, and the log-sum-exp.
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    _store_tile(out, acc, row, row_stop, shape)
    tl.store(lse + row, m_i + tl.log2(l_i), mask=row < row_stop)


@jit(do_not_specialize=["queries", "keys", "window", "l2_group"])
def _attention_forward(
    q, k, v, out, lse, spans, queries, keys, window, l2_group, scales, shape: tl.constexpr, variant: tl.constexpr
):  # fmt: skip
    """Of the Views q, k and v: out (B, T, Hq, D), contiguous, and lse (B, Hq, T), to base 2.

    spans (2, T) says where each token's document starts and where it ends; it is None without packed documents.
    Rows are counted from the program's first, so that their offsets fit into 32 bits.
    """
    place, tile = _place(tl.cdiv(queries, variant.BLOCK_M), l2_group, variant.CAUSAL)
    batch = (place // shape.HEADS).to(tl.int64)
    head = (place % shape.HEADS).to(tl.int64)
    key_head = (place % shape.HEADS // shape.GROUP).to(tl.int64)
    offset = tl.cast(tile, tl.int64) * variant.BLOCK_M
    q = _begun_at(q, batch, head, offset)
    k = _begun_at(k, batch, key_head, 0)
    v = _begun_at(v, batch, key_head, 0)
    out = _contiguous(out, batch, queries, offset, shape.HEADS, head, shape.D)
    lse += (batch * shape.HEADS + head) * queries + offset
    shift = keys - queries + tile * variant.BLOCK_M
    first = 0
    stop = tl.minimum(variant.BLOCK_M, queries - tile * variant.BLOCK_M)
    if spans is None:
        _forward_rows(q, k, v, out, lse, first, stop, 0, keys, shift, window, scales, shape, variant)
    else:
        while first < stop:
            start = tl.load(spans + offset + first)
            end = tl.load(spans + queries + offset + first)
            row_stop = tl.minimum(stop, end - tile * variant.BLOCK_M)
            _forward_rows(q, k, v, out, lse, first, row_stop, start, end, shift, window, scales, shape, variant)
            first = row_stop


# ---------------------------------------------------------------- Backward


@jit(do_not_specialize=["queries"])
def _attention_delta(out, dout, delta, queries, shape: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta (B, Hq, T): for each row the sum of dout, a View, times out (B, T, Hq, D), which is contiguous."""
    place, tile = _place(tl.cdiv(queries, BLOCK_M), shape.HEADS, False)
    batch = (place // shape.HEADS).to(tl.int64)
    head = (place % shape.HEADS).to(tl.int64)
    offset = tl.cast(tile, tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    stop = queries - tile * BLOCK_M
    out = _contiguous(out, batch, queries, offset, shape.HEADS, head, shape.D)
    dout = _begun_at(dout, batch, head, offset)
    o = _load_tile(out, row, stop, shape).to(tl.float32)
    do = _load_tile(dout, row, stop, shape).to(tl.float32)
    tl.store(delta + (batch * shape.HEADS + head) * queries + offset + row, tl.sum(o * do, 1), mask=row < stop)


@jit
def _dq_rows(
    q, k, v, dout, lse, delta, dq, first, row_stop, start, end, shift, window, scales, shape: tl.constexpr,
    variant: tl.constexpr,
):  # fmt: skip
    """dq of the queries [first, row_stop) of one head, from the keys [start, end) of their document."""
    BLOCK_M: tl.constexpr = variant.BLOCK_M
    BLOCK_N: tl.constexpr = variant.BLOCK_N
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    seen = _keys_seen(first, row_stop - 1, start, end, shift, window, variant)
    row = first + tl.arange(0, BLOCK_M)
    query = _load_tile(q, row, row_stop, shape)
    do = _load_tile(dout, row, row_stop, shape)
    row_lse = tl.load(lse + row, mask=row < row_stop, other=0.0)
    row_delta = tl.load(delta + row, mask=row < row_stop, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for key_start in range(seen.start, seen.stop, BLOCK_N):
        needs_mask = _needs_mask(seen, key_start, key_start + BLOCK_N, variant.WINDOW)

        # Load the keys and values.
        column = tl.arange(0, BLOCK_N)
        key = _load_tile(_from_token(k, key_start), column, seen.stop - key_start, shape)
        value = _load_tile(_from_token(v, key_start), column, seen.stop - key_start, shape)

        # Scores, and p from the log-sum-exp that the forward pass saved.
        s = tl.dot(query, tl.trans(key), input_precision="ieee")
        if variant.SOFTCAP:
            s = tanh(s * scales.pre_scale, query.dtype == tl.float32)
        p = tl.exp2(s * scales.post_scale - row_lse[:, None])

        # Mask, in the tiles that need it.
        if needs_mask:
            hidden_from = seen.stop - key_start
            visible = _is_seen(row[:, None], column[None, :], hidden_from, shift - key_start, window, variant)
            p = tl.where(visible, p, 0.0)

        # ds = p * (do v^T - delta), times the slope 1 - s^2 of the softcap.
        if variant.SOFTCAP:
            p = p - p * s * s
        minus_delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) - row_delta[:, None]
        ds = p * tl.dot(do, tl.trans(value), minus_delta, input_precision="ieee")
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")

    # Store.
    _store_tile(dq, acc * scales.grad_scale, row, row_stop, shape)


@jit(do_not_specialize=["queries", "keys", "window", "l2_group"])
def _attention_dq(
    q, k, v, dout, lse, delta, dq, spans, queries, keys, window, l2_group, scales, shape: tl.constexpr,
    variant: tl.constexpr,
):  # fmt: skip
    """dq (B, T, Hq, D), contiguous. As in the forward pass, rows of queries go against tiles of keys."""
    place, tile = _place(tl.cdiv(queries, variant.BLOCK_M), l2_group, variant.CAUSAL)
    batch = (place // shape.HEADS).to(tl.int64)
    head = (place % shape.HEADS).to(tl.int64)
    key_head = (place % shape.HEADS // shape.GROUP).to(tl.int64)
    offset = tl.cast(tile, tl.int64) * variant.BLOCK_M
    q = _begun_at(q, batch, head, offset)
    k = _begun_at(k, batch, key_head, 0)
    v = _begun_at(v, batch, key_head, 0)
    dout = _begun_at(dout, batch, head, offset)
    dq = _contiguous(dq, batch, queries, offset, shape.HEADS, head, shape.D)
    lse += (batch * shape.HEADS + head) * queries + offset
    delta += (batch * shape.HEADS + head) * queries + offset
    shift = keys - queries + tile * variant.BLOCK_M
    first = 0
    stop = tl.minimum(variant.BLOCK_M, queries - tile * variant.BLOCK_M)
    if spans is None:
        _dq_rows(q, k, v, dout, lse, delta, dq, first, stop, 0, keys, shift, window, scales, shape, variant)
    else:
        while first < stop:
            start = tl.load(spans + offset + first)
            end = tl.load(spans + queries + offset + first)
            row_stop = tl.minimum(stop, end - tile * variant.BLOCK_M)
            _dq_rows(q, k, v, dout, lse, delta, dq, first, row_stop, start, end, shift, window, scales, shape, variant)
            first = row_stop


@jit
def _dkdv_rows(
    q, k, v, dout, lse, delta, dk, dv, queries, first, row_stop, start, end, shift, window, scales,
    shape: tl.constexpr, variant: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys [first, row_stop) of one head, from the queries [start, end) of the heads that share it.

    All scores stand transposed, (keys, queries): Triton below 3.7.1 multiplies the transpose of a product wrongly on
    Hopper.
    """
    BLOCK_M: tl.constexpr = variant.BLOCK_M
    BLOCK_N: tl.constexpr = variant.BLOCK_N
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    seen = _queries_seeing(first, row_stop - 1, start, end, shift, window, variant)
    row = first + tl.arange(0, BLOCK_N)
    key = _load_tile(k, row, row_stop, shape)
    value = _load_tile(v, row, row_stop, shape)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # One loop goes over the tiles of all heads. What it loads must not depend on a branch, or no load could run ahead.
    # It carries two numbers from which all addresses follow: pointers of their own would take registers that are full.
    tiles = tl.cdiv(tl.maximum(seen.stop - seen.start, 0), BLOCK_M)
    query_start = seen.start
    head = 0  # of those that share the keys
    for _ in range(shape.GROUP * tiles):
        needs_mask = _needs_mask(seen, query_start, query_start + BLOCK_M, variant.CAUSAL)

        # Load the queries and what the forward pass saved of them.
        column = tl.arange(0, BLOCK_M)
        inside = column < seen.stop - query_start
        head_wide, start_wide = tl.cast(head, tl.int64), tl.cast(query_start, tl.int64)
        query = _load_tile(_begun_at(q, 0, head_wide, start_wide), column, seen.stop - query_start, shape)
        do = _load_tile(_begun_at(dout, 0, head_wide, start_wide), column, seen.stop - query_start, shape)
        # Of the equal ways to write these addresses, and p, this is one that Triton 3.6 and 3.7 have registers for.
        column_lse = tl.load(lse + (head * queries + query_start + column), mask=inside, other=0.0)
        column_delta = tl.load(delta + (head * queries + query_start) + column, mask=inside, other=0.0)

        # Scores, and p from the log-sum-exp.
        s = tl.dot(key, tl.trans(query), input_precision="ieee")
        if variant.SOFTCAP:
            s = tanh(s * scales.pre_scale, key.dtype == tl.float32)
        minus_lse = -column_lse
        p = tl.exp2(s * scales.post_scale + minus_lse[None, :])

        # Mask, in the tiles that need it. Queries from seen.stop on were read as 0 and add nothing.
        if needs_mask:
            visible = _is_seen(column[None, :], row[:, None], row_stop, shift + query_start, window, variant)
            p = tl.where(visible, p, 0.0)

        # dv, ds = p * (do v^T - delta) times the slope 1 - s^2 of the softcap, and dk.
        weights = p.to(do.dtype)
        if variant.SOFTCAP:
            p = p - p * s * s
        # The product below starts from -delta. Made here, before the one for dv, that tile takes no more registers.
        minus_delta = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) - column_delta[None, :]
        dv_acc = tl.dot(weights, do, dv_acc, input_precision="ieee")
        ds = p * tl.dot(value, tl.trans(do), minus_delta, input_precision="ieee")
        dk_acc = tl.dot(ds.to(query.dtype), query, dk_acc, input_precision="ieee")

        # Go on to the next tile, or to the first of the next head.
        is_last = query_start + BLOCK_M >= seen.stop
        query_start = tl.where(is_last, seen.start, query_start + BLOCK_M)
        if shape.GROUP > 1:
            head += tl.where(is_last, 1, 0)

    # Store.
    _store_tile(dk, dk_acc * scales.grad_scale, row, row_stop, shape)
    _store_tile(dv, dv_acc, row, row_stop, shape)


@jit(do_not_specialize=["queries", "keys", "window", "l2_group"])
def _attention_dkdv(
    q, k, v, dout, lse, delta, dk, dv, spans, queries, keys, window, l2_group, scales, shape: tl.constexpr,
    variant: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, S, Hkv, D), contiguous. The query heads that share a key head are taken one after the other."""
    place, tile = _place(tl.cdiv(keys, variant.BLOCK_N), l2_group, False)
    key_heads = shape.HEADS // shape.GROUP
    batch = (place // key_heads).to(tl.int64)
    key_head = (place % key_heads).to(tl.int64)
    head = key_head * shape.GROUP
    offset = tl.cast(tile, tl.int64) * variant.BLOCK_N
    q = _begun_at(q, batch, head, 0)
    k = _begun_at(k, batch, key_head, offset)
    v = _begun_at(v, batch, key_head, offset)
    dout = _begun_at(dout, batch, head, 0)
    dk = _contiguous(dk, batch, keys, offset, key_heads, key_head, shape.D)
    dv = _contiguous(dv, batch, keys, offset, key_heads, key_head, shape.D)
    lse += (batch * shape.HEADS + head) * queries
    delta += (batch * shape.HEADS + head) * queries
    shift = keys - queries - tile * variant.BLOCK_N
    first = 0
    stop = tl.minimum(variant.BLOCK_N, keys - tile * variant.BLOCK_N)
    if spans is None:
        _dkdv_rows(
            q, k, v, dout, lse, delta, dk, dv, queries, first, stop, 0, queries, shift, window, scales, shape, variant
        )  # fmt: skip
    else:
        while first < stop:
            start = tl.load(spans + offset + first)
            end = tl.load(spans + keys + offset + first)
            row_stop = tl.minimum(stop, end - tile * variant.BLOCK_N)
            _dkdv_rows(
                q, k, v, dout, lse, delta, dk, dv, queries, first, row_stop, start, end, shift, window, scales, shape,
                variant
            )  # fmt: skip
            first = row_stop


# ---------------------------------------------------------------- Launches


def kernel_layout(x: Tensor) -> Tensor:
    """x, copied unless its rows are contiguous and near enough to each other for 32-bit offsets inside a tile."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 1 << 22 else x.contiguous()


def _view(x: Tensor) -> View:
    """x (B, T, H, D), or (T, H, D) as a batch of one."""
    stride_batch = 0 if x.dim() == 3 else x.stride(0)
    return View(x, stride_batch, tl.constexpr(x.stride(-3)), tl.constexpr(x.stride(-2)))


def _shape(q: Tensor, k: Tensor) -> Shape:
    heads, width = q.shape[-2:]
    upcast = INTERPRETED and q.dtype == torch.bfloat16
    return Shape(heads, heads // k.shape[-2], width, power_of_two(width, 16), upcast)


def _scales(options: Options) -> Scales:
    """What makes scores to base 2: with a softcap, softcap * tanh(scale * x / softcap) * log2(e)."""
    pre_scale = 0.0 if options.softcap is None else options.scale / options.softcap
    post_scale = max(TINY, LOG2_E * (options.scale if options.softcap is None else options.softcap))
    return Scales(pre_scale, post_scale, options.scale)


def _variant(kernel: str, halved: str, q: Tensor, options: Options) -> tuple[Variant, dict[str, int]]:
    """The kernel's variant, with tiles from the launch table, and the rest of its row there: warps and stages.

    A softcap keeps a second tile of scores for its slope. For that the side of the tile that the kernel's loop walks
    along, `halved`, is halved, or registers would spill.
    """
    row = config(kernel, q.device, dtype=q.dtype, size=q.shape[-1])
    tile = {name: row[name] for name in ("BLOCK_M", "BLOCK_N")}
    if options.softcap is not None:
        tile[halved] = max(16, tile[halved] // 2)
    variant = Variant(options.causal, options.window is not None, options.softcap is not None, **tile)
    return variant, {name: value for name, value in row.items() if name not in tile}


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (B, T, Hq, D), k and v (B, S, Hkv, D), all in `kernel_layout` -> out like q, lse (B, Hq, T) fp32 to base 2.

    Packed documents are (T, H, D), with spans (2, T) int32: where each token's document starts and where it ends.
    """
    queries, heads, width = q.shape[-3:]
    batch, keys, group = q.shape[:-3].numel(), k.shape[-3], heads // k.shape[-2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    variant, row = _variant("attention_forward", "BLOCK_N", q, options)
    l2_group = min(batch * heads, group * max(1, L2_BYTES // max(1, 2 * keys * width * k.element_size())))
    launch(
        _attention_forward, (batch * heads * cdiv(queries, variant.BLOCK_M),), _view(q), _view(k), _view(v),
        out, lse, spans, queries, keys, options.window or 0, l2_group, _scales(options), _shape(q, k), variant,
        **row,
    )  # fmt: skip
    return out, lse


def attention_delta(out: Tensor, dout: Tensor, lse: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The sum of dout times out of each row, shaped like lse (B, Hq, T); dout in `kernel_layout`."""
    queries, _, width = q.shape[-3:]
    delta = torch.empty_like(lse)
    row = config("attention_delta", q.device, dtype=q.dtype, size=width)
    grid = (lse.shape[:2].numel() * cdiv(queries, row["BLOCK_M"]),)
    launch(_attention_delta, grid, out, _view(dout), delta, queries, _shape(q, k), **row)
    return delta


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options, spans: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What `forward` took and gave, and the gradient dout of out -> dq, dk, dv; None for those that are not wanted."""
    dout = kernel_layout(dout)
    queries, heads, width = q.shape[-3:]
    batch, keys, key_heads = q.shape[:-3].numel(), k.shape[-3], k.shape[-2]
    group = heads // key_heads
    row_bytes = 2 * width * q.element_size()
    shape, scales, window = _shape(q, k), _scales(options), options.window or 0
    delta = attention_delta(out, dout, lse, q, k)
    inputs = (_view(q), _view(k), _view(v), _view(dout), lse, delta)
    dq, dk, dv = None, None, None
    if wanted[1] or wanted[2]:
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        variant, row = _variant("attention_dkdv", "BLOCK_M", q, options)
        l2_group = min(batch * key_heads, max(1, L2_BYTES // max(1, group * queries * row_bytes)))
        launch(
            _attention_dkdv, (batch * key_heads * cdiv(keys, variant.BLOCK_N),), *inputs, dk, dv, spans,
            queries, keys, window, l2_group, scales, shape, variant, **row,
        )  # fmt: skip
    if wanted[0]:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        variant, row = _variant("attention_dq", "BLOCK_N", q, options)
        l2_group = min(batch * heads, group * max(1, L2_BYTES // max(1, keys * row_bytes)))
        launch(
            _attention_dq, (batch * heads * cdiv(queries, variant.BLOCK_M),), *inputs, dq, spans, queries,
            keys, window, l2_group, scales, shape, variant, **row,
        )  # fmt: skip
    return dq, dk, dv
