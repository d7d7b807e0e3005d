"""A random llama of a few thousand weights, with a tokenizer trained on a few lines, for tests of whole verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from afina.engine.lora import new_adapter, set_adapter
from afina.engine.model import GPT
from afina.engine.weights import new_model, save_model
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import train_bpe
from afina.loaders.weights.peft import AdapterConfig

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "how do I reset my password? open the settings page",
    "a card payment was declined; the café is closed — naïve façade, Grüße",
    "one two three four five six seven eight nine ten",
]
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 320,
    "dtype": "float32",
}


def tiny_tokenizer() -> Tokenizer:
    return train_bpe(LINES * 5, 320, SPECIAL)


def tiny_model(tokenizer: Tokenizer, **changes: Any) -> GPT:
    """A random model whose choices are far from ties, so that rounding does not decide them."""
    model = new_model(CONFIG | changes, vocab_size=tokenizer.vocab_size, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12.0)
    return model


def adapted(model: GPT, **options: Any) -> None:
    """Give the model an adapter that changes what it computes."""
    config = AdapterConfig(r=3, alpha=6, **options)
    adapter = new_adapter(model, config, targets=("q_proj", "v_proj", "down_proj"), seed=0)
    for lora in adapter.loras.values():
        torch.nn.init.normal_(lora.B, std=0.1)
    set_adapter(model, adapter)


def saved(folder: Path, **changes: Any) -> Path:
    """The model and tokenizer in ``folder``, in the HF layout."""
    tokenizer = tiny_tokenizer()
    save_model(tiny_model(tokenizer, **changes), tokenizer, folder)
    return folder
