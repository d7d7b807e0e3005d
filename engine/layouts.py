"""How a weight lies for the CPU's matrix instructions: as it is (``Plain``), or laid out once for all products.

``OneDNN`` has the weight's own numbers. A plain weight is rearranged in each product, or read by code that a single row
has for itself: a batch of a few rows then costs three times one row, and gives other bits. oneDNN's inner product reads
a weight that is rearranged once, as torch.compile has it
(https://pytorch.org/blog/accelerated-cpu-inference/): a few rows cost what one does, since both wait for the memory.

``Half`` has them in 16 bits: FBGEMM (Khudia et al. 2021, https://arxiv.org/abs/2101.05615) reads float16 weights and
multiplies and adds in float32, so a product waits for half as many bytes. It is taken only for a weight that comes
back from float16 as it was: checkpoints are published in bfloat16, whose 8 bits fit into the 11 of float16. What is
smaller than 2^-17 may lose its last bits there, never more than 2^-25.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

ROWS = 16  # the batch that oneDNN's layout is chosen for
ROUNDING = 2.0**-25  # half the distance of the float16 numbers next to 0: what a weight in ``Half`` may be off by
SLICE = 1 << 20  # numbers of a weight that are compared at a time
BLOCK = 512  # FBGEMM's layout fills the width of a weight up to a multiple of this
BLOCKS = (64, 48, 32, 16, 8, 4)  # rows that oneDNN may lay side by side


class Layout(Protocol):
    """A weight (O, C) laid out for products x W^T. ``nbytes`` is what it takes."""

    nbytes: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., C) -> x W^T + bias (..., O)."""
        ...

    def dense(self) -> Tensor:
        """W (O, C), in new memory."""
        ...


def filled(rows: int) -> int:
    """How many rows ``OneDNN`` computes for so many. For each number that it meets, oneDNN writes code of half a
    megabyte to a megabyte a kind of weight, and keeps that of the last 1,024: prompts of all lengths would take more
    memory than a small model does."""
    step = 1 if rows <= 2 else 4 if rows <= 16 else 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step


class OneDNN:
    """The weight's own numbers, which come back bit for bit. Rows are filled up to numbers that come again
    (``filled``)."""

    def __init__(self, weight: Tensor) -> None:
        self.data = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.nbytes = int(torch.ops.mkldnn._nbytes(self.data))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        count = filled(len(rows))
        if count == len(rows):
            return torch.ops.mkldnn._linear_pointwise(x, self.data, bias, "none", [], "")
        whole = rows.new_zeros(count, rows.shape[1])
        whole[: len(rows)] = rows
        y = torch.ops.mkldnn._linear_pointwise(whole, self.data, bias, "none", [], "")[: len(rows)]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    def numbers(self, dtype: torch.dtype) -> Tensor | None:
        """All numbers as they lie, flat, and what fills them up. They must not outlive this object; None where torch
        does not say where they are."""
        try:
            memory = (ctypes.c_char * self.nbytes).from_address(torch.ops.mkldnn.data_ptr(self.data))
        except (RuntimeError, AttributeError):
            return None
        return torch.frombuffer(memory, dtype=dtype)

    def dense(self) -> Tensor:
        return self.data.to_dense()


class Rows:
    """``rows(ids)``: single rows (..., C) of a weight (O, C), read where oneDNN has laid it out; ``within`` makes it.

    oneDNN does not say how a weight lies. On CPUs it is in blocks of rows, (O / n, C / k, n, k): n rows side by side, k
    numbers of each at a time, 1 or a pair; n = 1 and k = C are plain rows, n = O and k = 1 plain columns. That is
    tried, and taken only where all numbers are found again.
    """

    def __init__(self, layout: OneDNN, blocks: Tensor, width: int) -> None:
        self.layout, self.blocks, self.width = layout, blocks, width  # the layout has the memory of ``blocks``

    @classmethod
    def within(cls, layout: OneDNN, weight: Tensor) -> Rows | None:
        """None where the weight lies in another way."""
        out, width = weight.shape
        numbers = layout.numbers(weight.dtype)
        if numbers is None:
            return None
        for n, k in (*itertools.product(BLOCKS, (1, 2)), (1, width), (out, 1)):
            whole, rest = divmod(numbers.numel(), -(-out // n) * n)  # the width, up to a multiple of 16
            if rest or whole < width or whole % k:
                continue
            found = cls(layout, numbers.view(-1, whole // k, n, k).transpose(1, 2), width)
            steps = torch.arange(out).split(max(1, SLICE // width))
            if all(torch.equal(found(ids), weight[ids[0] : ids[-1] + 1]) for ids in steps):
                return found
        return None

    def __call__(self, ids: Tensor) -> Tensor:
        n = self.blocks.shape[1]
        return self.blocks[ids // n, ids % n].flatten(-2)[..., : self.width]


class Plain:
    """The weight as it is, in the same memory: what is quickest for small ones, called as directly as can be."""

    def __init__(self, weight: Tensor) -> None:
        self.data = weight.detach().t()
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        y = torch.mm(rows, self.data) if bias is None else torch.addmm(bias, rows, self.data)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def dense(self) -> Tensor:
        return self.data.t().clone()


class Half:
    """A float32 weight in float16, for x in float32; sums are float32. ``fits_half`` says for which it is right."""

    def __init__(self, weight: Tensor) -> None:
        self.data = torch.ops.quantized.linear_prepack_fp16(weight.detach(), None)
        out, width = weight.shape
        self.nbytes = 2 * (-(-out // 16) * 16) * (-(-width // BLOCK) * BLOCK)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.data)
        return y if bias is None else y.add_(bias)

    def dense(self) -> Tensor:
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self.data)[0]
        return weight


def fits_half(weight: Tensor) -> bool:
    """Whether each number of a float32 weight comes back from float16 within ``ROUNDING``; never one past 65,504, nor
    one that is not finite."""
    if weight.dtype != torch.float32:
        return False
    parts = weight.detach().flatten().split(SLICE)
    return all(bool(((part - part.half().float()).abs() <= ROUNDING).all()) for part in parts)


@cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's inner product here, in this dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        OneDNN(torch.ones(2, 2, dtype=dtype))(torch.ones(1, 2, dtype=dtype))
    except (RuntimeError, AttributeError):  # no such operation in this build, or no such instructions in this CPU
        return False
    return True


@cache
def half_works() -> bool:
    """Whether torch has FBGEMM's product here, and vector code for it; without AVX2 FBGEMM has loops only. A
    measurement would let the layout, and so the bits, depend on what else the machine does."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    weight = torch.tensor([[1.0, 2.0**-24], [-3.0, 0.5]])
    try:
        return torch.equal(Half(weight)(torch.eye(2)), weight.t())
    except (RuntimeError, AttributeError):  # a build without FBGEMM
        return False
