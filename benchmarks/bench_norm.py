"""RMSNorm and LayerNorm, with and without the residual add, beside torch and other projects' kernels.

    python benchmarks/bench_norm.py --quick
    python benchmarks/bench_norm.py --cases residual

Cases: whole rows, rows with the residual added first, and rows as short as a head. Providers: afina (Triton),
afina-torch, eager (as transformers writes it), torch (F.rms_norm, F.layer_norm), compile, liger, fla.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import costs
import torch
import torch.nn.functional as F
from harness import Case, Function, Unavailable, compiled, main, provider, randn, reference
from torch import Tensor

from afina.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

EPS = 1e-6
# Rows and width, by scale; the second list: heads of a token each.
ROWS = {"gpu": [(8192, 4096)], "cpu": [(2048, 192), (2048, 576), (2048, 768)], "tiny": [(33, 48)]}
HEADS = {"gpu": [(8192, 32, 128)], "cpu": [(2048, 9, 64)], "tiny": [(11, 3, 16)]}


def eager(x: Tensor, weight: Tensor, *residual: Tensor, layer: bool) -> Any:
    total = x + residual[0] if residual else x
    if layer:
        y = F.layer_norm(total, total.shape[-1:], weight, None, EPS)
    else:
        wide = total.float()
        y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(total.dtype)
    return (y, total) if residual else y


def fused(x: Tensor, weight: Tensor, *residual: Tensor, layer: bool) -> Any:
    total = x + residual[0] if residual else x
    y = (F.layer_norm if layer else F.rms_norm)(total, total.shape[-1:], weight, eps=EPS)
    return (y, total) if residual else y


def liger(x: Tensor, weight: Tensor, *residual: Tensor, layer: bool) -> Function:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_layer_norm, liger_rms_norm

    if layer:
        if residual:
            raise Unavailable("no LayerNorm with a residual")
        bias = torch.zeros_like(weight)
        return lambda: liger_layer_norm(x, weight, bias, EPS)
    # In place its backward pass would write over the gradient that the next run starts from.
    if residual:
        return lambda: liger_fused_add_rms_norm(x, residual[0], weight, EPS, in_place=False)
    return lambda: liger_rms_norm(x, weight, EPS, in_place=False)


def fla(x: Tensor, weight: Tensor, *residual: Tensor, layer: bool) -> Function:
    from fla.modules.norm import layernorm

    function = layernorm.layer_norm if layer else layernorm.rms_norm
    if residual:
        return lambda: function(x, weight, None, residual=residual[0], prenorm=True, eps=EPS)
    return lambda: function(x, weight, None, eps=EPS)


def exact(x: Tensor, weight: Tensor, *residual: Tensor, layer: bool) -> Any:
    total = x + residual[0] if residual else x
    y = (layer_norm_reference if layer else rms_norm_reference)(total, weight, eps=EPS)
    return (y, total) if residual else y


def ours(x: Tensor, weight: Tensor, *residual: Tensor, layer: bool, backend: str) -> Any:
    function = layer_norm if layer else rms_norm
    return function(x, weight, eps=EPS, residual=residual[0] if residual else None, backend=backend)


def case(name: str, shape: tuple[int, ...], layer: bool, residual: bool) -> Case:
    def inputs() -> list[Tensor]:
        weight = (1 + randn(shape[-1], scale=0.1)).requires_grad_()
        return [randn(*shape, grad=True), weight, *([randn(*shape, grad=True)] if residual else [])]

    formula = partial(eager, layer=layer)
    return Case(
        "norm",
        name,
        inputs,
        lambda inputs: [randn(*shape) for _ in range(1 + residual)],
        reference(partial(exact, layer=layer)),
        {
            "afina": provider(partial(ours, layer=layer, backend="triton")),
            "afina-torch": provider(partial(ours, layer=layer, backend="torch")),
            "eager": provider(formula),
            "torch": provider(partial(fused, layer=layer)),
            "compile": lambda *x: partial(compiled(formula), *x),
            "liger": partial(liger, layer=layer),
            "fla": partial(fla, layer=layer),
        },
        costs.norm(torch.Size(shape[:-1]).numel(), shape[-1], residual, itemsize=randn(0).itemsize),
    )


def cases(scale: str) -> list[Case]:
    made = []
    for shape in ROWS[scale]:
        size = "x".join(map(str, shape))
        made += [
            case(f"rms {size}", shape, False, False),
            case(f"rms residual {size}", shape, False, True),
            case(f"layer {size}", shape, True, False),
        ]
    return made + [case(f"rms heads {'x'.join(map(str, shape))}", shape, False, False) for shape in HEADS[scale]]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
