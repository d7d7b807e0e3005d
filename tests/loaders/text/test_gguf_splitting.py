"""The ways of splitting words that GGUF files know by name."""

from __future__ import annotations

import pytest

from afina.loaders.text.gguf_splitting import ALIASES, SPLITTINGS, pre_tokenizer


def test_every_splitting_has_another_answer() -> None:
    assert len(set(SPLITTINGS.values())) == len(SPLITTINGS)


def test_aliases_lead_to_a_splitting() -> None:
    assert set(ALIASES.values()) <= SPLITTINGS.keys()
    assert not ALIASES.keys() & SPLITTINGS.keys()


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", "iPad|'s|Ġ1234|!?|ĠĠ|Ġx|Ċ"),
        ("smollm", "iPad|'s|Ġ|1|2|3|4|!?|ĠĠ|Ġx|Ċ"),
        ("llama-bpe", "iPad|'s|Ġ|123|4|!?|ĠĠ|Ġx|Ċ"),
        ("qwen2", "iPad|'s|Ġ|1|2|3|4|!?|ĠĠ|Ġx|Ċ"),
        ("falcon", "iPad|'|s|Ġ|123|4|!?|ĠĠ|Ġx|Ċ"),
        ("ufakzeka", "iPad|'s|Ġ|1|2|3|4|!?|ĠĠ|Ġx|Ċ"),
        ("minicpm5", "iPad|'s|Ġ|123|4|!?|ĠĠ|Ġx|Ċ"),
        ("tekken", "i|Pad|'s|Ġ|1|2|3|4|!?|ĠĠ|Ġx|Ċ"),
        ("gpt-4o", "i|Pad's|Ġ|123|4|!?|ĠĠ|Ġx|Ċ"),
        ("deepseek-v3", "iPad|'s|Ġ|123|4|!?|ĠĠ|Ġx|Ċ"),
        ("deepseek-coder", "iPad|'|s|Ġ|1|2|3|4|!?|ĠĠ|Ġx|Ċ"),
    ],
)
def test_pieces(name: str, pieces: str) -> None:
    found = pre_tokenizer(SPLITTINGS[name]).pre_tokenize_str("iPad's 1234!?   x\n")
    assert "|".join(piece for piece, _ in found) == pieces


def test_the_letters_of_deepseek() -> None:
    """It splits words of letters that have cases from others, and then, by a slip of its own, ASCII from the rest."""
    found = pre_tokenizer(SPLITTINGS["deepseek-llm"]).pre_tokenize_str("éÖאא ღdéx、。")
    assert [place for _, place in found] == [(0, 2), (2, 5), (5, 6), (6, 7), (7, 8), (8, 9), (9, 11)]
