"""JSON from files that others wrote: bounded, strict, and every refusal is one line with its place."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, ConfigError
from afina.inside import open_own

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100
_short.maxlevel = 1
show = _short.repr  # repr() for names and values from files: one line, bounded


class DuplicateKeyError(ValueError):
    """An object has two values under one key, of which readers take one or the other."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {show(key)} is given twice in one object")
        self.key = key


class NotFiniteError(ValueError):
    """A number is NaN, infinite or out of range."""

    def __init__(self, literal: str) -> None:
        super().__init__(f"{show(literal)} is not a finite number")
        self.literal = literal


def finite(literal: str) -> float:
    """The number that a JSON literal stands for. Raises NotFiniteError for NaN, the infinities and 1e999."""
    value = float(literal)
    if not math.isfinite(value):
        raise NotFiniteError(literal)
    return value


def strict_decoder(
    parse_int: Callable[[str], int] | None = None, parse_float: Callable[[str], float] = finite
) -> json.JSONDecoder:
    """A decoder that refuses what JSON readers differ on: DuplicateKeyError, NotFiniteError, json.JSONDecodeError."""
    return json.JSONDecoder(
        object_pairs_hook=_unique, parse_int=parse_int, parse_float=parse_float, parse_constant=finite
    )


def has_half_characters(value: Any) -> bool:
    """Whether a decoded value holds lone surrogates, which a \\u escape can write and no encoding can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return result


def read_json(path: str | Path, *, error: type[AfinaError] = ConfigError, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in a UTF-8 file of a folder (a byte-order mark is accepted).

    Raises ``error`` (one line with the file and, where it can be told, the line) when the file is missing, unreadable,
    over ``max_bytes``, a link out of its folder (`afina/inside.py`), not UTF-8 or not an object, and for what JSON
    readers differ on: duplicate keys, NaN and Infinity, numbers out of range, lone surrogates, nesting deeper than
    MAX_DEPTH.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path}: no such file: check the path, or download the model again")
    try:
        with open_own(path, error=error) as file:
            data = file.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}): check its permissions") from problem
    if len(data) > max_bytes:
        raise error(f"{path}: is larger than {max_bytes:,} bytes, too large for a JSON file of a model")
    return parse_json(data, str(path), error=error)


def parse_json(data: bytes, where: str, *, error: type[AfinaError] = ConfigError) -> dict[str, Any]:
    """Return the JSON object in ``data``; ``where`` opens the message of every ``error``. See :func:`read_json`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise error(f"{where}: line {line}: byte {problem.start} is not UTF-8: save the file as UTF-8") from problem

    def lines(pattern: str) -> str:
        """Say where the pattern stands: json's hooks are not told their place."""
        found: list[int] = []
        line, at = 1, 0
        for match in re.finditer(pattern, text):
            line, at = line + text.count("\n", at, match.start()), match.start()
            if line not in found[-1:]:
                found.append(line)
            if len(found) == 5:
                break
        return f"line {', '.join(map(str, found))}: " if found else ""

    try:
        value = strict_decoder().decode(text)
    except DuplicateKeyError as problem:
        place = lines(re.escape(json.dumps(problem.key, ensure_ascii=False)) + r"\s*:")
        raise error(f"{where}: {place}{problem}: keep one of them") from None
    except NotFiniteError as problem:
        place = lines(r"(?<![\w.+-])" + re.escape(problem.literal) + r"(?![\w.+-])")
        raise error(f"{where}: {place}{problem}: JSON has none, write a finite one") from None
    except json.JSONDecodeError as problem:
        found = "the file is empty" if not text.strip() else f"{problem.msg} (column {problem.colno})"
        raise error(f"{where}: line {problem.lineno}: not valid JSON: {found}") from problem
    except RecursionError:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels: write it flatter") from None
    except ValueError as problem:  # an integer of more than 4,300 digits
        raise error(f"{where}: holds an integer too long to read: write a finite, sensible number") from problem
    if not isinstance(value, dict):
        raise error(f"{where}: holds {show(value)} where a JSON object {{...}} was expected")
    if not _shallow(value):
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels: write it flatter")
    if "\\u" in text and has_half_characters(value):
        place = lines(r"(?i)\\ud[89a-f]")
        raise error(f"{where}: {place}a \\u escape is half a character: write the character itself")
    return value


def _shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in inner for item in (each.values() if isinstance(each, dict) else each)]
        if not inner:
            return True
    return False
