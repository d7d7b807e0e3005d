"""Adapters through the command line: trained, resumed, and used by name; wrong ones refused in one line."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_model import saved

from afina.cli.main import run
from afina.cli.options import open_adapted
from afina.engine.evaluate import evaluate_loss
from afina.engine.run_inputs import read_data
from afina.engine.train_config import TrainConfig
from afina.engine.weights import load_model
from afina.loaders.text.source import load_tokenizer
from afina.loaders.weights.peft import CONFIG, WEIGHTS
from afina.loaders.weights.safetensors import read_safetensors, write_safetensors
from afina.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, and a LoRA and a QLoRA run of it."""
    folder = tmp_path_factory.mktemp("place")
    saved(folder / "model")
    lines = [{"prompt": f"one two {i}", "completion": f" three {i}"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for method, name in (("lora", "first"), ("qlora", "second")):
        assert train(folder, folder / name, "--method", method, "--use_dora", str(method == "qlora").lower()) == 0
    return folder


def train(place: Path, output: Path, *flags: str) -> int:
    argv = ["train", "--model", str(place / "model"), "--data", str(place / "rows.jsonl"), "--output_dir", str(output)]
    argv += ["--max_steps", "4", "--lora_r", "4", "--lr", "0.01", "--eval_steps", "2", "--threads", "1", "--quiet"]
    return run([*argv, *flags])


def json_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run([*argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run(list(argv)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("afina: error: ")
    return line


def test_a_run_leaves_an_adapter_and_says_what_it_trained(place: Path) -> None:
    best = place / "first" / "best"
    assert {path.name for path in best.iterdir()} >= {CONFIG, WEIGHTS, "tokenizer.json"}
    assert not (best / "model.safetensors").exists()
    config = json.loads((best / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (str(place / "model"), 4)
    recipe = yaml.safe_load((place / "first" / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["lora_alpha"], recipe["learning_rate"]) == ("lora", 8.0, 0.01)
    lines = [json.loads(line) for line in (place / "first" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["dev_loss"] for line in lines if "dev_loss" in line]
    assert losses[-1] < losses[0]


def test_the_best_adapter_gives_the_loss_that_was_measured(place: Path) -> None:
    for name in ("first", "second"):
        lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
        best = min(line["dev_loss"] for line in lines[1:] if "dev_loss" in line)
        record = json.loads((place / name / "run.json").read_text())
        assert record["facts"]["parameters"] == load_model(place / "model").num_parameters()
        config = TrainConfig.resolve(place / name / "recipe.yaml")
        data = read_data(config, load_tokenizer(place / name), progress=False)
        again = evaluate_loss(load_model(place / name), data.dev, batch_size=config.batch_size)
        assert again.loss == pytest.approx(best, rel=1e-6)
    quantized = load_model(place / "second")
    assert quantized.layers[0].attn.qkv.quantized is not None
    assert load_model(place / "first").layers[0].attn.qkv.quantized is None


@pytest.mark.parametrize("method", ["lora", "qlora", "freeze"])
def test_a_stopped_run_goes_on_bit_for_bit(method: str, place: Path, tmp_path: Path) -> None:
    argv = ["train", "--model", str(place / "model"), "--data", str(place / "rows.jsonl"), "--threads", "1", "--quiet"]
    argv += ["--lr", "0.01", "--eval_steps", "1", "--lr_scheduler_type", "constant", "--method", method]
    if method != "freeze":
        argv += ["--lora_r", "4", "--lora_dropout", "0.2", "--modules_to_save", "embed_tokens"]
        argv += ["--loraplus_lr_ratio", "4"]
    for output, steps in (("whole", 4), ("halves", 2), ("halves", 4)):
        more = ["--resume"] if (tmp_path / output).exists() else []
        assert run([*argv, "--output_dir", str(tmp_path / output), "--max_steps", str(steps), *more]) == 0
    name = "model.safetensors" if method == "freeze" else WEIGHTS
    assert (tmp_path / "whole/best" / name).read_bytes() == (tmp_path / "halves/best" / name).read_bytes()
    one, other = (
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    )
    assert one == other


def test_freezing_changes_the_named_tensors_only(place: Path, tmp_path: Path) -> None:
    argv = ["train", "--model", str(place / "model"), "--data", str(place / "rows.jsonl"), "--threads", "1", "--quiet"]
    argv += ["--output_dir", str(tmp_path / "run"), "--method", "freeze", "--max_steps", "2", "--lr", "0.01"]
    assert run([*argv, "--trainable", "layers.1.mlp.down_proj,norm"]) == 0
    before, after = (read_safetensors(f / "model.safetensors") for f in (place / "model", tmp_path / "run" / "best"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight", "model.norm.weight"}
    assert run([*argv[:-2], "--lr", "0.01", "--overwrite"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["trainable"] == [
        "model.layers.1",
        "model.norm.weight",
    ]


def test_a_run_says_what_it_will_take(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--model", str(place / "model"), "--data", str(place / "rows.jsonl"), "--max_steps", "1"]
    result = json_of(capsys, *argv, "--output_dir", str(tmp_path / "full"))["predicted_memory"]
    assert result["adapters"] == 0 < result["gradients"] <= result["weights"]
    assert run([*argv, "--output_dir", str(tmp_path / "lora"), "--method", "lora", "--lora_r", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    adapted = json.loads(out.splitlines()[-1])["predicted_memory"]
    assert 0 < adapted["adapters"] < result["weights"]
    assert adapted["gradients"] <= adapted["adapters"]  # those that are there when the step takes most
    assert "memory: weights " in err


def test_base_and_adapter_is_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--prompt", "one two 3", "--max_new_tokens", "8")
    alone = json_of(capsys, "generate", str(place / "first"), *argv)["text"]
    assert json_of(capsys, "generate", str(place / "model"), "--adapter", str(place / "first"), *argv)["text"] == alone
    assert json_of(capsys, "generate", str(place / "model"), *argv)["text"] != alone


def test_an_adapter_is_called_by_its_folder_or_as_you_like(place: Path) -> None:
    texts = [str(place / "first" / "best"), f"other={place / 'first'}"]
    plain = {"dtype": None, "device": None, "threads": None, "allow_nonfinite": None}
    args = argparse.Namespace(model=str(place / "model"), adapter=texts, **plain)
    model, _, adapters = open_adapted(args)
    assert list(adapters) == ["first", "other"]
    assert model.adapter is adapters["first"]


def test_several_adapters_by_name(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("--adapter", str(place / "first"), "--adapter", f"other={place / 'first' / 'best'}")
    argv = ("--prompt", "one two 3", "--max_new_tokens", "8")
    found = json_of(capsys, "generate", str(place / "model"), *both, *argv)
    assert list(found["texts"]) == ["first", "other"]
    assert found["text"] == found["texts"]["first"] == found["texts"]["other"]
    assert run(["generate", str(place / "model"), *both, *argv]) == 0
    assert capsys.readouterr().out == f"== first ==\n{found['text']}\n== other ==\n{found['text']}\n"

    output = tmp_path / "out.jsonl"
    rows = ("--data", str(place / "rows.jsonl"), "--output", str(output), "--max_new_tokens", "4")
    assert run(["generate", str(place / "model"), *both, *rows]) == 0
    line = json.loads(output.read_text().splitlines()[3])
    assert line["completions"] == {"first": line["completion"], "other": line["completion"]}
    capsys.readouterr()

    result = json_of(capsys, "eval", str(place / "model"), *both, "--data", str(place / "rows.jsonl"))
    assert list(result["adapters"]) == ["first", "other"]
    assert result["loss"] == result["adapters"]["other"]["loss"] < result["base"]["loss"]
    assert run(["eval", str(place / "model"), *both, "--data", str(place / "rows.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["first", "other", "base"]


def test_chat_changes_who_answers(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one", "", "/reset", "/adapter base", "one", "/reset", "/adapter first", "one", "/adapter none"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    argv = ["chat", str(place / "model"), "--adapter", str(place / "first"), "--max_new_tokens", "6"]
    assert run(argv) == 0
    out, err = capsys.readouterr()
    first, base, again = out.splitlines()[:3]
    assert first == again != base
    assert "no adapter 'none': there are first, base" in err


def test_wrong_adapters_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, first = str(place / "model"), str(place / "first")
    ask = ("--prompt", "one")
    assert "is a whole model, no adapter" in refused(capsys, "generate", model, "--adapter", model, *ask)
    assert "'first' is taken" in refused(capsys, "generate", model, "--adapter", first, "--adapter", first, *ask)
    assert "is an adapter itself" in refused(capsys, "generate", first, "--adapter", first, *ask)
    assert "no such model" in refused(capsys, "generate", model, "--adapter", "nowhere", *ask)

    other = saved(tmp_path / "other", rms_norm_eps=1e-6)
    with torch.no_grad():
        weights = read_safetensors(other / "model.safetensors")
        weights["model.norm.weight"] += 0.5
        write_safetensors(other / "model.safetensors", weights)
    assert "trained on another base" in refused(capsys, "generate", str(other), "--adapter", first, *ask)

    moved = tmp_path / "moved"
    shutil.copytree(place / "first" / "best", moved)
    config = json.loads((moved / CONFIG).read_text())
    (moved / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert "remove" in refused(capsys, "generate", str(moved), *ask)
    (moved / MANIFEST).unlink()  # as the message says: the change was meant
    assert "its base cannot be found" in refused(capsys, "generate", str(moved), *ask)
    assert json_of(capsys, "generate", model, "--adapter", str(moved), *ask)["text"] is not None
    (moved / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "base_model_name_or_path is missing" in refused(capsys, "generate", str(moved), *ask)
    argv = ["train", "--model", first, "--data", str(place / "rows.jsonl"), "--output_dir", str(tmp_path / "x")]
    for flags in ([], ["--dry_run"]):
        assert "is an adapter of" in refused(capsys, *argv, *flags)
    assert not (tmp_path / "x").exists()


def test_a_quantised_base_is_quantised_from_the_values_it_was_in_training(place: Path, tmp_path: Path) -> None:
    """In bf16 the codes are those of the rounded weights; on a machine that computes in fp32 they must be the same."""
    assert train(place, tmp_path / "run", "--method", "qlora", "--dtype", "bfloat16") == 0
    trained, plain = load_model(tmp_path / "run", dtype="float32"), load_model(place / "model", quantize="nf4")
    rounded = load_model(place / "model", dtype="bfloat16", quantize="nf4")
    (one, *_), (other, *_), (third, *_) = (m.layers[0].mlp.down.quantized.parts for m in (trained, rounded, plain))
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.state.absmax, other.state.absmax)
    assert not torch.equal(one.packed, third.packed)
