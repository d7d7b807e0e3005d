"""Quantisation in blocks: values over the largest magnitude of their block, rounded to the nearest of a few codes.

The 8-bit code is the dynamic one (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861, section 1.3): seven decades
from 1e-6 to 1, each twice as finely divided as the one below, with 0 and 1. Small values keep a small relative error
beside a large one in their block, which an even division would round to 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# A block of smaller values is divided by this: the reciprocal of a denormal number is infinite.
TINY = torch.finfo(torch.float32).tiny


@lru_cache
def dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic code, rising, fp32: in (-1, 1] if `signed`, else in [0, 1]."""
    decades = []
    for exponent in range(7):
        bins = 2 ** (exponent if signed else exponent + 1)
        edges = torch.linspace(0.1, 1, bins + 1, dtype=torch.float32, device="cpu")
        decades.append(10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    values = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([values, -values if signed else values[:0], ends]).sort().values.to(device)


def midpoints(code: Tensor) -> Tensor:
    """Where the nearest code changes: a value at the i-th midpoint itself still takes code i."""
    return (code[:-1] + code[1:]) / 2


def to_blocks(values: Tensor, bounds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Quantise flat values (n,): the codes int32 (blocks, size), filled up with zeros' code, and absmax fp32 (blocks,).

    `bounds` are the midpoints of the code. A block of zeros has absmax 0.
    """
    blocks = F.pad(values.float(), (0, -len(values) % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    # Times the reciprocal, not divided: as bitsandbytes does it, the last bit may tell at a midpoint.
    return torch.bucketize(blocks * (1 / absmax.clamp(min=TINY))[:, None], bounds, out_int32=True), absmax


def from_blocks(codes: Tensor, absmax: Tensor, code: Tensor, size: int) -> Tensor:
    """The values fp32 (n,) of the integer codes (n,)."""
    return code[codes.int()] * absmax.repeat_interleave(size)[: len(codes)]
