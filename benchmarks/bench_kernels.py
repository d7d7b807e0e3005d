"""Each kernel's CPU path, forward and backward, beside what transformers does for the same op (fp32).

    python benchmarks/bench_kernels.py                      # all ops
    python benchmarks/bench_kernels.py attention rms_norm --threads 2 --repeats 30

Ours and theirs take turns, and the fastest of `--repeats` counts: CPU time with one thread, else wall time. One JSON
line a case goes to standard output, `ratio` = theirs / ours. Before it is timed a case's results must agree to 1e-3.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.activation import geglu, swiglu
from afina.kernels.adamw import adamw_
from afina.kernels.attention import attention
from afina.kernels.cross_entropy import linear_cross_entropy
from afina.kernels.norm import rms_norm
from afina.kernels.rope import rope

TOKENS = 2048
WIDTHS = (
    (192, 6, 2, 4096),
    (576, 9, 3, 16384),
    (768, 12, 12, 16384),
)  # hidden size, query heads, key heads, vocabulary

Case = tuple[str, Callable[..., Any], Callable[..., Any], list[Tensor]]


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def peer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)), total


def norms() -> Iterator[Case]:
    for width, *_ in WIDTHS:
        leaves = inputs((TOKENS, width), (TOKENS, width), (width,))
        yield f"rms_norm {width}", lambda x, r, w: rms_norm(x, w, residual=r), peer_norm, leaves


def ropes() -> Iterator[Case]:
    def half(x: Tensor) -> Tensor:
        middle = x.shape[-1] // 2
        return torch.cat((-x[..., middle:], x[..., :middle]), -1)

    for width, heads, kv_heads, _ in WIDTHS:
        dim = width // heads
        angles = torch.rand(256, dim // 2) * 6
        cos, sin = (torch.cat((f(angles), f(angles)), -1).unsqueeze(1) for f in (torch.cos, torch.sin))

        def ours(q: Tensor, k: Tensor, a: Tensor = angles) -> tuple[Tensor, Tensor]:
            return rope(q, k, a.cos(), a.sin())

        def peer(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> tuple[Tensor, Tensor]:
            return q * cos + half(q) * sin, k * cos + half(k) * sin

        yield f"rope {width}", ours, peer, inputs((8, 256, heads, dim), (8, 256, kv_heads, dim))


def activations() -> Iterator[Case]:
    def split(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: act(x.narrow(1, 0, x.shape[1] // 2)) * x.narrow(1, x.shape[1] // 2, x.shape[1] // 2)

    for width, *_ in WIDTHS:
        leaves = inputs((TOKENS, 2 * width * 8 // 3 // 64 * 64))
        yield f"swiglu {width}", swiglu, split(F.silu), leaves
        yield f"geglu {width}", geglu, split(lambda x: F.gelu(x, approximate="tanh")), leaves


def attentions() -> Iterator[Case]:
    """Rows of one length, and documents of 8 to 40 tokens, which the peer pads to the longest."""

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()

    lengths = [8 + 37 * i % 33 for i in range(85)]
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    places = (torch.arange(40) < torch.tensor(lengths)[:, None]).flatten().nonzero().squeeze(1)

    def padded(*packed: Tensor) -> Tensor:
        rows = (x.new_zeros(85 * 40, *x.shape[1:]).index_copy(0, places, x).unflatten(0, (85, 40)) for x in packed)
        return peer(*rows).flatten(0, 1).index_select(0, places)

    for width, heads, kv_heads, _ in WIDTHS:
        dim = width // heads
        for batch, length in ((2, 1024), (8, 256), (100, 20)):
            shapes = ((batch, length, n, dim) for n in (heads, kv_heads, kv_heads))
            yield f"attention {width} {batch}x{length}", attention, peer, inputs(*shapes)
        leaves = inputs(*((sum(lengths), n, dim) for n in (heads, kv_heads, kv_heads)))
        yield f"attention {width} packed", lambda q, k, v: attention(q, k, v, cu_seqlens=cu), padded, leaves


def losses() -> Iterator[Case]:
    for width, _, _, vocab in WIDTHS[:2]:
        targets = torch.randint(0, vocab, (TOKENS,))

        def ours(h: Tensor, w: Tensor, t: Tensor = targets) -> Tensor:
            return linear_cross_entropy(h, w, t)

        def peer(h: Tensor, w: Tensor, t: Tensor = targets) -> Tensor:
            return F.cross_entropy(F.linear(h, w).float(), t)

        yield f"linear_cross_entropy {width} {vocab}", ours, peer, inputs((TOKENS, width), (vocab, width))


def optimizers() -> Iterator[Case]:
    """The peer is torch's default AdamW (a loop over the parameters)."""
    for width, *_ in WIDTHS:
        options = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        params = [torch.randn(width, 4 * width) for _ in range(8)]
        mine = [[x.clone() for x in params], [torch.ones_like(x) for x in params]]
        mine += [[torch.zeros_like(x) for x in params] for _ in range(2)]
        theirs = [torch.nn.Parameter(x.clone()) for x in params]
        for parameter in theirs:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(theirs, **options)  # type: ignore[arg-type]
        steps = iter(range(1, 10**9))

        def ours(mine: list[list[Tensor]] = mine, steps: Iterator[int] = steps, o: dict[str, Any] = options) -> Tensor:
            adamw_(*mine, step=next(steps), **o)
            return mine[0][0]

        def peer(optimizer: Any = optimizer, theirs: list[Any] = theirs) -> Tensor:
            optimizer.step()
            return theirs[0].detach()

        yield f"adamw {width}", ours, peer, []


OPS: dict[str, Callable[[], Iterator[Case]]] = {
    "rms_norm": norms,
    "rope": ropes,
    "glu": activations,
    "attention": attentions,
    "linear_cross_entropy": losses,
    "adamw": optimizers,
}


def once(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """One forward and backward pass -> outputs and gradients."""
    made = function(*leaves)
    outs = list(made) if isinstance(made, tuple) else [made]
    return outs + list(torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs]) if leaves else ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"unknown op {min(unknown)}: expected some of {', '.join(OPS)}")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for name in args.ops or OPS:
        for label, ours, peer, leaves in OPS[name]():
            for mine, theirs in zip(once(ours, leaves), once(peer, leaves)):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
            best = [float("inf")] * 2
            for _ in range(args.repeats):
                for i, function in enumerate((ours, peer)):
                    start = clock()
                    once(function, leaves)
                    best[i] = min(best[i], clock() - start)
            row = {"case": label, "ours_ms": round(1e3 * best[0], 3), "peer_ms": round(1e3 * best[1], 3)}
            row |= {"ratio": round(best[1] / best[0], 2), "threads": args.threads}
            print(json.dumps(row | {"torch": torch.__version__, "machine": platform.processor()}), flush=True)


if __name__ == "__main__":
    main()
