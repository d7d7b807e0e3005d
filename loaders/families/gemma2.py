"""Gemma 2 (arXiv 2408.00118): sandwich norms, GeGLU, softcaps, every second layer with a sliding window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from afina.loaders.families.common import GATED_GELU, Family, Fields, HFTensor, Reader, llama_fields, llama_tensors

ARCHITECTURE = "Gemma2ForCausalLM"
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = gemma_fields(reader)
    fields["attention_softcap"] = reader.optional_number("attn_logit_softcapping", 50.0)
    fields["logit_softcap"] = reader.optional_number("final_logit_softcapping", 30.0)
    window = reader.window(4096)
    fields["layer_windows"] = reader.windows(reader.layer_types(fields["num_layers"], lambda i: i % 2 == 0), window)
    reader.fixed("sliding_window_size", window)
    reader.finish()
    return fields


def gemma_fields(reader: Reader, *, rope: bool = True) -> Fields:
    """What Gemma 2 and 3 have in common."""
    fields = llama_fields(
        reader,
        kv_heads=4,
        head_dim=256,
        tie=True,
        activation=("hidden_activation", "gelu_pytorch_tanh", GATED_GELU),
        rope=rope,
    )
    fields["qkv_bias"] = fields["o_bias"] = reader.flag("attention_bias", False)
    fields |= {
        "norm_offset": 1.0,
        "post_norm": True,
        "embed_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": reader.number("query_pre_attn_scalar", 256) ** -0.5,
    }
    reader.fixed("hidden_act", "gelu_pytorch_tanh")
    reader.fixed("mlp_bias", False)
    reader.fixed("use_bidirectional_attention", False)
    return fields


def tensors(fields: Fields) -> Iterator[HFTensor]:
    return llama_tensors(fields, norms=NORMS)


FAMILY = Family("gemma2", ARCHITECTURE, config_fields, tensors)
