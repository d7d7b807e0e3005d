"""Training throughput and memory beside transformers' Trainer: same weights, rows, order, optimizer and threads.

    python benchmarks/bench_train.py dense               # 8 x 256 tokens of running text a step
    python benchmarks/bench_train.py short               # prompt/completion rows (text -> intent), 32 a step
    python benchmarks/bench_train.py dense --model random-50k --steps 10       # 18 M weights, GPT-2's vocabulary
    python benchmarks/bench_train.py dense --method lora                       # beside PEFT
    python benchmarks/bench_train.py dense --method qlora --steps 10           # beside PEFT on bitsandbytes' NF4
    python benchmarks/bench_train.py dense --method lora --model random-100m --steps 6 --warmup 1 --repeats 2
    python benchmarks/bench_train.py dense --dtype bfloat16 --peers all --warmup 8   # beside the best of four

Ours is `afina.finetune` itself; theirs is Trainer on the rows that ours takes, padded to the longest row of each
batch. With ``--method lora`` or ``qlora`` both have adapters of rank 16, alpha 32, on all linear layers of the body,
without dropout, and PEFT begins with the adapter that ours begins with: losses must agree. Each engine runs in a
process of its own, in turn (A B A B ...).

``--peers`` chooses what Trainer runs: ``float32``, ``bfloat16`` (the weights too, without fp32 masters: the fastest
that it has), each also ``compiled-`` by torch.compile, or ``all`` of these; the last line then has the ratio to the
best of all and to the best in our dtype, whatever the losses.

Timed are the training steps after the first ``--warmup``, from a batch's tokens to the moved weights, not evaluation
or saving. ``memory_mb`` is the peak of the resident set while training above its size with the model loaded,
``process_mb`` the peak of the whole process from its start on, with weights and libraries. One JSON line a run goes
to standard output, and a last line with the ratios (ours / theirs).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# Random weights with a vocabulary of the usual size: the head weighs what it does elsewhere. 18 M and 100 M weights.
RANDOM: dict[str, dict[str, Any]] = {
    "random-50k": LLAMA
    | {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 50257,
    },
    "random-100m": LLAMA
    | {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
CASES = {"dense": {"batch_size": 8, "max_length": 256}, "short": {"batch_size": 32, "max_length": 256}}
ADAPTER = {"lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0}  # on all-linear, the default
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": ADAPTER, "qlora": ADAPTER}
PACKAGES = {"full": [], "lora": ["peft"], "qlora": ["peft", "bitsandbytes"]}  # of the peer, beside transformers
PEERS = ("float32", "bfloat16", "compiled-float32", "compiled-bfloat16")


def settings(
    case: str,
    method: str,
    model: str,
    folder: Path,
    *,
    steps: int,
    threads: int,
    checkpointing: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The settings of the run, with its data written to ``folder``."""
    size = CASES[case] | METHODS[method]
    if case == "dense":
        data = folder / "data.txt"
        data.write_text((DATA / "text" / "tinyshakespeare.txt").read_text())
    else:
        data = folder / "data.jsonl"
        with (DATA / "support" / "banking77.csv").open(newline="") as source, data.open("w") as out:
            for row in csv.DictReader(source):
                out.write(json.dumps({"text": row["text"], "label": row["category"]}) + "\n")
    return size | {
        "model": model,
        "method": method,
        "gradient_checkpointing": checkpointing,
        "data": str(data),
        "output_dir": str(folder / "run"),
        "val_size": 0.01,
        "max_steps": steps,
        "eval_steps": 10**6,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "dtype": dtype,
        "device": "cpu",
        "threads": threads,
    }


def make_random(name: str, folder: Path) -> str:
    """Write a Llama of random weights, with GPT-2's tokenizer or, for a smaller vocabulary, afina-tiny's."""
    import afina
    from afina.engine.weights import new_model
    from afina.loaders.weights.hub import resolve

    config = RANDOM[name]
    tokenizer = afina.load_tokenizer(DATA / "tokenizers" / "gpt2")
    if tokenizer.vocab_size > config["vocab_size"]:
        tokenizer = afina.load_tokenizer(resolve("afina-tiny"))
    afina.save_model(new_model(config, seed=0), tokenizer, folder)
    return str(folder)


