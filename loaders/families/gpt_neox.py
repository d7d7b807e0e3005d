"""GPT-NeoX and Pythia: LayerNorm, partly rotated heads, attention and MLP side by side on the residual."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from afina.loaders.families.common import (
    MAX_LAYERS,
    PLAIN,
    Family,
    Fields,
    HFTensor,
    Reader,
    rope_fields,
    rope_settings,
)

ARCHITECTURE = "GPTNeoXForCausalLM"


def config_fields(hf: Mapping[str, Any]) -> Fields:
    reader = Reader(hf, ARCHITECTURE)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    layers, positions = reader.size("num_hidden_layers", limit=MAX_LAYERS), reader.size("max_position_embeddings")
    head_dim = reader.head_dim(hidden, heads)
    theta, fraction = reader.number("rotary_emb_base", 10_000), reader.number("rotary_pct", 0.25)
    # Newer files repeat the two under these names, which nothing reads.
    reader.fixed("rope_theta", theta)
    reader.fixed("partial_rotary_factor", fraction)
    settings = {"rope_theta": theta, "partial_rotary_factor": fraction, **rope_settings(reader)}
    bias = reader.flag("attention_bias", True)
    fields: Fields = {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": reader.size("intermediate_size"),
        "max_positions": positions,
        "layer_windows": (None,) * layers,
        "layer_ropes": (0,) * layers,
        "ropes": (rope_fields(reader, settings, head_dim=head_dim, max_positions=positions, partial=True),),
        "norm": "layer",
        "norm_eps": reader.number("layer_norm_eps", 1e-5),
        "parallel_residual": reader.flag("use_parallel_residual", True),
        "activation": reader.choice("hidden_act", "gelu", PLAIN),
        "gated": False,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
        "tie_embeddings": reader.flag("tie_word_embeddings", False),
    }
    reader.fixed("head_dim", hidden // heads)
    reader.finish()
    return fields


def tensors(fields: Fields) -> Iterator[HFTensor]:
    hidden, inner, vocab = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    attention_kinds = ("weight", "bias") if fields["qkv_bias"] else ("weight",)
    yield HFTensor("gpt_neox.embed_in.weight", "embed.weight", 0, vocab)
    for i in range(fields["num_layers"]):
        theirs, ours = f"gpt_neox.layers.{i}.", f"layers.{i}."
        for kind in attention_kinds:
            name = f"{theirs}attention.query_key_value.{kind}"
            yield HFTensor(name, f"{ours}attn.qkv.{kind}", 0, 3 * hidden, heads=fields["num_heads"])
            yield HFTensor(f"{theirs}attention.dense.{kind}", f"{ours}attn.o.{kind}", 0, hidden)
        for kind in ("weight", "bias"):
            yield HFTensor(f"{theirs}mlp.dense_h_to_4h.{kind}", f"{ours}mlp.up.{kind}", 0, inner)
            yield HFTensor(f"{theirs}mlp.dense_4h_to_h.{kind}", f"{ours}mlp.down.{kind}", 0, hidden)
            yield HFTensor(f"{theirs}input_layernorm.{kind}", f"{ours}attn_norm.{kind}", 0, hidden)
            yield HFTensor(f"{theirs}post_attention_layernorm.{kind}", f"{ours}mlp_norm.{kind}", 0, hidden)
    for kind in ("weight", "bias"):
        yield HFTensor(f"gpt_neox.final_layer_norm.{kind}", f"norm.{kind}", 0, hidden)
    if not fields["tie_embeddings"]:
        yield HFTensor("embed_out.weight", "head.weight", 0, vocab)


FAMILY = Family(
    "gpt_neox",
    ARCHITECTURE,
    config_fields,
    tensors,
    prefix="gpt_neox.",
    head="embed_out.weight",
    ignorable=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
