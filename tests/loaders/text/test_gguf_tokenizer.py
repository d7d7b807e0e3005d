"""Tokenizers made of the vocabularies in GGUF files: the ids that published models expect, and damaged vocabularies."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from awkward_texts import TEXTS
from gguf_files import fields_of
from real_files import smollm2, vocabularies
from tokenizers import pre_tokenizers

from afina.errors import AfinaError, DataError, TokenizerError
from afina.loaders.text.gguf_splitting import ALIASES, SPLITTINGS
from afina.loaders.text.gguf_tokenizer import tokenizer_from_gguf
from afina.loaders.text.gguf_vocab import Vocabulary
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer

EXPECTED = [
    *("bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe"),
    *("llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
]
UNEXPECTED = ["aquila", "baichuan", "gpt-neox", "nomic-bert-moe"]  # published without ids
LARGE = ["command-r", "deepseek-llm", "gemma-4", "llama-bpe", "qwen2", "qwen35"]  # which take long


def expected(path: Path) -> list[tuple[str, list[int]]]:
    """Texts and their ids as llama.cpp's own tests have them: without BOS, control tokens not read as such."""
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines)]


def same_as_llama_cpp(tokenizer: Tokenizer, theirs: Vocabulary) -> None:
    """Equal ids but where a token is named as a special one that the file has among the words (Aquila's), and where
    the tokenizer composes a text."""
    named = [t for i in tokenizer.special_ids if (t := str(tokenizer.token(i))) not in theirs._marked]
    composes = "NFC" in str(tokenizer._backend.normalizer)
    for text in TEXTS:
        if any(token in text for token in named):
            continue
        text = unicodedata.normalize("NFC", text) if composes else text
        with contextlib.suppress(DataError):  # a character without tokens
            assert tokenizer.encode(text, add_special=False) == theirs.encode(text, add_special=False), text


