"""Which implementation of an op runs, and the checks that all ops share."""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")


def choose(backend: str | None, tensor: Tensor) -> str:
    """The backend for an op on `tensor`: the argument, else AFINA_BACKEND, else the default for its device.

    There are no Triton kernels in this version, so "triton" raises and the default is "torch" on every device.
    """
    name = backend or os.environ.get("AFINA_BACKEND") or "torch"
    if name == "torch":
        return name
    source = "backend" if backend else "AFINA_BACKEND"
    if name == "triton":
        raise ValueError(f"{source}: 'triton' has no kernels in this version; use 'torch', or leave it unset")
    raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, found {name!r}")


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
