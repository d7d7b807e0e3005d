"""Training throughput on one GPU from random weights: tokens/s, MFU and peak memory of a whole step.

    python benchmarks/bench_train_gpu.py                                    # Qwen2.5-0.5B and 1.5B shapes
    python benchmarks/bench_train_gpu.py --cases 0.5B --providers afina transformers-sdpa

A step is the engine's own: `accumulate` over one micro-batch of dense rows of 1,024 tokens, clipping, AdamW with fp32
master weights; bf16. Providers: afina (Triton), afina-torch (AFINA_BACKEND=torch), and transformers' model of the
same shapes under the same optimizer, with its scaled_dot_product_attention, with eager attention, and patched by
Liger. Where a batch does not fit, half of it is tried, and the case says so. MFU: 6 operations a parameter and token
and attention's products, over the measured rate of a bf16 matrix product (what `ceiling_tflops` names), not the data
sheet's. On a CPU a tiny model, in fp32.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from json import dumps
from typing import Any, NamedTuple

import costs
import torch
from harness import DEVICE, GPU, Unavailable, ceilings, one_line, tail
from torch import Tensor, nn

from afina.engine.config import ModelConfig
from afina.engine.model import GPT
from afina.engine.optim import AdamW
from afina.engine.train import accumulate
from afina.loaders.batches import MicroBatch

RATE = 1e-4


class Shape(NamedTuple):
    config: dict[str, Any]
    rows: int
    length: int


def qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int = 151_936) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "vocab_size": vocab,
    }


SHAPES = {
    "gpu": {
        "Qwen2.5-0.5B": Shape(qwen(896, 4864, 24, 14, 2), 16, 1024),
        "Qwen2.5-1.5B": Shape(qwen(1536, 8960, 28, 12, 2), 8, 1024),
    },
    "cpu": {"tiny": Shape(qwen(64, 160, 2, 4, 2, 512), 4, 64)},
}


class Engine(NamedTuple):
    """A step on a batch of ids on the CPU -> the loss, a tensor; and how many parameters it trains."""

    step: Callable[[Tensor], Tensor]
    parameters: int


def afina(config: dict[str, Any]) -> Engine:
    model = GPT(ModelConfig.from_hf(config), device="meta", dtype=dtype()).to_empty(device=DEVICE)
    initialise(model)
    optimizer = AdamW(model.train(), decay=model.decay_parameters())

    def step(ids: Tensor) -> Tensor:
        batch = MicroBatch(ids, ids, None, list(range(len(ids))), ids[:, 1:].numel(), ids.numel())
        return finished(optimizer, accumulate(model, [batch]))

    return Engine(step, model.num_parameters())


def peer(config: dict[str, Any], attention: str, liger: bool = False) -> Engine:
    from transformers import AutoConfig, AutoModelForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    fields = {name: value for name, value in config.items() if name != "model_type"}
    hf = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(hf, dtype=dtype(), attn_implementation=attention)
    model.config.use_cache = False
    initialise(model)
    decay = {name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name}
    optimizer = AdamW(model.train(), decay=decay)

    def step(ids: Tensor) -> Tensor:
        ids = ids.to(DEVICE, non_blocking=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return finished(optimizer, loss.detach())

    return Engine(step, sum(p.numel() for p in model.parameters()))


PROVIDERS: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "afina": afina,
    "afina-torch": afina,
    "transformers-sdpa": lambda config: peer(config, "sdpa"),
    "transformers-eager": lambda config: peer(config, "eager"),
    "transformers-liger": lambda config: peer(config, "sdpa", liger=True),  # last: it patches transformers for good
}


def dtype() -> torch.dtype:
    return torch.bfloat16 if GPU else torch.float32


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Where the model is: drawn on a CPU, a billion weights take a minute."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


def finished(optimizer: AdamW, loss: Tensor) -> Tensor:
    optimizer.clip_(1.0)
    optimizer.step(RATE)
    optimizer.zero_grad()
    return loss


def measure(provider: str, shape: Shape, rows: int, warmup: int, seconds: float) -> dict[str, Any]:
    """Steps for about so many seconds. Each ends with its loss on the CPU, as the engine's own loop has it."""
    engine = PROVIDERS[provider](shape.config)
    generator = torch.Generator().manual_seed(1)
    # The same rows each step, so that the loss must fall.
    ids = torch.randint(shape.config["vocab_size"], (rows, shape.length), generator=generator)
    losses = [engine.step(ids).item() for _ in range(warmup)]
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    steps = 0
    while steps < 3 or (steps < 100 and time.perf_counter() - started < seconds):
        losses.append(engine.step(ids).item())
        steps += 1
    taken = time.perf_counter() - started
    first, last = losses[0], losses[-1]
    if not last < first:  # NaN is not
        raise Unavailable(f"wrong: the loss went from {first:.4f} to {last:.4f} on the same rows")
    tokens = steps * rows * shape.length / taken
    config = shape.config
    dim = config["hidden_size"] // config["num_attention_heads"]
    flops = costs.training_flops(
        engine.parameters, config["num_hidden_layers"], config["num_attention_heads"], dim, shape.length
    )
    peak = ceilings()
    row: dict[str, Any] = {"ms": round(1e3 * taken / steps, 3), "steps": steps, "tokens_per_second": round(tokens, 1)}
    row |= {"parameters": engine.parameters, "flops_per_token": round(flops), "tflops": round(tokens * flops / 1e12, 2)}
    row["mfu"] = None if peak is None else round(tokens * flops / peak.tflops / 1e12, 4)
    row["ceiling_tflops"] = None if peak is None else round(peak.tflops, 1)
    row["peak"] = None if peak is None else "bf16 matrix product of 8192^3, measured"
    row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6) if GPU else None
    return row | {"loss_first": round(first, 4), "loss_last": round(last, 4)}


