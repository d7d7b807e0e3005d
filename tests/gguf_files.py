"""Small GGUF files and the tokenizers in them, for the tests of both halves of the format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from afina.engine.model import GPT
from afina.engine.weights import hf_tensors, new_model
from afina.loaders.text.gguf_splitting import SPACE
from afina.loaders.text.tokenizer import SPLIT, Tokenizer, train_bpe
from afina.loaders.weights.gguf import write_gguf

gguf = pytest.importorskip("gguf")

TEXTS = [
    "Hello world", "", " ", "  two  spaces\n\n\n\tTabs\r\n", "I'm HE'LL they're 'S x's", "    \n   x", "trailing ",
    "12345 1,234.56 ½ ٣٤ Ⅷ 7", "def f(x):\n    return x**2  # ok\n\n", "日本語のテキスト、中文字符 한국어",
    "naïve café Ünïcödé ẞ ǅ", "😀👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪", "a" * 100, "مرحبا بالعالم שלום עולם नमस्ते ไทย",
    "https://x.y/z?a=b&c=d#e", "x\u00a0y\u3000z\u200bq", "\x00\x01\x7f", "!!!???...---===", "tel. +1 (555) 123-4567",
    "<|endoftext|>a<|user|>b <|end|>\n<s>x</s><unk>", "<0x0A> <0xFF>",
]  # fmt: skip
SENTENCES = ["the then ttttt anding</s>the<s> another  one<tool>the <tool> a", "a      b", "in the 中 end."]
BASE = {
    "vocab_size": 328, "hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def write(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str = "float32") -> Path:
    write_gguf(path, model.hf_config, lambda: hf_tensors(model), tokenizer, dtype=dtype)
    return path


def read_config(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def byte_level_bpe() -> Tokenizer:
    special = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    return train_bpe(["the cat sat on the mat, in 2024 it didn't 123456"] * 9, 300, special_tokens=special)


def sentencepiece(*, prefix: bool, **changes: Any) -> Tokenizer:
    """A tokenizer.json like those of Llama 2 (``prefix``) and Gemma, with every way to part a piece as a merge."""
    pieces = [
        SPACE,
        *"abcdeghinorst.",
        "th",
        "he",
        "in",
        "an",
        f"{SPACE}t",
        "the",
        f"{SPACE}the",
        f"{SPACE}a",
        "tt",
        "ttt",
    ]
    pieces += [f"{SPACE}an", SPACE * 2, SPACE * 4, "ing", "ed"]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces])
    }
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = {"type": "Prepend", "prepend": SPACE}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            *({"id": i, "content": c, "special": True, **flags} for i, c in enumerate(("<unk>", "<s>", "</s>"))),
            {"id": len(vocab), "content": "<tool>", "special": False, **flags},
            {"id": vocab[SPACE * 4], "content": SPACE * 4, "special": False, **flags},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [first, space]} if prefix else space,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                     {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip
    data |= {key: value for key, value in changes.items() if key != "model"}
    data["model"] |= changes.get("model", {})
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(
        {"tokenizer.json": json.dumps(data).encode(), "tokenizer_config.json": json.dumps(config).encode()}, "here"
    )


def bytelevel(bpe: Tokenizer, **changes: Any) -> Tokenizer:
    """``bpe`` with other parts in its tokenizer.json."""
    data = json.loads(bpe.files()["tokenizer.json"])
    data |= {key: value for key, value in changes.items() if key != "model"}
    data["model"] |= changes.get("model", {})
    return Tokenizer({**bpe.files(), "tokenizer.json": json.dumps(data).encode()}, "here")


def splitter(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


PATTERNS = {  # as tokenizer.json files write them
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smaug-bpe": SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"),
    "qwen2": SPLIT,
}


def vocabulary(path: Path, tokenizer: Tokenizer) -> Path:
    """A file whose vocabulary is ``tokenizer``'s, and whose model is as small as can be."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    rows = tokenizer.vocab_size + 3
    config = (
        BASE
        | {"model_type": "llama"}
        | tiny
        | {"num_key_value_heads": 1, "vocab_size": rows, "tie_word_embeddings": True}
    )
    return write(path, new_model(config, dtype="float32", device="cpu"), tokenizer)


def fields_of(path: Path) -> dict[str, Any]:
    """The key-values of a GGUF file as plain values: what `gguf.GGUFReader` gives, in a hundredth of its time."""
    numbers = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
    data, at = path.read_bytes(), 16

    def number(form: str) -> Any:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(f"<{form}", data, at - struct.calcsize(form))[0]

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            size = number("Q")
            at += size
            return data[at - size : at].decode()
        if kind == 9:
            kind, count = number("I"), number("Q")
            if kind in (8, 9):
                return [value(kind) for _ in range(count)]
            at += count * struct.calcsize(numbers[kind])
            return np.frombuffer(data, f"<{numbers[kind]}", count, at - count * struct.calcsize(numbers[kind]))
        return number(numbers[kind])

    return {value(8): value(number("I")) for _ in range(number("Q"))}


class FieldsOnly:
    """Stands for gguf.GGUFWriter: keeps the fields."""

    KEYS: ClassVar = {
        "add_chat_template": "tokenizer.chat_template", "add_tokenizer_model": "model", "add_tokenizer_pre": "pre",
        "add_token_merges": "merges", "add_token_scores": "scores", "add_token_list": "tokens",
        "add_token_types": "token_type", "add_unk_token_id": "unknown_token_id",
        "add_pad_token_id": "padding_token_id",
    }  # fmt: skip

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def add_bool(self, key: str, value: bool) -> None:
        self.fields[key] = value

    def __getattr__(self, name: str) -> Any:
        key = self.KEYS.get(name, name.removeprefix("add_"))
        return lambda value: self.fields.update({key if "." in key else f"tokenizer.ggml.{key}": value})
