"""Vocabularies in GGUF files: the ids that the tokenizer gives, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_files import (
    PATTERNS,
    SENTENCES,
    TEXTS,
    FieldsOnly,
    byte_level_bpe,
    bytelevel,
    gguf,
    read_config,
    sentencepiece,
    splitter,
    vocabulary,
)

from afina.errors import AfinaError, DataError, TokenizerError
from afina.loaders.text.gguf_splitting import SPACE, SPLITTINGS, pre_tokenizer
from afina.loaders.text.gguf_vocab import compare_vocabulary, write_vocabulary
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import SPLIT


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return byte_level_bpe()


def test_vocabulary_of_afina_tiny(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("afina-tiny")
    path = vocabulary(tmp_path / "m", tokenizer)
    assert compare_vocabulary(path, tokenizer, TEXTS) == len(TEXTS)
    found = {key.removeprefix("tokenizer."): value for key, value in read_config(path).items()}
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "qwen2")
    assert found["ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]
    assert found["ggml.token_type"][-3:] == [5, 5, 5]  # rows of the embedding without a token
    assert (found["ggml.eos_token_id"], found["ggml.eot_token_id"], found["ggml.bos_token_id"]) == (0, 4, 0)
    assert (found["ggml.add_bos_token"], found["ggml.add_eos_token"]) == (False, False)
    assert found["chat_template"] == tokenizer.chat_template


def test_vocabulary_of_gpt2(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "tokenizers" / "gpt2"
    tokenizer = load_tokenizer(folder)
    path = vocabulary(tmp_path / "m", tokenizer)
    assert read_config(path)["tokenizer.ggml.pre"] == "gpt-2"
    prose = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:20000].split("\n\n")
    assert compare_vocabulary(path, tokenizer, [*TEXTS, *prose]) == len(TEXTS) + len(prose)


@pytest.mark.parametrize("prefix", [True, False])
def test_vocabulary_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix=prefix)
    path = vocabulary(tmp_path / "m", tokenizer)
    texts = [*TEXTS, *SENTENCES]
    assert compare_vocabulary(path, tokenizer, texts) == len(texts)
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in read_config(path).items()}
    assert (found["model"], found["add_space_prefix"], found["add_bos_token"]) == ("llama", prefix, True)
    kinds = dict(zip(found["tokens"], found["token_type"]))
    assert [kinds[t] for t in ("<unk>", "<s>", "<0x0A>", "the", "<tool>", SPACE * 4)] == [2, 3, 6, 1, 4, 1]
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    scores = dict(zip(found["tokens"], found["scores"]))
    assert scores["th"] > scores["he"] > scores["the"] > scores["ed"] > scores["a"]


@pytest.mark.parametrize("name", PATTERNS)
def test_splitting_is_found_by_what_it_computes(name: str, bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = bytelevel(bpe, pre_tokenizer=splitter(PATTERNS[name]))
    path = vocabulary(tmp_path / "m", tokenizer)
    assert read_config(path)["tokenizer.ggml.pre"] == name
    assert compare_vocabulary(path, tokenizer, TEXTS) == len(TEXTS)
    if name == "smaug-bpe":  # Llama 3's own takes words that are tokens as they stand
        whole = bytelevel(bpe, pre_tokenizer=splitter(PATTERNS[name]), model={"ignore_merges": True})
        assert read_config(vocabulary(tmp_path / "n", whole))["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize("name", [name for name, way in SPLITTINGS.items() if way.exact])
def test_every_splitting_is_told_from_the_others(name: str, bpe: Tokenizer) -> None:
    way, writer = SPLITTINGS[name], FieldsOnly()
    parts = json.loads(pre_tokenizer(way).__getstate__())
    tokenizer = bytelevel(bpe, pre_tokenizer=parts, model={"ignore_merges": way.ignore_merges})
    write_vocabulary(gguf, writer, tokenizer, tokenizer.vocab_size)
    assert writer.fields["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("name", [name for name, way in SPLITTINGS.items() if not way.exact])
def test_what_llama_cpp_only_comes_near_to_is_refused(name: str, bpe: Tokenizer) -> None:
    parts = json.loads(pre_tokenizer(SPLITTINGS[name]).__getstate__())
    tokenizer = bytelevel(bpe, pre_tokenizer=parts, model={"ignore_merges": SPLITTINGS[name].ignore_merges})
    with pytest.raises(TokenizerError, match="splits words as none of gpt-2"):
        write_vocabulary(gguf, FieldsOnly(), tokenizer, tokenizer.vocab_size)


def test_digits_apart_then_gpt2(bpe: Tokenizer, tmp_path: Path) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = bytelevel(bpe, pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, level]})
    path = vocabulary(tmp_path / "m", tokenizer)
    assert read_config(path)["tokenizer.ggml.pre"] == "smollm"
    assert compare_vocabulary(path, tokenizer, TEXTS) == len(TEXTS)


def test_bytes_without_a_token(bpe: Tokenizer, tmp_path: Path) -> None:
    """As published byte-level vocabularies lack some of them: SmolLM2's 21, Falcon's 28 of the 256."""
    model = json.loads(bpe.files()["tokenizer.json"])["model"]
    vocab = {token: i for token, i in model["vocab"].items() if token not in ("Ā", "À", "õ", "ÿ")}
    tokenizer = bytelevel(bpe, model={"vocab": vocab})
    texts = [text for text in TEXTS if "\x00" not in text]
    path = vocabulary(tmp_path / "m", tokenizer)
    assert compare_vocabulary(path, tokenizer, texts) == len(texts)
    with pytest.raises(DataError, match=r"here: no token for '\\x00' \(U\+0000\): in 'a\\x00b' it would be left out"):
        compare_vocabulary(path, tokenizer, ["a\x00b"])
    unknown = bytelevel(bpe, model={"vocab": vocab, "unk_token": "<|end|>"})
    with pytest.raises(TokenizerError, match=r"'<\|end\|>' stands for 4 of the 256 bytes"):
        vocabulary(tmp_path / "n", unknown)


def test_a_difference_is_shown(bpe: Tokenizer, tmp_path: Path) -> None:
    model = json.loads(bpe.files()["tokenizer.json"])["model"]
    model = {"vocab": model["vocab"] | {"12": bpe.vocab_size}, "merges": [*model["merges"], ["1", "2"]]}
    apart = bytelevel(bpe, model=model)
    together = bytelevel(bpe, model=model, pre_tokenizer=splitter(PATTERNS["gpt-2"]))
    path = vocabulary(tmp_path / "m", apart)
    assert compare_vocabulary(path, together, ["the mat"]) == 1
    with pytest.raises(ValueError, match=r"m: the ids of 'a 12' differ: from token 2 on, \[\d+\] by the tok") as found:
        compare_vocabulary(path, together, ["the mat", "a 12"])
    assert not isinstance(found.value, AfinaError)


def refused_tokenizers(bpe: Tokenizer) -> Iterator[tuple[Tokenizer, str]]:
    strip = json.loads(bpe.files()["tokenizer.json"])["added_tokens"]
    strip[1]["lstrip"] = True
    yield bytelevel(bpe, added_tokens=strip), "the token '<|user|>' with lstrip"
    yield bytelevel(bpe, normalizer={"type": "Lowercase"}), "Lowercase normalizer"
    yield bytelevel(bpe, model={"dropout": 0.1}), "BPE model with dropout"
    yield bytelevel(bpe, model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"
    yield (
        bytelevel(bpe, pre_tokenizer=splitter(SPLIT.replace(r"\p{N}|", r"\p{N}{1,2}|"))),
        "splits words as none of gpt-2",
    )
    yield bytelevel(bpe, pre_tokenizer=splitter(SPLIT), model={"ignore_merges": True}), "splits words as none of gpt-2"
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    yield bytelevel(bpe, pre_tokenizer=level), "splits words as none of gpt-2"
    yield bytelevel(bpe, pre_tokenizer=None), "no ByteLevel among its pre_tokenizers"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    yield sentencepiece(prefix=True, normalizer=None, pre_tokenizer=metaspace), "spaces treated in another way"
    yield sentencepiece(prefix=True, normalizer={"type": "NFKC"}), "spaces treated in another way"
    model = json.loads(sentencepiece(prefix=True).files()["tokenizer.json"])["model"]
    merges = model["merges"]
    again = [merge for merge in merges if merge != ["t", "he"]] + [["t", "he"]]
    yield sentencepiece(prefix=True, model={"merges": again}), "merges that make 'the' at two places"
    fewer = [merge for merge in merges if merge != ["t", "he"]]
    yield sentencepiece(prefix=True, model={"merges": fewer}), "'the' is not merged from 't' and 'he'"
    vocab = {token: i for token, i in model["vocab"].items() if token != "g"}
    lone = [merge for merge in merges if "g" not in merge]
    found = "'ing' is not merged from 'in' and 'g'"  # the letter alone would be bytes, but llama.cpp joins letters
    yield sentencepiece(prefix=True, model={"vocab": vocab, "merges": lone}), found
    vocab = {token: i for token, i in model["vocab"].items() if token != "<0x41>"}
    yield sentencepiece(prefix=True, model={"vocab": vocab}), "without a token for byte 65"


def test_tokenizers_that_llama_cpp_would_read_differently(bpe: Tokenizer, tmp_path: Path) -> None:
    for number, (tokenizer, message) in enumerate(refused_tokenizers(bpe)):
        with pytest.raises(TokenizerError, match=r"^here/tokenizer\.json: .*--to hf") as found:
            vocabulary(tmp_path / str(number), tokenizer)
        assert message in str(found.value)
        assert "\n" not in str(found.value)


def test_ids_of_llama_cpp(bpe: Tokenizer, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]
    digits[1] |= {"trim_offsets": True, "use_regex": True}
    tokenizers = [
        *(bytelevel(bpe, pre_tokenizer=splitter(pattern)) for pattern in PATTERNS.values()),
        bytelevel(bpe, pre_tokenizer=splitter(PATTERNS["smaug-bpe"]), model={"ignore_merges": True}),
        bytelevel(bpe, pre_tokenizer={"type": "Sequence", "pretokenizers": digits}),
        *(sentencepiece(prefix=prefix) for prefix in (True, False)),
    ]
    for number, tokenizer in enumerate(tokenizers):
        path = vocabulary(tmp_path / str(number), tokenizer)
        theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        for text in [*TEXTS, *SENTENCES]:
            assert theirs.tokenize(text.encode(), special=True) == tokenizer.encode(text), (number, text)
