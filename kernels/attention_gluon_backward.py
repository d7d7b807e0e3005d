"""Attention's backward pass for Hopper in Gluon: the shape of `attention_gluon.py`, the sums of `attention_triton.py`.

Two kernels, seven products, no atomics, the same bits every time. One takes a tile of keys against all queries that see
it, for dk and dv: the scores and do v^T come out transposed, (keys, queries), and so are the left operands of both
sums without a detour. The other takes a tile of queries against all keys, for dq; its queries and dout wait in
registers, which halves what its products read from shared memory.

The two consumers need no turns here: each has three or four products a tile, and while one computes p and ds from its
own, the other's are under way. Heads of more than 128 dimensions need more registers for dk and dv than there are, so
`attention.py` leaves them to the Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from afina.kernels.attention_gluon import (
    L2_BYTES,
    LOG2_E,
    TINY,
    Sizes,
    Tiles,
    clear_from,
    descriptor,
    document_at,
    fill,
    fill_with_line,
    filled,
    leave,
    line_descriptor,
    make_ring,
    pair_of,
    place_of,
    run,
    seen_from,
    shape_of,
    store_rows,
)
from afina.kernels.attention_torch import Options
from afina.kernels.attention_triton import attention_delta
from afina.kernels.launch import cdiv

# ---------------------------------------------------------------- dk and dv


@gluon.jit
def _dkdv_producer(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, spans, q, k, v, dout, lses, deltas, sizes,
    shape: gl.constexpr, tiling: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = tiling.BLOCK_N
    SLOTS: gl.constexpr = tiling.SLOTS
    KEY_HEADS: gl.constexpr = shape.HEADS // shape.GROUP
    tiles = (sizes.keys + BLOCK_N - 1) // BLOCK_N
    total = (tiles + 1) // 2 * sizes.heads
    used = 0
    passes = 0
    turn = 0
    pair = pair_of(turn)
    while pair < total:
        place, tile = place_of(pair, turn, tiles, sizes)
        batch = place // KEY_HEADS
        key_head = place % KEY_HEADS
        tile_start = tile * BLOCK_N
        first = 0
        rows = gl.minimum(BLOCK_N, sizes.keys - tile_start)
        while first < rows:
            start, end, row_stop = document_at(spans, first, tile_start, sizes.keys, sizes.queries, BLOCK_N)
            if shape.CAUSAL:
                start = gl.maximum(start, tile_start + first - (sizes.keys - sizes.queries))
            for half in gl.static_range(2):
                at = tile_start + first + half * (BLOCK_N // 2)
                fill(k, half, passes & 1, k_desc, batch, at, key_head)
                fill(v, half, passes & 1, v_desc, batch, at, key_head)
            for member in range(shape.GROUP):
                head = key_head * shape.GROUP + member
                line = (batch * shape.HEADS + head) * sizes.queries
                for query_start in range(start, end, tiling.BLOCK_M):
                    slot = used % SLOTS
                    parity = (used // SLOTS) & 1
                    at = line + query_start
                    fill_with_line(q, lses, slot, parity, q_desc, lse_desc, batch, query_start, head, at)
                    fill_with_line(dout, deltas, slot, parity, dout_desc, delta_desc, batch, query_start, head, at)
                    used += 1
            passes += 1
            first = row_stop
        turn += 1
        pair = pair_of(turn)


@gluon.jit
def _clear_line_from(line, left, ROWS: gl.constexpr):
    """Write 0 into a line from number `left` on: those are another head's or document's, and may be NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x = line.load(LAYOUT)
    line.store(gl.where(gl.arange(0, ROWS, LAYOUT) < left, x, 0.0))
    fence_async_shared()


