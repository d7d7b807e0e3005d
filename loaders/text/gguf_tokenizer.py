"""A tokenizer from the vocabulary in a GGUF file.

Such a file holds the tokens with their types, and for each kind of model what llama.cpp needs besides: merges and the
name of a way to split words, or a score a token. :func:`tokenizer_from_gguf` writes the tokenizer.json that would have
given this vocabulary, so that everything else, transformers included, reads it like any other tokenizer.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from afina.errors import TokenizerError, nearest
from afina.loaders.jsonfile import show
from afina.loaders.text.chat_template import MAX_SOURCE
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

GGML = "tokenizer.ggml."
# Tokenizers of these architectures compose letters with their marks (NFC) before all else, but for those that split as
# Qwen 3.5 does. The file cannot say so.
_NFC = ("qwen2", "qwen2moe", "qwen3", "qwen3moe", "gptneox", "mpt", "olmo", "command-r")
_MODELS = ("gpt2", "llama", "gemma4", "bert", "t5")
_BOS_SPLITTINGS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
# The ids that llama.cpp takes where a file names none.
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"unknown": 100, "cls": 101, "seperator": 102, "padding": 0, "mask": 103},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
}
_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # GGUF spells it so
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}
# What ends a turn, where a file older than the keys for it leaves that to the spelling.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<turn|>", "<EOT>", "[EOT]")
_FILLER = re.compile(r"\[PAD[0-9]+\]")  # rows of the embedding that no token uses
_CONVERT = "convert the model again, or download the file again"


def tokenizer_from_gguf(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """Return the tokenizer that a GGUF file holds. ``fields``: its key-values as plain values (numeric arrays may be
    NumPy's); ``where``: the file, for messages.

    Its files, which :meth:`Tokenizer.save` writes, are a tokenizer.json, the special tokens with the chat template, and
    the ids that end a turn. The kinds of vocabulary are "gpt2" (byte-level BPE), "gemma4" (BPE with spaces spelt out),
    "llama" (SentencePiece BPE), "bert" (WordPiece) and "t5" (unigram). Raises TokenizerError, one line with the field,
    for a vocabulary that cannot be used. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    return Tokenizer(_Reader(fields, where).files(), where)


class _Reader:
    """The fields of one file, checked, and the tokenizer files made of them."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields, self._where = fields, where
        self.model = self._text("model")
        if self.model not in _MODELS:
            found = f"found {show(self.model)}{nearest(self.model, _MODELS)}, expected one of {', '.join(_MODELS)}"
            raise self._error("model", found, "save the model in safetensors with its tokenizer.json")
        self.tokens = self._tokens()
        self._rows = len(self.tokens)
        self.types = self._numbers("token_type", int) or [NORMAL] * self._rows
        if wrong := [i for i, kind in enumerate(self.types) if not 0 <= kind <= BYTE]:
            raise self._error("token_type", f"found {self.types[wrong[0]]} for token {wrong[0]}, expected 1 to {BYTE}")
        while len(self.tokens) > 1 and _FILLER.fullmatch(self.tokens[-1]):
            self.tokens.pop()
        self.vocab = {token: number for number, token in enumerate(self.tokens)}
        self.ids = self._special_ids()

    # Fields

    def _error(self, key: str, found: str, mend: str = _CONVERT) -> TokenizerError:
        name = key if key.startswith("tokenizer.") else GGML + key
        return TokenizerError(f"{self._where}: {name}: {found}: {mend}")

    def _text(self, key: str, default: str | None = None) -> str:
        value = self._fields.get(GGML + key, default)
        if not isinstance(value, str):
            raise self._error(key, f"found {'nothing' if value is None else show(value)}, expected a text")
        return value

    def _flag(self, key: str, default: bool) -> bool:
        value = self._fields.get(GGML + key, default)
        if not isinstance(value, bool):
            raise self._error(key, f"found {show(value)}, expected true or false")
        return value

    def _texts(self, key: str) -> list[str]:
        value = self._fields.get(GGML + key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            wrong = value if not isinstance(value, list) else next((x for x in value if not isinstance(x, str)), value)
            raise self._error(key, f"found {'nothing' if wrong is None else show(wrong)}, expected a list of texts")
        return value

    def _numbers(self, key: str, kind: type[int] | type[float], *, per_token: bool = True) -> list[Any]:
        """A list of numbers, or [] where the file has none."""
        value = self._fields.get(GGML + key)
        if value is None:
            return []
        values = value.tolist() if hasattr(value, "tolist") else value
        number = int if kind is int else (int, float)
        if not isinstance(values, list) or any(isinstance(x, bool) or not isinstance(x, number) for x in values):
            raise self._error(key, f"found {show(values)}, expected a list of numbers")
        if per_token and len(values) != self._rows:
            raise self._error(key, f"found {len(values):,} for {self._rows:,} tokens, expected one a token")
        return [kind(x) for x in values]

    def _tokens(self) -> list[str]:
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(self._texts("tokens"))]
        if len(set(tokens)) != len(tokens):
            first: dict[str, int] = {}
            for number, token in enumerate(tokens):
                if first.setdefault(token, number) != number:
                    found = f"found {show(token)} as token {first[token]} and as token {number}"
                    raise self._error("tokens", f"{found}, expected each once")
        return tokens

    def _special_ids(self) -> dict[str, int]:
        size, ids = len(self.tokens), {}
        defaults = _DEFAULT_IDS.get(self.model, {})
        for name in (*_NAMES, "eot", "eom"):
            key = f"{name}_token_id"
            value = self._fields.get(GGML + key)
            if value is None:
                if defaults.get(name, size) < size:
                    ids[name] = defaults[name]
            elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
                raise self._error(key, f"found {show(value)}, expected the id of one of {size:,} tokens")
            else:
                ids[name] = value
        return ids

    # The files

    def files(self) -> dict[str, bytes]:
        names = {_NAMES[name]: self.tokens[number] for name, number in self.ids.items() if name in _NAMES}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        config["clean_up_tokenization_spaces"] = self.model == "bert"
        length = self._fields.get(f"{self._fields.get('general.architecture')}.context_length")
        if isinstance(length, int) and length > 0:
            config["model_max_length"] = length
        if (template := self._chat_template()) is not None:
            config["chat_template"] = template
        files = {"tokenizer.json": self._tokenizer(), "tokenizer_config.json": config}
        if ends := self._ends():
            files["generation_config.json"] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
        try:
            return {name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()}
        except UnicodeEncodeError as problem:
            found = "found half a character (a lone surrogate), expected texts in UTF-8"
            raise TokenizerError(f"{self._where}: tokenizer.*: {found}: {_CONVERT}") from problem

    def _ends(self) -> list[int]:
        """The ids that end a text or a turn."""
        ends = [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]
        if "eot" not in self.ids:
            spelt = (self.vocab.get(token) for token in _TURN_ENDS)
            ends += [i for i in spelt if i is not None and self.types[i] == CONTROL][:1]
        if "eom" not in self.ids and (message := self.vocab.get("<|eom_id|>")) is not None:
            ends.append(message)
        return sorted(set(ends))

    def _chat_template(self) -> str | list[dict[str, str]] | None:
        """The chat template, or with others beside it, as tokenizer_config.json lists them."""
        keys = {"default": "tokenizer.chat_template"}
        named = self._fields.get("tokenizer.chat_templates")
        for name in named if isinstance(named, list) else []:
            keys[str(name)] = f"tokenizer.chat_template.{name}"
        found = {}
        for name, key in keys.items():
            source = self._fields.get(key)
            if source is None:
                continue
            if not isinstance(source, str):
                raise self._error(key, f"found {show(source)}, expected a text")
            if len(source) > MAX_SOURCE:
                size = f"found {len(source):,} characters, expected at most {MAX_SOURCE:,}"
                raise self._error(key, size, "this is no chat template: convert the model again")
            found[name] = source
        if "default" not in found:
            return None
        if len(found) == 1:
            return found["default"]
        return [{"name": name, "template": source} for name, source in found.items()]

    def _tokenizer(self) -> dict[str, Any]:
        build = {
            "gpt2": self._byte_level_bpe,
            "gemma4": self._spaced_bpe,
            "llama": self._sentencepiece,
            "bert": self._wordpiece,
            "t5": self._unigram,
        }[self.model]
        parts: dict[str, Any] = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, **build()}
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": self._added_tokens(), **parts}

    def _added_tokens(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before all else."""
        special = {i for i, kind in enumerate(self.types) if kind in (CONTROL, UNKNOWN)}
        special |= {number for name, number in self.ids.items() if name in _NAMES}
        named = str(self._fields.get("general.name")).lower()
        phi3 = "phi-3" in named or "phi3" in named  # whose tokens take the spaces after them; llama.cpp, too, asks so
        added = []
        for number, token in enumerate(self.tokens):
            if number in special or self.types[number] == USER_DEFINED:
                added.append(
                    {
                        "id": number,
                        "content": token,
                        "single_word": False,
                        "lstrip": self.model == "t5" and number == self.ids.get("mask"),
                        "rstrip": phi3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
                        "normalized": False,
                        "special": number in special,
                    }
                )
        return added

    def _around(self, before: Iterable[int], after: Iterable[int]) -> dict[str, Any] | None:
        """The post-processor that puts tokens around a text."""
        before, after = list(before), list(after)
        if not before and not after:
            return None

        def pieces(numbers: list[int], kind: int) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": self.tokens[number], "type_id": kind}} for number in numbers]

        def text(name: str, kind: int) -> dict[str, Any]:
            return {"Sequence": {"id": name, "type_id": kind}}

        single = [*pieces(before, 0), text("A", 0), *pieces(after, 0)]
        # BERT's second text has its [SEP], and not a second [CLS].
        second = [*([] if self.model == "bert" else pieces(before, 1)), text("B", 1), *pieces(after, 1)]
        tokens = {
            self.tokens[n]: {"id": self.tokens[n], "ids": [n], "tokens": [self.tokens[n]]} for n in before + after
        }
        return {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, *second],
            "special_tokens": tokens,
        }

    def _bos_and_eos(self, bos: bool, eos: bool = False) -> dict[str, Any] | None:
        asked = {"bos": self._flag("add_bos_token", bos), "eos": self._flag("add_eos_token", eos)}
        for name, add in asked.items():
            if add and name not in self.ids and GGML + f"add_{name}_token" in self._fields:
                raise self._error(f"{name}_token_id", f"found nothing, expected the id that add_{name}_token asks for")
        before, after = ([self.ids[name]] if add and name in self.ids else [] for name, add in asked.items())
        return self._around(before, after)

    # The kinds of model

    def _byte_level_bpe(self) -> dict[str, Any]:
        name = self._text("pre", "default")
        way = SPLITTINGS.get(ALIASES.get(name, name))
        if way is None:
            if name == "gemma4":
                return self._spaced_bpe()
            known = sorted([*SPLITTINGS, *ALIASES])
            found = f"found {show(name)}{nearest(name, known)}, which is no way of splitting words that is known here"
            raise self._error("pre", found, "save the model in safetensors with its tokenizer.json")
        composes = self._fields.get(NFC_KEY)
        if not isinstance(composes, bool):
            composes = str(self._fields.get("general.architecture")) in _NFC and name != "qwen35"
        model = {"vocab": self.vocab, "merges": self._merges(), "ignore_merges": way.ignore_merges}
        return {
            "normalizer": {"type": "NFC"} if composes else None,
            "pre_tokenizer": json.loads(pre_tokenizer(way).__getstate__()),
            "post_processor": self._bos_and_eos(name in _BOS_SPLITTINGS),
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", **model},
        }

    def _merges(self) -> list[tuple[str, str]]:
        merges: dict[tuple[str, str], None] = {}  # of a merge that comes twice, the first counts
        for number, merge in enumerate(self._texts("merges")):
            cut = merge.find(" ", 1)
            pair = merge[:cut], merge[cut + 1 :]
            if cut < 0 or not pair[1]:
                raise self._error("merges", f"found {show(merge)} as merge {number}, expected two tokens")
            for token in (*pair, "".join(pair)):
                if token not in self.vocab:
                    found = f"merge {number} {show(merge)} is about {show(token)}, which is not among the tokens"
                    raise self._error("merges", found)
            merges[pair] = None
        return list(merges)

    def _spaced_bpe(self) -> dict[str, Any]:
        return self._characters(self._merges(), prefix=False, bos=True)

    def _sentencepiece(self) -> dict[str, Any]:
        return self._characters(self._merges_of_scores(), prefix=self._flag("add_space_prefix", True), bos=True)

    def _characters(self, merges: list[tuple[str, str]], *, prefix: bool, bos: bool) -> dict[str, Any]:
        """A BPE over characters, with spaces spelt "▁" and tokens of bytes for characters that are no tokens."""
        space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        first = {"type": "Prepend", "prepend": SPACE}
        back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        decode = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
        if prefix:
            decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        has_bytes = all(f"<0x{byte:02X}>" in self.vocab for byte in range(256))
        unknown = self.tokens[self.ids["unknown"]] if "unknown" in self.ids else None
        model = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": has_bytes}
        return {
            "normalizer": {"type": "Sequence", "normalizers": [first, space]} if prefix else space,
            "post_processor": self._bos_and_eos(bos),
            "decoder": {"type": "Sequence", "decoders": decode},
            "model": {"type": "BPE", **model, "vocab": self.vocab, "merges": merges},
        }

    def _scores(self) -> list[float]:
        scores: list[float] = self._numbers("scores", float)
        if not scores:
            raise self._error("scores", "found nothing, expected one number a token")
        if wrong := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
            raise self._error("scores", f"found {scores[wrong[0]]} for token {wrong[0]}, expected a finite number")
        return scores

    def _merges_of_scores(self) -> list[tuple[str, str]]:
        """Every way to part a token in two others, the tokens of the highest score first: SentencePiece always merges
        whichever neighbours make the token of the highest score."""
        scores = self._scores()
        parts = {token for token, i in self.vocab.items() if self.types[i] not in (CONTROL, UNKNOWN, UNUSED, BYTE)}
        merges = []
        for token in sorted(parts, key=lambda token: (-scores[self.vocab[token]], self.vocab[token])):
            for cut in range(len(token) - 1, 0, -1):  # of the ways to part one token, the longest left part first
                left, right = token[:cut], token[cut:]
                if left in parts and right in parts:
                    merges.append((left, right))
        return merges

    def _wordpiece(self) -> dict[str, Any]:
        vocab: dict[str, int] = {}
        for token, number in self.vocab.items():
            if self.types[number] == NORMAL and not (len(token) > 2 and token[0] + token[-1] == "[]"):
                # GGUF marks the beginning of a word, BERT's files mark what goes on.
                token = token[1:] if token.startswith(SPACE) else f"##{token}"
            if vocab.setdefault(token, number) != number:
                found = f"found {show(token)} as token {vocab[token]} and as token {number}, expected each once"
                raise self._error("tokens", found)
        for name in ("cls", "seperator", "unknown"):
            if name not in self.ids:
                raise self._error(f"{name}_token_id", "found nothing, expected the id of a token")
        lower = self._flag("normalizer.lowercase", True)
        strip = self._flag("normalizer.strip_accents", lower)
        normal = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": strip, "lowercase": lower}
        words = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        return {
            "normalizer": {"type": "BertNormalizer", **normal},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": self._around([self.ids["cls"]], [self.ids["seperator"]]),
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {"type": "WordPiece", "unk_token": self.tokens[self.ids["unknown"]], **words, "vocab": vocab},
        }

    def _unigram(self) -> dict[str, Any]:
        scores = self._scores()
        if "unknown" not in self.ids:
            raise self._error("unknown_token_id", "found nothing, expected the id of a token")
        normalizers: list[dict[str, Any]] = []
        charsmap = self._numbers("precompiled_charsmap", int, per_token=False)
        if charsmap:
            blob = bytes(byte & 255 for byte in charsmap)  # signed in some files
            if len(blob) < 8 or int.from_bytes(blob[:4], "little") + 4 >= len(blob):
                found = f"found {len(blob):,} bytes that do not hold the table they begin with"
                raise self._error("precompiled_charsmap", found)
            normalizers.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()})
        if self._flag("remove_extra_whitespaces", False):
            normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
            normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        scheme = "always" if self._flag("add_space_prefix", True) else "never"
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
        vocab = [[token, score] for token, score in zip(self.tokens, scores)]
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
            "pre_tokenizer": metaspace,
            "post_processor": self._bos_and_eos(False, True),
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": self.ids["unknown"], "vocab": vocab, "byte_fallback": False},
        }
