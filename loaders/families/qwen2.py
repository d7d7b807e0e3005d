"""Qwen 2 and 2.5: the Llama layout with biases on q, k and v; the last layers may have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, Reader, llama_fields, llama_tensors

ARCHITECTURE = "Qwen2ForCausalLM"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = llama_fields(reader, kv_heads=32)
    fields["layer_windows"] = last_layers_slide(reader, fields["num_layers"])
    fields["qkv_bias"] = True
    reader.fixed("attention_bias", True)
    reader.fixed("mlp_bias", False)
    reader.fixed("use_mrope", False)
    reader.finish()
    return fields


def last_layers_slide(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """The windows of Qwen 2 and 3: with ``use_sliding_window``, of all layers from ``max_window_layers`` on."""
    window, first = reader.window(4096), reader.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise reader.error("max_window_layers", "expected a whole number")
    if not reader.flag("use_sliding_window", False):
        window = None
    return reader.windows(reader.layer_types(layers, lambda i: window is not None and i >= first), window)


FAMILY = Family("qwen2", ARCHITECTURE, config_fields, llama_tensors)
