"""Sentiment with a real model: SmolLM2-135M-Instruct on SST-2 before and after LoRA, beside TF-IDF + LR.

    afina fetch smollm2-135m-instruct
    python benchmarks/bench_sst2.py [--rows 600] [--epochs 1] [--learning_rate 1e-3] [--model M] [--output_dir DIR]

The first rows of SST-2's training file, chosen by a fixed seed, written as "Review: ... Sentiment:" and the word; 400
rows of its dev file are held out, and 40 others of the training file pick nothing but the report's dev loss. The model
chooses between both words by their likelihood, before and after. All figures come with bootstrap 95 % intervals, and
the model is compared with TF-IDF and logistic regression row by row. ``seconds`` are those of the whole run, ``train``
those of its steps. One JSON line goes to standard output.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
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
from afina.engine.intervals import bootstrap, paired
from afina.engine.tasks import run_task
from afina.loaders.text.render import Example

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "sentiment"
HELD_OUT, DEV = 400, 40
WORDS = ("negative", "positive")


def read(name: str) -> list[tuple[str, str]]:
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        rows = [(text, WORDS[int(label)]) for text, label in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    random.Random(2).shuffle(rows)
    return rows


def as_row(text: str, word: str) -> dict[str, str]:
    return {"prompt": f"Review: {text}\nSentiment:", "completion": f" {word}"}


def rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, 4) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", help="keep the run here (default: a temporary folder)")
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no real data at {DATA}")
    held_out = read("sst2_dev.tsv")[:HELD_OUT]
    rows = [row for row in read("sst2_train.tsv") if row[0] not in {text for text, _ in held_out}]
    train, dev = rows[: args.rows], rows[-DEV:]

    baseline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30.0))
    baseline.fit([text for text, _ in train], [word for _, word in train])
    guesses = baseline.predict([text for text, _ in held_out])
    simpler = [float(guess == word) for guess, (_, word) in zip(guesses, held_out)]

    tokenizer = afina.load_tokenizer(args.model)
    examples = [Example(**as_row(*row)) for row in held_out]

    def right(source: str | Path) -> list[float]:
        model = afina.load_model(source)
        return run_task(model, tokenizer, examples, "classify", options=[f" {w}" for w in WORDS]).scores

    before = right(args.model)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("train", train), ("dev", dev)):
            lines = [json.dumps(as_row(*row)) + "\n" for row in part]
            (Path(folder) / f"{name}.jsonl").write_text("".join(lines))
        started = time.perf_counter()
        result = afina.finetune(
            model=args.model,
            data=f"{folder}/train.jsonl",
            val_file=f"{folder}/dev.jsonl",
            output_dir=args.output_dir or f"{folder}/run",
            method="lora",
            lora_r=16,
            batch_size=args.batch_size,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            eval_steps=100_000,
            save_steps=100_000,
            threads=args.threads,
        )
        seconds = time.perf_counter() - started
        after = right(result.best)
    shown = ("model", "rows", "epochs", "batch_size", "learning_rate", "threads")
    print(
        json.dumps(
            {
                "command": " ".join(["python", "benchmarks/bench_sst2.py", *sys.argv[1:]]),
                "train_rows": len(train),
                "held_out_rows": len(held_out),
                "accuracy_before": rounded(bootstrap(before)),
                "accuracy": rounded(bootstrap(after)),
                "tfidf_logistic_regression": rounded(bootstrap(simpler)),
                "beside_tfidf": rounded(paired(simpler, after)[:4]),  # difference, its interval, p
                "seconds": round(seconds, 1),
                "train_seconds": result.metrics["train_seconds"],
                "tokens_per_second": result.metrics["tokens_per_second"],
                "peak_memory_gb": result.metrics["peak_memory_gb"],
                "load_average": round(os.getloadavg()[0], 1),
                "settings": {name: getattr(args, name) for name in shown},
                "versions": {p: version(p) for p in ("afina", "torch", "scikit-learn")},
            }
        )
    )


if __name__ == "__main__":
    main()
