"""How long `afina check` takes, what memory, and how many of the planted near-duplicates it finds.

    python benchmarks/bench_check.py                       # 100,000 rows, with afina-tiny's tokenizer
    python benchmarks/bench_check.py --rows 20000 --no-model

The rows are questions and answers of words drawn with Zipf's frequencies, under one of eight instructions that many
rows share, the same for the same number and seed. One in twenty is an earlier row with one to three words changed; one
in fifty is an earlier row with as many words changed as leave it less similar than the threshold. Which of them are
near-duplicates is decided by the definition (`exact`): the Jaccard index of the sets of five characters of prompt and
answer, with and without those that a tenth of all rows have, computed pair by pair in plain Python. Recall is the share
of the near planted pairs whose later row is found, where the earlier one is kept (a row that is near a row that is left
out, and no other, stays); precision is the share of found rows that are near an earlier copy of the same row. A check
runs in a process of its own; memory is the peak of its resident set, and that above what it has after the imports.
Prints one JSON line.
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
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

INSTRUCTIONS = [f"Answer the customer of shop {name} in two friendly sentences." for name in "ABCDEFGH"]
THRESHOLD = 0.8


def generate(rows: int, seed: int) -> tuple[list[dict[str, str]], list[tuple[int, int]]]:
    """Rows, and planted pairs (later, earlier) by number, of which some are near and some are not quite."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (10 + rank) for rank in range(len(words))]
    pool = rng.choices(words, weights, k=min(400_000, 100 * rows + 1000))

    def text(count: int) -> list[str]:
        at = rng.randrange(len(pool) - count)
        drawn = pool[at : at + count]
        rng.shuffle(drawn)
        return drawn

    result: list[dict[str, str]] = []
    planted = []
    for number in range(rows):
        draw = rng.random()
        if number > 100 and draw < 0.07:
            other = rng.randrange(number)
            parts = {key: value.split(" ") for key, value in result[other].items()}
            changes = rng.randint(1, 3) if draw < 0.05 else rng.randint(6, 10)
            for _ in range(changes):
                part = parts[rng.choice(("prompt", "completion"))]
                part[rng.randrange(len(part))] = rng.choice(words)
            result.append({key: " ".join(value) for key, value in parts.items()})
            planted.append((number, other))
        else:
            prompt = [rng.choice(INSTRUCTIONS), *text(rng.randint(12, 30))]
            result.append({"prompt": " ".join(prompt), "completion": " ".join(text(rng.randint(10, 30)))})
    return result, planted


def pieces(text: str) -> set[str]:
    """Five characters each."""
    return {text[i : i + 5] for i in range(len(text) - 4)}


def common_pieces(rows: list[dict[str, str]], key: str) -> set[str]:
    """Those that more than a tenth of all rows have."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(pieces(row[key]))
    return {piece for piece, count in counts.items() if count > len(rows) / 10}


def exact(one: dict[str, str], other: dict[str, str], common: dict[str, set[str]]) -> float:
    """The least of the Jaccard indices of the prompts and of the answers, with the common pieces and without."""
    least = 1.0
    for key, left_out in common.items():
        both = [pieces(row[key]) for row in (one, other)]
        for ours, theirs in (both, [found - left_out for found in both]):
            least = min(least, len(ours & theirs) / len(ours | theirs))
    return least


def measure(path: str, model: str | None) -> dict[str, Any]:
    """Check the file in this process."""
    from afina.loaders.data.check import check_data
    from afina.loaders.text.source import load_tokenizer

    tokenizer = load_tokenizer(model) if model else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    found = check_data(path, tokenizer)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    near = {problem.name: problem.count for problem in found.problems}
    dropped = sorted(number for number, why in found.dropped.items() if why == "near_duplicates")
    facts = {"rows": found.rows, "usable": found.usable, "tokens": found.tokens, "problems": near}
    facts |= {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
    return facts | {"peak_mb": round(peak / 1024, 1), "added_mb": round((peak - before) / 1024, 1), "dropped": dropped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-model", action="store_true", help="without a tokenizer")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.measure[1] if len(args.measure) > 1 else None)))
        return
    rows, planted = generate(args.rows, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [sys.executable, __file__, "--measure", str(path), *([] if args.no_model else ["afina-tiny"])]
        root = str(Path(__file__).resolve().parent.parent)
        env = os.environ | {"PYTHONPATH": root, "AFINA_CACHE": folder}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        megabytes = path.stat().st_size / 1e6
    result = json.loads(done.stdout.splitlines()[-1])
    found = set(result.pop("dropped"))
    common = {key: common_pieces(rows, key) for key in rows[0]}
    similar = {later: exact(rows[later], rows[earlier], common) for later, earlier in planted}
    near = {later for later, earlier in planted if similar[later] >= THRESHOLD and earlier not in found}
    # A found row may be near another copy of the same row than the one it was made of.
    origin: dict[int, int] = {}
    family: dict[int, list[int]] = {}
    for later, earlier in planted:
        origin[later] = origin.get(earlier, earlier)
        family.setdefault(origin[later], [origin[later]]).append(later)
    true = [
        row
        for row in found
        if any(
            exact(rows[row], rows[other], common) >= THRESHOLD
            for other in family.get(origin.get(row, row), [])
            if other < row
        )
    ]
    figures = {"planted": len(planted), "near": len(near), "found": len(found)}
    figures |= {
        "recall": round(len(near & found) / len(near), 4),
        "precision": round(len(true) / max(1, len(found)), 4),
    }
    versions = {name: version(name) for name in ("numpy", "tokenizers", "torch")}
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    flags = [f"--rows {args.rows}"] * (args.rows != 100_000) + ["--no-model"] * args.no_model
    line = {"command": " ".join(["python benchmarks/bench_check.py", *flags]), "file_mb": round(megabytes, 1)}
    print(json.dumps(line | result | figures | machine | {"versions": versions}))


if __name__ == "__main__":
    main()
