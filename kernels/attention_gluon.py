"""Attention's forward pass for Hopper in Gluon, and what the backward pass in `attention_gluon_backward.py` shares.

A program keeps one multiprocessor from beginning to end. One warp, the producer, does nothing but order copies of the
tensor memory accelerator (TMA) into slots of shared memory; two warpgroups of 64 rows each, the consumers, multiply.
They take turns at the tensor cores, so that one's softmax runs while the other's products do (FlashAttention-3,
https://arxiv.org/abs/2407.08608). Plain Triton cannot say this: it waits for a product before anything uses the result.

    producer     K0 V0 K1 V1 K2 V2 ...                                   as slots become empty
    consumer 0   Q K0 | softmax | Q K1, P0 V0 | softmax | Q K2, P1 V1 | softmax | ...
    consumer 1           Q K0   |   softmax   | Q K1, P0 V0 | softmax | Q K2, P1 V1 | ...

A slot has two barriers (mbarriers). `full` completes a phase when the bytes of a copy have landed, `empty` when its
readers have arrived. Phases are told apart by their parity: who uses a slot for the n-th time (from 0) waits for `full`
of parity n & 1, and who fills it for the n-th time for `empty` of parity (n & 1) ^ 1, which passes at once for n = 0.

As in `attention_triton.py` a tile takes the documents in it one after the other, scores are to base 2, and nothing is
added up in an order left to chance. This file is imported on a GPU for which `attention.py` chooses it, nowhere else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from afina.kernels.attention_torch import Options
from afina.kernels.launch import cdiv, launch, power_of_two

LOG2_E = 1.4426950408889634
TINY = 1e-37  # It stands for a scale of 0, which would turn the -inf of a hidden score into NaN.
# Heads are taken together as long as what they read again and again stays in the L2 cache.
L2_BYTES = 16 << 20
CONSUMER_REGISTERS = 240  # of a thread; with the producer's they are the 3 x 168 that a multiprocessor has
PRODUCER_REGISTERS = 24
RECORDED_PROCESSORS = 132  # an H100's, where launches are only recorded


class Shape(NamedTuple):
    """The sizes of a model's attention, and the options, that one compilation of a kernel is for."""

    HEADS: int  # of queries
    GROUP: int  # query heads that share a key head
    D: int
    BLOCK_D: int  # D, rounded up to a power of two
    CAUSAL: bool


class Tiles(NamedTuple):
    """How a kernel cuts its work, and how many slots of shared memory hold what its loop walks along."""

    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile
    SLOTS: int


class Sizes(NamedTuple):
    """What changes from call to call without a new compilation."""

    queries: Any
    keys: Any
    heads: Any  # of all batches, of queries or (for dk and dv) of keys
    l2_group: Any


class Ring(NamedTuple):
    """Slots of shared memory that copies fill and consumers empty."""

    tiles: Any  # (slots, 1, rows, 1, BLOCK_D)
    full: Any
    empty: Any


# ---------------------------------------------------------------- What the kernels share


@gluon.jit
def make_ring(desc, SLOTS: gl.constexpr, ROWS: gl.constexpr, BLOCK_D: gl.constexpr, READERS: gl.constexpr):
    """Slots for tiles of a descriptor, all of them empty. READERS consumers read each."""
    tiles = gl.allocate_shared_memory(desc.dtype, [SLOTS, 1, ROWS, 1, BLOCK_D], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Ring(tiles, full, empty)


@gluon.jit
def fill(ring, slot, parity, desc, batch, token, head):
    """Have a slot filled with the rows from `token` on, as soon as its readers have left it."""
    mbarrier.wait(ring.empty.index(slot), parity ^ 1)
    mbarrier.expect(ring.full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, token, head, 0], ring.full.index(slot), ring.tiles.index(slot))


