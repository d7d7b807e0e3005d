"""Qwen 3 (dense): the Llama layout with RMSNorm on each head's query and key; windows as in Qwen 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, Reader, llama_fields, llama_tensors
from afina.loaders.families.qwen2 import last_layers_slide

ARCHITECTURE = "Qwen3ForCausalLM"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = llama_fields(reader, kv_heads=32, head_dim=128)
    fields["layer_windows"] = last_layers_slide(reader, fields["num_layers"])
    fields["qkv_bias"] = fields["o_bias"] = reader.flag("attention_bias", False)
    fields["qk_norm"] = "head"
    reader.fixed("mlp_bias", False)
    reader.finish()
    return fields


FAMILY = Family("qwen3", ARCHITECTURE, config_fields, llama_tensors)
