"""The torch path of attention, on CPUs, in float64 and wherever no kernel can run.

Without window and softcap a CPU runs torch's own flash attention, whose gradient takes the output and the log-sum-exp.
Everything else is blocked matrix products: scores exist for one block of queries at a time, of all heads that share
keys at once, so memory is linear in length here too.

Packed documents of like length are padded on the right to a rectangle and go through as one batch. A causal query never
sees the padding, and it is taken from the document itself, so no document can touch another.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.backend import multiplies, wide_dtype

BLOCK_ROWS = 64  # Queries of one block.
BLOCK_SCORES = 1 << 20  # Scores of all heads and several documents that exist at a time, few enough to stay in cache.


class Options(NamedTuple):
    """The options of `attention`, with the window None where it hides nothing, and the scale a number."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float


class Bucket(NamedTuple):
    """Documents laid out as a rectangle (documents, length). Without `gather` they lie so already: it is a view."""

    documents: int
    length: int
    start: int  # the first token of a view
    gather: Tensor | None  # (documents * length,): the token of each place; padding repeats its document's last token
    padding: Tensor | None  # the places that are padding, None if there are none
    places: Tensor | None  # the places that are not padding, None if all are
    tokens: Tensor | None  # the tokens of `places`

    def take(self, x: Tensor, zero: bool = False) -> Tensor:
        """x (tokens, H, D) as (documents, length, H, D). With `zero` the padding is 0."""
        if self.gather is None:
            rows = x[self.start : self.start + self.documents * self.length]
        else:
            rows = x.index_select(0, self.gather)
            if zero and self.padding is not None:
                rows.index_fill_(0, self.padding, 0.0)
        return rows.unflatten(0, (self.documents, self.length))

    def put(self, rectangle: Tensor, x: Tensor) -> None:
        """Write a rectangle (documents, length, H, D), without its padding, to its tokens in x (tokens, H, D)."""
        rows = rectangle.flatten(0, 1)
        if self.gather is None:
            x[self.start : self.start + rows.shape[0]] = rows
        elif self.tokens is None or self.places is None:
            x.index_copy_(0, self.gather, rows)
        else:
            x.index_copy_(0, self.tokens, rows.index_select(0, self.places))


@lru_cache(maxsize=32)
def plan_buckets(offsets: tuple[int, ...], exact: bool, device: torch.device) -> tuple[Bucket, ...]:
    """Divide documents into buckets, in each of which lengths are within a quarter of the longest, equal if `exact`."""
    documents = sorted(((end - start, start) for start, end in pairwise(offsets) if end > start), reverse=True)
    buckets = []
    while documents:
        length = documents[0][0]
        shortest = length if exact else length - length // 4
        count = sum(1 for size, _ in documents if size >= shortest)
        group, documents = sorted(documents[:count], key=lambda pair: pair[1]), documents[count:]
        starts = torch.tensor([start for _, start in group])
        sizes = torch.tensor([size for size, _ in group])
        place = torch.arange(length).expand(count, length)
        gather = (starts.unsqueeze(1) + place.minimum(sizes.unsqueeze(1) - 1)).flatten().to(device)
        if group[-1][0] == group[0][0] == length and group[-1][1] - group[0][1] == (count - 1) * length:
            buckets.append(Bucket(count, length, group[0][1], None, None, None, None))
            continue
        padding = (place >= sizes.unsqueeze(1)).flatten()
        if not padding.any():
            buckets.append(Bucket(count, length, 0, gather, None, None, None))
            continue
        places = (~padding).nonzero().squeeze(1).to(device)
        buckets.append(
            Bucket(count, length, 0, gather, padding.nonzero().squeeze(1).to(device), places, gather[places])
        )
    return tuple(buckets)


