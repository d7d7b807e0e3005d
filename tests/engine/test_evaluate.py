"""Evaluation: each token counts once whatever the batch, training is not disturbed, the metrics are the known ones."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tiny_model import LINES, tiny_model, tiny_tokenizer

from afina.engine.evaluate import (
    answer_of,
    classification,
    evaluate_loss,
    evaluate_task,
    exact_match,
    loss_text_bytes,
)
from afina.engine.generate import generate_batch
from afina.engine.model import GPT
from afina.errors import DataError
from afina.loaders.data.dataset import TokenSet, prepare
from afina.loaders.text.render import Example
from afina.loaders.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def token_set(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """Rows whose answers have from 2 to about 60 tokens."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": LINES[i % 4][: 5 + i], "completion": " x" * (1 + i * i % 41)} for i in range(23)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(
        folder / "rows.jsonl", tokenizer, max_length=96, val_size=0.0, cache_dir=folder / "cache", progress=False
    ).train


def test_the_loss_is_the_mean_over_tokens_of_the_plain_loss(model: GPT, token_set: TokenSet) -> None:
    losses: list[float] = []
    for number in range(len(token_set)):
        ids, loss_mask = token_set.row(number)
        with torch.no_grad():
            scores = model(torch.as_tensor(ids).long()[None])[0].double().log_softmax(-1)
        losses += [-float(scores[t - 1, ids[t]]) for t in range(1, len(ids)) if loss_mask[t]]
    found = evaluate_loss(model, token_set, batch_size=8, packing=True, text_bytes=100)
    assert found["tokens"] == len(losses) == int(token_set.loss_tokens.sum())
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / 100, rel=1e-6)


def test_the_batch_does_not_matter(model: GPT, token_set: TokenSet) -> None:
    expected = evaluate_loss(model, token_set, batch_size=1, packing=True)["loss"]
    for batch_size in (2, 7, 100):
        for packing in (True, False):
            found = evaluate_loss(model, token_set, batch_size=batch_size, packing=packing)["loss"]
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_disturbed(model: GPT, token_set: TokenSet, training: bool) -> None:
    model.train(training)
    before = torch.get_rng_state(), random.getstate(), [p.clone() for p in model.parameters()]
    first, second = (evaluate_loss(model, token_set, batch_size=4) for _ in range(2))
    assert first == second
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before[2], strict=True))
    assert torch.is_grad_enabled()
    model.eval()


def test_the_mode_is_restored_when_it_fails(model: GPT, token_set: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    model.train()
    monkeypatch.setattr(model, "loss", fail)
    with pytest.raises(MemoryError):
        evaluate_loss(model, token_set)
    assert model.training
    model.eval()


def test_bytes_are_those_of_the_text_that_is_learnt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["the café is closed — naïve", "one two three"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "one two", "completion": " drei Grüße"}) + "\n")
    options = {"max_length": 96, "val_size": 0.0, "cache_dir": tmp_path / "cache", "progress": False}
    text = prepare(tmp_path / "text.jsonl", tokenizer, **options).train  # type: ignore[arg-type]
    # The first token of a text is predicted by nothing, so it is not counted.
    firsts = sum(len(tokenizer.decode([tokenizer.encode(t)[0]]).encode()) for t in texts)
    assert loss_text_bytes(text, tokenizer) == sum(len(t.encode()) for t in texts) - firsts
    rows = prepare(tmp_path / "rows.jsonl", tokenizer, **options).train  # type: ignore[arg-type]
    assert loss_text_bytes(rows, tokenizer) == len(" drei Grüße".encode())


def test_exact_match() -> None:
    assert exact_match(["a", " b\n", "C", "d"], ["a", "b", "c", "e"]) == 0.5
    assert exact_match(["a", " b\n", "C", "d"], ["a", "b", "c", "e"], ignore_case=True) == 0.75


def test_classification_by_hand() -> None:
    found = classification(["a", "a", "z", "b"], ["a", "b", "b", "b"])
    # a: precision 1/2, recall 1 -> 2/3; b: precision 1, recall 1/3 -> 1/2; z is no label.
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2), "labels": 2, "unknown": 1}


def test_a_task_compares_greedy_answers_with_the_rows_own(model: GPT, tokenizer: Tokenizer) -> None:
    prompts = ["one two", "how do I", "a card", "the quick"]
    said = generate_batch(model, tokenizer, prompts, max_new_tokens=20)
    answers = [said[0], said[1], "something else", said[3].upper()]
    examples = [Example(prompt=p, completion=a) for p, a in zip(prompts, answers)]
    found = evaluate_task(model, tokenizer, examples, "exact_match", batch_size=3, max_new_tokens=20)
    assert found == {"exact_match": exact_match(said, answers), "answered": 4}
    assert 0.5 <= found["exact_match"] < 1
    assert "macro_f1" in evaluate_task(model, tokenizer, examples, "classification", max_new_tokens=20)


def test_an_answer_that_goes_on_is_not_a_match(model: GPT, tokenizer: Tokenizer) -> None:
    """The limit leaves room to be wrong: a model that would write more than the reference must not match it."""
    (said,) = generate_batch(model, tokenizer, ["one two"], max_new_tokens=20)
    start = tokenizer.decode(tokenizer.encode(said)[:5])
    found = evaluate_task(model, tokenizer, [Example(prompt="one two", completion=start)], "exact_match")
    assert found["exact_match"] == 0.0


def test_what_a_row_says_should_be_answered() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert answer_of(Example(prompt="p", completion="c")) == "c"
    assert answer_of(Example(prompt="p", completion="")) is None
    assert answer_of(Example(text="t")) is None
    assert answer_of(Example(messages=(user, assistant))) == "a"
    assert answer_of(Example(messages=(user, assistant, user))) is None


def test_a_row_without_an_answer_is_named(model: GPT, tokenizer: Tokenizer) -> None:
    examples = [Example(prompt="p", completion="c"), Example(text="t", where="rows.jsonl: line 2")]
    with pytest.raises(DataError, match=r"rows\.jsonl: line 2: has no answer"):
        evaluate_task(model, tokenizer, examples, "exact_match")
