"""The benchmarks: what they count, check and write, the tuner's choices, the pictures and the suite, on tiny shapes."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(REPO / "benchmarks"))

import bench_activation
import bench_attention
import bench_train
import bench_train_gpu
import costs
import gpu_suite
import harness
import plot
import tune
from costs import Cost
from harness import Case, Options, randn

from afina.kernels import launch
from afina.kernels.attention import attention_reference

QUICK = Options(quick=True)
Row = dict[str, Any]


# --- What is counted -------------------------------------------------------------------------------------------------


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.integers(0, 9), max_size=4), st.booleans(), st.none() | st.integers(1, 12))
def test_visible_pairs(lengths: list[int], causal: bool, window: int | None) -> None:
    seen = 0
    for n in lengths:
        for i in range(n):
            for j in range(n):
                inside = window is None or not causal or j > i - window
                seen += (not causal or j <= i) and inside
    assert costs.visible_pairs(lengths, causal, window) == seen


def test_costs_by_hand() -> None:
    """Documents of 2 and 1 tokens, 2 query heads on 1 key head of 4, 2-byte values: 4 pairs."""
    q, kv, lse = 2 * 3 * 2 * 4, 2 * 3 * 1 * 4, 4 * 3 * 2
    assert costs.attention([2, 1], 2, 1, 4) == {
        "forward": Cost(4 * 2 * 4 * 4, q + 2 * kv + q + lse),
        "backward": Cost(10 * 2 * 4 * 4, (3 * q + 2 * kv + lse) + (q + 2 * kv)),
        "both": Cost(14 * 2 * 4 * 4, 6 * q + 6 * kv + 2 * lse),
    }
    assert costs.attention([4], 1, 1, 8, window=2)["forward"].flops == 4 * 8 * 7
    # 3 rows of 5, 2 of them kept, 7 classes: hidden, weight and their gradients, 3 targets of 8 bytes.
    assert costs.linear_cross_entropy(3, 2, 5, 7) == {"both": Cost(6 * 2 * 5 * 7, 2 * 2 * (15 + 35) + 24)}
    assert costs.cross_entropy(3, 7, 4) == {"both": Cost(0, 2 * 4 * 21 + 24)}
    # x, W -> y; x, W, dy -> dx, dW.
    assert costs.linear(3, 5, 7) == costs.both(Cost(2 * 105, 2 * 71), Cost(4 * 105, 2 * (71 + 50)))
    # x -> y and a weight; dy, x -> dx, the weight and its gradient.
    assert costs.norm(3, 5, False) == costs.both(Cost(0, 2 * 30 + 10), Cost(0, 3 * 30 + 20))
    assert costs.norm(3, 5, True)["forward"].bytes == 4 * 30 + 10
    assert costs.rope(3, 2, 4, 4) == costs.both(Cost(0, 2 * 48 + 48), Cost(0, 2 * 48 + 48))
    assert costs.rope(3, 2, 4, 4, norm=True)["backward"].bytes == 3 * 48 + 48 + 2 * 16
    assert costs.glu(3, 5) == costs.both(Cost(0, 6 * 15), Cost(0, 10 * 15))
    assert [costs.adamw(10, *sizes)["forward"].bytes for sizes in ((4, 4, 2, 2), (2, 2, 2), (2, 1, 2))] == [
        280,
        140,
        100,
    ]
    # 130 weights: 65 bytes of codes, 3 scales of a byte, 1 of four, 260 bytes written.
    assert costs.nf4(130)["forward"].bytes == 65 + 3 + 4 + 260
    assert costs.decode([3, 5], 4, 2, 8) == {"forward": Cost(4 * 8 * 4 * 8, 4 * 8 * 2 * 8 + 4 * 2 * 4 * 8)}
    assert costs.training_flops(100, 2, 3, 8, 4) == 600 + 2 * 3 * 4 * 3 * 8 * 10 / 4
    assert costs.training_flops(100, 2, 3, 8, 4, frozen=10) == costs.training_flops(100, 2, 3, 8, 4) + 40


def test_share_is_the_floor_over_the_time() -> None:
    peak = harness.Ceilings(tflops=100.0, gbps=1000.0)
    arithmetic = harness.rate(Cost(2e12, 1e9), 40.0, peak)
    assert (arithmetic["floor_ms"], arithmetic["share"]) == (20.0, 0.5)
    assert (arithmetic["tflops"], arithmetic["gbps"]) == (50.0, 25.0)
    moving = harness.rate(Cost(0, 8e9), 10.0, peak)
    assert (moving["floor_ms"], moving["share"], moving["tflops"]) == (8.0, 0.8, None)
    assert harness.rate(Cost(1e9, 1e9), 10.0, None)["share"] is None


def test_quantiles() -> None:
    assert [harness.quantile([5, 1, 3, 2, 4, 0], share) for share in (0, 0.2, 0.8, 1)] == [0, 1, 4, 5]


# --- Checks and rows -------------------------------------------------------------------------------------------------


def double(**providers: Callable[..., Any]) -> Case:
    return Case(
        "double", "4x3", lambda: [randn(4, 3, grad=True)], lambda inputs: [randn(4, 3)],
        harness.reference(lambda x: 2 * x), providers, costs.both(Cost(12, 96), Cost(12, 96)),
    )  # fmt: skip


def rows_of(case: Case, *names: str) -> list[Row]:
    return list(harness.run([case], QUICK, names, []))


def test_a_row() -> None:
    rows = rows_of(double(good=harness.provider(lambda x: x + x)), "good")
    assert [row["pass"] for row in rows] == ["forward", "backward", "both"]
    keys = "op case provider pass dtype ms ms_p20 ms_p80 runs flops bytes tflops gbps floor_ms share ceiling_tflops"
    keys += " ceiling_gbps peak_mb host_us error command device versions"
    for row in rows:
        assert set(keys.split()) <= set(row) <= {*keys.split(), "note"}
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["flops"] == (24 if row["pass"] == "both" else 12)
        assert {"afina", "torch", "python", "triton"} <= set(row["versions"])
        json.dumps(row)
    if not torch.cuda.is_available():
        assert rows[0]["note"] == "CPU reference/interpreter path: not a performance statement"
        assert rows[0]["share"] is rows[0]["peak_mb"] is rows[0]["host_us"] is None


def stop(*x: Tensor) -> Any:
    raise RuntimeError("first line\nsecond line")


def lacking(*x: Tensor) -> Any:
    import no_such_package  # noqa: F401


def refusing(*x: Tensor) -> Any:
    raise harness.Unavailable("no such option")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (harness.provider(lambda x: 2.1 * x), "wrong: relative error "),
        (harness.provider(lambda x: 2 * x * torch.nan), "wrong: relative error nan of result 0"),
        (harness.provider(lambda x: (2 * x)[:3]), "wrong: result 0 has shape (3, 3), expected (4, 3)"),
        (harness.provider(WrongGradient.apply), "wrong: relative error 5.00e-01 of result 1"),
        (lambda x: stop, "RuntimeError: first line"),
        (stop, "RuntimeError: first line"),
        (lacking, "ModuleNotFoundError: No module named 'no_such_package'"),
        (refusing, "no such option"),
    ],
)
def test_a_provider_that_fails_is_a_row(provider: Any, reason: str) -> None:
    good = harness.provider(lambda x: x + x)
    rows = rows_of(double(bad=provider, good=good))
    (bad,) = (row for row in rows if row["provider"] == "bad")
    assert bad["skipped"].startswith(reason)
    assert "\n" not in bad["skipped"]
    assert sum("ms" in row for row in rows) == 3  # the other one is timed all the same


def test_other_leaves_and_writes_over_inputs() -> None:
    """A peer may take its input in other pieces, and may write over its own copy; neither reaches the next."""

    def pieces(x: Tensor) -> harness.Peer:
        top, rest = x.detach()[:1].clone().requires_grad_(), x.detach()[1:].clone().requires_grad_()
        return harness.Peer(lambda: 2 * torch.cat([top, rest]), [top, rest], lambda grads: [torch.cat(grads)])

    def writing(x: Tensor) -> Any:
        def call() -> Tensor:
            y = 2 * x
            x.data.zero_()
            return y

        return call

    rows = rows_of(double(pieces=pieces, writing=writing, last=harness.provider(lambda x: x + x)))
    assert sum("ms" in row for row in rows) == 9


def test_time_limit_and_choice(capsys: pytest.CaptureFixture[str]) -> None:
    late = Options(quick=True, deadline=time.monotonic() - 1)
    good = harness.provider(lambda x: x + x)
    assert [row["skipped"] for row in harness.run([double(good=good)], late, [], [])] == ["time limit"]
    both = double(good=good, compile=good)
    assert {row["provider"] for row in harness.run([both], QUICK, [], ["compile"])} == {"good"}
    if not torch.cuda.is_available():
        assert [row["skipped"] for row in harness.run([both], QUICK, [], ["good"])] == [
            "left out on a CPU; name it with --providers"
        ]
    for wrong, told in (
        (["--cases", "7"], "no case holds 7: there are 4x3"),
        (["--providers", "x"], "unknown provider x"),
    ):
        with pytest.raises(SystemExit):
            harness.main("", lambda scale: [double(good=good)], wrong)
        assert told in capsys.readouterr().err


# --- The scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_this_file_runs_on_a_gpu_too() -> None:
    """The mark makes the suite take this file."""
    assert harness.GPU
    assert harness.ceilings() is not None


SCRIPTS = ("attention", "cross_entropy", "norm", "rope", "activation", "adamw", "nf4", "decode", "fp8_linear")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str) -> None:
    """One tiny case: ours, interpreted where there is no GPU, our torch path and a peer give the right results."""
    module = importlib.import_module(f"bench_{name}")
    case = module.cases("tiny")[0]
    names = ["afina", "afina-torch", *(peer for peer in ("eager", "torch-fused") if peer in case.providers)]
    rows = list(harness.run([case], QUICK, names, []))
    assert [row.get("skipped") for row in rows] == [None] * len(rows)
    assert {row["provider"] for row in rows} == set(names)
    assert {row["pass"] for row in rows} == set(case.costs)
    assert len({case.name for case in module.cases("gpu")}) == len(module.cases("gpu"))
    assert {case.op for case in module.cases("gpu")} == {case.op for case in module.cases("tiny")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shapes are a GPU's there")
def test_command_line() -> None:
    command = [sys.executable, "benchmarks/bench_nf4.py", "--quick", "--providers", "afina", "afina-torch"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["skipped"].startswith("ValueError: backend: 'triton' needs a GPU")
    assert second["command"] == "python benchmarks/bench_nf4.py --quick --providers afina afina-torch"


@pytest.mark.parametrize("lengths", [None, (4, 3, 5)])
def test_attention_reference_in_pieces(lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document and some heads at a time, or all at once: the same outputs and gradients."""
    monkeypatch.setattr(bench_attention, "REFERENCE_SCORES", 300)
    shape = bench_attention.Shape(1 if lengths else 2, 12, 6, 2, 8, window=5, softcap=3.0, lengths=lengths)
    torch.manual_seed(0)
    inputs = [randn(shape.batch, 12, n, 8, grad=True) for n in (6, 2, 2)]
    upstream = [randn(shape.batch, 12, 6, 8)]

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if lengths is None:
            return attention_reference(q, k, v, window=5, softcap=3.0)
        packed = {"cu_seqlens": shape.offsets, "window": 5, "softcap": 3.0}
        return attention_reference(q[0], k[0], v[0], **packed)[None]

    got = bench_attention.expected(shape, inputs, upstream)
    for a, b in zip(got, harness.reference(whole)(inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_BACKEND", "")
    shape = bench_train_gpu.SHAPES["cpu"]["tiny"]
    row = bench_train_gpu.run("tiny", shape, "afina-torch", 1, 0.1)
    assert "skipped" not in row
    assert row["loss_last"] < row["loss_first"]
    assert row["flops_per_token"] == 6 * row["parameters"] + 3 * 2 * 4 * 64 * 65 / 2
    assert row["tokens_per_second"] == pytest.approx(1e3 * 4 * 64 / row["ms"], rel=1e-3)

    def full(*x: Any) -> Any:
        asked.append(x[2])
        raise torch.OutOfMemoryError("out of memory")

    asked: list[int] = []
    monkeypatch.setattr(bench_train_gpu, "measure", full)
    assert bench_train_gpu.run("tiny", shape, "afina", 1, 0.1)["skipped"] == "OutOfMemoryError: out of memory"
    assert asked == [4, 2, 1]


ADAPTED = [
    (name, provider) for name in ("tiny-llama lora", "tiny qlora+checkpointing") for provider in ("afina", "peft")
]


@pytest.mark.parametrize(("name", "provider"), ADAPTED)
def test_training_adapters(name: str, provider: str) -> None:
    """Ours and PEFT's train as many parameters, lower the same first loss, and count the same work."""
    for package in ("peft",) * (provider == "peft") + ("bitsandbytes",) * (provider == "peft" and "qlora" in name):
        pytest.importorskip(package)
    shape = bench_train_gpu.SHAPES["cpu"][name]
    row = bench_train_gpu.run(name, shape, provider, 1, 0.1)
    assert "skipped" not in row
    assert row["loss_last"] < row["loss_first"]
    c = shape.config
    hidden, inner, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // 2
    sides = 4 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner)
    assert row["trained"] == bench_train_gpu.RANK * c["num_hidden_layers"] * sides
    embedding = 0 if c["tie_word_embeddings"] else c["vocab_size"] * hidden
    attention = 3 * 2 * 4 * 64 * (shape.length + 1) / 2
    assert row["flops_per_token"] == 6 * row["trained"] + 4 * (row["parameters"] - embedding) + attention


def test_adapters_are_measured_on_what_was_asked(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Llama-3-8B first, with its targets; qlora beside lora under the same policy; peers only where they belong."""
    shapes = bench_train_gpu.SHAPES["gpu"]
    assert {shape.rows * shape.length for shape in shapes.values() if shape.method != "full"} == {4096}
    assert bench_train_gpu.ModelConfig.from_hf(bench_train_gpu.LLAMA_8B).num_parameters() == 8_030_261_248
    monkeypatch.setattr(bench_train_gpu, "SHAPES", {"cpu": shapes, "gpu": shapes})
    monkeypatch.setattr(bench_train_gpu, "measure", lambda provider, shape, *rest: {
        "tokens_per_second": 100.0 - 20 * shape.checkpointing - 8 * (shape.method == "qlora"),
    })  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench_train_gpu.py", "--methods", "lora", "qlora"])
    assert bench_train_gpu.main() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    providers = ("afina", "afina-graph", "peft", "peft-liger")
    assert [row["provider"] for row in rows] == [provider for provider in providers for _ in range(9)]
    assert [row["case"] for row in rows[:3]] == [
        f"Llama-3-8B {policy} 2x2048" for policy in ("lora", "lora+checkpointing", "qlora+checkpointing")
    ]
    assert rows[0]["target"] == {"tokens_per_second": 13_000, "peak_mb": 30_000}
    assert {row.get("speed_of_lora") for row in rows} == {None, 0.9}
    assert rows[2]["speed_of_lora"] == 0.9
    assert sum("target" in row for row in rows) == 3


@pytest.mark.skipif(not bench_train.DATA.is_dir(), reason="the data is not here")
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_both_engines_train_the_same_adapter(method: str, tmp_path: Path, monkeypatch: Any) -> None:
    """From the same adapter, on the same rows: the same losses."""
    for package in ("accelerate", *bench_train.PACKAGES[method]):
        pytest.importorskip(package)
    small = bench_train.RANDOM["random-100m"] | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    monkeypatch.setitem(bench_train.RANDOM, "small", small)
    monkeypatch.setitem(bench_train.CASES, "short", {"batch_size": 4, "max_length": 64})
    threads = torch.get_num_threads()
    config = bench_train.settings(
        "short", method, bench_train.make_random("small", tmp_path / "model"), tmp_path, steps=3, threads=threads
    )
    adapter = bench_train.first_adapter(config, tmp_path / "adapter")
    ours, theirs = bench_train.train_afina(config, adapter), bench_train.train_peer(config, adapter)
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5 if method == "lora" else 1e-3)
    assert len(set(ours["losses"])) == len(theirs["seconds"]) == 3
    for run in (ours, theirs):
        assert 0 <= run["memory_mb"] < run["process_mb"]


def test_ratios_and_what_is_not_installed(monkeypatch: Any) -> None:
    assert bench_train.ratios([2.0, 4.0, 9.0], [1.0, 4.0, 3.0], "speed") == {
        "speed_ratio_median": 2.0,
        "speed_ratio_pairs": [2.0, 1.0, 3.0],
    }
    monkeypatch.setattr(bench_train, "find_spec", lambda name: None if name == "peft" else "here")
    assert [bench_train.missing(method) for method in ("full", "lora", "qlora")] == [[], ["peft"], ["peft"]]


def test_the_best_of_several_peers_counts() -> None:
    def run(speed: float) -> dict[str, Any]:
        return {"tokens_per_second": speed, "memory_mb": 1.0, "process_mb": 2.0, "losses": [speed]}

    runs = {"afina": [run(12.0)], "float32": [run(6.0)], "bfloat16": [run(16.0)], "compiled-float32": [run(8.0)]}
    facts = bench_train.compared(runs, "float32")
    assert (facts["peer"], facts["speed_ratio_median"], facts["speed_ratio_same_dtype"]) == ("bfloat16", 0.75, 1.5)
    assert facts["speed_ratios"] == {"float32": 2.0, "bfloat16": 0.75, "compiled-float32": 1.5}
    assert "speed_ratios" not in bench_train.compared({k: runs[k] for k in ("afina", "float32")}, "float32")


class FakeEvent:
    """CUDA's event on a clock that the calls themselves set."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real thing runs there")
def test_gpu_timing_with_a_clock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward takes 2 ms, backward 3, and what is not asked for (the flush, the sleep) does not count."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    held: list[int] = []

    def sleep(cycles: int) -> None:
        held.append(cycles)
        FakeEvent.now += 50.0

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(harness, "_flusher", lambda: torch.ones(4))

    class Timed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            FakeEvent.now += 2.0
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            FakeEvent.now += 3.0
            return g

    x = torch.ones(3, requires_grad=True)
    ready = harness.Ready("name", lambda: Timed.apply(x), [x], [torch.ones(3)], "float32", 0.0)
    spans, host_us, peak = harness._gpu_spans(ready, ["forward", "backward", "both"], QUICK)
    assert {name: set(values) for name, values in spans.items()} == {"forward": {2.0}, "backward": {3.0}, "both": {5.0}}
    assert peak == 250
    assert host_us > 0
    assert all(cycles > 0 for cycles in held)
    only = ready._replace(upstream=[], leaves=[])
    spans, _, _ = harness._gpu_spans(only, ["forward"], QUICK)
    assert set(spans["forward"]) == {2.0}


# --- The tuner -------------------------------------------------------------------------------------------------------

ROWS: list[Row] = [
    {"capability": 0, "BLOCK": 16},
    {"capability": 80, "bits": 16, "size": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 1},
    {"capability": 80, "bits": 16, "size": 128, "BLOCK": 128, "num_warps": 4, "num_stages": 1},
    {"capability": 80, "bits": 32, "BLOCK": 32, "num_warps": 4, "num_stages": 1},
]


def test_candidates() -> None:
    made = tune.candidates({"BLOCK": 64, "num_warps": 4, "num_stages": 1})
    assert made[0] == {"BLOCK": 64, "num_warps": 4, "num_stages": 1}
    assert len(made) == 3 * 3 * 3
    assert len({tuple(config.items()) for config in made}) == len(made)
    assert {config["num_stages"] for config in made} == {1, 2, 3}
    changed = [sum(config[name] != made[0][name] for name in config) for config in made]
    assert changed == sorted(changed)
    assert tune.candidates({"BLOCK": 64, "num_warps": 16}, 4) == made_small()
    assert tune.candidates({"backend": "triton"}) == [{"backend": "triton"}, {"backend": "sdpa"}]


def made_small() -> list[Row]:
    return [{"BLOCK": block, "num_warps": warps} for block, warps in ((64, 16), (64, 8), (32, 16), (128, 16))]


def test_select() -> None:
    present, better, broken = tune.Trial({"B": 1}, 1.0), tune.Trial({"B": 2}, 0.9), tune.Trial({"B": 4}, None, "why")
    assert tune.select([present, better, broken]) is better
    assert tune.select([present, tune.Trial({"B": 2}, 0.99)]) is present
    assert tune.select([broken, tune.Trial({"B": 2}, 3.0)]).config == {"B": 2}
    with pytest.raises(ValueError, match="no setting works"):
        tune.select([broken])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_new_row_changes_its_own_place_alone(capability: int, place: int) -> None:
    """Also where it would otherwise go before rows of a lower capability, and on every other GPU."""
    config = {"BLOCK": 512, "num_warps": 8, "num_stages": 2}
    new = tune.rewrite(ROWS, capability, ROWS[place], config)
    found = {}
    for name, table in (("old", {"op": ROWS}), ("new", {"op": new})):
        with tune.patched(table):
            for gpu in (0, 80, 89, 90):
                for bits, size in ((16, 64), (16, 128), (32, 64)):
                    found[name, gpu, bits, size] = launch._config("op", gpu, bits, size)
    for (name, gpu, bits, size), value in found.items():
        here = gpu >= capability and (bits, size) == [(), (16, 64), (16, 128), (32, 64)][place]
        assert value == (config if here and name == "new" else found["old", gpu, bits, size])
    assert len({(row["capability"], *tune.key(row)) for row in new}) == len(new)
    assert tune.rewrite(new, capability, tune.effective(new, capability)[0], {"BLOCK": 1}) != new


def test_rows_that_a_gpu_uses() -> None:
    """A row of a higher capability hides those that it covers, and no others."""
    narrow = {"capability": 90, "bits": 16, "size": 100, "BLOCK": 1}
    assert tune.effective([*ROWS, narrow], 90) == [ROWS[2], ROWS[3], narrow]
    assert tune.effective([*ROWS, narrow], 89) == ROWS[1:]
    assert tune.effective([*ROWS, {"capability": 90, "BLOCK": 1}], 90) == [{"capability": 90, "BLOCK": 1}]


def test_the_table_is_written_as_it_is() -> None:
    text = launch.TABLE.read_text()
    assert tune.written(json.loads(text)) == text


def test_tune_discards_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(table: tune.Table) -> float:
        with tune.patched(table):
            config = launch._config("op", 90, 16, 128)
        if config["BLOCK"] > 128:
            raise RuntimeError("out of resource: shared memory")
        if config["num_warps"] == 8:
            raise harness.Unavailable("wrong: relative error 1.00e+00 of result 0, above 0.02")
        return config["BLOCK"] / config["num_stages"]

    trials, best = tune.tune({"op": ROWS}, "op", ROWS[2], 90, measure)
    assert best.config == {"BLOCK": 64, "num_warps": 4, "num_stages": 3} | {"num_warps": best.config["num_warps"]}
    assert best.config["num_warps"] != 8
    assert {trial.reason for trial in trials if trial.ms is None} == {
        "RuntimeError: out of resource: shared memory", "wrong: relative error 1.00e+00 of result 0, above 0.02",
    }  # fmt: skip
    text = tune.shown("op", ROWS[2], trials, best)
    assert text.splitlines()[0] == "op capability=80 bits=16 size=128"
    assert "<- best" in text.splitlines()[2]
    assert sum("(present)" in line for line in text.splitlines()) == 1
    trials, best = tune.tune({"op": ROWS}, "op", ROWS[2], 90, measure, deadline=time.monotonic() - 1)
    assert [trial.config for trial in trials] == [best.config] == [tune.options(ROWS[2])]


def test_settings_that_failed_in_another_process_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second, third = ({"BLOCK": block, "num_warps": 4, "num_stages": 1} for block in (128, 64, 256))
    places = [tune.place("op", ROWS[2], config) for config in (first, second, third)]

    def log(*events: tuple[str, int, str]) -> str:
        return "noise\n" + "".join(json.dumps({kind: places[i], "reason": why}) + "\n" for kind, i, why in events)

    good = log(("begun", 0, ""), ("ended", 0, ""), ("begun", 1, ""), ("ended", 1, "wrong"))
    lost = log(("begun", 2, ""))
    failed = tune.outcomes([good, lost])
    assert failed == {places[1]: "wrong", places[2]: "ended its process"}
    measured: list[float] = []

    def measure(table: tune.Table) -> float:
        measured.append(1.0)
        return 1.0

    trials, _ = tune.tune({"op": ROWS}, "op", ROWS[2], 90, measure, limit=7, failed=failed)
    assert [trial.reason for trial in trials if trial.config in (second, third)] == ["wrong", "ended its process"]
    assert len(measured) == 5
    # Processes of a stand-in: one that ends well, and one that its time limit cuts off.
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, time\n"
        f"print(json.dumps({{'begun': {places[1]!r}}}), flush=True)\n"
        "if sys.argv[-2] == '1': time.sleep(60)\n"
        f"print(json.dumps({{'ended': {places[1]!r}, 'reason': ' '.join(sys.argv[1:])}}), flush=True)\n"
    )
    monkeypatch.setattr(tune, "__file__", str(script))
    assert tune.checked(["op"], 2, 3.0) == {places[1]: "op --check 0 2"}


def test_every_kernel_can_be_tuned() -> None:
    for kernel, rows in launch.table().items():
        for row in tune.effective(rows, 90):
            case, provider, timed = tune.work(kernel, row.get("size"))
            assert provider in case.providers
            assert timed in case.costs
    with pytest.raises(ValueError, match=r"^other: no benchmark"):
        tune.work("other", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it tunes")
def test_the_tuner_needs_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tune.py", "glu"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tune.py: needs a GPU")
    assert done.stderr.count("\n") == 1


# --- Pictures --------------------------------------------------------------------------------------------------------


def timed(op: str, case: str, which: str, provider: str, ms: float, **more: Any) -> Row:
    return {"op": op, "case": case, "pass": which, "provider": provider, "ms": ms} | more


SOME = [
    timed("attention", "8k", "forward", "afina", 1.0, flops=1e12, bytes=1e9),
    timed("attention", "8k", "both", "afina", 4.0, flops=4e12, bytes=4e9, ceiling_tflops=800, ceiling_gbps=3000),
    timed("attention", "8k", "both", "flash", 6.0, flops=4e12, bytes=4e9),
    timed("attention", "16k", "both", "afina", 8.0, flops=8e12, bytes=8.01e9),
    timed("glu", "4x4", "both", "afina", 2.0, flops=0, bytes=1e9),
    timed("glu", "4x4", "both", "eager", 80.0, flops=0, bytes=1e9),
    {"op": "glu", "case": "4x4", "provider": "liger", "skipped": "not here"},
]


def lines(path: Path, rows: list[Row]) -> Path:
    path.write_text("noise of a peer\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_points_and_bars(tmp_path: Path) -> None:
    again = [timed("glu", "4x4", "both", "eager", 40.0)]
    rows = plot.read([lines(tmp_path / "a.jsonl", SOME), lines(tmp_path / "b.jsonl", again)])
    assert len(rows) == 6
    cases = plot.whole(rows)
    assert cases["attention", "8k"]["afina"]["pass"] == "both"
    assert plot.relative(cases["attention", "8k"]) == [("afina", 1.0, 4.0), ("flash", 1.5, 6.0)]
    assert plot.relative(cases["glu", "4x4"])[1] == ("eager", 20.0, 40.0)
    assert plot.relative({"flash": rows[2]}) == []
    found = plot.points(rows)
    assert {point[:3] for point in found} == {
        ("attention", "8k", "afina"), ("attention", "8k", "flash"), ("attention", "16k", "afina"),
    }  # fmt: skip
    assert sorted(y for *_, x, y in found if x == 1000.0) == pytest.approx([2000 / 3, 1000.0])
    ((op, names, _),) = plot.columns(found)
    assert (op, set(names)) == ("attention", {"8k", "16k"})


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.floats(0, 10), max_size=8).map(sorted), st.floats(0.1, 2))
def test_numbers_do_not_overlap(places: list[float], least: float) -> None:
    moved = plot.spread(places, least)
    assert len(moved) == len(places)
    assert all(b - a >= least - 1e-9 for a, b in pairwise(moved))
    if all(b - a >= least for a, b in pairwise(places)):
        assert moved == pytest.approx(places)


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = plot.read([lines(tmp_path / "a.jsonl", SOME)])
    made = plot.draw(rows, tmp_path / "pictures")
    assert {path.name for path in made} == {
        f"{name}.{kind}" for name in ("roofline", "times") for kind in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in made)
    text = (tmp_path / "pictures" / "times.svg").read_text()
    assert "flash  1.50x  6 ms" in text
    assert "eager  40.00x  80 ms" in text
    assert plot.draw([timed("glu", "x", "both", "eager", 1.0)], tmp_path) == []


