"""What all op benchmarks share: cases, checks against the reference, timing, measured ceilings, rows.

    python benchmarks/harness.py          # the environment and its ceilings, one JSON line

GPU: time is the device's (CUDA events around work that was queued while the GPU was kept busy, so that no gap of the
host counts), inputs are random, the L2 cache is flushed before each run, each figure is a median with its 20 % and 80
% quantiles. Host time is what a forward and backward call keeps the CPU for, with the GPU's queue empty. Ceilings are
measured once a process; `share` is the floor, the larger of operations / ceiling and bytes / ceiling, over the time.
CPU: small shapes, to see that everything runs; a row says that it is no statement about performance.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import afina

sys.path.insert(0, str(Path(__file__).resolve().parent))

from costs import Cost, Costs

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
# ||result - reference|| / ||reference||: an order above what rounding gives, well under what a wrong formula does.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
PEERS = ("transformers", "liger_kernel", "fla", "flash_attn", "cut_cross_entropy", "bitsandbytes", "peft")
SLOW = ("compile", "flex")  # compile for many seconds; come last, and on a CPU only when named
CPU_NOTE = "CPU reference/interpreter path: not a performance statement"
DEVICE_LOST = 3  # exit status: after an illegal access no call of this process can work

Function = Callable[[], Any]


class Unavailable(Exception):
    """Why a provider cannot do a case, in one line."""


class Peer(NamedTuple):
    """A function that takes other leaves than the case's inputs: how its gradients become theirs."""

    function: Function
    leaves: list[Tensor]
    join: Callable[[list[Tensor]], list[Tensor]]


@dataclass
class Case:
    """One op at one shape.

    ``inputs`` draws the tensors, with requires_grad where a gradient is wanted; ``upstream`` the gradients of the
    outputs (none: no backward pass). ``expected(inputs, upstream)``: outputs, then gradients, in fp32 or wider.
    ``providers``: name -> a function that takes the inputs (its own copies) and returns the call to time, or a Peer.
    ``costs``: of each pass to report. ``limit``: the relative error allowed (None: `LIMITS` of the first input's
    dtype).
    """

    op: str
    name: str
    inputs: Callable[[], list[Tensor]]
    upstream: Callable[[list[Tensor]], list[Tensor]]
    expected: Callable[[list[Tensor], list[Tensor]], list[Tensor]]
    providers: dict[str, Callable[..., Any]]
    costs: Costs
    limit: float | None = None


class Ready(NamedTuple):
    """A provider that gave the right results and can be timed."""

    name: str
    function: Function
    leaves: list[Tensor]
    upstream: list[Tensor]
    dtype: str
    error: float


@dataclass
class Options:
    quick: bool = False
    threads: int = 1
    deadline: float = math.inf  # time.monotonic() after which nothing new begins

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def randn(*shape: int, dtype: torch.dtype | None = None, grad: bool = False, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype or DTYPE).requires_grad_(grad)


