"""engine/fp8.py: which matrices compute in FP8, when, what a run says of it, and what it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

import afina
from afina.engine import fp8
from afina.engine.fp8 import use_fp8
from afina.engine.linear import Linear
from afina.engine.train_config import TrainConfig
from afina.engine.training_step import accumulate
from afina.errors import ConfigError
from afina.loaders.data.batches import MicroBatch

CPU = torch.device("cpu")


def batch() -> MicroBatch:
    ids = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    return MicroBatch(ids, ids, torch.tensor([0, 25, 40], dtype=torch.int32), [0, 1], 38, 40)


def test_the_matrices_that_train_and_only_in_training() -> None:
    model = afina.load_model(str(hf_models.saved("llama").folder), device="cpu", dtype="float32").train()
    plain = accumulate(model, [batch()])
    want = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    with torch.no_grad():
        dense = model.loss(batch().input_ids, batch().labels)
    note = use_fp8(model, CPU)
    layers = [m for m in model.layers.modules() if isinstance(m, Linear)]
    assert note.startswith(f"{sum(m.fp8 for m in layers)} of {len(layers)} matrices that train in e4m3, ")
    assert note.endswith("emulated on a CPU: the same roundings, and slower")
    assert sum(m.fp8 for m in layers) > 0
    for mode in (True, False):  # An evaluation, of the model in training mode and in the other.
        with torch.no_grad():
            assert torch.equal(model.train(mode).loss(batch().input_ids, batch().labels), dense)
    model.train()
    losses = {}
    for policy in ("keep", "selective", "full"):  # What computes a layer's input again gives the same bits.
        model.set_activation_policy(policy)
        loss = accumulate(model, [batch()])
        losses[policy] = (loss, {name: p.grad for name, p in model.named_parameters()})
        for p in model.parameters():
            p.grad = None
    for loss, grads in losses.values():
        assert torch.equal(loss, losses["keep"][0])
        assert all(torch.equal(g, losses["keep"][1][n]) for n, g in grads.items() if g is not None)
    loss, grads = losses["keep"]
    assert loss != plain
    assert abs(loss - plain) < 0.02 * plain  # A number of e4m3 is off by 2^-4 of itself at most, 2 % on average.
    for name, grad in grads.items():
        cosine = torch.cosine_similarity(grad.flatten(), want[name].flatten(), dim=0)  # type: ignore[union-attr]
        assert cosine > 0.9, name  # Random weights, whose scores are large: 0.93 was seen.


def test_frozen_matrices_and_other_sizes_stay() -> None:
    model = afina.load_model(str(hf_models.saved("llama").folder), device="cpu", dtype="float32").train()
    model.train_only(["layers.2.attn.o.weight"])
    assert use_fp8(model, CPU).startswith("1 of 1 matrices")
    assert [n for n, m in model.named_modules() if isinstance(m, Linear) and m.fp8] == ["layers.2.attn.o"]
    one = next(m for m in model.layers.modules() if isinstance(m, Linear))
    one.hold(torch.nn.Parameter(torch.zeros(24, 40)))
    model.train_only(["layers.0.attn.qkv.weight"])
    assert use_fp8(model, CPU).startswith("0 of 1 matrices")


def test_a_gpu_without_it_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = afina.load_model(str(hf_models.saved("llama").folder), device="cpu", dtype="float32").train()
    monkeypatch.setattr(fp8, "unavailable", lambda device: "this GPU has no FP8 products")
    assert use_fp8(model, torch.device("cuda", 0)) == "this GPU has no FP8 products; training without them"
    assert not any(m.fp8 for m in model.modules() if isinstance(m, Linear))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"linear_dtype": "fp8", "method": "lora"}, "but method is lora, .*: set linear_dtype to auto"),
        ({"linear_dtype": "fp9"}, "expected auto, fp8 .did you mean 'fp8'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig.resolve(overrides={"model": "m", "data": "d", "output_dir": "o", **settings})


def test_a_run_says_so_and_comes_to_nearly_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} the", "completion": f" word {i % 7}"}) + "\n" for i in range(20))
    )
    found = []
    for dtype in ("auto", "fp8"):
        result = afina.finetune(
            model="afina-tiny", data=str(rows), output_dir=str(tmp_path / dtype), max_steps=8, batch_size=4,
            threads=1, linear_dtype=dtype,
        )  # fmt: skip
        found.append(result.metrics)
        told = "linear_dtype fp8: " in capsys.readouterr().err
        recipe = (result.output_dir / "recipe.yaml").read_text()
        assert told == ("emulated on a CPU: the same roundings, and slower\nlinear_dtype: fp8\n" in recipe)
        assert told == (dtype == "fp8")
    assert found[0]["dev_loss_before"] == found[1]["dev_loss_before"]  # which is measured without FP8
    assert found[0]["dev_loss"] != found[1]["dev_loss"]
    assert found[0]["dev_loss"] == pytest.approx(found[1]["dev_loss"], abs=0.1)
    assert found[1]["dev_loss"] < found[1]["dev_loss_before"] - 0.5
