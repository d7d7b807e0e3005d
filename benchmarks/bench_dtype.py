"""Does bfloat16 or FP8 training learn what float32 training learns? The dev losses of three jobs in both, side by side.

    python benchmarks/bench_dtype.py [support sentiment translation ...] [--max_steps N] [--beside bfloat16|fp8]

The jobs are recipes of examples/: the same rows in the same order, the same rate, weights in float32 or in bfloat16
with float32 masters; or float32 beside itself with the layers' products in FP8 (``linear_dtype``). ``gap`` is the
other's last dev loss less float32's, with the 95 % interval of the difference over dev rows. On a CPU without bfloat16
instructions, and with FP8, the seconds say nothing. One JSON line a job goes to standard output;
``--table FILE`` prints the lines of a file as a Markdown table, and stops.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from afina.engine.intervals import paired
from afina.engine.train import finetune
from afina.engine.train_config import TrainConfig

REPO = Path(__file__).resolve().parent.parent
# What each of them sets; the products of the layers are emulated in FP8 on a CPU.
SETTINGS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "float32", "linear_dtype": "fp8"},
}


def train(job: str, dtype: str, folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """The dev losses (step, nats a token), and the best model's loss of each dev row in nats a token."""
    overrides: dict[str, Any] = {**SETTINGS[dtype], "output_dir": str(folder / dtype), "eval_steps": None}
    if args.max_steps:
        overrides["max_steps"] = args.max_steps
    config = TrainConfig.resolve(str(REPO / "examples" / job / "recipe.yaml"), overrides)
    result = finetune(config, quiet=True)
    lines = [json.loads(line) for line in (folder / dtype / "metrics.jsonl").read_text().splitlines()]
    rows = json.loads((folder / dtype / "dev_rows.json").read_text())["rows"]
    curve = [[line["step"], round(line["dev_loss"], 4)] for line in lines if "dev_loss" in line]
    told = {"curve": curve, "best": round(result.metrics["dev_loss"], 4), "seconds": result.metrics["train_seconds"]}
    return told, np.array([row["loss"] / row["tokens"] for row in rows])


def table(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    other = next(dtype for dtype in SETTINGS if dtype != "float32" and dtype in rows[0])
    lines = [f"| Job | Steps | Dev loss before | float32 | {other} | {other} less float32 |", "| -- " * 6 + "|"]
    for row in rows:
        steps, before = row["float32"]["curve"][-1][0], row["float32"]["curve"][0][1]
        gap = "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["gap"])
        best = [f"{row[dtype]['best']:.4f}" for dtype in ("float32", other)]
        lines.append(f"| {row['job']} | {steps} | {before:.3f} | {best[0]} | {best[1]} | {gap} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", default=["support", "sentiment", "translation"])
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--beside", choices=("bfloat16", "fp8"), default="bfloat16")
    parser.add_argument("--table", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    os.chdir(REPO)  # the paths in a recipe are those of the repository's root
    for job in args.jobs:
        with tempfile.TemporaryDirectory() as name:
            runs = {dtype: train(job, dtype, Path(name), args) for dtype in ("float32", args.beside)}
        told = {dtype: run[0] for dtype, run in runs.items()}
        gap = paired(runs["float32"][1], runs[args.beside][1])
        line = {
            "command": " ".join(["python", "benchmarks/bench_dtype.py", *sys.argv[1:]]),
            "job": job,
            **told,
            "gap": [round(float(value), 5) for value in gap[:3]],
            "versions": {package: version(package) for package in ("afina", "torch")},
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
