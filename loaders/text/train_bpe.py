"""Training a new byte-level BPE, for models that start from random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from afina.errors import TokenizerError
from afina.loaders.text.own_templates import ROLE_TEMPLATE
from afina.loaders.text.tokenizer import Tokenizer

# Words with their leading space, digits one by one, punctuation, line breaks: as Qwen2 and Llama 3 split.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    eos_token: str = "<|endoftext|>",
    chat_template: str | None = None,
) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` tokens, the special ones (the first ids) among them.

    Without ``chat_template``, tokens <|user|>, <|assistant|> and <|end|> among the special ones give turns of the form
    <|user|>...<|end|>, else the default template serves. Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.
    """
    if eos_token not in special_tokens:
        raise TokenizerError(f"eos_token {eos_token!r} is not among the special tokens {', '.join(special_tokens)}")
    if vocab_size < 256 + len(special_tokens):
        raise TokenizerError(f"vocab_size {vocab_size}: at least 256 bytes and {len(special_tokens)} special tokens")
    backend = tokenizers.Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if chat_template is None and {"<|user|>", "<|assistant|>", "<|end|>"} <= set(special_tokens):
        chat_template = ROLE_TEMPLATE
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    if chat_template is not None:
        config["chat_template"] = chat_template
    files = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return Tokenizer(files, "the trained tokenizer")