def first_adapter(config: dict[str, Any], folder: Path) -> str:
    """Write the adapter that a run of these settings begins with, for PEFT to begin with it too."""
    from afina.engine.lora import save_adapter
    from afina.engine.methods import choose_trained
    from afina.engine.train_config import TrainConfig
    from afina.engine.weights import load_model

    model = load_model(config["model"], dtype="float32", device=config["device"])
    choose_trained(TrainConfig.resolve(overrides=config), model)
    save_adapter(model, None, folder)
    return str(folder)


class Memory:
    """Peak resident set, in MB (Linux)."""

    def start(self) -> None:
        self.before = self._read("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.base = self._read("VmRSS")

    def peaks(self) -> dict[str, float]:
        """Since ``start``, above what was resident then; and of the process since it began."""
        peak = self._read("VmHWM")
        return {"memory_mb": (peak - self.base) * 1.024e-3, "process_mb": max(peak, self.before) * 1.024e-3}

    @staticmethod
    def _read(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


def train_afina(config: dict[str, Any], adapter: str | None, peer: str = "") -> dict[str, Any]:
    """``afina.finetune``, which makes the same ``adapter`` itself."""
    import afina
    from afina.engine.train import Run

    memory, loop = Memory(), Run.loop

    def watched(self: Run, *args: Any, **kwargs: Any) -> None:
        memory.start()
        loop(self, *args, **kwargs)

    Run.loop = watched  # type: ignore[method-assign]
    result = afina.finetune(quiet=True, **config)
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        "losses": [line["loss"] for line in steps],
        "seconds": [line["seconds"] for line in steps],
        "tokens": [line["tokens"] for line in steps],
        "trained_tokens": [line["trained_tokens"] for line in steps],
        **memory.peaks(),
    }


def peer_model(config: dict[str, Any], adapter: str | None, dtype: str) -> Any:
    """transformers' model in ``dtype``; with PEFT's adapter, and for qlora on matrices that bitsandbytes quantised."""
    import torch
    from transformers import AutoModelForCausalLM

    from afina.loaders.weights.hub import resolve

    options: dict[str, Any] = {}
    kind = getattr(torch, dtype)
    if config["method"] == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kind,
        )
    model = AutoModelForCausalLM.from_pretrained(resolve(config["model"]), dtype=kind, **options)
    model.config.use_cache = False
    if adapter is None:
        return model
    from peft import PeftModel, prepare_model_for_kbit_training

    if config["method"] == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer turns that on
    return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=dtype == "float32")


