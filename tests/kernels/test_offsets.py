"""Rows that lie more than 2^31 elements into a tensor: what 32-bit offsets would miss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor

from afina.kernels.activation import swiglu, swiglu_reference
from afina.kernels.attention import attention, attention_reference
from afina.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from afina.kernels.decode import decode_attention, decode_attention_reference
from afina.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from afina.kernels.rope import rope, rope_reference

APART = 2**30 + 8


@pytest.fixture(scope="module")
def far() -> Tensor:
    """Four rows (4, 128) fp16 so far apart that the last begins past 2^31; of the 6.4 GB only their pages are used."""
    try:
        room = torch.empty(3 * APART + 128, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no room for 6.4 GB of addresses: {error}")
    rows = room.as_strided((4, 128), (APART, 1))
    return rows.copy_(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)))


def heads(x: Tensor) -> Tensor:
    """(4, 128) -> q, k or v (4 tokens, 2 heads, 64)."""
    return x.view(4, 2, 64)


def weight() -> Tensor:
    return torch.linspace(-1, 1, 128, device=DEVICE)


def turned(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, **options: str) -> Tensor:
    angles = torch.linspace(0, 3, 128, device=DEVICE).view(4, 32)
    return torch.cat(function(heads(x), heads(x), angles.cos(), angles.sin(), **options))


def decoded(function: Callable[..., Tensor], x: Tensor, **options: str) -> Tensor:
    cache = x.view(4, 1, 2, 64)
    ones = torch.ones(4, dtype=torch.int32, device=DEVICE)
    return function(torch.ones_like(heads(x)), cache, cache, ones, **options)


TARGETS = torch.tensor([1, 5, 100, 7])
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "swiglu": (lambda x: swiglu(x, backend="triton"), swiglu_reference),
    "rms_norm": (
        lambda x: rms_norm(x, weight().to(x.dtype), backend="triton"),
        lambda x: rms_norm_reference(x, weight().half()),
    ),
    "layer_norm": (
        lambda x: layer_norm(x, weight().to(x.dtype), backend="triton"),
        lambda x: layer_norm_reference(x, weight().half()),
    ),
    "cross_entropy": (
        lambda x: cross_entropy(x, TARGETS.to(DEVICE), reduction="none", backend="triton"),
        lambda x: cross_entropy_reference(x, TARGETS.to(DEVICE), reduction="none"),
    ),
    "rope": (lambda x: turned(rope, x, backend="triton"), lambda x: turned(rope_reference, x)),
    "attention": (
        lambda x: attention(*[heads(x)[None]] * 3, backend="triton"),
        lambda x: attention_reference(*[heads(x)[None]] * 3),
    ),
    "decode_attention": (
        lambda x: decoded(decode_attention, x, backend="triton"),
        lambda x: decoded(decode_attention_reference, x),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_beyond_32_bits(name: str, far: Tensor) -> None:
    ours, reference = CASES[name]
    want = reference(far.float().contiguous())
    # The kernels round their result to fp16, and attention also p. A row read from elsewhere would differ by about 1.
    tolerance = 2 * torch.finfo(torch.float16).eps
    torch.testing.assert_close(ours(far).float(), want, rtol=tolerance, atol=tolerance)