def run(name: str, shape: Shape, provider: str, warmup: int, seconds: float) -> dict[str, Any]:
    """Measure, with half the rows as long as they do not fit."""
    row: dict[str, Any] = {"op": "train", "case": f"{name} {shape.rows}x{shape.length}", "pass": "step"}
    row |= {"provider": provider, "dtype": str(dtype()).removeprefix("torch.")}
    before = os.environ.get("AFINA_BACKEND")
    if provider == "afina-torch":
        os.environ["AFINA_BACKEND"] = "torch"
    elif provider == "afina" and GPU:
        os.environ["AFINA_BACKEND"] = "triton"
    rows = shape.rows
    try:
        while True:
            try:
                found = measure(provider, shape, rows, warmup, seconds)
                return row | {"rows": rows, "length": shape.length} | found | tail()
            except torch.OutOfMemoryError as problem:
                reason = one_line(problem)
            _release()
            if rows == 1:
                return row | {"skipped": reason} | tail()
            rows //= 2
    # What a peer may raise is not known, and its failure is a result: it is written down.
    except Exception as problem:
        return row | {"skipped": str(problem) if isinstance(problem, Unavailable) else one_line(problem)} | tail()
    finally:
        os.environ.pop("AFINA_BACKEND", None)
        if before is not None:
            os.environ["AFINA_BACKEND"] = before
        _release()


def _release() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="WORD", help="only models whose name holds one of these"
    )
    parser.add_argument("--providers", nargs="+", default=[], choices=PROVIDERS, metavar="NAME", help="only these")
    parser.add_argument("--without", nargs="+", default=[], choices=PROVIDERS, metavar="NAME", help="all but these")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    shapes = SHAPES["gpu" if GPU else "cpu"]
    chosen = {
        name: shape for name, shape in shapes.items() if not args.cases or any(word in name for word in args.cases)
    }
    if not chosen:
        parser.error(f"no model holds {' or '.join(args.cases)}: there are {', '.join(shapes)}")
    for provider in PROVIDERS:
        if provider in args.without or (args.providers and provider not in args.providers):
            continue
        for name, shape in chosen.items():
            if time.monotonic() > deadline:
                row = {"op": "train", "case": f"{name} {shape.rows}x{shape.length}", "pass": "step"}
                print(dumps(row | {"provider": provider, "skipped": "time limit"} | tail()), flush=True)
                continue
            print(dumps(run(name, shape, provider, 2, 1.0 if args.quick or not GPU else 3.0)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
