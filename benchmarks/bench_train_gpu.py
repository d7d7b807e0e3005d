"""Training throughput on one GPU from random weights: tokens/s, MFU and peak memory of a whole step.

    python benchmarks/bench_train_gpu.py                                    # Qwen2.5-0.5B and 1.5B shapes
    python benchmarks/bench_train_gpu.py --cases 0.5B --providers afina transformers-sdpa
    python benchmarks/bench_train_gpu.py --methods lora qlora               # and Llama-3-8B, beside PEFT
    python benchmarks/bench_train_gpu.py --methods lora qlora --cases 8B --providers afina

A step is the engine's own: `accumulate` over one micro-batch, clipping, AdamW with fp32 master weights; bf16. Full
training takes dense rows of 1,024 tokens; lora and qlora take packed documents of 2,048 tokens, two a step, with
adapters of rank 16 on all linear layers, and Llama-3-8B's rows say what it has to reach on an H200 (`target`). The
cases "524k" are LLM.Q's: 524,288 tokens a step in micro-batches, bf16 weights and moments, ours alone.
Providers: afina (Triton), the same as CUDA graphs (afina-graph, its rows packed), afina-torch (AFINA_BACKEND=torch),
and transformers' model of the same shapes under the same optimizer, with its scaled_dot_product_attention, with eager
attention, and patched by Liger; for adapters PEFT on that model, with Liger too, over bitsandbytes' NF4 for qlora.
Peers' adapters are held as ours are, in bf16 beside the optimizer's fp32, which spares them PEFT's casts. Where a batch
does not fit, half of it is tried, and the case says so. MFU: 6 operations a trained parameter and token, 4 a frozen
one, and attention's products, none of it counted twice where it is recomputed, over the measured rate of a bf16 matrix
product (what `ceiling_tflops` names), not the data sheet's. On a CPU tiny models, in fp32.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from json import dumps
from typing import Any, NamedTuple

import costs
import torch
from harness import DEVICE, GPU, Unavailable, ceilings, one_line, tail
from torch import Tensor, nn

from afina.engine.buckets import StaticInputs
from afina.engine.captured import CudaGraph, Shared
from afina.engine.known_models import KNOWN
from afina.engine.linear import Linear
from afina.engine.lora import linears, new_adapter
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.nf4_weight import NF4Weight
from afina.engine.optim import AdamW
from afina.engine.step_graph import GraphedStep
from afina.engine.training_step import accumulate
from afina.kernels.nf4 import quantize_nf4
from afina.kernels.selftest import verify
from afina.loaders.data.batches import MicroBatch
from afina.loaders.weights.peft import AdapterConfig

RATES = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}  # so that a few steps lower the loss by more than bf16's rounding
RANK, ALPHA = 16, 32


class Shape(NamedTuple):
    config: dict[str, Any]
    rows: int
    length: int
    method: str = "full"
    checkpointing: bool = False
    target: dict[str, float] | None = None  # what ours has to reach
    micro_batches: int = 1  # in a step
    optim: str = "adamw"


TARGETS = {
    "lora": {"tokens_per_second": 13_000, "peak_mb": 30_000},
    "lora+checkpointing": {"peak_mb": 19_000},
    "qlora+checkpointing": {"peak_mb": 12_000, "speed_of_lora": 0.85},
}


def adapted(name: str, config: dict[str, Any], rows: int, length: int, targets: bool = False) -> dict[str, Shape]:
    """A model's shapes with adapters: name -> shape."""
    return {
        f"{name} {policy}": Shape(
            config,
            rows,
            length,
            policy.partition("+")[0],
            policy.endswith("+checkpointing"),
            target if targets else None,
        )
        for policy, target in TARGETS.items()
    }


