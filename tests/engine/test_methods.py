"""What trains, by method: the patterns of freeze, and what they stand for when none are given."""

from __future__ import annotations

from dataclasses import replace

import hf_models
import pytest
import torch
from one_step import changed_by_a_step

from afina.engine.methods import choose_patterns, default_trainable
from afina.engine.model import GPT
from afina.engine.weights import load_model
from afina.errors import ConfigError

IDS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))


def load(name: str) -> GPT:
    return load_model(hf_models.saved(name).folder, dtype="float32")


def test_a_step_moves_the_matrices_of_a_freeze_pattern() -> None:
    model = load("llama")
    model.train_only(choose_patterns(model, ["layers.1.mlp", "layers.*.input_layernorm", "lm_head"]))
    assert changed_by_a_step(model, IDS) == {
        "layers.1.mlp.gate_up.weight", "layers.1.mlp.down.weight", "head.weight",
        *(f"layers.{i}.attn_norm.weight" for i in range(3)),
    }  # fmt: skip


def test_freeze_patterns_stand_for_whole_words() -> None:
    model = load("llama")
    assert set(choose_patterns(model, ["layers.1"])) == {
        n for n, _ in model.named_parameters() if n.startswith("layers.1.")
    }
    assert choose_patterns(model, ["model.norm.weight"]) == ("norm.weight",)
    assert choose_patterns(model, ["layers.?.mlp.down_proj"]) == tuple(f"layers.{i}.mlp.down.weight" for i in range(3))
    assert set(choose_patterns(model, ["*"])) == {n for n, _ in model.named_parameters()}
    for pattern in "ayers.1", "layers.1.ml", "layer", "layers.", "[a-z]+", "(", "":
        with pytest.raises(ConfigError, match="is no tensor of this model") as caught:
            choose_patterns(model, [pattern])
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"did you mean 'model\.norm\.weight'"):
        choose_patterns(model, ["model.norm.wieght"])


def test_a_freeze_pattern_of_layer_1_is_not_one_of_layer_10() -> None:
    model = load("llama")
    config = replace(model.config, num_layers=12, layer_windows=(None,) * 12, layer_ropes=(0,) * 12)
    deep = GPT(config, device="meta")
    deep.hf_config = model.hf_config
    assert {name.split(".")[1] for name in choose_patterns(deep, ["layers.1"])} == {"1"}
    assert {name.split(".")[1] for name in choose_patterns(deep, ["layers.1?"])} == {"10", "11"}
    layers = [f"model.layers.{i}" for i in (9, 10, 11)]
    assert default_trainable(deep) == (*layers, "model.norm.weight", "lm_head.weight")


def test_by_default_the_last_quarter_of_the_layers_the_last_norm_and_the_head_train() -> None:
    assert default_trainable(load("llama")) == ("model.layers.2", "model.norm.weight", "lm_head.weight")
    assert default_trainable(load("gpt2")) == ("transformer.h.1", "transformer.ln_f.weight", "transformer.ln_f.bias")
    model = load("gpt_neox")
    model.train_only(choose_patterns(model, default_trainable(model)))
    moved = changed_by_a_step(model, IDS)
    assert moved == {n for n, _ in model.named_parameters() if n.startswith(("layers.2.", "norm.", "head."))}


def test_a_freeze_pattern_of_part_of_a_fused_matrix_is_refused() -> None:
    message = r"trainable: \S*k_proj.weight is one matrix with \S*q_proj.weight, \S*v_proj.weight here"
    with pytest.raises(ConfigError, match=message) as caught:
        choose_patterns(load("llama"), ["layers.1.self_attn.k_proj"])
    assert "\n" not in str(caught.value)
