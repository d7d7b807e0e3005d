"""Fills the launch table's rows for the GPU that it runs on.

    python benchmarks/tune.py attention_forward                  # the rows that this GPU uses, each at its own size
    python benchmarks/tune.py attention_dq --size 128 --bits 16 --dry-run
    python benchmarks/tune.py all --seconds 1200

For a row of `kernels/launch_table.json` it tries the settings around it (tile sizes, warps and stages halved and
doubled) by calling the public function with the table changed. What does not compile or gives wrong results is
discarded; the rest is timed as in the op's benchmark. A setting that is faster than the present one by more than the
noise becomes a row for this GPU's compute capability, and what the new row would shadow is kept beside it. --dry-run
only prints. Exit status 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import bench_activation
import bench_adamw
import bench_attention
import bench_cross_entropy
import bench_decode
import bench_nf4
import bench_norm
import bench_rope
import harness
import torch
from harness import Case, Options, Unavailable

from afina.kernels import launch

Row = dict[str, Any]
Table = dict[str, list[Row]]

CHOICES = {"backend": ["triton", "sdpa"]}  # options that are no numbers
RANGES = {"num_warps": (1, 16), "num_stages": (1, 5)}
LIMIT = 48  # settings tried for a row
GAIN = 0.02  # a faster one must be so by more than this


class Trial(NamedTuple):
    config: Row
    ms: float | None
    reason: str = ""


class Work(NamedTuple):
    """What to run for a kernel: its case, the provider and the pass of it to time."""

    case: Case
    provider: str
    timed: str


def work(kernel: str, size: int | None) -> Work:
    """The benchmark that a kernel's time is read from, at a row's size. Raises ValueError for an unknown kernel."""
    if kernel.startswith("attention"):
        case = bench_attention.case("tune", bench_attention.Shape(2, 8192, 16, 16, min(size or 128, 256)))
        if kernel == "attention_backend":
            case.providers["auto"] = bench_attention.ours(bench_attention.Shape(2, 8192, 16, 16, size or 128), None)
            return Work(case, "auto", "both")
        return Work(case, "afina", "forward" if kernel == "attention_forward" else "backward")
    if kernel.startswith("norm"):
        width = min(size or 65536, 65536)
        case = bench_norm.case("tune", (max(1, 8192 * 4096 // width), width), False, True)
        return Work(case, "afina", "forward" if kernel == "norm_forward" else "backward")
    if kernel.startswith("rope"):
        case = bench_rope.cases("gpu")[1]  # with QK-norm
        return Work(case, "afina", "backward" if kernel == "rope_norm_backward" else "both")
    if kernel.startswith("cross_entropy"):
        return Work(bench_cross_entropy.plain_case(4096, 128_256), "afina", "both")
    if kernel.startswith("decode"):
        shape = bench_decode.Shape(16, 8192, dim=size or 128)
        return Work(bench_decode.case(shape), "afina", "forward")
    if kernel == "glu":
        return Work(bench_activation.cases("gpu")[0], "afina", "both")
    if kernel == "adamw":
        return Work(bench_adamw.case("tune", bench_adamw.MASTER, [(8192, 4096)]), "afina", "forward")
    if kernel == "nf4":
        return Work(bench_nf4.case(4096, 14336, size or 64), "afina", "forward")
    raise ValueError(f"{kernel}: no benchmark to tune it with")


def options(row: Row) -> Row:
    """What a row sets, without what it is for."""
    return {key: value for key, value in row.items() if key not in launch.KEYS}


def key(row: Row) -> tuple[Any, Any]:
    return row.get("bits"), row.get("size")


def candidates(present: Row, limit: int = LIMIT) -> list[Row]:
    """The present setting and those around it, the nearest first."""
    ranges = []
    for name, value in present.items():
        if isinstance(value, str):
            others = [choice for choice in CHOICES[name] if choice != value]
        elif name == "num_stages":
            others = [value - 1, value + 1, value + 2]
        else:
            others = [value // 2, value * 2]
        low, high = RANGES.get(name, (1, math.inf))
        ranges.append([value, *(x for x in others if isinstance(x, str) or low <= x <= high)])
    made = [dict(zip(present, values)) for values in product(*ranges)]
    made.sort(key=lambda config: sum(config[name] != present[name] for name in present))  # stable
    return made[:limit]


def select(trials: list[Trial]) -> Trial:
    """The fastest; the first, which is the present setting, unless it is beaten by more than the noise."""
    timed = [trial for trial in trials if trial.ms is not None]
    if not timed:
        raise ValueError("no setting works")
    best = min(timed, key=lambda trial: trial.ms or 0.0)
    present = trials[0]
    if present.ms is not None and best.ms is not None and best.ms > (1 - GAIN) * present.ms:
        return present
    return best


def covers(wide: Row, narrow: Row) -> bool:
    """Whether `wide` serves all that `narrow` does."""
    bits = "bits" not in wide or wide["bits"] == narrow.get("bits")
    return bits and wide.get("size", math.inf) >= narrow.get("size", math.inf)


def effective(rows: list[Row], capability: int) -> list[Row]:
    """The rows that a GPU uses: those of its capability or below that no row of a higher one (not above it) covers."""
    fit = [row for row in rows if 0 < row["capability"] <= capability]
    return [
        row for row in fit if not any(other["capability"] > row["capability"] and covers(other, row) for other in fit)
    ]


def rewrite(rows: list[Row], capability: int, row: Row, config: Row) -> list[Row]:
    """The kernel's rows with `config` for what `row` serves on this capability.

    A row of a higher capability goes before all of a lower one that it covers. So those in use are copied up beside it.
    """
    new = {"capability": capability} | {name: row[name] for name in ("bits", "size") if name in row} | config
    kept = [
        {**old, "capability": capability}
        for old in effective(rows, capability)
        if old["capability"] < capability and key(old) != key(new) and covers(new, old)
    ]
    rest = [old for old in rows if (old["capability"], *key(old)) != (capability, *key(new))]
    return sorted([*rest, *kept, new], key=_order)


def _order(row: Row) -> tuple[float, ...]:
    return row["capability"], row.get("bits", 0), row.get("size", math.inf)


def written(table: Table) -> str:
    """The table as its file holds it: kernels in order, one row a line."""
    parts = []
    for name, rows in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        parts.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@contextmanager
def patched(table: Table) -> Iterator[None]:
    """Launches read this table."""
    plain = launch.table
    launch.table = lambda: table  # type: ignore[assignment]
    launch._config.cache_clear()
    try:
        yield
    finally:
        launch.table = plain
        launch._config.cache_clear()


def measured(kernel: str, row: Row, timing: Options | None) -> Callable[[Table], float]:
    """A function that gives the milliseconds under a table (None: only checks); Unavailable where it is wrong."""
    harness.DTYPE = torch.float32 if row.get("bits") == 32 else torch.bfloat16
    torch.manual_seed(0)
    case, name, timed = work(kernel, row.get("size"))
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    want = case.expected(inputs, upstream)

    def measure(table: Table) -> float:
        with patched(table):
            ready = harness.prepare(case, name, inputs, upstream, want)
            if timing is None:
                return math.nan
            spans, _, _ = harness._gpu_spans(ready, [timed], timing)
        return statistics.median(spans[timed])

    return measure


def tune(
    table: Table,
    kernel: str,
    row: Row,
    capability: int,
    measure: Callable[[Table], float],
    *,
    limit: int = LIMIT,
    deadline: float = math.inf,
    failed: Mapping[str, str] | None = None,
) -> tuple[list[Trial], Trial]:
    """Try the settings around a row -> all trials and the one to take. `failed`: place -> reason, not tried again."""
    trials: list[Trial] = []
    for config in candidates(options(row), limit):
        if trials and time.monotonic() > deadline:
            break
        if failed and (reason := failed.get(place(kernel, row, config))):
            trials.append(Trial(config, None, reason))
            continue
        try:
            ms = measure(table | {kernel: rewrite(table[kernel], capability, row, config)})
            trials.append(Trial(config, ms))
        # Too much shared memory, a tile too small to compile, a wrong result: each says that the setting is none.
        except Exception as problem:
            trials.append(Trial(config, None, _reason(problem)))
            if harness.GPU:
                torch.cuda.synchronize()  # raises where an illegal access has ended the device's context
    return trials, select(trials)


def _reason(problem: Exception) -> str:
    return str(problem) if isinstance(problem, Unavailable) else harness.one_line(problem)


def place(kernel: str, row: Row, config: Row) -> str:
    return json.dumps([kernel, *key(row), config])


def check(table: Table, rows: list[tuple[str, Row]], capability: int, share: int, shares: int, limit: int) -> None:
    """Compile and check this process's share of all settings; before each its place is printed, after it the outcome.

    What was compiled is then in Triton's cache on disk, so the timing, which must be alone, waits for no compiler.
    """
    for kernel, row in rows:
        measure = None
        for config in candidates(options(row), limit)[share::shares]:
            print(json.dumps({"begun": place(kernel, row, config)}), flush=True)
            try:
                measure = measure or measured(kernel, row, None)
                measure(table | {kernel: rewrite(table[kernel], capability, row, config)})
                reason = ""
            except Exception as problem:
                reason = _reason(problem)
            print(json.dumps({"ended": place(kernel, row, config), "reason": reason}), flush=True)
            torch.cuda.synchronize()  # a lost device ends this process, and no other
        torch.cuda.empty_cache()


def outcomes(logs: Iterable[str]) -> dict[str, str]:
    """What `check` found: place -> why it is none. A setting that ended its process is none either."""
    found: dict[str, str] = {}
    for log in logs:
        open_ = None
        for line in log.splitlines():
            if line.startswith('{"begun"'):
                open_ = json.loads(line)["begun"]
            elif line.startswith('{"ended"'):
                row = json.loads(line)
                open_ = None
                if row["reason"]:
                    found[row["ended"]] = row["reason"]
        if open_ is not None:
            found[open_] = "ended its process"
    return found


def checked(words: Sequence[str], jobs: int, seconds: float) -> dict[str, str]:
    """Run `check` in so many processes of this script, for at most so long; one that is cut off blames nothing."""
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(jobs)]
        workers = []
        for i, path in enumerate(paths):
            with path.open("w") as file:
                command = [sys.executable, __file__, *words, "--check", str(i), str(jobs)]
                workers.append(subprocess.Popen(command, stdout=file))
        texts = []
        for worker, path in zip(workers, paths):
            cut = False
            try:
                worker.wait(None if seconds == math.inf else max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                cut = True
                worker.kill()
                worker.wait()
            lines = path.read_text().splitlines()
            texts.append("\n".join(lines[:-1] if cut and lines and lines[-1].startswith('{"begun"') else lines))
    return outcomes(texts)


def shown(kernel: str, row: Row, trials: list[Trial], best: Trial) -> str:
    """The candidates as a table, fastest first."""
    names = list(trials[0].config)
    lines = [f"{kernel} {' '.join(f'{name}={row[name]}' for name in launch.KEYS if name in row)}"]
    lines.append("  " + " ".join(f"{name:>{max(7, len(name))}}" for name in names) + "        ms")
    present = trials[0]
    for trial in sorted(trials, key=lambda trial: trial.ms or math.inf):
        cells = " ".join(f"{trial.config[name]!s:>{max(7, len(name))}}" for name in names)
        mark = "  <- best" if trial is best else ""
        mark += "  (present)" if trial is present else ""
        result = f"{trial.ms:10.4f}{mark}" if trial.ms is not None else f"         -  {trial.reason[:80]}{mark}"
        lines.append(f"  {cells}{result}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL", help="names of the launch table, or all")
    parser.add_argument("--size", type=int, help="only the row of this size")
    parser.add_argument("--bits", type=int, choices=(16, 32), help="only rows of this width (and those for any)")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"settings tried for a row (default {LIMIT})")
    parser.add_argument("--seconds", type=float, default=math.inf, help="try nothing new after so long")
    parser.add_argument("--quick", action="store_true", help="fewer runs a setting")
    jobs = max(1, min(8, (os.cpu_count() or 1) // 2))
    parser.add_argument(
        "--jobs", type=int, default=jobs, help=f"processes that compile and check first (default {jobs})"
    )
    parser.add_argument("--check", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print the candidates, change nothing")
    args = parser.parse_args()
    if not harness.GPU:
        print("tune.py: needs a GPU: what a setting is worth shows nowhere else", file=sys.stderr)
        return 2
    table = launch.table()
    kernels = sorted(table) if args.kernels == ["all"] else args.kernels
    if unknown := [name for name in kernels if name not in table]:
        parser.error(f"unknown kernel {unknown[0]}: expected some of {', '.join(sorted(table))}")
    capability = launch.capability(torch.device("cuda", torch.cuda.current_device()))
    rows = [
        (kernel, row)
        for kernel in kernels
        for row in effective(table[kernel], capability)
        if args.size in (None, row.get("size")) and args.bits in (None, row.get("bits", args.bits))
    ]
    if args.check:
        check(table, rows, capability, share=args.check[0], shares=args.check[1], limit=args.limit)
        return 0
    deadline = time.monotonic() + args.seconds
    failed = checked(sys.argv[1:], args.jobs, args.seconds / 2) if args.jobs > 1 else {}
    found: list[tuple[str, Row, Row]] = []
    try:
        for kernel, row in rows:
            if time.monotonic() > deadline:
                print(f"{kernel} {row}: time limit", flush=True)
                continue
            try:
                measure = measured(kernel, row, Options(quick=args.quick))
                trials, best = tune(
                    table, kernel, row, capability, measure, limit=args.limit, deadline=deadline, failed=failed
                )
            except ValueError as problem:
                print(f"{kernel} {row}: {problem}", flush=True)
                continue
            print(shown(kernel, row, trials, best), flush=True)
            if best is not trials[0]:
                found.append((kernel, row, best.config))
            torch.cuda.empty_cache()
    except torch.AcceleratorError as problem:
        print(f"{kernel} {row}: the GPU is lost to this process: {harness.one_line(problem)}", flush=True)
    # Read again: it may have been changed meanwhile.
    new: Table = json.loads(launch.TABLE.read_text())
    for kernel, row, config in found:
        new[kernel] = rewrite(new[kernel], capability, row, config)
        print(f"{kernel}: {json.dumps(row)} -> {json.dumps({'capability': capability} | config)}")
    if found and not args.dry_run:
        launch.TABLE.write_text(written(new))
        print(f"wrote {launch.TABLE}; now run benchmarks/compile_gate.py")
    elif not found:
        print("nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
