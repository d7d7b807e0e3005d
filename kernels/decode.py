"""Attention of one new token a sequence to its key/value cache, the decoding step of generation. It has no gradient.

Row b has lengths[b] valid keys, its own the last of them; with a window only the last `window` of those count:
    s_j = scale * q . k_j       s <- softcap * tanh(s / softcap)       o = sum_j softmax(s)_j v_j
A row reads 4 S Hkv D bytes of cache at a 2-byte dtype and computes 4 S Hq D FLOPs. The query heads that share a key
head are the rows of one small matrix, so the cache is read once and never repeated.

A GPU computes much more in the time that it takes to read so much. What counts is therefore that enough programs read
at once, and few sequences have too few heads for that. So the keys of a sequence and head are split (Flash-Decoding,
https://pytorch.org/blog/flash-decoding/): a program goes through one range of them with an online softmax and leaves
its maximum m, its l = sum exp(s - m) and its output o, not yet divided by l. A second kernel adds these up:
    M = max m_i       out = sum_i exp(m_i - M) o_i / sum_i exp(m_i - M) l_i
With `starts` the cache is one pool of tokens: row b's are starts[b] and those that follow.

The number of ranges follows from shapes alone, so that nothing waits for `lengths` to come to the CPU. Where the ranges
of a row begin follows from its length, which the kernel reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.attention_triton import View, tanh
from afina.kernels.backend import check_floating, check_like, check_shape, choose, wide_dtype
from afina.kernels.launch import INTERPRETED, cdiv, config, jit, launch, power_of_two, tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3e38)  # It stands for -inf as a maximum, because the difference of two of them is 0, not NaN.
HEADS = 16  # Query heads of a program, the fewest that matrix units take. Larger groups are cut.
MAX_HEAD_DIM = 512  # An output of this size fits into the registers of a program.


class Sizes(NamedTuple):
    """The sizes of a model's attention."""

    key_heads: int
    group: int  # query heads that share a key head
    dim: int


class Scores(NamedTuple):
    """What makes a score of a product of query and key."""

    scale: float
    softcap: float | None


