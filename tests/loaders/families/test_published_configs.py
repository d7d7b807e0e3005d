"""Published models: their config.json is accepted, their weights are as many as published, in transformers' shapes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from hf_models import transformers
from published_configs import MODELS, Config, Published, config_of

from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.weights import hf_tensors
from afina.errors import ConfigError
from afina.loaders.families.registry import MODEL_TYPES, load_family

ACCEPTED = [model for model in MODELS if not model.refused]
REFUSED = [model for model in MODELS if model.refused]
published = pytest.mark.parametrize("model", ACCEPTED, ids=str)


def library_config(config: Config) -> Any:
    """transformers' own config object of a config.json."""
    values = copy.deepcopy(config)
    if (values.get("rope_scaling") or {}).get("type") == "su":  # a name of LongRoPE that transformers 5 has forgotten
        values["rope_scaling"]["type"] = "longrope"
    return transformers.AutoConfig.for_model(**values)


def test_the_table_covers_every_family_and_names_no_model_twice() -> None:
    assert {model.config["model_type"] for model in ACCEPTED} == set(MODEL_TYPES)
    assert max(Counter(model.name for model in MODELS).values()) == 1
    assert len(ACCEPTED) > 110


@published
def test_published_configs_are_accepted_with_their_parameters(model: Published) -> None:
    config = ModelConfig.from_hf(model.config)
    assert config.num_parameters() / 1e6 == pytest.approx(model.parameters, rel=0.01)


@published
def test_both_styles_mean_the_same(model: Published) -> None:
    """The style of transformers 4, in which they are published, and what transformers 5 writes for them."""
    written = json.loads(library_config(model.config).to_json_string())
    if model.config["model_type"] != "gpt_neox":  # whose RoPE settings have kept their names
        assert "rope_theta" not in written
    written["architectures"] = [load_family(model.config).architecture]
    ours, theirs = ModelConfig.from_hf(model.config), ModelConfig.from_hf(written)
    if "dual_chunk_attention_config" not in model.config:
        assert theirs == ours


def cut(config: Config, layers: int = 2) -> Config:
    """The same model with fewer layers: every shape of a layer stays."""
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    lists = {name: config[name][:layers] for name in ("layer_types", "no_rope_layers") if name in config}
    return {**config, key: layers, **lists}


@published
def test_the_weights_have_the_shapes_of_transformers(model: Published) -> None:
    config = cut(model.config)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(library_config(config), dtype=torch.bfloat16)
    wanted = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
    ours = GPT(ModelConfig.from_hf(config), device="meta", dtype=torch.bfloat16)
    ours.hf_config = {"architectures": [load_family(config).architecture], **config}
    found = {name.replace("embed_out.", "lm_head."): tuple(value.shape) for name, value in hf_tensors(ours)}
    assert found == wanted
    assert ours.config.num_parameters() == sum(value.numel() for value in theirs.parameters())


@pytest.mark.parametrize("model", REFUSED, ids=str)
def test_what_is_refused_has_a_reason(model: Published) -> None:
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_hf(model.config)
    assert model.refused in str(refused.value)
    assert "\n" not in str(refused.value)


def test_chunked_attention_is_plain_within_a_chunk() -> None:
    config = ModelConfig.from_hf(config_of("Qwen2.5-7B-Instruct-1M"))
    assert config.max_positions == 262144 - 8192
    plain = {k: v for k, v in config_of("Qwen2.5-7B-Instruct-1M").items() if k != "dual_chunk_attention_config"}
    assert ModelConfig.from_hf(plain).max_positions == 1010000
    for wrong in (3, {"chunk_size": 10}, {"chunk_size": 8, "local_size": 8}, {"chunk_size": "8", "local_size": 4}):
        with pytest.raises(ConfigError, match="dual_chunk_attention_config"):
            ModelConfig.from_hf(plain | {"dual_chunk_attention_config": wrong})


@pytest.mark.parametrize(
    "code",
    [
        {"AutoModelForCausalLM": "modeling_phi3_fast.Phi3ForCausalLM"},
        {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLMWithMoreHeads"},
        {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "someone/else--custom.Phi3ForCausalLM"},
        "modeling_phi3.Phi3ForCausalLM",
        {"AutoModelForCausalLM": ["modeling_phi3.Phi3ForCausalLM"]},
    ],
)
def test_code_under_another_name_is_refused(code: Any) -> None:
    with pytest.raises(ConfigError, match=r"auto_map = .*code of the model's own is never run"):
        ModelConfig.from_hf(config_of("Phi-3-mini-4k") | {"auto_map": code})
