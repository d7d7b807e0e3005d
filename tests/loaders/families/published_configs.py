"""What the config.json of published models holds: the keys that their publishers wrote, and how many weights they have.

Written from the model cards and configs on the hub. A model is a row of sizes, the keys that its release shares with
its sisters, and what is its own. Long lists of LongRoPE factors are stood in for by lists of the right length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """``parameters``: in millions, tied weights once. ``refused``: words of the reason, for what is not supported."""

    name: str
    config: Config = field(repr=False)
    parameters: float
    refused: str = ""

    def __str__(self) -> str:
        return self.name


MODELS: list[Published] = []


def release(shared: Mapping[str, Any], sizes: tuple[str, ...], rows: Mapping[str, tuple[Any, ...]]) -> None:
    """Add models: a row is its ``sizes`` in order, its parameters in millions, and perhaps more keys."""
    for name, row in rows.items():
        config = {**shared, **dict(zip(sizes, row))}
        more = row[len(sizes) + 1] if len(row) > len(sizes) + 1 else {}
        MODELS.append(Published(name, {**config, **more}, row[len(sizes)]))


def refuse(name: str, words: str, config: Mapping[str, Any]) -> None:
    MODELS.append(Published(name, dict(config), 0.0, words))


def config_of(name: str) -> Config:
    return next(model.config for model in MODELS if model.name == name)


def factors(count: int, last: float) -> list[float]:
    """LongRoPE factors that rise from 1 to ``last``."""
    return [1.0 + (last - 1.0) * i / (count - 1) for i in range(count)]


def auto_map(kind: str, architecture: str, config: str) -> Config:
    return {
        "auto_map": {
            "AutoConfig": f"configuration_{kind}.{config}",
            "AutoModelForCausalLM": f"modeling_{kind}.{architecture}",
        }
    }


DECODER = {"use_cache": True, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2}
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")

# ---------------------------------------------------------------- Llama and what has its layout

LLAMA = {
    **DECODER, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "pretraining_tp": 1,
    "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "max_position_embeddings": 4096, "vocab_size": 32000, "transformers_version": "4.31.0.dev0",
}  # fmt: skip
release(LLAMA, SIZES, {
    "Llama-2-7b": (4096, 11008, 32, 32, 32, 6738.4, {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pad_token_id": 0}),
    "Llama-2-13b": (5120, 13824, 40, 40, 40, 13015.9),
    "Llama-2-70b": (8192, 28672, 64, 80, 8, 68976.6),
    "vicuna-7b-v1.3": (4096, 11008, 32, 32, 32, 6738.4, {"max_position_embeddings": 2048, "pad_token_id": 0}),
    "vicuna-7b-v1.5-16k": (
        4096, 11008, 32, 32, 32, 6738.4,
        {"rope_scaling": {"factor": 4.0, "type": "linear"}, "max_sequence_length": 16384},
    ),
    "vicuna-13b-v1.5": (5120, 13824, 40, 40, 40, 13015.9, {"attention_bias": False}),
    "TinyLlama-1.1B": (2048, 5632, 32, 22, 4, 1100.0, {"max_position_embeddings": 2048, "rope_theta": 10000.0}),
    "Nous-Hermes-llama-2-7b": (4096, 11008, 32, 32, 32, 6738.4, {"model_max_length": 4096, "vocab_size": 32000}),
    "LLaMA-2-7B-32K": (
        4096, 11008, 32, 32, 32, 6738.4,
        {"max_position_embeddings": 32768, "rope_scaling": {"factor": 8.0, "type": "linear"}},
    ),
})  # fmt: skip
CODE = LLAMA | {"max_position_embeddings": 16384, "rope_theta": 1_000_000, "vocab_size": 32016}
release(CODE, SIZES, {
    "CodeLlama-7b": (4096, 11008, 32, 32, 32, 6738.5),
    "CodeLlama-13b": (5120, 13824, 40, 40, 40, 13016.0),
    "CodeLlama-34b": (8192, 22016, 64, 48, 8, 33744.0, {"vocab_size": 32000}),
    "CodeLlama-70b": (8192, 28672, 64, 80, 8, 68976.9),
})  # fmt: skip
LLAMA3 = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip
release(LLAMA3, SIZES, {
    "Meta-Llama-3-8B": (4096, 14336, 32, 32, 8, 8030.3),
    "Meta-Llama-3-70B": (8192, 28672, 64, 80, 8, 70553.7),
})  # fmt: skip
FAR = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
       "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA31 = LLAMA3 | {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": FAR,
                    "eos_token_id": [128001, 128008, 128009]}  # fmt: skip
SMALL = {"tie_word_embeddings": True, "rope_scaling": FAR | {"factor": 32.0}}
release(LLAMA31, SIZES, {
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 8030.3),
    "Llama-3.1-8B-unsloth": (
        4096, 14336, 32, 32, 8, 8030.3, {"unsloth_fixed": True, "unsloth_version": "2024.9", "pad_token_id": 128004},
    ),
    "Llama-3.1-70B": (8192, 28672, 64, 80, 8, 70553.7),
    "Llama-3.1-405B": (16384, 53248, 128, 126, 8, 405853.4),
    "Llama-3.2-1B": (2048, 8192, 32, 16, 8, 1235.8, SMALL | {"head_dim": 64}),
    "Llama-3.2-3B": (3072, 8192, 24, 28, 8, 3212.7, SMALL | {"head_dim": 128}),
    "Llama-3.3-70B": (8192, 28672, 64, 80, 8, 70553.7),
    "Hermes-3-Llama-3.1-8B": (4096, 14336, 32, 32, 8, 8030.3, {"_flash_attn_2_enabled": True}),
    "DeepSeek-R1-Distill-Llama-8B": (4096, 14336, 32, 32, 8, 8030.3, {"eos_token_id": 128001}),
    "DeepSeek-R1-Distill-Llama-70B": (8192, 28672, 64, 80, 8, 70553.7),
})  # fmt: skip
SMOL = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": 49152,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
SMOL2 = SMOL | {
    "max_position_embeddings": 8192, "rope_theta": 100000, "is_llama_config": True, "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}  # fmt: skip
for shared, version in ((SMOL, "SmolLM"), (SMOL2, "SmolLM2")):
    release(shared, SIZES, {
        f"{version}-135M": (576, 1536, 9, 30, 3, 134.5),
        f"{version}-360M": (960, 2560, 15, 32, 5, 361.8),
        f"{version}-1.7B": (2048, 8192, 32, 24, 32, 1711.4, {"rope_theta": 130000} if version == "SmolLM2" else {}),
    })  # fmt: skip
YI = LLAMA | {"vocab_size": 64000, "rope_theta": 5_000_000.0, "torch_dtype": "bfloat16", "pad_token_id": 0}
release(YI, SIZES, {
    "Yi-6B": (4096, 11008, 32, 32, 4, 6061.0),
    "Yi-1.5-9B": (4096, 11008, 32, 48, 4, 8829.4),
    "Yi-34B-200K": (7168, 20480, 56, 60, 8, 34388.9, {"max_position_embeddings": 200000, "rope_theta": 10_000_000.0}),
})  # fmt: skip
DEEPSEEK = LLAMA | {"vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001, "rms_norm_eps": 1e-6}
CODER = DEEPSEEK | {
    "vocab_size": 32256, "max_position_embeddings": 16384, "rope_theta": 100000,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
}  # fmt: skip
release(DEEPSEEK, SIZES, {
    "deepseek-llm-7b": (4096, 11008, 32, 30, 32, 6910.4),
    "deepseek-llm-67b": (8192, 22016, 64, 95, 8, 67425.0),
})  # fmt: skip
release(CODER, SIZES, {
    "deepseek-coder-1.3b": (2048, 5504, 16, 24, 16, 1346.5),
    "deepseek-coder-6.7b": (4096, 11008, 32, 32, 32, 6740.5),
    "deepseek-coder-33b": (7168, 19200, 56, 62, 8, 33342.9),
})  # fmt: skip

# ---------------------------------------------------------------- Mistral

MISTRAL = {
    **DECODER, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu",
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
MISTRAL2 = MISTRAL | {"sliding_window": None, "rope_theta": 1_000_000.0, "attention_dropout": 0.0}
TEKKEN = MISTRAL2 | {"head_dim": 128, "vocab_size": 131072, "rope_theta": 1e8}
release(MISTRAL, SIZES, {
    "Mistral-7B-v0.1": (4096, 14336, 32, 32, 8, 7241.7),
    "zephyr-7b-beta": (4096, 14336, 32, 32, 8, 7241.7, {"_name_or_path": "HuggingFaceH4/mistral-7b-sft-beta"}),
    "OpenHermes-2.5-Mistral-7B": (4096, 14336, 32, 32, 8, 7241.7, {"vocab_size": 32002, "eos_token_id": 32000}),
})  # fmt: skip
release(MISTRAL2, SIZES, {
    "Mistral-7B-Instruct-v0.2": (4096, 14336, 32, 32, 8, 7241.7),
    "Mistral-7B-v0.3": (4096, 14336, 32, 32, 8, 7248.0, {"vocab_size": 32768}),
    "Codestral-22B": (6144, 16384, 48, 56, 8, 22247.3, {"vocab_size": 32768, "head_dim": 128}),
    "Mistral-Large-2407": (12288, 28672, 96, 88, 8, 122610.0, {"vocab_size": 32768, "head_dim": 128}),
})  # fmt: skip
release(TEKKEN, SIZES, {
    "Mistral-Nemo-12B": (5120, 14336, 32, 40, 8, 12247.8, {"rope_theta": 1e6, "max_position_embeddings": 1024000}),
    "Mistral-Small-24B-2501": (5120, 32768, 32, 40, 8, 23572.4),
    "Ministral-8B-2410": (4096, 12288, 32, 36, 8, 8019.8, {"sliding_window": 32768}),
})  # fmt: skip

# ---------------------------------------------------------------- Qwen

QWEN2 = {
    **DECODER, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "max_position_embeddings": 32768,
    "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LARGE, TIED = {"vocab_size": 152064}, {"tie_word_embeddings": True}
release(QWEN2, SIZES, {
    "Qwen1.5-0.5B": (1024, 2816, 16, 24, 16, 464.0, TIED | {"max_window_layers": 21}),
    "Qwen1.5-1.8B": (2048, 5504, 16, 24, 16, 1836.8),
    "Qwen1.5-4B": (2560, 6912, 20, 40, 20, 3950.4),
    "Qwen1.5-7B": (4096, 11008, 32, 32, 32, 7721.3),
    "Qwen1.5-14B": (5120, 13696, 40, 40, 40, 14167.3, LARGE | {"max_window_layers": 35}),
    "Qwen1.5-32B": (5120, 27392, 40, 64, 8, 32512.2, LARGE),
    "Qwen1.5-72B": (8192, 24576, 64, 80, 64, 72287.9, LARGE),
    "Qwen1.5-110B": (8192, 49152, 64, 80, 8, 111209.9, LARGE),
})  # fmt: skip
for version, more in (("Qwen2", {"use_mrope": False}), ("Qwen2.5", {}), ("Qwen2.5-Coder", {"sliding_window": 131072})):
    release(QWEN2 | more, SIZES, {
        f"{version}-0.5B": (896, 4864, 14, 24, 2, 494.0, TIED),
        f"{version}-1.5B": (1536, 8960, 12, 28, 2, 1543.7, TIED),
        f"{version}-7B": (3584, 18944, 28, 28, 4, 7615.6, LARGE),
        **({f"{version}-72B": (8192, 29568, 64, 80, 8, 72706.2, LARGE)} if version != "Qwen2.5-Coder" else {}),
        **({
            f"{version}-3B": (2048, 11008, 16, 36, 2, 3085.9, TIED),
            f"{version}-14B": (5120, 13824, 40, 48, 8, 14770.0, LARGE),
            f"{version}-32B": (5120, 27648, 40, 64, 8, 32763.9, LARGE),
        } if version != "Qwen2" else {}),
    })  # fmt: skip
YARN = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
SHORT = {"max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096}
MILLION = {
    "max_position_embeddings": 1010000, "rope_theta": 10_000_000.0, "sliding_window": 1010000,
    "dual_chunk_attention_config": {
        "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144,
    },
}  # fmt: skip
release(QWEN2, SIZES, {
    "Qwen2.5-Math-1.5B": (1536, 8960, 12, 28, 2, 1543.7, TIED | SHORT),
    "Qwen2.5-Math-7B": (3584, 18944, 28, 28, 4, 7615.6, LARGE | SHORT),
    "Qwen2.5-Math-72B": (8192, 29568, 64, 80, 8, 72706.2, LARGE | SHORT),
    "Qwen2.5-7B-Instruct-1M": (3584, 18944, 28, 28, 4, 7615.6, LARGE | MILLION),
    "Qwen2.5-14B-Instruct-1M": (5120, 13824, 40, 48, 8, 14770.0, LARGE | MILLION),
    "QwQ-32B": (5120, 27648, 40, 64, 8, 32763.9, LARGE | {"max_window_layers": 64}),
    "QwQ-32B-yarn": (5120, 27648, 40, 64, 8, 32763.9, LARGE | YARN),
    "DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 12, 28, 2, 1777.1, SHORT | {"use_mrope": False}),
    "DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 28, 4, 7615.6, LARGE | SHORT),
    "DeepSeek-R1-Distill-Qwen-14B": (5120, 13824, 40, 48, 8, 14770.0, LARGE),
    "DeepSeek-R1-Distill-Qwen-32B": (5120, 27648, 40, 64, 8, 32763.9, LARGE),
})  # fmt: skip
QWEN3 = QWEN2 | {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
    "max_position_embeddings": 40960, "max_window_layers": 36, "rope_scaling": None, "sliding_window": None,
}  # fmt: skip
LATER = TIED | {"max_position_embeddings": 262144, "rope_theta": 5_000_000}
YARN3 = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
release(QWEN3, SIZES, {
    "Qwen3-0.6B": (1024, 3072, 16, 28, 8, 596.0, TIED | {"max_window_layers": 28}),
    "Qwen3-1.7B": (2048, 6144, 16, 28, 8, 1720.6, TIED),
    "Qwen3-4B": (2560, 9728, 32, 36, 8, 4022.5, TIED),
    "Qwen3-4B-Base": (2560, 9728, 32, 36, 8, 4022.5, TIED | {"max_position_embeddings": 32768}),
    "Qwen3-4B-Instruct-2507": (2560, 9728, 32, 36, 8, 4022.5, LATER),
    "Qwen3-4B-Thinking-2507": (2560, 9728, 32, 36, 8, 4022.5, LATER),
    "Qwen3-8B": (4096, 12288, 32, 36, 8, 8190.7),
    "Qwen3-8B-yarn": (4096, 12288, 32, 36, 8, 8190.7, YARN3 | {"max_position_embeddings": 131072}),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, 14768.3, {"max_window_layers": 40}),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, 32762.1, {"max_window_layers": 64}),
})  # fmt: skip

# ---------------------------------------------------------------- Gemma

GEMMA2 = {
    **DECODER, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
    "torch_dtype": "bfloat16", "vocab_size": 256000,
}  # fmt: skip
release(GEMMA2, SIZES, {
    "gemma-2-2b": (2304, 9216, 8, 26, 4, 2614.3),
    "gemma-2-9b": (3584, 14336, 16, 42, 8, 9241.7, {"sliding_window_size": 4096}),
    "gemma-2-27b": (4608, 36864, 32, 46, 16, 27227.1, {"head_dim": 128, "query_pre_attn_scalar": 144}),
    "shieldgemma-2b": (2304, 9216, 8, 26, 4, 2614.3, {"_attn_implementation_autoset": True}),
})  # fmt: skip
GEMMA3 = {
    **DECODER, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "torch_dtype": "bfloat16", "vocab_size": 262144,
}  # fmt: skip
BY_SIX = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(18)]
release(GEMMA3, SIZES, {
    "gemma-3-270m": (640, 2048, 4, 18, 1, 268.1, {
        "_sliding_window_pattern": 6, "layer_types": BY_SIX, "use_bidirectional_attention": False,
    }),
    "gemma-3-1b": (1152, 6912, 4, 26, 1, 999.9, {"sliding_window_pattern": 6}),
    "medgemma-27b-text": (5376, 21504, 32, 62, 16, 27009.0, {
        "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024, "sliding_window_pattern": 6,
        "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }),
})  # fmt: skip
# The language models inside the multimodal releases, whose configs leave out what is the class's default.
INSIDE = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
release(INSIDE, ("hidden_size", "intermediate_size", "num_hidden_layers"), {
    "gemma-3-4b text_config": (2560, 10240, 34, 3880.1),
    "gemma-3-12b text_config": (3840, 15360, 48, 11765.8, {"num_attention_heads": 16, "num_key_value_heads": 8}),
    "gemma-3-27b text_config": (5376, 21504, 62, 27009.0, {
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
    }),
})  # fmt: skip

# ---------------------------------------------------------------- GPT-2

GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
OLD = {"n_special": 0, "predict_special_tokens": True, "output_past": True}
release(GPT2, ("n_embd", "n_layer", "n_head"), {
    "gpt2": (768, 12, 12, 124.4),
    "gpt2-medium": (1024, 24, 16, 354.8, OLD),
    "gpt2-large": (1280, 36, 20, 774.0, OLD),
    "gpt2-xl": (1600, 48, 25, 1557.6, {"output_past": True}),
    "distilgpt2": (768, 6, 12, 81.9, {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
    "DialoGPT-small": (768, 12, 12, 124.4, {"task_specific_params": {"conversational": {"max_length": 1000}}}),
    "DialoGPT-medium": (1024, 24, 16, 354.8),
    "DialoGPT-large": (1280, 36, 20, 774.0),
    "Cerebras-GPT-111M": (768, 10, 12, 111.1, {
        "activation_function": "gelu", "n_inner": 3072, "n_positions": 2048, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    }),
})  # fmt: skip

# ---------------------------------------------------------------- Phi

PHI3 = {
    **DECODER, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu",
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip
OWN_CODE = auto_map("phi3", "Phi3ForCausalLM", "Phi3Config")


def long(count: int, kind: str = "longrope") -> Config:
    scaling = {"long_factor": factors(count, 64.0), "short_factor": factors(count, 3.0), "type": kind}
    return {"rope_scaling": scaling, "max_position_embeddings": 131072, "sliding_window": 262144}


FOUR = {
    "vocab_size": 100352, "bos_token_id": 100257, "eos_token_id": 100265, "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None,
}  # fmt: skip
FOUR_MINI = long(48) | {
    "vocab_size": 200064, "tie_word_embeddings": True, "partial_rotary_factor": 0.75, "interpolate_factor": 1,
    "full_attn_mod": 1, "lm_head_bias": False, "mlp_bias": False, "eos_token_id": 199999,
}  # fmt: skip
FINE_TUNED = {"auto_map": {
    "AutoConfig": "microsoft/Phi-3-mini-4k-instruct--configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "microsoft/Phi-3-mini-4k-instruct--modeling_phi3.Phi3ForCausalLM",
}}  # fmt: skip
release(PHI3 | OWN_CODE, SIZES, {
    "Phi-3-mini-4k": (3072, 8192, 32, 32, 32, 3821.1),
    "Phi-3-mini-4k fine-tuned": (3072, 8192, 32, 32, 32, 3821.1, FINE_TUNED),
    "Phi-3-mini-128k": (3072, 8192, 32, 32, 32, 3821.1, long(48)),
    "Phi-3-mini-128k as first released": (3072, 8192, 32, 32, 32, 3821.1, long(48, "su")),
    "Phi-3-medium-4k": (5120, 17920, 40, 40, 10, 13960.2),
    "Phi-3-medium-128k": (5120, 17920, 40, 40, 10, 13960.2, long(64)),
    "Phi-3.5-mini": (3072, 8192, 32, 32, 32, 3821.1, long(48)),
    "Phi-4-mini": (3072, 8192, 24, 32, 8, 3836.0, FOUR_MINI),
})  # fmt: skip
release(PHI3 | FOUR, SIZES, {
    "phi-4": (5120, 17920, 40, 40, 10, 14659.5),
    "Phi-4-reasoning": (5120, 17920, 40, 40, 10, 14659.5, {"rope_theta": 500000}),
})  # fmt: skip

# ---------------------------------------------------------------- OLMo 2, Pythia and its like, SmolLM3

OLMO2 = {
    **DECODER, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "max_position_embeddings": 4096,
    "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000,
    "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352,
}  # fmt: skip
release(OLMO2, SIZES, {
    "OLMo-2-0425-1B": (2048, 8192, 16, 16, 16, 1484.9),
    "OLMo-2-1124-7B": (4096, 11008, 32, 32, 32, 7298.7),
    "OLMo-2-1124-13B": (5120, 13824, 40, 40, 40, 13716.2),
    "OLMo-2-0325-32B": (5120, 27648, 40, 64, 8, 32234.3),
})  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "gelu", "initializer_range": 0.02, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
NEOX_SIZES = SIZES[:4]
DOLLY = {"vocab_size": 50280, "gradient_checkpointing": False, "custom_pipelines": {"text-generation": {
    "impl": "instruct_pipeline.InstructionTextGenerationPipeline", "pt": "AutoModelForCausalLM",
}}}  # fmt: skip
RED = {"vocab_size": 50432, "rotary_pct": 1.0, "use_parallel_residual": False, "hidden_dropout_prob": 0.0}
release(NEOX, NEOX_SIZES, {
    "pythia-14m": (128, 512, 4, 6, 14.07),
    "pythia-31m": (256, 1024, 8, 6, 30.5),
    "pythia-70m": (512, 2048, 8, 6, 70.4),
    "pythia-160m": (768, 3072, 12, 12, 162.3),
    "pythia-410m": (1024, 4096, 16, 24, 405.3),
    "pythia-1b": (2048, 8192, 8, 16, 1011.8),
    "pythia-1.4b": (2048, 8192, 16, 24, 1414.6),
    "pythia-2.8b": (2560, 10240, 32, 32, 2775.2),
    "pythia-6.9b": (4096, 16384, 32, 32, 6857.3, {"vocab_size": 50432}),
    "pythia-12b": (5120, 20480, 40, 36, 11846.1, {"vocab_size": 50688}),
    "gpt-neox-20b": (6144, 24576, 64, 44, 20554.6, {
        "vocab_size": 50432, "hidden_act": "gelu_fast", "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0,
    }),
    "dolly-v2-3b": (2560, 10240, 32, 32, 2775.1, DOLLY),
    "dolly-v2-12b": (5120, 20480, 40, 36, 11841.9, DOLLY),
    "RedPajama-INCITE-3B": (2560, 10240, 32, 32, 2775.9, RED),
    "RedPajama-INCITE-7B": (4096, 16384, 32, 32, 6857.3, RED),
    "stablelm-base-alpha-3b": (4096, 16384, 32, 16, 3637.6, {"vocab_size": 50688, "max_position_embeddings": 4096}),
})  # fmt: skip
SMOLLM3 = {
    **DECODER, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128012, "hidden_act": "silu",
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
    "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pad_token_id": 128004,
    "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5_000_000.0, "sliding_window": None,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
release(SMOLLM3, SIZES, {"SmolLM3-3B": (2048, 11008, 16, 36, 4, 3075.1)})

# ---------------------------------------------------------------- What is refused, and why

_WRAPPER = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {},
            "text_config": config_of("gemma-3-4b text_config"), "mm_tokens_per_image": 256}  # fmt: skip
refuse("gemma-3-4b", "reads more than text, and its language model is a part", _WRAPPER)
refuse("medgemma-4b", "reads more than text, and its language model is a part", _WRAPPER)
refuse(
    "Mistral-Small-3.1-24B",
    "reads more than text, and its language model is a part",
    {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": {}},
)
refuse("Phi-3-small-8k", "model_type = 'phi3small'", {"model_type": "phi3small"})
refuse("Phi-3.5-MoE", "model_type = 'phimoe'", {"model_type": "phimoe"})
refuse("Qwen3-30B-A3B", "model_type = 'qwen3_moe'", {"model_type": "qwen3_moe"})
refuse("gemma-2b", "model_type = 'gemma'", {"model_type": "gemma"})
refuse(
    "DeepSeek-R1-0528-Qwen3-8B",
    "attn_factor = 0.8782488562869419: transformers leaves it out and vLLM multiplies by it",
    config_of("Qwen3-8B")
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                        "attn_factor": 0.8782488562869419}},
)  # fmt: skip
refuse(
    "Yarn-Llama-2-7b-64k",
    "auto_map",
    config_of("Llama-2-7b")
    | {"rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True}}
    | auto_map("llama_together_yarn", "LlamaForCausalLM", "LlamaConfig"),
)
refuse(
    "stanford-crfm gpt2",
    "scale_attn_by_inverse_layer_idx",
    config_of("gpt2") | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
)
refuse(
    "Qwen2.5-7B-Instruct-AWQ",
    "quantization_config",
    config_of("Qwen2.5-7B") | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
)
refuse(
    "embeddinggemma-300m",
    "expected ['Gemma3ForCausalLM'], the causal language model",
    config_of("gemma-3-270m") | {"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True},
)
refuse(
    "Qwen2.5-Math-RM-72B",
    "expected ['Qwen2ForCausalLM'], the causal language model",
    config_of("Qwen2.5-Math-72B") | {"architectures": ["Qwen2ForRewardModel"]},
)
