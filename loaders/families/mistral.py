"""Mistral 7B and its like: the Llama layout with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, Reader, llama_fields, llama_tensors

ARCHITECTURE = "MistralForCausalLM"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = llama_fields(reader, kv_heads=8)
    fields["layer_windows"] = (reader.window(4096),) * fields["num_layers"]
    reader.fixed("attention_bias", False)
    reader.fixed("mlp_bias", False)
    reader.finish()
    return fields


FAMILY = Family("mistral", ARCHITECTURE, config_fields, llama_tensors)