def listed(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


def wide() -> torch.dtype:
    """What references compute in: fp64 where it costs little."""
    return torch.float32 if GPU else torch.float64


def reference(function: Callable[..., Any]) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
    """`Case.expected` from a plain formula: in a wider type, gradients by autograd."""

    def expected(inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().to(wide()).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        outs = listed(function(*leaves))
        return [x.detach() for x in outs] + gradients(outs, [x for x in leaves if x.requires_grad], upstream)

    return expected


def gradients(outs: list[Tensor], leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    if not upstream:
        return []
    return list(torch.autograd.grad(outs, leaves, [g.to(x.dtype) for g, x in zip(upstream, outs)]))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def provider(function: Callable[..., Any]) -> Callable[..., Function]:
    """A provider that calls `function` with the case's inputs as they are."""
    return lambda *inputs: lambda: function(*inputs)


# --- Ceilings and the environment ------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    tflops: float  # bf16 matrix product of 8192^3
    gbps: float  # device-to-device copy, bytes read and bytes written


@lru_cache(maxsize=1)
def ceilings() -> Ceilings | None:
    """What this GPU reaches through torch, on random data; None on a CPU."""
    if not GPU:
        return None
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = _median(lambda: torch.mm(a, b), 20)
    size = min(1 << 30, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), 20)
    return Ceilings(2 * 8192**3 / product / 1e9, 2 * 4 * source.numel() / copy / 1e6)


def _median(call: Function, runs: int) -> float:
    for _ in range(3):
        call()
    return statistics.median(_device_times([call], hold_us=200)[0] for _ in range(runs))


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    found = {"afina": afina.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("triton", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def device_name() -> str:
    if GPU:
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU {platform.processor() or platform.machine()}, {threads} thread{'' if threads == 1 else 's'}"


def environment() -> dict[str, Any]:
    """The machine, the versions, the commit and the ceilings, as one row."""
    row: dict[str, Any] = {"row": "environment", "device": device_name(), "versions": versions()}
    row["platform"] = platform.platform()
    row["commit"] = _said(["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"])
    if not GPU:
        return row | {"note": CPU_NOTE}
    about = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    row["driver, power limit, SM clock"] = _said(about)
    gpu = torch.cuda.get_device_properties(DEVICE)
    peak = ceilings()
    assert peak is not None
    return row | {
        "capability": 10 * gpu.major + gpu.minor,
        "multiprocessors": gpu.multi_processor_count,
        "memory_gb": round(gpu.total_memory / 1e9, 1),
        "l2_mb": round(gpu.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "ceiling_tflops": round(peak.tflops, 1),
        "ceiling_gbps": round(peak.gbps, 1),
    }


def _said(words: list[str]) -> str | None:
    """What a command prints; None where there is no such command, or it fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- Timing ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _flusher() -> Tensor:
    size = max(64 << 20, 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    return torch.empty(size // 4, dtype=torch.int32, device=DEVICE)


def _device_times(calls: Sequence[Function], *, hold_us: float) -> list[float]:
    """Milliseconds of the GPU in each of the calls, one after the other, from a cold cache.

    The GPU sleeps for about `hold_us` first: by the time that it starts, the host has queued all of it.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    _flusher().zero_()
    torch.cuda._sleep(int(min(hold_us, 20_000) * 2_000))  # cycles, of about 2 GHz
    marks[0].record()
    for call, mark in zip(calls, marks[1:]):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def _gpu_spans(ready: Ready, passes: Sequence[str], options: Options) -> tuple[dict[str, list[float]], float, float]:
    """Milliseconds of each pass, run by run; microseconds of the host a call; peak memory in bytes above the inputs."""
    outs: list[Tensor] = []

    def forward() -> None:
        outs[:] = listed(ready.function())

    def backward() -> None:
        gradients(outs, ready.leaves, ready.upstream)
        outs.clear()

    def call() -> None:
        forward()
        if ready.upstream:
            backward()
        outs.clear()

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before

    host: list[float] = []
    started = time.perf_counter()
    while len(host) < 3 or (len(host) < 30 and time.perf_counter() - started < 0.2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        host.append(1e6 * (time.perf_counter() - begun))
    host_us = statistics.median(host)

    spans: dict[str, list[float]] = {name: [] for name in passes}
    least, most, seconds = (3, 20, 0.1) if options.quick else (5, 100, 0.5)
    started = time.perf_counter()
    runs = 0
    while runs < least or (runs < most and time.perf_counter() - started < seconds):
        runs += 1
        calls = [forward, backward] if ready.upstream else [forward]
        times = _device_times(calls, hold_us=1.5 * host_us)
        outs.clear()
        for name, span in (("forward", times[0]), ("both", sum(times))):
            if name in spans:
                spans[name].append(span)
        if "backward" in spans:
            # On its own: its inputs are no more in the cache than a later layer leaves them there.
            forward()
            spans["backward"] += _device_times([backward], hold_us=1.5 * host_us)
    return spans, host_us, peak


def _cpu_spans(ready: Sequence[Ready], passes: Sequence[str], options: Options) -> list[dict[str, list[float]]]:
    """Milliseconds, the providers taking turns; CPU time with one thread, which a busy machine disturbs less."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    spans: list[dict[str, list[float]]] = [{name: [] for name in passes} for _ in ready]
    least, most, seconds = (1, 3, 0.1) if options.quick else (3, 15, 1.0 * len(ready))
    started = time.perf_counter()
    runs = -1  # the first is the warm-up
    while runs < least or (runs < most and time.perf_counter() - started < seconds):
        for one, mine in zip(ready, spans):
            marks = [clock()]
            outs = listed(one.function())
            marks.append(clock())
            gradients(outs, one.leaves, one.upstream)
            marks.append(clock())
            if runs < 0:
                continue
            for name, span in (
                ("forward", marks[1] - marks[0]),
                ("backward", marks[2] - marks[1]),
                ("both", marks[2] - marks[0]),
            ):
                if name in mine:
                    mine[name].append(1e3 * span)
        runs += 1
    return spans


# --- Rows ------------------------------------------------------------------------------------------------------------


def command() -> str:
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def rate(cost: Cost, ms: float, peak: Ceilings | None) -> dict[str, float | None]:
    """Achieved TFLOP/s and GB/s, and the share of the floor in the time."""
    floor = None if peak is None else 1e3 * max(cost.flops / peak.tflops / 1e12, cost.bytes / peak.gbps / 1e9)
    return {
        "flops": round(cost.flops),
        "bytes": round(cost.bytes),
        "tflops": _digits(cost.flops / ms / 1e9) if cost.flops else None,
        "gbps": _digits(cost.bytes / ms / 1e6),
        "floor_ms": None if floor is None else _digits(floor),
        "share": None if floor is None else _digits(floor / ms),
        "ceiling_tflops": None if peak is None else _digits(peak.tflops),
        "ceiling_gbps": None if peak is None else _digits(peak.gbps),
    }


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def base(case: Case, name: str) -> dict[str, Any]:
    return {"op": case.op, "case": case.name, "provider": name}


def tail() -> dict[str, Any]:
    note = {} if GPU else {"note": CPU_NOTE}
    return {"command": command(), "device": device_name(), "versions": versions()} | note


def skipped(case: Case, name: str, reason: str) -> dict[str, Any]:
    return base(case, name) | {"skipped": reason} | tail()


def _rows(
    case: Case, ready: Ready, spans: dict[str, list[float]], host_us: float | None, peak: float | None
) -> Iterator[dict[str, Any]]:
    for name, times in spans.items():
        ms = statistics.median(times)
        row = base(case, ready.name) | {"pass": name, "dtype": ready.dtype}
        row |= {"ms": _digits(ms), "ms_p20": _digits(quantile(times, 0.2)), "ms_p80": _digits(quantile(times, 0.8))}
        row |= {"runs": len(times)} | rate(case.costs[name], ms, ceilings())
        whole = name == "both" or "both" not in spans
        row["peak_mb"] = _digits(peak / 1e6) if whole and peak is not None else None
        row["host_us"] = _digits(host_us) if whole and host_us is not None else None
        yield row | {"error": float(f"{ready.error:.2e}")} | tail()


def one_line(problem: BaseException) -> str:
    text = next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
    return f"{type(problem).__name__}: {text}"[:300]


def relative_error(got: Tensor, want: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.to(want.dtype) - want, dtype=torch.float64 if not GPU else None)
    size = torch.linalg.vector_norm(want, dtype=torch.float64 if not GPU else None)
    return float(difference / size) if float(size) else float(difference)


def check(case: Case, ready: Ready, want: list[Tensor], join: Callable[..., list[Tensor]] | None) -> float:
    """The largest relative error of a result of one call; raises Unavailable above the limit (NaN is above it)."""
    limit = case.limit or LIMITS[getattr(torch, ready.dtype)]
    outs = listed(ready.function())
    worst = _compare(outs, want[: len(outs)], 0, limit)  # before a backward pass that wrong shapes would end
    grads = gradients(outs, ready.leaves, ready.upstream)
    grads = join(grads) if join else grads
    if len(outs) + len(grads) != len(want):
        raise Unavailable(f"wrong: {len(outs) + len(grads)} results, expected {len(want)}")
    return max(worst, _compare(grads, want[len(outs) :], len(outs), limit))


def _compare(got: Sequence[Tensor], want: Sequence[Tensor], first: int, limit: float) -> float:
    worst = 0.0
    for i, (a, b) in enumerate(zip(got, want), start=first):
        if a.shape != b.shape:
            raise Unavailable(f"wrong: result {i} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        error = relative_error(a.detach(), b)
        if not error <= limit:
            raise Unavailable(f"wrong: relative error {error:.2e} of result {i}, above {limit:g}")
        worst = max(worst, error)
    return worst


def prepare(case: Case, name: str, inputs: list[Tensor], upstream: list[Tensor], want: list[Tensor]) -> Ready:
    """Make a provider on copies of the inputs (some write over them) and check it."""
    mine = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    made = case.providers[name](*mine)
    leaves, join = [x for x in mine if x.requires_grad], None
    if isinstance(made, Peer):
        made, leaves, join = made
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    ready = Ready(name, made, leaves if upstream else [], [g.clone() for g in upstream], dtype, 0.0)
    error = check(case, ready, want, join)
    return ready._replace(error=error)


def run_case(case: Case, names: Sequence[str], options: Options) -> Iterator[dict[str, Any]]:
    """Check and time the providers of one case."""
    torch.manual_seed(0)
    passes = list(case.costs)
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    want = case.expected(inputs, upstream)
    cpu: list[Ready] = []
    for name in names:
        if options.late():
            yield skipped(case, name, "time limit")
            continue
        try:
            ready = prepare(case, name, inputs, upstream, want)
            if not GPU:
                cpu.append(ready)
                continue
            yield from _rows(case, ready, *_gpu_spans(ready, passes, options))
        # What a peer may raise is not known, and its failure is a result: it is written down.
        except Exception as problem:
            yield skipped(case, name, str(problem) if isinstance(problem, Unavailable) else one_line(problem))
        ready = None  # type: ignore[assignment]  # its memory, before the next one's
        gc.collect()
        if GPU:
            torch.cuda.synchronize()  # raises where an illegal access has ended the device's context
            torch.cuda.empty_cache()
    for one, spans in zip(cpu, _cpu_spans(cpu, passes, options) if cpu else []):
        yield from _rows(case, one, spans, None, None)


def run(
    cases: Sequence[Case], options: Options, names: Sequence[str], without: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows of all cases: the quick providers of each first, then those that compile for long."""
    for slow in (False, True):
        for i, case in enumerate(cases):
            chosen = []
            for name in case.providers:
                if name in without or (names and name not in names) or (name.split("-")[0] in SLOW) != slow:
                    continue
                if slow and not names and (not GPU or (options.quick and i)):
                    where = "after the first case with --quick" if GPU else "on a CPU"
                    yield skipped(case, name, f"left out {where}; name it with --providers")
                    continue
                chosen.append(name)
            if chosen:
                if slow:
                    torch._dynamo.reset()
                yield from run_case(case, chosen, options)


def main(doc: str | None, build: Callable[[str], list[Case]], argv: Sequence[str] | None = None) -> int:
    """The command line of an op's script. ``build(scale)`` makes its cases for "gpu", "cpu" or "tiny"."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="WORD", help="only cases whose name holds one of these"
    )
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="only these, slow ones included")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="all but these")
    parser.add_argument("--quick", action="store_true", help="fewer runs; on a CPU tiny shapes")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long (default 50 with --quick)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    args = parser.parse_args(argv)
    if not GPU:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch")  # of peers: what counts is written down
    cases = build("gpu" if GPU else "tiny" if args.quick else "cpu")
    chosen = [case for case in cases if not args.cases or any(word in case.name for word in args.cases)]
    if not chosen:
        parser.error(f"no case holds {' or '.join(args.cases)}: there are {', '.join(case.name for case in cases)}")
    known = {name for case in cases for name in case.providers}
    if unknown := {*args.providers, *args.without} - known:
        parser.error(f"unknown provider {min(unknown)}: expected some of {', '.join(sorted(known))}")
    seconds = args.seconds or (50 if args.quick else math.inf)
    options = Options(args.quick, args.threads, time.monotonic() + seconds)
    last: dict[str, Any] = {}
    try:
        for row in run(chosen, options, args.providers, args.without):
            print(json.dumps(row), flush=True)
            last = row
    except torch.AcceleratorError as problem:
        lost = {key: last.get(key) for key in ("op", "case", "provider")}
        print(json.dumps(lost | {"lost": one_line(problem)} | tail()), flush=True)
        return DEVICE_LOST
    return 0


if __name__ == "__main__":
    print(json.dumps(environment()))
