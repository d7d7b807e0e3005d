"""A linear layer whose products are of 8-bit floats, with a scale for each row: y = x W^T + b.

Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433): values and weights in e4m3 (4 bits of exponent, 3 of
mantissa, largest 448), gradients in e5m2 (largest 57,344), whose range is wider. A row of a matrix is divided by a
power of two, so that its largest magnitude fits, and rounded to nearest; the scales themselves round nothing:

    q(A)_ij = round8(A_ij / s_i)      s_i = 2^ceil(log2(max_j |A_ij| / largest))

    y  = q(x) q(W)^T * s_x s_W^T + b          x (M, K), W (N, K): rows of x, rows of W
    dx = q(dy) q(W^T)^T * s_dy s_W^T          rows of dy, and rows of W^T, so W is rounded once more, by columns
    dW = dy^T x                               in x's dtype, as in torchao's recipe "rowwise_with_gw_hp": of the three
                                              it needs precision most, since it is a sum over all tokens

So two of three products run at FP8's rate, twice that of bf16. What is kept for the backward pass is what a bf16 layer
keeps, x. Beside that a product takes one byte for each number of its factors, and one copy of the factor that is being
rounded in its own dtype.

On GPUs from capability 8.9 on `torch._scaled_mm` makes the products; elsewhere they are emulated: the same rounded
factors, multiplied in fp32. The two differ by the order of their sums (and by what the tensor cores keep of them: about
14 bits in the forward pass, which asks for their fast way).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from afina.kernels.backend import as_rows, check_floating, check_like, check_shape

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {VALUES: 448.0, GRADIENTS: 57344.0}
MULTIPLE = 16  # of which both sizes of a weight must be, for the tensor cores
BACKENDS = ("scaled_mm", "emulated")


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round x (R, C) to ``dtype``, e4m3 or e5m2; return the rounded (R, C), contiguous, and the scales, fp32 (R, 1).

    A row of zeros has scale 1. A row that is not finite becomes NaN, or has an infinite scale: its product is NaN.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).float()
    mantissa, exponent = torch.frexp(largest / LARGEST[dtype])  # mantissa in [0.5, 1), and 0 for 0
    scale = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny).where(mantissa != 0, 1.0)
    scale = scale.where(largest.isfinite(), largest)
    return (x / scale.to(x.dtype)).to(dtype).contiguous(), scale


def product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: torch.dtype, backend: str, *, fast: bool
) -> Tensor:
    """A B^T (M, N) in ``out`` of quantised rows A (M, K) and B (N, K); ``fast`` lets tensor cores sum in fewer bits."""
    (left, left_scale), (right, right_scale) = a, b
    if backend == "scaled_mm":
        found = torch._scaled_mm(
            left, right.t(), left_scale, right_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        )
        return found.to(out)
    return ((left.float() @ right.float().t()) * left_scale * right_scale.t()).to(out)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.biased = backend, bias is not None
        rows = as_rows(x)
        y = product(quantize_rows(rows, VALUES), quantize_rows(weight, VALUES), x.dtype, backend, fast=True)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = as_rows(dy)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            factors = quantize_rows(rows, GRADIENTS), quantize_rows(weight.t(), VALUES)
            dx = product(*factors, x.dtype, ctx.backend, fast=False).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = rows.t() @ as_rows(x)
        if ctx.biased and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Compute the formulas above: x (..., K), weight (N, K) and bias (N,) of x's dtype -> (..., N) of that dtype.

    ``backend``: "scaled_mm", "emulated", or None for what the device can (see ``unavailable``). Raises ValueError for
    shapes, dtypes and devices that do not fit, for sizes that are no multiples of 16, and for another backend.
    """
    check_floating("x", x)
    check_like("weight", weight, "x", x)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: expected (N, {x.shape[-1] if x.dim() else 'K'}), found {tuple(weight.shape)}")
    if bias is not None:
        check_like("bias", bias, "x", x)
        check_shape("bias", bias, weight.shape[:1])
    if not fits(weight):
        raise ValueError(f"weight: expected sizes that are multiples of {MULTIPLE}, found {tuple(weight.shape)}")
    if backend is None:
        backend = "emulated" if unavailable(x.device) else "scaled_mm"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    return _FP8Linear.apply(x, weight, bias, backend)


def fits(weight: Tensor) -> bool:
    """Whether the sizes of a weight are what the tensor cores take."""
    return all(size % MULTIPLE == 0 for size in weight.shape)


@cache
def unavailable(device: torch.device) -> str | None:
    """Why a device has no products of this kind; None where it has, tried once against the emulation."""
    if device.type != "cuda":
        return f"a {device.type} has no FP8 products"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"this GPU has no FP8 products (its capability is {major}.{minor}, they begin at 8.9)"
    for first in (VALUES, GRADIENTS):
        a, b = (torch.randn(32, 64, device=device).to(torch.bfloat16) for _ in range(2))
        factors = quantize_rows(a, first), quantize_rows(b, VALUES)
        want = product(*factors, torch.float32, "emulated", fast=False)
        try:
            found = product(*factors, torch.float32, "scaled_mm", fast=first is VALUES)
        except (RuntimeError, TypeError) as error:
            return f"torch's FP8 product failed on this GPU ({str(error).splitlines()[0][:80]})"
        if not torch.allclose(found, want, rtol=2**-6, atol=2**-6):
            return "torch's FP8 product is wrong on this GPU"
    return None
