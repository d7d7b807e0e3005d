"""The reviews of `afina demo sentiment`: balanced, each sentence once, none in both files; and their recipe."""

from __future__ import annotations

import json
from collections import Counter

from conftest import REPO

from afina.engine.train_config import TrainConfig
from afina.loaders.weights.package_index import MODELS

FOLDER = REPO / "afina" / "data" / "sentiment"


def test_rows() -> None:
    seen: set[str] = set()
    for name, count in (("train", 220), ("dev", 60)):
        rows = [json.loads(line)["messages"] for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert Counter(answer["content"] for _, answer in rows) == {"positive": count // 2, "negative": count // 2}
        questions = [question["content"].partition("\n\n") for question, _ in rows]
        assert {ask for ask, _, _ in questions} == {"Is this review positive or negative? Answer with one word."}
        sentences = {sentence for _, _, sentence in questions}
        assert len(sentences) == count
        assert not sentences & seen
        seen |= sentences


def test_recipe() -> None:
    config = TrainConfig.resolve(FOLDER / "recipe.yaml")
    assert config.model in MODELS
    assert config.method == "lora"
    for path in (config.data, config.val_file):
        assert path is not None
        assert (REPO / path).is_file()
