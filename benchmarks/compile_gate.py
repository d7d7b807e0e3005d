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
- of the Gluon kernels, whose warpgroups have registers of their own: another number than asked for, a warning of ptxas
  that it makes products wait for each other (C7510 and its like), or more than `MOST_SPILT_A_TILE` bytes spilt (a
  program has thousands of cycles for each tile, so outside of its loop of products they are nothing), or one
  instruction in `LOOP_SHARE_GLUON` of that loop reaching for them;
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import launches
import torch
import triton  # before the kernels: they take the compiler only where something will use it
import triton.language as tl
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
MOST_SPILT_A_TILE, LOOP_SHARE_GLUON = 192, 64  # dk and dv of head dim 128, masks of the diagonal and ends included
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
    """fp32 parameters with a bf16 copy; bf16 parameters, rounded stochastically, with bf16 and with 8-bit moments."""
    options: dict[str, Any] = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    x, master = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(64, 256)
    skip = torch.zeros((), dtype=torch.bool)
    adamw.adamw_([master], [x], [master], [master], copies=[x], skip=skip, backend="triton", **options)
    adamw.adamw_([x], [x], [x], [x], seed=0, backend="triton", **options)
    m, v = (blockwise.State8.zeros_like(x, signed=signed) for signed in (True, False))
    adamw.adamw_([x], [x], [m], [v], seed=0, skip=skip, backend="triton", **options)


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
    kernel = getattr(sys.modules[job.module], job.kernel)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=dict(job.signature), constexprs=dict(job.constants), attrs=dict(job.attributes))
    started = time.perf_counter()
    made = triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=dict(job.options))
    seconds = time.perf_counter() - started
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

        def dumped(what: str) -> str:
            command = [str(tool), f"--dump-{what}", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", dumped("resource-usage"))
        found = {name: int(value) for name, value in usage}
        spills = found["STACK"] + found["LOCAL"]
        hot, loops = local_accesses(dumped("sass")) if spills else (0, 0)
        gluon = kernel.is_gluon()
        groups, waits = (_warpgroups(made.asm["ptx"], dict(job.constants), job, tool)) if gluon else (True, "")
    dots = gluon or ("tt.dot" in made.asm["ttir"] and "bf16" in made.asm["ttir"])
    ir = made.asm["ttgir"]
    ahead = gluon or -1 < ir.find("async_copy_global_to_local") < ir.rfind("scf.for ")
    wgmma = "wgmma" in made.asm["ptx"]
    shared = made.metadata.shared
    return Result(
        found["REG"], spills, hot, loops, shared, round(seconds, 2), wgmma, dots, ahead, gluon, groups, waits
    )  # fmt: skip


def _warpgroups(ptx: str, constants: dict[tuple[int, ...], Any], job: Job, tool: Path) -> tuple[bool, str]:
    """Whether a warp-specialised kernel asks for the registers that its launch says, and ptxas' warnings of waits."""
    names = [name for name, _ in job.signature]
    asked = {str(constants[names.index(name),]) for name in ("REGISTERS", "PRODUCER_REGISTERS")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [str(tool.with_name("ptxas")), "-v", f"--gpu-name=sm_{job.target}a", str(file), "-o", f"{file}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return asked <= set(re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)), " ".join(sorted(set(re.findall(r"C75\d\d", said))))


def local_accesses(sass: str) -> tuple[int, int]:
    """Loads and stores of local memory in the innermost loops of a disassembly, and all instructions there; of all of
    it where there is no loop. Where loops hold matrix products of a warpgroup, these count: within them are others, in
    which a thread waits at a barrier."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?;)", sass, re.MULTILINE)]
    jumps = [(at, re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for at, text in lines]
    # The last instruction of all jumps to itself.
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    products = [at for at, text in lines if re.search(r"\bHGMMA\b", text)]
    # A loop's end is a conditional jump; the others lead back from where a thread went to wait.
    ends = {at for at, text in lines if text.startswith("@")}
    multiplying = [(a, b) for a, b in loops if b in ends and any(a <= at <= b for at in products)]
    loops = multiplying or loops
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in loops)]
    repeated = [text for at, text in lines if not inner or any(a <= at <= b for a, b in inner)]
    return sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in repeated), len(repeated)


def complaints(job: Job, result: Result) -> Iterator[str]:
    most, share = (MOST_SPILT_A_TILE, LOOP_SHARE_GLUON) if result.gluon else (MOST_SPILT, LOOP_SHARE)
    if result.hot * share > result.loops or result.spills > most:
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
    kernel = getattr(sys.modules[job.module], job.kernel)
    return hashlib.sha256(repr((kernel.cache_key, triton.__version__, job, Result._fields)).encode()).hexdigest()


def main() -> int:
    all_names = (*OPS, *SOURCES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(all_names)}; default all")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 89, 90], choices=list(SHARED))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if unknown := set(args.ops) - set(all_names):
        parser.error(f"unknown op {min(unknown)}: expected some of {', '.join(all_names)}")
    failures, found = [], {}
    for name in args.ops or all_names:
        for target in args.targets:
            if name in SOURCES and target not in SOURCES[name]:
                continue
            for item in recorded(name, *OPS[name], target) if name in OPS else launched(name, target):
                if isinstance(item, str):
                    failures.append(item)
                else:
                    found[item] = None  # Sources launch much that an op's own calls have launched already.
    jobs = list(found)
    if not args.ops and (missing := set(launch.table()) - {name for kernels, _ in OPS.values() for name in kernels}):
        failures.append(f"the launch table's {', '.join(sorted(missing))}: no op of this script covers it")
    cache = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    keys = {job: cache_key(job) for job in jobs}
    new = [job for job in jobs if keys[job] not in cache]
    print(f"{'kernel':30} {'target':6} {'regs':>4} {'spill':>5} {'shared':>7} {'s':>6}  variant", flush=True)
    # Workers are forked: they hold the modules already, and nothing here has threads that matter.
    with ProcessPoolExecutor(args.workers, mp_context=get_context("fork")) as pool:
        fresh = pool.map(compiled, new)
        for job in jobs:
            if keys[job] not in cache:
                cache[keys[job]] = next(fresh)
            result = Result(*cache[keys[job]])
            row = f"{job.kernel:30} sm_{job.target:<3} {result.registers:4} {result.spills:5} {result.shared:7} "
            print(f"{row}{result.seconds:6.1f}  {job.label()}", flush=True)
            failures += [f"{job.kernel} on sm_{job.target} ({job.label()}): {text}" for text in complaints(job, result)]
    CACHE.write_text(json.dumps(cache))
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(jobs)} compiled kernels ({len(new)} now, the rest cached), {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
