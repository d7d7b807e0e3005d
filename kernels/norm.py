"""RMSNorm and LayerNorm, each with the residual add in front of it.

RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), a row x of C values, w' = weight_offset + weight:
    rstd = (mean(x^2) + eps)^-1/2          n = x * rstd          y = n * w'
Given dy, with g = dy * w':
    dx = rstd * (g - n * mean(g * n))      dw = sum over rows of dy * n
LayerNorm (https://arxiv.org/abs/1607.06450) takes mean(x) from x first, mean(g) from g in dx, and has db = sum of dy.
Saved: x (with a residual the sum, which is returned anyway) and rstd, mean (one number a row); n is computed again.
Statistics and products are fp32 (fp64 for fp64 input) and rounded once at the end. Bytes moved for N rows of 2-byte
values: forward 4 N C, with a residual 8 N C; backward 6 N C, 8 N C with the gradient of the sum.

Weight gradients are summed in two steps, so that they are the same bits each time: a fixed number of programs walk
their shares of the rows and write one fp32 row each, and those rows are summed. A row too long for the registers of one
program (over 16,384 columns forward, 8,192 backward) is cut into blocks of columns, after a pass for the means over it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import check_floating, check_shape, choose, wide_dtype
from afina.kernels.launch import cdiv, config, jit, launch, power_of_two, tl


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0) -> Tensor:
    wide = x.to(wide_dtype(x.dtype))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    wide = x.to(wide_dtype(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


@jit
def _place(row, inner, outer_stride, inner_stride):
    """Where a row of (N / inner, inner, C) starts."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


@jit
def _load_sum(x, residual, at, residual_at, inside):
    """x + residual in fp32, rounded as it is returned: what the backward pass will find."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + residual_at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    return value


@jit
def _norm_statistics(
    x, residual, mean, rstd, inner, x_outer, x_inner, residual_outer, residual_inner, width, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean (None: RMSNorm) and rstd of one row longer than a tile."""
    row = tl.program_id(0)
    x_row = _place(row, inner, x_outer, x_inner)
    residual_row = _place(row, inner, residual_outer, residual_inner)
    average = 0.0
    squares = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = _load_sum(x, residual, x_row + column, residual_row + column, inside)
        if mean is not None:
            # Chan, Golub and LeVeque 1979: two parts' means and squared deviations give the whole's.
            count = tl.minimum(width - start, BLOCK)
            step = tl.sum(value) / count - average
            value = tl.where(inside, value - average - step, 0.0)
            squares += step * step * start * (count / (start + count))
            average += step * (count / (start + count))
        squares += tl.sum(value * value)
    tl.store(rstd + row, tl.rsqrt(squares / width + eps))
    if mean is not None:
        tl.store(mean + row, average)


@jit(do_not_specialize=["rows"])
def _norm_forward(
    x, residual, weight, bias, y, total, mean, rstd, rows, inner, x_outer, x_inner, residual_outer, residual_inner,
    width, eps, offset, SPLIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows; with SPLIT one block of their columns, given their statistics."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    x_at = _place(row, inner, x_outer, x_inner) + column
    value = _load_sum(x, residual, x_at, _place(row, inner, residual_outer, residual_inner) + column, inside)
    out = row.to(tl.int64) * width + column
    if total is not None:
        tl.store(total + out, value.to(total.dtype.element_ty), mask=inside)
    if mean is not None:
        if SPLIT:
            average = tl.load(mean + row, mask=row < rows, other=0.0)
        else:
            average = tl.sum(value, 1)[:, None] / width
            tl.store(mean + row, average, mask=row < rows)
        value = tl.where(inside, value - average, 0.0)
    if SPLIT:
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
    else:
        scale = tl.rsqrt(tl.sum(value * value, 1)[:, None] / width + eps)
        tl.store(rstd + row, scale, mask=row < rows)
    result = value * scale * (tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset)
    if bias is not None:
        result += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + out, result.to(y.dtype.element_ty), mask=inside)


