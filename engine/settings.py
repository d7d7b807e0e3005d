"""Settings as fields of frozen dataclasses: each carries its documentation and the values it takes.

The same fields check a Python keyword, a recipe's line and a flag, and make the flag's help; there is no second list.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any

from afina.errors import ConfigError, nearest

Limit = tuple[str, Callable[[Any], bool]]
POSITIVE: Limit = ("above 0", lambda v: v > 0)
NOT_NEGATIVE: Limit = ("0 or more", lambda v: v >= 0)
FRACTION: Limit = ("from 0 to 1", lambda v: 0 <= v <= 1)
INNER_FRACTION: Limit = ("above 0 and below 1", lambda v: 0 < v < 1)
BETA: Limit = ("from 0 to below 1", lambda v: 0 <= v < 1)
RATE: Limit = ("above 0 and at most 1", lambda v: 0 < v <= 1)
ALPHA: Limit = ("above 0 and at most 1e6", lambda v: 0 < v <= 1e6)
SEED: Limit = ("from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63)
PENALTY: Limit = ("from -2 to 2", lambda v: -2 <= v <= 2)
BIASES: Limit = ("with numbers from -100 to 100", lambda v: all(-100 <= x <= 100 for x in v.values()))
TOP_LOGPROBS: Limit = ("from 0 to 20", lambda v: 0 <= v <= 20)
LENGTH: Limit = ("2 or more", lambda v: v >= 2)
DEVICE: Limit = ("auto, cpu, cuda or cuda:N", lambda v: re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", v) is not None)

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SYNONYMS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def setting(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    limit: Limit | None = None,
) -> Any:
    """A dataclass field with its documentation, its other names and the values it takes."""
    metadata = {"help": help, "aliases": aliases, "choices": choices, "limit": limit}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


class TokenBiases(dict[int, float]):
    """The type by which ``kinds`` tells numbers of tokens from columns, which are a dict too."""


class Settings:
    """Base of a frozen dataclass of settings: values are checked and take their field's type when it is made."""

    def __post_init__(self) -> None:
        owner: type = type(self)
        for name in fields(owner):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked(owner, name, value, name))


@cache
def fields(owner: type) -> dict[str, dataclasses.Field[Any]]:
    """The settings of a dataclass by name."""
    return {f.name: f for f in dataclasses.fields(owner)}


@cache
def kinds(owner: type) -> dict[str, type]:
    """The type of each setting (str, int, float, bool, dict, TokenBiases, tuple), without its "or None"."""
    found = {}
    for name, hint in typing.get_type_hints(owner).items():
        if typing.get_origin(hint) is types.UnionType:
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        found[name] = TokenBiases if hint == dict[int, float] else typing.get_origin(hint) or hint
    return found


def checked(owner: type, name: str, value: Any, where: str) -> Any:
    """``value`` in the type of the setting ``name``; ConfigError, beginning with ``where``, if it cannot be."""
    kind, metadata = kinds(owner)[name], fields(owner)[name].metadata
    choices, limit = metadata["choices"], metadata["limit"]
    if isinstance(value, bool) and "true" in choices:  # as YAML and Python write it
        value = str(value).lower()
    try:
        value = _CONVERT[kind](value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{where} is {_shown(value)}; expected {_EXPECTED[kind]}") from None
    if choices:
        value = SYNONYMS.get(value, value)
        if value not in choices:
            raise ConfigError(f"{where} is {_shown(value)}; expected {', '.join(choices)}{nearest(value, choices)}")
    if limit and not limit[1](value):
        expected = limit[0] if kind is str else f"{_EXPECTED[kind]} {limit[0]}"
        raise ConfigError(f"{where} is {_shown(value)}; expected {expected}")
    return value


def flag_help(owner: type, name: str) -> dict[str, str]:
    """The ``help`` and ``metavar`` of argparse for a setting."""
    f, kind = fields(owner)[name], kinds(owner)[name]
    shown = ",".join(f.default) if isinstance(f.default, tuple) else str(f.default).lower()
    default = "" if f.default in (None, ()) or issubclass(kind, dict) else f" [{shown}]"
    also = f"; also {', '.join(f.metadata['aliases'])}" if f.metadata["aliases"] else ""
    metavar = {int: "N", float: "X", dict: "PAIRS", TokenBiases: "PAIRS", bool: "BOOL", tuple: "TEXT"}.get(
        kind, name.upper()
    )
    return {
        "help": (f.metadata["help"] + default + also).replace("%", "%%"),
        "metavar": "|".join(f.metadata["choices"]) or metavar,
    }


def to_yaml(values: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """A recipe of ``values``, one or more lines a setting, and above a setting its note as a comment."""
    import yaml

    parts = []
    for name, value in values.items():
        if name in notes:
            parts.append(f"# {notes[name]}\n")
        parts.append(yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True))
    return "".join(parts)


# A short repr, also of nested YAML aliases that would write out to gigabytes.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong = 2, 60, 60
_shown = _SHORT.repr


def _to_text(value: Any) -> str:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise TypeError
    return str(value)


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError
    return word in TRUE_WORDS


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError
    return number


def _to_texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError
    return texts


def _to_columns(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
        if len(value) != len(pairs):
            raise ValueError
    if not isinstance(value, dict) or not all(isinstance(t, str) and t for pair in value.items() for t in pair):
        raise ValueError
    return dict(value)


def _to_biases(value: Any) -> dict[int, float]:
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {token.strip(): number.strip() for token, _, number in parts}
        if len(value) != len(parts):
            raise ValueError
    if not isinstance(value, Mapping):
        raise TypeError
    found = {_to_int(token): _to_float(number) for token, number in value.items()}
    if len(found) != len(value) or any(token < 0 for token in found):
        raise ValueError
    return found


_CONVERT: dict[type, Callable[[Any], Any]] = {
    str: _to_text, bool: _to_bool, float: _to_float, int: _to_int, dict: _to_columns, tuple: _to_texts,
    TokenBiases: _to_biases,
}  # fmt: skip
_EXPECTED = {
    str: "text",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    dict: "pairs like prompt=question,completion=answer",
    tuple: "texts that are not empty",
    TokenBiases: "token ids and numbers like 42=-100,7=2.5",
}
