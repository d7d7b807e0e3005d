"""Linear layers in 8-bit floats beside those in the model's own dtype, forward and backward.

    python benchmarks/bench_fp8_linear.py --quick
    python benchmarks/bench_fp8_linear.py --cases 4096x14336 --providers afina eager

Providers: afina (`torch._scaled_mm` on a GPU that has FP8, else the emulation), afina-torch (the emulation, which says
nothing about speed), eager (F.linear), compile (that, compiled). Rounding the factors is on the clock; the errors are
those of FP8 itself, against fp32 products of the same inputs.
"""

from __future__ import annotations

import sys
from functools import partial

import costs
import torch.nn.functional as F
from harness import Case, compiled, main, provider, randn, reference

from afina.kernels.fp8_linear import fp8_linear

# Rows (tokens), inputs and outputs, by scale: two matrices of Llama-3-8B, and of a model of hidden size 192.
SHAPES = {
    "gpu": [(8192, 4096, 14336), (8192, 14336, 4096)],
    "cpu": [(512, 192, 512), (512, 512, 192)],
    "tiny": [(48, 32, 64)],
}
LIMIT = 0.12  # relative error; e5m2 has two bits of mantissa


def cases(scale: str) -> list[Case]:
    return [
        Case(
            "fp8_linear",
            f"fp8_linear {rows}x{width}x{out}",
            lambda rows=rows, width=width, out=out: [
                randn(rows, width, grad=True),
                randn(out, width, grad=True, scale=width**-0.5),
            ],
            lambda inputs, rows=rows, out=out: [randn(rows, out)],
            reference(F.linear),
            {
                "afina": provider(fp8_linear),
                "afina-torch": provider(partial(fp8_linear, backend="emulated")),
                "eager": provider(F.linear),
                "compile": lambda x, weight: partial(compiled(F.linear), x, weight),
            },
            costs.linear(rows, width, out, randn(0).itemsize),
            limit=LIMIT,
        )
        for rows, width, out in SHAPES[scale]
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