# --- The suite -------------------------------------------------------------------------------------------------------


def test_time_is_shared_out() -> None:
    for seconds, stages in gpu_suite.PARTS.values():
        assert sum(stage.weight for stage in stages) <= seconds - gpu_suite.GRACE
        left, whole = float(seconds), 0.0
        for i in range(len(stages)):
            share = gpu_suite.allowance(left - whole, i, stages)
            assert share > 0
            whole += share
        assert whole == pytest.approx(left)
    stages = gpu_suite.KERNELS
    assert {stage.name for stage in stages} == {*SCRIPTS, "tests"}
    # What one leaves, the next ones share; the last may take all.
    assert gpu_suite.allowance(500.0, 3, stages) > gpu_suite.allowance(400.0, 3, stages)
    assert gpu_suite.allowance(77.0, len(stages) - 1, stages) == 77.0
    assert gpu_suite.allowance(-5.0, 0, stages) == 0.0


def test_what_a_part_does_first() -> None:
    """The most worth first, the whole in the time that there is; each attention in a process of its own."""
    parts = {part: (seconds, [stage.name for stage in stages]) for part, (seconds, stages) in gpu_suite.PARTS.items()}
    attentions = [f"attention-{name}" for name in ("afina-gluon", "afina", "flash", "cudnn")]
    assert parts["first"] == (240, ["tests", *attentions])
    assert parts["second"] == (300, ["cross_entropy", "norm", "adamw", "decode", "tune", "train-0.5b", "train-graph"])
    assert parts["training"] == (400, ["full-0.5b", "lora-8b", "full-1.5b", "lora-8b-peft"])
    first = gpu_suite.PARTS["first"][1]
    assert gpu_suite.allowance(240 - gpu_suite.GRACE - gpu_suite.PLOT_SECONDS, 0, first) <= 115
    for _, stages in gpu_suite.PARTS.values():
        for stage in stages:
            assert stage.name == "tests" or (gpu_suite.HERE / (stage.script or f"bench_{stage.name}.py")).is_file()
    shapes = bench_train_gpu.SHAPES["gpu"]
    for stage in (*gpu_suite.SECOND[-2:], *gpu_suite.TRAINING):
        (_, word), method = stage.gpu_arguments, stage.arguments[1]
        assert any(word in name and shape.method == method for name, shape in shapes.items())
    llmq = [shape for name, shape in shapes.items() if name.endswith("524k")]
    assert [shape.rows * shape.length * shape.micro_batches for shape in llmq] == [524_288] * 2


