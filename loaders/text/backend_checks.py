"""What a tokenizer.json may not ask of the `tokenizers` library: it does as it is told, and dies if memory ends.

A normalizer (or decoder) of a few hundred bytes can multiply a text a million-fold, a post-processor can put ids around
a text that no embedding has, and a regular expression can take hours (`regex_check.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

from afina.loaders.text.regex_check import Unbounded, longest_for

MAX_GROWTH = 64  # times that a normalizer or decoder may make a text longer; those of published models stay below 4
MAX_AROUND = 64  # ids that a post-processor may put around a text


def problem_of(backend: tokenizers.Tokenizer) -> str | None:
    """What is wrong with a tokenizer's parts, or None."""
    for name in ("normalizer", "decoder"):
        growth = _growth(_state(getattr(backend, name)))
        if growth > MAX_GROWTH:
            return f"its {name} makes a text {growth:,.0f} times as long, expected at most {MAX_GROWTH}"
    around = list(_ids(_state(backend.post_processor)))
    if len(around) > MAX_AROUND:
        return f"its post_processor puts {len(around):,} ids around a text, expected at most {MAX_AROUND}"
    for number in around:
        if backend.id_to_token(number) is None:
            return f"its post_processor puts the id {number} around a text, which the vocabulary has not"
    return None


def longest_text(backend: tokenizers.Tokenizer) -> int | None:
    """How many characters a text may have, where the regular expressions of a tokenizer take their square; else None.
    Raises Unbounded for an expression that may take more, with its place and the beginning of it."""
    longest: int | None = None
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for pattern in _patterns(_state(getattr(backend, name))):
            try:
                found = longest_for(pattern)
            except Unbounded as problem:
                raise Unbounded(
                    f"the regular expression {pattern[:60]!r} of its {name} may take any time ({problem})"
                ) from problem
            longest = found if longest is None else min(longest, found or longest)
    return longest


def _patterns(state: Any) -> Iterator[str]:
    """The regular expressions in a part of a tokenizer."""
    if isinstance(state, dict):
        if isinstance(pattern := state.get("Regex"), str):
            yield pattern
        state = list(state.values())
    if isinstance(state, list):
        for item in state:
            yield from _patterns(item)


def _state(part: Any) -> Any:
    return json.loads(part.__getstate__()) if part is not None else None


def _growth(state: Any) -> float:
    """How many times as long a text of many characters can become."""
    if not isinstance(state, dict):
        return 1.0
    total = 1.0
    for inner in (*state.get("normalizers", ()), *state.get("decoders", ())):
        total *= _growth(inner)
    if state.get("type") == "Replace":
        found = state.get("pattern", {}).get("String")
        # A regular expression may match nothing, and so between any two characters.
        shortest, more = (len(found), 0) if found else (1, 1)
        total *= max(1.0, len(state.get("content", "")) / shortest + more)
    return total


def _ids(state: Any) -> Iterator[int]:
    """The ids that a post-processor names."""
    if not isinstance(state, dict):
        return
    for inner in state.get("processors", ()):
        yield from _ids(inner)
    if state.get("type") in ("BertProcessing", "RobertaProcessing"):
        yield from (state["cls"][1], state["sep"][1])
    if state.get("type") == "TemplateProcessing":
        special = state["special_tokens"]
        named = [item["SpecialToken"]["id"] for item in (*state["single"], *state["pair"]) if "SpecialToken" in item]
        for name in {*special, *named}:
            yield from special[name]["ids"]
        if len(named) > MAX_AROUND:
            yield from special[named[0]]["ids"] * len(named)
