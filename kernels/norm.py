"""RMSNorm and LayerNorm, each with the residual add in front of it.

RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), a row x of C values, w' = weight_offset + weight:
    rstd = (mean(x^2) + eps)^-1/2          y = x * rstd * w'
Given dy, with t = dy * x (both reductions of the backward pass are matrix-vector products with it):
    dw = sum over rows of rstd * t         dx = rstd * dy * w' - x * rstd^3 / C * (t . w')
Saved: x and rstd (one number a row); the normalised row is never stored. Statistics and products are fp32 (fp64 for
fp64 input) and rounded once at the end. LayerNorm (https://arxiv.org/abs/1607.06450) is torch's own fused op.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import check_floating, check_shape, choose


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0) -> Tensor:
    wide = x.to(_wide(x.dtype))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    wide = x.to(_wide(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    """(x, weight) -> y, or with a residual (x, weight, residual) -> (y, x + residual)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float) -> Any:
        total = x if residual is None else x + residual
        rows = total.reshape(-1, x.shape[-1])
        wide = rows.to(_wide(x.dtype))
        scale = _scale(weight, offset, wide.dtype)
        mean_square = torch.linalg.vector_norm(wide, dim=1).square_().div_(max(1, rows.shape[1]))
        rstd = mean_square.add_(eps).rsqrt_()
        y = (wide * rstd.unsqueeze(1)).mul_(scale).to(x.dtype).view(x.shape)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        return y if residual is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> Any:
        total, weight, rstd = ctx.saved_tensors
        width = total.shape[-1]
        x = total.reshape(-1, width).to(rstd.dtype)
        dy = dy.reshape(-1, width).to(rstd.dtype)
        scale = _scale(weight, ctx.offset, rstd.dtype)
        t = dy * x
        dweight = torch.mv(t.t(), rstd).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            slope = torch.mv(t, scale).mul_(rstd.pow(3)).div_(-max(1, width))
            torch.mul(dy, scale, out=t).mul_(rstd.unsqueeze(1)).addcmul_(x, slope.unsqueeze(1))
            if dtotal is not None:
                t.add_(dtotal.reshape(-1, width))
            dx = t.to(total.dtype).view(total.shape)
        return dx, dweight, dx if ctx.needs_input_grad[2] else None, None, None


def _scale(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    wide = weight.to(dtype)
    return wide + offset if offset else wide


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = ..., weight_offset: float = ..., residual: None = None,
    backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = ..., weight_offset: float = ..., residual: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension: x (..., C), weight (C,) -> y like x. Any strides.

    Statistics are fp32 whatever the dtype. `weight_offset` is added to the weight (1.0 for Gemma). With `residual`
    (like x) the sum x + residual is normalised, and (y, x + residual) returned.
    Raises ValueError for a wrong shape, dtype or backend.
    """
    choose("rms_norm", backend, x)
    _check(x, weight, None, residual)
    return _RMSNorm.apply(x, weight, residual, eps, weight_offset)


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = ..., residual: None = None,
    backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = ..., residual: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension: x (..., C), weight and bias (C,) -> y like x; residual as in `rms_norm`."""
    choose("layer_norm", backend, x)
    _check(x, weight, bias, residual)
    total = x if residual is None else x + residual
    y = F.layer_norm(total, (x.shape[-1],), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
    return y if residual is None else (y, total)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension (..., C)")
    check_shape("weight", weight, x.shape[-1:])
    if bias is not None:
        check_shape("bias", bias, x.shape[-1:])
    if residual is not None:
        check_shape("residual", residual, x.shape)
        if residual.dtype != x.dtype:
            raise ValueError(f"residual: expected x's dtype {x.dtype}, found {residual.dtype}")
