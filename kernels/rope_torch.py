"""Rotary embedding on the torch path: what runs on CPUs and in float64; the formulas stand in `rope.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from afina.kernels.backend import wide_dtype


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Turn x by cos (..., T, 1, D), which is 1 where nothing turns, and sign * sin (..., T, 1, h)."""
    h = sin.shape[-1]
    # One product over whole heads and two over halves make fewer short loops than four products over halves.
    out = torch.mul(x, cos, out=torch.empty(x.shape, dtype=cos.dtype, device=x.device))
    out[..., :h].addcmul_(x[..., h : 2 * h], sin, value=-sign)
    out[..., h : 2 * h].addcmul_(x[..., :h], sin, value=sign)
    return out.to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Few tokens, without gradient: x (..., T, H, D), cos and sin as ``rope`` takes them -> x, turned.

    As many calls as need be: they, and not the numbers, take the time. Angles are laid out once for all layers.
    """
    if cos not in _layouts:
        wide = wide_dtype(x.dtype)
        both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        _layouts[cos] = tuple(angles.unsqueeze(-2).to(wide) for angles in both)
    whole, signed = _layouts[cos]
    width = whole.shape[-1]
    part = x if x.shape[-1] == width else x[..., :width]
    out = torch.mul(part, whole).addcmul_(torch.roll(part, width // 2, -1), signed)
    if x.shape[-1] > width:
        out = torch.cat((out, x[..., width:]), -1)
    return out.to(x.dtype)


_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of cos: [cos, cos] and [-sin, sin] (..., 1, 2 h)


class TorchRope(torch.autograd.Function):
    """q, k, cos, sin -> q, k; cos (..., T, 1, D) and sin (..., T, 1, h) have the dtype of the products."""

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
