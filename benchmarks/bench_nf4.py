"""Dequantising NF4 weights, beside bitsandbytes. Forward only.

    python benchmarks/bench_nf4.py --quick

Providers: afina (Triton), afina-torch, bitsandbytes (which quantises the same weight itself).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import costs
import torch
from harness import DTYPE, Case, Function, main, randn
from torch import Tensor

from afina.kernels.nf4 import dequantize_nf4, nf4_reference, quantize_nf4

SHAPES = {"gpu": [(4096, 14336), (4096, 4096)], "cpu": [(576, 1536)], "tiny": [(24, 70)]}


def ours(weight: Tensor, backend: str, blocksize: int) -> Function:
    packed, state = quantize_nf4(weight, blocksize=blocksize)
    out = torch.empty_like(weight)  # one buffer for all layers, as QLoRA does it
    return partial(dequantize_nf4, packed, state, out=out, backend=backend)


def bitsandbytes(weight: Tensor, blocksize: int) -> Function:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=True, quant_type="nf4")
    return lambda: dequantize_4bit(packed, state)


def case(rows: int, width: int, blocksize: int = 64) -> Case:
    providers: dict[str, Callable[..., Any]] = {
        "afina": partial(ours, backend="triton", blocksize=blocksize),
        "afina-torch": partial(ours, backend="torch", blocksize=blocksize),
        "bitsandbytes": partial(bitsandbytes, blocksize=blocksize),
    }
    return Case(
        "nf4",
        f"{rows}x{width}",
        lambda: [randn(rows, width, scale=0.02)],
        lambda inputs: [],
        lambda inputs, upstream: [nf4_reference(*quantize_nf4(inputs[0], blocksize=blocksize))],
        providers,
        costs.nf4(rows * width, blocksize, itemsize=DTYPE.itemsize),
    )


def cases(scale: str) -> list[Case]:
    return [case(*shape) for shape in SHAPES[scale]]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
