"""``afina doctor``: what this machine is, and each kernel beside its reference on it."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import afina
from afina.durable import cache_folder
from afina.engine.weights import choose_device
from afina.errors import ConfigError, nearest
from afina.kernels import launch
from afina.kernels.cases import CASES, SPECIAL_CASES
from afina.kernels.selftest import DTYPES, Result, check, check_apart


def examine(ops: Sequence[str] = (), device: str = "auto") -> dict[str, Any]:
    """Print the environment and a line for each op (default: all), backend and dtype; return them.

    ``ok`` of the result says whether every check passed. ConfigError: an unknown op or device, or an AFINA_BACKEND that
    cannot run here.
    """
    for op in ops:
        if op not in CASES:
            raise ConfigError(f"{op!r} is not a kernel{nearest(op, CASES)}; expected some of {', '.join(CASES)}")
    found = environment()
    for name, value in found.items():
        print(f"{name:18} {'-' if value is None else value}")
    where = choose_device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    backends = ["torch", "triton"] if launch.runnable(where) else ["torch"]
    print(f"\n{'kernel':20} {'backend':8} {'dtype':9} {'error':>9} {'allowed':>9}  worst of its outputs and gradients")
    results: list[Result] = []
    for worst in _worst(ops or list(CASES), where, backends, results):
        error, allowed = (" " * 9 if math.isnan(x) else f"{x:9.2e}" for x in (worst.error, worst.allowed))
        place = f"{worst.op:20} {worst.backend:8} {worst.dtype:9}"
        print(f"{place} {error} {allowed}  {'ok' if worst.ok else 'FAILED'}: {worst.quantity}", flush=True)
    if len(backends) == 1:
        print(f"\nThe Triton kernels were not run: {_why_not(found)}")
    failed = [result for result in results if not result.ok]
    if failed:
        names = ", ".join(dict.fromkeys(f"{r.op} ({r.backend}, {r.dtype})" for r in failed))
        print(f"afina: error: {len(failed)} of {len(results)} checks failed: {names}", file=sys.stderr)
    else:
        print(f"\nall {len(results)} checks passed")
    return found | {"kernels": [result._asdict() for result in results], "ok": not failed}


def _worst(ops: Sequence[str], device: torch.device, backends: list[str], results: list[Result]) -> Iterator[Result]:
    """Run the checks one by one into ``results``; of each group, the result that failed or came nearest to it."""

    def badness(result: Result) -> tuple[bool, float]:
        share = result.error / result.allowed if result.allowed else result.error
        return not result.ok, math.inf if math.isnan(share) else share

    for op in ops:
        for backend in backends:
            for dtype in DTYPES:
                found = check(op, device, backend, dtype)
                results += found
                yield max(found, key=badness)
    for op, (_, runs) in SPECIAL_CASES.items():
        if list(ops) == list(CASES) and runs(device):
            found = check_apart(op, device)
            results += found
            yield max(found, key=badness)


def environment() -> dict[str, Any]:
    """Versions, machine and settings; None for what is not there."""
    gpu: dict[str, Any] = dict.fromkeys(("gpu", "compute_capability", "gpu_memory_gb", "cuda"))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return {
        "python": platform.python_version(),
        "afina": afina.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        **gpu,
        "cache": str(cache_folder()),
        "AFINA_BACKEND": os.environ.get("AFINA_BACKEND") or None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _why_not(found: dict[str, Any]) -> str:
    if found["triton"] is None:
        return "Triton is not installed (it is made for Linux)"
    there = "--device cpu" if found["gpu"] else "torch sees no GPU"
    return f"{there}. TRITON_INTERPRET=1 afina doctor runs them in Triton's interpreter"
