"""Rotary embedding in Triton: the kernels and their launches; the formulas stand in `rope.py`.

Forward, a program takes one token with all its heads of q and k. So does a program backward, except with QK-norm, where
a fixed number of programs walk their shares of the tokens: each of them writes its own sum of the weight gradients, and
those sums are summed. Therefore the gradients are the same bits each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.launch import config, jit, launch, power_of_two, tl
from afina.kernels.norm_triton import programs


class View(NamedTuple):
    """Heads (batch, T, H, D) and how far apart they lie; the D elements of a head lie side by side."""

    ptr: Any
    stride_batch: int
    stride_token: int
    stride_head: int


class Angles(NamedTuple):
    """cos and sin (batch, T, h), contiguous except that stride_batch is 0 where the batch shares them."""

    cos: Any
    sin: Any
    stride_batch: int


class Norm(NamedTuple):
    """The RMS normalisation of heads; the weights (D,) are None where heads are not normalised."""

    q_weight: Any
    k_weight: Any
    eps: float
    offset: float


class Sizes(NamedTuple):
    """How many heads a token has, and their dimensions: `half` pairs turn, of `width` dimensions in all."""

    q_heads: int
    k_heads: int
    half: int
    width: int


class Tile(NamedTuple):
    """What a program takes at once; HALF and REST are powers of two that hold the sizes."""

    HALF: int
    REST: int  # 0 where every dimension turns
    HEADS: int


class Parts(NamedTuple):
    """Heads in the three parts that the rotation tells apart."""

    first: Any  # (HEADS, HALF): the first element of each pair
    second: Any  # (HEADS, HALF): the second element of each pair
    rest: Any  # (HEADS, REST): what does not turn; zeros (1, 1) where there is no such part


@jit
def _load(x, stride, head, heads, sizes, tile: tl.constexpr):
    """Load heads (HEADS, 1), which lie `stride` apart, as fp32 Parts; heads that are not there are 0."""
    row = x + head.to(tl.int64) * stride
    pair = tl.arange(0, tile.HALF)[None, :]
    inside = (head < heads) & (pair < sizes.half)
    first = tl.load(row + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + sizes.half + pair, mask=inside, other=0.0).to(tl.float32)
    if tile.REST:
        column = 2 * sizes.half + tl.arange(0, tile.REST)[None, :]
        rest = tl.load(row + column, mask=(head < heads) & (column < sizes.width), other=0.0).to(tl.float32)
    else:
        rest = tl.zeros((1, 1), tl.float32)
    return Parts(first, second, rest)


@jit
def _store(x, head, heads, parts, sizes, tile: tl.constexpr):
    """Store Parts as heads that lie side by side, in the pointer's type."""
    row = x + head * sizes.width
    pair = tl.arange(0, tile.HALF)[None, :]
    inside = (head < heads) & (pair < sizes.half)
    tl.store(row + pair, parts.first.to(x.dtype.element_ty), mask=inside)
    tl.store(row + sizes.half + pair, parts.second.to(x.dtype.element_ty), mask=inside)
    if tile.REST:
        column = 2 * sizes.half + tl.arange(0, tile.REST)[None, :]
        tl.store(row + column, parts.rest.to(x.dtype.element_ty), mask=(head < heads) & (column < sizes.width))


@jit
def _load_weight(weight, offset, sizes, tile: tl.constexpr):
    """Load weight + offset as the Parts of one head."""
    w = _load(weight, 0, tl.zeros((1, 1), tl.int32), 1, sizes, tile)
    return Parts(w.first + offset, w.second + offset, w.rest + offset)


@jit
def _zeros(tile: tl.constexpr):
    HEADS: tl.constexpr = tile.HEADS
    HALF: tl.constexpr = tile.HALF
    REST: tl.constexpr = tile.REST if tile.REST else 1
    half = tl.zeros((HEADS, HALF), tl.float32)
    return Parts(half, half, tl.zeros((HEADS, REST), tl.float32))


@jit
def _mean(a, b, width):
    """Compute the mean of a * b over each head."""
    total = tl.sum(a.first * b.first, 1) + tl.sum(a.second * b.second, 1) + tl.sum(a.rest * b.rest, 1)
    return total[:, None] / width


@jit
def _load_angles(angles, batch, place, half, tile: tl.constexpr):
    """Load cos and sin (1, HALF) of one token."""
    pair = tl.arange(0, tile.HALF)[None, :]
    at = batch * angles.stride_batch + place * half + pair
    return tl.load(angles.cos + at, mask=pair < half, other=0.0), tl.load(angles.sin + at, mask=pair < half, other=0.0)


@jit
def _token(view, batch, place):
    """Point at the heads of one token."""
    return view.ptr + batch * view.stride_batch + place * view.stride_token