@pytest.mark.slow
def test_a_part_runs_through_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(gpu_suite.HERE / "gpu_suite.py"), "--training", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=True)
    rows = [json.loads(line) for line in (tmp_path / "out/environment.jsonl").read_text().splitlines()]
    stages = [row for row in rows if row.get("row") == "stage"]
    assert [row["stage"] for row in stages][:4] == [stage.name for stage in gpu_suite.TRAINING]
    if not torch.cuda.is_available():
        assert all(row.get("note") == "CPU: no statement of speed" for row in stages[:4] if "skipped" not in row)
    assert len(list((tmp_path / "out").iterdir())) <= 8
    assert "timed rows" in done.stdout


def test_which_tests_run_how() -> None:
    files, left_out = gpu_suite.test_files({"hypothesis"})
    assert {
        "tests/kernels/test_attention.py",
        "tests/engine/test_train.py::test_steps_never_wait_for_the_gpu",
        "tests/kernels/test_norm.py",
    } <= set(files)
    assert "tests/loaders/data/test_rows.py" not in files
    assert not left_out
    files, left_out = gpu_suite.test_files(set())
    assert "test_norm.py: needs hypothesis" in left_out
    bare = gpu_suite.pytest_command(["tests/kernels/test_norm.py"], set(), 16)
    assert "-n" not in bare
    assert not any(word.startswith("--timeout") for word in bare)
    full = gpu_suite.pytest_command(["tests/kernels/test_norm.py"], {"xdist", "pytest_timeout"}, 16)
    assert full[full.index("-n") + 1] == "14"
    assert "--timeout=120" in full
    assert gpu_suite.summary("x\n== 1 failed, 5 passed in 3.1s ==\n") == "1 failed, 5 passed in 3.1s"
    assert gpu_suite.summary("cut off") == ""


