"""Make the customer-support set in ``afina/data/support`` from the phrase bank beside this file.

    python examples/support/make_data.py [--output FOLDER] [--seed N]

Every answer of an intent gets the same number of rows. A question is an opening, a body with its products and
condition, and a closing, sometimes in a hurried style; training bodies are reworded with synonyms. Dev rows use bodies,
openings and closings that no training row uses, and a dev question that still shares too many words with a training
question is drawn again. The same seed gives the same bytes on every Python version.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from making import Draw, overlap, words, write_jsonl  # noqa: E402

PACKAGED = HERE.parent.parent / "afina" / "data" / "support"

TRAIN_ROWS_PER_ANSWER = 54
DEV_ROWS_PER_ANSWER = 4
# Largest share of words (intersection over union) that a dev question may have in common with any training question.
MAX_OVERLAP = 0.60

CONTRACTIONS = {
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "cannot": "can't", "I am": "I'm", "I would": "I'd",
    "has not": "hasn't", "was not": "wasn't", "is not": "isn't", "What is": "What's",
}  # fmt: skip
SHORT_FORMS = {"please": "pls", "Please": "Pls", "thanks": "thx", "Thanks": "Thx", "you": "u", "are": "r", "and": "&"}


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    intent: str
    body: str  # the template it was made from


def fill(template: str, bank: dict[str, Any], split: str, condition: str, draw: Draw) -> str:
    """Put products and the condition into a body; a condition without a slot becomes a sentence beside the body."""
    # Dev rows mix in the training products, so that a dev question is not recognised by its product.
    products = bank["products"]["train"] + (bank["products"]["dev"] * 3 if split == "dev" else [])
    first = draw.one(products)
    text = template.replace("{p}", first).replace("{q}", draw.one([p for p in products if p != first]))
    if "{c}" in text:
        text = text.replace("{c}", condition)
    elif condition:
        text = f"{condition} {text}" if draw.chance(0.4) else f"{text} {condition}"
    return articled(text)


def reworded(text: str, synonyms: list[list[str]], draw: Draw) -> str:
    """Replace some phrases by synonyms, keeping a capital at the beginning."""
    lines = {phrase.lower(): line for line in synonyms for phrase in line}
    known = "|".join(re.escape(phrase) for phrase in sorted(lines, key=len, reverse=True))

    def replacement(match: re.Match[str]) -> str:
        found = match[0]
        if not draw.chance(0.5):
            return found
        other = draw.one(lines[found.lower()])
        return other[0].upper() + other[1:] if found[0].isupper() else other

    return articled(re.sub(rf"(?<!\w)(?:{known})(?!\w)", replacement, text, flags=re.IGNORECASE))


def articled(text: str) -> str:
    """Put "a" or "an" right."""
    text = re.sub(r"\b([aA]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"\b([aA])n (?=[^aeioh\W])(?!um)", r"\1 ", text)


def dress(text: str, bank: dict[str, Any], split: str, draw: Draw) -> str:
    """Add an opening and a closing to a body, either of which may be absent, and sometimes a hurried style."""
    if draw.chance(0.45):
        opening = draw.one(bank["openings"][split])
        if not opening.endswith((".", "?")) and not re.match(r"I\b", text):
            text = text[0].lower() + text[1:]
        text = f"{opening} {text}"
    if draw.chance(0.35):
        text = f"{text} {draw.one(bank['closings'][split])}"
    style = draw.index(100)
    if style < 12:
        text = text.lower().rstrip(".")
    elif style < 26:
        text = replace_words(text, CONTRACTIONS)
    elif style < 33:
        text = replace_words(text, SHORT_FORMS)
    elif style < 36:
        text = misspell(text, draw)
    return text


def replace_words(text: str, table: dict[str, str]) -> str:
    for long, short in table.items():
        text = re.sub(rf"\b{long}\b", short, text)
    return text


def misspell(text: str, draw: Draw) -> str:
    """Swap two inner letters of one word of six letters or more."""
    long_words = [match.span() for match in re.finditer(r"[A-Za-z]{6,}", text)]
    if not long_words:
        return text
    start, end = long_words[draw.index(len(long_words))]
    at = start + 1 + draw.index(end - start - 3)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def answers_of(intent: dict[str, Any], bank: dict[str, Any], split: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each answer of an intent with the conditions that ask for it ([""] where there is only one answer)."""
    if "by" not in intent:
        yield intent["answer"], [""]
        return
    for key, answer in intent["answers"].items():
        conditions = bank["conditions"][intent["by"]][key]
        yield answer, conditions["train"] + (conditions["dev"] * 3 if split == "dev" else [])


def questions(bank: dict[str, Any], split: str, per_answer: int, avoid: list[Question], draw: Draw) -> list[Question]:
    """Draw ``per_answer`` different questions for every answer, none too close to a question in ``avoid``."""
    seen = {words(question.text) for question in avoid}
    made: list[Question] = []
    for intent in bank["intents"]:
        for answer, conditions in answers_of(intent, bank, split):
            bodies: list[str] = []
            rows = 0
            while rows < per_answer:
                bodies = bodies or draw.shuffled(intent[split])
                body = reworded(bodies[-1], bank["synonyms"], draw) if split == "train" else bodies[-1]
                text = dress(fill(body, bank, split, draw.one(conditions), draw), bank, split, draw)
                bag = words(text)
                if bag in seen or (split == "dev" and any(overlap(bag, other) > MAX_OVERLAP for other in seen)):
                    continue
                seen.add(bag)
                made.append(Question(text, answer, intent["name"], bodies.pop()))
                rows += 1
    return draw.shuffled(made)


def make(seed: int = 7) -> dict[str, list[Question]]:
    """The whole set: {"train": [...], "dev": [...]} in a shuffled order."""
    bank = yaml.safe_load((HERE / "phrases.yaml").read_text(encoding="utf-8"))
    draw = Draw(seed)
    train = questions(bank, "train", TRAIN_ROWS_PER_ANSWER, [], draw)
    return {"train": train, "dev": questions(bank, "dev", DEV_ROWS_PER_ANSWER, train, draw)}


def write(output: Path, seed: int = 7) -> None:
    """Write ``train.jsonl`` and ``dev.jsonl``, one ``{"messages": [...]}`` row a line."""
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in make(seed).items():
        write_jsonl(
            output / f"{split}.jsonl",
            (
                {"messages": [{"role": "user", "content": q.text}, {"role": "assistant", "content": q.answer}]}
                for q in rows
            ),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the customer-support set from its phrase bank.")
    parser.add_argument("--output", type=Path, default=PACKAGED, help="folder to write (default: the package's own)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    write(arguments.output, arguments.seed)