@jit
def _load_terms(dy, x, mean, rstd, dy_at, x_at, row, rows, inside):
    """dy, the normalised row again, and rstd; zeros outside."""
    upstream = tl.load(dy + dy_at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)
    if mean is not None:
        value = tl.where(inside, value - tl.load(mean + row, mask=row < rows, other=0.0), 0.0)
    return upstream, value * scale, scale


@jit
def _norm_means(
    dy, x, weight, mean, rstd, means, inner, dy_outer, dy_inner, x_outer, x_inner, width, offset, BLOCK: tl.constexpr,
):  # fmt: skip
    """means (N, 2): mean(g * n) and mean(g) of one row longer than a tile."""
    row = tl.program_id(0)
    dy_row = _place(row, inner, dy_outer, dy_inner)
    x_row = _place(row, inner, x_outer, x_inner)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        upstream, normal, _ = _load_terms(dy, x, mean, rstd, dy_row + column, x_row + column, row, row + 1, inside)
        g = upstream * (tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset)
        first += g * normal
        second += g
    tl.store(means + row.to(tl.int64) * 2, tl.sum(first) / width)
    tl.store(means + row.to(tl.int64) * 2 + 1, tl.sum(second) / width)


@jit(do_not_specialize=["rows"])
def _norm_backward(
    dy, dtotal, x, weight, mean, rstd, means, dx, dweight, dbias, rows, inner, dy_outer, dy_inner, dtotal_outer,
    dtotal_inner, x_outer, x_inner, width, offset, SPLIT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A share of the rows, ROWS at a time: dx, and this program's row of dweight and dbias (programs, C), if wanted."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < width)
        dy_at = _place(row, inner, dy_outer, dy_inner) + column
        x_at = _place(row, inner, x_outer, x_inner) + column
        upstream, normal, inverse = _load_terms(dy, x, mean, rstd, dy_at, x_at, row, rows, inside)
        g = upstream * scale
        weight_sum += upstream * normal
        bias_sum += upstream
        if SPLIT:
            grad = g - normal * tl.load(means + row.to(tl.int64) * 2, mask=row < rows, other=0.0)
        else:
            grad = g - normal * (tl.sum(g * normal, 1)[:, None] / width)
        if mean is not None:
            if SPLIT:
                grad -= tl.load(means + row.to(tl.int64) * 2 + 1, mask=row < rows, other=0.0)
            else:
                grad -= tl.sum(g, 1)[:, None] / width
        grad *= inverse
        if dtotal is not None:
            at = _place(row, inner, dtotal_outer, dtotal_inner) + column
            grad += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row.to(tl.int64) * width + column, grad.to(dx.dtype.element_ty), mask=inside)
    out = tl.program_id(0).to(tl.int64) * width + column
    if dweight is not None:
        tl.store(dweight + out, tl.sum(weight_sum, 0)[None, :], mask=column < width)
    if dbias is not None:
        tl.store(dbias + out, tl.sum(bias_sum, 0)[None, :], mask=column < width)