def same_as_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Equal ids and texts once saved, by transformers, and by Afina again."""
    tokenizer.save(folder)
    theirs, again = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert again.eos_ids == tokenizer.eos_ids
    for text in TEXTS[::2]:
        with contextlib.suppress(DataError):
            ids = tokenizer.encode(text)
            assert ids == theirs.encode(text) == again.encode(text), text
            assert tokenizer.decode(ids) == theirs.decode(ids), text
            assert tokenizer.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("name", [*EXPECTED, *UNEXPECTED])
def test_vocabularies_of_llama_cpp(name: str, tmp_path: Path) -> None:
    assert len(vocabularies()) == len(EXPECTED) + len(UNEXPECTED)
    path = vocabularies()[name]
    fields = fields_of(path)
    tokenizer = tokenizer_from_gguf(fields, str(path))
    if name in EXPECTED:
        pairs = expected(path)
        assert len(pairs) >= 46
        for text, ids in pairs:
            assert tokenizer.encode(text, add_special=False) == ids, text
    assert tokenizer.vocab_size <= len(fields["tokenizer.ggml.tokens"])
    for number in range(0, tokenizer.vocab_size, 997):
        if fields["tokenizer.ggml.model"] != "bert":
            assert tokenizer.token(number) == fields["tokenizer.ggml.tokens"][number]
    if name != "bert-bge":  # which has neither capitals nor spaces
        text = "Hello, café! 12345 日本語 мир"
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    if fields["tokenizer.ggml.model"] in ("gpt2", "llama", "gemma4"):
        text = "  two\n\n\n\tdef f(x):\n    return x  🙂 "
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    if name not in LARGE:
        if fields["tokenizer.ggml.model"] in ("gpt2", "llama"):
            same_as_llama_cpp(tokenizer, Vocabulary(fields))
        same_as_transformers(tokenizer, tmp_path)


def test_a_model_with_weights() -> None:
    """SmolLM2: a chat template, a turn that ends otherwise than a text, and bytes without tokens."""
    tokenizer = tokenizer_from_gguf(fields_of(smollm2()), "smollm2.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.adds_bos) == ("<|im_start|>", "<|im_end|>", False)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    message = r"smollm2.gguf: no token for '\\x04' \(U\+0004\): in 'ab\\x04cd' it would be left out: remove it from"
    with pytest.raises(DataError, match=message):
        tokenizer.encode("ab\x04cd")
    assert tokenizer.decode(tokenizer.encode("ab\x03cd")) == "ab\x03cd"


# Small vocabularies

PLAIN: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "c", "ab", "Ġ", "<tool>", "", "[PAD8]", "[PAD9]"],
    "tokenizer.ggml.token_type": np.array([3, 1, 1, 1, 1, 1, 4, 5, 5, 4], np.int32),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
}
PIECES: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁a"],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1],
    "tokenizer.ggml.scores": np.array([0.0] * 259 + [-5, -4, -3, -2, -1], np.float32),
}
WORDS: dict[str, Any] = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[unused0]", "▁the", "▁a", "s", "▁.", "▁'"],
    "tokenizer.ggml.token_type": [3, 3, 3, 3, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.unknown_token_id": 1,
    "tokenizer.ggml.cls_token_id": 2,
    "tokenizer.ggml.seperator_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
}
UNIGRAM: dict[str, Any] = {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab"],
    "tokenizer.ggml.token_type": [3, 3, 2, 1, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -3.0, -3.0, -1.0],
}


def made(base: dict[str, Any], **changes: Any) -> Tokenizer:
    """The tokenizer of a small vocabulary with other fields; None leaves a field out."""
    fields = base | {f"tokenizer.{'' if 'chat' in key else 'ggml.'}{key}": value for key, value in changes.items()}
    return tokenizer_from_gguf({key: value for key, value in fields.items() if value is not None}, "m.gguf")


def test_byte_level_vocabulary(tmp_path: Path) -> None:
    tokenizer = made(PLAIN)
    assert tokenizer.encode("abc ab<tool>a<|end|>") == [4, 3, 5, 4, 6, 1, 0]
    assert tokenizer.vocab_size == 8  # rows of the embedding without a token are none
    assert (tokenizer.special_ids, tokenizer.eos_ids, tokenizer.bos_id) == ({0}, [0], None)
    assert tokenizer.render([{"role": "user", "content": "a"}]) == "a<|end|>"
    with pytest.raises(DataError, match="no token for 'd'"):
        tokenizer.encode("abd")
    same = made(PLAIN, merges=["a b", "a b"], token_type=None, eos_token_id=np.int32(0).item())
    assert same.encode("abc") == [4, 3]
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_bytes())["model_max_length"] == 64
    assert json.loads((tmp_path / "generation_config.json").read_bytes())["eos_token_id"] == 0


def test_bos_and_eos_are_put_where_the_file_says() -> None:
    assert made(PLAIN, bos_token_id=6, add_bos_token=True, add_eos_token=True).encode("c") == [6, 3, 0]
    assert made(PLAIN, bos_token_id=6).encode("c") == [3]
    assert made(PLAIN, bos_token_id=6, pre="llama-bpe").encode("c") == [6, 3]  # where llama.cpp does without being told
    assert made(PLAIN, bos_token_id=6, pre="llama3", add_bos_token=False).encode("c") == [3]
    assert made(PIECES).encode("a") == [1, 263]
    assert made(PIECES, add_bos_token=False, add_eos_token=True).encode("a") == [263, 2]
    assert made(UNIGRAM).encode("ab") == [6, 1]
    assert made(WORDS).encode("a") == [2, 6, 3]


def test_composing_letters() -> None:
    tokens = [*PLAIN["tokenizer.ggml.tokens"][:-2], "Ã", "©", "e", "Ì", "ģ"]
    changes: dict[str, Any] = {"tokens": tokens, "token_type": None}
    decomposed, composed = [10, 11, 12], [8, 9]
    assert made(PLAIN, **changes).encode("e\u0301") == decomposed
    for architecture, pre, own, expected in (
        ("qwen2", "qwen2", None, composed),
        ("gptneox", "gpt-2", None, composed),
        ("qwen2", "qwen35", None, decomposed),
        ("qwen2", "qwen2", False, decomposed),
        ("llama", "qwen2", True, composed),
    ):
        base = PLAIN | {"general.architecture": architecture, "afina.tokenizer.nfc": own}
        assert made(base, pre=pre, **changes).encode("e\u0301") == expected, (architecture, pre, own)


def test_sentencepiece_vocabulary() -> None:
    tokenizer = made(PIECES)
    assert tokenizer.encode("ab a\n", add_special=False) == [263, 261, 263, 3 + 10]  # ▁a first: its score is higher
    assert tokenizer.decode(tokenizer.encode("ab a\né"), skip_special=True) == "ab a\né"
    assert made(PIECES, add_space_prefix=False).encode("ab a", add_special=False) == [262, 263]
    lower = [0.0] * 259 + [-5, -4, -3, -1, -2]
    assert made(PIECES, scores=lower).encode("ab a", add_special=False) == [259, 262, 263]


def test_wordpiece_vocabulary() -> None:
    tokenizer = made(WORDS)
    ids = tokenizer.encode("The As' x.")
    assert ids == [2, 5, 6, 7, 9, 1, 8, 3]
    assert tokenizer.decode(ids) == "[CLS] the as'[UNK]. [SEP]"
    assert made(WORDS, **{"normalizer.lowercase": False}).encode("The a") == [2, 1, 6, 3]


def test_unigram_vocabulary() -> None:
    tokenizer = made(UNIGRAM, remove_extra_whitespaces=True)
    assert tokenizer.encode("  ab   ab ") == [6, 6, 1]
    assert tokenizer.encode("xy") == [3, 2, 1]
    assert tokenizer.decode([6, 6]) == "ab ab"
    assert made(UNIGRAM, add_space_prefix=False).encode("ab") == [4, 5, 1]


def test_turn_ends() -> None:
    tokens = ["<|end|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "a", "b", "ab"]
    changes: dict[str, Any] = {"tokens": tokens, "token_type": [3, 3, 1, 3, 1, 1, 1], "chat_template": None}
    assert made(PLAIN, **changes).eos_ids == [0, 1, 3]
    assert made(PLAIN, eot_token_id=4, eom_token_id=5, **changes).eos_ids == [0, 4, 5]


def test_templates_with_names() -> None:
    more = {"chat_templates": ["tool_use", "rag"], "chat_template.tool_use": "x"}
    tokenizer = made(PLAIN, **more)
    assert tokenizer.chat_template == PLAIN["tokenizer.chat_template"]
    config = json.loads(tokenizer.files()["tokenizer_config.json"])
    assert [template["name"] for template in config["chat_template"]] == ["default", "tool_use"]
    assert made(PLAIN, chat_template=None, **more).chat_template is None


def test_phi3_tokens_take_the_spaces_after_them() -> None:
    assert made(PLAIN).encode("<tool> a") == [6, 5, 1]
    assert made(PLAIN | {"general.name": "Phi-3.5 mini"}).encode("<tool> a") == [6, 1]


@pytest.mark.parametrize("name", [*SPLITTINGS, *ALIASES])
def test_every_way_of_splitting_is_read(name: str) -> None:
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    ends = {"tokens": tokens, "token_type": None, "bos_token_id": 0, "add_bos_token": False}
    tokenizer = made(PLAIN, pre=name, **ends)
    text = "ab 123 Ab's\n\n  中文 é!"
    assert tokenizer.decode(tokenizer.encode(text)) == text


Wrong = tuple[dict[str, Any], dict[str, Any], str]
WRONG: list[Wrong] = [
    (PLAIN, {"model": None}, r"ggml\.model: found nothing, expected a text"),
    (
        PLAIN,
        {"model": "gtp2"},
        r"ggml\.model: found 'gtp2' \(did you mean 'gpt2'\?\), expected one of gpt2, llama, .*safet",
    ),
    (PLAIN, {"model": 3}, r"ggml\.model: found 3, expected a text"),
    (
        PLAIN,
        {"pre": "llama-bqe"},
        r"ggml\.pre: found 'llama-bqe' \(did you mean 'llama-bpe'\?\), which is no way of split",
    ),
    (PLAIN, {"pre": 7}, r"ggml\.pre: found 7, expected a text"),
    (PLAIN, {"tokens": None}, r"ggml\.tokens: found nothing, expected a list of texts"),
    (PLAIN, {"tokens": []}, r"ggml\.tokens: found \[\], expected a list of texts"),
    (PLAIN, {"tokens": ["a", 1]}, r"ggml\.tokens: found 1, expected a list of texts"),
    (PLAIN, {"tokens": ["a", "b", "a"]}, r"ggml\.tokens: found 'a' as token 0 and as token 2, expected each once"),
    (PLAIN, {"token_type": [1]}, r"ggml\.token_type: found 1 for 10 tokens, expected one a token"),
    (PLAIN, {"token_type": [1] * 9 + [9]}, r"ggml\.token_type: found 9 for token 9, expected 1 to 6"),
    (PLAIN, {"token_type": ["1"] * 10}, r"ggml\.token_type: found .*, expected a list of numbers"),
    (PLAIN, {"merges": None}, r"ggml\.merges: found nothing, expected a list of texts"),
    (PLAIN, {"merges": ["ab"]}, r"ggml\.merges: found 'ab' as merge 0, expected two tokens"),
    (PLAIN, {"merges": ["a b", "a "]}, r"ggml\.merges: found 'a ' as merge 1, expected two tokens"),
    (PLAIN, {"merges": ["a x"]}, r"ggml\.merges: merge 0 'a x' is about 'x', which is not among the tokens"),
    (PLAIN, {"merges": ["a b", "b a"]}, r"ggml\.merges: merge 1 'b a' is about 'ba', which is not among the tokens"),
    (PLAIN, {"eos_token_id": 8}, r"ggml\.eos_token_id: found 8, expected the id of one of 8 tokens"),
    (PLAIN, {"bos_token_id": -1}, r"ggml\.bos_token_id: found -1, expected the id of one of 8 tokens"),
    (PLAIN, {"eot_token_id": True}, r"ggml\.eot_token_id: found True, expected the id"),
    (PLAIN, {"add_bos_token": 1}, r"ggml\.add_bos_token: found 1, expected true or false"),
    (PLAIN, {"add_bos_token": True}, r"ggml\.bos_token_id: found nothing, expected the id that add_bos_token asks for"),
    (PLAIN, {"chat_template": 5}, r"chat_template: found 5, expected a text"),
    (
        PLAIN,
        {"chat_template": "x" * 300_000},
        r"chat_template: found 300,000 characters, expected at most 32,768: this",
    ),
    (PIECES, {"scores": None}, r"ggml\.scores: found nothing, expected one number a token"),
    (PIECES, {"scores": [1.0, 2.0]}, r"ggml\.scores: found 2 for 264 tokens, expected one a token"),
    (PIECES, {"scores": [float("nan")] * 264}, r"ggml\.scores: found nan for token 0, expected a finite number"),
    (WORDS, {"tokens": [*WORDS["tokenizer.ggml.tokens"][:-1], "##s"]}, ""),
    (WORDS, {"unknown_token_id": None, "tokens": ["a"] * 1, "token_type": [1]}, r"ggml\.[a-z]+_token_id: found"),
    (UNIGRAM, {"unknown_token_id": 7}, r"ggml\.unknown_token_id: found 7, expected the id of one of 7 tokens"),
    (
        UNIGRAM,
        {"precompiled_charsmap": np.array([9, 0, 0, 0, 1], np.int8)},
        r"precompiled_charsmap: found 5 bytes that",
    ),
]


@pytest.mark.parametrize(("base", "changes", "message"), WRONG)
def test_damaged_vocabularies(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    if not message:
        assert made(base, **changes).vocab_size == 10
        return
    with pytest.raises(TokenizerError, match=rf"^m\.gguf: tokenizer\..*{message}") as found:
        made(base, **changes)
    text = str(found.value)
    assert "\n" not in text
    assert text.count(": ") >= 3  # file, field, what, how to mend it


WRONG_VALUES: list[Any] = [
    0,
    -1,
    2**40,
    1.5,
    True,
    "",
    "x",
    "\ud800",
    [],
    ["x"],
    [[]],
    {},
    {"a": 1},
    np.zeros(3),
    [None],
]


@pytest.mark.parametrize("base", [PLAIN, PIECES, WORDS, UNIGRAM])
def test_wrong_values_end_in_the_typed_error(base: dict[str, Any]) -> None:
    keys = {*PLAIN, *PIECES, *WORDS, *UNIGRAM, "tokenizer.chat_templates", "tokenizer.ggml.add_eos_token"}
    keys |= {f"tokenizer.ggml.{name}" for name in ("precompiled_charsmap", "add_space_prefix", "normalizer.lowercase")}
    keys |= {"afina.tokenizer.nfc", "general.name", "tokenizer.ggml.remove_extra_whitespaces"}
    for key in sorted(keys):
        for wrong in WRONG_VALUES:
            with contextlib.suppress(AfinaError):
                tokenizer_from_gguf(base | {key: wrong}, "m.gguf").encode("ab")
