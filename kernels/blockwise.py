"""Quantisation in blocks: a value is divided by the largest magnitude of its block and rounded to the nearest code.

The 8-bit code is the dynamic one (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861, section 1.3). It has seven
decades from 1e-6 to 1, each of them divided twice as finely as the one below, and 0 and 1. A small value therefore
keeps a small relative error beside a large one in its block, where evenly spaced codes would round it to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.launch import cdiv

# The divisor of a block is at least this, because the reciprocal of a denormal number is infinite.
TINY = torch.finfo(torch.float32).tiny
BLOCK8 = 256  # How many values of an 8-bit moment share an absmax.


@lru_cache
def dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values of the dynamic code in rising order, fp32: in (-1, 1] if `signed`, else in [0, 1]."""
    decades = []
    for exponent in range(7):
        bins = 2 ** (exponent if signed else exponent + 1)
        edges = _edges(bins)
        decades.append(10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    values = torch.cat(decades)
    ends = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([values, -values if signed else values[:0], ends]).sort().values.to(device)


def _edges(bins: int) -> Tensor:
    """torch.linspace(0.1, 1, bins + 1) in fp32, with the same bits on every CPU.

    torch fuses its products and sums where the CPU has such an instruction, and rounds twice where it has none. Here
    they are taken in float64 and rounded once, as in the fused ones, of which bitsandbytes' codes are made.
    """
    first, last = torch.tensor([0.1, 1.0], dtype=torch.float32, device="cpu")
    step, place = ((last - first) / bins).double(), torch.arange(bins + 1, dtype=torch.float64, device="cpu")
    rising, falling = first + step * place, last - step * (bins - place)
    return torch.where(place < (bins + 1) // 2, rising, falling).float()


def midpoints(code: Tensor) -> Tensor:
    """Return the values between which the nearest code changes; a value equal to the i-th still takes code i."""
    return (code[:-1] + code[1:]) / 2


def to_blocks(values: Tensor, bounds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Quantise the flat values (n,) in blocks of `size`; `bounds` are the midpoints of the code.

    Returns the codes, int32 (blocks, size), of which those beyond n are the code of 0, and the absmax, fp32 (blocks,).
    A block of zeros has absmax 0.
    """
    blocks = F.pad(values.float(), (0, -len(values) % size)).view(-1, size)
    absmax = blocks.abs().amax(dim=1)
    # Values are multiplied by the reciprocal, not divided, because bitsandbytes does so: near a midpoint the last bit
    # of the quotient decides the code.
    return torch.bucketize(blocks * (1 / absmax.clamp(min=TINY))[:, None], bounds, out_int32=True), absmax


def from_blocks(codes: Tensor, absmax: Tensor, code: Tensor, size: int) -> Tensor:
    """Return the values, fp32 (n,), that the integer codes (n,) in blocks of `size` stand for."""
    return code[codes.int()] * absmax.repeat_interleave(size)[: len(codes)]


@dataclass(frozen=True, eq=False)
class State8:
    """A moment of AdamW in 8 bits.

    Attributes: ``codes``, uint8 in the shape of the parameter; ``absmax``, fp32 (ceil(numel / 256),), one for each 256
    values of the flattened moment; ``signed``, True for exp_avg, whose codes stand for values in (-1, 1], and False for
    exp_avg_sq, whose codes stand for values in [0, 1].
    """

    codes: Tensor
    absmax: Tensor
    signed: bool

    @classmethod
    def zeros_like(cls, param: Tensor, *, signed: bool) -> State8:
        """Return a moment of `param`, on its device, that is 0."""
        codes = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
        return cls(codes, torch.zeros(cdiv(param.numel(), BLOCK8), device=param.device), signed)

    def fits(self, param: Tensor, signed: bool) -> bool:
        """Return whether dtypes, layout and the number of blocks are those of a moment of `param`."""
        blocks, codes, absmax = cdiv(param.numel(), BLOCK8), self.codes, self.absmax
        typed = codes.dtype == torch.uint8 and absmax.dtype == torch.float32 and self.signed == signed
        return typed and absmax.shape == (blocks,) and codes.is_contiguous() and absmax.device == codes.device

    def dequantize(self) -> Tensor:
        """Return the moment in fp32, in the shape of the parameter."""
        code = dynamic_code(self.signed, self.codes.device)
        return from_blocks(self.codes.view(-1), self.absmax, code, BLOCK8).view(self.codes.shape)

    def quantize_(self, values: Tensor) -> None:
        """Take the nearest codes of `values`, which have the shape of the parameter.

        A second moment above 0 takes code 1 at least: as 0 it would leave the next update to be divided by eps alone.
        """
        bounds = midpoints(dynamic_code(self.signed, self.codes.device))
        codes, absmax = to_blocks(values.reshape(-1), bounds, BLOCK8)
        codes = codes.view(-1)[: values.numel()].view(values.shape)
        self.codes.copy_(codes if self.signed else codes.where(values == 0, codes.clamp(min=1)))
        self.absmax.copy_(absmax)
