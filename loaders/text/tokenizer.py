"""Text to token ids and back, the special tokens, the chat template, and training a new byte-level BPE.

A :class:`Tokenizer` is made of the files it was loaded from (`tokenizer.json`, or GPT-2's `vocab.json` and
`merges.txt`, with their configs) and saves the very same bytes, so other libraries read back the same tokenizer.
The work itself is done by the `tokenizers` library. No file is ever executed or unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from afina.durable import open_file
from afina.errors import DataError, TokenizerError, nearest
from afina.inside import open_own
from afina.loaders.jsonfile import MAX_BYTES, parse_json, show
from afina.loaders.text.backend_checks import longest_text, problem_of
from afina.loaders.text.chat_template import ChatTemplate
from afina.loaders.text.own_templates import DEFAULT_TEMPLATE
from afina.loaders.text.regex_check import Unbounded
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.peft import find_base, is_adapter

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# The letter that byte-level tokenizers write for each byte: printable ones as they are, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_LETTERS = {byte: chr(byte) for byte in _PRINTABLE}
BYTE_LETTERS |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in BYTE_LETTERS)}
MAX_ID = 1 << 31  # no vocabulary comes near it
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
# What WordPiece's way of decoding leaves too many spaces around, as transformers mends it, in this order.
_SPACED: tuple[tuple[str, str], ...] = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
)
_SPACED += ((" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
_KEEP_NFC = ("None", "NFC()", "Sequence(normalizers=[])")  # normalizers that leave a text in NFC as it is
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


def tokenizer_place(source: str | Path) -> Path:
    """Where the tokenizer of a model lies: a folder, or a GGUF file. Raises WeightsError for a model that is not there.

    A folder that holds tokenizer files and no model (no config.json) is accepted too. An adapter without any has its
    base's.
    """
    place = Path(source)
    if not place.is_dir() or not any((place / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        place = resolve(source)
        if is_adapter(place) and not (place / "tokenizer.json").is_file():
            place = find_base(place)[1]
    return place


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer whose files lie in ``folder``. Raises TokenizerError.

    The other form of a vocabulary is neither read nor, by that, copied to where the tokenizer is saved.
    """
    files: dict[str, bytes] = {}
    unused = ("vocab.json", "merges.txt") if (folder / "tokenizer.json").is_file() else ()
    for name in (*FILES, "config.json"):
        path = folder / name
        if name not in unused and path.is_file():
            try:
                with open_own(path, error=TokenizerError) as file:
                    files[name] = file.read(MAX_BYTES + 1)
            except OSError as problem:
                raise TokenizerError(f"{path}: cannot be read ({problem.strerror}): check its permissions") from problem
            if len(files[name]) > MAX_BYTES:
                raise TokenizerError(f"{path}: is larger than {MAX_BYTES:,} bytes, too large for a tokenizer file")
    return Tokenizer(files, str(folder))


