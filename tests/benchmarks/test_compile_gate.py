"""The compile gate sees what it is there for: spills, too much shared memory, missing wgmma, rows that nothing uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

# Its own process: kernels here belong to the interpreter.
RUN = """
import sys
sys.path.insert(0, "benchmarks")
import compile_gate
from pathlib import Path
from afina.kernels import launch
compile_gate.CACHE = Path(sys.argv[1])
table = launch.table()
{change}
sys.argv = ["compile_gate.py", "glu", "--targets", "90", "--workers", "1"]
sys.exit(compile_gate.main())
"""


def gate(cache: Path, change: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN.format(change=change), str(cache)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240)


def test_passes_and_remembers(tmp_path: Path) -> None:
    for again in (False, True):
        done = gate(tmp_path / "cache.json", "")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[0].split() == ["kernel", "target", "regs", "spill", "shared", "s", "variant"]
        assert ("(0 now, the rest cached), 0 failures" in done.stdout) == again
    changed = gate(tmp_path / "cache.json", "table['glu'][1]['BLOCK'] = 512")
    assert "(4 now" in changed.stdout


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("table['glu'][1].update(BLOCK=8192, num_warps=1)", "bytes of registers spilt to local memory"),
        ("compile_gate.SHARED[90] = -1", "0 bytes of shared memory, of -1"),
        ("table['glu'].append({'capability': 90, 'size': 7, 'BLOCK': 8})", "no call uses the row {'capability': 80"),
    ],
)
def test_fails(tmp_path: Path, change: str, complaint: str) -> None:
    done = gate(tmp_path / "cache.json", change)
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stdout


def test_a_kernel_that_no_op_covers_fails(tmp_path: Path) -> None:
    code = RUN.format(
        change="table.clear(); table['other'] = []; compile_gate.OPS.clear(); compile_gate.SOURCES.clear()"
    ).replace('"glu", ', "")
    command = [sys.executable, "-c", code, str(tmp_path / "cache.json")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED the launch table's other: no op of this script covers it" in done.stdout


def test_a_matrix_kernel_needs_wgmma_on_hopper_and_loads_ahead() -> None:
    code = """
import sys
sys.path.insert(0, "benchmarks")
from compile_gate import Job, Result, complaints
job = Job("m", "k", {target}, (), (), (), (("num_stages", 2),))
print(list(complaints(job, Result(32, 0, 0, 0, 0, 1.0, wgmma={wgmma}, dots=True, ahead={wgmma}))))
"""
    for target, wgmma, told in ((90, False, True), (90, True, False), (80, False, False)):
        command = [sys.executable, "-c", code.format(target=target, wgmma=wgmma)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        assert ("without wgmma" in done.stdout) == told
        assert ("no load runs ahead" in done.stdout) != wgmma


# A kernel that takes a view: a pointer and a stride, a constant that is wrapped and one that is an integer equal to 1.
TUPLE = """
from typing import Any, NamedTuple
import torch, triton
import triton.language as tl
class View(NamedTuple):
    ptr: Any
    stride: Any
    step: Any
    SCALE: Any
@triton.jit(do_not_specialize=["length"])
def kernel(x, out, length, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x.ptr + at * x.stride, mask=at * x.step < length) * x.SCALE)
"""


def test_fields_of_tuples_are_specialised_as_arguments_are(tmp_path: Path) -> None:
    """A place in a tuple says which field is constant, or divisible by 16; an unspecialised length is neither."""
    (tmp_path / "tuples.py").write_text(TUPLE)
    code = f"""
import sys
sys.path[:0] = ["benchmarks", {str(tmp_path)!r}]
import torch
from compile_gate import _job, compiled
from tuples import View, kernel, tl
x = torch.zeros(4096)
for stride, length in ((32, 16), (33, 1)):
    view = View(x[stride % 2:], stride, 1, tl.constexpr(3))
    job = _job(kernel, 90, dict(x=view, out=x, length=length, BLOCK=64, num_warps=1))
    places = [place for place, _ in job.attributes]
    print(tuple(job.signature[0][1]), dict(job.signature)["length"], "|", job.label(), "|", places)
    print(compiled(job).registers > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=240)
    kinds = "('*fp32', 'i32', 'constexpr', 'constexpr') i32 | x.step=1 x.SCALE=3 BLOCK=64 | "
    assert done.stdout.splitlines() == [f"{kinds}[(0, 0), (0, 1), (1,)]", "True", f"{kinds}[(1,)]", "True"], done.stderr


@pytest.mark.parametrize(
    ("sass", "count"),
    [
        ("/*0000*/ STL [R1], R2 ;\n/*0010*/ FADD R3, R3, R4 ;\n/*0020*/ LDL R2, [R1] ;\n/*0030*/ BRA 0x30;", (2, 4)),
        (
            "/*0000*/ STL [R1], R2 ;\n/*0010*/ FADD R3, R3, R4 ;\n/*0020*/ @P0 BRA 0x10 ;\n/*0030*/ LDL R2, [R1] ;",
            (0, 2),
        ),
        ("/*0000*/ STL [R1], R2 ;\n/*0010*/ LDL.LU R3, [R1] ;\n/*0020*/ @!P0 BRA P1, 0x10 ;\n/*0030*/ EXIT ;", (1, 2)),
        # An outer loop from 0 to 40 around an inner one from 20 to 30.
        ("/*0000*/ LDL R2, [R1] ;\n/*0020*/ FADD R3, R3, R4 ;\n/*0030*/ BRA 0x20 ;\n/*0040*/ BRA 0x0 ;", (0, 2)),
        # A loop of products from 10 to 40: in it a wait from 20 to 20, and behind it, at 50, the way back from another.
        (
            "/*0000*/ STL [R1], R2 ;\n/*0010*/ HGMMA R2 ;\n/*0020*/ @!P0 BRA 0x20 ;\n/*0030*/ LDL R2, [R1] ;\n"
            "/*0040*/ @P1 BRA 0x10 ;\n/*0050*/ BRA 0x10 ;",
            (1, 4),
        ),
    ],
)
def test_spills_count_where_they_are_repeated_most(sass: str, count: tuple[int, int]) -> None:
    code = f"import sys; sys.path.insert(0, 'benchmarks'); import compile_gate as g; print(*g.local_accesses({sass!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert tuple(map(int, done.stdout.split())) == count


def test_a_loop_may_reach_for_a_spilt_word_as_one_instruction_in_250() -> None:
    code = """
import sys
sys.path.insert(0, "benchmarks")
from compile_gate import Job, Result, complaints
job = Job("m", "k", 80, (), (), (), ())
for spills, hot, loops in ((8, 2, 500), (8, 2, 499), (32, 0, 10), (40, 0, 10), (0, 0, 0)):
    print(len(list(complaints(job, Result(255, spills, hot, loops, 0, 1.0, False, False, False)))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "0", "1", "0"]


def test_warpgroups_have_limits_of_their_own() -> None:
    """Of spills; of registers that are not what was asked for, and of products that wait, there may be none."""
    code = """
import sys
sys.path.insert(0, "benchmarks")
from compile_gate import Job, Result, complaints
job = Job("m", "k", 90, (), (), (), ())
base = Result(168, 0, 0, 0, 0, 1.0, True, True, True, gluon=True)
for change in ({}, {"spills": 192}, {"spills": 200}, {"spills": 8, "hot": 6, "loops": 384},
               {"spills": 8, "hot": 7, "loops": 384}, {"groups": False}, {"waits": "C7514"}):
    print(len(list(complaints(job, base._replace(**change)))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "1", "0", "1", "1", "1"]