@gluon.jit
def _dkdv_consumer(
    dk, dv, spans, q, k, v, dout, lses, deltas, columns, sizes, post_scale, grad_scale, ME: gl.constexpr,
    shape: gl.constexpr, tiling: gl.constexpr,
):  # fmt: skip
    """The keys [64 ME, 64 ME + 64) of each tile, or of the part of it that is in one document."""
    BLOCK_M: gl.constexpr = tiling.BLOCK_M
    BLOCK_N: gl.constexpr = tiling.BLOCK_N
    BLOCK_D: gl.constexpr = shape.BLOCK_D
    SLOTS: gl.constexpr = tiling.SLOTS
    HALF: gl.constexpr = BLOCK_N // 2
    KEY_HEADS: gl.constexpr = shape.HEADS // shape.GROUP
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, G_LAYOUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q.tiles.dtype
    tiles = (sizes.keys + BLOCK_N - 1) // BLOCK_N
    total = (tiles + 1) // 2 * sizes.heads
    shift = sizes.keys - sizes.queries
    used = 0
    passes = 0
    turn = 0
    pair = pair_of(turn)
    while pair < total:
        place, tile = place_of(pair, turn, tiles, sizes)
        batch = place // KEY_HEADS
        key_head = place % KEY_HEADS
        tile_start = tile * BLOCK_N
        first = 0
        rows = gl.minimum(BLOCK_N, sizes.keys - tile_start)
        while first < rows:
            start, end, row_stop = document_at(spans, first, tile_start, sizes.keys, sizes.queries, BLOCK_N)
            position = tile_start + first + ME * HALF - shift  # of the first query that sees this half's first key
            if shape.CAUSAL:
                start = gl.maximum(start, tile_start + first - shift)
            dk_acc = gl.full([HALF, BLOCK_D], 0.0, gl.float32, G_LAYOUT)
            dv_acc = gl.full([HALF, BLOCK_D], 0.0, gl.float32, G_LAYOUT)
            zero = gl.full([HALF, BLOCK_M], 0.0, gl.float32, S_LAYOUT)
            key = filled(k, ME, passes & 1, HALF, BLOCK_D)
            value = filled(v, ME, passes & 1, HALF, BLOCK_D)
            for _member in range(shape.GROUP):
                for query_start in range(start, end, BLOCK_M):
                    slot = used % SLOTS
                    parity = (used // SLOTS) & 1
                    is_last = query_start + BLOCK_M > end

                    # Scores and do v^T, both transposed. Rows beyond the end become 0, and so add nothing.
                    query = filled(q, slot, parity, BLOCK_M, BLOCK_D)
                    if is_last:
                        _clear_line_from(lses.index(slot), end - query_start, BLOCK_M)
                        if spans is not None:
                            clear_from(query, end - query_start, BLOCK_M, BLOCK_D)
                    s = warpgroup_mma(key, query.permute((1, 0)), zero, use_acc=False, is_async=True)
                    do = filled(dout, slot, parity, BLOCK_M, BLOCK_D)
                    if is_last:
                        _clear_line_from(deltas.index(slot), end - query_start, BLOCK_M)
                        if spans is not None:
                            clear_from(do, end - query_start, BLOCK_M, BLOCK_D)
                    dp = warpgroup_mma(value, do.permute((1, 0)), zero, use_acc=False, is_async=True)

                    # p from the log-sum-exp, and the mask in the tiles that need it.
                    s = warpgroup_mma_wait(1, deps=[s])
                    p = gl.exp2(s * post_scale - lses.index(slot).load(COLUMN)[None, :])
                    if shape.CAUSAL:  # noqa: SIM102  # The first is known to the compiler, the second to the GPU.
                        if query_start < position + HALF - 1:
                            column = columns.load(COLUMN)  # `gl.arange` would keep registers through the loop.
                            row = position - query_start + gl.arange(0, HALF, gl.SliceLayout(1, S_LAYOUT))
                            p = gl.where(row[:, None] <= column[None, :], p, 0.0)

                    # dv, ds = p * (do v^T - delta), and dk.
                    weights = gl.convert_layout(p.to(dtype), P_LAYOUT)
                    dv_acc = warpgroup_mma(weights, do, dv_acc, is_async=True)
                    dp = warpgroup_mma_wait(1, deps=[dp])
                    delta = deltas.index(slot).load(COLUMN)
                    slopes = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), P_LAYOUT)
                    dk_acc = warpgroup_mma(slopes, query, dk_acc, is_async=True)
                    dv_acc, weights = warpgroup_mma_wait(1, deps=[dv_acc, weights])
                    leave(dout, slot)
                    dk_acc, slopes = warpgroup_mma_wait(0, deps=[dk_acc, slopes])
                    leave(q, slot)
                    used += 1
            leave(k, ME)
            leave(v, ME)
            passes += 1

            # Store.
            base = (gl.cast(batch, gl.int64) * sizes.keys + tile_start) * KEY_HEADS + key_head
            local = first + ME * HALF
            store_rows(dk + base * shape.D, dk_acc * grad_scale, local, row_stop, KEY_HEADS, shape, G_LAYOUT)
            store_rows(dv + base * shape.D, dv_acc, local, row_stop, KEY_HEADS, shape, G_LAYOUT)
            first = row_stop
        turn += 1
        pair = pair_of(turn)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "l2_group"])
