"""Make ``questions.jsonl``: three notes, a question, and the note that answers it, from a bank made for this project.

python examples/retrieval/make_data.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

ROWS = 300
PEOPLE = ["Anna", "Tom", "Mary", "Peter", "Jane", "Henry", "Emma", "George"]
PLACES = ["library", "market", "museum", "station", "church", "theatre", "school", "harbour"]
HOURS = ["seven", "eight", "nine", "ten", "noon", "four"]
COLOURS = ["red", "blue", "green", "white", "black", "yellow"]
TOWNS = ["London", "Paris", "Rome", "Bath", "Dover", "York"]
# A kind of fact: who or what it is about, what is said of it, the note and two ways to ask.
FACTS = [
    (PLACES, HOURS, "The {0} opens at {1}.", ("When does the {0} open?", "At what hour can I enter the {0}?")),
    (PEOPLE, TOWNS, "{0} lives in {1}.", ("Where does {0} live?", "In which town is {0} at home?")),
    (PEOPLE, COLOURS, "{0} has a {1} coat.", ("What colour is the coat of {0}?", "What kind of coat has {0}?")),
]


def conversations(seed: int = 1) -> list[dict[str, list[dict[str, str]]]]:
    draw = random.Random(seed)

    def one(bank: list[str]) -> str:
        return bank[int(draw.random() * len(bank))]

    made: dict[str, dict[str, list[dict[str, str]]]] = {}
    while len(made) < ROWS:
        notes: list[tuple[str, str]] = []
        about: set[str] = set()
        while len(notes) < 3:
            subjects, values, note, asks = FACTS[int(draw.random() * len(FACTS))]
            subject, value = one(subjects), one(values)
            if subject not in about:  # so that only one note can answer
                about.add(subject)
                notes.append((note.format(subject, value), one(list(asks)).format(subject)))
        number = int(draw.random() * 3)
        text = " ".join(f"[{i}] {note}" for i, (note, _) in enumerate(notes, 1)) + f" Question: {notes[number][1]}"
        answer = f"[{number + 1}] {notes[number][0]}"
        made[text] = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}
    return list(made.values())


def write(folder: Path) -> None:
    lines = [json.dumps(row) for row in conversations()]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
