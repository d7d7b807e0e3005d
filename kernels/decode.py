"""Attention of one new token a sequence to its key/value cache (the decoding step of generation). Forward only.

Row b has lengths[b] valid keys, its own the last of them; with a window only the last `window` of those count:
    s_j = scale * q . k_j       s <- softcap * tanh(s / softcap)       o = sum_j softmax(s)_j v_j
Bytes: 4 S Hkv D a row at 2-byte dtype (the query heads that share a key head are the rows of one small matrix, so the
cache is read once and never repeated); FLOPs 4 S Hq D. A GPU computes much more than that in the time that it reads so
much, so what counts is that enough programs read at once. Few sequences have too few heads for that. Therefore the keys
of a sequence and head are split (Flash-Decoding, https://pytorch.org/blog/flash-decoding/): a program goes through one
range of them with an online softmax and leaves its maximum m, its l = sum exp(s - m) and its unnormalised output o; a
second kernel adds these up:
    M = max m_i       out = sum_i exp(m_i - M) o_i / sum_i exp(m_i - M) l_i
The number of ranges follows from shapes alone, so that nothing waits for `lengths` to come to the CPU; where the ranges
of a row begin follows from its length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afina.kernels.attention import tanh
from afina.kernels.backend import check_floating, check_like, check_shape, choose, wide_dtype
from afina.kernels.launch import INTERPRETED, cdiv, config, jit, launch, power_of_two, tl

# A maximum below all others. Finite: two of them differ by 0, not by NaN.
LOWEST = tl.constexpr(-3e38)
# Query heads of a program: the fewest that matrix units take. Larger groups are cut.
ROWS = 16
# The largest head dimension whose output fits into the registers of a program.
LARGEST = 512


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
    q, k, v, lengths, out, parts, statistics, q_row, q_head, k_row, k_key, k_head, v_row, v_key, v_head, room, window,
    heads, group, dim, scale, softcap, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One range of the keys of a row and key head, for ROWS of its `group` query heads.

    Everything is transposed, scores (keys, heads) and output (D, heads): Hopper's matrix units want 64 rows, and keys
    and D have them. Without statistics there is one range and the result goes to out; else o goes to parts (B, Hq,
    splits, D) and m, l, in base 2, to statistics (B, Hq, splits, 2).
    """
    tiles = tl.cdiv(group, ROWS)
    index = tl.program_id(0) // tiles
    row = (index // heads).to(tl.int64)
    head = index % heads
    member = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)[None, :]
    query = head * group + member
    column = tl.arange(0, DIM)
    queries = tl.load(
        q + row * q_row + query.to(tl.int64) * q_head + column[:, None],
        mask=(member < group) & (column[:, None] < dim),
        other=0.0,
    )
    end = tl.minimum(tl.maximum(tl.load(lengths + row), 0), room)
    count = end if window is None else tl.minimum(end, window)
    size = tl.cdiv(tl.cdiv(count, tl.num_programs(1)), BLOCK) * BLOCK
    start = end - count + tl.program_id(1) * size
    stop = tl.minimum(start + size, end)
    keys = k + row * k_row + head.to(tl.int64) * k_head + column[None, :]
    values = v + row * v_row + head.to(tl.int64) * v_head + column[:, None]
    if UPCAST:
        queries = queries.to(tl.float32)
    m = tl.full((ROWS,), LOWEST, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)  # noqa: E741
    o = tl.zeros((DIM, ROWS), tl.float32)
    for first in range(start, stop, BLOCK):
        place = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = place < stop
        block = tl.load(keys + place[:, None] * k_key, mask=inside[:, None] & (column[None, :] < dim), other=0.0)
        if UPCAST:
            block = block.to(tl.float32)
        s = tl.dot(block, queries, input_precision="ieee") * scale
        if softcap is not None:
            s = softcap * tanh(s / softcap, True)
        s = tl.where(inside[:, None], s * 1.4426950408889634, -float("inf"))
        highest = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - highest[None, :])
        fade = tl.exp2(m - highest)
        m = highest
        l = l * fade + tl.sum(p, 0)  # noqa: E741
        block = tl.load(values + place[None, :] * v_key, mask=inside[None, :] & (column[:, None] < dim), other=0.0)
        if UPCAST:
            block = block.to(tl.float32)
        o = tl.dot(block, p.to(block.dtype), o * fade[None, :], input_precision="ieee")
    target = row * heads * group + query
    inside = (member < group) & (column[:, None] < dim)
    if statistics is None:
        o = o / tl.where(l == 0.0, 1.0, l)[None, :]
        tl.store(out + target * dim + column[:, None], o.to(out.dtype.element_ty), mask=inside)
    else:
        target = target * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts + target * dim + column[:, None], o, mask=inside)
        tl.store(statistics + target * 2, m[None, :], mask=member < group)
        tl.store(statistics + target * 2 + 1, l[None, :], mask=member < group)


