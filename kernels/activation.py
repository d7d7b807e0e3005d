"""SwiGLU and GeGLU over the fused buffer [gate | up] (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    y = act(gate) * up       act = silu: g sigmoid(g), or gelu in its tanh approximation
    dgate = dy * up * act'(gate)       dup = dy * act(gate)
Saved: gate_up only (2 I values a row); act(gate) is computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.backend import check_floating, choose


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        return _activate(gate, out, gelu).mul_(up)

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


def _glu(gate_up: Tensor, gelu: bool, backend: str | None) -> Tensor:
    choose(backend, gate_up)
    check_floating("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected (..., 2 I), found {tuple(gate_up.shape)}")
    return _GLU.apply(gate_up, gelu)
