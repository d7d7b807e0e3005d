"""Which learning rate a model wants: the dev loss after the same short run at several rates.

    python benchmarks/bench_rates.py support [--model afina-tiny] [--methods full lora] [--steps 150]

support: the package's customer support. banking77, sst2: 1,200 rows of each (a question and its intent, a review and
its sentiment), and 100 others held out, chosen by a fixed seed. Every run has the same rows in the same order, batches
of 8, and the cosine schedule over ``--steps``; a run whose loss is not finite three times is "diverged". One JSON line
a run goes to standard output.
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

import afina
from afina.engine.nonfinite import NonFiniteError

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"
RATES = {
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
ROWS, HELD_OUT = 1200, 100


def rows_of(task: str) -> list[dict[str, object]]:
    if task == "banking77":
        with (DATA / "support" / "banking77.csv").open(newline="", encoding="utf-8") as file:
            pairs = [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]
    else:
        with (DATA / "sentiment" / "sst2_train.tsv").open(newline="", encoding="utf-8") as file:
            read = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            pairs = [(text, ("negative", "positive")[int(label)]) for text, label in read]
    random.Random(7).shuffle(pairs)
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
        for text, answer in pairs[: ROWS + HELD_OUT]
    ]


def write(folder: Path, task: str) -> dict[str, Path]:
    """The training and dev files of a task."""
    if task == "support":
        support = REPO / "afina" / "data" / "support"
        return {"data": support / "train.jsonl", "val_file": support / "dev.jsonl"}
    rows = rows_of(task)
    files = {"data": folder / "train.jsonl", "val_file": folder / "dev.jsonl"}
    for path, part in zip(files.values(), (rows[HELD_OUT:], rows[:HELD_OUT])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("support", "banking77", "sst2"))
    parser.add_argument("--model", default="afina-tiny")
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of RATES")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--evals", type=int, default=3, help="times that the dev loss is measured; the best counts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.task != "support" and not DATA.is_dir():
        sys.exit(f"no real data at {DATA}")
    for method in args.methods:
        for rate in args.rates or RATES[method]:
            with tempfile.TemporaryDirectory() as folder:
                line = {"command": " ".join(["python", "benchmarks/bench_rates.py", *sys.argv[1:]]), "task": args.task}
                line |= {"model": args.model, "method": method, "learning_rate": rate, "steps": args.steps}
                try:
                    metrics = afina.finetune(
                        model=args.model,
                        output_dir=Path(folder) / "run",
                        **write(Path(folder), args.task),
                        method=method,
                        learning_rate=rate,
                        max_steps=args.steps,
                        max_length=256,
                        save_steps=100_000,
                        eval_steps=-(-args.steps // args.evals),
                        threads=args.threads,
                        quiet=True,
                    ).metrics
                    line |= {
                        key: metrics[key] for key in ("dev_loss_before", "dev_loss", "train_loss", "train_seconds")
                    }
                except NonFiniteError:
                    line["diverged"] = True
            print(json.dumps(line | {"versions": {p: version(p) for p in ("afina", "torch")}}), flush=True)


if __name__ == "__main__":
    main()
