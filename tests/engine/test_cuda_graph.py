"""engine/cuda_graph.py: when a run's steps are graphs, what it says when they cannot be, and whole runs by graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_graph import FakeGraph
from fake_graph import fake_graphs as fake_graphs
from small_run import Stop, fit, lines
from test_buckets import model as tiny_model

import afina
from afina.durable import remember
from afina.engine import cuda_graph, train
from afina.engine.buckets import Bucket, static_bytes
from afina.engine.checkpoint import load_checkpoint
from afina.engine.cuda_graph import decide, has_passed, ruled_out, without_kernels
from afina.engine.memory import plan
from afina.engine.optim import AdamW
from afina.engine.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("own_cache", "fake_graphs")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"model": "afina-tiny", "data": "rows.jsonl", "output_dir": "run"} | changes))


def test_the_setting_is_one_of_three_words_or_a_truth() -> None:
    assert config().cuda_graph == "auto"
    assert [config(cuda_graph=value).cuda_graph for value in (True, False, "true", "auto")] == [
        "true", "false", "true", "auto"
    ]  # fmt: skip
    with pytest.raises(afina.AfinaError, match=r"^cuda_graph is 'ture'; expected auto, true, false \(did you mean"):
        config(cuda_graph="ture")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("optim_in_backward is true", {"optim_in_backward": True, "max_grad_norm": 0}),
        ("offload_optimizer is true", {"offload_optimizer": True}),
        ("offload_params is true", {"offload_params": True, "method": "lora"}),
        ("activation_policy is offload", {"activation_policy": "offload"}),
        ("packing is false", {"packing": False}),
        ("attention_backend is torch", {"attention_backend": "torch"}),
        ("linear_dtype is fp8", {"linear_dtype": "fp8"}),
        ("lora_dropout is 0.1", {"method": "lora", "lora_dropout": 0.1}),
    ],
)
def test_what_needs_the_host_rules_them_out_by_name(name: str, changes: dict[str, Any]) -> None:
    asked = config(cuda_graph=True, **changes)
    assert (ruled_out(asked, GPU) or "").startswith(name)
    on, told = decide(asked, GPU)
    assert not on
    assert (told or "").endswith("needs the host in the middle of a step; steps run one launch at a time")
    assert decide(config(**changes), GPU) == (False, None)  # nobody asked


def test_auto_waits_for_a_check_that_has_passed_on_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert decide(config(cuda_graph=True), GPU) == (True, None)
    assert decide(config(), GPU) == (False, None)
    remember(cuda_graph.NOTE, cuda_graph._machine(GPU), True)
    assert decide(config(), GPU) == (True, None)
    assert decide(config(cuda_graph=False), GPU) == (False, None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert not has_passed(GPU)


def test_without_our_kernels_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = tiny_model().bfloat16()
    ops = {"attention": "torch", "adamw": "torch"}
    monkeypatch.setattr(cuda_graph, "choose", lambda op, backend, sample: ops[op])
    found = [without_kernels(AdamW(gpt, decay=set(), variant=variant), CPU) for variant in ("adamw", "adamw_8bit")]
    assert found == ["attention does not run in Triton here"] * 2
    ops["attention"] = "triton"
    found = [without_kernels(AdamW(gpt, decay=set(), variant=variant), CPU) for variant in ("adamw", "adamw_8bit")]
    assert found == [None, "adamw does not run in Triton here"]


def test_on_a_cpu_one_line_says_that_it_needs_a_gpu(
    small_model: str, small_rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"model": small_model, "data": small_rows, "max_length": 64, "max_steps": 1}
    for asked in (True, "auto"):
        result = afina.finetune(**options, output_dir=str(tmp_path / str(asked)), cuda_graph=asked)
        said = [line for line in capsys.readouterr().err.splitlines() if "cuda_graph" in line]
        expected = "cuda_graph true: a CUDA graph needs a GPU, and this run is on cpu; steps run one launch at a time"
        assert said == ([expected] if asked is True else [])
        recipe = (result.output_dir / "recipe.yaml").read_text()
        assert TrainConfig.resolve(result.output_dir / "recipe.yaml").cuda_graph == str(asked).lower()
        assert ("# a CUDA graph needs a GPU" in recipe) == (asked is True)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take the graphs of fake_graph.py."""
    real = cuda_graph.open_graphs

    def opened(config: TrainConfig, *args: Any) -> Any:
        return None if config.cuda_graph == "false" else real(config, *args, graph=FakeGraph)

    monkeypatch.setattr(train, "open_graphs", opened)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.usefixtures("graphed")