def test_an_op_goes_on_without_what_broke_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = gpu_suite.Suite(tmp_path, 9, gpu=True)
    commands: list[list[str]] = []

    def run(command: list[str], limit: float, out: Any, err: Any, **env: str) -> tuple[int | None, float]:
        commands.append(command)
        again = len(commands) > 1
        rows = [{"op": "glu", "case": "a", "pass": "both", "provider": "eager", "ms": 1.0 + again}]
        if not again:
            rows.append({"op": "glu", "case": "a", "provider": "afina", "lost": "AcceleratorError: illegal access"})
        out.write("a peer says\n" + "".join(json.dumps(row) + "\n" for row in rows) + '{"op": "cut o')
        return (None if again else gpu_suite.DEVICE_LOST), 1.0

    monkeypatch.setattr(suite, "run", run)
    suite.benchmark(gpu_suite.Stage("activation", 1), 60.0)
    suite.log.close()
    assert "--methods" not in commands[0]
    assert "--quick" not in commands[0]
    assert commands[1][-2:] == ["--without", "afina"]
    kept = [json.loads(line) for line in (tmp_path / "benchmarks.jsonl").read_text().splitlines()]
    assert [row["ms"] for row in kept] == [2.0]
    first, second = (json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines())
    assert first["lost"]["provider"] == "afina"
    assert second["skipped"] == "time limit: rows after the last one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.jsonl", "environment.jsonl", "suite.log"]


