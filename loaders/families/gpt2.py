"""GPT-2: LayerNorm, learned positions, plain GELU MLP, matrices stored transposed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from afina.loaders.families.common import MAX_LAYERS, PLAIN, Family, Fields, HFTensor, Reader

ARCHITECTURE = "GPT2LMHeadModel"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    hidden, heads = reader.size("n_embd"), reader.size("n_head")
    layers, positions = reader.size("n_layer", limit=MAX_LAYERS), reader.size("n_positions")
    if hidden % heads:
        raise reader.error("n_embd", f"not divisible by n_head = {heads}")
    fields: Fields = {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": reader.size("n_inner", 4 * hidden),
        "max_positions": positions,
        "layer_windows": (None,) * layers,
        "layer_ropes": (None,) * layers,
        "learned_positions": True,
        "norm": "layer",
        "norm_eps": reader.number("layer_norm_epsilon", 1e-5),
        "activation": reader.choice("activation_function", "gelu_new", PLAIN),
        "gated": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "attention_scale": None if reader.flag("scale_attn_weights", True) else 1.0,
        "tie_embeddings": reader.flag("tie_word_embeddings", True),
    }
    reader.fixed("scale_attn_by_inverse_layer_idx", False)
    # Reordering and upcasting is how the attention is computed, not what: scores are fp32 here anyway.
    reader.seen |= {"reorder_and_upcast_attn", "n_ctx", "n_special", "predict_special_tokens"}
    reader.finish()
    return fields


def tensors(fields: Fields) -> Iterator[HFTensor]:
    hidden, inner, vocab = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    yield HFTensor("transformer.wte.weight", "embed.weight", 0, vocab)
    yield HFTensor("transformer.wpe.weight", "pos_embed.weight", 0, fields["max_positions"])
    for i in range(fields["num_layers"]):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            yield HFTensor(f"{theirs}attn.c_attn.{kind}", f"{ours}attn.qkv.{kind}", 0, 3 * hidden, matrix)
            yield HFTensor(f"{theirs}attn.c_proj.{kind}", f"{ours}attn.o.{kind}", 0, hidden, matrix)
            yield HFTensor(f"{theirs}mlp.c_fc.{kind}", f"{ours}mlp.up.{kind}", 0, inner, matrix)
            yield HFTensor(f"{theirs}mlp.c_proj.{kind}", f"{ours}mlp.down.{kind}", 0, hidden, matrix)
            yield HFTensor(f"{theirs}ln_1.{kind}", f"{ours}attn_norm.{kind}", 0, hidden)
            yield HFTensor(f"{theirs}ln_2.{kind}", f"{ours}mlp_norm.{kind}", 0, hidden)
    for kind in ("weight", "bias"):
        yield HFTensor(f"transformer.ln_f.{kind}", f"norm.{kind}", 0, hidden)
    if not fields["tie_embeddings"]:
        yield HFTensor("lm_head.weight", "head.weight", 0, vocab)


FAMILY = Family(
    "gpt2",
    ARCHITECTURE,
    config_fields,
    tensors,
    prefix="transformer.",
    ignorable=(r"(^|\.)attn\.(bias|masked_bias)$",),
)
