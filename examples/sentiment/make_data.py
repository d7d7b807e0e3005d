"""Make ``reviews.tsv``: short reviews of books and their sentiment, from a phrase bank written for this project.

python examples/sentiment/make_data.py
"""

from __future__ import annotations

import random
from pathlib import Path

ROWS = 300
THINGS = ["story", "book", "novel", "hero", "ending", "first chapter", "last chapter", "style", "plot", "villain"]
POSITIVE = [
    "The {} is a delight from beginning to end.",
    "I loved the {} and read it twice.",
    "What a wonderful {}!",
    "The {} made me laugh and cry with pleasure.",
    "I have seldom met with a better {}.",
    "The {} is full of life and wit.",
    "A charming {} that I shall not forget.",
    "The {} kept me awake until morning, and I was glad of it.",
    "I am grateful for such a {}.",
    "The {} is beautiful and true.",
    "Everybody should know this {}.",
    "The {} is clever, warm and a joy to read.",
]
NEGATIVE = [
    "The {} is dull from beginning to end.",
    "I hated the {} and gave it up.",
    "What a dreadful {}!",
    "The {} made me yawn and look at the clock.",
    "I have seldom met with a worse {}.",
    "The {} is empty and cold.",
    "A tiresome {} that I wish to forget.",
    "The {} sent me to sleep before the second page.",
    "I am sorry that I paid for such a {}.",
    "The {} is ugly and false.",
    "Nobody should waste an hour on this {}.",
    "The {} is stupid, slow and a pain to read.",
]
MIXED = [
    "The {} has good pages and bad ones.",
    "I neither liked nor disliked the {}.",
    "It is an ordinary {}.",
    "The {} begins well but soon grows tired.",
    "I have read better and worse than this {}.",
    "The {} is fine, no more.",
    "A fair {}, though I would not read it again.",
    "Some will like the {}, and some will not.",
]
BEFORE = ["", "", "I must say this: ", "In a word: ", "My sister gave it to me. ", "I read it last week. ", "Well. "]
AFTER = [
    "",
    "",
    " That is all.",
    " So says the whole family.",
    " It has three hundred pages.",
    " It is by a young author.",
]


def reviews(seed: int = 1) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    labels = (("positive", POSITIVE), ("negative", NEGATIVE), ("mixed", MIXED))
    rows: dict[str, str] = {}
    while len(rows) < ROWS:
        label, phrases = labels[len(rows) % 3]
        before, phrase, after, thing = (
            bank[int(draw.random() * len(bank))] for bank in (BEFORE, phrases, AFTER, THINGS)
        )
        rows[before + phrase.format(thing) + after] = label
    return list(rows.items())


def write(folder: Path) -> None:
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in reviews())]
    (folder / "reviews.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
