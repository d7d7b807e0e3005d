"""The AdamW update, in place, beside torch's and bitsandbytes'. One pass, called forward here.

    python benchmarks/bench_adamw.py --quick
    python benchmarks/bench_adamw.py --cases 8-bit

Cases: fp32 weights and moments; the same with bf16 gradients and a bf16 copy for the model ("master"), for one matrix
and for all parameters of Qwen2.5-0.5B; bf16 weights and moments, rounded stochastically; bf16 weights with 8-bit
moments. Providers: afina (Triton), afina-torch, torch-fused and torch-foreach (torch.optim.AdamW; they take gradients
of the weights' dtype, so "master" converts them first and copies the weights after), bitsandbytes (AdamW8bit).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import costs
import torch
from harness import Case, Function, main, randn, wide
from torch import Tensor

from afina.kernels.adamw import adamw_, adamw_reference_
from afina.kernels.blockwise import State8

STEP = 10  # moments of a run under way
# A rate at which one update shows beside the weight itself.
OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


class Kind(NamedTuple):
    name: str
    param: torch.dtype
    moment: torch.dtype | None  # None: 8 bits
    grad: torch.dtype
    copy: bool = False
    seed: int | None = None


FP32 = Kind("fp32", torch.float32, torch.float32, torch.float32)
MASTER = Kind("master", torch.float32, torch.float32, torch.bfloat16, copy=True)
BF16 = Kind("bf16 stochastic", torch.bfloat16, torch.bfloat16, torch.bfloat16, seed=7)
BITS8 = Kind("8-bit moments", torch.bfloat16, None, torch.bfloat16, seed=7)


def qwen(layers: int, width: int, inner: int, kv: int, vocab: int) -> list[tuple[int, ...]]:
    """The shapes of our parameters: fused QKV with bias, gate and up in one, tied embeddings."""
    qkv = width + 2 * kv
    layer = [(qkv, width), (qkv,), (width, width), (2 * inner, width), (width, inner), (width,), (width,)]
    return [(vocab, width), *layer * layers, (width,)]


SHAPES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "gpu": {"8192x4096": [(8192, 4096)], "Qwen2.5-0.5B": qwen(24, 896, 4864, 128, 151_936)},
    "cpu": {f"8x{width}x{4 * width}": [(width, 4 * width)] * 8 for width in (192, 576, 768)},
    "tiny": {"3 tensors": [(5, 7), (1,), (300,)]},
}


def expected(inputs: list[Tensor], upstream: list[Tensor], step: int = STEP) -> list[Tensor]:
    # Group by group: params, grads, exp_avgs, exp_avg_sqs.
    count = len(inputs) // 4
    groups = [[x.detach().to(wide(), copy=True) for x in inputs[i * count : (i + 1) * count]] for i in range(4)]
    adamw_reference_(*groups, step=step, **OPTIONS)
    return groups[0]


def ours(kind: Kind, backend: str) -> Callable[..., Function]:
    def make(*inputs: Tensor) -> Function:
        count = len(inputs) // 4
        params, grads, *moments = (list(inputs[i * count : (i + 1) * count]) for i in range(4))
        states: list[Any] = moments
        if kind.moment is None:
            states = [[State8.zeros_like(p, signed=signed) for p in params] for signed in (True, False)]
        copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params] if kind.copy else None
        step = 1 if kind.moment is None else STEP

        def call() -> list[Tensor]:
            adamw_(
                params, grads, *states, step=step, copies=copies, seed=kind.seed, backend=backend, **OPTIONS
            )  # fmt: skip
            return params

        return call

    return make


def peer(kind: Kind, name: str) -> Callable[..., Function]:
    def make(*inputs: Tensor) -> Function:
        count = len(inputs) // 4
        params, grads, exp_avgs, exp_avg_sqs = (list(inputs[i * count : (i + 1) * count]) for i in range(4))
        leaves = [p.requires_grad_() for p in params]
        own = [grad.to(leaf.dtype) for leaf, grad in zip(leaves, grads)]
        for leaf, grad in zip(leaves, own):
            leaf.grad = grad
        optimizer: Any
        if name == "bitsandbytes":
            from bitsandbytes.optim import AdamW8bit

            optimizer = AdamW8bit(leaves, min_8bit_size=0, **OPTIONS)
        else:
            optimizer = torch.optim.AdamW(
                leaves, fused=name == "torch-fused", foreach=name == "torch-foreach", **OPTIONS
            )
            for leaf, exp_avg, exp_avg_sq in zip(leaves, exp_avgs, exp_avg_sqs):
                step = torch.tensor(float(STEP - 1), device=leaf.device if name == "torch-fused" else None)
                optimizer.state[leaf] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params] if kind.copy else []

        def call() -> list[Tensor]:
            if kind.grad != kind.param:
                torch._foreach_copy_(own, grads)
            optimizer.step()
            if copies:
                torch._foreach_copy_(copies, [leaf.detach() for leaf in leaves])
            return params

        return call

    return make


def case(name: str, kind: Kind, shapes: Sequence[tuple[int, ...]]) -> Case:
    moment = kind.moment or torch.float32

    def inputs() -> list[Tensor]:
        dtypes = (kind.param, kind.grad, moment, moment)
        groups = [[randn(*shape, dtype=dtype) for shape in shapes] for dtype in dtypes]
        if kind.moment is None:
            groups[2:] = [[torch.zeros_like(x) for x in group] for group in groups[2:]]
        return [*groups[0], *groups[1], *groups[2], *(x.abs_() for x in groups[3])]

    providers: dict[str, Callable[..., Any]] = {"afina": ours(kind, "triton"), "afina-torch": ours(kind, "torch")}
    peers = ["bitsandbytes"] if kind.moment is None else ["torch-fused", "torch-foreach"]
    providers |= {one: peer(kind, one) for one in peers}
    count = sum(torch.Size(shape).numel() for shape in shapes)
    # Two bytes of codes and a share of the absmax of each 256.
    moments = 1 + 4 / 256 if kind.moment is None else moment.itemsize
    return Case(
        "adamw",
        f"{kind.name} {name}",
        inputs,
        lambda inputs: [],
        partial(expected, step=1 if kind.moment is None else STEP),
        providers,
        costs.adamw(count, kind.param.itemsize, moments, kind.grad.itemsize, 2 if kind.copy else 0),
    )


def cases(scale: str) -> list[Case]:
    sizes = SHAPES[scale]
    first = next(iter(sizes))
    made = [case(name, FP32, shapes) for name, shapes in sizes.items() if scale == "cpu" or name == first]
    made += [case(name, MASTER, shapes) for name, shapes in sizes.items()]
    return made + [case(first, kind, sizes[first]) for kind in (BF16, BITS8)]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
