"""Rotary position embedding in the half layout (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Of each head the first D_rot = 2 h dimensions turn, in pairs (i, i + h), by the angle of the token's position:
    y1 = x1 cos - x2 sin       y2 = x2 cos + x1 sin       the other D - D_rot dimensions are copied
A rotation's transpose turns back, so the backward pass is the same function with -sin; only cos and sin are saved.
Products are fp32 (fp64 for fp64 input), rounded once. Bytes moved: each of q and k read once and written once.

With weights, each head is first RMS-normalised over its D dimensions (the QK-norm of Qwen3 and Gemma 3; formulas in
norm.py). Triton does both in the same pass over q and k, and backward in one pass over q, k and their gradients (half
as many bytes as norm and rotation one after the other): q and k are saved, and their statistics computed again. The
value between the two steps stays fp32 there, where two separate ops round it to q's type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afina.kernels.backend import check_floating, check_shape, choose, wide_dtype
from afina.kernels.launch import config, jit, launch, power_of_two, tl
from afina.kernels.norm import rms_norm
from afina.kernels.norm_triton import programs


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        h = cos.shape[-1]
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        x1, x2, rest = x[..., :h], x[..., h : 2 * h], x[..., 2 * h :]
        return torch.cat([(x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), rest], dim=-1)

    return turn(q), turn(k)


@jit
def _load(x, stride, head, heads, half, width, HALF: tl.constexpr, REST: tl.constexpr):
    """Both halves of heads (HEADS, 1) that lie `stride` apart, and the dimensions that do not turn, in fp32."""
    at = x + head.to(tl.int64) * stride
    first = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (first < half)
    x1 = tl.load(at + first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + half + first, mask=inside, other=0.0).to(tl.float32)
    if REST:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        x3 = tl.load(at + rest, mask=(head < heads) & (rest < width), other=0.0).to(tl.float32)
    else:
        x3 = tl.zeros((1, 1), tl.float32)
    return x1, x2, x3


@jit
def _store(x, head, heads, half, width, x1, x2, x3, HALF: tl.constexpr, REST: tl.constexpr):
    at = x + head * width
    first = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (first < half)
    tl.store(at + first, x1.to(x.dtype.element_ty), mask=inside)
    tl.store(at + half + first, x2.to(x.dtype.element_ty), mask=inside)
    if REST:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        tl.store(at + rest, x3.to(x.dtype.element_ty), mask=(head < heads) & (rest < width))


@jit
def _load_weight(weight, half, width, offset, HALF: tl.constexpr, REST: tl.constexpr):
    w1, w2, w3 = _load(weight, 0, tl.zeros((1, 1), tl.int32), 1, half, width, HALF, REST)
    return w1 + offset, w2 + offset, w3 + offset


@jit
def _zeros(HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr):
    half = tl.zeros((HEADS, HALF), tl.float32)
    return half, half, tl.zeros((HEADS, REST if REST else 1), tl.float32)


@jit
def _mean(a1, b1, a2, b2, a3, b3, width):
    """The mean over each head of a * b."""
    return (tl.sum(a1 * b1, 1) + tl.sum(a2 * b2, 1) + tl.sum(a3 * b3, 1))[:, None] / width


@jit
def _rope_heads(
    x, out, stride, heads, cos, sin, weight, half, width, eps, offset,
    HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The heads of one token, HEADS at a time."""
    if weight is not None:
        w1, w2, w3 = _load_weight(weight, half, width, offset, HALF, REST)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        x1, x2, x3 = _load(x, stride, head, heads, half, width, HALF, REST)
        if weight is not None:
            rstd = tl.rsqrt(_mean(x1, x1, x2, x2, x3, x3, width) + eps)
            x1 = x1 * rstd * w1
            x2 = x2 * rstd * w2
            x3 = x3 * rstd * w3
        _store(out, head, heads, half, width, x1 * cos - x2 * sin, x2 * cos + x1 * sin, x3, HALF, REST)


@jit
def _load_angles(cos, sin, at, half, HALF: tl.constexpr):
    column = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + at + column, mask=column < half, other=0.0)
    return c, tl.load(sin + at + column, mask=column < half, other=0.0)


