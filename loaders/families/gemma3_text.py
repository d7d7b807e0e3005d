"""Gemma 3, text only (arXiv 2503.19786): as Gemma 2, with QK-norm instead of attention softcaps, five sliding layers to
one full, and a RoPE of its own for each of the two kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, Reader, rope_fields
from afina.loaders.families.gemma2 import gemma_fields, tensors

ARCHITECTURE = "Gemma3ForCausalLM"
KINDS = ("full_attention", "sliding_attention")
# The HF class's own sizes, which the text_config of the multimodal releases leaves out.
DEFAULTS = {"vocab_size": 262_208, "num_attention_heads": 8, "max_position_embeddings": 131_072}


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader({**DEFAULTS, **hf}, ARCHITECTURE)
    fields = gemma_fields(reader, rope=False)
    fields["qk_norm"] = "head"
    fields["logit_softcap"] = reader.optional_number("final_logit_softcapping", None)
    reader.fixed("attn_logit_softcapping", None)
    pattern = reader.size("sliding_window_pattern", 6)
    reader.seen.add("_sliding_window_pattern")  # written beside layer_types, which holds the result
    types = reader.layer_types(fields["num_layers"], lambda i: (i + 1) % pattern != 0)
    fields["layer_windows"] = reader.windows(types, reader.window(4096))
    fields["layer_ropes"] = tuple(KINDS.index(kind) for kind in types)

    settings = reader.get("rope_parameters", {})
    if not isinstance(settings, dict) or any(
        kind not in KINDS or not isinstance(settings[kind], dict) for kind in settings
    ):
        raise reader.error("rope_parameters", f"expected an object of settings for each of {', '.join(KINDS)}")
    scaling = reader.get("rope_scaling", {})
    if not isinstance(scaling, dict):
        raise reader.error("rope_scaling", "expected an object")
    full = {"rope_theta": reader.number("rope_theta", 1e6), **settings.get(KINDS[0], {}), **scaling}
    sliding = {"rope_theta": reader.number("rope_local_base_freq", 1e4), **settings.get(KINDS[1], {})}
    fields["ropes"] = tuple(
        rope_fields(reader, each, head_dim=fields["head_dim"], max_positions=fields["max_positions"])
        for each in (full, sliding)
    )
    reader.finish()
    return fields


FAMILY = Family("gemma3_text", ARCHITECTURE, config_fields, tensors)
