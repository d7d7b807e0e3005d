"""Tokenizers: the ids that transformers gives, files in and out, and wrong files."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from chat_templates import CHATML, LLAMA3
from metaspace import SCHEMES, metaspace_files, with_bos
from tokenizers import models, normalizers, pre_tokenizers, processors

from afina.errors import AfinaError, DataError, TokenizerError
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer, check_vocab
from afina.loaders.text.train_bpe import train_bpe

CORPUS = ["the quick brown fox answers user one two three", "hello world 12 34, yes! no? ok.\n", "déjà vu 中文 🙂"] * 3
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    *(
        "",
        " ",
        "hello world",
        "  two  spaces\n\n\tand tabs ",
        "déjà vu 中文 🙂🙂 e\u0301",
        "<s>hello</s> <|im_end|>world",
        "12345",
    ),
    *("a</s>", " <s> x", "\u00a0\u200b", "\x00", "ﬁ"),
]
TALK = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "中"}]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def backend() -> str:
    return train_bpe(CORPUS, 256 + len(SPECIAL) + 80, SPECIAL, "</s>").files()["tokenizer.json"].decode()


@pytest.fixture
def write(tmp_path: Path, backend: str) -> Write:
    """Write a tokenizer folder: tokenizer.json (changed by ``edit``), tokenizer_config.json, further files."""

    def writer(
        edit: Callable[[tokenizers.Tokenizer], Any] | None = None, files: dict[str, Any] | None = None, **config: Any
    ) -> Path:
        tokenizer = tokenizers.Tokenizer.from_str(backend)
        if edit:
            edit(tokenizer)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, value in ({"tokenizer_config.json": config} | (files or {})).items():
            (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path

    return writer


def agree(folder: Path, peer: Any = None) -> Tokenizer:
    """The tokenizer of a folder, after comparing its ids and texts with those of transformers."""
    ours = load_tokenizer(folder)
    theirs = peer or transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False), text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.vocab_size == len(theirs)
    return ours


def post(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.post_processor = with_bos(tokenizer)


def test_same_ids_as_transformers(write: Write) -> None:
    assert not agree(write()).adds_bos


def test_same_ids_with_a_post_processor(write: Write) -> None:
    tokenizer = agree(write(post))
    assert tokenizer.adds_bos
    assert tokenizer.encode("a")[0] == tokenizer.bos_id


@pytest.mark.parametrize("edit", [None, post])
@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_json_decides_on_bos(write: Write, edit: Any, bos: bool) -> None:
    assert agree(write(edit, add_bos_token=bos, add_eos_token=bos)).adds_bos == (edit is post)


def test_same_ids_with_truncation_padding_and_normalizer(write: Write) -> None:
    def edit(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.normalizer = normalizers.NFC()

    agree(write(edit))
    folder = write(lambda tokenizer: (tokenizer.enable_truncation(3), tokenizer.enable_padding(length=9)))
    assert len(load_tokenizer(folder).encode("one two three four five six")) > 9
    assert len(load_tokenizer(folder).encode("one")) < 4


PAD: Any = {"pad_id": 2, "pad_token": "<|im_start|>"}
STORED: dict[str, Callable[[tokenizers.Tokenizer], Any]] = {
    "right": lambda backend: backend.enable_padding(length=9, **PAD),
    "left": lambda backend: backend.enable_padding(direction="left", length=9, **PAD),
    "multiple": lambda backend: backend.enable_padding(pad_to_multiple_of=8, **PAD),
    "short": lambda backend: backend.enable_truncation(1),
    "short on the left": lambda backend: backend.enable_truncation(2, direction="left"),
    "both": lambda backend: (backend.enable_truncation(2), backend.enable_padding(direction="left", length=5, **PAD)),
}


@pytest.mark.parametrize("kind", STORED)
def test_bos_survives_stored_padding_and_truncation(write: Write, kind: str) -> None:
    plain = load_tokenizer(write(post))
    expected, text = plain.encode_batch(TEXTS), plain.render(TALK)
    tokenizer = agree(write(lambda backend: (post(backend), STORED[kind](backend))))
    assert tokenizer.adds_bos
    assert tokenizer.encode_batch(TEXTS) == expected
    assert tokenizer.render(TALK) == text


def test_bos_survives_a_call_with_padding_before_saving(write: Write, tmp_path: Path) -> None:
    peer = transformers.AutoTokenizer.from_pretrained(write(post, pad_token="</s>"))
    for side in ("left", "right"):
        peer.padding_side = side
        peer(["one two"], padding="max_length", truncation=True, max_length=12)
        peer.save_pretrained(tmp_path / side)
        assert json.loads((tmp_path / side / "tokenizer.json").read_text())["padding"]["direction"] == side.capitalize()
        assert agree(tmp_path / side).adds_bos


def test_same_ids_with_added_tokens_of_the_config(write: Write, backend: str) -> None:
    size = tokenizers.Tokenizer.from_str(backend).get_vocab_size()
    added = {
        str(size): {"content": "<tool>", "special": False, "normalized": True},
        str(size + 1): {"content": "<|pad|>", "special": True, "lstrip": True, "rstrip": True},
    }
    tokenizer = agree(write(added_tokens_decoder=added, pad_token="<|pad|>"))
    text = "x <|pad|> y<tool>"
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.where)
    assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.special_ids == {*range(4), size + 1}
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == theirs.decode(theirs.encode(text), True)


def test_added_tokens_of_the_older_file(write: Write, backend: str) -> None:
    size = tokenizers.Tokenizer.from_str(backend).get_vocab_size()
    older = {f"<new{number}>": size + number for number in (10, *range(10), 11)}
    folder = write(files={"added_tokens.json": older})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = agree(folder, theirs)
    for text in ("a<new9>b<new10>", "<new0><new11>"):
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.encode("<new10>") == [size + 10]
    with pytest.raises(TokenizerError, match=r"added_tokens.json: '<far>' cannot have the id 9999"):
        load_tokenizer(write(files={"added_tokens.json": {"<far>": 9999}}))
    listed = {str(size): {"content": "<tool>"}}  # the newer list beside it counts alone, as in transformers
    folder = write(files={"added_tokens.json": {"<far>": 9999}}, added_tokens_decoder=listed)
    assert load_tokenizer(folder).vocab_size == size + 1


def test_named_special_tokens_are_control_tokens(write: Write) -> None:
    folder = write(eos_token={"content": "hello", "__type": "AddedToken"}, extra_special_tokens=["w"])
    tokenizer = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("hello world, hello") == theirs.encode("hello world, hello")
    assert tokenizer.token_id("hello") in tokenizer.special_ids


@pytest.mark.parametrize("scheme", SCHEMES)
def test_same_ids_for_metaspace_tokenizers(tmp_path: Path, scheme: str) -> None:
    for name, data in metaspace_files(scheme).items():
        (tmp_path / name).write_bytes(data)
    tokenizer = agree(tmp_path)
    for text in TEXTS[1:]:  # a BOS in the text, so that there is one renderer, gives the ids of a BOS in front
        if not text.startswith(("<s>", " <s>")):
            assert tokenizer.encode(tokenizer.with_bos(text), add_special=False) == tokenizer.encode(text), text


def test_gpt2_files(tmp_path: Path, backend: str) -> None:
    tokenizers.Tokenizer.from_str(backend).model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab = {"<|endoftext|>" if token == "</s>" else token: i for token, i in vocab.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    peer = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    tokenizer = agree(tmp_path, peer)
    assert tokenizer.eos_ids == [vocab["<|endoftext|>"]]
    assert tokenizer.encode("a<|endoftext|>b") == peer.encode("a<|endoftext|>b")
    tokenizer.save(tmp_path / "saved")
    agree(tmp_path / "saved")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true}')
    assert agree(tmp_path).adds_bos
    assert (tmp_path / "saved/merges.txt").read_bytes() == (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": len(vocab)}))
    assert load_tokenizer(tmp_path).encode("a<new>")[-1] == len(vocab)


def test_the_real_gpt2(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "tokenizers/gpt2"
    tokenizer = agree(folder, transformers.GPT2Tokenizer.from_pretrained(folder))
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (50257, 50256, [50256])
    tokenizer.save(tmp_path)
    agree(tmp_path)


# The ids that end generation, templates, saving


def test_eos_ids_are_the_union_of_what_the_files_say(write: Write) -> None:
    assert load_tokenizer(write()).eos_ids == [1]
    assert load_tokenizer(write(files={"config.json": {"eos_token_id": 2}})).eos_ids == [1, 2]
    assert load_tokenizer(write(files={"generation_config.json": {"eos_token_id": [3, 1]}})).eos_ids == [1, 2, 3]
    folder = write(files={"generation_config.json": {}, "config.json": {}}, chat_template=CHATML)
    assert load_tokenizer(folder).eos_ids == [1, 3]  # </s>, and <|im_end|> that only the template shows
    folder = write(files={"config.json": {"eos_token_id": 2, "bos_token_id": 3}}, eos_token=None, bos_token=None)
    assert (load_tokenizer(folder).eos_token, load_tokenizer(folder).bos_id) == ("<|im_start|>", 3)


@pytest.mark.parametrize("place", ["config", "list", "dict", "jinja", "none"])
def test_templates_are_found_and_saved(write: Write, tmp_path: Path, place: str) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    by_name = {item["name"]: item["template"] for item in named}
    given: dict[str, Any] = {"config": CHATML, "list": named, "dict": by_name}
    config = {"chat_template": given[place]} if place in given else {}
    folder = write(files={"chat_template.jinja": CHATML} if place == "jinja" else {}, **config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == (None if place == "none" else CHATML)
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for prompt in (True, False):
        expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render(TALK, add_generation_prompt=prompt) == expected
    again = agree(tmp_path / "saved")
    assert again.chat_template == tokenizer.chat_template  # the default one stays the default
    assert again.eos_ids == tokenizer.eos_ids
    for path in folder.glob("*.json*"):
        assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()


def test_a_template_of_its_own_file_wins(write: Write) -> None:
    assert load_tokenizer(write(files={"chat_template.jinja": LLAMA3}, chat_template=CHATML)).chat_template == LLAMA3


def test_saving_declares_the_stop_ids_and_outlives_the_source(write: Write, tmp_path: Path) -> None:
    source = write(files={"generation_config.json": {"temperature": 0.6, "eos_token_id": 1}}, chat_template=CHATML)
    folder = tmp_path.parent / (tmp_path.name + "-copy")
    shutil.copytree(source, folder)
    tokenizer = load_tokenizer(folder)
    shutil.rmtree(folder)
    tokenizer.save(folder)
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": [1, 3]}
    assert load_tokenizer(folder).eos_ids == [1, 3]


def test_fingerprint(write: Write) -> None:
    first = load_tokenizer(write()).fingerprint()
    assert load_tokenizer(write()).fingerprint() == first
    assert load_tokenizer(write(files={"generation_config.json": {"top_k": 2}})).fingerprint() == first
    others = [
        load_tokenizer(write(chat_template=CHATML)).fingerprint(),
        load_tokenizer(write(eos_token="<s>")).fingerprint(),
        load_tokenizer(write(lambda tokenizer: tokenizer.add_tokens(["new"]))).fingerprint(),
        load_tokenizer(write(additional_special_tokens=["h"])).fingerprint(),
    ]
    assert len({first, *others}) == 5


# Wrong files


def test_wrong_folders(tmp_path: Path, write: Write) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"found no tokenizer file, expected tokenizer.json, or vocab.json"):
        load_tokenizer(tmp_path / "empty")
    folder = write(files={"vocab.json": "{}"})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"found tokenizer_config.json, vocab.json, expected"):
        load_tokenizer(folder)
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(TokenizerError, match=r"merges.txt: line 2: found 'a b c', expected two tokens"):
        load_tokenizer(folder)
    (folder / "merges.txt").write_text("a b\n")
    with pytest.raises(TokenizerError, match=r"vocab.json with merges.txt: cannot be used as a tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(TokenizerError, match=r"of a Qwen2Tokenizer, whose way of splitting words is not known"):
        load_tokenizer(folder)


def _replacing(pattern: str | tokenizers.Regex, content: str) -> Callable[[tokenizers.Tokenizer], None]:
    return lambda backend: setattr(backend, "normalizer", normalizers.Replace(pattern, content))


def _with_ids(*numbers: int) -> Callable[[tokenizers.Tokenizer], None]:
    parts = [(f"<{i}>", number) for i, number in enumerate(numbers)]
    around = processors.TemplateProcessing(" ".join([*(name for name, _ in parts), "$A"]), "$A $B", parts)
    return lambda backend: setattr(backend, "post_processor", around)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_replacing("a", "b" * 100), "its normalizer makes a text 100 times as long, expected at most 64"),
        (_replacing(tokenizers.Regex("x*"), "b" * 64), "its normalizer makes a text 65 times as long"),
        (_with_ids(0, 5000), "its post_processor puts the id 5000 around a text, which the vocabulary has not"),
        (_with_ids(*[0] * 70), r"its post_processor puts \d+ ids around a text, expected at most 64"),
    ],
)
def test_parts_that_multiply_or_name_ids_that_are_not_there(edit: Any, words: str, write: Write) -> None:
    with pytest.raises(TokenizerError, match=rf"tokenizer.json: {words}.*: download it again"):
        load_tokenizer(write(edit))


@pytest.mark.parametrize("wrong", [-1, 2**31, 2**70, None, "1", 1.0])
def test_what_is_no_id_is_not_decoded(wrong: Any, write: Write) -> None:
    tokenizer = load_tokenizer(write())
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""
    with pytest.raises(TokenizerError, match=r"no token id|whole numbers"):
        tokenizer.decode([wrong])


def test_wrong_configs(write: Write) -> None:
    with pytest.raises(TokenizerError, match=r"eos_token '<s/>' is not in the vocabulary \(did you mean '</?s>'\?\)"):
        load_tokenizer(write(eos_token="<s/>"))
    with pytest.raises(TokenizerError, match=r"bos_token '\[CLS\]' is not in the vocabulary"):
        load_tokenizer(write(bos_token="[CLS]"))
    with pytest.raises(TokenizerError, match=r"added_tokens_decoder gives '<s>' the id 7, the vocabulary gives it 0"):
        load_tokenizer(write(added_tokens_decoder={"7": {"content": "<s>"}}))
    for wrong in ([1], {"x": {"content": "a"}}, {"1": {}}, {"1": "a"}, {"1": None}, {"9" * 30: {"content": "a"}}):
        with pytest.raises(TokenizerError, match=r"tokenizer_config.json: added_tokens_decoder"):
            load_tokenizer(write(added_tokens_decoder=wrong))
    with pytest.raises(TokenizerError, match=r"of the chat templates 'tool_use' none is named 'default'"):
        load_tokenizer(write(chat_template=[{"name": "tool_use", "template": ""}]))
    with pytest.raises(TokenizerError, match=r"chat_template is not a text"):
        load_tokenizer(write(chat_template={"default": 1}))
    with pytest.raises(TokenizerError, match=r"line 1: not valid JSON"):
        load_tokenizer(write(files={"tokenizer_config.json": "{"}))
    folder = write()
    (folder / "chat_template.jinja").write_bytes(b"abc\xff")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: byte 3 is not UTF-8"):
        load_tokenizer(folder)


KEYS = [
    *("tokenizer_class", "bos_token", "eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens"),
    *("added_tokens_decoder", "chat_template", "add_prefix_space", "add_bos_token", "eos_token_id"),
]


WRONG: list[Any] = [None, 0, -1, 10**12, 1.5, True, "", "x", [], [1], ["x"], [[]], {}, {"a": 1}]


@pytest.mark.parametrize("key", KEYS)
def test_wrong_values_end_in_the_typed_error(write: Write, key: str) -> None:
    for wrong in WRONG:
        folder = write(files={"config.json": {key: wrong}, "generation_config.json": {key: wrong}}, **{key: wrong})
        with contextlib.suppress(AfinaError):
            tokenizer = load_tokenizer(folder)
            tokenizer.encode("a")
            assert tokenizer.eos_ids is not None


def test_panics_of_the_library_are_tokenizer_errors(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it: no Exception."""

    def panic(_: object) -> None:
        raise PanicException("index out of bounds")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    folder = write()
    monkeypatch.setattr(tokenizers.Tokenizer, "from_buffer", panic)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: cannot be used .* \(index out of bounds\)"):
        load_tokenizer(folder)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_buffer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(folder)


