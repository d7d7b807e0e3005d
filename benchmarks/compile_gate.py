"""Compiles every Triton kernel for real GPUs on a machine that has none, and fails on what would make it slow there.

    python benchmarks/compile_gate.py                    # all ops for sm_80, sm_89, sm_90
    python benchmarks/compile_gate.py attention training --targets 90

Each public function runs forward and backward on small CPU tensors while launches are recorded instead of run, once for
each row of the launch table that the target would use; and what the benchmarks, a training step and the self-test
launch is recorded by running them (`launches.py`), for the GPU that they are meant for, sm_90. Every recorded launch is
then compiled as Triton would compile it on that GPU; for sm_89 from sm_80's PTX, which is the same (of each kernel one
variant is compiled twice to see that). Failures:

- registers spilt to local memory, but for a few bytes (`MOST_SPILT`), which cost some cycles of a program's tens of
  thousands where no loop reads them, and where one does, at most one instruction in `LOOP_SHARE`, or 0.4 % of it: dK
  and dV of head dim 128 need all of Hopper's registers, and which word is left over changes with the compiler;
- more shared memory than the GPU has;
- a matrix kernel without wgmma instructions on sm_90;
- a matrix kernel whose loads do not run ahead of its products, though it has stages for that;
- of the Gluon kernels, whose products are meant to run under each other's softmax: a warning of ptxas that it makes
  products wait for each other (C7510 and its like; seven of Triton's variants of head dim 256 have it);
- of the same, whose warpgroups have registers of their own: another number than asked for; any instruction of
  a loop of products that reaches for a spilt one, or more than `MOST_SPILT_A_TILE` bytes of them (outside of that loop
  a program has thousands of cycles for each tile, so there they are nothing);
- a row of the launch table that nothing used.

Results are cached by the kernel's source and arguments in .compile_gate.json (ignored by git), so only what changed is
compiled again.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import launches
import torch
import triton  # before the kernels: they take the compiler only where something will use it
import triton.language as tl
from machine_code import local_accesses
from op_calls import OPS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from afina.kernels import launch

REPO = Path(__file__).resolve().parent.parent
CACHE = REPO / ".compile_gate.json"
SOURCES = {"benchmarks": (90,), "training": (90,), "selftest": (90,)}  # of launches -> for which targets
MOST_SPILT = 32  # bytes
LOOP_SHARE = 250
MOST_SPILT_A_TILE = 128  # bytes, of Gluon kernels: of dk and dv of packed documents, head dim 128, Triton 3.6
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes that one block can have
TWINS = {89: 80}  # Triton makes the same PTX for both, and only ptxas makes them differ.


class Job(NamedTuple):
    """One compilation: a kernel and how Triton specialises its arguments, for one target.

    ``signature``: the type of each argument by name; of a NamedTuple, a tuple of the same kind with its fields' types.
    ``constants`` (values compiled in) and ``attributes`` (such as a divisibility by 16) stand at a place: (i,) is
    argument i, and (i, j) is field j of an argument that is a NamedTuple.
    """

    module: str
    kernel: str
    target: int
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, int], ...]

    def label(self) -> str:
        """The constants that tell one variant of a kernel from another."""
        named: dict[str, Any] = {}
        for (i, *fields), value in self.constants:
            name, kind = self.signature[i]
            for j in fields:
                name, kind = f"{name}.{getattr(kind, '_fields', range(len(kind)))[j]}", kind[j]
            named |= value._asdict() if hasattr(value, "_asdict") else {name: value}
        return " ".join(f"{name}={value}" for name, value in named.items() if value is not None)


class Result(NamedTuple):
    registers: int
    spills: int  # bytes
    hot: int  # instructions of innermost loops that reach for them; all such instructions, if there is no loop
    loops: int  # instructions of innermost loops; of the kernel, if there is none
    shared: int
    seconds: float
    wgmma: bool
    dots: bool
    ahead: bool  # loads of the loop are begun before it
    gluon: bool = False
    groups: bool = True  # its warpgroups have the registers that they ask for
    waits: str = ""  # codes of ptxas' warnings that products wait


def recorded(op: str, kernels: tuple[str, ...], call: Callable[..., None], target: int) -> Iterator[Job | str]:
    """What `op` launches on a GPU of capability `target`, for each row of the launch table; complaints as str."""
    launch.capability = lambda device: target
    launch._config.cache_clear()
    rows = [row for name in kernels for row in launch.table()[name] if 0 < row["capability"] <= target]
    sizes = sorted({(row.get("size", 0), row.get("bits", 16)) for row in rows})
    used: list[tuple[str, dict[str, Any]]] = []
    plain, jobs = launch._config, []

    def config(kernel: str, capability: int, bits: int, size: int) -> dict[str, Any]:
        found = plain(kernel, capability, bits, size)
        used.append((kernel, found))
        return found

    launch._config = config
    launch.recorder = lambda kernel, arguments: jobs.append(_job(kernel, target, arguments))
    try:
        for size, bits in sizes:
            call(size, torch.float32 if bits == 32 else torch.bfloat16)
    finally:
        launch._config, launch.recorder = plain, None
    yield from dict.fromkeys(jobs)
    for name in kernels:
        shadowed = {_key(row) for row in launch.table()[name] if target >= row["capability"] > 0}
        best = {key: max(r["capability"] for r in launch.table()[name] if _key(r) == key and r["capability"] <= target)
                for key in shadowed}  # fmt: skip
        for row in launch.table()[name]:
            bare = {key: value for key, value in row.items() if key not in launch.KEYS}
            if row["capability"] == best.get(_key(row)) and (name, bare) not in used:
                yield f"{op}: no call uses the row {row} of {name} on sm_{target}"


def launched(source: str, target: int) -> Iterator[Job | str]:
    """What a source of `launches.py` launches on a GPU of capability `target`; complaints as str."""
    launch.capability = lambda device: target
    launch._config.cache_clear()
    jobs: list[Job] = []
    silent = launches.record(source, lambda kernel, arguments: jobs.append(_job(kernel, target, arguments)))
    yield from dict.fromkeys(jobs)
    yield from (f"{name}: launches no kernel of ours" for name in silent)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("size"), row.get("bits")


def _job(kernel: Any, target: int, arguments: dict[str, Any]) -> Job:
    """Let Triton's own launch specialise the arguments, as for a GPU of capability `target`."""
    backend = make_backend(GPUTarget("cuda", target, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialization, options)
    plain = tuple((place, x.value if isinstance(x, tl.constexpr) else x) for place, x in constants.items())
    return Job(
        kernel.fn.__module__, kernel.fn.__name__, target, tuple(signature.items()), plain,
        tuple((place, tuple(map(tuple, found))) for place, found in attributes.items() if found),
        tuple(sorted(options.items())),
    )  # fmt: skip


def compiled(jobs: list[Job], check: bool) -> tuple[list[Result], list[str]]:
    """The results of jobs that differ in their targets only, and complaints.

    The first is compiled as Triton does it, and the others, its twins, by Triton's ptxas from the first one's PTX. With
    `check` it is compiled for them, too, to see that this is what Triton would have made.
    """
    gc.disable()  # It would take a tenth of the time, over the compiler's many small objects.
    made, log, seconds = _built(jobs[0])
    results, told = [_result(jobs[0], made, made.asm["cubin"], log, seconds)], []
    for job in jobs[1:]:
        ptx = _retargeted(made.asm["ptx"], job.target)
        if check and _retargeted(_built(job)[0].asm["ptx"], job.target) != ptx:
            told.append(f"{job.kernel}: for sm_{job.target} Triton makes other PTX than for sm_{jobs[0].target}")
        backend = make_backend(GPUTarget("cuda", job.target, 32))
        started = time.perf_counter()
        with _ptxas_log() as said:
            cubin = backend.make_cubin(ptx, {}, backend.parse_options(dict(job.options)), job.target)
        results.append(_result(job, made, cubin, said.getvalue(), time.perf_counter() - started))
    gc.collect()
    return results, told


def _kernel(job: Job) -> Any:
    return getattr(import_module(job.module), job.kernel)


def _built(job: Job) -> tuple[Any, str, float]:
    """A kernel as Triton compiles it, what ptxas says, and the seconds it took."""
    kernel = _kernel(job)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=dict(job.signature), constexprs=dict(job.constants), attrs=dict(job.attributes))
    started = time.perf_counter()
    with _ptxas_log() as said:
        made = triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=dict(job.options))
    return made, said.getvalue(), time.perf_counter() - started


