"""Make ``train.tsv`` and ``dev.tsv``: reviews of guest houses and their sentiment: positive, negative or mixed.

    python examples/sentiment/make_data.py [--output FOLDER]

A review is two or three sentences of ``phrases.yaml``: about the room, the food, the people, the place, the nights or
the money, perhaps with one that says nothing of good or bad and one that sums up. A mixed review praises one thing and
complains of another. No sentence of a dev review stands in a training review.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from making import Draw, write_table  # noqa: E402

ROWS = {"train": 420, "dev": 90}
LABELS = ("positive", "negative", "mixed")


def review(bank: dict[str, Any], label: str, split: str, draw: Draw) -> str:
    """Sentences about different things, in an order that a guest might write."""
    aspects = draw.shuffled(bank["aspects"])
    if label == "mixed":
        sides = draw.shuffled(("positive", "negative"))
        first, second = (
            draw.one(bank["aspects"][aspect][side][split]) for aspect, side in zip(aspects, sides, strict=False)
        )
        joint = draw.one(bank["joints"][split])
        sentences = [first, joint + (second[0].lower() + second[1:] if joint and not is_name(second) else second)]
    else:
        count = 2 if draw.chance(0.7) else 1
        sentences = [draw.one(bank["aspects"][aspect][label][split]) for aspect in aspects[:count]]
    if draw.chance(0.45):
        sentences.insert(0, draw.one(bank["neutral"][split]))
    if draw.chance(0.4):
        sentences.append(draw.one(bank["verdicts"][label][split]))
    return " ".join(sentences)


def is_name(text: str) -> bool:
    """Whether a sentence keeps its capital behind a joint."""
    return text.split()[0] in ("I", "Easter")


def make(seed: int = 5) -> dict[str, list[tuple[str, str]]]:
    """{"train": [...], "dev": [...]}: (text, label), the labels in equal numbers, no text twice."""
    bank = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    draw = Draw(seed)
    made = {}
    for split, count in ROWS.items():
        rows: dict[str, str] = {}
        while len(rows) < count:
            label = LABELS[len(rows) % len(LABELS)]
            rows[review(bank, label, split, draw)] = label
        made[split] = draw.shuffled(rows.items())
    return made


def write(folder: Path) -> None:
    for split, rows in make().items():
        write_table(folder / f"{split}.tsv", ("text", "label"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the sentiment set from its phrase bank.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write (default: beside this script)")
    write(parser.parse_args().output)
