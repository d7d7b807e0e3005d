"""config.json: both styles in use give the same model, and what cannot be honoured is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hf_models import BY_NAME, parametrize, saved, transformers

from afina.engine.model_config import ModelConfig
from afina.engine.rope_tables import inverse_frequencies
from afina.engine.weights import check_memory, choose_device, choose_dtype, new_model
from afina.errors import ConfigError

# The config.json of well-known models as their authors published them (sizes that do not matter here are kept).
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    },
    "pythia-160m": {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12, "num_hidden_layers": 12,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "Qwen2.5-7B-yarn": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "use_cache": True, "vocab_size": 262144,
    },
    "OLMo-2-1B": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 100352,
    },
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
        "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1 + i / 10 for i in range(48)], "short_factor": [1.0] * 48,
                         "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False,
        "use_sliding_window": False, "vocab_size": 128256,
    },
}  # fmt: skip

# No published model uses these, but the keys are read.
PUBLISHED["Qwen2.5-7B-sliding"] = PUBLISHED["Qwen2.5-7B-yarn"] | {"use_sliding_window": True, "max_window_layers": 21}
PUBLISHED["Qwen3-0.6B-sliding"] = PUBLISHED["Qwen3-0.6B"] | {
    "use_sliding_window": True, "max_window_layers": 21, "sliding_window": 64,
}  # fmt: skip
PUBLISHED["SmolLM3-3B-sliding"] = {
    key: value
    for key, value in (PUBLISHED["SmolLM3-3B"] | {"use_sliding_window": True, "sliding_window": 64}).items()
    if key not in ("layer_types", "no_rope_layers")
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_in_both_styles(name: str) -> None:
    """As published, and as transformers writes it today (rope_parameters, layer_types ...): the same model."""
    published = PUBLISHED[name]
    kind = type(transformers.AutoConfig.for_model(published["model_type"]))
    rewritten = json.loads(json.dumps(kind.from_dict(copy.deepcopy(published)).to_dict()))
    assert ModelConfig.from_hf(published) == ModelConfig.from_hf(rewritten)
    if published["model_type"] != "gpt2":
        assert "rope_scaling" not in rewritten


def test_published_values() -> None:
    """A few, by hand, against the papers and model cards."""
    gemma = ModelConfig.from_hf(PUBLISHED["gemma-3-1b"])
    assert gemma.layer_windows[:7] == (512, 512, 512, 512, 512, None, 512)
    assert gemma.layer_ropes[4:7] == (1, 0, 1)
    assert [(r.kind, r.theta, r.factor) for r in gemma.ropes] == [("linear", 1e6, 8.0), ("default", 1e4, 1.0)]
    assert gemma.tie_embeddings
    assert gemma.num_parameters() == 999_885_952
    phi = ModelConfig.from_hf(PUBLISHED["Phi-4-mini"])
    assert (phi.ropes[0].kind, phi.ropes[0].dim, phi.ropes[0].original_max_positions) == ("longrope", 96, 4096)
    assert round(phi.ropes[0].attention_factor, 4) == 1.1902
    assert ModelConfig.from_hf(PUBLISHED["SmolLM3-3B"]).layer_ropes[:5] == (0, 0, 0, None, 0)
    assert ModelConfig.from_hf(PUBLISHED["gemma-2-2b"]).layer_windows[:3] == (4096, None, 4096)
    assert ModelConfig.from_hf(PUBLISHED["pythia-160m"]).ropes[0].dim == 16
    yarn = ModelConfig.from_hf(PUBLISHED["Qwen2.5-7B-yarn"])
    assert yarn.layer_windows == (None,) * 28
    assert round(yarn.ropes[0].attention_factor, 4) == 1.1386
    for name, count in (("gpt2", 124_439_808), ("SmolLM2-135M", 134_515_008), ("Llama-3.2-1B", 1_235_814_400)):
        assert ModelConfig.from_hf(PUBLISHED[name]).num_parameters() == count


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen2.5-7B-yarn", "Phi-4-mini"])
def test_published_frequencies(name: str) -> None:
    """Inverse frequencies of real sizes to the bit, below and above the original maximum (for LongRoPE)."""
    published = PUBLISHED[name]
    config = type(transformers.AutoConfig.for_model(published["model_type"])).from_dict(copy.deepcopy(published))
    rope = ModelConfig.from_hf(published).ropes[0]
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope.kind]
    for long in (False, True):
        expected, factor = compute(config, seq_len=rope.original_max_positions + long)
        assert torch.equal(inverse_frequencies(rope, long=long), expected)
        assert rope.attention_factor == factor


@parametrize()
def test_absent_keys_mean_what_they_mean_to_transformers(name: str) -> None:
    """Only the sizes written: everything else comes from the HF class's own defaults."""
    case = BY_NAME[name]
    written = json.loads((saved(name).folder / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "model_type")
    short = {key: written[key] for key in sizes if key in written}
    if "n_embd" not in short:
        short |= {"hidden_size": 512, "num_attention_heads": 32}  # which every class's key/value heads divide
    config = type(saved(name).model.config)
    full = json.loads(json.dumps(config(**{k: v for k, v in short.items() if k != "model_type"}).to_dict()))
    assert ModelConfig.from_hf(short) == ModelConfig.from_hf(full), case


LLAMA = PUBLISHED["SmolLM2-135M"]
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # base, change (None removes the key), what the message must say
    ("SmolLM2-135M", {"model_type": "lama"}, "model_type = 'lama' (did you mean 'llama'?); supported: gemma2,"),
    ("SmolLM2-135M", {"model_type": None}, "model_type = None"),
    ("SmolLM2-135M", {"model_type": ["llama"]}, "model_type = ['llama']"),
    ("SmolLM2-135M", {"architectures": ["LlamaForSequenceClassification"]}, "expected ['LlamaForCausalLM']"),
    ("SmolLM2-135M", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_method'"),
    ("SmolLM2-135M", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map = {'AutoModel': 'x.Y'}: code of the model's own"),
    ("SmolLM2-135M", {"is_encoder_decoder": True}, "is_encoder_decoder = True: not supported"),
    ("SmolLM2-135M", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("SmolLM2-135M", {"rope_interleaved": True}, "rope_interleaved = True: not supported"),
    ("SmolLM2-135M", {"hiden_act": "gelu"}, "hiden_act = 'gelu': unknown key, refused because it may change the maths"),
    ("SmolLM2-135M", {"hiden_act": "gelu"}, "(did you mean 'hidden_act'?)"),
    ("SmolLM2-135M", {"hidden_act": "gelu"}, "hidden_act = 'gelu': supported here: silu, swish"),
    ("SmolLM2-135M", {"hidden_size": None}, "hidden_size = missing: expected a whole number from 1"),
    ("SmolLM2-135M", {"vocab_size": -5}, "vocab_size = -5: expected a whole number from 1"),
    ("SmolLM2-135M", {"vocab_size": 10**12}, "vocab_size = 1000000000000: expected a whole number from 1"),
    ("SmolLM2-135M", {"vocab_size": 1.5}, "vocab_size = 1.5"),
    ("SmolLM2-135M", {"vocab_size": True}, "vocab_size = True"),
    ("SmolLM2-135M", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: expected a whole number from 1 to"),
    ("SmolLM2-135M", {"num_attention_heads": 7}, "hidden_size = 576: not divisible by the 7 attention heads"),
    ("SmolLM2-135M", {"num_key_value_heads": 4}, "9 attention heads do not divide into 4 key/value heads"),
    ("SmolLM2-135M", {"rms_norm_eps": 0}, "rms_norm_eps = 0: expected a number above 0"),
    ("SmolLM2-135M", {"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
    ("SmolLM2-135M", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': expected true or false"),
    ("SmolLM2-135M", {"rope_theta": -1.0}, "rope_theta = -1.0"),
    ("SmolLM2-135M", {"head_dim": 63}, "rotary dimensions come in pairs"),
    ("SmolLM2-135M", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type = 'dynamic': supported: default, lin"),
    ("SmolLM2-135M", {"rope_scaling": {"rope_type": "linear"}}, "factor = None: expected a number above 0"),
    ("SmolLM2-135M", {"rope_scaling": "linear"}, "rope_scaling = 'linear': expected an object"),
    ("SmolLM2-135M", {"rope_scaling": ROPE | {"factr": 2}}, "factr = 2: unknown for rope type 'llama3' (did you mean"),
    ("SmolLM2-135M", {"rope_scaling": ROPE | {"high_freq_factor": 1.0}}, "expected above low_freq_factor (1.0)"),
    ("SmolLM2-135M", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "this family rotates whole heads"),
    ("SmolLM2-135M", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: unknown key"),
    ("SmolLM2-135M", {"sliding_window": 8}, "sliding_window = 8: unknown key"),
    ("Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types"),
    ("Mistral-7B-v0.1", {"sliding_window": 0}, "sliding_window = 0"),
    ("Mistral-7B-v0.1", {"attention_bias": True}, "attention_bias = True: not supported (it changes the maths)"),
    ("Qwen3-0.6B", {"layer_types": ["full_attention"]}, "expected 28 entries (num_hidden_layers)"),
    ("Qwen3-0.6B", {"layer_types": ["chunked_attention"] * 28}, "expected 28 entries (num_hidden_layers) from"),
    ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28}, "no sliding_window is set or in use"),
    ("Qwen2.5-7B-yarn", {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config = {}: expected chunk"),
    ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma-2-2b", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping = -1.0"),
    ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: not supported"),
    ("gemma-3-1b", {"rope_parameters": {"rope_type": "default"}}, "expected an object of settings for each of full_"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True: not supported"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("gpt2", {"n_head": 5}, "n_embd = 768: not divisible by n_head = 5"),
    ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu': supported here: gelu, gelu_pytorch_tanh"),
    ("pythia-160m", {"rope_theta": 5e5}, "rope_theta = 500000.0: not supported (it changes the maths); supported: 10"),
    ("Phi-4-mini", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0] * 48}},
     "expected a list of 48 numbers above 0"),
    ("SmolLM2-135M", {"architectures": 5}, "architectures = 5: expected ['LlamaForCausalLM']"),
    ("SmolLM2-135M", {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type = ['yarn']: supported: default, linear"),
    ("gemma-3-1b", {"layer_types": [{}] * 26}, "expected 26 entries"),
    ("SmolLM2-135M", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5}},
     "original_max_position_embeddings = 0.5: expected 1 or more"),
    ("Phi-4-mini", {"rope_scaling": ROPE}, "rope_type = 'llama3': supported: default, longrope"),
    ("Phi-4-mini", {"lm_head_bias": True}, "lm_head_bias = True"),
    ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, "expected 36 entries"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "change", "message"), REFUSED)
def test_refused(base: str, change: dict[str, Any], message: str) -> None:
    hf = {k: v for k, v in {**PUBLISHED[base], **change}.items() if not (k in change and v is None)}
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_hf(hf)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_null_is_absent() -> None:
    """Older configs write null where a feature is off."""
    keys = ("auto_map", "quantization_config", "rope_scaling", "rope_parameters", "head_dim", "pruned_heads")
    assert ModelConfig.from_hf(LLAMA | dict.fromkeys(keys)) == ModelConfig.from_hf(LLAMA)


def test_absurd_sizes_are_refused_before_allocation() -> None:
    huge = LLAMA | {"hidden_size": 9 * 2**20, "vocab_size": 2**31 - 1}
    with pytest.raises(ConfigError, match=r"parameters \(hidden_size 9437184, 30 layers, vocab_size 2147483647\) take"):
        new_model(huge)
    config = ModelConfig.from_hf(huge)
    with pytest.raises(ConfigError, match="but the cpu has"):
        check_memory(config, choose_dtype("auto", choose_device("cpu")), choose_device("cpu"))


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(
        ConfigError, match=r"dtype = 'bfloat': expected auto, float32, .* \(did you mean 'bfloat16'\?\)"
    ):
        new_model(LLAMA, dtype="bfloat")
    with pytest.raises(ConfigError, match="device = 'gpu': expected auto, cpu or cuda"):
        new_model(LLAMA, device="gpu")
