"""Which implementation of an op runs, and the checks that all ops share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from afina.kernels.launch import runnable

BACKENDS = ("triton", "torch")
# What the Triton kernels compute in; other types, such as float64, run on torch.
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def requested(backend: str | None, device: torch.device) -> str | None:
    """The backend that the argument names, else AFINA_BACKEND, else None.

    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    name = backend or os.environ.get("AFINA_BACKEND")
    if not name or name == "torch":
        return name or None
    source = "backend" if backend else "AFINA_BACKEND"
    if name != "triton":
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, found {name!r}")
    if not runnable(device):
        raise ValueError(
            f"{source}: 'triton' needs a GPU, found a tensor on {device}; use 'torch', or set TRITON_INTERPRET=1 "
            "in the environment to run the kernels in Triton's interpreter"
        )
    return name


class _Lean(threading.local):
    on = False


lean = _Lean()


@contextmanager
def trusted() -> Iterator[None]:
    """In this context, of this thread, ops compute on torch without a gradient and do not check their arguments: for
    steps whose arguments a model makes, of which the checks would take a third of the time."""
    before, lean.on = lean.on, True
    try:
        with torch.no_grad():
            yield
    finally:
        lean.on = before


# (op, index of a GPU) -> whether the op's Triton kernels passed their self-test there: written by `selftest.verify`.
verified: dict[tuple[str, int | None], bool] = {}


def choose(op: str, backend: str | None, tensor: Tensor) -> str:
    """The backend for `op` on `tensor`: the argument, else AFINA_BACKEND, else Triton on a GPU and torch elsewhere.

    Left to itself it takes torch on a GPU where the op has failed its self-test. Loading a model on a GPU runs the
    self-tests (`selftest.verify`); who calls the kernels alone may do so too, and gets Triton unverified otherwise.
    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    name = requested(backend, tensor.device)
    if name is None:
        if not tensor.is_cuda or not runnable(tensor.device) or tensor.dtype not in TRITON_DTYPES:
            return "torch"
        return "triton" if verified.get((op, tensor.device.index), True) else "torch"
    if name == "torch" or tensor.dtype in TRITON_DTYPES:
        return name
    if backend is None:
        return "torch"
    raise ValueError(f"backend: 'triton' computes in float32, float16 or bfloat16, found {tensor.dtype}; use 'torch'")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bfloat16_instructions() -> str | None:
    """What this CPU has for bfloat16 products, as torch sees it; None for nothing."""
    known = {"AMX": "_is_amx_tile_supported", "AVX512_BF16": "_is_avx512_bf16_supported"}
    for name, question in known.items():
        answer: Callable[[], bool] = getattr(torch.cpu, question, bool)  # bool() is False: an older torch cannot tell
        if answer():
            return name
    return None


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of `dtype`: without them those of 16 bits are better made in
    fp32, in which they are sooner done."""
    if dtype == torch.bfloat16:
        return bfloat16_instructions() is not None
    return dtype in (torch.float32, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating point tensor, found {tensor.dtype}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` must have the dtype and the device of `other`."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other_name}'s dtype {other.dtype}, found {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected on {other_name}'s device {other.device}, found on {tensor.device}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")


def document_offsets(cu_seqlens: Tensor, tokens: int) -> tuple[int, ...]:
    """The document boundaries (n + 1,) as Python ints, checked: they start at 0, never fall, and end at `tokens`."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens: expected an int32 tensor (documents + 1,), found {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    offsets = tuple(cu_seqlens.tolist())
    if offsets[0] != 0 or offsets[-1] != tokens or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens: expected 0 <= ... <= {tokens}, never falling, found {_short(offsets)}")
    return offsets


def _short(values: tuple[int, ...]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{str(list(values[:4]))[1:-1]}, ..., {values[-1]}]"


def as_rows(x: Tensor) -> Tensor:
    """x (..., C) as a matrix (N, C) whose rows are contiguous, copied only where its strides allow no such view."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()
