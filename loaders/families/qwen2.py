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
    fields["max_positions"] = within_one_chunk(reader, fields["max_positions"])
    reader.finish()
    return fields


def within_one_chunk(reader: Reader, positions: int) -> int:
    """How many positions dual chunk attention (the 1M releases; arXiv 2402.17463) leaves as plain attention computes
    them: those of the first chunk. Further ones would be renumbered, which is not supported."""
    settings = reader.get("dual_chunk_attention_config", None)
    if settings is None:
        return positions
    chunk, local = (settings.get(key) for key in ("chunk_size", "local_size")) if isinstance(settings, dict) else (0, 0)
    if not isinstance(chunk, int) or not isinstance(local, int) or not 0 < local < chunk:
        raise reader.error("dual_chunk_attention_config", "expected chunk_size and a smaller local_size")
    return min(positions, chunk - local)


def last_layers_slide(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """The windows of Qwen 2 and 3: with ``use_sliding_window``, of all layers from ``max_window_layers`` on."""
    window, first = reader.window(4096), reader.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise reader.error("max_window_layers", "expected a whole number")
    if not reader.flag("use_sliding_window", False):
        window = None
    return reader.windows(reader.layer_types(layers, lambda i: window is not None and i >= first), window)


FAMILY = Family("qwen2", ARCHITECTURE, config_fields, llama_tensors)
