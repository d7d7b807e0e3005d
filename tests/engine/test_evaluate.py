"""Held-out loss: each token counts once whatever the batch, and training is not disturbed."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import LINES, tiny_model, tiny_tokenizer

from afina.engine.evaluate import evaluate_loss, loss_text_bytes
from afina.engine.lora import new_adapter
from afina.engine.model import GPT
from afina.loaders.data.dataset import TokenSet, prepare
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.weights.peft import AdapterConfig


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
    found = evaluate_loss(model, token_set, batch_size=8, packing=True)
    assert found.tokens.tolist() == token_set.loss_tokens.tolist()
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    starts = np.cumsum([0, *found.tokens])
    assert found.sums == pytest.approx([sum(losses[a:b]) for a, b in pairwise(starts)], rel=1e-5)
    sizes = np.full(len(token_set), 4)
    samples = found.samples(sizes)
    assert {name: statistic(values) for name, (values, statistic) in samples.items()} == pytest.approx(
        {
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": sum(losses) / math.log(2) / sizes.sum(),
        }
    )
    assert "bits_per_byte" not in found.samples(sizes * 0)


def test_the_batch_does_not_matter(model: GPT, token_set: TokenSet) -> None:
    expected = evaluate_loss(model, token_set, batch_size=1, packing=True).loss
    for batch_size in (2, 7, 100):
        for packing in (True, False):
            found = evaluate_loss(model, token_set, batch_size=batch_size, packing=packing).loss
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_disturbed(model: GPT, token_set: TokenSet, training: bool) -> None:
    model.train(training)
    before = torch.get_rng_state(), random.getstate(), [p.clone() for p in model.parameters()]
    first, second = (evaluate_loss(model, token_set, batch_size=4) for _ in range(2))
    assert (first.sums == second.sums).all()
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before[2], strict=True))
    assert torch.is_grad_enabled()
    model.eval()


def test_dropout_is_off_while_the_loss_is_measured(tokenizer: Tokenizer, token_set: TokenSet) -> None:
    """And on again afterwards. Adapters alone have dropout."""
    model = tiny_model(tokenizer)
    adapter = new_adapter(model, AdapterConfig(r=4, alpha=8, base="", dropout=0.5), targets=["all-linear"], seed=1)
    for lora in adapter.loras.values():
        torch.nn.init.normal_(lora.B, std=0.3)
    model.train()
    first, second = (evaluate_loss(model, token_set, batch_size=4).sums for _ in range(2))
    assert (first == second).all()
    ids = torch.as_tensor(token_set.row(0)[0]).long()[None]
    assert not torch.equal(model(ids), model(ids))


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
    assert loss_text_bytes(text, tokenizer).sum() == sum(len(t.encode()) for t in texts) - firsts
    rows = prepare(tmp_path / "rows.jsonl", tokenizer, **options).train  # type: ignore[arg-type]
    assert loss_text_bytes(rows, tokenizer).tolist() == [len(" drei Grüße".encode())]