@gluon.jit
def fill_with_line(ring, lines, slot, parity, desc, line_desc, batch, token, head, line):
    """The same, and a line of `lines` with a number for each of these rows, from number `line` on."""
    mbarrier.wait(ring.empty.index(slot), parity ^ 1)
    mbarrier.expect(ring.full.index(slot), desc.block_type.nbytes + line_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(line_desc, [line], ring.full.index(slot), lines.index(slot))
    tma.async_copy_global_to_shared(desc, [batch, token, head, 0], ring.full.index(slot), ring.tiles.index(slot))


@gluon.jit
def filled(ring, slot, parity, ROWS: gl.constexpr, BLOCK_D: gl.constexpr):
    """The tile (ROWS, BLOCK_D) in a slot, once it is there."""
    mbarrier.wait(ring.full.index(slot), parity)
    return ring.tiles.index(slot).reshape([ROWS, BLOCK_D])


@gluon.jit
def leave(ring, slot):
    """This consumer reads the slot no more."""
    mbarrier.arrive(ring.empty.index(slot), count=1)


@gluon.jit
def pair_of(turn):
    """The number of the pair of tiles that this program has in a turn; in the next turn it has the pair's other tile.

    A pair is the last tile of a head and its first, the last but one and its second, and so on: under a causal mask
    one sees more as the other sees less, so that every pair, and so every program, has as much work as another.
    """
    return turn // 2 * gl.num_programs(0) + gl.program_id(0)


@gluon.jit
def place_of(pair, turn, tiles, sizes):
    """The head (of all batches) and the tile. Where their number is odd, the tile in the middle stands alone, and the
    tile `tiles`, which has no rows, stands for its partner. Pairs are taken of `l2_group` heads at a time, so that what
    these heads read stays in the L2 cache.
    """
    pairs = (tiles + 1) // 2
    first_head = pair // (pairs * sizes.l2_group) * sizes.l2_group
    width = gl.minimum(sizes.l2_group, sizes.heads - first_head)
    rest = pair - first_head * pairs
    tile = rest // width
    if turn % 2 == 0:
        tile = tiles - 1 - tile
    elif tile * 2 + 1 == tiles:
        tile = tiles
    return first_head + rest % width, tile


@gluon.jit
def document_at(spans, row, tile_start, length, other, BLOCK: gl.constexpr):
    """Of the document that row `row` of a tile is in: its start and end among the `other` positions (all of them
    without spans), and which row of the tile is the first that is not in it. `length` rows there are in all.
    """
    stop = gl.minimum(BLOCK, length - tile_start)
    start = 0
    end = other
    if spans is not None:
        start = gl.load(spans + tile_start + row)
        end = gl.load(spans + length + tile_start + row)
        stop = gl.minimum(stop, end - tile_start)
    return start, end, stop


@gluon.jit
def clear_from(tile, left, ROWS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Write 0 into a tile's rows from `left` on: another document's NaN times a weight of 0 would be NaN.

    Both consumers do it, each before its own product, and write the same.
    """
    LANES: gl.constexpr = 32 if BLOCK_D >= 256 else BLOCK_D // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    for i in gl.static_range(ROWS // 16):  # A few registers at a time.
        if i * 16 + 16 > left:
            part = tile.slice(i * 16, 16, 0)
            row = i * 16 + gl.arange(0, 16, gl.SliceLayout(1, LAYOUT))
            x = part.load(LAYOUT)
            part.store(gl.where((row < left)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()  # The products read shared memory through another path than stores take.


# ---------------------------------------------------------------- Forward


@gluon.jit
def _forward_producer(q_desc, k_desc, v_desc, spans, q, k, v, sizes, shape: gl.constexpr, tiling: gl.constexpr):
    BLOCK_M: gl.constexpr = tiling.BLOCK_M
    SLOTS: gl.constexpr = tiling.SLOTS
    tiles = (sizes.queries + BLOCK_M - 1) // BLOCK_M
    total = (tiles + 1) // 2 * sizes.heads
    used = 0  # slots of k and v, counted on
    passes = 0  # documents of tiles
    turn = 0
    pair = pair_of(turn)
    while pair < total:
        place, tile = place_of(pair, turn, tiles, sizes)
        batch = place // shape.HEADS
        head = place % shape.HEADS
        tile_start = tile * BLOCK_M
        first = 0
        rows = gl.minimum(BLOCK_M, sizes.queries - tile_start)
        while first < rows:
            start, end, row_stop = document_at(spans, first, tile_start, sizes.queries, sizes.keys, BLOCK_M)
            stop = end
            if shape.CAUSAL:
                stop = gl.minimum(end, gl.maximum(start, sizes.keys - sizes.queries + tile_start + row_stop))
            for half in gl.static_range(2):
                fill(q, half, passes & 1, q_desc, batch, tile_start + first + half * (BLOCK_M // 2), head)
            for key_start in range(start, stop, tiling.BLOCK_N):
                slot = used % SLOTS
                parity = (used // SLOTS) & 1
                fill(k, slot, parity, k_desc, batch, key_start, head // shape.GROUP)
                fill(v, slot, parity, v_desc, batch, key_start, head // shape.GROUP)
                used += 1
            passes += 1
            first = row_stop
        turn += 1
        pair = pair_of(turn)


@gluon.jit
def seen_from(position, key_start, stop, HALF: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
              LAYOUT: gl.constexpr):  # fmt: skip
    """Which keys of a tile the rows at positions `position` on see; without the causal mask all keys before `stop`."""
    column = key_start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    row = position + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    if CAUSAL:
        return column[None, :] <= row[:, None]
    else:
        return (column[None, :] < stop) & (row[:, None] >= position)


@gluon.jit
def _online_softmax(s, m_i, l_i, needs_mask, position, key_start, stop, post_scale, CAUSAL: gl.constexpr,
                    LAYOUT: gl.constexpr):  # fmt: skip
    """p of a tile of scores, the new maximum and sum of each row, and by what its earlier sums shrink."""
    if needs_mask:
        visible = seen_from(position, key_start, stop, s.shape[0], s.shape[1], CAUSAL, LAYOUT)
        s = gl.where(visible, s, -float("inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * post_scale)
    base = gl.where(m_new == -float("inf"), 0.0, m_new)  # A row that has seen nothing yet has no maximum.
    p = gl.exp2(s * post_scale - base[:, None])
    alpha = gl.exp2(m_i - base)
    return p, m_new, l_i * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _forward_consumer(
    out, lse, spans, q, k, v, turns, sizes, post_scale, ME: gl.constexpr, shape: gl.constexpr, tiling: gl.constexpr
):  # fmt: skip
    """The rows [64 ME, 64 ME + 64) of each tile, or of the part of it that is in one document."""
    BLOCK_M: gl.constexpr = tiling.BLOCK_M
    BLOCK_N: gl.constexpr = tiling.BLOCK_N
    BLOCK_D: gl.constexpr = shape.BLOCK_D
    SLOTS: gl.constexpr = tiling.SLOTS
    HALF: gl.constexpr = BLOCK_M // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = v.tiles.dtype
    tiles = (sizes.queries + BLOCK_M - 1) // BLOCK_M
    total = (tiles + 1) // 2 * sizes.heads
    shift = sizes.keys - sizes.queries  # Query i stands at key i + shift.
    used = 0
    passes = 0
    turn = 0
    pair = pair_of(turn)
    while pair < total:
        place, tile = place_of(pair, turn, tiles, sizes)
        batch = place // shape.HEADS
        head = place % shape.HEADS
        tile_start = tile * BLOCK_M
        first = 0
        rows = gl.minimum(BLOCK_M, sizes.queries - tile_start)
        while first < rows:
            start, end, row_stop = document_at(spans, first, tile_start, sizes.queries, sizes.keys, BLOCK_M)
            mine = tile_start + first + ME * HALF
            stop = end
            whole_stop = end  # Tiles up to here are seen whole by all of these rows.
            if shape.CAUSAL:
                stop = gl.minimum(end, gl.maximum(start, shift + tile_start + row_stop))
                whole_stop = gl.minimum(stop, shift + mine + 1)
            m_i = gl.full([HALF], -float("inf"), gl.float32, ROW)
            l_i = gl.full([HALF], 0.0, gl.float32, ROW)
            acc = gl.full([HALF, BLOCK_D], 0.0, gl.float32, O_LAYOUT)
            zero = gl.full([HALF, BLOCK_N], 0.0, gl.float32, S_LAYOUT)
            query = filled(q, ME, passes & 1, HALF, BLOCK_D)
            if start < stop:
                # The first tile's scores stand alone.
                slot = used % SLOTS
                key = filled(k, slot, (used // SLOTS) & 1, BLOCK_N, BLOCK_D)
                mbarrier.wait(turns.index(ME), (used & 1) ^ (1 - ME))
                s = warpgroup_mma(query, key.permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.arrive(turns.index(1 - ME), count=1)
                s = warpgroup_mma_wait(0, deps=[s])
                leave(k, slot)
                p, m_i, l_i, alpha = _online_softmax(
                    s, m_i, l_i, start + BLOCK_N > whole_stop, shift + mine, start, stop, post_scale, shape.CAUSAL,
                    S_LAYOUT,
                )  # fmt: skip
                weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
                used += 1
                for key_start in range(start + BLOCK_N, stop, BLOCK_N):
                    # At our turn: this tile's scores, and the values of the tile before.
                    slot = used % SLOTS
                    before = (used - 1) % SLOTS
                    key = filled(k, slot, (used // SLOTS) & 1, BLOCK_N, BLOCK_D)
                    mbarrier.wait(turns.index(ME), (used & 1) ^ (1 - ME))
                    s = warpgroup_mma(query, key.permute((1, 0)), zero, use_acc=False, is_async=True)
                    value = filled(v, before, ((used - 1) // SLOTS) & 1, BLOCK_N, BLOCK_D)
                    acc = warpgroup_mma(weights, value, acc, is_async=True)
                    mbarrier.arrive(turns.index(1 - ME), count=1)

                    # The softmax needs the scores only; the other consumer's products run meanwhile.
                    s = warpgroup_mma_wait(1, deps=[s])
                    leave(k, slot)
                    p, m_i, l_i, alpha = _online_softmax(
                        s, m_i, l_i, key_start + BLOCK_N > whole_stop, shift + mine, key_start, stop, post_scale,
                        shape.CAUSAL, S_LAYOUT,
                    )  # fmt: skip
                    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                    leave(v, before)
                    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
                    weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
                    used += 1
                leave(q, ME)

                # The values of the last tile, of which the document may not fill all.
                before = (used - 1) % SLOTS
                value = filled(v, before, ((used - 1) // SLOTS) & 1, BLOCK_N, BLOCK_D)
                if spans is not None:
                    last = start + (stop - start - 1) // BLOCK_N * BLOCK_N
                    if last + BLOCK_N > end:
                        clear_from(value, end - last, BLOCK_N, BLOCK_D)
                acc = warpgroup_mma(weights, value, acc, is_async=True)
                acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
                leave(v, before)
            else:
                leave(q, ME)
            passes += 1

            # Store the log-sum-exp and the output, 0 for a row that saw nothing.
            local = first + ME * HALF + gl.arange(0, HALF, ROW)
            line = gl.cast(place, gl.int64) * sizes.queries + tile_start
            gl.store(lse + line + local, m_i + gl.log2(l_i), mask=local < row_stop)
            inverse = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
            acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]
            base = (gl.cast(batch, gl.int64) * sizes.queries + tile_start) * shape.HEADS + head
            store_rows(out + base * shape.D, acc, first + ME * HALF, row_stop, shape.HEADS, shape, O_LAYOUT)
            first = row_stop
        turn += 1
        pair = pair_of(turn)


@gluon.jit
def store_rows(out, x, first, row_stop, HEADS: gl.constexpr, shape: gl.constexpr, LAYOUT: gl.constexpr):
    """Write x (rows, BLOCK_D) from row `first` on, without rows from `row_stop` on, HEADS x D elements a row."""
    row = first + gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, shape.BLOCK_D, gl.SliceLayout(0, LAYOUT))
    inside = (row < row_stop)[:, None] & (column < shape.D)[None, :]
    pointers = out + (row[:, None] * (HEADS * shape.D) + column[None, :])
    gl.store(pointers, x.to(out.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "l2_group"])
def _gluon_forward(
    q_desc, k_desc, v_desc, out, lse, spans, queries, keys, heads, l2_group, post_scale, shape: gl.constexpr,
    tiling: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """out (B, T, Hq, D), contiguous, and lse (B, Hq, T), to base 2, of descriptors of q, k and v (B, T, H, D).

    spans (2, T) says where each token's document starts and where it ends; it is None without packed documents.
    """
    BLOCK_D: gl.constexpr = shape.BLOCK_D
    sizes = Sizes(queries, keys, heads, l2_group)
    q = make_ring(q_desc, 2, tiling.BLOCK_M // 2, BLOCK_D, 1)  # a slot a consumer
    k = make_ring(k_desc, tiling.SLOTS, tiling.BLOCK_N, BLOCK_D, 2)
    v = make_ring(v_desc, tiling.SLOTS, tiling.BLOCK_N, BLOCK_D, 2)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    gl.warp_specialize(
        [
            (_forward_consumer, (out, lse, spans, q, k, v, turns, sizes, post_scale, 0, shape, tiling)),
            (_forward_consumer, (out, lse, spans, q, k, v, turns, sizes, post_scale, 1, shape, tiling)),
            (_forward_producer, (q_desc, k_desc, v_desc, spans, q, k, v, sizes, shape, tiling)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )


# ---------------------------------------------------------------- Launches

FORWARD_TILES = {64: Tiles(128, 128, 3), 128: Tiles(128, 128, 2), 256: Tiles(128, 64, 2)}  # by BLOCK_D


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return RECORDED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """x (B, T, H, D), or (T, H, D) as a batch of one, in tiles of so many rows of one head."""
    x = x if x.dim() == 4 else x[None]
    block = [1, rows, 1, width]
    element = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def line_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """All numbers of x (fp32, contiguous), in lines of so many."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [rows], layout)


def run(kernel: Any, heads: int, tiles: int, *args: Any, device: torch.device) -> None:
    """Launch a kernel with a program a multiprocessor, but no more than there are pairs of tiles."""
    programs = min(_processors(device), heads * cdiv(tiles, 2))
    launch(kernel, (programs,), *args, CONSUMER_REGISTERS, PRODUCER_REGISTERS, num_warps=4)


def shape_of(q: Tensor, k: Tensor, options: Options) -> Shape:
    heads, width = q.shape[-2:]
    return Shape(heads, heads // k.shape[-2], width, max(64, power_of_two(width)), options.causal)


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """q (B, T, Hq, D), k and v (B, S, Hkv, D), all of which `fits` -> out like q, lse (B, Hq, T) fp32 to base 2.

    Packed documents are (T, H, D), with spans (2, T) int32: where each token's document starts and where it ends.
    """
    queries, heads, width = q.shape[-3:]
    batch, keys = q.shape[:-3].numel(), k.shape[-3]
    shape = shape_of(q, k, options)
    tiling = FORWARD_TILES[shape.BLOCK_D]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    l2_group = shape.GROUP * max(1, L2_BYTES // (2 * keys * width * k.element_size()))
    run(
        _gluon_forward, batch * heads, cdiv(queries, tiling.BLOCK_M),
        descriptor(q, tiling.BLOCK_M // 2, shape.BLOCK_D), descriptor(k, tiling.BLOCK_N, shape.BLOCK_D),
        descriptor(v, tiling.BLOCK_N, shape.BLOCK_D), out, lse, spans, queries, keys, batch * heads,
        min(batch * heads, l2_group), max(TINY, LOG2_E * options.scale), shape, tiling, device=q.device,
    )  # fmt: skip
    return out, lse
