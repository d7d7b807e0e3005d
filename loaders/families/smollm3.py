"""SmolLM3: the Llama layout where every fourth layer has no rotary positions (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, Reader, llama_fields, llama_tensors

ARCHITECTURE = "SmolLM3ForCausalLM"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = llama_fields(reader, kv_heads=4, tie=True, theta=2_000_000.0)
    layers = fields["num_layers"]
    interval = reader.size("no_rope_layer_interval", 4)
    turned = reader.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if not isinstance(turned, list) or len(turned) < layers or any(flag not in (0, 1) for flag in turned):
        raise reader.error(
            "no_rope_layers", f"expected {layers} entries (num_hidden_layers), 1 for RoPE and 0 for none"
        )
    fields["layer_ropes"] = tuple(0 if flag else None for flag in turned[:layers])
    window = reader.window(None)
    if not reader.flag("use_sliding_window", False):
        window = None
    types = reader.layer_types(layers, lambda i: window is not None and not turned[i])
    fields["layer_windows"] = reader.windows(types, window)
    fields["qkv_bias"] = fields["o_bias"] = reader.flag("attention_bias", False)
    fields["mlp_bias"] = reader.flag("mlp_bias", False)
    reader.seen.add("max_window_layers")  # a left-over: nothing reads it
    reader.finish()
    return fields


FAMILY = Family("smollm3", ARCHITECTURE, config_fields, llama_tensors)
