"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP instead of before, and on the whole query and key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from afina.loaders.families.common import Family, Fields, HFTensor, Reader, llama_fields, llama_tensors

ARCHITECTURE = "Olmo2ForCausalLM"
NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    fields = llama_fields(reader, norm_eps=1e-5)
    fields["qkv_bias"] = fields["o_bias"] = reader.flag("attention_bias", False)
    fields |= {"pre_norm": False, "post_norm": True, "qk_norm": "full"}
    reader.fixed("mlp_bias", False)
    reader.finish()
    return fields


def tensors(fields: Fields) -> Iterator[HFTensor]:
    return llama_tensors(fields, norms=NORMS)


FAMILY = Family("olmo2", ARCHITECTURE, config_fields, tensors)