def test_a_run_by_graphs_is_the_run_without(method: str, small_model: str, small_rows: str, tmp_path: Path) -> None:
    """With several micro-batches, evaluations, an objective of its own, and a last step of an epoch with fewer rows."""
    options: dict[str, Any] = {
        "method": method, "gradient_accumulation_steps": 2, "eval_steps": 4, "max_steps": 7, "label_smoothing": 0.1,
        "z_loss": 1e-3, "max_grad_norm": 0.5,
    }  # fmt: skip
    ordinary = fit(small_model, small_rows, tmp_path / "without", cuda_graph=False, **options)
    assert FakeGraph.made == []
    by_graphs = fit(small_model, small_rows, tmp_path / "graphs", cuda_graph=True, **options)
    assert sum(graph.replays for graph in FakeGraph.made) > 4 + 7 + 13
    for key in ("loss", "grad_norm", "lr", "dev_loss"):
        assert lines(by_graphs, key) == pytest.approx(lines(ordinary, key), rel=1e-4), key
    ends = [load_checkpoint(run.output_dir / "checkpoint-7") for run in (ordinary, by_graphs)]
    assert ends[0].meta["updates"] == ends[1].meta["updates"] == 7
    assert has_passed(CPU)


@pytest.mark.usefixtures("graphed", "result_read")
def test_a_run_by_graphs_that_is_stopped_and_resumed_is_the_same_bit_for_bit(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is not finite among them."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_steps": 9, "save_steps": 9, "cuda_graph": True}
    straight = fit(small_model, small_rows, tmp_path / "straight", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", lambda: Stop(6))  # between two micro-batches
        with pytest.raises(train.Interrupted):
            fit(small_model, small_rows, tmp_path / "run", **options)
    resumed = fit(small_model, small_rows, tmp_path / "run", resume=True, **options)
    assert lines(resumed, "loss") == lines(straight, "loss")
    ends = [load_checkpoint(run.output_dir / "checkpoint-8") for run in (resumed, straight)]
    for group in ends[0].groups:
        ours, theirs = (end.tensors(group) for end in ends)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.usefixtures("graphed")
def test_a_run_whose_graphs_are_wrong_says_so_and_is_the_run_without(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afina.engine.buckets.StaticInputs.fill", lambda *_: None)
    log: list[str] = []
    monkeypatch.setattr(train, "say", log.append)
    monkeypatch.setattr(cuda_graph, "remember", None)
    ordinary = fit(small_model, small_rows, tmp_path / "without", cuda_graph=False)
    settings: dict[str, Any] = {"max_length": 64, "max_steps": 8, "batch_size": 4, "learning_rate": 1e-3, "threads": 1}
    wrong = afina.finetune(
        model=small_model, data=small_rows, output_dir=str(tmp_path / "graphs"), cuda_graph=True, **settings
    )
    assert [line for line in log if line.startswith("cuda_graph: the loss is not that of the ordinary step")]
    for key in ("loss", "dev_loss"):
        assert lines(wrong, key) == lines(ordinary, key)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["adamw", "adamw_8bit", "adamw_bf16"])
def test_on_a_gpu_a_run_by_graphs_passes_its_check(
    variant: str, small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(train, "say", log.append)
    left = {}
    for graph in (False, True):
        out = tmp_path / str(graph)
        left[graph] = afina.finetune(
            model=small_model, data=small_rows, output_dir=str(out), max_length=64, max_steps=8, batch_size=4,
            gradient_accumulation_steps=2, learning_rate=1e-3, optim=variant, device="cuda", cuda_graph=graph,
        )  # fmt: skip
    assert [line for line in log if "cuda_graph" in line] == []
    assert has_passed(GPU)
    assert lines(left[True], "loss") == pytest.approx(lines(left[False], "loss"), rel=2e-2)


def test_the_plan_counts_what_stays_for_graphs() -> None:
    gpt = tiny_model()
    optimizer = AdamW(gpt, decay=set())
    padded = plan(gpt, optimizer, tokens=320, loss_tokens=64)
    found = plan(gpt, optimizer, tokens=300, loss_tokens=50, accumulates=False, graphs=True)
    assert found.activations == 2 * padded.activations + static_bytes(Bucket(320, 64))
    assert found.gradients == padded.gradients >= sum(p.nbytes for p in gpt.parameters())
