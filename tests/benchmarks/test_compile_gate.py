"""The compile gate sees what it is there for: spills, too much shared memory, missing wgmma, rows that nothing uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

from compile_gate import MOST_SPILT, MOST_SPILT_A_TILE, Job, Result, complaints

# Compiled are the smallest kernels only. A process of its own, one for all runs: here kernels are the interpreter's.
RUNS = """
import copy, io, json, sys
from contextlib import redirect_stdout
sys.path.insert(0, "benchmarks")
import compile_gate
from pathlib import Path
from afina.kernels import launch
table = launch.table()
kept = copy.deepcopy(table), dict(compile_gate.SHARED), dict(compile_gate.OPS), dict(compile_gate.SOURCES)
for name, (ops, change) in json.loads(sys.argv[2]).items():
    for now, before in zip((table, compile_gate.SHARED, compile_gate.OPS, compile_gate.SOURCES), copy.copy(kept)):
        now.clear()
        now.update(copy.deepcopy(before))
    exec(change)
    compile_gate.CACHE = Path(sys.argv[1])
    targets = ("80", "89") if name.startswith("twins") else ("90",)
    arguments, sys.argv = sys.argv, ["compile_gate.py", *ops, "--targets", *targets, "--workers", "1"]
    said = io.StringIO()
    with redirect_stdout(said):
        status = compile_gate.main()
    sys.argv = arguments
    print(json.dumps([name, status, said.getvalue()]))
"""
CHANGES = {
    "first": (["glu"], ""),
    "again": (["glu"], ""),
    "another block": (["glu"], "table['glu'][1]['BLOCK'] = 512"),
    "spills": (["glu"], "table['glu'][1].update(num_warps=1, maxnreg=32)"),
    "shared memory": (["glu"], "compile_gate.SHARED[90] = -1"),
    "unused row": (["glu"], "table['glu'].append({'capability': 90, 'size': 7, 'BLOCK': 8})"),
    "twins": (["nf4"], ""),
    "twins that differ": (
        ["nf4"],
        "table['nf4'][1]['num_warps'] = 8; compile_gate._retargeted = lambda ptx, target: ptx",
    ),
    "no op": (
        [],
        "table.clear(); table['other'] = []; compile_gate.OPS.clear(); compile_gate.SOURCES.clear()",
    ),
}


class Run(NamedTuple):
    status: int
    said: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """What the gate answers with each change, by name, in this order, over one cache."""
    cache = tmp_path_factory.mktemp("gate") / "cache.json"
    command = [sys.executable, "-c", RUNS, str(cache), json.dumps(CHANGES)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return {name: Run(status, said) for name, status, said in map(json.loads, done.stdout.splitlines())}


def test_passes_and_remembers(runs: dict[str, Run]) -> None:
    for name in ("first", "again"):
        assert runs[name].status == 0, runs[name].said
        heads = ["kernel", "target", "regs", "spill", "shared", "s", "variant"]
        assert runs[name].said.splitlines()[0].split() == heads
        assert ("(0 now, the rest cached), 0 failures" in runs[name].said) == (name == "again")
    assert "(4 now" in runs["another block"].said


def test_what_is_the_same_for_two_targets_is_compiled_for_one(runs: dict[str, Run]) -> None:
    said = runs["twins"].said
    assert runs["twins"].status == 0, said
    assert "8 compiled kernels (8 now, the rest cached), 0 failures" in said
    registers = {
        target: [line.split()[2:5] for line in said.splitlines() if f" sm_{target}" in line] for target in (80, 89)
    }
    assert len(registers[80]) == len(registers[89]) == 4


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("spills", "bytes of registers spilt to local memory"),
        ("shared memory", "0 bytes of shared memory, of -1"),
        ("unused row", "no call uses the row {'capability': 80"),
        ("twins that differ", "FAILED _nf4_dequantize: for sm_89 Triton makes other PTX than for sm_80"),
        ("no op", "FAILED the launch table's other: no op of this script covers it"),
    ],
)
def test_fails(runs: dict[str, Run], name: str, complaint: str) -> None:
    assert runs[name].status == 1, runs[name].said
    assert complaint in runs[name].said


def job(target: int = 90, **options: int) -> Job:
    return Job("m", "k", target, (), (), (), tuple(options.items()))


def result(**found: Any) -> Result:
    return Result(32, 0, 0, 0, 0, 1.0, wgmma=False, dots=False, ahead=False)._replace(**found)


@pytest.mark.parametrize(("target", "wgmma", "told"), [(90, False, True), (90, True, False), (80, False, False)])
def test_a_matrix_kernel_needs_wgmma_on_hopper_and_loads_ahead(target: int, wgmma: bool, told: bool) -> None:
    said = " ".join(complaints(job(target, num_stages=2), result(dots=True, wgmma=wgmma, ahead=wgmma)))
    assert ("without wgmma" in said) == told
    assert ("no load runs ahead" in said) != wgmma


@pytest.mark.parametrize(
    ("spills", "hot", "loops", "told"),
    [(8, 2, 500, 0), (8, 2, 499, 1), (MOST_SPILT, 0, 10, 0), (MOST_SPILT + 8, 0, 10, 1), (0, 0, 0, 0)],
)
def test_a_loop_may_reach_for_a_spilt_word_as_one_instruction_in_250(
    spills: int, hot: int, loops: int, told: int
) -> None:
    assert len(list(complaints(job(), result(spills=spills, hot=hot, loops=loops)))) == told


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, 0),
        ({"spills": MOST_SPILT_A_TILE, "loops": 800}, 0),
        ({"spills": MOST_SPILT_A_TILE + 8, "loops": 800}, 1),
        ({"spills": 8, "hot": 1, "loops": 800}, 1),
        ({"groups": False}, 1),
        ({"waits": "C7514"}, 1),
    ],
    ids=str,
)
def test_warpgroups_spill_nothing_in_a_loop(found: dict[str, Any], told: int) -> None:
    """Nor may their registers be others than were asked for, or their products wait for each other."""
    good = result(wgmma=True, dots=True, ahead=True, gluon=True)
    assert len(list(complaints(job(), good._replace(**found)))) == told
    assert not list(complaints(job(), good._replace(gluon=False, waits="C7519")))  # Triton orders its products itself


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
    print(compiled([job], False)[0][0].registers > 0)
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True, timeout=240
    )
    kinds = "('*fp32', 'i32', 'constexpr', 'constexpr') i32 | x.step=1 x.SCALE=3 BLOCK=64 | "
    assert done.stdout.splitlines() == [f"{kinds}[(0, 0), (0, 1), (1,)]", "True", f"{kinds}[(1,)]", "True"], done.stderr
