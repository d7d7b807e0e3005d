"""Training throughput and memory beside transformers' Trainer: same weights, rows, order, optimizer and threads.

    python benchmarks/bench_train.py dense               # 8 x 256 tokens of running text a step
    python benchmarks/bench_train.py short               # prompt/completion rows (text -> intent), 32 a step
    python benchmarks/bench_train.py dense --model random-50k --steps 10       # 18 M weights, GPT-2's vocabulary

Ours is `afina.finetune` itself; theirs is Trainer on the rows that ours takes, padded to the longest row of each batch.
Each engine runs in a process of its own, in turn (A B A B ...). Timed are the training steps after the first
``--warmup``, from a batch's tokens to the moved weights, not evaluation or saving. Memory is the peak of the resident
set while training above its size with the model loaded. One JSON line a run goes to standard output, and a last line
with the ratios (ours / theirs).
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"
RANDOM_50K = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 50257,
}
CASES = {"dense": {"batch_size": 8, "max_length": 256}, "short": {"batch_size": 32, "max_length": 256}}


def settings(case: str, model: str, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """The settings of the run, with its data written to ``folder``."""
    size = CASES[case]
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
        "dtype": "float32",
        "device": "cpu",
        "threads": threads,
    }


def make_random_50k(folder: Path) -> str:
    """A small Llama of random weights with a vocabulary of the usual size: the head weighs what it does elsewhere."""
    import afina
    from afina.engine.weights import new_model

    tokenizer = afina.load_tokenizer(DATA / "tokenizers" / "gpt2")
    afina.save_model(new_model(RANDOM_50K, vocab_size=tokenizer.vocab_size, seed=0), tokenizer, folder)
    return str(folder)


class Memory:
    """Peak resident set since ``start``, above what was resident then, in MB (Linux)."""

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.base = self._read("VmRSS")

    def peak_above(self) -> float:
        return (self._read("VmHWM") - self.base) / 1e3

    @staticmethod
    def _read(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


def train_afina(config: dict[str, Any]) -> dict[str, Any]:
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
        "memory_mb": memory.peak_above(),
    }


def train_peer(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' Trainer with its default optimizer (fused AdamW) on the micro-batches that ours would take."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from afina.loaders.batches import Batches
    from afina.loaders.dataset import prepare
    from afina.loaders.hub import resolve
    from afina.loaders.tokenizer import load_tokenizer

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
    model = AutoModelForCausalLM.from_pretrained(resolve(config["model"]), dtype=torch.float32)
    model.config.use_cache = False
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

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=config["learning_rate"],
            lr_scheduler_type=config["lr_scheduler_type"],
            weight_decay=config["weight_decay"],
            max_grad_norm=config["max_grad_norm"],
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
    return {"losses": losses, "seconds": seconds, "memory_mb": memory.peak_above()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--model", default="afina-tiny", help="folder, hub id, afina-tiny or random-50k")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=("afina", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps((train_afina if args.worker == "afina" else train_peer)(args.settings)))
        return
    if not DATA.is_dir():
        sys.exit(f"no real data at {DATA}")
    runs: dict[str, list[dict[str, Any]]] = {"afina": [], "peer": []}
    models = tempfile.TemporaryDirectory()
    model = make_random_50k(Path(models.name)) if args.model == "random-50k" else args.model
    for _ in range(args.repeats):
        for name, results in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                config = settings(args.case, model, Path(folder), args.steps, args.threads)
                command = [sys.executable, __file__, args.case, "--worker", name, "--settings", json.dumps(config)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            run = json.loads(done.stdout.splitlines()[-1])
            run["tokens"] = run.get("tokens") or runs["afina"][0]["tokens"]
            seconds = sum(run["seconds"][args.warmup :])
            run["tokens_per_second"] = sum(run["tokens"][args.warmup :]) / seconds
            run["rows_per_second"] = (args.steps - args.warmup) * CASES[args.case]["batch_size"] / seconds
            results.append(run)
            shown = {k: round(run[k], 1) for k in ("tokens_per_second", "rows_per_second", "memory_mb")}
            print(json.dumps({"engine": name, "case": args.case, **shown}), flush=True)
    pairs = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs["afina"], runs["peer"])]
    memory = [statistics.median(run["memory_mb"] for run in results) for results in runs.values()]
    first = [run["losses"][:20] for run in (runs["afina"][0], runs["peer"][0])]
    print(
        json.dumps(
            {
                "command": " ".join(["python", "benchmarks/bench_train.py", *sys.argv[1:]]),
                "case": args.case,
                "model": args.model,
                "speed_ratio_median": round(statistics.median(pairs), 3),
                "speed_ratio_pairs": [round(p, 3) for p in pairs],
                "memory_ratio": round(memory[0] / memory[1], 3),
                "largest_loss_difference_first_20": max(abs(a - b) for a, b in zip(*first)),
                "threads": args.threads,
                "machine": platform.processor() or platform.machine(),
                "versions": {p: version(p) for p in ("afina", "torch", "transformers", "accelerate")},
            }
        )
    )


if __name__ == "__main__":
    main()
