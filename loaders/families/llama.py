"""Llama 2 and 3.x, TinyLlama, SmolLM2: RMSNorm, RoPE (all kinds), GQA, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, Reader, llama_fields, llama_tensors

ARCHITECTURE = "LlamaForCausalLM"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = llama_fields(reader)
    fields["qkv_bias"] = fields["o_bias"] = reader.flag("attention_bias", False)
    fields["mlp_bias"] = reader.flag("mlp_bias", False)
    reader.finish()
    return fields


FAMILY = Family("llama", ARCHITECTURE, config_fields, llama_tensors)