@lru_cache
def programs(device: torch.device) -> int:
    """How many programs share the work of a backward pass that sums weight gradients: set by the device alone."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _tile(kernel: str, device: torch.device, width: int) -> tuple[int, int, dict[str, Any]]:
    """The columns and the rows of a tile, and the other options of the launch."""
    options = dict(config(kernel, device, size=width))
    tile = options.pop("TILE")
    block = min(power_of_two(width), tile)
    return block, tile // block, options


def _inner(x: Tensor) -> int:
    """1 where the rows of x (..., C) may lie evenly apart, else how many do before a jump: heads of a QKV buffer."""
    return 1 if x.dim() < 3 or x.stride(-3) == x.shape[-2] * x.stride(-2) else x.shape[-2]


def _rows(x: Tensor, inner: int) -> Tensor:
    """x (..., C) as (N / inner, inner, C) with contiguous rows, copied only where its strides allow no such view."""
    rows = x.reshape(-1, inner, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


class _TritonNorm(torch.autograd.Function):
    """RMSNorm, or LayerNorm: x, weight, bias -> y, or with a residual -> (y, x + residual)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, offset: float,
        layer: bool,
    ) -> Any:  # fmt: skip
        width, inner = x.shape[-1], _inner(x)
        rows = _rows(x, inner)
        added = None if residual is None else _rows(residual, inner)
        strides = (*_strides(rows), *_strides(added))
        weight, shift = weight.contiguous(), None if bias is None else bias.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = None if residual is None else torch.empty_like(y)
        count = rows.shape[0] * inner
        rstd = torch.empty(count, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if layer else None
        block, height, options = _tile("norm_forward", x.device, width)
        if block < width:
            launch(
                _norm_statistics, (count,), rows, added, mean, rstd, inner, *strides, width, eps, BLOCK=block, **options
            )
        launch(
            _norm_forward, (cdiv(count, height), cdiv(width, block)), rows, added, weight, shift, y, total, mean, rstd,
            count, inner, *strides, width, eps, offset, SPLIT=block < width, BLOCK=block, ROWS=height, **options,
        )  # fmt: skip
        ctx.save_for_backward(rows if total is None else total, weight, mean, rstd)
        ctx.inner, ctx.offset, ctx.bias_dtype = inner, offset, None if bias is None else bias.dtype
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        width, inner, count = dy.shape[-1], ctx.inner, rstd.numel()
        dx = torch.empty(dy.shape, dtype=x.dtype, device=x.device)
        x, dy = _rows(x, inner), _rows(dy, inner)
        more = None if dtotal is None else _rows(dtotal, inner)
        strides = (*_strides(dy), *_strides(more), *_strides(x))
        block, height, options = _tile("norm_backward", x.device, width)
        means = None
        if block < width:
            means = torch.empty(count, 2, dtype=torch.float32, device=x.device)
            launch(
                _norm_means, (count,), dy, x, weight, mean, rstd, means, inner, *_strides(dy), *_strides(x), width,
                ctx.offset, BLOCK=block, **options,
            )  # fmt: skip
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        shares = min(cdiv(count, height), programs(x.device)) if any(wanted) else cdiv(count, height)
        parts = [torch.empty(shares, width, dtype=torch.float32, device=x.device) if want else None for want in wanted]
        launch(
            _norm_backward, (shares, cdiv(width, block)), dy, more, x, weight, mean, rstd, means, dx, *parts, count,
            inner, *strides, width, ctx.offset, SPLIT=block < width, BLOCK=block, ROWS=height, **options,
        )  # fmt: skip
        dtypes = (weight.dtype, ctx.bias_dtype)
        dweight, dbias = (None if part is None else part.sum(0).to(dtype) for part, dtype in zip(parts, dtypes))
        needed = ctx.needs_input_grad
        return dx if needed[0] else None, dweight, dbias, dx if needed[3] else None, None, None, None


class _RMSNorm(torch.autograd.Function):
    """(x, weight) -> y, or with a residual (x, weight, residual) -> (y, x + residual)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float) -> Any:
        total = x if residual is None else x + residual
        rows = total.reshape(-1, x.shape[-1])
        wide = rows.to(wide_dtype(x.dtype))
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
    """LayerNorm over the last dimension: x (..., C), weight and bias (C,) -> y like x; residual as in `rms_norm`."""
    _check(x, weight, bias, residual)
    if choose("layer_norm", backend, x) == "triton" and x.numel():
        return _TritonNorm.apply(x, weight, bias, residual, eps, 0.0, True)
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
    for name, other in (("weight", weight), ("bias", bias), ("residual", residual)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected on x's device {x.device}, found on {other.device}")
