"""Rotary embedding on the torch path: what runs on CPUs and in float64; the formulas stand in `rope.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Turn x by cos (..., T, 1, D), which is 1 where nothing turns, and sign * sin (..., T, 1, h)."""
    h = sin.shape[-1]
    # One product over whole heads and two over halves make fewer short loops than four products over halves.
    out = torch.mul(x, cos, out=torch.empty(x.shape, dtype=cos.dtype, device=x.device))
    out[..., :h].addcmul_(x[..., h : 2 * h], sin, value=-sign)
    out[..., h : 2 * h].addcmul_(x[..., :h], sin, value=sign)
    return out.to(x.dtype)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, cos (..., T, 1, D), sin (..., T, 1, h) -> q, k, turned."""
    return _turn(q, cos, sin, 1.0), _turn(k, cos, sin, 1.0)


class TorchRope(torch.autograd.Function):
    """q, k, cos, sin -> q, k; cos (..., T, 1, D) and sin (..., T, 1, h) have the dtype of the products."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turn(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        cos, sin = ctx.saved_tensors
        return (
            _turn(dq, cos, sin, -1.0) if ctx.needs_input_grad[0] else None,
            _turn(dk, cos, sin, -1.0) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )
