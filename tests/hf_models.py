"""Tiny randomly initialised transformers models, one or more for each family, saved to disk: what ours must equal."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, **THETA,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, **THETA}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.3], "long_factor": [1.5, 6.0], **THETA,
    "partial_rotary_factor": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """``config``: the prefix of the HF class names, as in LlamaConfig."""

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    head: str = "ForCausalLM"

    def __str__(self) -> str:
        return self.name


GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 40}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
NEOX = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"hidden_size": 64}
CASES = [
    Case("gpt2", "GPT2", GPT2, "LMHeadModel"),
    Case("gpt2-untied", "GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": None}, "LMHeadModel"),
    Case("gpt_neox", "GPTNeoX", NEOX),
    Case(
        "gpt_neox-serial", "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True,
                "hidden_act": "gelu_new", "rope_parameters": THETA | {"partial_rotary_factor": 0.5}},
    ),
    Case("llama", "Llama", SIZES),
    Case("llama-llama3", "Llama", SIZES | {
        "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 12,
        "tie_word_embeddings": True,
    }),
    Case("llama-linear", "Llama", SIZES | {
        "rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}, "num_key_value_heads": 4,
    }),
    Case("mistral", "Mistral", SIZES | {"sliding_window": 8, "num_key_value_heads": 1}),
    Case("qwen2", "Qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    Case("qwen2-yarn", "Qwen2", SIZES | {"rope_parameters": YARN, "tie_word_embeddings": True}),
    Case("qwen3", "Qwen3", SIZES | {
        "head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
        "rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.5},
    }),
    Case("gemma2", "Gemma2", SIZES | {
        "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }),
    Case("gemma3_text", "Gemma3", SIZES | {
        "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }),
    Case("olmo2", "Olmo2", SIZES | {"attention_bias": True}),
    Case("phi3", "Phi3", SIZES | {"sliding_window": 8}),
    Case("phi3-longrope", "Phi3", SIZES | {"original_max_position_embeddings": 32, "rope_parameters": LONG}),
    Case("smollm3", "SmolLM3", SIZES | {
        "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 8, "attention_bias": True,
        "mlp_bias": True,
    }),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Saved:
    model: Any  # in eval mode, with gradients
    folder: Path


@functools.cache
def saved(case_name: str) -> Saved:
    """The transformers model of a case, randomised (norms and biases too, which start at 1 and 0), and its folder."""
    case = BY_NAME[case_name]
    name = {"Gemma3": "Gemma3Text"}.get(case.config, case.config)
    config = getattr(transformers, f"{name}Config")(**case.options)
    torch.manual_seed(0)
    model = getattr(transformers, case.config + case.head)._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 2:
                # Large enough that attention is far from uniform and the softcaps bend; embeddings small where they
                # are tied or scaled up, or each token would predict itself.
                fan_in = p.shape[0] if "c_" in key else p.shape[1]
                embedding = 0.2 if config.tie_word_embeddings else 1.0
                p.copy_(noise * (embedding if "emb" in key or ".wte" in key else 1.5 * fan_in**-0.5))
            elif key.endswith("bias"):
                p.copy_(0.3 * noise)
            else:
                p.copy_(0.3 * noise + (0.0 if "gemma" in config.model_type else 1.0))
    folder = Path(tempfile.mkdtemp(prefix=f"afina-test-{case_name}-"))
    model.save_pretrained(folder)
    return Saved(model, folder)


def parametrize(*names: str) -> Any:
    """A test for each named case, or for all."""
    return pytest.mark.parametrize("name", names or tuple(BY_NAME))
