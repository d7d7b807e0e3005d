"""Compiles every Triton kernel for real GPUs on a machine that has none, and fails on what would make it slow there.

    python benchmarks/compile_gate.py                    # all ops for sm_80, sm_89, sm_90
    python benchmarks/compile_gate.py attention training --targets 90

Each public function runs forward and backward on small CPU tensors while launches are recorded instead of run, once for
each row of the launch table that the target would use; and what the benchmarks, a training step and the self-test
launch is recorded by running them (`launches.py`), for the GPU that they are meant for, sm_90. Every recorded launch is
then compiled as Triton would compile it on that GPU. Failures:

- registers spilt to local memory, but for a few bytes (`MOST_SPILT`), which cost some cycles of a program's tens of
  thousands where no loop reads them, and where one does, at most one instruction in `LOOP_SHARE`, or 0.4 % of it: dK
  and dV of head dim 128 need all of Hopper's registers, and which word is left over changes with the compiler;
- more shared memory than the GPU has;
- a matrix kernel without wgmma instructions on sm_90;
- a matrix kernel whose loads do not run ahead of its products, though it has stages for that;
- of the Gluon kernels, whose warpgroups have registers of their own: another number than asked for; any instruction of
  a loop of products that reaches for a spilt one, or more than `MOST_SPILT_A_TILE` bytes of them (outside of that loop
  a program has thousands of cycles for each tile, so there they are nothing);
- a warning of ptxas that it makes products wait for each other (C7510 and its like);
- a row of the launch table that nothing used.

Results are cached by the kernel's source and arguments in .compile_gate.json (ignored by git), so only what changed is
compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
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
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from afina.kernels import activation, adamw, attention, blockwise, cross_entropy, decode, launch, nf4, norm, rope

REPO = Path(__file__).resolve().parent.parent
CACHE = REPO / ".compile_gate.json"
SOURCES = {"benchmarks": (90,), "training": (90,), "selftest": (90,)}  # of launches -> for which targets
MOST_SPILT = 32  # bytes
LOOP_SHARE = 250
MOST_SPILT_A_TILE = 128  # bytes, of Gluon kernels: of dk and dv of packed documents, head dim 128, Triton 3.6
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes that one block can have


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def backward(*outs: Tensor) -> None:
    torch.autograd.backward(list(outs), [torch.ones_like(out) for out in outs])


def glu(size: int, dtype: torch.dtype) -> None:
    for function in (activation.swiglu, activation.geglu):
        backward(function(leaf(16, 256, dtype=dtype), backend="triton"))


def norms(size: int, dtype: torch.dtype) -> None:
    width = min(size, 50_000)  # the last row of the table is for rows longer than any tile
    x, residual, weight = leaf(4, width, dtype=dtype), leaf(4, width, dtype=dtype), leaf(width, dtype=dtype)
    heads = leaf(2, 3, 5, 128, dtype=dtype)[:, :, :3]  # short rows, unevenly apart
    backward(norm.rms_norm(heads, leaf(128, dtype=torch.float32), backend="triton"))
    backward(*norm.rms_norm(x, weight, residual=residual, backend="triton"))
    backward(norm.rms_norm(x, weight.detach(), backend="triton"))
    backward(norm.layer_norm(x, weight, backend="triton"))
    backward(*norm.layer_norm(x, weight, weight, residual=residual, backend="triton"))


def ropes(size: int, dtype: torch.dtype) -> None:
    for dim, half in ((128, 64), (256, 32), (512, 256)):  # the whole head, a part of it, the longest heads
        heads = leaf(2, 4, 48, dim, dtype=dtype)
        angles = torch.zeros(4, half)
        arguments = heads[:, :, :32], heads[:, :, 32:40], angles, angles
        backward(*rope.rope(*arguments, backend="triton"))
        for weight in (leaf(dim, dtype=dtype), torch.zeros(dim)):
            backward(*rope.rope(*arguments, q_weight=weight, k_weight=weight, backend="triton"))


def decode_attention(size: int, dtype: torch.dtype) -> None:
    dim = max(size, 16)
    options: dict[str, Any]
    for rows, options in ((1, {}), (300, {"softcap": 30.0, "window": 1000})):  # keys split, and not
        cache = torch.zeros(rows, 512, 2, dim, dtype=dtype)
        q, lengths = torch.zeros(rows, 8, dim, dtype=dtype), torch.zeros(rows, dtype=torch.int32)
        decode.decode_attention(q, cache, cache, lengths, backend="triton", **options)


def attentions(size: int, dtype: torch.dtype) -> None:
    """Packed, as in training, for each row; at 128 and 256 also with every option, and without the causal mask."""
    launch.config("attention_backend", torch.device("cpu"), dtype=dtype, size=size)
    if size == 0:  # rows for heads of any size
        return
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    q, k = leaf(256, 8, size, dtype=dtype), leaf(256, 2, size, dtype=dtype)
    backward(attention.attention(q, k, k, cu_seqlens=offsets, backend="triton"))
    if size in (128, 256) and dtype == torch.bfloat16:
        backward(attention.attention(q, k, k, cu_seqlens=offsets, window=100, softcap=30.0, backend="triton"))
        q, k = (x[None] for x in (q, k))
        backward(attention.attention(q, k, k, causal=False, backend="triton"))


def cross_entropies(size: int, dtype: torch.dtype) -> None:
    targets = torch.zeros(64, dtype=torch.int64)
    targets[:3] = -100
    every: dict[str, Any] = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    hidden, weight, bias = leaf(64, 128, dtype=dtype), leaf(1024, 128, dtype=dtype), leaf(1024, dtype=dtype)
    for reduction, options in (("mean", {}), ("none", every | {"bias": bias})):
        arguments = {"reduction": reduction, "backend": "triton"} | options
        for lean in (False, True):
            backward(cross_entropy.linear_cross_entropy(hidden, weight, targets, lean=lean, **arguments))
        arguments.pop("bias", None)
        backward(cross_entropy.cross_entropy(leaf(64, 1024, dtype=dtype), targets, **arguments))
        backward(cross_entropy.cross_entropy(leaf(64, 1023, dtype=dtype), targets, **arguments))


def adamw_steps(size: int, dtype: torch.dtype) -> None:
    """fp32 parameters with a bf16 copy; bf16 parameters, rounded stochastically, with bf16 and with 8-bit moments; and
    each with step and rate on the device, as a CUDA graph has them."""
    options: dict[str, Any] = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    x, master = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(64, 256)
    skip = torch.zeros((), dtype=torch.bool)
    m, v = (blockwise.State8.zeros_like(x, signed=signed) for signed in (True, False))
    on_device = {"step": torch.tensor(1), "lr": torch.tensor(1e-3, dtype=torch.float64)}
    for clock in ({}, on_device):
        every = options | clock
        adamw.adamw_([master], [x], [master], [master], copies=[x], skip=skip, backend="triton", **every)
        adamw.adamw_([x], [x], [x], [x], seed=0, skip=skip if clock else None, backend="triton", **every)
        adamw.adamw_([x], [x], [m], [v], seed=0, skip=skip, backend="triton", **every)


def dequantize(size: int, dtype: torch.dtype) -> None:
    for double_quant in (True, False):
        weight = torch.ones(64, 256, dtype=dtype)
        packed, state = nf4.quantize_nf4(weight, blocksize=size, double_quant=double_quant)
        nf4.dequantize_nf4(packed, state, backend="triton")


# Op -> (the kernels of the launch table that it covers, a call of it with the row's size and dtype).
OPS: dict[str, tuple[tuple[str, ...], Callable[[int, torch.dtype], None]]] = {
    "attention": (
        ("attention_forward", "attention_dkdv", "attention_dq", "attention_delta", "attention_backend"),
        attentions,
    ),
    "rope": (("rope", "rope_norm_backward"), ropes),
    "norm": (("norm_forward", "norm_backward"), norms),
    "glu": (("glu",), glu),
    "cross_entropy": (("cross_entropy", "cross_entropy_scale"), cross_entropies),
    "decode_attention": (("decode", "decode_combine"), decode_attention),
    "adamw": (("adamw",), adamw_steps),
    "nf4": (("nf4",), dequantize),
}


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


def compiled(job: Job) -> Result:
    """Compile as Triton does, in the folder that it has for that, and read what ptxas says and the machine code."""
    kernel = getattr(import_module(job.module), job.kernel)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=dict(job.signature), constexprs=dict(job.constants), attrs=dict(job.attributes))
    started = time.perf_counter()
    triton.knobs.nvidia.dump_ptxas_log = True  # on standard output
    with redirect_stdout(StringIO()) as said:
        made = triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=dict(job.options))
    seconds = time.perf_counter() - started
    log, ir, ptx = said.getvalue(), made.asm["ttgir"], made.asm["ptx"]
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    spills = int(re.findall(r"(\d+) bytes stack frame", log)[0])
    hot, loops = local_accesses(_disassembled(made.asm["cubin"])) if spills else (0, 0)
    gluon = kernel.is_gluon()
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
    if result.waits:
        yield f"products that ptxas makes wait for each other: {result.waits}"
    if result.dots and not result.ahead and dict(job.options).get("num_stages", 1) > 1:
        yield "no load runs ahead of the products: an address hangs on a branch or on what the loop computes"


def cache_key(job: Job) -> str:
    """Changes with whatever the machine code could change with: the kernel and what it calls, its arguments, Triton."""
    kernel = getattr(import_module(job.module), job.kernel)
    return hashlib.sha256(repr((kernel.cache_key, triton.__version__, job, Result._fields)).encode()).hexdigest()


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
        new = sorted((job for job in keys if keys[job] not in cache), key=_short_last)
        fresh = {job: pool.submit(compiled, job) for job in new}
        print(f"{'kernel':30} {'target':6} {'regs':>4} {'spill':>5} {'shared':>7} {'s':>6}  variant", flush=True)
        for job, key in keys.items():
            if job in fresh:
                cache[key] = fresh[job].result()
            result = Result(*cache[key])
            row = f"{job.kernel:30} sm_{job.target:<3} {result.registers:4} {result.spills:5} {result.shared:7} "
            print(f"{row}{result.seconds:6.1f}  {job.label()}", flush=True)
            failures += [f"{job.kernel} on sm_{job.target} ({job.label()}): {text}" for text in complaints(job, result)]
    if not args.ops and (missing := set(launch.table()) - {name for kernels, _ in OPS.values() for name in kernels}):
        failures.append(f"the launch table's {', '.join(sorted(missing))}: no op of this script covers it")
    CACHE.write_text(json.dumps(cache))
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(keys)} compiled kernels ({len(new)} now, the rest cached), {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
