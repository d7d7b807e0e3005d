"""The methods beside each other: all weights, LoRA, DoRA, QLoRA and the upper layers alone, in the same steps.

    python benchmarks/bench_methods.py banking77 [--methods full lora qlora freeze] [--epochs 3]
    python benchmarks/bench_methods.py gsm8k [--epochs 1]

banking77: a question -> its intent (one of 77), right when the name is written exactly. gsm8k: a question -> its worked
answer, right when the number after #### is. 1,000 and 500 rows chosen by a fixed seed are held out: their loss before
and after (the best of ten evaluations), and the share answered right. Every method has the same rows, batches, steps
and schedule, and the learning rate of ``RATES``. One JSON line a method goes to standard output.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import afina
from afina.engine.generate import complete, encode_prompt
from afina.engine.sampling import Sampling
from afina.engine.scores import exact_match
from afina.engine.tasks import run_task
from afina.loaders.text.render import Example

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
HELD_OUT = {"banking77": 1000, "gsm8k": 500}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "lora+embeddings": {"method": "lora", "modules_to_save": ["embed_tokens"]},
    "dora": {"method": "lora", "use_dora": True},
    "qlora": {"method": "qlora"},
    "freeze": {"method": "freeze"},
}
# For a model as small as afina-tiny; large ones want the defaults.
RATES = {"full": 1.5e-3, "lora": 3e-3, "lora+embeddings": 3e-3, "dora": 3e-3, "qlora": 3e-3, "freeze": 1.5e-3}


def rows_of(task: str) -> list[dict[str, str]]:
    if task == "banking77":
        with (DATA / "support" / "banking77.csv").open(newline="", encoding="utf-8") as file:
            rows = [
                {"prompt": row["text"].strip() + "\n", "completion": row["category"]} for row in csv.DictReader(file)
            ]
    else:
        lines = (DATA / "math" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in map(json.loads, lines)]
    random.Random(77).shuffle(rows)
    return rows


def share_right(task: str, best: Path, held_out: list[dict[str, str]]) -> float:
    model, tokenizer = afina.load_model(best), afina.load_tokenizer(best)
    examples = [Example(**row) for row in held_out]
    if task == "banking77":
        return run_task(model, tokenizer, examples, "exact_match", intervals=False).metrics["exact_match"]
    prompts = [encode_prompt(model, tokenizer, example) for example in examples]
    answers = complete(model, tokenizer, prompts, Sampling(max_new_tokens=200))
    numbers = [done.text.rpartition("####")[2].strip() for done in answers]
    wanted = [row["completion"].rpartition("####")[2] for row in held_out]
    return sum(map(exact_match, numbers, wanted)) / len(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=HELD_OUT)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["full", "lora", "qlora", "freeze"])
    parser.add_argument("--model", default="afina-tiny")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, help="for all methods (default: RATES)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no real data at {DATA}")
    rows = rows_of(args.task)
    held_out, train = rows[: HELD_OUT[args.task]], rows[HELD_OUT[args.task] : 10_000]
    # A question that stands on both sides, word for word, would be a gift.
    asked = {row["prompt"] for row in held_out}
    train = [row for row in train if row["prompt"] not in asked]
    for name in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            files = {"data": Path(folder) / "train.jsonl", "val_file": Path(folder) / "dev.jsonl"}
            for path, part in zip(files.values(), (train, held_out)):
                path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            rank = {} if METHODS[name]["method"] in ("full", "freeze") else {"lora_r": args.lora_r}
            result = afina.finetune(
                model=args.model,
                output_dir=Path(folder) / "run",
                **files,
                **METHODS[name],
                **rank,
                epochs=args.epochs,
                batch_size=args.batch_size,
                learning_rate=args.learning_rate or RATES[name],
                max_length=448,
                threads=args.threads,
            )
            right = share_right(args.task, result.best, held_out)
            size = sum(path.stat().st_size for path in result.best.glob("*.safetensors"))
        line = {"command": " ".join(["python", "benchmarks/bench_methods.py", *sys.argv[1:]]), "task": args.task}
        line |= {"method": name, **rank, "learning_rate": args.learning_rate or RATES[name], "train_rows": len(train)}
        line |= {key: result.metrics[key] for key in ("steps", "dev_loss_before", "dev_loss", "train_seconds")}
        line |= {"held_out_rows": len(held_out), "exact_match": round(right, 4), "best_bytes": size}
        print(json.dumps(line | {"versions": {p: version(p) for p in ("afina", "torch")}}), flush=True)


if __name__ == "__main__":
    main()
