"""The Gluon kernels' own source, run on numpy by `tests/gluon_cpu.py`: right, and every planted fault is caught."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from conftest import REPO
from gluon_cpu import Deadlock, kernels
from kernel_checks import draw, poisoned
from torch import Tensor

from afina.kernels import attention as file
from afina.kernels import launch
from afina.kernels.attention import attention, attention_reference
from afina.kernels.attention_torch import Options

LOG2_E = 1.4426950408889634
CPU_ONLY = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU runs them itself: tests/kernels/test_attention.py"
)
pytestmark = CPU_ONLY


class Problem(NamedTuple):
    """Sizes of a call; `offsets` of packed documents, of which the one with index `nan` holds nothing but NaN."""

    batch: int = 1
    queries: int = 200
    keys: int = 200
    heads: tuple[int, int] = (2, 1)
    dim: int = 64
    causal: bool = True
    offsets: tuple[int, ...] | None = None
    nan: int | None = None
    dtype: torch.dtype = torch.bfloat16


def tensors(problem: Problem) -> list[Tensor]:
    """q, k, v and dout; q, k and v of one length are parts of one buffer, as a fused layer makes them."""
    (heads, key_heads), dim = problem.heads, problem.dim
    lead = (problem.batch,) if problem.offsets is None else ()
    fused = draw(*lead, problem.queries, heads + 2 * key_heads, dim)
    q, k, v = fused.split([heads, key_heads, key_heads], -2)
    if problem.keys != problem.queries:
        k, v = draw(2, *lead, problem.keys, key_heads, dim, seed=1)
    made = [q, k, v, draw(*lead, problem.queries, heads, dim, seed=2)]
    if problem.offsets is not None and problem.nan is not None:
        for x in made:
            x[problem.offsets[problem.nan] : problem.offsets[problem.nan + 1]] = torch.nan
    return [x.to(problem.dtype) for x in made]


def log_sum_exp(q: Tensor, k: Tensor, problem: Problem) -> Tensor:
    """(B, Hq, T), to base 2, in float64."""
    packed = problem.offsets is not None
    if packed:
        q, k = q[None], k[None]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * problem.dim**-0.5
    i, j = torch.arange(problem.queries)[:, None] + problem.keys - problem.queries, torch.arange(problem.keys)
    seen = j <= i if problem.causal else torch.ones_like(j <= i)
    if packed:
        document = torch.bucketize(torch.arange(problem.keys), torch.tensor(problem.offsets), right=True)
        seen = seen & (document[:, None] == document)
    return torch.logsumexp(s.masked_fill(~seen, -torch.inf), -1) * LOG2_E


class Call(NamedTuple):
    """What the kernels are given for a problem, and what they should give, in float64."""

    inputs: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    spans: Tensor | None
    want: dict[str, Tensor]


@lru_cache
def call_of(problem: Problem) -> Call:
    q, k, v, dout = tensors(problem)
    spans = cu_seqlens = None
    if problem.offsets is not None:
        cu_seqlens = torch.tensor(problem.offsets, dtype=torch.int32)
        spans = torch.stack((cu_seqlens[:-1], cu_seqlens[1:])).repeat_interleave(cu_seqlens.diff(), dim=1)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = attention_reference(*leaves, causal=problem.causal, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(out, leaves, dout.double())
    want = {"out": out.detach(), "lse": log_sum_exp(q, k, problem)} | dict(zip(("dq", "dk", "dv"), grads))
    return Call((q, k, v), dout, spans, want)


def check(problem: Problem, *, fault: tuple[str, str] | None = None, passes: str = "both", seed: int = 0) -> None:
    """Both passes against the reference in float64; AssertionError, or Deadlock, where they differ.

    The backward pass starts from the exact numbers, so that a fault of the forward pass is none of its own.
    """
    inputs, dout, spans, want = call_of(problem)
    ours = kernels(fault, seed=seed)
    options = Options(problem.causal, None, None, problem.dim**-0.5)
    made: dict[str, Tensor] = {}
    with poisoned():
        if passes != "backward":
            made |= dict(zip(("out", "lse"), ours.forward(*inputs, options, spans)))
        if passes != "forward":
            kept = want["out"].to(problem.dtype).contiguous(), want["lse"].float().contiguous()
            made |= dict(zip(("dq", "dk", "dv"), ours.backward(dout, *inputs, *kept, options, spans, (True,) * 3)))
    for name, got in made.items():
        assert got.shape == want[name].shape, name
        there = want[name].isfinite()
        assert torch.equal(got.isfinite(), there), f"{name}: NaN or infinity in other places"
        error = float((got.double() - want[name])[there].norm() / want[name][there].norm())
        assert error < 4e-3, f"{name}: {error}"


DENSE = Problem(2, 200, 200)
OTHER_LENGTHS = Problem(2, 150, 290, (2, 2))
PACKED = Problem(1, 330, 330, (4, 2), offsets=(0, 70, 70, 71, 290, 330), nan=3)
# For the planted faults: several tiles and slots, unequal lengths, grouped heads, two batches; ends inside of tiles.
SMALL = {
    "dense": Problem(2, 150, 400, (2, 1), 128),
    "packed": Problem(1, 300, 300, (4, 2), offsets=(0, 40, 41, 290, 300), nan=1),
}


@pytest.mark.parametrize(
    "problem",
    [
        DENSE,
        DENSE._replace(causal=False, dtype=torch.float16),
        OTHER_LENGTHS,
        Problem(1, 290, 150),  # the first queries see nothing
        Problem(1, 1, 5, (1, 1), 128),
        PACKED,
        PACKED._replace(causal=False, dim=80),
        Problem(1, 300, 300, (1, 1), 128, offsets=tuple(range(0, 301, 30))),
    ],
    ids=str,
)
def test_both_passes(problem: Problem) -> None:
    for seed in range(2):
        check(problem, seed=seed)


HEAD_DIMS = (64, 80, 96, 128, 136, 192, 256)
SHORT = Problem(1, 140, 140, (4, 2))
SHORT_PACKED = SHORT._replace(offsets=(0, 60, 61, 140), nan=1)


def passes_of(dim: int) -> str:
    return "both" if dim <= 128 else "forward"  # The rule below leaves the rest to the Triton kernels.


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim: int) -> None:
    check(SHORT._replace(dim=dim, causal=False, dtype=torch.float16), passes=passes_of(dim))
    check(SHORT_PACKED._replace(dim=dim), passes=passes_of(dim))


@pytest.mark.slow
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_head_dims_with_every_option(dim: int, dtype: torch.dtype, causal: bool) -> None:
    for problem in (SHORT, SHORT._replace(keys=200, heads=(3, 3)), SHORT._replace(queries=170), SHORT_PACKED):
        check(problem._replace(dim=dim, dtype=dtype, causal=causal), passes=passes_of(dim), seed=dim)


def test_gradients_that_nobody_asks_for() -> None:
    q, k, v, dout = tensors(Problem(1, 20, 20))
    out, lse = kernels().forward(q, k, v, Options(True, None, None, 0.1), None)
    for wanted in ((True, False, False), (False, True, False), (False, False, False)):
        grads = kernels().backward(dout, q, k, v, out, lse, Options(True, None, None, 0.1), None, wanted)
        asked = (wanted[0], wanted[1] or wanted[2], wanted[1] or wanted[2])
        assert tuple(grad is not None for grad in grads) == asked


# What is wrong -> the problem and the passes that show it, the source, and what stands there instead.
FAULTS: dict[str, tuple[str, str, str, str]] = {
    # Barriers.
    "a full slot is not waited for": ("dense", "both", "    mbarrier.wait(ring.full.index(slot), parity)\n", ""),
    "an empty slot is not waited for": ("dense", "both", "    mbarrier.wait(ring.empty.index(slot), parity ^ 1)\n", ""),
    "the parity of full slots is wrong": (
        "dense",
        "both",
        "ring.full.index(slot), parity)",
        "ring.full.index(slot), parity ^ 1)",
    ),
    "the parity of empty slots is wrong": (
        "dense",
        "both",
        "ring.empty.index(slot), parity ^ 1)",
        "ring.empty.index(slot), parity)",
    ),
    "a value's parity is its successor's": (
        "dense",
        "forward",
        "filled(v, before, ((used - 1) // SLOTS) & 1,",
        "filled(v, before, (used // SLOTS) & 1,",
    ),
    "nobody leaves the keys": ("dense", "both", "leave(k, slot)", "pass"),
    "nobody leaves the queries": ("dense", "forward", "leave(q, ME)", "pass"),
    "one reader is enough to empty a slot": (
        "dense",
        "both",
        "tiling.BLOCK_N, BLOCK_D, 2)",
        "tiling.BLOCK_N, BLOCK_D, 1)",
    ),
    "three readers are waited for": ("dense", "both", "tiling.BLOCK_N, BLOCK_D, 2)", "tiling.BLOCK_N, BLOCK_D, 3)"),
    "half of the bytes are expected": ("dense", "both", "desc.block_type.nbytes)\n", "desc.block_type.nbytes // 2)\n"),
    "a line's bytes are not expected": ("dense", "backward", " + line_desc.block_type.nbytes)", ")"),
    "the turn is not passed on": ("dense", "forward", "mbarrier.arrive(turns.index(1 - ME), count=1)", "pass"),
    "the parity of a pass is not counted": ("dense", "both", "passes += 1", "pass"),
    "used slots are counted twice": (
        "dense",
        "forward",
        "                    used += 1\n",
        "                    used += 2\n",
    ),
    # Slots given back, or results taken, before the product is done.
    # (Keys of the forward pass and dout of dk and dv could go early: the producer first waits for a later product.)
    "values are left before their product is done": (
        "dense",
        "forward",
        "acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])\n                    leave(v, before)",
        "leave(v, before)\n                    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])",
    ),
    "queries are left at once": (
        "dense",
        "forward",
        "            if start < stop:\n",
        "            leave(q, ME)\n            if start < stop:\n",
    ),
    "a result is used while the product runs": (
        "dense",
        "forward",
        "s = warpgroup_mma_wait(1, deps=[s])",
        "s = warpgroup_mma_wait(2, deps=[s])",
    ),
    "dp is used while the product runs": (
        "dense",
        "backward",
        "dp = warpgroup_mma_wait(1, deps=[dp])",
        "dp = warpgroup_mma_wait(2, deps=[dp])",
    ),
    "the queries of dk are left before it is done": (
        "dense",
        "backward",
        "dk_acc, slopes = warpgroup_mma_wait(0, deps=[dk_acc, slopes])\n                    leave(q, slot)",
        "leave(q, slot)\n                    dk_acc, slopes = warpgroup_mma_wait(0, deps=[dk_acc, slopes])",
    ),
    "the keys of dq are left before it is done": (
        "dense",
        "backward",
        "dq_acc, slopes = warpgroup_mma_wait(0, deps=[dq_acc, slopes])\n                leave(k, slot)",
        "leave(k, slot)\n                dq_acc, slopes = warpgroup_mma_wait(0, deps=[dq_acc, slopes])",
    ),
    # What is computed.
    "a query does not see its own key": (
        "dense",
        "both",
        "column[None, :] <= row[:, None]",
        "column[None, :] < row[:, None]",
    ),
    "a key is not seen by its own query": (
        "dense",
        "backward",
        "row[:, None] <= column[None, :]",
        "row[:, None] < column[None, :]",
    ),
    "a tile too few is masked": (
        "dense",
        "both",
        "whole_stop = gl.minimum(stop, shift + mine + 1)",
        "whole_stop = gl.minimum(stop, shift + mine + 65)",
    ),
    "a tile too few is masked for dk": (
        "dense",
        "backward",
        "query_start < position + HALF - 1",
        "query_start < position",
    ),
    "the columns of dk's mask are never written": ("dense", "backward", "columns.store(", "id("),
    "the columns of dk's mask are another tile's": (
        "dense",
        "backward",
        "row = position - query_start + gl.arange",
        "row = position - query_start - BLOCK_M + gl.arange",
    ),
    "the shift of unequal lengths is left out": ("dense", "both", "shift = sizes.keys - sizes.queries", "shift = 0"),
    "the last tile of keys is left out": (
        "dense",
        "both",
        "range(start, stop, tiling.BLOCK_N)",
        "range(start, stop - tiling.BLOCK_N, tiling.BLOCK_N)",
    ),
    "documents begin one token late": (
        "packed",
        "both",
        "start = gl.load(spans + tile_start + row)",
        "start = gl.load(spans + tile_start + row) + 1",
    ),
    "documents end one token late": (
        "packed",
        "both",
        "stop = gl.minimum(stop, end - tile_start)",
        "stop = gl.minimum(stop, end + 1 - tile_start)",
    ),
    "documents of a tile are taken for one": ("packed", "both", "stop = gl.minimum(stop, end - tile_start)", "pass"),
    "another document's rows are not cleared": (
        "packed",
        "both",
        "part.store(gl.where((row < left)[:, None], x, gl.zeros_like(x)))",
        "pass",
    ),
    "another head's delta is not cleared": (
        "packed",
        "backward",
        "_clear_line_from(deltas.index(slot), end - query_start, BLOCK_M)",
        "pass",
    ),
    "heads share the wrong keys": ("packed", "both", "head // shape.GROUP", "head % (shape.HEADS // shape.GROUP)"),
    "only one head of a group has a gradient": (
        "dense",
        "backward",
        "for member in range(shape.GROUP)",
        "for member in range(1)",
    ),
    "the next batch's line": (
        "dense",
        "backward",
        "line = (batch * shape.HEADS + head) * sizes.queries",
        "line = head * sizes.queries",
    ),
    "the maximum never rises": (
        "dense",
        "forward",
        "m_new = gl.maximum(m_i, gl.max(s, 1) * post_scale)",
        "m_new = gl.maximum(m_i, gl.max(s, 1) * 0.0)",
    ),
    "earlier sums do not shrink": (
        "dense",
        "forward",
        "                    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]\n",
        "",
    ),
    "a consumer has the other's rows": (
        "dense",
        "both",
        "first + ME * HALF, row_stop",
        "first + (1 - ME) * HALF, row_stop",
    ),
    "a tile is done twice and its partner by nobody": ("dense", "both", "if turn % 2 == 0:", "if turn % 2 == 2:"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str) -> None:
    problem, passes, good, bad = FAULTS[name]
    with pytest.raises((AssertionError, Deadlock)):
        check(SMALL[problem], fault=(good, bad), passes=passes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dim"),
    [(name, dim) for name in FAULTS for dim in (80, 96, 192, 256) if dim <= 128 or FAULTS[name][1] != "backward"],
)
def test_planted_faults_are_caught_at_other_head_dims(name: str, dim: int) -> None:
    """Backward to head dim 128, which is as far as it goes."""
    problem, passes, good, bad = FAULTS[name]
    with pytest.raises((AssertionError, Deadlock)):
        check(SMALL[problem]._replace(dim=dim), fault=(good, bad), passes=passes if dim <= 128 else "forward")


def test_a_deadlock_ends_and_says_who_waits() -> None:
    with pytest.raises(Deadlock, match=r"partitions .* wait for what never comes"):
        check(DENSE, fault=("leave(k, slot)", "pass"), passes="forward")


def test_the_draw_changes_the_order_and_nothing_else() -> None:
    inputs, dout, spans, _ = call_of(PACKED._replace(nan=None))
    options = Options(True, None, None, 0.125)
    found = []
    for seed in range(4):
        ours = kernels(seed=seed, processors=1 + seed)
        out, lse = ours.forward(*inputs, options, spans)
        found.append([out, lse, *ours.backward(dout, *inputs, out, lse, options, spans, (True, True, True))])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


# ---------------------------------------------------------------- The rule that chooses them


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that would run, on what passes for a Hopper GPU where Triton is the default."""
    names: list[str] = []
    monkeypatch.setattr(launch, "recorder", lambda kernel, arguments: names.append(kernel.fn.__name__))
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    monkeypatch.setattr(file, "choose", lambda op, backend, tensor: backend or "triton")
    monkeypatch.setattr(file, "verified", {("attention_gluon", None): True})
    monkeypatch.delenv("AFINA_BACKEND", raising=False)
    return names


