"""The built-in customer-support set: made by its script, held-out wordings, one answer for each need."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
PACKAGED = REPO / "afina" / "data" / "support"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", REPO / "examples" / "support" / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(maker: ModuleType) -> dict[str, list]:
    return maker.make()


@pytest.fixture(scope="module")
def bank() -> dict:
    return yaml.safe_load((REPO / "examples" / "support" / "phrases.yaml").read_text(encoding="utf-8"))


def rows(split: str) -> list[tuple[str, str]]:
    """(question, answer) of every packaged row."""
    pairs = []
    for line in (PACKAGED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        user, assistant = row["messages"]
        assert set(row) == {"messages"}
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        pairs.append((user["content"], assistant["content"]))
    return pairs


def test_the_script_makes_the_packaged_bytes(maker: ModuleType, tmp_path: Path) -> None:
    maker.write(tmp_path)
    for name in ("train.jsonl", "dev.jsonl"):
        assert (tmp_path / name).read_bytes() == (PACKAGED / name).read_bytes()


def test_no_dev_question_is_a_near_copy(maker: ModuleType) -> None:
    train = [maker.words(question) for question, _ in rows("train")]
    dev = [maker.words(question) for question, _ in rows("dev")]
    nearest = sorted(max(maker.overlap(question, other) for other in train) for question in dev)
    assert nearest[-1] <= maker.MAX_OVERLAP <= 0.6
    assert nearest[len(nearest) // 2] <= 0.4


def test_dev_holds_out_whole_bodies_openings_and_closings(bank: dict, made: dict[str, list]) -> None:
    train_bodies, dev_bodies = ({q.body for q in made[split]} for split in ("train", "dev"))
    assert not {b.lower() for b in train_bodies} & {b.lower() for b in dev_bodies}
    for part in ("openings", "closings"):
        train, dev = ({phrase.strip(".,!?").lower() for phrase in bank[part][split]} for split in ("train", "dev"))
        assert not train & dev
    for intent in bank["intents"]:
        assert len(set(intent["train"])) >= 12
        assert len(set(intent["dev"])) >= 4
        assert set(intent["train"]) <= train_bodies
        assert len(set(intent["dev"]) & dev_bodies) >= 4


def test_size_balance_and_answers(made: dict[str, list]) -> None:
    train, dev = rows("train"), rows("dev")
    assert len(train) >= 1000
    assert len(dev) >= 150
    assert sum((PACKAGED / f"{s}.jsonl").stat().st_size for s in ("train", "dev")) < 600_000
    questions = [question for question, _ in train + dev]
    assert len(set(questions)) == len(questions)
    counts = Counter(answer for _, answer in train)
    assert len(set(counts.values())) == 1
    assert set(counts) == {answer for _, answer in dev}
    for answer in counts:
        assert 15 <= len(answer.split()) <= 35
        assert answer[-1] == "."
    assert len({q.intent for q in made["train"]}) >= 20


def test_a_question_has_no_unfilled_slot_and_no_wrong_article() -> None:
    for question, _ in rows("train") + rows("dev"):
        assert "{" not in question
        assert "  " not in question
        assert question == question.strip()
        assert not any(f" a {vowel}" in question.lower() for vowel in ("apron", "umbrella", "oil lamp", "oak "))


def test_conditions_decide_the_answer(bank: dict, made: dict[str, list]) -> None:
    """For intents with two answers, every question holds a condition of its own answer and none of the other."""

    def plain(text: str) -> str:
        return f" {' '.join(re.findall('[a-z]+', text.lower()))} "

    for intent in bank["intents"]:
        if "by" not in intent:
            continue
        group = bank["conditions"][intent["by"]]
        phrases = {
            intent["answers"][key]: {plain(p) for p in [*values["train"], *values["dev"]]}
            for key, values in group.items()
        }
        whole = [q for q in made["train"] + made["dev"] if q.intent == intent["name"]]
        found = [{answer for answer, some in phrases.items() if any(p in plain(q.text) for p in some)} for q in whole]
        assert not [q.text for q, answers in zip(whole, found) if answers - {q.answer}]
        # Misspellings and contractions hide some of the conditions from this plain comparison.
        assert sum(map(bool, found)) >= 0.8 * len(whole), intent["name"]
