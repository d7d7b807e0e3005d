"""Kill a run that overwrites another one, at every single call that touches a file, and count what is left.

    python tests/faults/overwrite_kills.py [--every N] [--exchange no] [--best-last]      (about a minute with N = 1)
    python tests/faults/overwrite_kills.py --cli 20 [--seed S]             (20 times `kill -9` of the command line)

A finished run is overwritten by another one: it begins, logs, measures, saves its best model and two checkpoints. For
every N-th call of its process that opens, makes, renames or removes something, a child dies right before that call. Of
what it leaves, the best model must be whole, and of one of the two runs, for those who only read it; and the run
must go on, with a record, a checkpoint and metrics of one and the same run. With ``--best-last`` the first checkpoint
comes before the first best model, so that for a while there is rightly none. ``--exchange no``: as on a file system
that cannot exchange two folders.

With ``--cli`` processes of ``afina train --overwrite`` get a SIGKILL at random moments, half of them while something is
being put in its place. What is left is gone on with by ``--resume``, and must end as the old run or the new one, bit
for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from afina import durable
from afina.durable import standing
from afina.engine.checkpoint import publish_best, save_checkpoint
from afina.engine.run_folder import METRICS, RunFolder
from afina.errors import AfinaError
from afina.loaders.weights.hub import resolve
from afina.manifest import check_manifest

TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
OLD, NEW = 1, 2


def config(which: int) -> dict[str, Any]:
    return {"model": "base", "data": "rows.jsonl", "output_dir": "out", "seed": which}


def a_run(root: Path, which: int, *, overwrite: bool = False, best_last: bool = False) -> None:
    """What a run does to its folder, with ``which`` in all that it writes."""

    def best(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"seed": which}))

    def save(folder: RunFolder, step: int) -> None:
        save_checkpoint(folder.path, step, {"model": {"w": torch.full((9,), float(which))}}, {"seed": which}, keep=2)
        folder.commit()

    with RunFolder(root, overwrite=overwrite) as folder:
        folder.begin(config(which), {})
        folder.record(total_steps=3)
        for step in (1, 2, 3)[: 3 if which == OLD else 2]:
            folder.log({"step": step, "lr": 0.1, "loss": float(which)})
            if step == 1 and best_last:
                save(folder, step)
            if step < 3:
                publish_best(folder.path, best, {"step": step})
            if not (step == 1 and best_last):
                save(folder, step)
        folder.record(finished={"time": "now"})


def read(root: Path) -> str:
    """What those find who only read: "old", "new", "none", or what is wrong."""
    try:
        best = resolve(root)
        check_manifest(best)
    except AfinaError as problem:
        return "none" if "run without a best model" in str(problem) else f"damaged: {problem}"
    return {OLD: "old", NEW: "new"}[json.loads((best / "config.json").read_text())["seed"]]


def resumed(root: Path) -> str:
    """Which run goes on in a folder: "old" or "new", or what is wrong with it."""
    record = json.loads(standing(root / "run.json").read_text())
    which = record["config"]["seed"]
    try:
        with RunFolder(root, resume=True) as folder:
            folder.begin(config(which), {})
            checkpoint = folder.checkpoint
            lines = [json.loads(line) for line in (root / METRICS).read_text().splitlines()]
    except AfinaError as problem:
        return f"cannot go on: {problem}"
    if checkpoint is None or folder.skipped:
        return "without a whole checkpoint"
    held = {checkpoint.meta["seed"], *(int(line["loss"]) for line in lines)}
    held |= {int(checkpoint.tensors("model")["w"][0])}
    if held != {which} or len(lines) != checkpoint.step:
        return f"mixed: record of {which}, else {held}"
    left = [path.name for path in root.iterdir() if durable.WORKING_NAME.fullmatch(path.name) or path.name[0] == "."]
    return f"left over: {left}" if left else {OLD: "old", NEW: "new"}[which]


def count(place: Path, *, every: int = 1, exchange: bool = True, best_last: bool = False) -> Counter[tuple[str, str]]:
    """How often (the best model that is read, the run that goes on) were found after a kill."""
    a_run(place / "whole", OLD)
    found: Counter[tuple[str, str]] = Counter()
    for number in itertools.count(0, every):
        root = place / "run"
        shutil.copytree(place / "whole", root)
        if (pid := os.fork()) == 0:
            if not exchange:
                durable._call = lambda: None  # type: ignore[assignment]
            touches = itertools.count()

            def die(event: str, arguments: object, at: int = number, touches: Iterator[int] = touches) -> None:
                if event in TOUCHES and next(touches) == at:
                    os._exit(9)

            sys.addaudithook(die)
            a_run(root, NEW, overwrite=True, best_last=best_last)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            shutil.rmtree(root)
            return found
        seen = read(root)
        found[seen, resumed(root)] += 1
        if read(root) != seen:
            found["another best model after going on", read(root)] += 1
        shutil.rmtree(root)
    raise AssertionError


def count_cli(place: Path, kills: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """As `count`, of so many kills of real processes."""
    sys.path.append(str(Path(__file__).parent.parent))  # where pytest finds the helpers of the tests
    from cli_server import Cli
    from tiny_model import saved

    rows = [{"prompt": f"the quick {n}\n", "completion": "brown fox " * (1 + n % 3)} for n in range(40)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved(place / "tiny")
    settings = {"model": "tiny", "data": "rows.jsonl", "threads": 1, "batch_size": 2, "max_steps": 6, "save_steps": 2}

    def train(out: str, which: int, *flags: str) -> list[str]:
        values = {**settings, "eval_steps": 2, "learning_rate": 1e-3, "seed": which, "output_dir": out}
        return ["train", *(f"--{name}={value}" for name, value in values.items()), *flags]

    def weights(out: str) -> bytes:
        return (place / out / "best" / "model.safetensors").read_bytes()

    cli, draw = Cli(place), random.Random(seed)
    found: Counter[tuple[str, str]] = Counter()
    try:
        for which, out in ((OLD, "old"), (NEW, "new")):
            started = time.monotonic()
            assert cli.run(*train(out, which)).status == 0
            seconds = time.monotonic() - started
        ends = {OLD: weights("old"), NEW: weights("new")}
        while found.total() < kills:
            shutil.copytree(place / "old", place / "run")
            cli.start(*train("run", NEW, "--overwrite"))
            time.sleep(draw.uniform(0, seconds))
            if draw.random() < 0.5:
                cli.when(lambda: any(".tmp-" in name or ".old-" in name for name in os.listdir(place / "run")))
            cli.signal(signal.SIGKILL)
            if cli.wait().status == -signal.SIGKILL:
                try:
                    check_manifest(resolve(place / "run"))
                    seen = "whole"
                except AfinaError as problem:
                    seen = f"damaged: {problem}"
                which = json.loads(standing(place / "run" / "run.json").read_text())["config"]["seed"]
                ended = cli.run(*train("run", which, "--resume"))
                right = ended.status == 0 and weights("run") == ends[which]
                found[seen, {OLD: "old", NEW: "new"}[which] if right else f"wrong: {ended.stderr[-200:]}"] += 1
            shutil.rmtree(place / "run")
    finally:
        cli.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a run that overwrites another one and count what is left.")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--exchange", choices=("yes", "no"), default="yes")
    parser.add_argument("--best-last", action="store_true")
    parser.add_argument("--cli", type=int, default=0, metavar="KILLS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.cli:
            outcome = count_cli(Path(place), options.cli, options.seed)
        else:
            outcome = count(
                Path(place), every=options.every, exchange=options.exchange == "yes", best_last=options.best_last
            )
    for (seen, goes_on), times in sorted(outcome.items()):
        print(f"{times:4}  best model read: {seen}; goes on: {goes_on}")
