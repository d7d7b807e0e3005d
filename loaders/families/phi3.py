"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: the Llama layout with fused matrices, LongRoPE and partly rotated heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, HFTensor, Reader, llama_fields, llama_tensors

ARCHITECTURE = "Phi3ForCausalLM"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = llama_fields(
        reader,
        norm_eps=1e-5,
        partial_rotary=True,
        # Early releases called LongRoPE "su", and later "yarn", with the same two lists of factors.
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        rope_kinds=("default", "longrope"),
        original_max=4096,
    )
    fields["layer_windows"] = (reader.window(None),) * fields["num_layers"]
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.fixed(key, False)
    for key in ("interpolate_factor", "full_attn_mod"):
        reader.fixed(key, 1)
    reader.finish()
    return fields


def tensors(fields: Fields) -> Iterator[HFTensor]:
    return llama_tensors(fields, fused=True)


FAMILY = Family("phi3", ARCHITECTURE, config_fields, tensors)
