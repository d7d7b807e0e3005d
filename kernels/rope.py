"""Rotary position embedding in the half layout (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Of each head the first D_rot = 2 h dimensions turn, in pairs (i, i + h), by the angle of the token's position:
    y1 = x1 cos - x2 sin       y2 = x2 cos + x1 sin       the other D - D_rot dimensions are copied
A rotation's transpose turns back, so the backward pass is the same function with -sin; only cos and sin are saved.
Products are fp32 (fp64 for fp64 input), rounded once. Bytes moved: each of q and k read once and written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afina.kernels.backend import check_floating, choose


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        h = cos.shape[-1]
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        x1, x2, rest = x[..., :h], x[..., h : 2 * h], x[..., 2 * h :]
        return torch.cat([(x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), rest], dim=-1)

    return turn(q), turn(k)


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


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rotate q (..., T, Hq, D) and k (..., T, Hkv, D) by cos and sin (..., T, D_rot / 2); returns new q and k.

    cos and sin are fp32 (fp64 with fp64 q), without gradient, and broadcast over the leading dimensions. q and k may
    have any strides (views of a fused QKV buffer); the results are contiguous.
    Raises ValueError for shapes that do not fit, D_rot > D, a wrong dtype or backend.
    """
    choose("rope", backend, q)
    for name, x in (("q", q), ("k", k)):
        check_floating(name, x)
        if x.dim() < 3 or x.shape[-3] != cos.shape[-2] or x.shape[-1] < 2 * cos.shape[-1]:
            raise ValueError(
                f"{name}: expected (..., T, H, D) with T = {cos.shape[-2]} and D >= {2 * cos.shape[-1]} to fit cos "
                f"{tuple(cos.shape)}, found {tuple(x.shape)}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected q's head dimension {q.shape[-1]}, found {k.shape[-1]}")
    if cos.shape != sin.shape:
        raise ValueError(f"sin: expected cos's shape {tuple(cos.shape)}, found {tuple(sin.shape)}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in (torch.float32, wide):
            raise ValueError(f"{name}: expected torch.float32, found {x.dtype}")
    ones = cos.new_ones(1).expand(*cos.shape[:-1], q.shape[-1] - 2 * cos.shape[-1])
    cos = torch.cat([cos, cos, ones], dim=-1).unsqueeze(-2).to(wide)
    return _Rope.apply(q, k, cos, sin.unsqueeze(-2).to(wide))
