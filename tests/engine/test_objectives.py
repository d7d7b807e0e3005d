"""engine/objectives.py: a sum over loss tokens, whatever the batch; and a loop that takes any objective."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_model import LINES, tiny_model, tiny_tokenizer
from torch import Tensor

from afina.engine.model import GPT
from afina.engine.objectives import sft
from afina.engine.training_step import accumulate
from afina.loaders.data.batches import MicroBatch, collate
from afina.loaders.data.dataset import TokenSet, prepare


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model(tiny_tokenizer()).train()


@pytest.fixture(scope="module")
def token_set(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """Nine rows whose answers have from 1 to about 30 tokens."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": LINES[i % 4][: 5 + i], "completion": " x" * (1 + i * i % 31)} for i in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(
        folder / "rows.jsonl", tiny_tokenizer(), max_length=96, val_size=0.0, cache_dir=folder / "cache", progress=False
    ).train


def plain_losses(model: GPT, token_set: TokenSet, rows: range) -> Tensor:
    """The loss of each loss token, fp64, computed row by row from the whole logits."""
    losses = []
    for row in rows:
        ids, loss_mask = token_set.row(row)
        with torch.no_grad():
            scores = model(torch.as_tensor(ids).long()[None])[0].double().log_softmax(-1)
        losses += [-scores[t - 1, ids[t]] for t in range(1, len(ids)) if loss_mask[t]]
    return torch.stack(losses)


def gradients(model: GPT) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert len(found) == len(list(model.parameters()))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_sft_is_the_sum_over_loss_tokens(model: GPT, token_set: TokenSet, packing: bool) -> None:
    rows = range(2, 8)
    expected = plain_losses(model, token_set, rows)
    batch = collate(token_set, rows, packing=packing)
    loss, count = sft(model, batch)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert count == len(expected) == int(token_set.loss_tokens[2:8].sum())
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    divided, count = sft(model, batch, divisor=1000)
    assert count == len(expected)
    assert divided.item() == pytest.approx(expected.sum().item() / 1000, rel=1e-5)


def test_smoothing_and_z_loss_by_their_formulas(model: GPT, token_set: TokenSet) -> None:
    rows, smoothing, z = range(2, 8), 0.2, 0.01
    expected, count = 0.0, 0
    for row in rows:
        ids, loss_mask = token_set.row(row)
        with torch.no_grad():
            logits = model(torch.as_tensor(ids).long()[None])[0].double()
        for t in range(1, len(ids)):
            if loss_mask[t]:
                x, lse = logits[t - 1], logits[t - 1].logsumexp(0)
                expected += (lse - (1 - smoothing) * x[ids[t]] - smoothing * x.mean() + z * lse.square()).item()
                count += 1
    batch = collate(token_set, rows, packing=True)
    for lean in (False, True):
        loss, found = sft(model, batch, label_smoothing=smoothing, z_loss=z, lean=lean)
        assert found == count
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        divided, _ = sft(model, batch, divisor=1000, label_smoothing=smoothing, z_loss=z, lean=lean)
        assert divided.item() == pytest.approx(expected / 1000, rel=1e-5)


def test_a_step_of_one_micro_batch_has_the_bits_of_the_mean(model: GPT, token_set: TokenSet) -> None:
    batch = collate(token_set, range(9), packing=True)
    loss = accumulate(model, [batch])
    found = gradients(model)
    mean = model.loss(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)
    mean.backward()
    assert torch.equal(loss, mean)
    expected = gradients(model)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def squares(model: GPT, batch: MicroBatch, *, divisor: int | None = None) -> tuple[Tensor, int]:
    """An objective that is no cross-entropy: the sum of the squared hidden states, row by row."""
    total = sum(
        model.hidden(ids[None, a:b]).square().sum()
        for ids in batch.input_ids
        for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist())  # type: ignore[index]
    )
    return torch.as_tensor(total) / (divisor or 1), batch.loss_tokens


def test_the_loop_takes_any_objective(model: GPT, token_set: TokenSet) -> None:
    parts = [collate(token_set, rows, packing=True) for rows in (range(4), range(4, 9))]
    loss = accumulate(model, parts, squares)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole, count = squares(model, collate(token_set, range(9), packing=True))
    (whole / count).backward()
    assert loss.item() == pytest.approx(whole.item() / count, rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (found[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name
    assert found.keys() >= {"embed.weight", "norm.weight"}
    model.zero_grad()