@jit(do_not_specialize=["length"])
def _rope_forward(
    q, k, q_out, k_out, cos, sin, q_weight, k_weight, q_batch, q_token, q_head, k_batch, k_token, k_head, angle_batch,
    length, q_heads, k_heads, half, width, sign, eps, offset,
    HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token: all its heads of q and k. sign -1 turns back."""
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    place = token - batch * length
    c, s = _load_angles(cos, sin, batch * angle_batch + place * half, half, HALF)
    s *= sign
    _rope_heads(
        q + batch * q_batch + place * q_token, q_out + token * q_heads * width, q_head, q_heads, c, s, q_weight,
        half, width, eps, offset, HALF, REST, HEADS,
    )  # fmt: skip
    _rope_heads(
        k + batch * k_batch + place * k_token, k_out + token * k_heads * width, k_head, k_heads, c, s, k_weight,
        half, width, eps, offset, HALF, REST, HEADS,
    )  # fmt: skip


@jit
def _heads_backward(
    dy, x, dx, dy_stride, stride, heads, cos, sin, w1, w2, w3, sum1, sum2, sum3, half, width, eps,
    HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dx of the heads of one token; their weight gradients are added to the three sums (HEADS, ...)."""
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        d1, d2, d3 = _load(dy, dy_stride, head, heads, half, width, HALF, REST)
        n1, n2, n3 = _load(x, stride, head, heads, half, width, HALF, REST)
        rstd = tl.rsqrt(_mean(n1, n1, n2, n2, n3, n3, width) + eps)
        rstd = tl.where(head < heads, rstd, 0.0)  # no infinity where eps is 0
        n1 *= rstd
        n2 *= rstd
        n3 *= rstd
        g1 = d1 * cos + d2 * sin
        g2 = d2 * cos - d1 * sin
        sum1 += g1 * n1
        sum2 += g2 * n2
        sum3 += d3 * n3
        g1 *= w1
        g2 *= w2
        g3 = d3 * w3
        mean = _mean(g1, n1, g2, n2, g3, n3, width)
        x1 = rstd * (g1 - n1 * mean)
        x2 = rstd * (g2 - n2 * mean)
        _store(dx, head, heads, half, width, x1, x2, rstd * (g3 - n3 * mean), HALF, REST)
    return sum1, sum2, sum3


@jit
def _store_sums(out, half, width, sum1, sum2, sum3, HALF: tl.constexpr, REST: tl.constexpr):
    x1 = tl.sum(sum1, 0)[None, :]
    x2 = tl.sum(sum2, 0)[None, :]
    x3 = tl.sum(sum3, 0)[None, :]
    _store(out, tl.zeros((1, 1), tl.int32), 1, half, width, x1, x2, x3, HALF, REST)


@jit(do_not_specialize=["tokens", "length"])
def _rope_norm_backward(
    dq, dk, q, k, q_grad, k_grad, sums, cos, sin, q_weight, k_weight, dq_batch, dq_token, dq_head, dk_batch, dk_token,
    dk_head, q_batch, q_token, q_head, k_batch, k_token, k_head, angle_batch, tokens, length, q_heads, k_heads, half,
    width, eps, offset, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A share of the tokens: dq, dk, and their weight gradients, this program's of sums (programs, 2, D), if wanted."""
    q1, q2, q3 = _load_weight(q_weight, half, width, offset, HALF, REST)
    k1, k2, k3 = _load_weight(k_weight, half, width, offset, HALF, REST)
    q_sum1, q_sum2, q_sum3 = _zeros(HALF, REST, HEADS)
    k_sum1, k_sum2, k_sum3 = _zeros(HALF, REST, HEADS)
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        batch = (index // length).to(tl.int64)
        place = index - batch * length
        token = batch * length + place
        c, s = _load_angles(cos, sin, batch * angle_batch + place * half, half, HALF)
        q_sum1, q_sum2, q_sum3 = _heads_backward(
            dq + batch * dq_batch + place * dq_token, q + batch * q_batch + place * q_token,
            q_grad + token * q_heads * width, dq_head, q_head, q_heads, c, s, q1, q2, q3, q_sum1, q_sum2, q_sum3,
            half, width, eps, HALF, REST, HEADS,
        )  # fmt: skip
        k_sum1, k_sum2, k_sum3 = _heads_backward(
            dk + batch * dk_batch + place * dk_token, k + batch * k_batch + place * k_token,
            k_grad + token * k_heads * width, dk_head, k_head, k_heads, c, s, k1, k2, k3, k_sum1, k_sum2, k_sum3,
            half, width, eps, HALF, REST, HEADS,
        )  # fmt: skip
    if sums is not None:
        out = sums + tl.program_id(0) * 2 * width
        _store_sums(out, half, width, q_sum1, q_sum2, q_sum3, HALF, REST)
        _store_sums(out + width, half, width, k_sum1, k_sum2, k_sum3, HALF, REST)


def _tokens(x: Tensor) -> Tensor:
    """x (..., T, H, D) as (B, T, H, D) with contiguous heads, copied only where its strides allow no such view."""
    x = x if x.dim() == 4 else x.reshape(x.shape[:-3].numel(), *x.shape[-3:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, cos: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """What all kernels take: angle_batch, length, q_heads, k_heads, half, width; and the sizes of tiles."""
    half, width = cos.shape[-1], q.shape[-1]
    tile = {"HALF": power_of_two(half), "REST": power_of_two(width - 2 * half) if width > 2 * half else 0}
    return (cos.stride(0), q.shape[1], q.shape[2], k.shape[2], half, width), tile


def _options(kernel: str, tile: dict[str, int], q: Tensor, k: Tensor) -> dict[str, Any]:
    """HEADS: as many as fill a tile, but no more than there are."""
    options = dict(config(kernel, q.device, size=q.shape[-1]))
    room = options.pop("TILE") // (2 * tile["HALF"] + tile["REST"])
    heads = power_of_two(max(q.shape[2], k.shape[2]))
    return options | tile | {"HEADS": min(heads, power_of_two(room + 1) // 2 or 1)}


class _TritonRope(torch.autograd.Function):
    """q, k, cos, sin, weights -> q, k; cos and sin (B, T, h), contiguous but for what the batch shares (stride 0)."""

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
        return _launch_forward(q, k, cos, sin, q_weight, k_weight, 1.0, eps, offset, shapes)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *saved = ctx.saved_tensors
        shapes, dq, dk = (dq.shape, dk.shape), _tokens(dq), _tokens(dk)
        needed = ctx.needs_input_grad
        dweights: list[Tensor | None] = [None, None]
        if not saved:
            q_grad, k_grad = _launch_forward(dq, dk, cos, sin, None, None, -1.0, 0.0, 0.0, shapes)
        else:
            q, k, *weights = saved
            q_grad, k_grad = (torch.empty(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, (q, k)))
            sizes, tile = _sizes(q, k, cos)
            shares, sums = q.shape[0] * q.shape[1], None
            if needed[4] or needed[5]:
                shares = min(shares, programs(q.device))
                sums = torch.empty(shares, 2, q.shape[-1], dtype=torch.float32, device=q.device)
            strides = (*dq.stride()[:3], *dk.stride()[:3], *q.stride()[:3], *k.stride()[:3])
            launch(
                _rope_norm_backward, (shares,), dq, dk, q, k, q_grad, k_grad, sums, cos, sin, *weights, *strides,
                sizes[0], q.shape[0] * q.shape[1], *sizes[1:], ctx.eps, ctx.offset,
                **_options("rope_norm_backward", tile, q, k),
            )  # fmt: skip
            if sums is not None:
                whole = sums.sum(0)
                dweights = [part.to(w.dtype) if need else None for part, w, need in zip(whole, weights, needed[4:])]
        return q_grad if needed[0] else None, k_grad if needed[1] else None, None, None, *dweights, None, None


def _launch_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, sign: float,
    eps: float, offset: float, shapes: tuple[torch.Size, torch.Size],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_out, k_out = (torch.empty(s, dtype=x.dtype, device=x.device) for s, x in zip(shapes, (q, k)))
    sizes, tile = _sizes(q, k, cos)
    launch(
        _rope_forward, (q.shape[0] * q.shape[1],), q, k, q_out, k_out, cos, sin, q_weight, k_weight, *q.stride()[:3],
        *k.stride()[:3], *sizes, sign, eps, offset, **_options("rope", tile, q, k),
    )  # fmt: skip
    return q_out, k_out


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """cos (..., T, 1, D): 1 where nothing turns; sin (..., T, 1, h)."""
    h = sin.shape[-1]
    # One product over whole heads and two over halves: fewer short loops than four over halves.
    out = torch.mul(x, cos, out=torch.empty(x.shape, dtype=cos.dtype, device=x.device))
    out[..., :h].addcmul_(x[..., h : 2 * h], sin, value=-sign)
    out[..., h : 2 * h].addcmul_(x[..., :h], sin, value=sign)
    return out.to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, cos, sin, 1.0), _turn(k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        cos, sin = ctx.saved_tensors
        return (
            _turn(dq, cos, sin, -1.0) if ctx.needs_input_grad[0] else None,
            _turn(dk, cos, sin, -1.0) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q (..., T, Hq, D) and k (..., T, Hkv, D) by cos and sin (..., T, D_rot / 2); returns new q and k.

    cos and sin are fp32 (fp64 with fp64 q), without gradient, and broadcast over the leading dimensions. q and k may
    have any strides (views of a fused QKV buffer); the results are contiguous. With q_weight and k_weight (D,) each
    head is RMS-normalised first, with `eps` and `weight_offset` as in `rms_norm`.
    Raises ValueError for shapes that do not fit, D_rot > D, a wrong dtype or backend.
    """
    _check(q, k, cos, sin, q_weight, k_weight)
    wide = wide_dtype(q.dtype)
    if choose("rope", backend, q) == "triton" and q.numel() and k.numel():
        lead, table = q.shape[:-3], cos.shape[-2:]
        cos, sin = (x.contiguous().expand(*lead, *table).reshape(lead.numel(), *table) for x in (cos, sin))
        return _TritonRope.apply(q, k, cos, sin, q_weight, k_weight, eps, weight_offset)
    if q_weight is not None and k_weight is not None:
        q = rms_norm(q, q_weight, eps=eps, weight_offset=weight_offset, backend="torch")
        k = rms_norm(k, k_weight, eps=eps, weight_offset=weight_offset, backend="torch")
    ones = cos.new_ones(1).expand(*cos.shape[:-1], q.shape[-1] - 2 * cos.shape[-1])
    cos = torch.cat([cos, cos, ones], dim=-1).unsqueeze(-2).to(wide)
    return _Rope.apply(q, k, cos, sin.unsqueeze(-2).to(wide))


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    if cos.dim() < 2:
        raise ValueError(f"cos: expected (..., T, D_rot / 2), found {tuple(cos.shape)}")
    for name, x in (("q", q), ("k", k)):
        check_floating(name, x)
        if x.dim() < 3 or x.shape[-3] != cos.shape[-2] or x.shape[-1] < 2 * cos.shape[-1]:
            raise ValueError(
                f"{name}: expected (..., T, H, D) with T = {cos.shape[-2]} and D >= {2 * cos.shape[-1]} to fit cos "
                f"{tuple(cos.shape)}, found {tuple(x.shape)}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected q's head dimension {q.shape[-1]}, found {k.shape[-1]}")
    lead = q.shape[:-3]
    if k.shape[:-3] != lead:
        raise ValueError(f"k: expected q's leading dimensions {tuple(lead)}, found {tuple(k.shape[:-3])}")
    if len(cos.shape[:-2]) > len(lead) or any(a not in (1, b) for a, b in zip(cos.shape[-3::-1], lead[::-1])):
        raise ValueError(
            f"cos: expected leading dimensions that broadcast to q's {tuple(lead)}, found {tuple(cos.shape)}"
        )
    if cos.shape != sin.shape:
        raise ValueError(f"sin: expected cos's shape {tuple(cos.shape)}, found {tuple(sin.shape)}")
    wide = wide_dtype(q.dtype)
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in (torch.float32, wide):
            raise ValueError(f"{name}: expected torch.float32, found {x.dtype}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{'q' if q_weight is None else 'k'}_weight: expected with the other, found None")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(name, weight, q.shape[-1:])
    for name, other in (("k", k), ("cos", cos), ("sin", sin), ("q_weight", q_weight), ("k_weight", k_weight)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name}: expected on q's device {q.device}, found on {other.device}")