def _gluon_dkdv(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dk, dv, spans, queries, keys, heads, l2_group, post_scale,
    grad_scale, shape: gl.constexpr, tiling: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv (B, S, Hkv, D), contiguous. The query heads that share a key head are taken one after the other."""
    BLOCK_D: gl.constexpr = shape.BLOCK_D
    sizes = Sizes(queries, keys, heads, l2_group)
    k = make_ring(k_desc, 2, tiling.BLOCK_N // 2, BLOCK_D, 1)
    v = make_ring(v_desc, 2, tiling.BLOCK_N // 2, BLOCK_D, 1)
    q = make_ring(q_desc, tiling.SLOTS, tiling.BLOCK_M, BLOCK_D, 2)
    dout = make_ring(dout_desc, tiling.SLOTS, tiling.BLOCK_M, BLOCK_D, 2)
    lses = gl.allocate_shared_memory(gl.float32, [tiling.SLOTS, tiling.BLOCK_M], lse_desc.layout)  # come with q
    deltas = gl.allocate_shared_memory(gl.float32, [tiling.SLOTS, tiling.BLOCK_M], lse_desc.layout)  # come with dout
    columns = gl.allocate_shared_memory(gl.int32, [tiling.BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    columns.store(gl.arange(0, tiling.BLOCK_M, gl.BlockedLayout([1], [32], [4], [0])))  # 0, 1, 2 ...: for the mask
    gl.warp_specialize(
        [
            (
                _dkdv_consumer,
                (dk, dv, spans, q, k, v, dout, lses, deltas, columns, sizes, post_scale, grad_scale, 0, shape, tiling),
            ),
            (
                _dkdv_consumer,
                (dk, dv, spans, q, k, v, dout, lses, deltas, columns, sizes, post_scale, grad_scale, 1, shape, tiling),
            ),
            (
                _dkdv_producer,
                (
                    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, spans, q, k, v, dout, lses, deltas, sizes,
                    shape, tiling,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---------------------------------------------------------------- dq


@gluon.jit
def _dq_producer(
    q_desc, k_desc, v_desc, dout_desc, spans, q, k, v, dout, sizes, shape: gl.constexpr, tiling: gl.constexpr
):  # fmt: skip
    BLOCK_M: gl.constexpr = tiling.BLOCK_M
    SLOTS: gl.constexpr = tiling.SLOTS
    tiles = (sizes.queries + BLOCK_M - 1) // BLOCK_M
    total = (tiles + 1) // 2 * sizes.heads
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
            stop = end
            if shape.CAUSAL:
                stop = gl.minimum(end, gl.maximum(start, sizes.keys - sizes.queries + tile_start + row_stop))
            for half in gl.static_range(2):
                at = tile_start + first + half * (BLOCK_M // 2)
                fill(q, half, passes & 1, q_desc, batch, at, head)
                fill(dout, half, passes & 1, dout_desc, batch, at, head)
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
def _dq_consumer(
    lse, delta, dq, spans, q, k, v, dout, sizes, post_scale, grad_scale, ME: gl.constexpr, shape: gl.constexpr,
    tiling: gl.constexpr,
):  # fmt: skip
    """The rows [64 ME, 64 ME + 64) of each tile, or of the part of it that is in one document."""
    BLOCK_M: gl.constexpr = tiling.BLOCK_M
    BLOCK_N: gl.constexpr = tiling.BLOCK_N
    BLOCK_D: gl.constexpr = shape.BLOCK_D
    SLOTS: gl.constexpr = tiling.SLOTS
    HALF: gl.constexpr = BLOCK_M // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    G_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, G_LAYOUT, 2)
    HELD: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = k.tiles.dtype
    tiles = (sizes.queries + BLOCK_M - 1) // BLOCK_M
    total = (tiles + 1) // 2 * sizes.heads
    shift = sizes.keys - sizes.queries
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
            whole_stop = end
            if shape.CAUSAL:
                stop = gl.minimum(end, gl.maximum(start, shift + tile_start + row_stop))
                whole_stop = gl.minimum(stop, shift + mine + 1)
            local = first + ME * HALF + gl.arange(0, HALF, ROW)
            line = gl.cast(place, gl.int64) * sizes.queries + tile_start
            row_lse = gl.load(lse + line + local, mask=local < row_stop, other=0.0)
            row_delta = gl.load(delta + line + local, mask=local < row_stop, other=0.0)
            dq_acc = gl.full([HALF, BLOCK_D], 0.0, gl.float32, G_LAYOUT)
            zero = gl.full([HALF, BLOCK_N], 0.0, gl.float32, S_LAYOUT)

            # The queries and dout move into registers, and their slots are free for the next tile's.
            query = filled(q, ME, passes & 1, HALF, BLOCK_D).load(HELD)
            leave(q, ME)
            do = filled(dout, ME, passes & 1, HALF, BLOCK_D).load(HELD)
            leave(dout, ME)
            for key_start in range(start, stop, BLOCK_N):
                slot = used % SLOTS
                parity = (used // SLOTS) & 1

                # Scores and do v^T.
                key = filled(k, slot, parity, BLOCK_N, BLOCK_D)
                if spans is not None:  # noqa: SIM102
                    if key_start + BLOCK_N > end:
                        clear_from(key, end - key_start, BLOCK_N, BLOCK_D)
                s = warpgroup_mma(query, key.permute((1, 0)), zero, use_acc=False, is_async=True)
                value = filled(v, slot, parity, BLOCK_N, BLOCK_D)
                dp = warpgroup_mma(do, value.permute((1, 0)), zero, use_acc=False, is_async=True)

                # p, ds = p * (do v^T - delta), and the mask in the tiles that need it.
                s = warpgroup_mma_wait(1, deps=[s])
                p = gl.exp2(s * post_scale - row_lse[:, None])
                dp = warpgroup_mma_wait(0, deps=[dp])
                leave(v, slot)
                ds = p * (dp - row_delta[:, None])
                if key_start + BLOCK_N > whole_stop:
                    visible = seen_from(shift + mine, key_start, stop, HALF, BLOCK_N, shape.CAUSAL, S_LAYOUT)
                    ds = gl.where(visible, ds, 0.0)

                # dq.
                slopes = gl.convert_layout(ds.to(dtype), P_LAYOUT)
                dq_acc = warpgroup_mma(slopes, key, dq_acc, is_async=True)
                dq_acc, slopes = warpgroup_mma_wait(0, deps=[dq_acc, slopes])
                leave(k, slot)
                used += 1
            passes += 1

            # Store.
            base = (gl.cast(batch, gl.int64) * sizes.queries + tile_start) * shape.HEADS + head
            store_rows(dq + base * shape.D, dq_acc * grad_scale, first + ME * HALF, row_stop, shape.HEADS, shape,
                       G_LAYOUT)  # fmt: skip
            first = row_stop
        turn += 1
        pair = pair_of(turn)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "l2_group"])
def _gluon_dq(
    q_desc, k_desc, v_desc, dout_desc, lse, delta, dq, spans, queries, keys, heads, l2_group, post_scale, grad_scale,
    shape: gl.constexpr, tiling: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq (B, T, Hq, D), contiguous. As in the forward pass, tiles of queries go against tiles of keys."""
    BLOCK_D: gl.constexpr = shape.BLOCK_D
    sizes = Sizes(queries, keys, heads, l2_group)
    q = make_ring(q_desc, 2, tiling.BLOCK_M // 2, BLOCK_D, 1)
    dout = make_ring(dout_desc, 2, tiling.BLOCK_M // 2, BLOCK_D, 1)
    k = make_ring(k_desc, tiling.SLOTS, tiling.BLOCK_N, BLOCK_D, 2)
    v = make_ring(v_desc, tiling.SLOTS, tiling.BLOCK_N, BLOCK_D, 2)
    gl.warp_specialize(
        [
            (_dq_consumer, (lse, delta, dq, spans, q, k, v, dout, sizes, post_scale, grad_scale, 0, shape, tiling)),
            (_dq_consumer, (lse, delta, dq, spans, q, k, v, dout, sizes, post_scale, grad_scale, 1, shape, tiling)),
            (_dq_producer, (q_desc, k_desc, v_desc, dout_desc, spans, q, k, v, dout, sizes, shape, tiling)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )


# ---------------------------------------------------------------- Launches

# By BLOCK_D.
DKDV_TILES = {64: Tiles(64, 128, 3), 128: Tiles(64, 128, 2)}
DQ_TILES = {64: Tiles(128, 128, 3), 128: Tiles(128, 64, 3)}


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options, spans: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """What `forward` took and gave, and the gradient dout of out -> dq, dk, dv; None for those that are not wanted."""
    queries, heads, width = q.shape[-3:]
    batch, keys, key_heads = q.shape[:-3].numel(), k.shape[-3], k.shape[-2]
    shape = shape_of(q, k, options)
    post_scale, wide = max(TINY, LOG2_E * options.scale), shape.BLOCK_D
    row_bytes = 2 * width * q.element_size()
    delta = attention_delta(out, dout, lse, q, k)
    dq, dk, dv = None, None, None
    if wanted[1] or wanted[2]:
        dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        tiling = DKDV_TILES[wide]
        l2_group = max(1, L2_BYTES // (shape.GROUP * queries * row_bytes))
        run(
            _gluon_dkdv, batch * key_heads, cdiv(keys, tiling.BLOCK_N), descriptor(q, tiling.BLOCK_M, wide),
            descriptor(k, tiling.BLOCK_N // 2, wide), descriptor(v, tiling.BLOCK_N // 2, wide),
            descriptor(dout, tiling.BLOCK_M, wide), line_descriptor(lse, tiling.BLOCK_M),
            line_descriptor(delta, tiling.BLOCK_M), dk, dv, spans, queries, keys, batch * key_heads,
            min(batch * key_heads, l2_group), post_scale, options.scale, shape, tiling, device=q.device,
        )  # fmt: skip
    if wanted[0]:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tiling = DQ_TILES[wide]
        l2_group = shape.GROUP * max(1, L2_BYTES // (keys * row_bytes))
        run(
            _gluon_dq, batch * heads, cdiv(queries, tiling.BLOCK_M), descriptor(q, tiling.BLOCK_M // 2, wide),
            descriptor(k, tiling.BLOCK_N, wide), descriptor(v, tiling.BLOCK_N, wide),
            descriptor(dout, tiling.BLOCK_M // 2, wide), lse, delta, dq, spans, queries, keys, batch * heads,
            min(batch * heads, l2_group), post_scale, options.scale, shape, tiling, device=q.device,
        )  # fmt: skip
    return dq, dk, dv
