"""Make ``descriptions.jsonl``: product descriptions from a few key words, from a phrase bank written for this project.

python examples/content/make_data.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

ROWS = 240
# What it is, what it is made of, and a sentence on what it is for.
PRODUCTS = [
    ("teapot", "white china", "It keeps four cups hot for an hour"),
    ("blanket", "soft wool", "It is large enough for two"),
    ("lantern", "black iron", "It lights the garden path on summer nights"),
    ("chair", "solid oak", "It stands firm on any floor"),
    ("basket", "woven willow", "It carries a picnic for the whole family"),
    ("mirror", "clear glass", "It brings light into a small hall"),
    ("clock", "polished brass", "It tells the hour with a gentle bell"),
    ("apron", "strong linen", "It has two deep pockets"),
    ("kettle", "bright copper", "It boils water in three minutes"),
    ("vase", "blue glass", "It holds a dozen tall flowers"),
    ("bench", "grey stone", "It waits under the apple tree for tired gardeners"),
    ("bowl", "olive wood", "It is made for bread, fruit or salad"),
]
TONES = {
    "warm": (
        "Come home to our {product}, made of {material}. {use}, and it will be loved for years.",
        "Our {product} of {material} feels like an old friend. {use}, whatever the weather.",
    ),
    "plain": ("{Product} made of {material}. {use}.", "This {product} is made of {material}. {use}."),
    "grand": (
        "Behold the {product}, shaped from {material} by patient hands. {use}, and nothing less would do.",
        "There are many of its kind, but only one such {product} of {material}. {use}, as if by magic.",
    ),
}
ASKS = ["Describe this product in a {tone} tone.", "Write a {tone} product text.", "A {tone} description, please."]
PRICES = ["12", "19", "25", "30", "45", "60"]


def rows(seed: int = 1) -> list[dict[str, str]]:
    draw = random.Random(seed)
    made: dict[str, dict[str, str]] = {}
    while len(made) < ROWS:
        product, material, use = PRODUCTS[int(draw.random() * len(PRODUCTS))]
        tone, ask, price = (bank[int(draw.random() * len(bank))] for bank in (list(TONES), ASKS, PRICES))
        # The price in euros decides the wording, so that each request has one right answer.
        text = TONES[tone][int(price) > 25].format(
            product=product, Product=product.capitalize(), material=material, use=use
        )
        words = f"product: {product}; material: {material}; price: {price} euros"
        row = {"instruction": ask.format(tone=tone), "input": words, "output": f"{text} {price} euros."}
        made[row["instruction"] + words] = row
    return list(made.values())


def write(folder: Path) -> None:
    lines = [json.dumps(row) for row in rows()]
    (folder / "descriptions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