def visible(rows: int, columns: int, shift: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys each query sees, as (rows, columns) of bool. Query i stands at position i + shift."""
    i = torch.arange(shift, rows + shift, device=device).unsqueeze(1)
    j = torch.arange(columns, device=device)
    seen = (j <= i) if causal else torch.ones(rows, columns, dtype=torch.bool, device=device)
    return seen if window is None else seen & (j > i - window)


def _forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """q (n, T, Hq, D), k and v (n, S, Hkv, D) -> out (n, T, Hq, D)."""
    wide, heads = wide_dtype(q.dtype), k.shape[2]
    tiles, blocks, size = _tiles(q, k, options)
    out = _empty(q, blocks)
    scores = q.new_empty(size, dtype=wide)
    for documents in tiles:
        keys, values = _heads(k[documents], wide), _heads(v[documents], wide)
        for rows, columns in blocks:
            queries = _group(q[documents, rows], heads, wide) * options.scale
            p, _ = _probabilities(queries, keys[:, columns], scores, rows, columns, q, k, options)
            _put(out[documents, rows], torch.bmm(p, values[:, columns]), heads)
    return out


def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """do like the output of `_forward`, and its inputs -> dq, dk, dv."""
    wide, heads = wide_dtype(q.dtype), k.shape[2]
    tiles, blocks, size = _tiles(q, k, options)
    dq = _empty(q, blocks)
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    scores, gradients = q.new_empty(2, size, dtype=wide)
    for documents in tiles:
        keys, values = _heads(k[documents], wide), _heads(v[documents], wide)
        sums: list[Tensor] = []
        # The last block comes first, because mostly it sees all keys: the others add to what it has written.
        for rows, columns in reversed(blocks):
            queries, g = (_group(x[documents, rows], heads, wide) for x in (q, do))
            queries = queries * options.scale
            p, slope = _probabilities(queries, keys[:, columns], scores, rows, columns, q, k, options)
            ds = gradients[: p.numel()].view_as(p)
            torch.bmm(g, values[:, columns].transpose(1, 2), out=ds)
            # p * (ds - rowsum(p * ds)), and rowsum(p * ds) = rowsum(do * o) = delta.
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, wide, grad_input=ds)
            if slope is not None:
                ds.mul_(slope)
            _put(dq[documents, rows], torch.bmm(ds, keys[:, columns]).mul_(options.scale), heads)
            parts = [torch.bmm(ds.transpose(1, 2), queries), torch.bmm(p.transpose(1, 2), g)]
            if not sums and parts[0].shape == keys.shape:
                sums = parts
                continue
            sums = sums or [torch.zeros_like(keys), torch.zeros_like(values)]
            for total, part in zip(sums, parts):
                total[:, columns] += part
        for grad, total in zip((dk, dv), sums):
            grad[documents] = total.unflatten(0, (-1, heads)).transpose(1, 2)
    return dq, dk, dv


def _empty(q: Tensor, blocks: list[tuple[slice, slice]]) -> Tensor:
    """Memory like q for the results of the blocks, filled with 0 if they do not cover it."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out if blocks and blocks[0][0].start == 0 else out.zero_()


def _tiles(q: Tensor, k: Tensor, options: Options) -> tuple[list[slice], list[tuple[slice, slice]], int]:
    """How the work is cut: groups of documents, blocks of queries and the largest number of scores at a time.

    Each block comes with the range of the keys that its queries see.
    """
    (n, length, heads, _), keys = q.shape, k.shape[1]
    shift = keys - length
    rows = BLOCK_ROWS if length > 2 * BLOCK_ROWS else max(1, length)
    blocks = []
    # Causal queries before the first key (S < T) see nothing.
    for i0 in range(max(0, -shift) if options.causal else 0, length if keys else 0, rows):
        i1 = min(length, i0 + rows)
        j0 = 0 if options.window is None else max(0, i0 + shift - options.window + 1)
        blocks.append((slice(i0, i1), slice(j0, i1 + shift if options.causal else keys)))
    widest = heads * rows * max((columns.stop - columns.start for _, columns in blocks), default=1)
    # Groups of equal size, as few as the bound on the scores allows.
    groups = max(1, -(-n * widest // BLOCK_SCORES))
    step = max(1, -(-n // groups))
    return [slice(first, min(n, first + step)) for first in range(0, n, step)], blocks, step * widest


def _probabilities(
    queries: Tensor,
    keys: Tensor,
    scores: Tensor,
    rows: slice,
    columns: slice,
    q: Tensor,
    k: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """The softmax p of the scores of queries (n * Hkv, G * rows, D) and keys (n * Hkv, columns, D).

    p (n * Hkv, G * rows, columns) lies in the buffer `scores`. Second comes a softcap's slope 1 - (s / softcap)^2, or
    None without a softcap.
    """
    shape = (queries.shape[0], queries.shape[1], keys.shape[1])
    s = scores[: shape[0] * shape[1] * shape[2]].view(shape)
    torch.bmm(queries, keys.transpose(1, 2), out=s)
    slope = None
    if options.softcap is not None:
        s.div_(options.softcap).tanh_()
        slope = 1 - s * s
        s.mul_(options.softcap)
    if options.causal:
        size, shift = rows.stop - rows.start, k.shape[1] - q.shape[1]
        # Without a window only keys in the square at the diagonal are hidden.
        first = columns.start if options.window is not None else rows.start + shift
        by_head = s.unflatten(1, (-1, size))
        by_head[..., first - columns.start :] += _mask(
            size, columns.stop - first, rows.start + shift - first, options.window, s.dtype, s.device
        )
    # This is in place, as the softmax kernels read a row's maximum and sum before they write it. A test watches that.
    return torch.softmax(s, dim=-1, out=s), slope


@lru_cache(maxsize=64)
def _mask(rows: int, columns: int, shift: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns): 0 where query i, at position i + shift, sees key j, and -inf elsewhere."""
    seen = visible(rows, columns, shift, True, window, device)
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, S, H, D) -> (n * H, S, D)."""
    return x.transpose(1, 2).flatten(0, 1).to(dtype)


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """(n, T, Hq, D) -> a view (n, Hkv, G, T, D)."""
    return x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)


def _group(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(n, T, Hq, D) -> (n * Hkv, G * T, D), where the queries that share a key head are the rows of one matrix."""
    return _by_key_head(x, heads).flatten(2, 3).flatten(0, 1).to(dtype)


def _put(out: Tensor, grouped: Tensor, heads: int) -> None:
    """Write what `_group` has laid out so into `out` (n, T, Hq, D)."""
    target = _by_key_head(out, heads)
    target.copy_(grouped.view(target.shape))


class BlockedAttention(torch.autograd.Function):
    """Takes q, k and v (n, T, H, D), or with the plan of a packed batch (T, H, D), and gives a tensor like q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, plan: tuple[Bucket, ...] | None) -> Tensor:
        ctx.options, ctx.plan = options, plan
        if v.untyped_storage().data_ptr() != q.untyped_storage().data_ptr():
            # A view of the fused QKV buffer would keep it alive though q and k have been rotated elsewhere.
            v = v.contiguous()
        ctx.save_for_backward(q, k, v)
        if plan is None:
            return _forward(q, k, v, options)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for bucket in plan:
            bucket.put(_forward(bucket.take(q), bucket.take(k), bucket.take(v), options), out)
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        if ctx.plan is None:
            return (*_backward(do, q, k, v, ctx.options), None, None)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for bucket in ctx.plan:
            # No gradient comes from padding, because it is no output.
            do_rows, q_rows, k_rows, v_rows = (bucket.take(x, zero=x is do) for x in (do, q, k, v))
            for rectangle, grad in zip(_backward(do_rows, q_rows, k_rows, v_rows, ctx.options), grads):
                bucket.put(rectangle, grad)
        return (*grads, None, None)


class FlashAttention(torch.autograd.Function):
    """As ``BlockedAttention``, where ``has_flash``: the output and each query head's log-sum-exp are kept, and of
    packed documents both lie packed too. No gradient depends on another rectangle or on the number of threads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, plan: tuple[Bucket, ...] | None) -> Tensor:
        ctx.options, ctx.plan = options, plan
        if v.untyped_storage().data_ptr() != q.untyped_storage().data_ptr():
            v = v.contiguous()  # as in BlockedAttention
        if plan is None:
            out, lse = _flash(q, k, v, options)
        else:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            lse = torch.empty(*q.shape[:2], 1, dtype=wide_dtype(q.dtype), device=q.device)
            for bucket in plan:
                found = _flash(bucket.take(q), bucket.take(k), bucket.take(v), options)
                for rectangle, x in zip(found, (out, lse)):
                    bucket.put(rectangle, x)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if ctx.plan is None:
            return (*_flash_backward(do, [q, k, v, out, lse], ctx.options), None, None)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        for bucket in ctx.plan:
            do_rows, *rows = (bucket.take(x, zero=x is do) for x in (do, q, k, v, out, lse))
            for rectangle, grad in zip(_flash_backward(do_rows, rows, ctx.options), grads):
                bucket.put(rectangle, grad)
        return (*grads, None, None)


def _flash(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """q (n, T, Hq, D), k and v (n, T, Hkv, D) -> out like q, and the log-sum-exp of its scores (n, T, Hq, 1)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_by_head(q, k, v), 0.0, options.causal, scale=options.scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2).unsqueeze(3)


def _flash_backward(do: Tensor, rows: list[Tensor], options: Options) -> list[Tensor]:
    """do like the output, and ``rows``: the inputs and outputs of ``_flash`` -> dq, dk, dv."""
    *inputs, lse = rows
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_by_head(do, *inputs), lse.squeeze(3).transpose(1, 2), 0.0, options.causal, scale=options.scale
    )
    return [x.transpose(1, 2) for x in grads]


def _by_head(*tensors: Tensor) -> list[Tensor]:
    """Each (n, T, H, D) as (n, H, T, D), whose last dimension is contiguous, as torch's kernel takes for granted."""
    return [(x if x.stride(3) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


def has_flash(dtype: torch.dtype, device: torch.device, window: int | None, softcap: float | None) -> bool:
    """Whether torch's flash attention computes such attention of a square of queries and keys on ``device``.

    In 16 bits it is several times slower than ours on a CPU without instructions for them.
    """
    return device.type == "cpu" and window is None and softcap is None and multiplies(dtype)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, options: Options, plan: tuple[Bucket, ...] | None) -> Tensor:
    """q (B, T, Hq, D), k and v (B, S, Hkv, D) -> (B, T, Hq, D). With a plan all are packed, without their B."""
    if plan is not None and len(plan) == 1 and plan[0].gather is None:
        take = plan[0].take
        return torch_attention(take(q), take(k), take(v), options, None).flatten(0, 1)
    flash = has_flash(q.dtype, q.device, options.window, options.softcap)
    if flash and q.numel() and (plan is not None or q.shape[1] == k.shape[1]):
        return FlashAttention.apply(q, k, v, options, plan)
    return BlockedAttention.apply(q, k, v, options, plan)
