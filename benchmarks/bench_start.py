"""From the command to the first training step, beside transformers' Trainer: whole processes, everything counted.

    python benchmarks/bench_start.py [--repeats 5] [--threads 1]

64 prompt/completion rows, `afina-tiny`, batches of 8, no evaluation before the first step in either. The clock runs
from the start of the interpreter to the end of the first step: imports, rows, tokens, weights, optimizer, step. Both
are started in turn (A B A B ...) on rows that no start before had, so ours has no tokens in its cache, and keep what
Python compiles, as by default. One JSON line goes to standard output: the median and the least seconds of both, of
`import torch` alone, and the median of the pairs' ratios (ours / theirs).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MODEL = REPO / "afina" / "data" / "afina-tiny"

OURS = """
import sys, time
from afina.engine import train
step = train.Run._settle
def settled(run):
    step(run)
    if run.progress.step == 1:
        print("first step", flush=True)
        import os; os._exit(0)
train.Run._settle = settled
train.Run._evaluate = lambda run: setattr(run.progress, "evaluated_step", run.progress.step)
train.finetune(model="afina-tiny", data=sys.argv[1], output_dir=sys.argv[2], max_steps=1, batch_size=8, val_size=0.125,
               threads=int(sys.argv[3]), report_to="none", quiet=True)
"""

THEIRS = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
torch.set_num_threads(int(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[4])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = []
for line in open(sys.argv[1]):
    row = json.loads(line)
    prompt, answer = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "completion"))
    rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    made = {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in batch]) for k, v in fill.items()}
    lengths = torch.tensor([len(row["input_ids"]) for row in batch])
    return made | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}
class First(TrainerCallback):
    def on_step_end(self, *_, **__):
        print("first step", flush=True)
        os._exit(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[4])
arguments = TrainingArguments(output_dir=sys.argv[2], max_steps=1, per_device_train_batch_size=8, report_to=[],
                              use_cpu=True, disable_tqdm=True)
Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[First()]).train()
"""


def seconds(code: str, *arguments: str, environment: dict[str, str]) -> float:
    """How long a fresh interpreter takes over ``code``, which has to reach its end."""
    began = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    took = time.perf_counter() - began
    if "first step" not in done.stdout:
        sys.exit(f"no first step: {done.stderr[-2000:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    taken: dict[str, list[float]] = {"afina": [], "transformers": [], "import torch": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.jsonl"
        shared = (str(data), str(folder / "run"), str(args.threads), str(MODEL))
        kept = {"AFINA_CACHE": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
        for repeat in range(args.repeats + 1):
            rows = [{"prompt": f"What is {n} and {n}?\n", "completion": f" It is {2 * n}."} for n in range(64)]
            rows[0]["prompt"] = f"Try number {repeat}.\n"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            runs = {
                "afina": seconds(OURS, shared[0], str(folder / f"run-{repeat}"), shared[2], environment=kept),
                "transformers": seconds(THEIRS, *shared, environment=kept),
                "import torch": seconds("import torch; print('first step')", environment=kept),
            }
            if repeat:  # the first one fills the disk's cache, and Python's
                for engine, took in runs.items():
                    taken[engine].append(took)
    ratios = [ours / theirs for ours, theirs in zip(taken["afina"], taken["transformers"], strict=True)]
    print(
        json.dumps(
            {
                "command": " ".join(["python", "benchmarks/bench_start.py", *sys.argv[1:]]),
                "seconds": {
                    engine: {"median": round(statistics.median(times), 2), "least": round(min(times), 2)}
                    for engine, times in taken.items()
                },
                "ratio": [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))],
                "load_average": round(os.getloadavg()[0], 1),
                "machine": platform.machine(),
                "versions": {name: version(name) for name in ("afina", "torch", "transformers")},
            }
        )
    )


if __name__ == "__main__":
    main()
