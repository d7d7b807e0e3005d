"""Each op beside its reference on the machine at hand: for `afina doctor`, and before kernels run on a GPU.

Triton compiles for a GPU that nobody here has seen, with a compiler that has had bugs. So whoever puts a model on a GPU
calls `verify`: the sample calls of each op (`cases.py`), forward and all gradients, are compared with the reference in
float64, and `backend.choose` gives an op that fails to torch, with one warning that says so. What has passed is kept on
disk, by GPU, versions and the kernels' source; what has not is tried again by the next process.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.durable import remember, remembered
from afina.kernels import launch
from afina.kernels.backend import requested, verified
from afina.kernels.cases import CASES, SPECIAL_CASES, Case, Draw, allowed_error

DTYPES = (torch.float32, torch.bfloat16)
NOTE = "selftest"  # under which the cache knows what has passed
# Parts of these kernels wait for each other. Should one wait for ever, that must not be this process.
APART = {"attention_gluon": (torch.float16, torch.bfloat16)}
APART_SECONDS = 300.0  # for a process's start and some thirty compilations
# How a kernel that cannot be had shows besides Triton's own errors: RuntimeError from the driver and the passes of the
# compiler, ValueError for a GPU without a row in the launch table, the others for a missing C compiler or library.
FAILURES = (RuntimeError, ValueError, OSError, AssertionError, subprocess.CalledProcessError)


class Result(NamedTuple):
    """One output or gradient of an op: its largest error against float64, and the largest that is allowed.

    `quantity` is what was compared, or what kept it from being so (`error` and `allowed` are then NaN).
    """

    op: str
    backend: str
    dtype: str
    quantity: str
    error: float
    allowed: float
    ok: bool


def check(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> list[Result]:
    """Compare every output and gradient of the cases of `op`, computed in `dtype`, with its reference in float64."""
    with torch.inference_mode(False), torch.enable_grad():
        cases = CASES[op] if op in CASES else SPECIAL_CASES[op][0]
        return [result for case in cases(Draw(device)) for result in _check(case, op, backend, dtype)]


def check_apart(op: str, device: torch.device) -> list[Result]:
    """`check` of an op of `APART`, in a process of its own that may take `APART_SECONDS`."""
    code = f"from afina.kernels.selftest import tell; tell({op!r}, {str(device)!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=APART_SECONDS, check=True
        )
        return [Result(**row) for row in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        said = f"no end within {APART_SECONDS:.0f} seconds"
    except (subprocess.CalledProcessError, OSError, ValueError, IndexError, TypeError) as failure:
        said = " ".join(str(getattr(failure, "stderr", None) or failure).split())[-300:]
    return [Result(op, "triton", str(dtype).removeprefix("torch."), said, math.nan, math.nan, False)
            for dtype in APART[op]]  # fmt: skip


def tell(op: str, device: str) -> None:
    """Print the results of `check` as JSON, for the process that asked."""
    results = [result for dtype in APART[op] for result in check(op, torch.device(device), "triton", dtype)]
    print(json.dumps([result._asdict() for result in results]))


def _check(case: Case, op: str, backend: str, dtype: torch.dtype) -> list[Result]:
    low = [x.to(dtype) for x in case.inputs.values()]
    exact = _evaluate(case, case.reference, [x.double() for x in low])
    plain = _evaluate(case, case.formula or case.reference, low)
    place = (op, backend, str(dtype).removeprefix("torch."))
    triton = sys.modules["triton"].TritonError if launch.VERSION else RuntimeError
    try:
        ours = _evaluate(case, partial(case.call, backend=backend), low)
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the kernel
    except (*FAILURES, triton) as failure:
        said = " ".join(f"{type(failure).__name__}: {failure}".split())
        return [Result(*place, said[:300], math.nan, math.nan, False)]
    names = [*case.outputs, *(f"gradient of {name}" for name in case.inputs if case.gradients)]
    results = []
    for name, got, near, want in zip(names, ours, plain, exact, strict=True):
        if got.shape != want.shape:
            results.append(Result(*place, f"{name}: shape {tuple(got.shape)}", math.nan, math.nan, False))
            continue
        error, allowed = float((got.double() - want).abs().max()), allowed_error(near, want, dtype)
        results.append(Result(*place, name, error, allowed, error <= allowed))  # NaN passes no comparison
    return results


def _evaluate(case: Case, function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of the inputs, for upstream gradients that every dtype holds exactly."""
    leaves = [x.detach().clone().requires_grad_(case.gradients) for x in inputs]
    made = function(*leaves)
    outs = made if isinstance(made, tuple) else (made,)
    if not case.gradients:
        return [out.detach() for out in outs]
    generator = torch.Generator().manual_seed(1)
    upstream = [(torch.randint(0, 8, out.shape, generator=generator, device="cpu") * 2 - 7).to(out) / 4 for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


_lock = threading.Lock()


def verify(device: torch.device) -> None:
    """Find out which ops' Triton kernels compute the right thing on this GPU, and let `backend.choose` know.

    Whoever puts a model on a GPU calls it; a process checks a GPU once, and an op that passed in another process not at
    all. With AFINA_BACKEND set nothing is left to choose, and nothing is checked. An op that fails is warned of once.
    """
    if requested(None, device) is not None or not launch.runnable(device):
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _lock:
        ops = list(CASES) + [op for op, (_, runs) in SPECIAL_CASES.items() if runs(device)]
        if all((op, device.index) in verified for op in ops):
            return
        key = _key(device)
        found = remembered(NOTE, key)
        known = found if isinstance(found, list) else []
        for op in ops:
            # The checks name their backend in every call, so what they run does not read the table.
            bad = [] if op in known else [r for r in _results(op, device) if not r.ok]
            verified[op, device.index] = not bad
            if bad:
                _warn(op, key["gpu"], bad[0])
        passed = [op for op in ops if verified[op, device.index]]
        if set(passed) - set(known):
            remember(NOTE, key, passed)


def _results(op: str, device: torch.device) -> list[Result]:
    if op in APART:
        return check_apart(op, device)
    return [result for dtype in DTYPES for result in check(op, device, "triton", dtype)]


def _warn(op: str, gpu: str, first: Result) -> None:
    instead = "attention's other kernels compute it" if op in APART else "torch computes it"
    wrong = "" if math.isnan(first.allowed) else f" is off by {first.error:.3g}, and {first.allowed:.3g} is allowed"
    warnings.warn(
        f"{op}: the Triton kernels fail their self-test on {gpu} ({first.dtype}: {first.quantity}{wrong}); "
        f"{instead} instead, which is slower. Run: afina doctor",
        RuntimeWarning,
        stacklevel=3,
    )


def _key(device: torch.device) -> dict[str, Any]:
    """What decides whether a kernel computes the right thing."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return {
        "gpu": gpu,
        "capability": launch.capability(device),
        "triton": launch.VERSION,
        "torch": torch.__version__,
        "kernels": _source(),
    }


@lru_cache
def _source() -> str:
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in (*sorted(folder.glob("*.py")), launch.TABLE):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
