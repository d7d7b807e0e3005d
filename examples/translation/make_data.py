"""Make ``pairs.csv``: English sentences and their French translations, from a small grammar written for this project.

python examples/translation/make_data.py
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

ROWS = 300
SUBJECTS = [
    ("The cat", "Le chat"),
    ("The dog", "Le chien"),
    ("The child", "L'enfant"),
    ("The old man", "Le vieil homme"),
    ("The young woman", "La jeune femme"),
    ("My brother", "Mon frère"),
    ("My sister", "Ma sœur"),
    ("Our neighbour", "Notre voisin"),
    ("The teacher", "Le professeur"),
    ("Her father", "Son père"),
    ("The little girl", "La petite fille"),
    ("The king", "Le roi"),
]
ACTIONS = [
    ("sleeps", "dort"),
    ("sings", "chante"),
    ("eats an apple", "mange une pomme"),
    ("reads a book", "lit un livre"),
    ("drinks water", "boit de l'eau"),
    ("waits", "attend"),
    ("works", "travaille"),
    ("plays", "joue"),
    ("writes a letter", "écrit une lettre"),
    ("looks for the key", "cherche la clé"),
    ("talks", "parle"),
    ("dreams", "rêve"),
]
PLACES = [
    ("in the garden", "dans le jardin"),
    ("in the kitchen", "dans la cuisine"),
    ("at home", "à la maison"),
    ("in front of the church", "devant l'église"),
    ("under the tree", "sous l'arbre"),
    ("near the river", "près de la rivière"),
    ("on the bridge", "sur le pont"),
    ("behind the house", "derrière la maison"),
    ("at the market", "au marché"),
    ("by the window", "près de la fenêtre"),
]
TIMES = [
    ("", ""),
    ("every day", "tous les jours"),
    ("in the morning", "le matin"),
    ("today", "aujourd'hui"),
    ("at night", "la nuit"),
    ("on Sunday", "le dimanche"),
]


def sentences(seed: int = 1) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < ROWS:
        parts = [bank[int(draw.random() * len(bank))] for bank in (SUBJECTS, ACTIONS, PLACES, TIMES)]
        english, french = (" ".join(part[side] for part in parts if part[side]) + "." for side in (0, 1))
        pairs[english] = french
    return list(pairs.items())


def write(folder: Path) -> None:
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("english", "french"))
        writer.writerows(sentences())


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
