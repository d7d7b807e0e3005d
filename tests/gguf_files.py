"""Small GGUF files and the tokenizers in them, for the tests of both halves of the format."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

from afina.engine.model import GPT
from afina.engine.weights import hf_tensors, new_model
from afina.loaders.text.gguf_splitting import SPACE
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import SPLIT, train_bpe
from afina.loaders.weights.gguf import write_gguf
from afina.loaders.weights.gguf_file import GGUFFile

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

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"model_type": "gpt2", "vocab_size": 328, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GEMMA = BASE | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
CASES: dict[str, dict[str, Any]] = {
    "llama": BASE | {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama-3": BASE | {
        "model_type": "llama", "rope_scaling": ROPE | {"original_max_position_embeddings": 32}, "head_dim": 24,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "llama-linear": BASE | {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    "qwen2": BASE | {"model_type": "qwen2", "intermediate_size": 96},
    "qwen2-yarn": BASE | {
        "model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    },
    "qwen3": BASE | {
        "model_type": "qwen3", "head_dim": 32,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5,
        },
    },
    "gemma2": GEMMA | {
        "model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": GEMMA | {
        "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
    "gemma3-6": GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 6, "tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 96},
}  # fmt: skip


def random_model(config: dict[str, Any]) -> GPT:
    """Norms and biases random too, and matrices so large that attention is far from uniform and softcaps bend."""
    model = new_model(config, dtype="float32", device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    tied = model.config.tie_embeddings
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 2:
                p.copy_(noise * ((0.2 if tied else 1.0) if "embed" in name else 1.5 * p.shape[1] ** -0.5))
            else:
                p.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") and not model.config.norm_offset else 0.0))
    return model


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
    """The key-values of a GGUF file."""
    return GGUFFile(path).fields


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


# --- Files byte by byte -----------------------------------------------------------------------------------------------

UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, FLOAT64 = 0, 4, 5, 6, 7, 8, 9, 10, 12
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class Field(NamedTuple):
    """A key-value; of an array ``value`` is the type of its elements and a list of them."""

    key: str
    type: int
    value: Any


class Raw(NamedTuple):
    """A tensor: ``shape`` in torch's order, ``type`` by its number in ggml; ``offset`` where it is not the next one."""

    name: str
    shape: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None


class Built(NamedTuple):
    """A file, and where its numbers stand: (what it is, position, bytes)."""

    data: bytes
    numbers: list[tuple[str, int, int]]


def build(
    fields: Iterable[Field], tensors: Iterable[Raw], *, version: int = 3, alignment: int = 32, magic: bytes = b"GGUF"
) -> Built:
    """A GGUF file written by hand, so that it can be wrong in any place."""
    out = bytearray(magic)
    numbers: list[tuple[str, int, int]] = []

    def number(what: str, value: float, form: str) -> None:
        numbers.append((what, len(out), struct.calcsize(form)))
        out.extend(struct.pack("<" + form, value))

    def text(value: str | bytes) -> None:
        raw = value if isinstance(value, bytes) else value.encode()
        number("length", len(raw), "Q")
        out.extend(raw)

    def scalar(kind: int, value: Any) -> None:
        if kind == STRING:
            text(value)
        else:
            number("value", value, _FORMS.get(kind, "I"))

    fields, tensors = list(fields), list(tensors)
    number("version", version, "I")
    number("count", len(tensors), "Q")
    number("count", len(fields), "Q")
    for key, kind, value in fields:
        text(key)
        number("type", kind, "I")
        if kind == ARRAY:
            number("type", value[0], "I")
            number("count", len(value[1]), "Q")
            for one in value[1]:
                scalar(value[0], one)
        else:
            scalar(kind, value)
    end = 0
    for name, shape, kind, data, offset in tensors:
        text(name)
        number("dims", len(shape), "I")
        for size in reversed(shape):
            number("dim", size, "Q")
        number("type", kind, "I")
        number("offset", end if offset is None else offset, "Q")
        end += -(-len(data) // alignment) * alignment
    for tensor in tensors:
        out.extend(b"\0" * (-len(out) % alignment) + tensor.data)
    return Built(bytes(out), numbers)


def parts(path: Path) -> tuple[list[Field], list[Raw]]:
    """What a sound file is made of, by the `gguf` package."""
    reader = gguf.GGUFReader(path)
    fields = []
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            fields.append(
                Field(key, int(field.types[0]), (int(field.types[-1]), value) if field.types[0] == 9 else value)
            )
    tensors = [
        Raw(t.name, tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data.tobytes()) for t in reader.tensors
    ]
    return fields, tensors


def edit(
    path: Path,
    fields: Mapping[str, tuple[int, Any] | None] | None = None,
    tensors: Callable[[dict[str, Raw]], object] | None = None,
) -> Path:
    """Write a sound file anew with other key-values (None: without it) and, by what ``tensors`` does, other tensors."""
    before, raw = parts(path)
    changed = {field.key: field for field in before}
    for key, value in (fields or {}).items():
        changed.pop(key, None)
        if value is not None:
            changed[key] = Field(key, *value)
    by_name = {tensor.name: tensor for tensor in raw}
    if tensors is not None:
        tensors(by_name)
    path.write_bytes(build(changed.values(), by_name.values()).data)
    return path