QWEN = {"Qwen2.5-0.5B": KNOWN["qwen2.5-0.5b"], "Qwen2.5-1.5B": KNOWN["qwen2.5-1.5b"]}
LLAMA_8B = KNOWN["llama-3-8b"]
TINY = QWEN["Qwen2.5-0.5B"] | {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def like_llmq(name: str, rows: int, length: int, micro_batches: int, speed: float | None) -> dict[str, Shape]:
    """LLM.Q's settings: steps of 524,288 tokens, bf16 weights and moments; its speed on an H100 is to be reached."""
    target = None if speed is None else {"tokens_per_second": speed}
    shape = Shape(QWEN.get(name, TINY), rows, length, target=target, micro_batches=micro_batches)
    return {f"{name} 524k": shape._replace(optim="adamw_bf16" if GPU else "adamw_8bit")}


SHAPES = {
    "gpu": {
        "Qwen2.5-0.5B": Shape(QWEN["Qwen2.5-0.5B"], 16, 1024),
        "Qwen2.5-0.5B small": Shape(QWEN["Qwen2.5-0.5B"], 1, 1024),  # the host's launches are what takes time
        "Qwen2.5-1.5B": Shape(QWEN["Qwen2.5-1.5B"], 8, 1024),
        **like_llmq("Qwen2.5-0.5B", 16, 1024, 32, 150_000),
        **like_llmq("Qwen2.5-1.5B", 8, 1024, 64, 60_000),
        **adapted("Llama-3-8B", LLAMA_8B, 2, 2048, targets=True),
        **adapted("Qwen2.5-1.5B", QWEN["Qwen2.5-1.5B"], 2, 2048),
        **adapted("Qwen2.5-0.5B", QWEN["Qwen2.5-0.5B"], 2, 2048),
    },
    "cpu": {
        "tiny": Shape(TINY, 4, 64),
        **like_llmq("tiny", 2, 64, 2, None),
        **adapted("tiny-llama", TINY | {"model_type": "llama", "tie_word_embeddings": False}, 2, 32),
        **adapted("tiny", TINY, 2, 32),
    },
}


class Engine(NamedTuple):
    """A step on a batch of ids on the CPU -> the loss, a tensor; and how many parameters it trains."""

    step: Callable[[Tensor], Tensor]
    trained: int


def graphed(model: GPT, optimizer: AdamW, micro_batches: int) -> Callable[[MicroBatch, float], Tensor]:
    """A step of so many times the batch by CUDA graphs, as the engine takes it."""
    if not GPU:
        raise Unavailable("a CUDA graph needs a GPU")
    told: list[str] = []

    def loss(static: StaticInputs) -> Tensor:
        ids, spans, targets, weights, _ = static.inputs
        return model.weighted_loss(ids, targets, weights, spans=spans, positions=static.positions)

    steps = GraphedStep(
        optimizer,
        loss=loss,
        reference=lambda batch: accumulate(model, [batch]),
        max_grad_norm=1.0,
        dtype=dtype(),
        graph=partial(CudaGraph, Shared.on(DEVICE)),
        log=told.append,
        passed=lambda: None,
    )

    def step(batch: MicroBatch, lr: float) -> Tensor:
        figures = steps.update([batch] * micro_batches, lr, poll=lambda: None, settle=lambda: None)
        if figures is None:
            raise Unavailable(told[0] if told else "no graph holds this batch")
        return figures[0]

    return step


def afina(shape: Shape, graph: bool = False) -> Engine:
    if DEVICE.type == "cuda":
        print("the kernels' self-test: its first compilation takes 35 to 40 s", file=sys.stderr, flush=True)
        verify(DEVICE)  # as loading a model does
    model = GPT(ModelConfig.from_hf(shape.config), device="meta", dtype=dtype())
    model.hf_config = shape.config
    if shape.method == "qlora":
        quantize(model)
    model.to_empty(device=DEVICE)
    initialise(model)
    if shape.method != "full":
        new_adapter(model, AdapterConfig(r=RANK, alpha=ALPHA), targets=["all-linear"], seed=0)
    model.gradient_checkpointing = shape.checkpointing
    decay = model.decay_parameters() if shape.method == "full" else set()
    optimizer = AdamW(model.train(), decay=decay, variant=shape.optim)

    graphs = graphed(model, optimizer, shape.micro_batches) if graph else None

    def step(ids: Tensor) -> Tensor:
        rows, length = ids.shape
        starts = None
        if shape.method != "full" or graph:
            ids, starts = ids.view(1, -1), torch.arange(rows + 1, dtype=torch.int32) * length
        batch = MicroBatch(ids, ids, starts, list(range(rows)), rows * (length - 1), ids.numel())
        if graphs is not None:
            return graphs(batch, RATES[shape.method])
        return finished(optimizer, accumulate(model, [batch] * shape.micro_batches), RATES[shape.method])

    return Engine(step, trained(model))


@torch.no_grad()
def quantize(model: GPT) -> None:
    """Random NF4 weights where a model on meta has matrices in its layers: drawn and quantised one at a time, each of
    the checkpoint's on its own as the loader does, so that no dense model is ever there."""
    torch.manual_seed(0)
    parts: dict[str, list[tuple[int, int, Tensor, Any]]] = {}
    for target in linears(model).values():
        rows, width = target.stop - target.start, model.get_submodule(target.ours).in_features
        weight = torch.empty(rows, width, device=DEVICE, dtype=dtype()).normal_(0.0, 0.02)
        parts.setdefault(target.ours, []).append((target.start, target.stop, *quantize_nf4(weight)))
    for name, found in parts.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear)
        layer.hold(NF4Weight(found))


