"""loaders/text/regex_check.py: published expressions pass, and what takes any time does not."""

from __future__ import annotations

import json
import time

import pytest
import real_files
from tokenizers import Regex, normalizers, pre_tokenizers

from afina.errors import DataError, TokenizerError
from afina.loaders.text import regex_check
from afina.loaders.text import tokenizer as ours
from afina.loaders.text.gguf_splitting import SPLITTINGS
from afina.loaders.text.regex_check import SECONDS, Unbounded, longest_for
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.train_bpe import train_bpe

pytestmark = pytest.mark.usefixtures("own_cache")
# As their tokenizer.json have them, where llama.cpp's names have not.
PUBLISHED = {
    "GPT-4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "CodeGen": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "a class within a class": r"[[:alpha:]&&[^a]]+|[^[:alpha:]]",
    "looking around": r"(?<=[.,])(?=[^,.])",
    "possessive and lazy": r"\p{L}++|\d{1,3}?|\s*+",
}
HOSTILE = {
    "a repetition of a repetition": r"(a+)+$",
    "alternatives": r"(a|a)*c",
    "alternatives of other lengths": r"(a|ab)*c",
    "with an option inside": r"(\p{L}+\s?)*!",
    "alternatives in a row": r"(?:a|a)" * 24 + "b",
    "behind a look": r"(?=(a+)+b)",
    "bounds in bounds": r"((a{1,30}){1,30}){1,30}b",
    "a bound of what varies": r"(?:a{0,9}){9}b",
    "twenty options": r"([ab]?){20}c",
    "nine options in a row": r"a?a?a?a?a?a?a?a?a?b",
    "a reference": r"(.*)\1x",
    "a call": r"(?<n>a)\g<n>",
    "a condition": r"(?(1)a|b)",
    "a large bound": r"a{1,100000}",
    "the third power": r"a*a*a*b[^c]",
    "the third power of what is found first": r"a*[ab]*c|.",
    "what stands at the end": r".*.*.*=.*",
}


@pytest.mark.parametrize("pattern", HOSTILE.values(), ids=HOSTILE)
def test_hostile_expressions_are_refused_in_seconds(pattern: str) -> None:
    started = time.thread_time()
    with pytest.raises(Unbounded):
        longest_for(pattern)
    assert time.thread_time() - started < 5


@pytest.mark.parametrize("name", SPLITTINGS)
def test_the_ways_of_splitting_that_gguf_files_name(name: str) -> None:
    """DeepSeek LLM's takes the square of a run of spaces, which is bounded where nobody has so many."""
    found = [longest_for(pattern) for pattern in SPLITTINGS[name].patterns]
    assert all(longest is None or (name == "deepseek-llm" and longest > 20_000) for longest in found)


@pytest.mark.parametrize("pattern", PUBLISHED.values(), ids=PUBLISHED)
def test_published_expressions(pattern: str) -> None:
    assert longest_for(pattern) is None


# Digits grouped from the right, as some tokenizers do; what looks for a digit behind every word.
SQUARES = (r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)", r"\p{L}*\d|.")


def with_part(**changes: dict[str, object]) -> ours.Tokenizer:
    files = train_bpe(["a b a b"] * 4, 262, ["</s>"], "</s>").files()
    content = json.loads(files["tokenizer.json"]) | changes
    return ours.Tokenizer({**files, "tokenizer.json": json.dumps(content).encode()}, "folder")


def split(pattern: str) -> dict[str, object]:
    return json.loads(pre_tokenizers.Split(Regex(pattern), "isolated").__getstate__())


@pytest.mark.parametrize("pattern", SQUARES)
def test_the_square_is_taken_of_short_texts_only(pattern: str) -> None:
    longest = longest_for(pattern)
    assert longest is not None
    tokenizer = with_part(pre_tokenizer={"type": "Sequence", "pretokenizers": [split(pattern), split("b")]})
    started = time.thread_time()
    for text in ("1" * longest, "a" * longest):
        tokenizer.encode_batch([text[: longest // 8]])
    assert time.thread_time() - started < SECONDS  # a part of that
    with pytest.raises(DataError, match=rf"a text of {longest + 1:,} characters: .* so at most {longest:,} are read"):
        tokenizer.encode_batch(["a", "a" * (longest + 1)])


def test_only_what_took_no_square_is_known_to_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = PUBLISHED["CodeGen"] + "|kept"
    regex_check.longest_for.cache_clear()
    assert longest_for(pattern) is None
    regex_check.longest_for.cache_clear()
    monkeypatch.setattr(regex_check, "_square_seconds", lambda _: 0.1)
    assert longest_for(pattern) is None
    for seconds in (0.1, 0.2):  # each process measures it
        monkeypatch.setattr(regex_check, "_square_seconds", lambda _, seconds=seconds: seconds)
        regex_check.longest_for.cache_clear()
        assert longest_for(SQUARES[0]) == int(2048 * (SECONDS / seconds) ** 0.5)
    regex_check.longest_for.cache_clear()


def test_a_core_that_others_slow_down_makes_no_square_of_what_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def slowed(_: object, text: str, plenty: float) -> float:
        nonlocal calls
        calls += 1
        return len(text) * 1e-6 * (6 if calls % 3 == 0 else 1)

    monkeypatch.setattr(regex_check, "_seconds", slowed)
    assert regex_check._square_seconds("a|b") == 0
    assert calls > 100
    monkeypatch.setattr(regex_check, "_seconds", lambda _, text, plenty: 1e-9 * len(text) ** 2)
    assert regex_check._square_seconds("a|b") == pytest.approx(1e-9 * 2048**2, rel=0.1)


def test_wherever_a_tokenizer_has_it() -> None:
    assert with_part(pre_tokenizer=split(r"\p{L}+")).encode("a" * 100_000)
    replace = json.loads(normalizers.Replace(Regex("(a+)+b"), "x").__getstate__())
    for part in ({"normalizer": replace}, {"pre_tokenizer": split("(a+)+b")}, {"decoder": replace}):
        (name,) = part
        with pytest.raises(
            TokenizerError, match=rf"tokenizer.json: the regular expression '\(a.* of its {name} may take"
        ):
            with_part(**part)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3_1", "deepseek_v3"])
@pytest.mark.slow
def test_real_tokenizers_pass(name: str) -> None:
    folder = real_files.tokenizer_folder(name)
    assert load_tokenizer(str(folder))._longest is None
