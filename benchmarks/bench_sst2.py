"""Sentiment with a real model: SmolLM2-135M-Instruct on SST-2 before and after LoRA, beside TF-IDF + LR.

    afina fetch smollm2-135m-instruct
    python benchmarks/bench_sst2.py [--rows 540] [--epochs 1] [--learning_rate 5e-4] [--model M] [--output_dir DIR]

The first rows of SST-2's training file, chosen by a fixed seed, as questions and one-word answers in the model's own
chat template; 200 rows of its dev file are held out. An answer counts as right when it is exactly the word. Before and
after come with Wilson's 95 % intervals. One JSON line goes to standard output.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import afina
from afina.engine.tasks import run_task
from afina.loaders.text.render import Example

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "sentiment"
HELD_OUT = 200
ASK = "Is this review positive or negative? Answer with one word.\n\n"
WORDS = ("negative", "positive")


def read(name: str) -> list[tuple[str, str]]:
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        rows = [(text, WORDS[int(label)]) for text, label in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    random.Random(2).shuffle(rows)
    return rows


def messages(text: str, word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": ASK + text}, {"role": "assistant", "content": word}]


def interval(share: float, count: int, z: float = 1.96) -> list[float]:
    """Wilson's interval for a share of ``count`` (Wilson 1927)."""
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [round((middle + sign * half) / (1 + z * z / count), 4) for sign in (-1, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=540)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--output_dir", help="keep the run here (default: a temporary folder)")
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no real data at {DATA}")
    held_out = read("sst2_dev.tsv")[:HELD_OUT]
    train = [row for row in read("sst2_train.tsv") if row[0] not in {text for text, _ in held_out}][: args.rows]

    baseline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30.0))
    baseline.fit([text for text, _ in train], [word for _, word in train])
    simpler = baseline.score([text for text, _ in held_out], [word for _, word in held_out])

    tokenizer = afina.load_tokenizer(args.model)
    examples = [Example(messages=tuple(messages(*row))) for row in held_out]

    def right(source: str | Path) -> float:
        model = afina.load_model(source)
        found = run_task(model, tokenizer, examples, "exact_match", max_new_tokens=8, intervals=False)
        return found.metrics["exact_match"]

    before = right(args.model)
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("train", train), ("dev", held_out)):
            lines = [json.dumps({"messages": messages(*row)}) + "\n" for row in rows]
            (Path(folder) / f"{name}.jsonl").write_text("".join(lines))
        started = time.perf_counter()
        result = afina.finetune(
            model=args.model,
            data=f"{folder}/train.jsonl",
            output_dir=args.output_dir or f"{folder}/run",
            method="lora",
            lora_r=16,
            max_length=256,
            batch_size=8,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            val_size=0.1,
            eval_steps=1000,
        )
        seconds = time.perf_counter() - started
        after = right(result.best)
    print(
        json.dumps(
            {
                "command": " ".join(["python", "benchmarks/bench_sst2.py", *sys.argv[1:]]),
                "train_rows": len(train),
                "held_out_rows": len(held_out),
                "exact_match_before": before,
                "interval_before": interval(before, len(held_out)),
                "exact_match": after,
                "interval": interval(after, len(held_out)),
                "tfidf_logistic_regression": round(simpler, 4),
                "seconds": round(seconds, 1),
                "tokens_per_second": result.metrics["tokens_per_second"],
                "peak_memory_gb": result.metrics["peak_memory_gb"],
                "dev_loss": [round(result.metrics[name], 4) for name in ("dev_loss_before", "dev_loss")],
                "settings": {k: getattr(args, k) for k in ("model", "rows", "epochs", "learning_rate")},
                "versions": {p: version(p) for p in ("afina", "torch", "scikit-learn")},
            }
        )
    )


if __name__ == "__main__":
    main()
