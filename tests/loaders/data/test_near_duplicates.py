"""Near-duplicates: brute force finds the same; numbers and short answers decide, what all rows have does not."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import numpy as np
import pytest

from afina.loaders.data.near_duplicates import NearDuplicates, Pairs, Texts, kept_rows

WORDS = [a + b + c for a in ("ka", "mo", "ri", "tu", "le") for b in ("n", "st", "l", "rg") for c in ("a", "ing", "o")]


def near(rows: list[tuple[str, str]], **settings: object) -> dict[tuple[int, int], float]:
    with Texts() as texts:
        for prompt, answer in rows:
            texts.add(prompt, answer)
        pairs = NearDuplicates(texts.select(np.arange(len(rows))), **settings).pairs()  # type: ignore[arg-type]
        assert (pairs.later > pairs.earlier).all()
        return {(int(a), int(b)): round(float(s), 3) for a, b, s in zip(*pairs)}


def sentence(rng: random.Random, words: int = 14) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@cache
def pieces_of(text: str) -> frozenset[str]:
    return frozenset(text[i : i + 5] for i in range(len(text) - 4))


def jaccard(one: str, other: str, common: set[str]) -> float:
    """The lesser of two indices: with the common pieces, and without (with all of them where there are no others)."""
    ours, theirs = pieces_of(one), pieces_of(other)
    rare = (ours - common or ours, theirs - common or theirs)
    return min(len(a & b) / len(a | b) for a, b in ((ours, theirs), rare))


@pytest.mark.parametrize("words", [600, 60])
def test_brute_force_finds_the_same(words: int) -> None:
    """With few words nearly all pieces are common, and what is left of two rows may be equal by chance."""
    rng = random.Random(3)
    vocabulary = [f"{a}{b}" for a in WORDS for b in ("", *"abcdefghi")][:: 600 // words]
    rows: list[tuple[str, str]] = []
    for _ in range(150):
        if rows and rng.random() < 0.3:
            text = list(rng.choice(rows)[0].split())
            for _ in range(rng.randint(1, 3)):
                text[rng.randrange(len(text))] = rng.choice(vocabulary)
            rows.append((" ".join(text), ""))
        else:
            rows.append((" ".join(rng.choice(vocabulary) for _ in range(20)), ""))
    rows = list(dict.fromkeys(rows))
    pieces = Counter(p for text, _ in rows for p in pieces_of(text))
    common = {piece for piece, count in pieces.items() if count > 0.1 * len(rows)}
    expected = {
        (later, earlier): value
        for later in range(len(rows))
        for earlier in range(later)
        if (value := jaccard(rows[later][0], rows[earlier][0], common)) >= 0.8
    }
    found = near(rows)
    assert len(expected) > 5
    assert found == {pair: round(value, 3) for pair, value in expected.items()}
    assert near(rows, seed=1) == found


def test_case_and_white_space_are_nothing() -> None:
    assert near([("What  is\nIT?", "A Café"), ("what is it?", "a café")]) == {(1, 0): 1.0}


def test_numbers_must_agree() -> None:
    text = "The pass is valid for {} days from the day on which you bought it at the counter of the station."
    assert near([(text.format(3), "yes"), (text.format(5), "yes")]) == {}
    assert near([(text.format(3), "yes"), (text.format(3) + ".", "yes")]) != {}


def test_prompts_and_answers_are_each_alike() -> None:
    rng = random.Random(0)
    prompt, answer, other = sentence(rng, 30), sentence(rng, 30), sentence(rng, 30)
    assert near([(prompt, answer), (prompt, answer + "!")]) != {}
    assert near([(prompt, answer), (prompt, other)]) == {}
    assert near([(prompt, answer), (other, answer)]) == {}


def test_a_short_answer_must_be_the_same() -> None:
    prompt = sentence(random.Random(0))
    assert near([(prompt, "category electronics, phones"), (prompt + "?", "category electronics, phone")]) == {}
    assert near([(prompt, "Category electronics, phones"), (prompt + "?", "category electronics, phones")]) != {}


def test_an_instruction_in_every_row_makes_nothing_alike() -> None:
    rng = random.Random(1)
    instruction = "Classify the sentiment of the following review of a film. Answer with one word and nothing else.\n\n"
    rows = [(instruction + sentence(rng, 5), rng.choice(["positive", "negative"])) for _ in range(200)]
    assert len(set(rows)) == 200
    assert near(rows) == {}
    rows.append((rows[7][0] + "!", rows[7][1]))
    assert list(near(rows)) == [(200, 7)]


@pytest.mark.parametrize("text", ["", "a", "ab", "日本", "😀😀😀"])
def test_texts_of_any_length(text: str) -> None:
    assert near([(text, ""), (text, ""), ("something else entirely", "")]) == {(1, 0): 1.0}
    assert near([(text, "")]) == {}
    assert near([]) == {}


def test_a_flood_of_one_row_is_found_whole() -> None:
    """Of many rows in one bucket not all pairs are compared; each is still paired with one before it."""
    rng = random.Random(2)
    base = sentence(rng, 40).split()
    rows = []
    for _ in range(60):
        words = list(base)
        words[rng.randrange(len(words))] = "zzz"
        rows.append((" ".join(words), ""))
    letters = "abcdefghijklmnopqrstuvwxyz"
    others = [(" ".join("".join(rng.choices(letters, k=6)) for _ in range(20)), "") for _ in range(1200)]
    found = near(others + rows)
    assert {later for later, _ in found} == set(range(1201, 1260))


def test_what_is_kept() -> None:
    """Row 2 is near row 1 only, which is left out for row 0: it stays."""
    pairs = Pairs(np.array([1, 2, 4]), np.array([0, 1, 3]), np.ones(3, np.float32))
    assert kept_rows(5, pairs).tolist() == [-1, 0, -1, -1, 3]