def train_peer(config: dict[str, Any], adapter: str | None, peer: str = "float32") -> dict[str, Any]:
    """transformers' Trainer with its default optimizer (fused AdamW) on the micro-batches that ours would take."""
    dtype = peer.removeprefix("compiled-")
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from afina.loaders.data.batches import Batches
    from afina.loaders.data.dataset import prepare
    from afina.loaders.text.source import load_tokenizer

    torch.set_num_threads(config["threads"])
    batch = config["batch_size"]
    options = {"max_length": config["max_length"], "on_long": "drop", "val_size": config["val_size"], "seed": 42}
    train = prepare(
        config["data"], load_tokenizer(config["model"]), train_on_prompt=False, progress=False, **options
    ).train
    batches = Batches(train, batch_size=batch, accumulation=1, seed=42, packing=False)
    rows: list[dict[str, list[int]]] = []
    for step in range(config["max_steps"]):
        (mb,) = batches.step(step)
        for ids, labels, row in zip(mb.input_ids.tolist(), mb.labels.tolist(), mb.rows):
            length = int(train.lengths[row])
            rows.append({"input_ids": ids[:length], "labels": labels[:length]})
    model = peer_model(config, adapter, dtype)
    losses: list[float] = []
    seconds: list[float] = []
    memory = Memory()

    def collate(part: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in part)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in part])

        lengths = torch.tensor([[len(row["input_ids"])] for row in part])
        mask = (torch.arange(longest) < lengths).long()
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    class Ordered(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    checkpointing: dict[str, Any] = {}
    if config["gradient_checkpointing"]:  # not reentrant: with adapters the embeddings have no gradient
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=config["learning_rate"],
            lr_scheduler_type=config["lr_scheduler_type"],
            weight_decay=config["weight_decay"],
            max_grad_norm=config["max_grad_norm"],
            **checkpointing,
            torch_compile=peer != dtype,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Ordered(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
        memory.start()
        trainer.train()
    return {"losses": losses, "seconds": seconds, **memory.peaks()}


def worker(engine: str) -> Callable[..., dict[str, Any]]:
    return train_afina if engine == "afina" else train_peer


def missing(method: str) -> list[str]:
    return [name for name in ("transformers", "accelerate", *PACKAGES[method]) if find_spec(name) is None]


def ratios(ours: list[float], theirs: list[float], name: str) -> dict[str, Any]:
    """Of each pair of runs, and their median."""
    pairs = [a / b for a, b in zip(ours, theirs)]
    return {
        f"{name}_ratio_median": round(statistics.median(pairs), 3),
        f"{name}_ratio_pairs": [round(p, 3) for p in pairs],
    }


def compared(runs: dict[str, list[dict[str, Any]]], dtype: str) -> dict[str, Any]:
    """Ours beside the fastest of the peers; with several, also beside the fastest in our ``dtype``."""
    speeds = {
        name: statistics.median(run["tokens_per_second"] for run in results)
        for name, results in runs.items()
        if name != "afina"
    }
    best = max(speeds, key=lambda name: speeds[name])
    facts: dict[str, Any] = {"peer": best}
    for key, name in (("tokens_per_second", "speed"), ("memory_mb", "memory"), ("process_mb", "process_memory")):
        facts |= ratios(*([one[key] for one in runs[engine]] for engine in ("afina", best)), name)
    first = [runs[engine][0]["losses"][:20] for engine in ("afina", best)]
    facts["largest_loss_difference_first_20"] = max(abs(a - b) for a, b in zip(*first))
    if len(speeds) > 1:
        ours = statistics.median(run["tokens_per_second"] for run in runs["afina"])
        facts["speed_ratios"] = {name: round(ours / speed, 3) for name, speed in speeds.items()}
        alike = [ratio for name, ratio in facts["speed_ratios"].items() if name.removeprefix("compiled-") == dtype]
        facts |= {"speed_ratio_same_dtype": min(alike)} if alike else {}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--method", choices=METHODS, default="full")
    parser.add_argument("--model", default="afina-tiny", help=f"folder, hub id, afina-tiny, {' or '.join(RANDOM)}")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--peers", nargs="+", choices=(*PEERS, "all"), default=["float32"], help="what Trainer runs")
    parser.add_argument("--worker", choices=("afina", *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker)(*args.settings, args.worker)))
        return
    if not DATA.is_dir():
        sys.exit(f"no real data at {DATA}")
    engines = ["afina", *(PEERS if "all" in args.peers else dict.fromkeys(args.peers))]
    if lacking := missing(args.method):
        engines = ["afina"]
        print(json.dumps({"engine": "peer", "skipped": f"not installed: {', '.join(lacking)}"}), flush=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory() as models:
        model = make_random(args.model, Path(models, "model")) if args.model in RANDOM else args.model
        for _ in range(args.repeats):
            for name, results in runs.items():
                results.append(run(args, name, model, runs["afina"][0] if runs["afina"] else None))
    facts: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/bench_train.py", *sys.argv[1:]]),
        "case": args.case,
        "method": args.method,
        "model": args.model,
        "dtype": args.dtype,
    }
    if len(runs) > 1:
        facts |= compared(runs, args.dtype)
    packages = [name for name in ("transformers", "accelerate", *PACKAGES[args.method]) if find_spec(name)]
    facts |= {
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("afina", "torch", *packages)},
    }
    print(json.dumps(facts))


def run(args: argparse.Namespace, engine: str, model: str, first: dict[str, Any] | None) -> dict[str, Any]:
    """One engine in a process of its own. ``first``: ours, which counts the tokens for both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(
            args.case,
            args.method,
            model,
            folder,
            steps=args.steps,
            threads=args.threads,
            checkpointing=args.gradient_checkpointing,
            dtype=args.dtype,
        )
        adapter = first_adapter(config, folder / "adapter") if engine != "afina" and METHODS[args.method] else None
        command = [sys.executable, __file__, args.case, "--worker", engine, "--settings", json.dumps([config, adapter])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    counted, seconds = first or result, sum(result["seconds"][args.warmup :])
    for key in ("tokens", "trained_tokens"):
        result[f"{key}_per_second"] = sum(counted[key][args.warmup :]) / seconds
    result["rows_per_second"] = (args.steps - args.warmup) * CASES[args.case]["batch_size"] / seconds
    keys = ("tokens_per_second", "trained_tokens_per_second", "rows_per_second", "memory_mb", "process_mb")
    shown = {key: round(result[key], 1) for key in keys}
    print(json.dumps({"engine": engine, "case": args.case, "method": args.method, **shown}), flush=True)
    return result


if __name__ == "__main__":
    main()
