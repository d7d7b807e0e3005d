"""The shapes of well-known models, for plans and benchmarks without a file of theirs: what their config.json says."""

from __future__ import annotations

from typing import Any


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
    }


KNOWN: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, True, 151_936),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, True, 151_936),
    "qwen2.5-3b": _qwen(2048, 11008, 36, 16, 2, True, 151_936),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4, False, 152_064),
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "vocab_size": 128_256,
    },
}
