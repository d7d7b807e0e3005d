"""engine/run_inputs.py: what a run is opened from, and the settings that wait for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import fit, lines
from tiny_model import CONFIG, tiny_tokenizer

from afina.engine.methods import default_learning_rate
from afina.engine.run_inputs import activation_policy, device_of
from afina.engine.train import finetune, open_run
from afina.engine.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_learning_rate_left_open_goes_by_method_and_width_and_stands_in_the_recipe_with_its_reason(
    small_model: str, small_rows: str, tmp_path: Path
) -> None:
    width = CONFIG["hidden_size"]
    for method in ("full", "lora"):
        result = fit(
            small_model, small_rows, tmp_path / method, learning_rate=None, method=method, max_steps=2, warmup_steps=0
        )
        rate, reason = default_learning_rate(method, width)
        recipe = (tmp_path / method / "recipe.yaml").read_text()
        assert f"# {reason}\nlearning_rate: {rate}\n" in recipe
        assert lines(result, "lr")[0] == rate
        again = TrainConfig.resolve(tmp_path / method / "recipe.yaml")
        assert again.learning_rate == rate
        fit(
            small_model,
            small_rows,
            tmp_path / method,
            learning_rate=None,
            method=method,
            max_steps=3,
            warmup_steps=0,
            resume=True,
        )
    fit(small_model, small_rows, tmp_path / "given", max_steps=1)
    assert reason not in (tmp_path / "given" / "recipe.yaml").read_text()


def test_from_scratch(small_rows: str, tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    result = finetune(
        quiet=True, init="random", config=str(tmp_path / "config.json"), tokenizer=str(tmp_path / "tokenizer"),
        data=small_rows, output_dir=str(tmp_path / "run"), max_length=64, max_steps=40, learning_rate=1e-2, threads=1,
    )  # fmt: skip
    assert result.metrics["dev_loss_before"] == pytest.approx(math.log(320), rel=0.02)  # knows nothing yet
    assert result.metrics["dev_loss"] < 5.0


def test_a_run_goes_on_in_the_dtype_that_it_began_in(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(small_model, small_rows, tmp_path / "run", max_steps=1)
    monkeypatch.setenv("AFINA_CPU_DTYPE", "bfloat16")
    config = TrainConfig(model=small_model, data=small_rows, output_dir=str(tmp_path / "run"), max_length=64)
    for resume, dtype in ((True, "float32"), (False, "bfloat16")):
        with open_run(config, resume=resume, overwrite=not resume, quiet=True) as run:
            assert run.config.dtype == dtype
            assert ("dtype" in run.notes) == (not resume)


def test_a_model_of_shapes_alone_computes_where_it_would_be(small_model: str, small_rows: str, tmp_path: Path) -> None:
    config = TrainConfig(model=small_model, data=small_rows, output_dir=str(tmp_path / "run"), device="cpu")
    with open_run(config, quiet=True, weights=False) as run:
        assert run.model.embed.weight.is_meta
        assert device_of(run.model, config) == torch.device("cpu")
        assert run.model.training


def test_a_policy_left_open_is_selective_on_a_cpu(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(model=small_model, data=small_rows, output_dir=str(tmp_path / "run"), device="cpu")
    with open_run(config, quiet=True, weights=False) as run:
        found = run.model.activation_policy
        given = {
            changed.activation_policy: activation_policy(run.model, changed)
            for changed in (replace(config, activation_policy="keep"), replace(config, gradient_checkpointing=True))
        }
        monkeypatch.setattr("afina.engine.run_inputs.device_of", lambda *_: torch.device("cuda"))
        assert activation_policy(run.model, config) == "auto"
    assert found == "selective"
    assert given == {"keep": "keep", "auto": "full"}