@contextmanager
def _ptxas_log() -> Iterator[StringIO]:
    with redirect_stdout(StringIO()) as said, mock.patch.dict(os.environ, {"TRITON_DUMP_PTXAS_LOG": "1"}):
        yield said


def _retargeted(ptx: str, target: int) -> str:
    return re.sub(r"(?m)^\.target sm_\d+", f".target sm_{target}", ptx)


def _result(job: Job, made: Any, cubin: bytes, log: str, seconds: float) -> Result:
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    spills = int(re.findall(r"(\d+) bytes stack frame", log)[0])
    hot, loops = local_accesses(_disassembled(cubin)) if spills else (0, 0)
    gluon, ir, ptx = _kernel(job).is_gluon(), made.asm["ttgir"], made.asm["ptx"]
    return Result(
        registers, spills, hot, loops, made.metadata.shared, round(seconds, 2),
        wgmma="wgmma" in ptx,
        dots=gluon or ("tt.dot" in made.asm["ttir"] and "bf16" in made.asm["ttir"]),
        ahead=gluon or -1 < ir.find("async_copy_global_to_local") < ir.rfind("scf.for "),
        gluon=gluon,
        groups=not gluon or _asked_registers(job) <= set(re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)),
        waits=" ".join(sorted(set(re.findall(r"C75\d\d", log)))),
    )  # fmt: skip


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return subprocess.run([str(tool), "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout


def _asked_registers(job: Job) -> set[str]:
    """Of a thread, in each kind of warpgroup, as the launch of a warp-specialised kernel says."""
    constants, names = dict(job.constants), [name for name, _ in job.signature]
    return {str(constants[names.index(name),]) for name in ("REGISTERS", "PRODUCER_REGISTERS")}


def complaints(job: Job, result: Result) -> Iterator[str]:
    most = MOST_SPILT_A_TILE if result.gluon else MOST_SPILT
    in_loops = 0 if result.gluon else result.loops // LOOP_SHARE
    if result.hot > in_loops or result.spills > most:
        reading = f"which {result.hot} of {result.loops} instructions of loops reach for"
        yield f"{result.spills} bytes of registers spilt to local memory, {reading}"
    if result.shared > SHARED[job.target]:
        yield f"{result.shared:,} bytes of shared memory, of {SHARED[job.target]:,}"
    if job.target == 90 and result.dots and not result.wgmma:
        yield "a matrix kernel without wgmma"
    if not result.groups:
        yield "warpgroups with another number of registers than the launch asks for"
    if result.gluon and result.waits:
        yield f"products that ptxas makes wait for each other: {result.waits}"
    if result.dots and not result.ahead and dict(job.options).get("num_stages", 1) > 1:
        yield "no load runs ahead of the products: an address hangs on a branch or on what the loop computes"


def cache_key(job: Job) -> str:
    """Changes with whatever the machine code could change with: the kernel and what it calls, its arguments, Triton."""
    return hashlib.sha256(repr((_kernel(job).cache_key, triton.__version__, job, Result._fields)).encode()).hexdigest()


def recorded_by(name: str, target: int) -> tuple[list[str], dict[Job, str]]:
    """What an op or a source launches on a GPU of capability `target`: complaints, and the jobs with their keys."""
    items = list(recorded(name, *OPS[name], target) if name in OPS else launched(name, target))
    return [x for x in items if isinstance(x, str)], {x: cache_key(x) for x in items if isinstance(x, Job)}


def _short_last(job: Job) -> tuple[bool, bool]:
    """Those that take ten times as long as others come first, so that no core is left with one of them at the end."""
    return "gluon" not in job.kernel, "attention" not in job.kernel


def main() -> int:
    all_names = (*OPS, *SOURCES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(all_names)}; default all")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 89, 90], choices=list(SHARED))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if unknown := set(args.ops) - set(all_names):
        parser.error(f"unknown op {min(unknown)}: expected some of {', '.join(all_names)}")
    names = args.ops or all_names
    gc.freeze()  # Workers look for garbage after each job: not among what is there already, a tenth of a second each.
    pairs = [(name, target) for name in names for target in args.targets if target in SOURCES.get(name, SHARED)]
    with (
        tempfile.TemporaryDirectory() as folder,  # Triton's cache: what it has there it would not compile.
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}),
        # Workers are forked: they hold the modules already, and nothing here has threads that matter.
        ProcessPoolExecutor(args.workers, mp_context=get_context("fork")) as pool,
    ):
        keys: dict[Job, str] = {}  # Sources launch much that an op's own calls have launched already.
        failures: list[str] = []
        for told, recorded_keys in pool.map(recorded_by, *zip(*pairs, strict=True)):
            failures += told
            keys |= recorded_keys
        cache = json.loads(CACHE.read_text()) if CACHE.exists() else {}
        new = [job for job in keys if keys[job] not in cache]
        alike: dict[Job, list[Job]] = {}
        for job in new:
            alike.setdefault(job._replace(target=TWINS.get(job.target, job.target)), []).append(job)
        fresh: dict[Job, tuple[Future[tuple[list[Result], list[str]]], int]] = {}
        checked: set[str] = set()  # kernels of which one variant is compiled for its twin as well
        for first in sorted(alike, key=_short_last):
            group = sorted(alike[first], key=lambda job: job.target)
            check = len(group) > 1 and first.kernel not in checked
            checked |= {first.kernel} if check else set()
            future = pool.submit(compiled, group, check)
            fresh |= {job: (future, i) for i, job in enumerate(group)}
        print(f"{'kernel':30} {'target':6} {'regs':>4} {'spill':>5} {'shared':>7} {'s':>6}  variant", flush=True)
        for job, key in keys.items():
            if job in fresh:
                future, i = fresh[job]
                cache[key] = future.result()[0][i]
            result = Result(*cache[key])
            row = f"{job.kernel:30} sm_{job.target:<3} {result.registers:4} {result.spills:5} {result.shared:7} "
            print(f"{row}{result.seconds:6.1f}  {job.label()}", flush=True)
            failures += [f"{job.kernel} on sm_{job.target} ({job.label()}): {text}" for text in complaints(job, result)]
    for future in dict.fromkeys(future for future, _ in fresh.values()):
        failures += future.result()[1]
    if not args.ops and (missing := set(launch.table()) - {name for kernels, _ in OPS.values() for name in kernels}):
        failures.append(f"the launch table's {', '.join(sorted(missing))}: no op of this script covers it")
    CACHE.write_text(json.dumps(cache))
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(keys)} compiled kernels ({len(new)} now, the rest cached), {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