class Tokenizer:
    """A tokenizer with its special tokens and chat template. ``files``: name -> content; ``where``: for messages.

    Attributes: ``bos_id`` (int or None), ``eos_token`` (str or None), ``eos_ids`` (every id that ends a text or an
    assistant turn), ``special_ids`` (control tokens), ``vocab_size`` (largest id + 1), ``adds_bos`` (whether a text
    starts with BOS), ``chat_template`` (its own source, or None where the built-in default serves).
    """

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        self.where = where
        self._files = {name: files[name] for name in FILES if name in files}
        config = self._config = self._json("tokenizer_config.json")
        names = self._json("special_tokens_map.json") | config
        self._backend = self._build(config)
        self._register(config, names)
        if (found := problem_of(self._backend)) is not None:
            raise self._error("tokenizer.json", f"{found}: download it again")
        try:
            self._longest = longest_text(self._backend)
        except Unbounded as problem:
            raise self._error("tokenizer.json", f"{problem}: use the tokenizer of another model") from problem
        self._model_config = [
            parse_json(files[name], f"{where}/{name}", error=TokenizerError)
            for name in ("generation_config.json", "config.json")
            if name in files
        ]
        self.bos_token = self._boundary("bos_token", names)
        self.eos_token = self._boundary("eos_token", names)
        self.bos_id = self.token_id(self.bos_token)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = {i for i, token in added.items() if token.special}
        # Longest first, so that a token that starts another one is not cut out of it.
        specials = sorted((added[i].content for i in self.special_ids), key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._breaks = {token: broken for token in specials if (broken := _broken(token)) is not None}
        self._breakable = re.compile("|".join(map(re.escape, self._breaks)) or r"(?!)")
        # Such a token is found in the text as the normalizer leaves it, so in other spellings too.
        folds = any(added[i].normalized for i in self.special_ids)
        self._folds = folds and self._backend.normalizer is not None
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        # A file keeps the padding and truncation of the last call before it was saved. They are no part of a text's
        # ids, and the probe for what is put around a text would not find it inside padding.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._prefix, self._suffix = self._surroundings(config)
        self.adds_bos = self.bos_id is not None and self._prefix[:1] == [self.bos_id]
        # Offsets are needed exactly as the text has them, and HF's post-processors trim spaces off them.
        self._backend.post_processor = None
        # For a BPE the setting means nothing: its spaces are those of the text.
        bpe = isinstance(self._backend.model, models.BPE)
        self._mends_spaces = bool(config.get("clean_up_tokenization_spaces")) and not bpe
        self.byte_level = any("ByteLevel" in repr(x) for x in (self._backend.normalizer, self._backend.pre_tokenizer))
        self._missing_bytes, self._drops_characters = self._unspellable()
        self._spelt: set[str] = set()  # characters that were looked at and have tokens
        self._names = {key: text for key in _NAMED if (text := _content(names.get(key))) is not None}
        self._names |= {"bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}
        self.chat_template = self._own_template(config)

    # Building

    def _json(self, name: str) -> dict[str, Any]:
        data = self._files.get(name)
        return parse_json(data, f"{self.where}/{name}", error=TokenizerError) if data is not None else {}

    def _error(self, name: str, found: str) -> TokenizerError:
        return TokenizerError(f"{self.where}/{name}: {found}")

    def _try(self, name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call into `tokenizers`; what it raises about the file ``name`` becomes a TokenizerError."""
        try:
            return function(*arguments, **keywords)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as problem:  # it raises bare Exception, and pyo3's PanicException, no Exception at all
            reason = " ".join(str(problem).split())[:200]
            raise self._error(name, f"cannot be used as a tokenizer ({reason}): download it again") from problem

    def _build(self, config: dict[str, Any]) -> tokenizers.Tokenizer:
        if "tokenizer.json" in self._files:
            data = self._files["tokenizer.json"]
            return self._try("tokenizer.json", tokenizers.Tokenizer.from_buffer, data)
        if not {"vocab.json", "merges.txt"} <= self._files.keys():
            found = ", ".join(self._files) or "no tokenizer file"
            raise TokenizerError(
                f"{self.where}: found {found}, expected tokenizer.json, or vocab.json with merges.txt "
                "(a tokenizer.model can be converted with transformers: AutoTokenizer...save_pretrained)"
            )
        kind = config.get("tokenizer_class")
        if kind not in (None, *_GPT2_CLASSES):
            raise TokenizerError(
                f"{self.where}: vocab.json and merges.txt of a {kind}, whose way of splitting words is not known here: "
                "add its tokenizer.json (transformers writes it with save_pretrained)"
            )
        merges = []
        for number, line in enumerate(self._files["merges.txt"].decode("utf-8", "replace").split("\n"), 1):
            if line.strip() and not line.startswith("#version"):
                left, _, right = line.rstrip("\r").partition(" ")
                if not left or not right or " " in right:
                    raise self._error("merges.txt", f"line {number}: found {line[:80]!r}, expected two tokens")
                merges.append((left, right))
        model = self._try("vocab.json with merges.txt", models.BPE, vocab=self._json("vocab.json"), merges=merges)
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
        backend.decoder = decoders.ByteLevel()
        return backend

    def _register(self, config: dict[str, Any], names: dict[str, Any]) -> None:
        """Tell the backend of the added and special tokens that only the config names."""
        backend = self._backend
        known = backend.get_added_tokens_decoder()
        listed = config.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            raise self._error("tokenizer_config.json", "added_tokens_decoder is not an object")
        for key in sorted(listed, key=lambda text: int(text) if text.isdecimal() and len(text) < 10 else -1):
            content = _content(listed[key]) if isinstance(listed[key], dict) else None
            if content is None or not key.isdecimal() or len(key) > 9:
                raise self._error(
                    "tokenizer_config.json", f"added_tokens_decoder[{show(key)}]: expected an id with a token"
                )
            flags = {f: bool(listed[key].get(f, False)) for f in ("lstrip", "rstrip", "single_word", "special")}
            token = AddedToken(content, normalized=bool(listed[key].get("normalized", not flags["special"])), **flags)
            old = known.get(int(key))
            if old is None or repr(old) != repr(token):
                (backend.add_special_tokens if flags["special"] else backend.add_tokens)([token])
            if backend.token_to_id(content) != int(key):
                found = f"gives {show(content)} the id {key}, the vocabulary gives it {backend.token_to_id(content)}"
                mend = "the files are of different tokenizers: download them again"
                raise self._error("tokenizer_config.json", f"added_tokens_decoder {found}: {mend}")
        if not listed:  # transformers, too, reads the older file only then
            values = self._json("added_tokens.json")
            for content, value in sorted(values.items(), key=lambda item: item[1] if type(item[1]) is int else -1):
                if backend.token_to_id(content) is None:
                    backend.add_tokens([content])
                if backend.token_to_id(content) != value:
                    raise self._error("added_tokens.json", f"{show(content)} cannot have the id {show(value)}")
        if "tokenizer.json" not in self._files:
            names.setdefault("eos_token", "<|endoftext|>")
            names.setdefault("bos_token", names["eos_token"])
        lists = [list(value.values()) if isinstance(value, dict) else value for value in map(names.get, _LISTED)]
        listing = [item for value in lists if isinstance(value, list) for item in value]
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        for item in [*(names.get(key) for key in _NAMED), *listing]:
            content = _content(item)
            if content and (number := backend.token_to_id(content)) is not None and number not in special:
                backend.add_special_tokens([AddedToken(content, normalized=False, special=True)])

    def _boundary(self, name: str, names: dict[str, Any]) -> str | None:
        """The text of bos_token or eos_token: as named, else as the model's config gives its id."""
        token = _content(names.get(name))
        if token is not None:
            if self._backend.token_to_id(token) is None:
                hint = nearest(token, [t.content for t in self._backend.get_added_tokens_decoder().values()])
                found = f"{name} {show(token)} is not in the vocabulary{hint}"
                raise self._error(
                    "tokenizer_config.json", f"{found}: correct it, or use the model's own tokenizer files"
                )
            return token
        for config in self._model_config:
            for number in _ids(config.get(f"{name}_id")):
                if (text := self._backend.id_to_token(number)) is not None:
                    return str(text)
        return None

    def _surroundings(self, config: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The ids that come before and after every text when special tokens are asked for."""
        if "tokenizer.json" not in self._files:  # beside it, transformers leaves these two settings unread
            before = [self.bos_id] if config.get("add_bos_token") and self.bos_id is not None else []
            end = self.token_id(self.eos_token)
            return before, [end] if config.get("add_eos_token") and end is not None else []
        bare, full = (self._try("tokenizer.json", self._backend.encode, "a", None, False, x).ids for x in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:at], full[at + len(bare) :]

    def _own_template(self, config: dict[str, Any]) -> str | None:
        if "chat_template.jinja" in self._files:
            try:
                source: Any = self._files["chat_template.jinja"].decode("utf-8")
            except UnicodeDecodeError as problem:
                found = f"byte {problem.start} is not UTF-8: save the file as UTF-8"
                raise self._error("chat_template.jinja", found) from problem
        else:
            source = config.get("chat_template")
        if isinstance(source, list | dict):
            named = source if isinstance(source, dict) else {t.get("name"): t.get("template") for t in _dicts(source)}
            if "default" not in named:
                found = ", ".join(map(show, list(named)[:5]))
                raise self._error("tokenizer_config.json", f"of the chat templates {found} none is named 'default'")
            source = named["default"]
        if source is not None and not isinstance(source, str):
            raise self._error("tokenizer_config.json", "chat_template is not a text")
        return source if source is not None and source != self._default_template() else None

    def _default_template(self) -> str:
        return "{{ bos_token }}" * self.adds_bos + DEFAULT_TEMPLATE

    def _unspellable(self) -> tuple[bytes, bool]:
        """The bytes for which a byte-level BPE has no token, and whether another BPE may lack tokens for characters.

        The backend leaves both out of a text without a word, where no token stands for what is unknown.
        """
        model = self._backend.model
        if not isinstance(model, models.BPE) or model.unk_token is not None:
            return b"", False
        if self.byte_level:
            letters = {byte: BYTE_LETTERS[byte] for byte in range(256)}
            return bytes(byte for byte, letter in letters.items() if self.token_id(letter) is None), False
        affixes = model.continuing_subword_prefix or model.end_of_word_suffix
        return b"", not affixes and not (model.byte_fallback and self._falls_back(bytes(range(256))))

    def _falls_back(self, data: bytes) -> bool:
        return all(self.token_id(f"<0x{byte:02X}>") is not None for byte in data)

    # Text to ids and back

    def token_id(self, token: str | None) -> int | None:
        """The id of a token, or None where the vocabulary has none."""
        return None if token is None else self._backend.token_to_id(token)

    def token(self, number: int) -> str | None:
        """The token of an id as the vocabulary spells it, or None where there is none."""
        return self._backend.id_to_token(number)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the ids of ``text``; ``add_special`` puts what the tokenizer's files ask for around it (BOS, say)."""
        return self.encode_batch([text], add_special=add_special)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """Return the ids of many texts, encoded in parallel. DataError for half characters (lone surrogates)."""
        rows = [encoding.ids for encoding in self.encodings(texts)]
        return [[*self._prefix, *ids, *self._suffix] for ids in rows] if add_special else rows

    def encodings(self, texts: Sequence[str], *, offsets: bool = False) -> list[tokenizers.Encoding]:
        """Return the backend's encodings without added tokens; ``offsets``: with each token's place in its text."""
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        try:
            joined = "".join(texts)
            data = joined.encode()  # native code would say less about what it cannot take
        except UnicodeEncodeError as problem:
            raise DataError("a text holds half a character (a lone surrogate): mend it in the data") from problem
        if self._longest and (longest := max(map(len, texts), default=0)) > self._longest:
            raise DataError(
                f"a text of {longest:,} characters: a regular expression in {self.where}/tokenizer.json takes the "
                f"square of a text's length, so at most {self._longest:,} are read: split the text"
            )
        # One pass in native code over all the bytes: next to nothing beside encoding them.
        if (self._missing_bytes and len(data.translate(None, self._missing_bytes)) < len(data)) or (
            self._drops_characters and not self._spelt.issuperset(joined)
        ):
            self._check_spelling(texts)
        return self._try("tokenizer.json", encode, texts, add_special_tokens=False)

    def byte_sizes(self) -> list[int] | None:
        """How many bytes of a text in NFC each id stands for, or None where the id alone does not say it: it does of a
        byte-level BPE that leaves such a text as it is."""
        backend, added = self._backend, self._backend.get_added_tokens_decoder()
        if (
            not (isinstance(backend.model, models.BPE) and self.byte_level)
            or repr(backend.normalizer) not in _KEEP_NFC
            or any(token.lstrip or token.rstrip for token in added.values())  # spaces beside it are its own
        ):
            return None
        vocab = backend.get_vocab(with_added_tokens=False)
        if backend.model.unk_token is not None and not vocab.keys() >= set(BYTE_LETTERS.values()):
            return None
        sizes = [0] * self.vocab_size
        for token, number in vocab.items():
            sizes[number] = len(token)
        for number, known in added.items():
            sizes[number] = len(known.content.encode())
        probe = "a b"  # some put a space before a text
        return sizes if sum(sizes[number] for number in self.encode(probe, add_special=False)) == len(probe) else None

    def _check_spelling(self, texts: Sequence[str]) -> None:
        """Raise DataError for the first character that the vocabulary has no tokens for."""
        added = sorted((t.content for t in self._backend.get_added_tokens_decoder().values()), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        for text in texts:
            for character in dict.fromkeys(pattern.sub("", text)):
                if character in self._spelt:
                    continue
                if not self._spells(character):
                    at = text.index(character)
                    found = f"no token for {character!r} (U+{ord(character):04X})"
                    shown = f"in {text[max(0, at - 20) : at + 21]!r} it would be left out"
                    raise DataError(f"{self.where}: {found}: {shown}: remove it from the data")
                self._spelt.add(character)

    def _spells(self, character: str) -> bool:
        """Whether nothing of a character is lost but what the normalizer and the pre-tokenizer take off."""
        backend = self._backend
        text = backend.normalizer.normalize_str(character) if backend.normalizer is not None else character
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else text
        letters = set("".join(pieces))
        known = {letter for letter in letters if self.token_id(letter) is not None}
        return letters == known or (backend.model.byte_fallback and self._falls_back("".join(letters - known).encode()))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of ``ids``, without the control tokens if ``skip_special``; ids without a token have none.

        TokenizerError for what is no id at all.
        """
        try:
            numbers = [index(i) for i in ids]
        except TypeError as problem:
            raise TokenizerError(f"{self.where}: token ids are whole numbers ({problem})") from problem
        if wrong := [i for i in numbers if not 0 <= i < MAX_ID]:
            raise TokenizerError(f"{self.where}: {show(wrong[0])} is no token id")
        text: str = self._try("tokenizer.json", self._backend.decode, numbers, skip_special_tokens=skip_special)
        for spaced, mended in _SPACED if self._mends_spaces else ():
            text = text.replace(spaced, mended)
        return text

    # Chat

    @cached_property
    def template(self) -> ChatTemplate:
        """The compiled chat template, the tokenizer's own or the default."""
        if self.chat_template is None and self.eos_token is None:
            raise TokenizerError(f"{self.where}: no chat template and no eos_token: set one in tokenizer_config.json")
        source = self.chat_template if self.chat_template is not None else self._default_template()
        return ChatTemplate(source, self.where, self._names)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation; ``add_generation_prompt`` opens the assistant's next turn.

        ``tools``: the functions that the model may call, as JSON schemas. The text holds its special tokens, exactly
        one BOS where the tokenizer uses one, so it is encoded with ``add_special=False``. A control token spelt inside
        a message or a tool is broken with a space ("< |im_end|>"): they are data, and none may end its own turn.
        """
        text = self.template.render(
            self.checked(messages), tools=self.unmarked(tools), add_generation_prompt=add_generation_prompt
        )
        return self.with_bos(text, glue="")

    def checked(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return ``messages`` with the control tokens in their texts broken. DataError when they are no messages."""
        clean: list[Mapping[str, Any]] = []
        for number, message in enumerate(messages, 1):
            content = message.get("content")
            calls = message.get("tool_calls")
            if not isinstance(message.get("role"), str) or not (
                isinstance(content, str) or (content is None and calls)
            ):
                raise DataError(f"message {number}: role and content must be texts")
            if calls:
                message = {**message, "content": content, "tool_calls": _with_objects(calls, number)}
            if content and (broken := self.broken(content)) != content:
                message = {**message, "content": broken}
            if len(message) > 2:
                others = {key: self.unmarked(item) for key, item in message.items() if key not in ("role", "content")}
                message = {**message, **others}
            clean.append(message)
        if not clean:
            raise DataError("messages is empty: expected a list of {role, content}")
        return clean

    def unmarked(self, value: Any) -> Any:
        """Return ``value``, a text or what JSON can hold, with the control tokens in its texts :meth:`broken`."""
        if isinstance(value, str):
            return self.broken(value)
        if isinstance(value, Mapping):
            return {self.unmarked(key): self.unmarked(item) for key, item in value.items()}
        return [self.unmarked(item) for item in value] if isinstance(value, list | tuple) else value

    def broken(self, text: str) -> str:
        """Return ``text`` with a space in every control token that is spelt in it: it is read as none then."""
        # What is left may spell another token, of those that overlap or hold a space.
        while (left := self._breakable.sub(lambda match: self._breaks[match[0]], text)) != text:
            text = left
        while self._folds:
            found = self._backend.encode(text, add_special_tokens=False)
            places = [place for i, place in zip(found.ids, found.offsets) if i in self.special_ids]
            cuts = [end - len(text[start:end].lstrip()) + 1 for start, end in places if text[start:end].strip()[1:]]
            if not cuts:
                break
            cuts = sorted(set(cuts))
            text = " ".join([text[start:end] for start, end in zip([0, *cuts], [*cuts, None])])
        return text

    def with_bos(self, text: str, *, glue: str | None = None) -> str:
        """Return ``text`` with exactly one BOS in front if the tokenizer's texts start with one."""
        bos = self.bos_token
        if not bos or not self.adds_bos:
            return text
        start = 0
        while text.startswith(bos, start):
            start += len(bos)
        text = text[start:]
        return bos + (self._glue if glue is None and text[:1] != " " else "") + text

    @cached_property
    def _glue(self) -> str:
        # Some (Metaspace) tokenizers mark a first word as if a space came before it, but not after a BOS that stands
        # in the text; a space there gives the same ids.
        ids = self.encode("a")[1:]
        texts = [f"{self.bos_token}a", f"{self.bos_token} a"]
        plain, spaced = self.encode_batch(texts, add_special=False)
        return " " if plain[1:] != ids and spaced[1:] == ids else ""

    @cached_property
    def eos_ids(self) -> list[int]:
        """Every id that ends a text or an assistant turn, sorted: of the tokenizer, the model, the chat template."""
        ids = {self.token_id(self.eos_token)} - {None}
        for config in self._model_config:
            ids |= {number for number in _ids(config.get("eos_token_id")) if number < self.vocab_size}
        turn_end = ""
        with contextlib.suppress(TokenizerError):  # a template that no conversation will go through, and says so then
            turn_end = self.template.turn_end if self.chat_template is not None else ""
        if end := self.special_pattern.search(turn_end):
            ids.add(self.token_id(end[0]))
        return sorted(i for i in ids if i is not None)

    # Files

    def fingerprint(self) -> str:
        """SHA-256 of the files that decide the ids and the text of a conversation."""
        digest = hashlib.sha256()
        for name, data in sorted(self._files.items()):
            if name != "generation_config.json":
                digest.update(f"{name} {len(data)}\n".encode() + data)
        digest.update(repr((self.bos_token, self.eos_token, self.chat_template or self._default_template())).encode())
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """What :meth:`save` writes: the files it was loaded from, byte for byte, the default chat template where they
        have none, and in generation_config.json the ids that end generation."""
        files = dict(self._files)
        if self.chat_template is None and self.eos_token is not None:
            files["chat_template.jinja"] = self._default_template().encode()
        if "tokenizer_config.json" not in files and "tokenizer.json" not in files:
            names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": self.bos_token, "eos_token": self.eos_token}
            files["tokenizer_config.json"] = _dump(names)
        generation = self._json("generation_config.json")
        if sorted(_ids(generation.get("eos_token_id"))) != self.eos_ids:
            generation["eos_token_id"] = self.eos_ids if len(self.eos_ids) != 1 else self.eos_ids[0]
            files["generation_config.json"] = _dump(generation)
        return files

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into ``folder``, for Afina and transformers alike. Raises OSError."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            with open_file(folder / name) as file:
                file.write(data)


def check_vocab(tokenizer: Tokenizer, embedding_rows: int) -> None:
    """Raise TokenizerError when the tokenizer has ids that a model with ``embedding_rows`` embeddings lacks."""
    if tokenizer.vocab_size > embedding_rows:
        over = [i for i in range(embedding_rows, tokenizer.vocab_size) if tokenizer.token(i) is not None]
        some = ", ".join(f"{tokenizer.token(i)!r} ({i})" for i in over[:5]) + (", ..." if len(over) > 5 else "")
        raise TokenizerError(
            f"{tokenizer.where}: {len(over)} tokens have no row among the model's {embedding_rows} embeddings: {some}: "
            "use the tokenizer that came with the model"
        )


def _broken(token: str) -> str | None:
    """A token with a space in it, or None where no space keeps it from being read: it is a single character, say."""
    # Between two characters that are no spaces, so that breaking again and again comes to an end.
    places = sorted(range(1, len(token)), key=lambda i: " " in token[i - 1 : i + 1])
    return next((broken for i in places if token not in (broken := f"{token[:i]} {token[i:]}")), None)


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) and value else None


def _with_objects(calls: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, of the JSON texts that OpenAI's are. Raises DataError."""
    found = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            arguments = None
        if not isinstance(arguments, Mapping) or not isinstance(function, Mapping) or "name" not in function:
            raise DataError(f"message {number}: a tool call must be {{function: {{name, arguments}}}}, with an object")
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _dicts(values: list[Any]) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)]


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < MAX_ID]


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