@jit
def _rope_heads(x, out, stride, heads, cos, sin, weight, norm, sizes, tile: tl.constexpr):
    """Normalise and turn the heads of one token, HEADS at a time; `weight` is None where they are not normalised."""
    if weight is not None:
        w = _load_weight(weight, norm.offset, sizes, tile)
    for start in range(0, heads, tile.HEADS):
        # Load.
        head = start + tl.arange(0, tile.HEADS)[:, None]
        n = _load(x, stride, head, heads, sizes, tile)
        # Normalise.
        if weight is not None:
            rstd = tl.rsqrt(_mean(n, n, sizes.width) + norm.eps)
            n = Parts(n.first * rstd * w.first, n.second * rstd * w.second, n.rest * rstd * w.rest)
        # Turn and store.
        turned = Parts(n.first * cos - n.second * sin, n.second * cos + n.first * sin, n.rest)
        _store(out, head, heads, turned, sizes, tile)


@jit(do_not_specialize=["length"])
def _rope_forward(q, k, q_out, k_out, angles, norm, length, sizes, sign, tile: tl.constexpr):
    """Compute all heads of one token of q and k, which are Views; with sign -1, turn them back.

    `length`, T, stays an argument of its own, because `do_not_specialize` does not reach into tuples: there, each kind
    of length would be compiled anew.
    """
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    place = token - batch * length
    cos, sin = _load_angles(angles, batch, place, sizes.half, tile)
    sin *= sign
    out = q_out + token * sizes.q_heads * sizes.width
    heads = sizes.q_heads
    _rope_heads(_token(q, batch, place), out, q.stride_head, heads, cos, sin, norm.q_weight, norm, sizes, tile)
    out = k_out + token * sizes.k_heads * sizes.width
    heads = sizes.k_heads
    _rope_heads(_token(k, batch, place), out, k.stride_head, heads, cos, sin, norm.k_weight, norm, sizes, tile)


@jit
def _heads_backward(
    dy, x, dx, dy_stride, x_stride, heads, cos, sin, weight, sums, eps, sizes, tile: tl.constexpr
):  # fmt: skip
    """Compute dx of the heads of one token; returns the sums (HEADS, ...) with their weight gradients added."""
    for start in range(0, heads, tile.HEADS):
        # Load.
        head = start + tl.arange(0, tile.HEADS)[:, None]
        d = _load(dy, dy_stride, head, heads, sizes, tile)
        n = _load(x, x_stride, head, heads, sizes, tile)
        # Normalise again. A head that is not there has rstd 0, where an eps of 0 would give infinity.
        rstd = tl.rsqrt(_mean(n, n, sizes.width) + eps)
        rstd = tl.where(head < heads, rstd, 0.0)
        n = Parts(n.first * rstd, n.second * rstd, n.rest * rstd)
        # Turn the gradient back.
        g = Parts(d.first * cos + d.second * sin, d.second * cos - d.first * sin, d.rest)
        # Add to the weight gradients.
        sums = Parts(
            sums.first + g.first * n.first, sums.second + g.second * n.second, sums.rest + g.rest * n.rest
        )  # fmt: skip
        # Compute dx by the formula of norm.py, and store it.
        g = Parts(g.first * weight.first, g.second * weight.second, g.rest * weight.rest)
        mean = _mean(g, n, sizes.width)
        grad = Parts(
            rstd * (g.first - n.first * mean), rstd * (g.second - n.second * mean), rstd * (g.rest - n.rest * mean)
        )  # fmt: skip
        _store(dx, head, heads, grad, sizes, tile)
    return sums


@jit
def _store_sums(out, sums, sizes, tile: tl.constexpr):
    """Store the sums of a program over its heads, fp32 (D,)."""
    total = Parts(
        tl.sum(sums.first, 0)[None, :], tl.sum(sums.second, 0)[None, :], tl.sum(sums.rest, 0)[None, :]
    )  # fmt: skip
    _store(out, tl.zeros((1, 1), tl.int32), 1, total, sizes, tile)


