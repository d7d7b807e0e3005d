"""engine/run_state.py: a run that is stopped and resumed is the same run, and other states are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Stop, fit, lines

from afina.engine import train
from afina.engine.checkpoint import FORMAT, load_checkpoint
from afina.engine.metrics import Progress
from afina.engine.run_state import check_best
from afina.errors import AfinaError
from afina.manifest import write_manifest

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.usefixtures("result_read")
@pytest.mark.parametrize("polls", [0, 1, 6, 9, 17])
def test_stopped_anywhere_and_resumed_is_the_same_run_bit_for_bit(
    small_model: str, small_rows: str, tmp_path: Path, polls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_steps": 3, "save_steps": 3}
    straight = fit(small_model, small_rows, tmp_path / "straight", **options)
    monkeypatch.setattr(train, "StopRequest", lambda: Stop(polls))
    with pytest.raises(train.Interrupted):
        fit(small_model, small_rows, tmp_path / "run", **options)
    monkeypatch.undo()
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    resumed = fit(small_model, small_rows, tmp_path / "run", resume=True, **options)
    for key in ("loss", "grad_norm", "lr", "dev_loss"):
        assert lines(resumed, key) == lines(straight, key)
    ends = [load_checkpoint(r.output_dir / "checkpoint-8") for r in (resumed, straight)]
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = (end.tensors(group) for end in ends)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ends[0].meta["rng"] == ends[1].meta["rng"]
    same = ("dev_loss", "dev_loss_before", "best_step", "trained_tokens", "train_loss", "steps")
    assert {k: resumed.metrics[k] for k in same} == {k: straight.metrics[k] for k in same}


STATE = {
    "adamw": {"weights": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    "adamw_8bit": {
        "weights": torch.float32,
        "exp_avg": torch.uint8,
        "exp_avg_absmax": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_absmax": torch.float32,
    },
    "adamw_bf16": {"weights": torch.bfloat16, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16},
}


@pytest.mark.parametrize("variant", STATE)
def test_each_optim_learns_holds_what_it_says_and_resumes_bit_for_bit(
    small_model: str, small_rows: str, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"optim": variant, "dtype": "bfloat16", "max_steps": 12, "save_steps": 3, "eval_steps": 6}
    straight = fit(small_model, small_rows, tmp_path / "straight", **options)
    assert straight.metrics["dev_loss"] < straight.metrics["dev_loss_before"]
    end = load_checkpoint(straight.output_dir / "checkpoint-12")
    assert {group: {t.dtype for t in end.tensors(group).values()} for group in end.groups} == {
        group: {dtype} for group, dtype in STATE[variant].items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", lambda: Stop(12))
        with pytest.raises(train.Interrupted):
            fit(small_model, small_rows, tmp_path / "run", **options)
    resumed = fit(small_model, small_rows, tmp_path / "run", resume=True, **options)
    for key in ("loss", "grad_norm", "dev_loss"):
        assert lines(resumed, key) == lines(straight, key)
    for group in end.groups:
        ours = load_checkpoint(resumed.output_dir / "checkpoint-12").tensors(group)
        assert all(torch.equal(ours[name], tensor) for name, tensor in end.tensors(group).items())


def test_a_state_of_another_version_is_refused_in_one_line(small_model: str, small_rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(small_model, small_rows, out, max_steps=2, save_steps=2)
    with (out / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")  # no line of ours, and deeper than JSON is read
    (checkpoint,) = out.glob("checkpoint-*")
    state = json.loads((checkpoint / "state.json").read_text())
    del (fewer := json.loads(json.dumps(state)))["meta"]["progress"]["tokens"]
    del (older := json.loads(json.dumps(state)))["meta"]["rng"]
    newer, other = json.loads(json.dumps(state)), json.loads(json.dumps(state))
    newer["meta"]["progress"]["epoch"] = 1
    other["meta"]["progress"]["step"] = "2"
    words = {"progress has no tokens": fewer, "needs updates": older, "has a epoch": newer, "has step = '2'": other}
    words["this version reads"] = state | {"format": "afina-checkpoint-2"}
    for found, changed in words.items():
        (checkpoint / "state.json").write_text(json.dumps(changed))
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, {}, format=FORMAT)
        with pytest.raises(AfinaError, match=found):
            fit(small_model, small_rows, out, max_steps=4, resume=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {}, format=FORMAT)
    assert fit(small_model, small_rows, out, max_steps=4, resume=True).metrics["steps"] == 4


def test_what_a_resumed_run_may_change(small_model: str, small_rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(small_model, small_rows, out, max_steps=2)
    for name, value in (("label_smoothing", 0.1), ("z_loss", 1e-4), ("optim", "adamw_8bit")):
        with pytest.raises(AfinaError, match=f"cannot be resumed.*{name}: .* -> {value!r}"):
            fit(small_model, small_rows, out, max_steps=3, resume=True, **{name: value})
    resumed = fit(small_model, small_rows, out, max_steps=3, resume=True, attention_backend="torch", lean_loss=True)
    assert resumed.metrics["steps"] == 3


def test_dropout_goes_on_with_the_random_numbers_of_the_checkpoint(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "lora", "lora_dropout": 0.5, "eval_steps": 9, "save_steps": 9}
    straight = fit(small_model, small_rows, tmp_path / "straight", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", lambda: Stop(5))
        with pytest.raises(train.Interrupted):
            fit(small_model, small_rows, tmp_path / "run", **options)
    assert list((tmp_path / "run").glob("checkpoint-[1-7]"))
    resumed = fit(small_model, small_rows, tmp_path / "run", resume=True, **options)
    assert lines(resumed, "loss") == lines(straight, "loss")
    ends = [load_checkpoint(r.output_dir / "checkpoint-8") for r in (resumed, straight)]
    assert ends[0].meta["rng"] == ends[1].meta["rng"]


def test_a_best_model_that_is_gone_or_damaged_does_not_count(
    small_model: str, small_rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = fit(small_model, small_rows, tmp_path / "run").best
    for problem in ("best is gone", "config.json"):
        progress = Progress(best_step=4, best_dev_loss=1.0, evaluated_step=8)
        told: list[str] = []
        check_best(progress, best, told.append)
        assert (progress.best_step, progress.evaluated_step, told) == (4, 8, [])
        if problem == "config.json":
            (best / problem).write_text("{}")
        else:
            best.rename(best.with_name("elsewhere"))
        check_best(progress, best, told.append)
        assert (progress.best_step, progress.best_dev_loss, progress.evaluated_step) == (-1, float("inf"), -1)
        (line,) = told
        assert problem in line
        assert line.endswith("; the next evaluation makes another best model")
        if problem == "best is gone":
            best.with_name("elsewhere").rename(best)
