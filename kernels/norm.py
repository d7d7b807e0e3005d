"""RMSNorm and LayerNorm, each with the residual add in front of it.

RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) of a row x of C values, w' = weight_offset + weight:
    rstd = (mean(x^2) + eps)^-1/2          n = x * rstd          y = n * w'
Given dy, with g = dy * w':
    dx = rstd * (g - n * mean(g * n))      dw = sum over rows of dy * n
LayerNorm (https://arxiv.org/abs/1607.06450) takes mean(x) from x first, mean(g) from g in dx, and has db = sum of dy.
A row is a matrix row here: x (..., C) is N rows. In a decoder's layer x is the branch, what the last sublayer has made,
and `residual` is the stream that the branch is added to; the sum goes on as the stream, and its norm into the next
sublayer.
Saved are x (with a residual the sum, which is returned anyway), rstd and for LayerNorm mean, one number a row each; n
is computed again. Statistics and products are fp32 (fp64 for fp64 input) and rounded once at the end. The Triton path,
whose kernels are in `norm_triton.py`, moves for N rows of 2-byte values 4 N C bytes forward, with a residual 8 N C; and
6 N C backward, 8 N C with the gradient of the sum.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import check_floating, check_shape, choose, lean, wide_dtype
from afina.kernels.norm_triton import Affine, Statistics, launch_backward, launch_forward
from afina.kernels.saved import Saved


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0) -> Tensor:
    """Compute RMSNorm by the formula above, written plainly; the arguments are those of `rms_norm`."""
    wide = x.to(wide_dtype(x.dtype))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Compute LayerNorm by the formula above, written plainly; the arguments are those of `layer_norm`."""
    wide = x.to(wide_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


class _TritonNorm(torch.autograd.Function):
    """Either norm in Triton: x, weight, bias -> y, or with a residual -> (y, x + residual)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, offset: float,
        layer: bool,
    ) -> Any:  # fmt: skip
        affine = Affine(weight.contiguous(), None if bias is None else bias.contiguous(), offset)
        y, total, rows, stats = launch_forward(x, residual, affine, eps, layer)
        ctx.save_for_backward(rows if total is None else total, affine.weight, *stats)
        ctx.inner, ctx.offset, ctx.bias_dtype = rows.shape[1], offset, None if bias is None else bias.dtype
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        needed, affine = ctx.needs_input_grad, Affine(weight, None, ctx.offset)
        dx, *sums = launch_backward(dy, dtotal, x, ctx.inner, affine, Statistics(mean, rstd), needed[1:3])
        dtypes = (weight.dtype, ctx.bias_dtype)
        dweight, dbias = (None if part is None else part.to(dtype) for part, dtype in zip(sums, dtypes))
        return dx if needed[0] else None, dweight, dbias, dx if needed[3] else None, None, None, None


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in torch: x, weight -> y, or with a residual -> (y, x + residual). Of LayerNorm torch has its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float) -> Any:
        total = x if residual is None else x + residual
        y, rstd = _rms(total, weight, eps, offset)
        ctx.save_for_backward(total, weight, rstd.flatten())
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


def _rms(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x (..., C) -> y like x, and the rstd (..., 1) of its rows."""
    if x.dtype == weight.dtype == torch.float32:
        wide, scale = x, weight + offset if offset else weight
    else:
        wide = x.to(wide_dtype(x.dtype))
        scale = _scale(weight, offset, wide.dtype)
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(max(1, x.shape[-1]))
    rstd = mean_square.add_(eps).rsqrt_()
    return (wide * rstd).mul_(scale).to(x.dtype), rstd


def _scale(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """Return w' in the given dtype."""
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
    """Normalise x (..., C) over its last dimension by RMSNorm, with weight (C,); y is like x.

    x may have any strides, and weight a dtype of its own. Statistics are fp32 (fp64 for fp64 input). `weight_offset` is
    added to the weight (1.0 for Gemma). With `residual`, shaped and typed like x, the sum x + residual is normalised,
    and (y, x + residual) is returned. Raises ValueError for a wrong shape, dtype, device or backend.
    """
    if lean.on:
        total = x if residual is None else x + residual
        y, _ = _rms(total, weight, eps, weight_offset)
        return y if residual is None else (y, total)
    _check(x, weight, None, residual)
    if choose("rms_norm", backend, x) == "triton" and x.numel():
        return _TritonNorm.apply(x, weight, None, residual, eps, weight_offset, False)
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
    """Normalise x (..., C) over its last dimension by LayerNorm, with weight and bias (C,); y is like x.

    Everything else is as in `rms_norm`.
    """
    if lean.on:
        total = x if residual is None else x + residual
        y = F.layer_norm(total, (x.shape[-1],), weight, bias, eps)
        return y if residual is None else (y, total)
    _check(x, weight, bias, residual)
    if choose("layer_norm", backend, x) == "triton" and x.numel():
        return _TritonNorm.apply(x, weight, bias, residual, eps, 0.0, True)
    total = x if residual is None else x + residual
    y = F.layer_norm(total, (x.shape[-1],), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
    return y if residual is None else (y, total)


def saved(dtype: torch.dtype, backend: str, *, layer: bool) -> Saved:
    """What a norm keeps of each row: x, or with a residual the sum; the rstd, and for LayerNorm the mean.

    torch's own LayerNorm keeps them in the dtype of x (on a GPU in fp32, which is not counted).
    """
    if layer:
        return Saved(("x",), 2 * (wide_dtype(dtype) if backend == "triton" else dtype).itemsize)
    return Saved(("x",), wide_dtype(dtype).itemsize)


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
    for name, other in (("weight", weight), ("bias", bias), ("residual", residual)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected on x's device {x.device}, found on {other.device}")