def peer(shape: Shape, attention: str = "sdpa", liger: bool = False) -> Engine:
    from transformers import AutoConfig, AutoModelForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2

        {"llama": apply_liger_kernel_to_llama, "qwen2": apply_liger_kernel_to_qwen2}[shape.config["model_type"]]()
    fields = {name: value for name, value in shape.config.items() if name != "model_type"}
    hf = AutoConfig.for_model(shape.config["model_type"], **fields)
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(hf, dtype=dtype(), attn_implementation=attention)
    model.config.use_cache = False
    initialise(model)
    decay = {name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name}
    if shape.method != "full":
        model, decay = with_peft(model, quantized=shape.method == "qlora"), set()
    if shape.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = AdamW(model.train(), decay=decay)

    def step(ids: Tensor) -> Tensor:
        ids = ids.to(DEVICE, non_blocking=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return finished(optimizer, loss.detach(), RATES[shape.method])

    return Engine(step, trained(model))


def with_peft(model: Any, quantized: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    if quantized:
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, old in list(model.named_modules()):
            if not isinstance(old, nn.Linear) or name == "lm_head":
                continue
            size = (old.in_features, old.out_features)
            new = Linear4bit(*size, bias=old.bias is not None, compute_dtype=dtype(), quant_type="nf4", device="meta")
            new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
            new.bias = old.bias
            model.set_submodule(name, new.to(DEVICE))  # quantises
        model.is_loaded_in_4bit = True  # what PEFT asks
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


PROVIDERS: dict[str, Callable[[Shape], Engine]] = {
    "afina": afina,
    "afina-graph": lambda shape: afina(shape, graph=True),
    "afina-torch": afina,
    "transformers-sdpa": peer,
    "transformers-eager": lambda shape: peer(shape, "eager"),
    "peft": peer,
    "transformers-liger": lambda shape: peer(shape, liger=True),  # last: it patches transformers for good
    "peft-liger": lambda shape: peer(shape, liger=True),
}
ADAPTED = ("afina", "afina-graph", "peft", "peft-liger")  # of them, for lora and qlora


OURS = ("afina", "afina-graph")


def takes(provider: str, method: str) -> bool:
    return provider in ADAPTED if method != "full" else not provider.startswith("peft")


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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


def finished(optimizer: AdamW, loss: Tensor, rate: float) -> Tensor:
    optimizer.clip_(1.0)
    optimizer.step(rate)
    optimizer.zero_grad()
    return loss


def measure(provider: str, shape: Shape, rows: int, warmup: int, seconds: float) -> dict[str, Any]:
    """Steps for about so many seconds. Each ends with its loss on the CPU, as the engine's own loop has it."""
    engine = PROVIDERS[provider](shape)
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
    tokens = steps * rows * shape.length * shape.micro_batches / taken
    config = shape.config
    dim = config["hidden_size"] // config["num_attention_heads"]
    parameters = ModelConfig.from_hf(config).num_parameters()
    # An embedding that is no head as well is looked up, not multiplied.
    looked_up = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
    flops = costs.training_flops(
        engine.trained - (looked_up if shape.method == "full" else 0),
        config["num_hidden_layers"],
        config["num_attention_heads"],
        dim,
        shape.length,
        frozen=0 if shape.method == "full" else parameters - looked_up,
    )
    peak = ceilings()
    row: dict[str, Any] = {"ms": round(1e3 * taken / steps, 3), "steps": steps, "tokens_per_second": round(tokens, 1)}
    row |= {"parameters": parameters, "trained": engine.trained}
    row |= {"flops_per_token": round(flops), "tflops": round(tokens * flops / 1e12, 2)}
    row["mfu"] = None if peak is None else round(tokens * flops / peak.tflops / 1e12, 4)
    row["ceiling_tflops"] = None if peak is None else round(peak.tflops, 1)
    row["peak"] = None if peak is None else "bf16 matrix product of 8192^3, measured"
    row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6) if GPU else None  # with the weights
    return row | {"loss_first": round(first, 4), "loss_last": round(last, 4)}


def heading(name: str, shape: Shape, provider: str) -> dict[str, Any]:
    return {"op": "train", "case": f"{name} {shape.rows}x{shape.length}", "pass": "step", "provider": provider}


def run(name: str, shape: Shape, provider: str, warmup: int, seconds: float) -> dict[str, Any]:
    """Measure, with half the rows as long as they do not fit."""
    row = heading(name, shape, provider) | {"method": shape.method, "dtype": str(dtype()).removeprefix("torch.")}
    if provider == "afina" and shape.target:
        row["target"] = shape.target
    before = os.environ.get("AFINA_BACKEND")
    if provider == "afina-torch":
        os.environ["AFINA_BACKEND"] = "torch"
    elif provider in OURS and GPU:
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
    parser.add_argument(
        "--methods", nargs="+", default=["full"], choices=RATES, metavar="NAME", help="full, lora, qlora"
    )
    parser.add_argument("--providers", nargs="+", default=[], choices=PROVIDERS, metavar="NAME", help="only these")
    parser.add_argument("--without", nargs="+", default=[], choices=PROVIDERS, metavar="NAME", help="all but these")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    shapes = {name: shape for name, shape in SHAPES["gpu" if GPU else "cpu"].items() if shape.method in args.methods}
    chosen = {
        name: shape for name, shape in shapes.items() if not args.cases or any(word in name for word in args.cases)
    }
    if not chosen:
        parser.error(f"no model holds {' or '.join(args.cases)}: there are {', '.join(shapes)}")
    for provider in PROVIDERS:
        if provider in args.without or (args.providers and provider not in args.providers):
            continue
        speeds: dict[str, float] = {}
        for name, shape in chosen.items():
            if not takes(provider, shape.method) or (shape.micro_batches > 1 and provider not in OURS):
                continue
            if time.monotonic() > deadline:
                print(dumps(heading(name, shape, provider) | {"skipped": "time limit"} | tail()), flush=True)
                continue
            row = run(name, shape, provider, 2, 1.0 if args.quick or not GPU else 3.0)
            speeds[name] = row.get("tokens_per_second", math.nan)
            same = name.replace("qlora", "lora")  # under the same policy
            if shape.method == "qlora" and math.isfinite(ratio := speeds[name] / speeds.get(same, math.nan)):
                row["speed_of_lora"] = round(ratio, 3)
            print(dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