class Parts(NamedTuple):
    """What the programs of one row and query head leave for `_decode_combine`, all in fp32."""

    o: Any  # (B, Hq, splits, D): the outputs, not yet divided by l
    statistics: Any  # (B, Hq, splits, 2): m to base 2, and l


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    softcap: float | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The formulas above, one row at a time; fp32 inside (fp64 for fp64). Shapes are those of `decode_attention`."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[2]
    wide = wide_dtype(q.dtype)
    for row, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - window)
        k, v = (x[row, first:length].to(wide).repeat_interleave(group, 1) for x in (k_cache, v_cache))
        scores = torch.einsum("hd,shd->hs", q[row].to(wide), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = torch.einsum("hs,shd->hd", torch.softmax(scores, dim=-1), v).to(q.dtype)
    return out


@jit(do_not_specialize=["room", "window"])
def _decode_split(
    q, k, v, starts, lengths, out, parts, room, window, sizes, scores, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One range of the keys of a row and key head, for HEADS of the query heads that share it. q, k and v are Views.

    Scores (keys, heads) and output (D, heads) stand transposed, because Hopper's matrix units want 64 rows: keys and D
    are as many, heads are not. Without `parts` there is one range, and the result goes to out (B, Hq, D).
    """
    tiles = tl.cdiv(sizes.group, HEADS)
    index = tl.program_id(0) // tiles
    row = (index // sizes.key_heads).to(tl.int64)
    key_head = index % sizes.key_heads
    member = (tl.program_id(0) % tiles) * HEADS + tl.arange(0, HEADS)[None, :]
    head = key_head * sizes.group + member
    column = tl.arange(0, DIM)

    # Load the queries.
    queries = tl.load(
        q.ptr + row * q.stride_batch + head.to(tl.int64) * q.stride_head + column[:, None],
        mask=(member < sizes.group) & (column[:, None] < sizes.dim),
        other=0.0,
    )
    if UPCAST:  # The interpreter multiplies matrices of bfloat16 wrongly.
        queries = queries.to(tl.float32)

    # This program's range of the row's keys, whose ends are multiples of BLOCK from the first.
    end = tl.minimum(tl.maximum(tl.load(lengths + row), 0), room)
    count = end if window is None else tl.minimum(end, window)
    size = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), BLOCK) * BLOCK
    start = end - count + tl.program_id(1) * size
    stop = tl.minimum(start + size, end)
    first_key = row * k.stride_batch if starts is None else tl.load(starts + row) * k.stride_token
    first_value = row * v.stride_batch if starts is None else tl.load(starts + row) * v.stride_token
    keys = k.ptr + first_key + key_head.to(tl.int64) * k.stride_head + column[None, :]
    values = v.ptr + first_value + key_head.to(tl.int64) * v.stride_head + column[:, None]

    m_i = tl.full((HEADS,), LOWEST, tl.float32)
    l_i = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((DIM, HEADS), tl.float32)
    for first in range(start, stop, BLOCK):
        # Load the keys.
        position = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = position < stop
        key_mask = inside[:, None] & (column[None, :] < sizes.dim)
        key = tl.load(keys + position[:, None] * k.stride_token, mask=key_mask, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)

        # Scores, to base 2, and the mask.
        s = tl.dot(key, queries, input_precision="ieee") * scores.scale
        if scores.softcap is not None:
            s = scores.softcap * tanh(s / scores.softcap, True)
        s = tl.where(inside[:, None], s * LOG2_E, -float("inf"))

        # Online softmax: a head's maximum may rise, and then what was summed up so far shrinks by alpha.
        m_new = tl.maximum(m_i, tl.max(s, 0))
        p = tl.exp2(s - m_new[None, :])
        alpha = tl.exp2(m_i - m_new)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 0)

        # Load the values and add them up.
        value_mask = inside[None, :] & (column[:, None] < sizes.dim)
        value = tl.load(values + position[None, :] * v.stride_token, mask=value_mask, other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        acc = tl.dot(value, p.to(value.dtype), acc * alpha[None, :], input_precision="ieee")

    # Store the output, or this range's part of it.
    target = row * sizes.key_heads * sizes.group + head
    inside = (member < sizes.group) & (column[:, None] < sizes.dim)
    if parts is None:
        acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[None, :]
        tl.store(out + target * sizes.dim + column[:, None], acc.to(out.dtype.element_ty), mask=inside)
    else:
        target = target * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts.o + target * sizes.dim + column[:, None], acc, mask=inside)
        tl.store(parts.statistics + target * 2, m_i[None, :], mask=member < sizes.group)
        tl.store(parts.statistics + target * 2 + 1, l_i[None, :], mask=member < sizes.group)


@jit(do_not_specialize=["splits"])
def _decode_combine(parts, out, splits, dim, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The output of one query head of one row, from its parts, BLOCK of them at a time."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM)
    m_i = tl.full((1,), LOWEST, tl.float32)
    l_i = tl.zeros((1,), tl.float32)
    acc = tl.zeros((DIM,), tl.float32)
    for first in range(0, splits, BLOCK):
        # Load.
        split = first + tl.arange(0, BLOCK)
        place = row * splits + split
        m = tl.load(parts.statistics + place * 2, mask=split < splits, other=LOWEST)
        l = tl.load(parts.statistics + place * 2 + 1, mask=split < splits, other=0.0)  # noqa: E741
        inside = (split < splits)[:, None] & (column < dim)[None, :]
        o = tl.load(parts.o + place[:, None] * dim + column[None, :], mask=inside, other=0.0)

        # Online softmax over the parts.
        m_new = tl.maximum(m_i, tl.max(m, 0))
        weight, alpha = tl.exp2(m - m_new), tl.exp2(m_i - m_new)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(weight * l, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * o, 0)

    # Store.
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)
    tl.store(out + row * dim + column, acc.to(out.dtype.element_ty), mask=column < dim)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    lengths: Tensor,
    longest: int | None,
    softcap: float | None,
    window: int | None,
    scale: float,
) -> Tensor:
    (batch, heads, dim), (room, key_heads) = q.shape, k.shape[-3:-1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 or dim == 1 else x.contiguous() for x in (q, k, v))
    row = dict(config("decode", q.device, dtype=q.dtype, size=dim))
    programs = row.pop("PROGRAMS")
    group = heads // key_heads
    columns = power_of_two(dim, 16)
    work = batch * key_heads * cdiv(group, HEADS)
    room = room if longest is None else min(room, longest)
    span = room if window is None else min(room, window)
    splits = _splits(work, programs, cdiv(span, row["BLOCK"]))
    parts = None
    if splits > 1:
        o = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
        parts = Parts(o, torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=q.device))
    launch(
        _decode_split, (work, splits), View(q, q.stride(0), 0, q.stride(1)), _view(k), _view(v),
        None if starts is None else starts.contiguous(), lengths.contiguous(), out, parts, room,
        None if window is None else span, Sizes(key_heads, group, dim),
        Scores(float(scale), None if softcap is None else float(softcap)), HEADS=HEADS, DIM=columns,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **row,
    )  # fmt: skip
    if parts is not None:
        row = config("decode_combine", q.device)
        launch(_decode_combine, (batch * heads,), parts, out, splits, dim, DIM=columns, **row)
    return out


def _view(cache: Tensor) -> View:
    return View(cache, *(cache.stride()[:3] if cache.dim() == 4 else (0, *cache.stride()[:2])))


@lru_cache(maxsize=256)
def _splits(work: int, slots: int, tiles: int) -> int:
    """Into how many parts the keys of each of `work` rows of heads are split, where `slots` programs run at a time.

    So many programs take ceil(work * splits / slots) rounds of 1 / splits of the keys each. That is made least, with
    as few parts as do it, since what a part leaves must be combined; more than twice what fills the slots never pays.
    """
    most = min(tiles, 2 * cdiv(slots, work))
    return min(range(1, max(1, most) + 1), key=lambda splits: (cdiv(work * splits, slots) / splits, splits))


def _rows(q: Tensor, rows: Sequence[tuple[Tensor, Tensor] | None], softcap: float | None, scale: float) -> Tensor:
    """Row b of q (B, Hq, D) attends to rows[b], the keys (Hkv, D, S) and values (Hkv, S, D) that count for it, or to
    nothing, which gives 0. Its products have the shapes that they have without the others."""
    wide, found = wide_dtype(q.dtype), next((row for row in rows if row is not None), None)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    if found is None:
        return out.to(q.dtype)
    shape = len(q), len(found[0]), -1, q.shape[-1]
    for row, query, into in zip(rows, (q.to(wide) * scale).view(shape), out.view(shape), strict=True):
        if row is None:
            continue
        keys, values = (x.to(wide) for x in row)
        scores = torch.bmm(query, keys)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        torch.bmm(torch.softmax(scores, -1), values, out=into)
    return out.to(q.dtype)


def counted(start: int, length: int, window: int | None) -> tuple[int, int]:
    """The first of a row's tokens in the pool that count, and how many do."""
    count = length if window is None else min(window, length)
    return start + length - count, count


def _checked_rows(starts: Tensor, lengths: Tensor, room: int) -> list[tuple[int, int]]:
    rows = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    for start, length in rows:
        if length and (start < 0 or length < 0 or start + length > room):
            raise ValueError(f"lengths: expected rows within the pool's {room}, found {length} from {start} on")
    return rows


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    longest: int | None = None,
    softcap: float | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """q (B, Hq, D), k_cache and v_cache (B, S, Hkv, D), lengths (B,) int32 in [0, S] -> (B, Hq, D), without a gradient.

    With `starts` (B,) int64 the caches are pools (N, Hkv, D) and row b's tokens are starts[b] up to starts[b] +
    lengths[b]. The torch path then computes each row by itself, in the order that its own length gives: a row's bits do
    not depend on the rows beside it. `longest` says that no row is longer, which Triton divides its work by.
    The cache may hold anything past a row's length. A row of length 0 gives 0. scale defaults to D ** -0.5.
    Raises ValueError for shapes, dtypes, devices or options that do not fit. The torch path also raises it for lengths
    outside [0, S]. Triton takes those as the nearest of 0 and S, because a look at them would make the CPU wait for
    the GPU.
    """
    with torch.no_grad():
        return _checked(q, k_cache, v_cache, lengths, starts, longest, softcap, window, scale, backend)


def _checked(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    longest: int | None,
    softcap: float | None,
    window: int | None,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    check_floating("q", q)
    if q.dim() != 3:
        raise ValueError(f"q: expected (B, Hq, D), found {tuple(q.shape)}")
    batch, heads, dim = q.shape
    layout, lead = ("(B, S, Hkv, D)", (batch,)) if starts is None else ("(N, Hkv, D)", ())
    fits = k_cache.dim() == len(lead) + 3 and (*k_cache.shape[:-3], k_cache.shape[-1]) == (*lead, dim)
    if not fits or k_cache.shape[-2] == 0 or heads % k_cache.shape[-2]:
        raise ValueError(f"k_cache: expected {layout} to fit q {tuple(q.shape)}, found {tuple(k_cache.shape)}")
    check_shape("v_cache", v_cache, k_cache.shape)
    check_like("k_cache", k_cache, "q", q)
    check_like("v_cache", v_cache, "q", q)
    check_shape("lengths", lengths, (batch,))
    if lengths.dtype != torch.int32:
        raise ValueError(f"lengths: expected torch.int32, found {lengths.dtype}")
    if lengths.device != q.device:
        raise ValueError(f"lengths: expected on q's device {q.device}, found on {lengths.device}")
    if starts is not None and (starts.shape != (batch,) or starts.dtype != torch.int64 or starts.device != q.device):
        raise ValueError(f"starts: expected int64 ({batch},) on {q.device}, found {starts.dtype} {tuple(starts.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
    scale = max(1, dim) ** -0.5 if scale is None else scale
    if backend == "triton" and dim > MAX_HEAD_DIM:
        raise ValueError(f"q: backend 'triton' takes heads of at most {MAX_HEAD_DIM} dimensions, found {dim}")
    if choose("decode_attention", backend, q) == "triton" and dim <= MAX_HEAD_DIM:
        return _triton(q, k_cache, v_cache, starts, lengths, longest, softcap, window, scale)
    if batch == 0:
        return torch.zeros_like(q)
    if starts is not None:
        keys, values = k_cache.permute(1, 2, 0), v_cache.transpose(0, 1)
        views: list[tuple[Tensor, Tensor] | None] = []
        for start, length in _checked_rows(starts, lengths, len(k_cache)):
            first, count = counted(start, length, window)
            views.append((keys.narrow(2, first, count), values.narrow(1, first, count)) if length else None)
        return _rows(q, views, softcap, scale)
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < 0 or high > k_cache.shape[1]:
        raise ValueError(f"lengths: expected in [0, {k_cache.shape[1]}], found {low} to {high}")
    if high == 0:
        return torch.zeros_like(q)
    first = 0 if window is None else max(0, low - window)
    k, v = k_cache[:, first:high], v_cache[:, first:high]
    position = torch.arange(first, high, device=q.device)
    ends = lengths.unsqueeze(1)
    hidden = position >= ends
    if window is not None:
        hidden |= position < ends - window
    wide = wide_dtype(q.dtype)
    rows = q.to(wide).unflatten(1, (k.shape[2], -1))  # (B, Hkv, G, D)
    scores = torch.matmul(rows, k.to(wide).permute(0, 2, 3, 1)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    p = torch.softmax(scores, dim=-1)
    if low == 0:
        p.masked_fill_((lengths == 0)[:, None, None, None], 0.0)
    # What lies past a row's length may be NaN or Inf, which a weight of 0 would not silence.
    v = v.to(wide).masked_fill(hidden[:, :, None, None], 0.0) if low < high or first else v.to(wide)
    return torch.matmul(p, v.transpose(1, 2)).flatten(1, 2).to(q.dtype)
