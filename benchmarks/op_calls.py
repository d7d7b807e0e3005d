"""A call of each public function of the kernels for each row of the launch table, on small CPU tensors.

The compile gate makes these calls while launches are recorded instead of run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # noqa: F401  # before the kernels: they take the compiler only where something will use it
from torch import Tensor

from afina.kernels import activation, adamw, attention, blockwise, cross_entropy, decode, launch, nf4, norm, rope


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def backward(*outs: Tensor) -> None:
    torch.autograd.backward(list(outs), [torch.ones_like(out) for out in outs])


def glu(size: int, dtype: torch.dtype) -> None:
    for function in (activation.swiglu, activation.geglu):
        backward(function(leaf(16, 256, dtype=dtype), backend="triton"))


def norms(size: int, dtype: torch.dtype) -> None:
    width = min(size, 50_000)  # the last row of the table is for rows longer than any tile
    x, residual, weight = leaf(4, width, dtype=dtype), leaf(4, width, dtype=dtype), leaf(width, dtype=dtype)
    heads = leaf(2, 3, 5, 128, dtype=dtype)[:, :, :3]  # short rows, unevenly apart
    backward(norm.rms_norm(heads, leaf(128, dtype=torch.float32), backend="triton"))
    backward(*norm.rms_norm(x, weight, residual=residual, backend="triton"))
    backward(norm.rms_norm(x, weight.detach(), backend="triton"))
    backward(norm.layer_norm(x, weight, backend="triton"))
    backward(*norm.layer_norm(x, weight, weight, residual=residual, backend="triton"))


def ropes(size: int, dtype: torch.dtype) -> None:
    for dim, half in ((128, 64), (256, 32), (512, 256)):  # the whole head, a part of it, the longest heads
        heads = leaf(2, 4, 48, dim, dtype=dtype)
        angles = torch.zeros(4, half)
        arguments = heads[:, :, :32], heads[:, :, 32:40], angles, angles
        backward(*rope.rope(*arguments, backend="triton"))
        for weight in (leaf(dim, dtype=dtype), torch.zeros(dim)):
            backward(*rope.rope(*arguments, q_weight=weight, k_weight=weight, backend="triton"))


def decode_attention(size: int, dtype: torch.dtype) -> None:
    dim = max(size, 16)
    options: dict[str, Any]
    for rows, options in ((1, {}), (300, {"softcap": 30.0, "window": 1000})):  # keys split, and not
        cache = torch.zeros(rows, 512, 2, dim, dtype=dtype)
        q, lengths = torch.zeros(rows, 8, dim, dtype=dtype), torch.zeros(rows, dtype=torch.int32)
        decode.decode_attention(q, cache, cache, lengths, backend="triton", **options)


def attentions(size: int, dtype: torch.dtype) -> None:
    """Packed, as in training, for each row; at 128 and 256 also with every option, and without the causal mask."""
    launch.config("attention_backend", torch.device("cpu"), dtype=dtype, size=size)
    if size == 0:  # rows for heads of any size
        return
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    q, k = leaf(256, 8, size, dtype=dtype), leaf(256, 2, size, dtype=dtype)
    backward(attention.attention(q, k, k, cu_seqlens=offsets, backend="triton"))
    if size in (128, 256) and dtype == torch.bfloat16:
        backward(attention.attention(q, k, k, cu_seqlens=offsets, window=100, softcap=30.0, backend="triton"))
        q, k = (x[None] for x in (q, k))
        backward(attention.attention(q, k, k, causal=False, backend="triton"))


def cross_entropies(size: int, dtype: torch.dtype) -> None:
    targets = torch.zeros(64, dtype=torch.int64)
    targets[:3] = -100
    every: dict[str, Any] = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    hidden, weight, bias = leaf(64, 128, dtype=dtype), leaf(1024, 128, dtype=dtype), leaf(1024, dtype=dtype)
    for reduction, options in (("mean", {}), ("none", every | {"bias": bias})):
        arguments = {"reduction": reduction, "backend": "triton"} | options
        for lean in (False, True):
            backward(cross_entropy.linear_cross_entropy(hidden, weight, targets, lean=lean, **arguments))
        arguments.pop("bias", None)
        backward(cross_entropy.cross_entropy(leaf(64, 1024, dtype=dtype), targets, **arguments))
        backward(cross_entropy.cross_entropy(leaf(64, 1023, dtype=dtype), targets, **arguments))


def adamw_steps(size: int, dtype: torch.dtype) -> None:
    """fp32 parameters with a bf16 copy; bf16 parameters, rounded stochastically, with bf16 and with 8-bit moments; and
    each with step and rate on the device, as a CUDA graph has them."""
    options: dict[str, Any] = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    x, master = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(64, 256)
    skip = torch.zeros((), dtype=torch.bool)
    m, v = (blockwise.State8.zeros_like(x, signed=signed) for signed in (True, False))
    on_device = {"step": torch.tensor(1), "lr": torch.tensor(1e-3, dtype=torch.float64)}
    for clock in ({}, on_device):
        every = options | clock
        adamw.adamw_([master], [x], [master], [master], copies=[x], skip=skip, backend="triton", **every)
        adamw.adamw_([x], [x], [x], [x], seed=0, skip=skip if clock else None, backend="triton", **every)
        adamw.adamw_([x], [x], [m], [v], seed=0, skip=skip, backend="triton", **every)


def dequantize(size: int, dtype: torch.dtype) -> None:
    for double_quant in (True, False):
        weight = torch.ones(64, 256, dtype=dtype)
        packed, state = nf4.quantize_nf4(weight, blocksize=size, double_quant=double_quant)
        nf4.dequantize_nf4(packed, state, backend="triton")


# Op -> (the kernels of the launch table that it covers, a call of it with the row's size and dtype).
OPS: dict[str, tuple[tuple[str, ...], Callable[[int, torch.dtype], None]]] = {
    "attention": (
        ("attention_forward", "attention_dkdv", "attention_dq", "attention_delta", "attention_backend"),
        attentions,
    ),
    "rope": (("rope", "rope_norm_backward"), ropes),
    "norm": (("norm_forward", "norm_backward"), norms),
    "glu": (("glu",), glu),
    "cross_entropy": (("cross_entropy", "cross_entropy_scale"), cross_entropies),
    "decode_attention": (("decode", "decode_combine"), decode_attention),
    "adamw": (("adamw",), adamw_steps),
    "nf4": (("nf4",), dequantize),
}
