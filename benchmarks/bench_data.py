"""What preparing data costs beside tokenising alone, and whether memory grows with the file.

    python benchmarks/bench_data.py                                 # 100,000 and 1,000,000 generated rows
    python benchmarks/bench_data.py --rows 100000 --repeats 5 --kind messages

Ours is `prepare` on a JSONL file with an empty cache: hashing, reading, parsing, checking, cleaning, dropping
duplicates, rendering, tokenising, masks, writing, splitting. Theirs is `tokenizers`' own `encode_batch` on the texts
that ours renders, 1024 at a time, nothing else on the clock. Each runs in a process of its own, in turn; the smallest
times count. Memory is the peak of the resident set above what the process has with the tokenizer loaded. One JSON line
a run goes to standard output, and a last line a size with the ratios (ours / theirs), of time and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
BOOKS = REPO.parent / "shared" / "data" / "books"
TOKENIZER = REPO.parent / "shared" / "data" / "tokenizers" / "gpt2"


def generate(path: Path, rows: int, kind: str) -> None:
    """Write rows of about 180 bytes: runs of words from real text, so that words repeat as words do."""
    source = next(iter(sorted(BOOKS.glob("*.txt"))), REPO / "README.md")
    words, rng = source.read_text().split(), random.Random(0)

    def run(low: int, high: int) -> str:
        start = rng.randrange(len(words) - high)
        return " ".join(words[start : start + rng.randint(low, high)])

    with path.open("w") as out:
        for number in range(rows):
            prompt, answer = f"{number}: {run(5, 25)}?", run(3, 20)
            if kind == "messages":
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                row: dict[str, Any] = {"messages": turns}
            else:
                row = {"prompt": prompt + "\n", "completion": answer}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def child(engine: str, path: Path, tokenizer_path: str, folder: Path) -> dict[str, Any]:
    """Run one engine in this process."""
    from afina.loaders.data.dataset import prepare
    from afina.loaders.data.rows import read_rows
    from afina.loaders.text.source import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.encodings(["warm up"], offsets=True)
    tokens, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if engine == "afina":
        seconds, cpu = time.perf_counter(), time.process_time()
        data = prepare(path, tokenizer, max_length=512, cache_dir=folder, progress=False)
        seconds, cpu = time.perf_counter() - seconds, time.process_time() - cpu
        tokens = data.report["train_tokens"] + data.report["dev_tokens"]
    else:
        seconds = cpu = 0.0
        texts: Iterator[str] = (row.rendered(tokenizer).text for row in read_rows(path))
        while batch := list(islice(texts, 1024)):
            wall, used = time.perf_counter(), time.process_time()
            encodings = tokenizer.encodings(batch, offsets=True)
            seconds, cpu = seconds + time.perf_counter() - wall, cpu + time.process_time() - used
            tokens += sum(map(len, encodings))
            del encodings
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "engine": engine,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "tokens": tokens,
        "rss_mb": round(peak / 1024, 1),
        "rss_above_mb": round((peak - before) / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kind", choices=("pairs", "messages"), default="pairs")
    parser.add_argument("--tokenizer", default=str(TOKENIZER))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(child(args.child[0], Path(args.child[1]), args.tokenizer, Path(folder))))
        return
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            generate(path, rows, args.kind)
            runs: dict[str, list[dict[str, Any]]] = {"afina": [], "encode_batch": []}
            for _ in range(args.repeats):
                for engine, results in runs.items():
                    command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--child", engine, str(path)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
                    results.append(json.loads(done.stdout) | {"rows": rows})
                    print(json.dumps(results[-1]), flush=True)
            best = {name: {k: min(r[k] for r in rs) for k in ("seconds", "cpu_seconds")} for name, rs in runs.items()}
            ours, theirs = best["afina"], best["encode_batch"]
            summary = {
                "rows": rows,
                "kind": args.kind,
                "bytes": path.stat().st_size,
                "time_ratio": round(ours["seconds"] / theirs["seconds"], 3),
                "cpu_ratio": round(ours["cpu_seconds"] / theirs["cpu_seconds"], 3),
                "rss_above_mb": max(run["rss_above_mb"] for run in runs["afina"]),
                "rows_per_second": round(rows / ours["seconds"]),
                "cpus": os.cpu_count(),
                "machine": platform.machine(),
                "tokenizers": version("tokenizers"),
                "python": platform.python_version(),
            }
            print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
