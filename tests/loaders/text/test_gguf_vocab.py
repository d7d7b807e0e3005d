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
    byte_level_bpe,
    bytelevel,
    read_config,
    sentencepiece,
    splitter,
    vocabulary,
)

from afina.errors import AfinaError, TokenizerError
from afina.loaders.text.gguf_vocab import SPACE, SPLITTINGS, compare_vocabulary
from afina.loaders.text.tokenizer import SPLIT, Tokenizer, load_tokenizer


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


def test_digits_apart_then_gpt2(bpe: Tokenizer, tmp_path: Path) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = bytelevel(bpe, pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, level]})
    path = vocabulary(tmp_path / "m", tokenizer)
    assert read_config(path)["tokenizer.ggml.pre"] == "smollm"
    assert compare_vocabulary(path, tokenizer, TEXTS) == len(TEXTS)


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


def test_every_splitting_has_another_answer() -> None:
    assert len(set(SPLITTINGS.values())) == len(SPLITTINGS)


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
    yield bytelevel(bpe, pre_tokenizer=None), "no pre_tokenizer"
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
