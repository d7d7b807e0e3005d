"""Text to ids and masks: where a token starts, told by the library's offsets and by the tokens' sizes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import tokenizers
from awkward_texts import AWKWARD
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from afina.loaders.text import encode
from afina.loaders.text.encode import encode_rendered, encode_rows
from afina.loaders.text.render import Rendered
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import train_bpe

TEXTS = ["the quick brown fox answers one two three", "hello 12 34, yes! no? ok.\n", "déjà vu 中文 🙂"] * 4
TRAINED = train_bpe(TEXTS, 400)


@pytest.fixture
def by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few rows be enough for the table of sizes."""
    monkeypatch.setattr(encode, "FEW_ROWS", 1)


def changed(change: Callable[[tokenizers.Tokenizer], object]) -> Tokenizer:
    """The trained tokenizer, and then something done to its backend."""
    files = TRAINED.files()
    backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    change(backend)
    return Tokenizer({**files, "tokenizer.json": backend.to_str().encode()}, "x")


def expected(tokenizer: Tokenizer, row: Rendered) -> list[bool]:
    offsets = tokenizer.encodings([row.text], offsets=True)[0].offsets
    return [any(start <= place < end for start, end in row.spans) for place, _ in offsets]


def masks(tokenizer: Tokenizer, rows: list[Rendered]) -> list[list[bool]]:
    return [mask.tolist() for mask in encode_rendered(tokenizer, rows)[1]]


def spanned(text: str, cuts: list[int]) -> Rendered:
    """The text with every second piece between the cuts as trained."""
    places = sorted(min(cut, len(text)) for cut in cuts)
    return Rendered(text, tuple(zip(places[::2], places[1::2])))


def no_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tokenizer.encodings

    def refuse(self: Tokenizer, texts: list[str], *, offsets: bool = False) -> list[tokenizers.Encoding]:
        assert not offsets
        return plain(self, texts)

    monkeypatch.setattr(Tokenizer, "encodings", refuse)


@given(st.lists(st.tuples(AWKWARD, st.lists(st.integers(0, 40), min_size=2, max_size=6)), min_size=1, max_size=5))
@settings(max_examples=150)
@pytest.mark.parametrize("few", [1, 10**9])
def test_masks_agree_with_character_offsets(few: int, drawn: list[tuple[str, list[int]]]) -> None:
    rows = [spanned(f"{text}<|endoftext|>", cuts) for text, cuts in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "FEW_ROWS", few)
        encoded = encode_rows(TRAINED, rows)
        ids, found = encoded.rows()
    assert [mask.tolist() for mask in found] == [expected(TRAINED, row) for row in rows]
    assert [row.tolist() for row in ids] == TRAINED.encode_batch([row.text for row in rows], add_special=False)
    assert encoded.lengths.tolist() == list(map(len, ids))


@pytest.mark.usefixtures("by_size")
def test_sizes_do_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Rendered("quick é中 yes<|endoftext|>", ((8, 24),)), Rendered("", ((0, 0),)), Rendered("a yes", ((1, 9),))]
    wanted = [expected(TRAINED, row) for row in rows]
    no_offsets(monkeypatch)
    for tokenizer in (TRAINED, changed(lambda backend: setattr(backend, "normalizer", normalizers.NFC()))):
        assert masks(tokenizer, rows) == wanted
    with pytest.raises(AssertionError):
        masks(changed(lambda backend: setattr(backend, "normalizer", normalizers.Lowercase())), rows)


@pytest.mark.usefixtures("by_size")
def test_offsets_where_sizes_would_lie() -> None:
    removed = pre_tokenizers.Split(Regex("~"), "removed")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for change in (
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("~", "")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Sequence([removed, bytes_of])),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: backend.add_tokens([AddedToken("~", lstrip=True, rstrip=True)]),
    ):
        tokenizer = changed(change)
        # Not in NFC: three characters become one; a character becomes three bytes longer, and three others one shorter.
        for text in ("e\u0323\u0302 ~ yes", "a ~ b ~~yes", "\u0958 e\u0301 e\u0301 e\u0301 yes", "yes"):
            for cut in range(len(text) + 1):
                row = Rendered(text, ((cut, len(text)),))
                assert masks(tokenizer, [row]) == [expected(tokenizer, row)]


def test_a_space_put_before_a_text_is_known_beforehand() -> None:
    """Else each batch would be encoded twice."""
    for before in (True, False):
        part = pre_tokenizers.ByteLevel(add_prefix_space=before)
        tokenizer = changed(lambda backend, part=part: setattr(backend, "pre_tokenizer", part))
        assert (tokenizer.byte_sizes() is None) == before


@pytest.mark.parametrize("few", [1, 10**9])
def test_no_rows_and_rows_without_tokens(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "FEW_ROWS", few)
    assert encode_rendered(TRAINED, []) == ([], [])
    ids, trained = encode_rendered(TRAINED, [Rendered("", ((0, 0),)), Rendered("a b", ((1, 3),)), Rendered("", ())])
    assert [row.tolist() for row in ids] == [[], TRAINED.encode("a b"), []]
    assert [row.tolist() for row in trained] == [[], [False, True, True], []]  # "a", the space, "b"


def test_an_unknown_token_may_stand_for_any_byte() -> None:
    state = json.loads(TRAINED.files()["tokenizer.json"])
    del state["model"]["vocab"]["~"]
    state["model"]["unk_token"] = "?"
    tokenizer = Tokenizer({**TRAINED.files(), "tokenizer.json": json.dumps(state).encode()}, "x")
    assert tokenizer.byte_sizes() is None
    assert TRAINED.byte_sizes() is not None


def test_masks_where_a_normalizer_changes_lengths() -> None:
    def change(backend: tokenizers.Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("~", "")])

    tokenizer = changed(change)
    for text, start, words in (
        ("ﬁ ﬁ yes", 3, " yes"),
        ("~~ a~b yes", 6, " yes"),
        ("a ~yes", 1, " yes"),
        ("a ~yes", 2, ""),  # inside the token " yes"
        ("a yes~~", 5, ""),  # after the last token
    ):
        (ids,), (mask,) = encode_rendered(tokenizer, [Rendered(text, ((start, len(text)),))])
        assert tokenizer.decode(ids[mask]) == words
        assert ids.tolist() == tokenizer.encode(text)
