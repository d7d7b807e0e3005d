"""The vocabulary in a GGUF file, written and read back.

llama.cpp rebuilds a tokenizer from a list of tokens with their types, and either merges and the *name* of a way to
split words, whose regular expressions it has in code (byte-level BPE), or one score a token (SentencePiece BPE). A
tokenizer that splits in no way it knows would load all the same and give other ids, so :func:`write_vocabulary` finds
the name by comparing what is computed, and refuses where nothing agrees; :func:`read_vocabulary` is llama.cpp's side of
it, made of nothing but the file, so that :func:`compare_vocabulary` can show that the ids of real texts are the same.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from afina.errors import TokenizerError
from afina.loaders.text.gguf_splitting import (
    ALIASES,
    BYTE,
    CONTROL,
    NFC_KEY,
    NORMAL,
    SPACE,
    SPLITTINGS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
)
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.weights.gguf_file import GGUFFile

# What the known ways disagree about, to be strung together: letters, marks, digits, spaces, line ends, punctuation.
_UNITS = (
    *("a", "Z", "ß", "é", "e\u0301", "ж", "中", "あ", "ي", "ไ", "1", "23", "456", "½", "٣", " ", "  ", "\n", "\r\n"),
    *("\t", "\u00a0", "\u3000", "'", "'s", "'LL", "'re", "’", ".", "/", "_", "!?", "<", "|", "$", "+", "#", "😀"),
    *("\u200d", "`", "(", "！", "、", "ჰ", "Ǆ", "क\u094d"),
)


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_vocabulary(gguf: Any, writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Add ``tokenizer`` to a file's key-values, filled up to the ``rows`` of the model's embedding with unused tokens.

    Raises TokenizerError for what llama.cpp would do differently.
    """
    # What `tokenizers` works with, the tokens that only tokenizer_config.json names included.
    backend = tokenizer._backend
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise _unlike(tokenizer, f"a {model['type']} model{' with dropout' * bool(model.get('dropout'))}")
    tokens = {number: token for token, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    for token in state["added_tokens"]:
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]:
            raise _unlike(tokenizer, f"the token {token['content']!r} with {flags[0]}")
        number = token["id"]
        if sentencepiece and not token["special"] and SPACE in token["content"] and number in tokens:
            continue  # runs of spaces, which merges make out of a text: as it stands, no text holds them
        tokens[number] = token["content"]
        types[number] = CONTROL if token["special"] else USER_DEFINED
    for number in range(rows):
        if number not in tokens:
            tokens[number], types[number] = f"[PAD{number}]", UNUSED

    if sentencepiece:
        scores = _sentencepiece(tokenizer, model, merges, tokens, types)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(number, -1e6) for number in range(rows)])
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(tokenizer, state))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bool(NFC_KEY, "NFC" in _parts(state["normalizer"], "normalizers"))
    writer.add_token_list([tokens[number] for number in range(rows)])
    writer.add_token_types([types[number] for number in range(rows)])
    _write_ends(writer, tokenizer)


def _write_ends(writer: Any, tokenizer: Tokenizer) -> None:
    """Which tokens begin and end a text and a turn, and the chat template."""
    eos = tokenizer.token_id(tokenizer.eos_token)
    if eos is None:
        raise TokenizerError(f"{tokenizer.where}: no eos_token: set one in tokenizer_config.json")
    before, after = tokenizer._prefix, tokenizer._suffix
    if before not in ([], [tokenizer.bos_id]) or after not in ([], [eos]):
        raise _unlike(tokenizer, f"{before} before and {after} after each text, not the BOS and EOS tokens")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    writer.add_eos_token_id(eos)
    # Without one, llama.cpp would take token 11 for it.
    writer.add_bos_token_id(eos if tokenizer.bos_id is None else tokenizer.bos_id)
    for name, add in (("pad_token", writer.add_pad_token_id), ("unk_token", writer.add_unk_token_id)):
        if (number := tokenizer.token_id(tokenizer._names.get(name))) is not None:
            add(number)
    # The token that ends a turn, then what else ends a text: llama.cpp has two more places.
    turn = tokenizer.special_pattern.search(tokenizer.template.turn_end)
    ends = [i for i in (tokenizer.token_id(turn[0]) if turn else None, *tokenizer.eos_ids) if i not in (None, eos)]
    ends = list(dict.fromkeys(ends))
    if len(ends) > 2:
        mend = "leave three in generation_config.json's eos_token_id"
        raise TokenizerError(f"{tokenizer.where}: {len(ends) + 1} tokens end a text, of which gguf has three: {mend}")
    for number, add in zip(ends, (writer.add_eot_token_id, writer.add_eom_token_id)):
        add(number)
    writer.add_chat_template(tokenizer.chat_template or tokenizer._default_template())