@jit(do_not_specialize=["tokens", "length"])
def _rope_norm_backward(
    dq, dk, q, k, q_grad, k_grad, sums, angles, norm, tokens, length, sizes, tile: tl.constexpr
):  # fmt: skip
    """Compute q_grad and k_grad of a share of the tokens, and this program's part of sums (programs, 2, D).

    dq, dk, q and k are Views; sums hold the weight gradients of q and of k, and are None where they are not wanted.
    """
    q_weight = _load_weight(norm.q_weight, norm.offset, sizes, tile)
    k_weight = _load_weight(norm.k_weight, norm.offset, sizes, tile)
    q_sums = _zeros(tile)
    k_sums = _zeros(tile)
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        batch = (index // length).to(tl.int64)
        place = index - batch * length
        token = batch * length + place
        cos, sin = _load_angles(angles, batch, place, sizes.half, tile)
        q_sums = _heads_backward(
            _token(dq, batch, place), _token(q, batch, place), q_grad + token * sizes.q_heads * sizes.width,
            dq.stride_head, q.stride_head, sizes.q_heads, cos, sin, q_weight, q_sums, norm.eps, sizes, tile,
        )  # fmt: skip
        k_sums = _heads_backward(
            _token(dk, batch, place), _token(k, batch, place), k_grad + token * sizes.k_heads * sizes.width,
            dk.stride_head, k.stride_head, sizes.k_heads, cos, sin, k_weight, k_sums, norm.eps, sizes, tile,
        )  # fmt: skip
    if sums is not None:
        out = sums + tl.program_id(0) * 2 * sizes.width
        _store_sums(out, q_sums, sizes, tile)
        _store_sums(out + sizes.width, k_sums, sizes, tile)


def _tokens(x: Tensor) -> Tensor:
    """Return x (..., T, H, D) as (B, T, H, D) with contiguous heads, copied only where no view of it is so."""
    x = x if x.dim() == 4 else x.reshape(x.shape[:-3].numel(), *x.shape[-3:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor) -> View:
    return View(x, *x.stride()[:3])


def _tile(kernel: str, sizes: Sizes, device: torch.device) -> tuple[Tile, dict[str, Any]]:
    """Return the tile, with as many heads as fill it but no more than there are, and the other launch options."""
    options = dict(config(kernel, device, size=sizes.width))
    rest = sizes.width - 2 * sizes.half
    half, rest = power_of_two(sizes.half), power_of_two(rest) if rest else 0
    room = options.pop("TILE") // (2 * half + rest)
    heads = power_of_two(max(sizes.q_heads, sizes.k_heads))
    return Tile(half, rest, min(heads, power_of_two(room + 1) // 2 or 1)), options


class TritonRope(torch.autograd.Function):
    """q, k, cos, sin, weights -> q, k; cos and sin (B, T, h) are contiguous except where the batch shares them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
        eps: float, offset: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shapes, q, k = (q.shape, k.shape), _tokens(q), _tokens(k)
        if q_weight is not None and k_weight is not None:
            q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
            ctx.save_for_backward(cos, sin, q, k, q_weight, k_weight)
        else:
            ctx.save_for_backward(cos, sin)
        ctx.eps, ctx.offset = eps, offset
        return _turn(q, k, cos, sin, Norm(q_weight, k_weight, eps, offset), 1.0, shapes)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *saved = ctx.saved_tensors
        shapes, dq, dk = (dq.shape, dk.shape), _tokens(dq), _tokens(dk)
        needed = ctx.needs_input_grad
        dweights: list[Tensor | None] = [None, None]
        if not saved:
            q_grad, k_grad = _turn(dq, dk, cos, sin, Norm(None, None, 0.0, 0.0), -1.0, shapes)
        else:
            q, k, q_weight, k_weight = saved
            q_grad, k_grad = (torch.empty(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, (q, k)))
            tokens, sums = q.shape[0] * q.shape[1], None
            shares = tokens
            sizes = Sizes(q.shape[2], k.shape[2], cos.shape[-1], q.shape[-1])
            tile, options = _tile("rope_norm_backward", sizes, q.device)
            most = programs(options, q.device)
            if needed[4] or needed[5]:
                shares = min(shares, most)
                sums = torch.empty(shares, 2, q.shape[-1], dtype=torch.float32, device=q.device)
            launch(
                _rope_norm_backward, (shares,), _view(dq), _view(dk), _view(q), _view(k), q_grad, k_grad, sums,
                Angles(cos, sin, cos.stride(0)), Norm(q_weight, k_weight, ctx.eps, ctx.offset), tokens, q.shape[1],
                sizes, tile=tile, **options,
            )  # fmt: skip
            if sums is not None:
                whole = sums.sum(0)
                dweights = [
                    part.to(w.dtype) if need else None for part, w, need in zip(whole, (q_weight, k_weight), needed[4:])
                ]
        return q_grad if needed[0] else None, k_grad if needed[1] else None, None, None, *dweights, None, None


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Norm, sign: float, shapes: tuple[torch.Size, torch.Size]
) -> tuple[Tensor, Tensor]:
    """Normalise and turn q and k (B, T, H, D) into new contiguous tensors of these shapes."""
    q_out, k_out = (torch.empty(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, (q, k)))
    sizes = Sizes(q.shape[2], k.shape[2], cos.shape[-1], q.shape[-1])
    tile, options = _tile("rope", sizes, q.device)
    launch(
        _rope_forward, (q.shape[0] * q.shape[1],), _view(q), _view(k), q_out, k_out, Angles(cos, sin, cos.stride(0)),
        norm, q.shape[1], sizes, sign, tile=tile, **options,
    )  # fmt: skip
    return q_out, k_out
