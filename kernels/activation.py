"""SwiGLU and GeGLU over the fused buffer [gate | up] (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    y = act(gate) * up       act(g) = g sigmoid(w(g)); silu: w = g, gelu (tanh): w = sqrt(8 / pi) (g + 0.044715 g^3)
    dgate = dy * up * act'(gate)       dup = dy * act(gate)       act'(g) = s + g s (1 - s) w'(g), s = sigmoid(w(g))
Saved: gate_up only (2 I values a row); act(gate) is computed again in the backward pass. Bytes moved for N rows of
2-byte values: forward 6 N I, backward 10 N I; products are fp32, rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import as_rows, check_floating, choose, lean
from afina.kernels.launch import cdiv, config, jit, launch, tl
from afina.kernels.saved import Saved


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class View(NamedTuple):
    """A matrix whose rows are contiguous: its pointer, and how far apart the rows lie, in elements."""

    ptr: Any
    stride: int


@jit
def _sigmoid(g, GELU: tl.constexpr):
    """Compute s = sigmoid(w(g)) and its slope s (1 - s) w'(g), both without a difference that would lose digits."""
    w = g
    slope = 1.0
    if GELU:
        w = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * g * g)
    e = tl.exp(-tl.abs(w))  # It is at most 1, so nothing overflows.
    inverse = 1.0 / (1.0 + e)
    return tl.where(w < 0, e, 1.0) * inverse, e * inverse * inverse * slope


@jit
def _glu_forward(gate_up, y, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Compute a block of columns of one row: gate_up is a View (N, 2 I), y (N, I) is contiguous."""
    # Load.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_row = gate_up.ptr + row * gate_up.stride
    gate = tl.load(gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + width + column, mask=inside, other=0.0).to(tl.float32)
    # Activate and store.
    s, _ = _sigmoid(gate, GELU)
    tl.store(y + row * width + column, (gate * s * up).to(y.dtype.element_ty), mask=inside)


@jit
def _glu_backward(dy, gate_up, grad, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the gradient of a block of columns of one row: dy (N, I) and gate_up (N, 2 I) are Views, grad (N, 2 I) is
    contiguous."""
    # Load.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_row = gate_up.ptr + row * gate_up.stride
    upstream = tl.load(dy.ptr + row * dy.stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + width + column, mask=inside, other=0.0).to(tl.float32)
    # Compute the activation and its slope again.
    s, slope = _sigmoid(gate, GELU)
    dgate = upstream * up * (s + gate * slope)
    # Store.
    out = grad + row * 2 * width + column
    tl.store(out, dgate.to(grad.dtype.element_ty), mask=inside)
    tl.store(out + width, (upstream * gate * s).to(grad.dtype.element_ty), mask=inside)


class _TritonGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        rows = as_rows(gate_up)
        width = gate_up.shape[-1] // 2
        y = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
        options = config("glu", gate_up.device)
        grid = (rows.shape[0], cdiv(width, options["BLOCK"]))
        launch(_glu_forward, grid, View(rows, rows.stride(0)), y, width, GELU=gelu, **options)
        ctx.save_for_backward(rows)
        ctx.gelu = gelu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        width = dy.shape[-1]
        grad = torch.empty((*dy.shape[:-1], 2 * width), dtype=rows.dtype, device=rows.device)
        dy = as_rows(dy)
        options = config("glu", dy.device)
        grid = (rows.shape[0], cdiv(width, options["BLOCK"]))
        views = View(dy, dy.stride(0)), View(rows, rows.stride(0))
        launch(_glu_backward, grid, *views, grad, width, GELU=ctx.gelu, **options)
        return grad, None


class _TorchGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        return _torch_glu(gate_up, gelu)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        dgate, dup = grad.chunk(2, dim=-1)
        _activate(gate, dup, ctx.gelu).mul_(dy)
        dactivated = dy * up
        if ctx.gelu:
            torch.ops.aten.gelu_backward.grad_input(dactivated, gate, approximate="tanh", grad_input=dgate)
        else:
            torch.ops.aten.silu_backward.grad_input(dactivated, gate, grad_input=dgate)
        return grad, None


def _torch_glu(gate_up: Tensor, gelu: bool) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return _activate(gate, out, gelu).mul_(up)


def _activate(gate: Tensor, out: Tensor, gelu: bool) -> Tensor:
    if gelu:
        return torch.ops.aten.gelu.out(gate, approximate="tanh", out=out)
    return torch.ops.aten.silu.out(gate, out=out)


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up: gate_up (..., 2 I) = [gate | up] -> (..., I). Any strides; ValueError for an odd width."""
    return _glu(gate_up, False, backend)


def geglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu(gate) * up with the tanh approximation: gate_up (..., 2 I) = [gate | up] -> (..., I)."""
    return _glu(gate_up, True, backend)


def saved() -> Saved:
    """What `swiglu` and `geglu` keep on either backend: their input, from which the activation is computed again."""
    return Saved(("gate_up",))


def _glu(gate_up: Tensor, gelu: bool, backend: str | None) -> Tensor:
    if lean.on:
        width = gate_up.shape[-1] // 2
        gate, up = gate_up.narrow(-1, 0, width), gate_up.narrow(-1, width, width)
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)).mul_(up)
    check_floating("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected (..., 2 I), found {tuple(gate_up.shape)}")
    function = _TritonGLU if choose("glu", backend, gate_up) == "triton" else _TorchGLU
    return function.apply(gate_up, gelu)
