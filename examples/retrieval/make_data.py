"""Make ``train.jsonl`` and ``dev.jsonl``: a question, five passages, and the one that answers it.

    python examples/retrieval/make_data.py [--output FOLDER]

The passages and their questions are in ``passages.yaml``. Beside the answer stand two passages of the same topic and
two of others, in a drawn order. Two of three training questions come twice, in different company. Dev rows are made of
topics of which no training row holds a passage or a question, and list the five as ``candidates`` too, which `afina
eval --task retrieve` ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from making import Draw, write_jsonl  # noqa: E402

SAME_TOPIC, OTHER_TOPICS = 2, 2
COMPANIES = {"train": (2, 2, 1), "dev": (1, 1, 1)}  # rows of a passage's questions


def row(question: str, answer: str, topic: list[str], others: list[str], draw: Draw, *, ranked: bool) -> dict[str, Any]:
    near = draw.shuffled(text for text in topic if text != answer)[:SAME_TOPIC]
    candidates = draw.shuffled([answer, *near, *draw.shuffled(others)[:OTHER_TOPICS]])
    listed = "\n".join(f"- {text}" for text in candidates)
    asked = f"Which of these passages answers the question?\n\n{listed}\n\nQuestion: {question}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "candidates": candidates} if ranked else {"messages": messages}


def make(seed: int = 11) -> dict[str, list[dict[str, Any]]]:
    """{"train": [...], "dev": [...]} in a shuffled order."""
    bank = yaml.safe_load((HERE / "passages.yaml").read_text(encoding="utf-8"))
    draw = Draw(seed)
    made = {}
    for split, topics in bank.items():
        texts = {name: [passage["text"] for passage in passages] for name, passages in topics.items()}
        rows = []
        for name, passages in topics.items():
            others = [text for other, some in texts.items() if other != name for text in some]
            rows += [
                row(question, passage["text"], texts[name], others, draw, ranked=split == "dev")
                for passage in passages
                for question, companies in zip(passage["asks"], COMPANIES[split], strict=True)
                for _ in range(companies)
            ]
        made[split] = draw.shuffled(rows)
    return made


def write(folder: Path) -> None:
    for split, rows in make().items():
        write_jsonl(folder / f"{split}.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the retrieval set from its passages.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write (default: beside this script)")
    write(parser.parse_args().output)