@jit(do_not_specialize=["splits"])
def _decode_combine(parts, statistics, out, splits, dim, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One query head of one row: its parts, BLOCK at a time."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM)
    highest = tl.full((1,), LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    o = tl.zeros((DIM,), tl.float32)
    for first in range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        at = row * splits + split
        m = tl.load(statistics + at * 2, mask=split < splits, other=LOWEST)
        l = tl.load(statistics + at * 2 + 1, mask=split < splits, other=0.0)  # noqa: E741
        inside = (split < splits)[:, None] & (column < dim)[None, :]
        part = tl.load(parts + at[:, None] * dim + column[None, :], mask=inside, other=0.0)
        higher = tl.maximum(highest, tl.max(m, 0))
        weight, fade = tl.exp2(m - higher), tl.exp2(highest - higher)
        highest = higher
        total = total * fade + tl.sum(weight * l, 0)
        o = o * fade + tl.sum(weight[:, None] * part, 0)
    o = o / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * dim + column, o.to(out.dtype.element_ty), mask=column < dim)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    softcap: float | None,
    window: int | None,
    scale: float,
) -> Tensor:
    (batch, queries, dim), (room, heads) = q.shape, k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(-1) == 1 or dim == 1 else x.contiguous() for x in (q, k, v))
    options = dict(config("decode", q.device, dtype=q.dtype, size=dim))
    programs = options.pop("PROGRAMS")
    group = queries // heads
    columns = power_of_two(dim, 16)
    work = batch * heads * cdiv(group, ROWS)
    span = room if window is None else min(room, window)
    splits = max(1, min(cdiv(programs, work), cdiv(span, options["BLOCK"])))
    parts = statistics = None
    if splits > 1:
        parts = torch.empty(batch, queries, splits, dim, dtype=torch.float32, device=q.device)
        statistics = torch.empty(batch, queries, splits, 2, dtype=torch.float32, device=q.device)
    launch(
        _decode_split, (work, splits), q, k, v, lengths.contiguous(), out, parts, statistics, q.stride(0), q.stride(1),
        *k.stride()[:3], *v.stride()[:3], room, None if window is None else span, heads, group,
        dim, float(scale),
        None if softcap is None else float(softcap), ROWS=ROWS, DIM=columns,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **options,
    )  # fmt: skip
    if parts is not None:
        options = config("decode_combine", q.device)
        launch(_decode_combine, (batch * queries,), parts, statistics, out, splits, dim, DIM=columns, **options)
    return out


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    softcap: float | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """q (B, Hq, D), k_cache and v_cache (B, S, Hkv, D), lengths (B,) int32 in [0, S] -> (B, Hq, D). No gradient.

    The cache may hold anything past a row's length. A row of length 0 gives 0. scale defaults to D ** -0.5.
    Raises ValueError for shapes, dtypes, devices or options that do not fit, and with torch for lengths outside [0, S];
    Triton takes those as the nearest of 0 and S, as looking at them would make the CPU wait for the GPU.
    """
    check_floating("q", q)
    if q.dim() != 3:
        raise ValueError(f"q: expected (B, Hq, D), found {tuple(q.shape)}")
    batch, heads, dim = q.shape
    fits = k_cache.dim() == 4 and (k_cache.shape[0], k_cache.shape[3]) == (batch, dim)
    if not fits or k_cache.shape[2] == 0 or heads % k_cache.shape[2]:
        raise ValueError(f"k_cache: expected (B, S, Hkv, D) to fit q {tuple(q.shape)}, found {tuple(k_cache.shape)}")
    check_shape("v_cache", v_cache, k_cache.shape)
    check_like("k_cache", k_cache, "q", q)
    check_like("v_cache", v_cache, "q", q)
    check_shape("lengths", lengths, (batch,))
    if lengths.dtype != torch.int32:
        raise ValueError(f"lengths: expected torch.int32, found {lengths.dtype}")
    if lengths.device != q.device:
        raise ValueError(f"lengths: expected on q's device {q.device}, found on {lengths.device}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
    scale = max(1, dim) ** -0.5 if scale is None else scale
    if backend == "triton" and dim > LARGEST:
        raise ValueError(f"q: backend 'triton' takes heads of at most {LARGEST} dimensions, found {dim}")
    if choose("decode_attention", backend, q) == "triton" and dim <= LARGEST:
        return _triton(q, k_cache, v_cache, lengths, softcap, window, scale)
    if batch == 0:
        return torch.zeros_like(q)
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