def both_passes(dim: int = 128, dtype: torch.dtype = torch.bfloat16, offset: int = 0, **options: Any) -> None:
    def leaf(heads: int) -> Tensor:
        room = torch.zeros(2 * 20 * heads * dim + offset, dtype=dtype)[offset:]
        return room.view(2, 20, heads, dim).requires_grad_()

    attention(leaf(4), leaf(2), leaf(2), **options).sum().backward()


FORWARD, DKDV, DQ = ("_gluon_forward", "_gluon_dkdv", "_gluon_dq")
TRITON = ["_attention_forward", "_attention_delta", "_attention_dkdv", "_attention_dq"]


def test_hopper_gets_them_once_they_have_passed_their_self_test(launched: list[str]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        both_passes(dtype=dtype)
        assert launched == [FORWARD, "_attention_delta", DKDV, DQ]
        launched.clear()
    for answer in ({("attention_gluon", None): False}, {}):
        file.verified.clear()
        file.verified.update(answer)
        both_passes()
        assert launched == TRITON
        launched.clear()


@pytest.mark.parametrize(
    "options",
    [{"window": 5}, {"softcap": 30.0}, {"dtype": torch.float32}, {"dim": 32}, {"dim": 100}, {"offset": 1},
     {"backend": "triton"}],
    ids=str,
)  # fmt: skip
def test_all_else_goes_on_to_the_triton_kernels(options: dict[str, Any], launched: list[str]) -> None:
    both_passes(**options)
    assert launched == TRITON


def test_the_backward_pass_of_long_heads_does(launched: list[str]) -> None:
    both_passes(dim=256)
    assert launched == [FORWARD, *TRITON[1:]]


@pytest.mark.parametrize(("name", "value"), [("capability", lambda device: 100), ("VERSION", "3.8.0")])
def test_other_gpus_and_versions_do(
    name: str, value: Any, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, name, value)
    both_passes()
    assert launched == TRITON


def test_the_environment_can_ask_for_the_triton_kernels(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_BACKEND", "triton")
    both_passes()
    assert launched == TRITON


def test_who_asks_for_them_in_vain_is_told_why(launched: list[str]) -> None:
    for options, needed in (
        ({"window": 5}, "no window and no softcap"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"dim": 32}, "heads of 64 to 256 dimensions"),
        ({"offset": 1}, "tensors whose starts and strides are multiples of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=f"^backend: 'gluon' needs {needed}; use 'triton' or 'torch'$"):
            both_passes(backend="gluon", **options)
    launch.capability = lambda device: 89  # the fixture restores it
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 9 and Triton 3\.6 or 3\.7;"):
        both_passes(backend="gluon")
    assert launched == []


def test_a_gradient_that_is_not_aligned_is_copied(launched: list[str]) -> None:
    q, k = (torch.zeros(1, 20, heads, 64, dtype=torch.bfloat16).requires_grad_() for heads in (2, 1))
    out = attention(q, k, k)
    out.backward(torch.ones((), dtype=torch.bfloat16).expand(out.shape))
    assert launched == [FORWARD, "_attention_delta", DKDV, DQ]


def test_where_nothing_can_run_them_nothing_imports_them() -> None:
    code = (
        "import sys, torch; from afina.kernels import selftest; from afina.kernels.attention import attention;"
        "x = torch.ones(1, 4, 1, 64, dtype=torch.bfloat16); attention(x, x, x);"
        "assert not [name for name in sys.modules if 'gluon' in name]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, timeout=120)
