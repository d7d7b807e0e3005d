"""Make ``train.jsonl`` and ``dev.jsonl``: a shopkeeper's notes on a product, and its text in the house style.

    python examples/content/make_data.py [--output FOLDER]

The products are in ``products.yaml``; of each come several rows with other facts noted, other prices and stocks. The
house style is below, as rules that write (``house_text``) and as rules that judge (``breaches``). Dev rows are about
products that no training row knows.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from making import Draw, write_jsonl  # noqa: E402

ROWS_A_PRODUCT = {"train": 12, "dev": 6}
ASKS = {
    "train": (
        "Write the catalogue text for this product.",
        "Turn these notes into a text for our catalogue.",
        "Please write up this product in the house style.",
        "A text for the shop, from these notes:",
    ),
    "dev": ("Make a catalogue entry of these notes.", "Our usual text for this one, please."),
}
CARE = {
    "dishwasher": ("The dishwasher does it no harm.", "The dishwasher does them no harm."),
    "by hand": ("Wash it by hand.", "Wash them by hand."),
    "damp cloth": ("A damp cloth keeps it clean.", "A damp cloth keeps them clean."),
    "cool wash": ("Wash it cool.", "Wash them cool."),
    "40 degrees": ("Wash it at 40 degrees.", "Wash them at 40 degrees."),
    "60 degrees": ("Wash it at 60 degrees.", "Wash them at 60 degrees."),
    "oil": ("Oil it once a year.", "Oil them once a year."),
    "none": ("It asks for no care.", "They ask for no care."),
}
STOCK = {
    "in stock": "sent tomorrow",
    "to order": "made to order in three weeks",
    "few left": "only a few left",
    "from June": "back in June",
}
PRICES = (85, 90, 100, 110, 125)  # per cent of the usual one
# Words that the house does not use of its goods, and how long a sentence may be.
HYPE = re.compile(
    r"!|\b(?:amazing|beautiful\w*|best|delight\w*|elegant|exclusive|gorgeous|ideal|incredible|introducing|luxur\w*|must-have"
    r"|perfect\w*|premium|stunning|stylish|ultimate|unique|versatile|wonderful|you|your)\b",
    re.IGNORECASE,
)
MAX_SENTENCE_WORDS = 22


class Notes(NamedTuple):
    name: str
    several: bool
    material: str
    size: str
    care: str
    facts: tuple[str, ...]
    price: int
    stock: str


def house_text(notes: Notes) -> str:
    """Name, material and size; what it does, two facts to a sentence; its care; price and stock, and nothing else."""
    pronoun = "They" if notes.several else "It"
    facts = f"{pronoun} {' and '.join(notes.facts[:2])}."
    if len(notes.facts) > 2:
        facts += f" {pronoun} also {notes.facts[2]}."
    return (
        f"The {notes.name}: {notes.material}, {notes.size}. {facts} {CARE[notes.care][notes.several]} "
        f"{notes.price} euros, {STOCK[notes.stock]}."
    )


def breaches(text: str) -> list[str]:
    """The rules of the house style that a text breaks, whatever it says of the product."""
    text = text.strip()
    sentences = re.split(r"(?<=[.!?])\s+", text)
    broken = []
    if not re.match(r"The [A-Z][\w' ]+: [^.]*, .*", text):
        broken.append("begins with the name, a colon, material and size")
    if HYPE.search(text):
        broken.append("no praise, no exclamation mark, no talk to the reader")
    if max(len(sentence.split()) for sentence in sentences) > MAX_SENTENCE_WORDS:
        broken.append(f"no sentence above {MAX_SENTENCE_WORDS} words")
    if not any(care in sentences for pair in CARE.values() for care in pair):
        broken.append("the care in the words of the house")
    if not re.search(rf"\d+ euros, (?:{'|'.join(STOCK.values())})\.$", text):
        broken.append("ends with price and stock")
    return broken


def written_down(notes: Notes, draw: Draw) -> str:
    """The notes as a shopkeeper keeps them: name first, then the rest in any order, on lines or in one."""
    rest = [
        f"material: {notes.material}",
        f"size: {notes.size}",
        f"care: {notes.care}",
        f"price: {notes.price}",
        f"stock: {notes.stock}",
        f"notes: {', '.join(notes.facts)}",
    ]
    return draw.one(("\n", "\n", "; ")).join([f"product: {notes.name}", *draw.shuffled(rest)])


def make(seed: int = 9) -> dict[str, list[dict[str, str]]]:
    """{"train": [...], "dev": [...]}: instruction, input and output in a shuffled order."""
    bank: dict[str, Any] = yaml.safe_load((HERE / "products.yaml").read_text(encoding="utf-8"))
    draw = Draw(seed)
    made = {}
    for split, products in bank.items():
        rows: dict[str, dict[str, str]] = {}
        for line in products:
            name, material, size, care, usual, *facts = (cell.strip() for cell in line.split("|"))
            size_then = len(rows) + ROWS_A_PRODUCT[split]
            while len(rows) < size_then:
                chosen = draw.shuffled(facts)[: 3 if draw.chance(0.3) else 2]
                notes = Notes(
                    name.rstrip("+"), name.endswith("+"), material, size, care, tuple(chosen),
                    int(usual) * draw.one(PRICES) // 100, draw.one(tuple(STOCK)),
                )  # fmt: skip
                text = house_text(notes)
                asked = {"instruction": draw.one(ASKS[split]), "input": written_down(notes, draw)}
                rows[text] = {**asked, "output": text}
        made[split] = draw.shuffled(rows.values())
    return made


def write(folder: Path) -> None:
    for split, rows in make().items():
        write_jsonl(folder / f"{split}.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the content set from its products.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write (default: beside this script)")
    write(parser.parse_args().output)
