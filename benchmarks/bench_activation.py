"""SwiGLU and GeGLU over the fused buffer [gate | up], beside torch and other projects' kernels.

    python benchmarks/bench_activation.py --quick
    python benchmarks/bench_activation.py --cases swiglu --providers afina liger

Providers: afina (Triton), afina-torch, eager (as transformers writes it), compile, liger, fla. Liger takes gate and
up as two tensors, as its users have them, so it pays for no split here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import costs
import torch
import torch.nn.functional as F
from harness import Case, Function, Peer, compiled, main, provider, randn, reference
from torch import Tensor

from afina.kernels.activation import geglu, geglu_reference, swiglu, swiglu_reference

# Rows and width of the output, by scale. On a CPU: the MLPs of models of hidden size 192, 576 and 768.
SHAPES = {
    "gpu": [(8192, 4096), (8192, 14336)],
    "cpu": [(2048, 512), (2048, 1536), (2048, 2048)],
    "tiny": [(33, 48)],
}


def eager(gate_up: Tensor, gelu: bool) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


def liger(gate_up: Tensor, gelu: bool) -> Peer:
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    gate, up = (x.detach().contiguous().requires_grad_() for x in gate_up.chunk(2, -1))
    function = liger_geglu if gelu else liger_swiglu
    return Peer(lambda: function(gate, up), [gate, up], lambda grads: [torch.cat(grads, -1)])


def fla(gate_up: Tensor) -> Function:
    from fla.modules.activations import swiglu as fla_swiglu

    return lambda: fla_swiglu(*gate_up.chunk(2, -1))


def cases(scale: str) -> list[Case]:
    made = []
    for rows, width in SHAPES[scale]:
        for gelu, ours, formula in ((False, swiglu, swiglu_reference), (True, geglu, geglu_reference)):
            providers: dict[str, Callable[..., Any]] = {
                "afina": provider(partial(ours, backend="triton")),
                "afina-torch": provider(partial(ours, backend="torch")),
                "eager": provider(partial(eager, gelu=gelu)),
                "compile": lambda x, gelu=gelu: partial(compiled(partial(eager, gelu=gelu)), x),
                "liger": partial(liger, gelu=gelu),
            }
            if not gelu:
                providers["fla"] = fla
            made.append(
                Case(
                    "glu",
                    f"{ours.__name__} {rows}x{width}",
                    lambda rows=rows, width=width: [randn(rows, 2 * width, grad=True)],
                    lambda inputs, rows=rows, width=width: [randn(rows, width)],
                    reference(formula),
                    providers,
                    costs.glu(rows, width, randn(0).itemsize),
                )
            )
    return made


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
