"""All that a GPU is needed for, in parts that each end in time and begin with what answers most.

    python benchmarks/gpu_suite.py --first       # 240 s: ceilings, all GPU tests, attention beside flash, cuDNN
    python benchmarks/gpu_suite.py --second      # 300 s: other ops with one peer each, tuning, a first training step
    python benchmarks/gpu_suite.py --training    # 400 s: LLM.Q's settings, 8B LoRA beside PEFT
    python benchmarks/gpu_suite.py               # 522 s: the tests and all op benchmarks beside all peers
    python benchmarks/gpu_suite.py --first --output results --seconds 200

It needs no network and installs nothing: this repository need not be installed, and peers that are not importable
become skipped rows. Each stage is a process of its own with its own time limit; what a stage leaves of its time goes
to the later ones; at the deadline the rest is skipped, and the record says so. Where a call breaks the GPU's context
(an illegal access), the op's other providers are run again without the one that did it. On a CPU the same runs in
115 s with tiny shapes, kernels interpreted, and stages share the time evenly, since importing torch takes most of it.

Files (at most 8): environment.jsonl (machine, versions, ceilings; a row a stage), benchmarks.jsonl (all rows),
tests.log, suite.log (standard error of the rest), and with matplotlib roofline.png and .svg, times.png and .svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
DEVICE_LOST = 3  # as in harness.py, which would import torch
GRACE = 20.0  # seconds that a stage gets to end by itself after its limit
START = 5.0  # and takes to import torch
LAST_WORDS = 8.0  # seconds after an interrupt before it is killed
LEAST = 8.0  # seconds with which a stage is not worth beginning


class Stage(NamedTuple):
    name: str
    weight: float  # its share of the time left is its weight over the weights left
    script: str = ""  # of this folder; default: bench_NAME.py
    arguments: tuple[str, ...] = ()
    gpu_arguments: tuple[str, ...] = ()  # on a GPU alone: cases of its sizes
    needs_gpu: bool = False  # a CPU would only spend time to learn that it is none


def attention(*providers: str) -> tuple[Stage, ...]:
    """Each in a process of its own: a kernel that waits for what never comes takes nobody with it."""
    cases = ("--cases", "hd128 causal", "hd128 packed")
    return tuple(Stage(f"attention-{p}", 27, "bench_attention.py", ("--providers", p), cases) for p in providers)


def training(name: str, weight: float, method: str, *providers: str, cases: str) -> Stage:
    arguments = ("--methods", method, "--providers", *providers)
    return Stage(name, weight, "bench_train_gpu.py", arguments, ("--cases", cases))


def beside(op: str, weight: float, peer: str) -> Stage:
    return Stage(op, weight, arguments=("--providers", "afina", peer))


KERNELS = (
    Stage("tests", 180),
    Stage("attention", 75),
    Stage("cross_entropy", 45),
    Stage("norm", 30),
    Stage("rope", 20),
    Stage("activation", 25),
    Stage("adamw", 20),
    Stage("decode", 25),
    Stage("nf4", 10),
    Stage("fp8_linear", 10),
)
# In order of worth, so that what is cut off is worth least.
FIRST = (Stage("tests", 100), *attention("afina-gluon", "afina", "flash", "cudnn"))
SECOND = (
    beside("cross_entropy", 40, "torch-linear"),
    beside("norm", 25, "torch"),
    beside("adamw", 25, "torch-fused"),
    Stage("decode", 25, gpu_arguments=("--providers", "afina", "flash")),  # a CPU has no flash, and takes what it has
    Stage(
        "tune",
        80,
        "tune.py",
        ("attention_forward", "attention_dkdv", "attention_dq", "--dry-run", "--quick"),
        needs_gpu=True,
    ),
    training("train-0.5b", 60, "full", "afina", cases="Qwen2.5-0.5B"),
    training("train-graph", 20, "full", "afina", "afina-graph", cases="Qwen2.5-0.5B small"),
)
TRAINING = (
    training("full-0.5b", 70, "full", "afina", cases="Qwen2.5-0.5B 524k"),
    training("lora-8b", 90, "lora", "afina", cases="Llama-3-8B"),
    training("full-1.5b", 80, "full", "afina", cases="Qwen2.5-1.5B 524k"),
    training("lora-8b-peft", 110, "lora", "peft", cases="Llama-3-8B"),
)
PARTS = {"kernels": (522, KERNELS), "first": (240, FIRST), "second": (300, SECOND), "training": (400, TRAINING)}
CPU_SECONDS = 115.0  # of a part on a CPU, where it only shows that everything runs
PLOT_SECONDS = 20.0


def allowance(left: float, index: int, stages: tuple[Stage, ...]) -> float:
    """Seconds for a stage, of what is left before the deadline."""
    return max(0.0, left) * stages[index].weight / sum(stage.weight for stage in stages[index:])


def test_files(importable: set[str]) -> tuple[list[str], list[str]]:
    """Tests of kernels, and of other files those marked gpu, whose imports are there; and files left out, and why."""
    run, out = [], []
    for file in sorted((REPO / "tests").rglob("test_*.py")):
        text, name = file.read_text(), file.relative_to(REPO).as_posix()
        marked = re.findall(r"^@pytest\.mark\.gpu\b(?:.*\n)*?def (test_\w+)", text, re.MULTILINE)
        if "kernel_checks" not in text and not marked:
            continue
        needed = {"hypothesis"} if "kernel_checks" in text or "hypothesis" in text else set()
        if missing := needed - importable:
            out.append(f"{file.name}: needs {', '.join(sorted(missing))}")
        else:
            run += [name] if "kernel_checks" in text else [f"{name}::{test}" for test in marked]
    return run, out


def pytest_command(files: list[str], importable: set[str], cpus: int) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-rfE", "--maxfail=30"]
    command += ["--durations=10", "-W", "ignore::pytest.PytestConfigWarning"]
    if "pytest_timeout" in importable:
        command += ["--timeout=120"]
    if "xdist" in importable:
        # Compiling takes most of the time, and each worker compiles on a core of its own.
        command += ["-n", str(max(1, min(14, cpus - 2))), "--dist", "worksteal"]
    return command + files


class Suite:
    def __init__(self, folder: Path, seconds: float, gpu: bool) -> None:
        self.folder, self.gpu = folder, gpu
        self.deadline = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.log = (folder / "suite.log").open("w")
        (folder / "environment.jsonl").write_text("")
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))}
        self.env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}

    def record(self, row: dict[str, Any]) -> None:
        with (self.folder / "environment.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def stage(self, name: str, **facts: Any) -> None:
        row = {"row": "stage", "stage": name, **facts}
        self.record(row)
        print(json.dumps(row), flush=True)

    def run(self, command: list[str], limit: float, out: Any, err: Any, **env: str) -> tuple[int | None, float]:
        """Exit status, None where the limit ended it; seconds."""
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=REPO,
            env=self.env | env,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    process.pid, signal.SIGKILL
                )  # its own group: what it started, such as compilers, ends with it
            process.wait()
        return status, round(time.monotonic() - started, 1)

    def environment(self) -> None:
        path = self.folder / "environment.jsonl"
        with path.open("a") as file:
            status, seconds = self.run([sys.executable, str(HERE / "harness.py")], 90, file, self.log)
        if status:
            self.stage("environment", status=status, seconds=seconds, log="suite.log")

    def tests(self, limit: float) -> None:
        importable = {name for name in ("hypothesis", "pytest_timeout", "xdist", "pytest") if find_spec(name)}
        if "pytest" not in importable:
            self.stage("tests", skipped="pytest is not importable")
            return
        files, left_out = test_files(importable)
        if not files:
            self.stage("tests", skipped="; ".join(left_out) or "no test of a kernel")
            return
        command = pytest_command(files, importable, os.cpu_count() or 1)
        if not self.gpu:
            command.append("--collect-only")  # the interpreter would take an hour
        with (self.folder / "tests.log").open("w") as file:
            file.write(" ".join(["python", *command[1:]]) + "\n")
            file.flush()
            status, seconds = self.run(command, limit - LAST_WORDS, file, subprocess.STDOUT, OMP_NUM_THREADS="1")
        facts: dict[str, Any] = {"status": status, "seconds": seconds, "files": len(files), "left_out": left_out}
        facts["summary"] = summary((self.folder / "tests.log").read_text())
        if status is None:
            facts["skipped"] = "time limit: see tests.log for what ran"
        self.stage("tests", **facts)

    def benchmark(self, stage: Stage, limit: float) -> None:
        """One script's rows; again without a provider that broke the GPU's context."""
        name = stage.name
        script = HERE / (stage.script or f"bench_{name}.py")
        ends = time.monotonic() + limit
        without: list[str] = []
        while True:
            left = ends - time.monotonic()
            command = [sys.executable, str(script), "--seconds", f"{max(1.0, left - START):.0f}"]
            command += [*stage.arguments, *(stage.gpu_arguments if self.gpu else ("--quick",))]
            command += ["--without", *without] if without else []
            temporary = self.folder / "rows.tmp"
            extra = {} if self.gpu or script.name == "bench_train_gpu.py" else {"TRITON_INTERPRET": "1"}
            with temporary.open("w") as file:
                status, seconds = self.run(command, left + GRACE - LAST_WORDS, file, self.log, **extra)
            lost = self.take(temporary)
            temporary.unlink()
            shown = " ".join(["python", str(script.relative_to(REPO)), *command[2:]])
            facts: dict[str, Any] = {"status": status, "seconds": seconds, "command": shown}
            if not self.gpu:
                facts["note"] = "CPU: no statement of speed"
            if status is None:
                facts["skipped"] = "time limit: rows after the last one"
            elif status == 2:
                facts["skipped"] = "the script cannot do this here: suite.log says why"
            if lost:
                facts["lost"] = lost
            self.stage(name, **facts)
            provider = (lost or {}).get("provider")
            if status != DEVICE_LOST or provider is None or provider in without or ends - time.monotonic() < LEAST:
                return
            without.append(provider)

    def take(self, path: Path) -> dict[str, Any] | None:
        """Add a file's rows, a later one of a kind in place of an earlier; the row of a lost device is returned."""
        lost = None
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off by the limit, or printed by a peer
            if not isinstance(row, dict):
                continue
            if "lost" in row:
                lost = {key: row.get(key) for key in ("op", "case", "provider", "lost")}
            elif "op" in row:
                self.rows[tuple(row.get(key) for key in ("op", "case", "pass", "provider"))] = row
        with (self.folder / "benchmarks.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows.values())
        return lost

    def plots(self, limit: float) -> None:
        if not find_spec("matplotlib"):
            self.stage("plot", skipped="matplotlib is not importable")
            return
        command = [sys.executable, str(HERE / "plot.py"), str(self.folder / "benchmarks.jsonl")]
        status, seconds = self.run([*command, "--output", str(self.folder)], limit, self.log, self.log)
        self.stage("plot", status=status, seconds=seconds)


def summary(log: str) -> str:
    """pytest's last line, as far as there is one."""
    lines = [
        line.strip("= ") for line in log.splitlines() if re.search(r"\d+ (passed|failed|error|tests? collected)", line)
    ]
    return lines[-1] if lines else ""


def device() -> tuple[bool, str]:
    """Whether there is a GPU, and a name for the folder; in another process, so that this one holds no memory of it."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name = done.stdout.strip()
    return bool(name), re.sub(r"[^a-z0-9]+", "-", (name or "cpu").lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part, (seconds, stages) in PARTS.items():
        names = ", ".join(stage.name for stage in stages)
        parser.add_argument(f"--{part}", dest="part", action="store_const", const=part, help=f"{seconds} s: {names}")
    parser.add_argument(
        "--output", type=Path, help="folder for the files (default: benchmarks/results/gpu_<device>[_PART])"
    )
    parser.add_argument("--seconds", type=float, help="deadline for all of it (default: the part's)")
    known = list(dict.fromkeys(stage.name for _, stages in PARTS.values() for stage in stages))
    parser.add_argument("--only", nargs="+", choices=known, metavar="STAGE", help="of the part, or else of all parts")
    parser.set_defaults(part="kernels")
    args = parser.parse_args()
    gpu, name = device()
    name += "" if args.part == "kernels" else f"_{args.part}"
    seconds, stages = PARTS[args.part]
    suite = Suite(
        args.output or HERE / "results" / f"gpu_{name}", args.seconds or (seconds if gpu else CPU_SECONDS), gpu
    )
    suite.environment()
    if args.only:
        everywhere = {stage.name: stage for _, other in PARTS.values() for stage in reversed(other)}
        here = {stage.name: stage for stage in stages}
        stages = tuple((everywhere | here)[name] for name in args.only)
    if not gpu:
        for stage in stages:
            if stage.needs_gpu:
                suite.stage(stage.name, skipped="needs a GPU")
        stages = tuple(stage._replace(weight=1.0) for stage in stages if not stage.needs_gpu)
    for i, stage in enumerate(stages):
        left = suite.deadline - time.monotonic() - (PLOT_SECONDS + GRACE if gpu else LAST_WORDS)
        limit = allowance(left, i, stages)
        if limit < LEAST:
            suite.stage(stage.name, skipped="the deadline is near")
        elif stage.name == "tests":
            suite.tests(limit)
        else:
            suite.benchmark(stage, limit)
    if suite.rows:
        suite.plots(max(5.0, suite.deadline - time.monotonic()))
    suite.log.close()
    timed = sum("ms" in row for row in suite.rows.values())
    print(f"{timed} timed rows, {len(suite.rows) - timed} skipped, in {suite.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