def test_damaged_files_end_in_the_typed_error(write: Write) -> None:
    path = write(chat_template=CHATML) / "tokenizer.json"
    config = path.with_name("tokenizer_config.json")
    good = {path: path.read_bytes(), config: config.read_bytes()}
    rng = random.Random(0)
    for _ in range(60):
        for file, data in good.items():
            damaged = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(damaged))
                damaged[at : at + rng.randrange(40)] = rng.choice([b"", b"null", b"-1", b'"', b"[]", b"{}", b"\xff"])
            file.write_bytes(damaged)
        try:
            tokenizer = load_tokenizer(path.parent)
            tokenizer.encode("hello")
            assert tokenizer.eos_ids is not None
        except AfinaError as problem:
            text = str(problem)
        else:
            continue
        assert "\n" not in text


def test_half_characters(write: Write) -> None:
    with pytest.raises(DataError, match="half a character"):
        load_tokenizer(write()).encode("a\ud800")


def folder_of(path: Path, model: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


def test_characters_that_cannot_be_spelt(tmp_path: Path) -> None:
    vocab = {token: i for i, token in enumerate(["a", "b", "Ġ", "ab", "<u>", "é"])}
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = folder_of(tmp_path, models.BPE(vocab, [("a", "b")]), pre_tokenizer=bytes_)
    assert tokenizer.encode("ab a") == [3, 2, 0]
    left_out = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a\x04b")
    assert left_out.ids == [0, 1]  # so the library would train on another text without a word
    for text, shown in (("xa\x04b" * 9, r"'x' \(U\+0078\)"), ("a\x04b", r"'\\x04' .* in 'a\\x04b'"), ("abé", "'é'")):
        for offsets in (False, True):
            with pytest.raises(DataError, match=rf"no token for {shown}.*left out: remove it"):
                tokenizer.encodings(["ab", text], offsets=offsets)
    with_unknown = models.BPE(vocab, [], unk_token="<u>")
    assert folder_of(tmp_path, with_unknown, pre_tokenizer=bytes_).encode("axb") == [0, 4, 1]  # as transformers has it
    # Not by bytes, but by characters, and what the normalizer makes of them.
    lower = normalizers.Lowercase()
    tokenizer = folder_of(tmp_path, models.BPE(vocab, []), lower, pre_tokenizers.WhitespaceSplit())
    assert tokenizer.encode("A bÉ") == [0, 1, 5]
    with pytest.raises(DataError, match="no token for 'C'"):
        tokenizer.encode("A bC")
    spelt = {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    assert folder_of(tmp_path, models.BPE(vocab | spelt, [], byte_fallback=True)).encode("ac") == [0, 6 + ord("c")]


def test_an_added_token_spells_what_the_vocabulary_does_not(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens(["<x>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a<x>a") == [0, 1, 0]
    with pytest.raises(DataError, match="no token for '<'"):
        load_tokenizer(tmp_path).encode("a<x>a<")


def test_spaces_that_decoding_mends(tmp_path: Path) -> None:
    words = ["[UNK]", "[CLS]", "do", "n", "'", "t", ".", "a", "s", "!", ",", "ve", "?"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    for mends in (True, False):
        config = {"clean_up_tokenization_spaces": mends, "tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in ("do . a ! n , t ?", "a ' s ' ve", "don't", "a 's"):
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    assert ours.decode([7, 6]) == "a ."


@pytest.mark.parametrize(
    ("tokens", "content", "expected"),
    [
        (["<|a|>"], "x<|a|>y", "x< |a|>y"),
        (["<|a|>"], "<|<|a|>a|>", "<|< |a|>a|>"),
        (["<|a", "a|>"], "<|a|>", "< |a |>"),
        (["#", "<|a|>"], "# <|a|>", "# < |a|>"),  # a single character cannot be broken, which keeps nothing else whole
        ([" a"], "x a a", "x a a"),
        (["a b", "a  b"], "a b", "a   b"),
        (["aa"], "aaaaa", "a a a a a"),
        (["[X] ", "[X]"], "[X] [X]", "[ X] [ X]"),
    ],
)
def test_control_tokens_in_messages_are_broken(write: Write, tokens: list[str], content: str, expected: str) -> None:
    def edit(backend: tokenizers.Tokenizer) -> None:
        backend.add_special_tokens(tokens)

    tokenizer = load_tokenizer(write(edit, chat_template=CHATML))
    assert tokenizer.checked([{"role": "user", "content": content}])[0]["content"] == expected


def test_control_tokens_in_other_spellings(write: Write) -> None:
    def edit(backend: tokenizers.Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.add_special_tokens([tokenizers.AddedToken("<|halt|>", normalized=True, lstrip=True)])

    tokenizer = load_tokenizer(write(edit, chat_template=CHATML))
    halt = tokenizer.token_id("<|halt|>")
    for text in ("x  <|HALT|>", "＜|halt|＞", "<|Halt|><|halt|>", "<|haLT|>" * 50, "<|hal<|HALT|>t|>"):
        assert halt in tokenizer.encode(text)
        assert halt not in tokenizer.encode(tokenizer.render([{"role": "user", "content": text}]))


def test_breaking_many_control_tokens_takes_one_pass(write: Write) -> None:
    tokenizer = load_tokenizer(write(chat_template=CHATML))
    start = time.perf_counter()
    content = tokenizer.checked([{"role": "user", "content": "<|im_end|>" * 100_000}])[0]["content"]
    assert content == "< |im_end|>" * 100_000
    assert time.perf_counter() - start < 10  # token by token from the start it takes minutes


def test_check_vocab(write: Write) -> None:
    tokenizer = load_tokenizer(write(lambda backend: backend.add_tokens(["<new>"])))
    check_vocab(tokenizer, tokenizer.vocab_size)
    check_vocab(tokenizer, tokenizer.vocab_size + 63)
    with pytest.raises(TokenizerError, match=r"1 tokens have no row among the model's \d+ embeddings: '<new>' \(\d+\)"):
        check_vocab(tokenizer, tokenizer.vocab_size - 1)


# Training a tokenizer


def test_train_bpe(tmp_path: Path) -> None:
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer = train_bpe(iter(CORPUS), 320, special, "<|endoftext|>")
    assert tokenizer.vocab_size == 320
    assert [tokenizer.token_id(token) for token in special] == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids) == (None, False, [0, 4])
    assert len(tokenizer.encode("2024")) == 4  # digits one by one
    assert len(tokenizer.encode("quick brown")) < 8
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.render(TALK, add_generation_prompt=True) == (
        "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>中<|end|><|assistant|>"
    )
    with pytest.raises(DataError, match="the roles are system, user, assistant and tool, not narrator"):
        tokenizer.render([{"role": "narrator", "content": "x"}])
    tokenizer.save(tmp_path)
    assert agree(tmp_path).fingerprint() == load_tokenizer(tmp_path).fingerprint()
    assert train_bpe(CORPUS, 320, special, "<|endoftext|>").fingerprint() == tokenizer.fingerprint()
    assert train_bpe(CORPUS, 320, special, "<|endoftext|>", CHATML).chat_template == CHATML


def test_train_bpe_refuses() -> None:
    with pytest.raises(TokenizerError, match=r"eos_token '</s>' is not among the special tokens <.endoftext.>"):
        train_bpe(CORPUS, 300, eos_token="</s>")
    with pytest.raises(TokenizerError, match="vocab_size 200: at least 256 bytes and 1 special tokens"):
        train_bpe(CORPUS, 200)
