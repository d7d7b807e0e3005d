"""NF4: 4-bit weights for QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), as bitsandbytes stores them.

    w[i] ~ code[c[i]] * absmax[i // 64]                          c: 4 bits, of the flattened weight
    absmax[j] ~ nested_code[a[j]] * nested_absmax[j // 256] + offset           a: 8 bits, double quantisation
`code` holds 16 quantiles of the normal distribution (appendix E). Two codes share a byte, the first in its high half.
A parameter takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits, or 4.5 without double quantisation.

Quantising happens once, when a model is loaded, in torch. Dequantising is one pass, which reads 0.5 bytes and writes 2
for an element. The codes are those of bitsandbytes, where a value at the midpoint of two codes takes the lower one. So
are the bits of the weights, because each product and each sum is rounded to fp32, and the result to its type, as there.
Where the backends of bitsandbytes differ, this follows its portable one. A block of zeros has code 7 (its CUDA kernel
divides 0 by 0 there and takes code 0), and nested codes are exactly the nearest (its CPU library rounds to 16 bits
first and misses 1 in 600).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.backend import TRITON_DTYPES, check_shape, choose
from afina.kernels.blockwise import dynamic_code, from_blocks, midpoints, to_blocks
from afina.kernels.launch import cdiv, config, jit, launch, tl

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256
PIECE = 1 << 22  # So many elements are quantised at once, which takes about 50 MB of temporary memory.


@dataclass(frozen=True, eq=False)
class NF4State:
    """What the packed codes of a weight mean. In brackets stand the keys of a checkpoint that bitsandbytes has written.

    Attributes:
        absmax: The largest magnitude of each block, fp32 (blocks,), or its codes, uint8, with double quantisation
            [absmax].
        shape, dtype: Those of the weight [shape, dtype].
        blocksize: How many weights are a block [blocksize].
        code: The values of the 16 codes, fp32 (16,) [quant_map].
        offset: The mean of the absmax, fp32 () [nested_offset].
        nested_absmax: The largest magnitudes of blocks of absmax - offset, fp32 (ceil(blocks / nested_blocksize),)
            [nested_absmax].
        nested_code: The values of the 256 codes of absmax, fp32 (256,) [nested_quant_map].
        nested_blocksize: How many absmax are a block [nested_blocksize].

    Without double quantisation offset, nested_absmax and nested_code are None.
    """

    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    code: Tensor
    offset: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_blocksize: int = NESTED

    def to(self, device: torch.device | str) -> NF4State:
        """Return the same state with its tensors on `device`."""
        members = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: x.to(device) for name, x in members.items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@lru_cache
def _code(device: torch.device) -> Tensor:
    return torch.tensor(CODE, device=device)


@torch.no_grad()
def quantize_nf4(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> tuple[Tensor, NF4State]:
    """Pack a weight of any shape, fp32, fp16 or bf16, into uint8 (ceil(numel / 2), 1), and return the state with it.

    Raises ValueError for another dtype, for NaN or infinite weights, and for a block size that bitsandbytes does not
    know.
    """
    if weight.dtype not in TRITON_DTYPES:
        raise ValueError(f"weight: expected float32, float16 or bfloat16, found {weight.dtype}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {', '.join(map(str, BLOCKSIZES))}, found {blocksize}")
    flat, code = weight.reshape(-1), _code(weight.device)
    packed = torch.empty((cdiv(len(flat), 2), 1), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(cdiv(len(flat), blocksize), device=weight.device)
    for start in range(0, len(flat), PIECE):
        codes, largest = to_blocks(flat[start : start + PIECE], midpoints(code), blocksize)
        absmax[start // blocksize :][: len(largest)] = largest
        pairs = codes.view(-1, 2)
        room = packed[start // 2 :][: len(pairs), 0]
        room.copy_((pairs[:, 0] << 4 | pairs[:, 1])[: len(room)])
    if not absmax.isfinite().all():
        raise ValueError("weight: expected finite values, found NaN or infinity")
    state = NF4State(absmax, tuple(weight.shape), weight.dtype, blocksize, code)
    if not double_quant or not len(absmax):
        return packed, state
    offset = absmax.double().mean().float()  # The sum is fp64, so that its order does not show after rounding.
    nested_code = dynamic_code(True, weight.device)
    codes, nested_absmax = to_blocks(absmax - offset, midpoints(nested_code), NESTED)
    codes = codes.view(-1)[: len(absmax)].to(torch.uint8)
    return packed, replace(state, absmax=codes, offset=offset, nested_absmax=nested_absmax, nested_code=nested_code)


def nf4_reference(packed: Tensor, state: NF4State, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight by the formulas above, in `dtype`, which is `state.dtype` where it is None."""
    absmax = state.absmax
    if state.nested_absmax is not None and state.nested_code is not None and state.offset is not None:
        absmax = from_blocks(absmax, state.nested_absmax, state.nested_code, state.nested_blocksize) + state.offset
    # Both codes of a byte are looked up at once. Whole blocks are scaled in place, and a last one that is not full
    # apart.
    byte, count = torch.arange(256, device=packed.device), prod(state.shape)
    pairs = state.code[torch.stack([byte >> 4, byte & 15], dim=1)]
    values = pairs.index_select(0, packed.reshape(-1).int()).view(-1)[:count]
    full = count - count % state.blocksize
    values[:full].view(-1, state.blocksize).mul_(absmax[: full // state.blocksize, None])
    values[full:].mul_(absmax[full // state.blocksize :])
    return values.to(dtype or state.dtype).view(state.shape)


class Scales(NamedTuple):
    """What the codes of a weight mean, as `NF4State` holds it; the last three are None without double quantisation."""

    code: Any
    absmax: Any
    offset: Any
    nested_absmax: Any
    nested_code: Any


@jit
def _nf4_dequantize(
    packed, scales, out, count, size, NESTED_BLOCK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Dequantise ROWS blocks of 2 HALF weights: packed (size,) -> out (count,).

    NESTED_BLOCK is how many absmax share a nested one, and 0 without double quantisation.
    """
    # Load the absmax of each block, and dequantise it where it is a code itself.
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = block * (2 * HALF) < count
    absmax = tl.load(scales.absmax + block, mask=held, other=0)
    if NESTED_BLOCK:
        nested = tl.load(scales.nested_absmax + block // NESTED_BLOCK, mask=held, other=0.0)
        absmax = tl.load(scales.nested_code + absmax.to(tl.int32)) * nested + tl.load(scales.offset)

    # Load the codes, two in a byte, and look them up.
    place = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(packed + place, mask=place < size, other=0).to(tl.int32)
    high = tl.load(scales.code + (byte >> 4)) * absmax[:, None]
    low = tl.load(scales.code + (byte & 15)) * absmax[:, None]

    # Store the weights of high and low halves in turn.
    element = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + element, tl.interleave(high, low).to(out.dtype.element_ty), mask=element < count)


def _triton(packed: Tensor, state: NF4State, out: Tensor) -> None:
    options = config("nf4", packed.device, size=state.blocksize)
    scales = Scales(state.code, state.absmax, state.offset, state.nested_absmax, state.nested_code)
    # A product and a sum fused into one rounding would differ from those of bitsandbytes in the last bit.
    launch(
        _nf4_dequantize, (cdiv(len(state.absmax), options["ROWS"]),), packed.contiguous(), scales, out, out.numel(),
        packed.numel(), NESTED_BLOCK=0 if state.nested_absmax is None else state.nested_blocksize,
        HALF=state.blocksize // 2, enable_fp_fusion=False, **options,
    )  # fmt: skip


@torch.no_grad()
def dequantize_nf4(packed: Tensor, state: NF4State, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Return the weight that `packed` and `state` stand for, of `state.shape` and `state.dtype`; it has no gradient.

    With `out`, a contiguous tensor of that shape and of any floating point type, the weight is written there, so that
    layers can share one buffer. Raises ValueError where the sizes, types or devices of packed, state and out do not fit
    together, and for a backend that is unknown or cannot run.
    """
    _check(packed, state, out)
    if choose("nf4", backend, state.code) == "torch":
        return nf4_reference(packed, state) if out is None else out.copy_(nf4_reference(packed, state, out.dtype))
    if out is None:
        out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    _triton(packed, state, out)
    return out


def _check(packed: Tensor, state: NF4State, out: Tensor | None) -> None:
    count = prod(state.shape)
    if packed.dtype != torch.uint8 or packed.numel() != cdiv(count, 2):
        raise ValueError(
            f"packed: expected {cdiv(count, 2)} uint8 for a weight of shape {state.shape}, found {packed.numel()} "
            f"{packed.dtype}"
        )
    if state.blocksize not in BLOCKSIZES:
        raise ValueError(f"state.blocksize: expected one of {', '.join(map(str, BLOCKSIZES))}, found {state.blocksize}")
    blocks, nested = cdiv(count, state.blocksize), state.nested_absmax is not None
    expected: dict[str, tuple[int, ...]] = {"absmax": (blocks,), "code": (16,)}
    if nested:
        expected |= {"offset": (), "nested_absmax": (cdiv(blocks, state.nested_blocksize),), "nested_code": (256,)}
    for name, shape in expected.items():
        tensor = getattr(state, name)
        dtype = torch.uint8 if nested and name == "absmax" else torch.float32
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            found = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"state.{name}: expected contiguous {dtype} {shape}, found {found}")
        if tensor.device != packed.device:
            raise ValueError(f"state.{name}: expected on packed's device {packed.device}, found on {tensor.device}")
    if out is not None:
        check_shape("out", out, state.shape)
        if not out.is_floating_point() or not out.is_contiguous() or out.device != packed.device:
            raise ValueError(
                f"out: expected contiguous floating point on {packed.device}, found {out.dtype} on {out.device} with "
                f"strides {out.stride()}"
            )