def _unlike(tokenizer: Tokenizer, found: str) -> TokenizerError:
    mend = "export with --to hf, which keeps the tokenizer's own files"
    return TokenizerError(f"{tokenizer.where}/tokenizer.json: {found}: llama.cpp would give other ids: {mend}")


# Byte-level BPE


def _splitting(tokenizer: Tokenizer, state: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE splits words."""
    model = state["model"]
    if unknown := [kind for kind in _parts(state["normalizer"], "normalizers") if kind != "NFC"]:
        raise _unlike(tokenizer, f"a {unknown[0]} normalizer in a byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unlike(tokenizer, f"{key} = {model[key]!r}")
    if "ByteLevel" not in _parts(state["pre_tokenizer"], "pretokenizers"):
        raise _unlike(tokenizer, "no ByteLevel among its pre_tokenizers, so it is no byte-level BPE")
    # Bytes without a token are left out of a text by llama.cpp as by the backend, unless a token stands for them.
    absent = set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys()
    if absent and model.get("unk_token") is not None:
        raise _unlike(tokenizer, f"{model['unk_token']!r} stands for {len(absent)} of the 256 bytes")
    name = _named(json.dumps(state["pre_tokenizer"]), model.get("ignore_merges", False))
    if name is not None:
        return name
    known = ", ".join(name for name, way in SPLITTINGS.items() if way.exact)
    shown = json.dumps(state["pre_tokenizer"], ensure_ascii=False)
    shown = shown if len(shown) <= 160 else shown[:157] + "..."
    raise _unlike(tokenizer, f"splits words as none of {known} does (pre_tokenizer {shown})")


@lru_cache(maxsize=16)
def _named(own: str, ignore_merges: bool) -> str | None:
    """The name of the way that cuts texts as the pre_tokenizer of which ``own`` is the JSON; None where none does."""
    state = json.loads(Backend(models.BPE()).to_str()) | {"pre_tokenizer": json.loads(own)}
    ours = Backend.from_str(json.dumps(state)).pre_tokenizer
    texts = [*_UNITS, *map("".join, itertools.product(_UNITS, repeat=2))]
    choose = random.Random(0)
    texts += ["".join(choose.choices(_UNITS, k=choose.randint(3, 12))) for _ in range(5000)]
    cut = [[piece for piece, _ in ours.pre_tokenize_str(text)] for text in texts]
    for name, way in SPLITTINGS.items():
        theirs = pre_tokenizer(way)
        if (way.exact and way.ignore_merges == ignore_merges) and all(
            [piece for piece, _ in theirs.pre_tokenize_str(text)] == pieces for text, pieces in zip(texts, cut)
        ):
            return name
    return None


def _parts(part: dict[str, Any] | None, key: str) -> list[str]:
    """The types of a part of tokenizer.json, those in a sequence one by one."""
    if part is None:
        return []
    return [kind for item in part[key] for kind in _parts(item, key)] if part["type"] == "Sequence" else [part["type"]]


# SentencePiece BPE


def _sentencepiece(
    tokenizer: Tokenizer,
    model: dict[str, Any],
    merges: list[tuple[str, ...]],
    tokens: dict[int, str],
    types: dict[int, int],
) -> dict[int, float]:
    """The scores that make llama.cpp merge in the order of ``merges``; marks the tokens of bytes in ``types``.

    It merges whichever two neighbours make the token of the highest score, so a token's merges must be all the ways to
    part it in two tokens, and come one after another: what SentencePiece's vocabularies look like in tokenizer.json.
    """
    vocab = model["vocab"]
    for byte in range(256):
        if (number := vocab.get(f"<0x{byte:02X}>")) is None:
            raise _unlike(tokenizer, f"byte_fallback without a token for byte {byte}")
        types[number] = BYTE
    if (unknown := vocab.get(model.get("unk_token"))) is not None:
        types[unknown] = UNKNOWN
    scores: dict[int, float] = {}
    last = None
    for rank, (left, right) in enumerate(merges):
        number = vocab[left + right]
        # Gemma's runs of spaces take turns with those of line ends and tabs, which never meet them.
        if number != last and number in scores and types[number] == NORMAL and tokens[number].strip(SPACE):
            raise _unlike(tokenizer, f"merges that make {tokens[number]!r} at two places in their order")
        scores.setdefault(number, -float(rank))
        last = number
    known = set(merges)
    for token, number in vocab.items():
        if types[number] == NORMAL:
            for cut in range(1, len(token)):
                pair = token[:cut], token[cut:]
                # It begins with letters, those that are no tokens too.
                if pair not in known and all(part in vocab or len(part) == 1 for part in pair):
                    raise _unlike(tokenizer, f"{token!r} is not merged from {pair[0]!r} and {pair[1]!r}")
    return scores


def _adds_space(tokenizer: Tokenizer) -> bool:
    """Whether a text, and what follows a special token, is read with a space before it."""
    backend = tokenizer._backend
    texts = ["a", " a", "  a  b ", "\na b", "1\t2", "Ａﬁ①é", "e\u0301", "a.b, c!", "\u00a0x", "中 文"]

    def pieces(text: str) -> list[str]:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        return [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]

    found = [pieces(text) for text in texts]
    for prefix in (False, True):
        if found == [[(SPACE if prefix else "") + text.replace(" ", SPACE)] for text in texts]:
            return prefix
    shown = ", ".join(repr(part) for part in (backend.normalizer, backend.pre_tokenizer) if part is not None)
    raise _unlike(tokenizer, f"spaces treated in another way than SentencePiece does ({shown[:160]})")


# --- Reading ----------------------------------------------------------------------------------------------------------


class Vocabulary:
    """A tokenizer rebuilt from the key-values of a GGUF file alone, as llama.cpp rebuilds it.

    But for one thing: llama.cpp takes some spellings, "</s>" and "<|im_end|>" among them, for control tokens in every
    vocabulary that has them, so where they are ordinary tokens (Qwen 3 has such a "</s>") it gives a text that spells
    them out other ids.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """``fields``: the key-values of the file, of which the byte-level and the SentencePiece BPE are read."""

        def get(key: str, default: Any = None) -> Any:
            return fields.get(f"tokenizer.ggml.{key}", default)

        self.tokens: list[str] = get("tokens")
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        self._before = [get("bos_token_id")] if get("add_bos_token") else []
        self._after = [get("eos_token_id")] if get("add_eos_token") else []
        kinds = get("token_type")
        marked = [token for token, kind in zip(self.tokens, kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
        self._marked = sorted(marked, key=lambda token: -len(token.encode()))
        self._scores: list[float] | None = None
        self._space = get("add_space_prefix", True)
        if get("model") == "llama":
            self._scores = get("scores")
        else:
            name = get("pre", "default")
            way = SPLITTINGS[ALIASES.get(name, name)]
            merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
            self._bpe = Backend(models.BPE(vocab=self._ids, merges=merges, ignore_merges=way.ignore_merges))
            self._bpe.pre_tokenizer = pre_tokenizer(way)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids that llama.cpp gives ``text``, special tokens in it read as such; ``add_special``: with BOS and EOS
        around it where the file says so."""
        ids: list[int] = []
        for part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
            elif self._scores is None:
                ids += self._bpe.encode(part).ids
            else:
                ids += self._merge((SPACE if self._space else "") + part.replace(" ", SPACE), self._scores)
        return [*self._before, *ids, *self._after] if add_special else ids

    def _parts(self, text: str) -> list[str | int]:
        """``text`` cut at its special tokens, the longest of them first."""
        parts: list[str | int] = [text] if text else []
        for token in self._marked:
            if token not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                first, *rest = part.split(token)
                cut.append(first)
                for piece in rest:
                    cut += (self._ids[token], piece)
            parts = [part for part in cut if part != ""]
        return parts

    def _merge(self, text: str, scores: list[float]) -> list[int]:
        """SentencePiece BPE: of all neighbours that make a token, the highest score first, then the leftmost."""
        pieces: list[str | None] = list(text)
        after = [*range(1, len(text)), -1]
        before = [*range(-1, len(text) - 1)]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                whole = f"{pieces[left]}{pieces[right]}"
                if (number := self._ids.get(whole)) is not None:
                    heapq.heappush(queue, (-scores[number], left, right, whole))

        for i in range(len(text) - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, whole = heapq.heappop(queue)
            if pieces[left] is None or pieces[right] is None or f"{pieces[left]}{pieces[right]}" != whole:
                continue  # one of the two was merged with another neighbour since
            pieces[left], pieces[right] = whole, None
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        ids: list[int] = []
        for piece in pieces:
            if piece is not None and piece in self._ids:
                ids.append(self._ids[piece])
            elif piece is not None:
                ids += [self._ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        return ids


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file that :func:`write_vocabulary` wrote. Its ``encode(text)`` gives a list of ids."""
    return Vocabulary(GGUFFile(path).fields)


def compare_vocabulary(path: Path, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Return how many ``texts`` have the same ids by ``tokenizer`` and by the GGUF file ``path``: all of them.

    Raises ValueError with the text and both ids at the first that differ. Where the tokenizer brings texts into
    Unicode's composed form (NFC), as Qwen's do, they are compared in that form: llama.cpp takes a text as it is.
    """
    vocabulary = read_vocabulary(path)
    composes = "NFC" in str(tokenizer._backend.normalizer)
    count = 0
    for text in texts:
        text = unicodedata.normalize("NFC", text) if composes else text
        ours, theirs = tokenizer.encode(text), vocabulary.encode(text)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            shown = text if len(text) <= 200 else text[:197] + "..."
            found = f"from token {at} on, {ours[at : at + 8]} by the tokenizer, {theirs[at : at + 8]} by the file"
            raise ValueError(f"{path}: the ids of {shown!r} differ: {found}")
        count += 1
    return count