@pytest.mark.parametrize("gpu", [True, False])
def test_a_stage_has_arguments_of_its_own(gpu: bool, tmp_path: Path, monkeypatch: Any) -> None:
    suite = gpu_suite.Suite(tmp_path, 9, gpu=gpu)
    commands: list[list[str]] = []

    def run(command: list[str], limit: float, out: Any, err: Any, **env: str) -> tuple[int | None, float]:
        commands.append(command)
        return 0, 1.0

    monkeypatch.setattr(suite, "run", run)
    suite.benchmark(gpu_suite.TRAINING[1], 60.0)
    suite.log.close()
    ((_, script, *rest),) = commands
    assert Path(script).name == "bench_train_gpu.py"
    sizes = ["--cases", "Llama-3-8B"] if gpu else ["--quick"]
    assert rest == ["--seconds", "55", "--methods", "lora", "--providers", "afina", *sizes]


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    suite = gpu_suite.Suite(tmp_path, 9, gpu=False)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    status, seconds = suite.run(command, 0.3, subprocess.DEVNULL, subprocess.DEVNULL)
    suite.log.close()
    assert status is None
    assert seconds < 10
    assert math.isfinite(suite.deadline)


def test_splitting_gate_and_up() -> None:
    """The peer that takes two tensors gives back one gradient."""
    (case, *_) = bench_activation.cases("tiny")
    (x,) = case.inputs()
    case.inputs = lambda: [x]
    halves = [half.detach().contiguous().requires_grad_() for half in x.chunk(2, -1)]
    peer = harness.Peer(
        partial(lambda a, b: torch.nn.functional.silu(a) * b, *halves), halves, lambda grads: [torch.cat(grads, -1)]
    )
    case.providers = {"halves": lambda gate_up: peer}
    assert [row.get("skipped") for row in rows_of(case)] == [None] * 3
