"""engine/train.py: the loop, its dev set, best model and early stopping; and each setting reaches what it is for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import fit, lines
from tqdm import tqdm

import afina
from afina.engine import model as engine_model
from afina.engine import optim, train
from afina.engine.run_folder import RunFolder
from afina.engine.run_inputs import read_data
from afina.engine.stop import StopRequest
from afina.engine.train import finetune
from afina.errors import AfinaError
from afina.kernels.adamw import adamw_
from afina.kernels.attention import attention
from afina.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy
from afina.loaders.data.batches import Batches
from afina.loaders.text.source import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_run_learns_and_says_so(small_model: str, small_rows: str, tmp_path: Path) -> None:
    result = fit(small_model, small_rows, tmp_path / "run", max_steps=60, eval_steps=20)
    metrics = result.metrics
    assert metrics["dev_loss"] < metrics["dev_loss_before"] - 0.5
    assert metrics["steps"] == 60 == len(lines(result, "loss"))
    assert metrics["trained_tokens"] == sum(lines(result, "trained_tokens"))
    assert metrics["train_loss"] == pytest.approx(sum(lines(result, "loss")) / 60)
    assert lines(result, "dev_loss")[0] == metrics["dev_loss_before"]
    assert metrics["dev_loss"] == min(lines(result, "dev_loss")[1:])
    assert {p.name for p in result.output_dir.iterdir()} == {
        "best", "checkpoint-40", "checkpoint-60", "dev_rows.json", "metrics.jsonl", "recipe.yaml", "run.json"
    }  # fmt: skip
    # The model in best/ is the one with that dev loss.
    again = fit(str(result.best), small_rows, tmp_path / "again", max_steps=1)
    assert again.metrics["dev_loss_before"] == pytest.approx(metrics["dev_loss"], abs=1e-6)


def test_best_is_the_lowest_dev_loss_and_patience_stops(small_model: str, small_rows: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 0.03, "lr_scheduler_type": "constant", "eval_steps": 1}
    result = fit(small_model, small_rows, tmp_path / "run", max_steps=200, early_stopping_patience=3, **options)
    losses = lines(result, "dev_loss")[1:]
    best = losses.index(min(losses))
    assert result.metrics["stopped_early"]
    assert len(losses) == best + 1 + 3 < 200
    assert result.metrics["best_step"] == best + 1
    again = fit(str(result.best), small_rows, tmp_path / "again", max_steps=1)
    assert again.metrics["dev_loss_before"] == pytest.approx(min(losses), abs=1e-6)


def test_evaluation_does_not_disturb_training(small_model: str, small_rows: str, tmp_path: Path) -> None:
    often, rarely = (fit(small_model, small_rows, tmp_path / str(n), eval_steps=n) for n in (1, 8))
    assert lines(often, "loss") == lines(rarely, "loss")
    assert len(lines(often, "dev_loss")) == 9
    assert len(lines(rarely, "dev_loss")) == 2


def test_every_weight_moves(small_model: str, small_rows: str, tmp_path: Path) -> None:
    result = fit(small_model, small_rows, tmp_path / "run", max_steps=1, warmup_steps=0)
    before, after = (dict(afina.load_model(m).named_parameters()) for m in (small_model, result.best))
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_checkpointed_layers_give_the_same_run(small_model: str, small_rows: str, tmp_path: Path) -> None:
    plain, recomputed = (
        fit(small_model, small_rows, tmp_path / str(on), gradient_checkpointing=on) for on in (False, True)
    )
    assert lines(plain, "loss") == lines(recomputed, "loss")


@pytest.mark.gpu
def test_steps_never_wait_for_the_gpu(small_model: str, small_rows: str, tmp_path: Path) -> None:
    config = afina.TrainConfig(
        model=small_model, data=small_rows, output_dir=str(tmp_path / "run"), max_length=64, max_steps=8, batch_size=4,
        gradient_accumulation_steps=2, device="cuda",
    )  # fmt: skip
    tokenizer = load_tokenizer(small_model)
    with RunFolder(tmp_path / "run") as folder:
        data = read_data(config, tokenizer, progress=False)
        loaded = afina.load_model(small_model, device="cuda").train()
        run = train.Run(config, loaded, tokenizer, data, folder, lambda text: None)
        run.begin()
        run.stop, run.bar = StopRequest(), tqdm(disable=True)
        run._step()  # compiles the kernels and makes what is made once
        run._step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                run._step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run._settle()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == list(range(1, 7))
    assert all(math.isfinite(line["loss"]) and line["seconds"] > 0 for line in written)


def test_smoothing_and_z_loss_are_in_the_training_loss_alone(small_model: str, small_rows: str, tmp_path: Path) -> None:
    changed: dict[str, Any] = {"label_smoothing": 0.2, "z_loss": 0.01}
    plain = fit(small_model, small_rows, tmp_path / "plain", max_steps=1)
    result = fit(small_model, small_rows, tmp_path / "changed", max_steps=1, **changed)
    assert lines(result, "dev_loss")[0] == lines(plain, "dev_loss")[0]
    config = afina.TrainConfig.resolve(result.output_dir / "recipe.yaml")
    assert (config.label_smoothing, config.z_loss) == (0.2, 0.01)
    data = read_data(config, load_tokenizer(small_model), progress=False)
    (batch,) = Batches(data.train, batch_size=4, seed=42).step(0)
    with torch.no_grad():
        logits = afina.load_model(small_model)(batch.input_ids, cu_seqlens=batch.cu_seqlens)[0]
    targets = batch.labels[0].roll(-1)
    for run, options in ((plain, {}), (result, changed)):
        expected = cross_entropy_reference(logits.double(), targets, **options).item()
        assert lines(run, "loss") == [pytest.approx(expected, rel=1e-5)]


def test_stochastic_rounding_draws_from_the_seed(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def watched(*args: Any, **kwargs: Any) -> None:
        seeds.append(kwargs["seed"])
        adamw_(*args, **kwargs)

    monkeypatch.setattr(optim, "adamw_", watched)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_steps": 1, "seed": 2**40 + 7}
    fit(small_model, small_rows, tmp_path / "bf16", optim="adamw_bf16", **options)
    assert min(seeds) == 7  # of the first group of parameters, in the 32 bits that the kernel takes
    seeds.clear()
    fit(small_model, small_rows, tmp_path / "fp32", optim="adamw", **options)
    assert set(seeds) == {None}


@pytest.mark.parametrize("backend", ["auto", "triton", "sdpa", "torch"])
def test_the_attention_backend_is_the_one_that_runs(
    small_model: str, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str | None] = set()

    def watched(*args: Any, backend: str | None, **kwargs: Any) -> torch.Tensor:
        used.add(backend)
        return attention(*args, backend=backend, **kwargs)

    # Few and short rows: Triton's interpreter takes its time.
    pairs = [{"prompt": f"{i}", "completion": (" five", " lazy dog")[i % 2]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "packing": backend != "sdpa"}
    plain = fit(small_model, str(tmp_path / "rows.jsonl"), tmp_path / "plain", **options)
    monkeypatch.setattr(engine_model, "attention", watched)
    result = fit(small_model, str(tmp_path / "rows.jsonl"), tmp_path / backend, attention_backend=backend, **options)
    assert used == {None if backend == "auto" else backend}
    for key in ("loss", "dev_loss"):
        assert lines(result, key) == pytest.approx(lines(plain, key), rel=1e-5)


def test_lean_loss_is_for_training_and_gives_the_same_loss(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def watched(*args: Any, lean: bool, **kwargs: Any) -> torch.Tensor:
        used.append((lean, torch.is_grad_enabled()))
        return linear_cross_entropy(*args, lean=lean, **kwargs)

    plain = fit(small_model, small_rows, tmp_path / "plain", max_steps=2)
    monkeypatch.setattr(engine_model, "linear_cross_entropy", watched)
    lean = fit(small_model, small_rows, tmp_path / "lean", max_steps=2, lean_loss=True)
    assert set(used) == {(True, True), (False, False)}  # training steps, evaluations
    for key in ("loss", "dev_loss"):
        assert lines(lean, key) == pytest.approx(lines(plain, key), rel=1e-5)


def test_finetune_takes_a_config_or_settings_but_not_both(small_model: str, small_rows: str, tmp_path: Path) -> None:
    config = afina.TrainConfig(model=small_model, data=small_rows, output_dir=str(tmp_path / "run"))
    with pytest.raises(TypeError, match="not both"):
        finetune(config, max_steps=3)
    with pytest.raises(AfinaError, match="batch_size"):
        fit(small_model, small_rows, tmp_path / "run", batch_size=0)
    assert not (tmp_path / "run").exists()
