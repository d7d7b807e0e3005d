"""Batches: the same rows for the same step, each row once an epoch, labels that learn no prompt and cross no row."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_model import tiny_tokenizer

from afina.loaders.data.batches import Batches, MicroBatch, collate, eval_batches
from afina.loaders.data.dataset import TokenSet, prepare


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    folder = tmp_path_factory.mktemp("rows")
    lines = [{"prompt": "q" * (i % 7 + 1), "completion": f" answer {i}"} for i in range(23)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = prepare(folder / "a.jsonl", tiny_tokenizer(), max_length=64, val_size=0.0, cache_dir=folder, progress=False)
    return data.train


def numbers(batches: list[MicroBatch]) -> list[list[int]]:
    return [batch.rows for batch in batches]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(rows: TokenSet) -> None:
    batches = Batches(rows, batch_size=3, accumulation=2, seed=5)
    assert batches.steps_per_epoch == 4
    epochs = [[numbers(batches.step(epoch * 4 + step)) for step in range(4)] for epoch in range(3)]
    for epoch in epochs:
        assert [[len(batch) for batch in step] for step in epoch] == [[3, 3], [3, 3], [3, 3], [3, 2]]
        assert sorted(row for step in epoch for batch in step for row in batch) == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_depends_on_seed_and_number_only(rows: TokenSet) -> None:
    one, two, other = (Batches(rows, batch_size=3, accumulation=2, seed=seed) for seed in (5, 5, 6))
    forward = [one.rows(step) for step in range(9)]
    assert [two.rows(step) for step in reversed(range(9))] == forward[::-1]
    assert [other.rows(step) for step in range(4)] != forward[:4]
    assert forward[0] == [7, 8, 4, 19, 11, 21]  # the same on every machine and with every numpy
    # How many rows are taken at once does not change their order.
    assert Batches(rows, batch_size=6, accumulation=1, seed=5).rows(2) == forward[2]
    assert numbers(Batches(rows, batch_size=1, accumulation=6, seed=5).step(2)) == [[row] for row in forward[2]]


def test_the_last_group_of_an_epoch_is_kept(rows: TokenSet) -> None:
    batches = Batches(rows, batch_size=4, accumulation=3, seed=1)
    assert batches.steps_per_epoch == 2
    assert [len(batch.rows) for batch in batches.step(1)] == [4, 4, 3]


def test_packed_rows_lie_one_after_another(rows: TokenSet) -> None:
    batch = collate(rows, [4, 0, 9], packing=True)
    parts = [rows.row(row) for row in (4, 0, 9)]
    sizes = [len(ids) for ids, _ in parts]
    assert batch.cu_seqlens is not None
    assert (batch.cu_seqlens.dtype, batch.input_ids.dtype, batch.labels.dtype) == (
        torch.int32,
        torch.int64,
        torch.int64,
    )
    assert batch.cu_seqlens.tolist() == [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    assert batch.input_ids.tolist() == [[token for ids, _ in parts for token in ids]]
    expected = [token if on else -100 for ids, trained in parts for token, on in zip(ids, trained, strict=True)]
    assert batch.labels.tolist() == [expected]
    assert (batch.rows, batch.tokens) == ([4, 0, 9], sum(sizes))
    assert batch.loss_tokens == sum(label != -100 for label in expected) == sum(rows.loss_tokens[[4, 0, 9]])


def test_padded_rows_hold_the_same_tokens_and_labels(rows: TokenSet) -> None:
    packed, padded = (collate(rows, [4, 0, 9], packing=packing) for packing in (True, False))
    assert packed.cu_seqlens is not None
    assert padded.cu_seqlens is None
    assert padded.input_ids.shape == (3, max(rows.lengths[[4, 0, 9]]))
    for i, (start, end) in enumerate(zip(packed.cu_seqlens.tolist(), packed.cu_seqlens.tolist()[1:])):
        assert padded.input_ids[i, : end - start].tolist() == packed.input_ids[0, start:end].tolist()
        assert padded.labels[i, : end - start].tolist() == packed.labels[0, start:end].tolist()
        assert (padded.labels[i, end - start :] == -100).all()
    assert (padded.loss_tokens, padded.tokens) == (packed.loss_tokens, packed.tokens)


def test_nothing_is_predicted_across_rows(rows: TokenSet) -> None:
    for batch in eval_batches(rows, batch_size=5):
        assert batch.cu_seqlens is not None
        assert (batch.labels[0, batch.cu_seqlens[:-1].long()] == -100).all()


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_every_row_once_in_order(rows: TokenSet, packing: bool) -> None:
    batches = list(eval_batches(rows, batch_size=5, packing=packing))
    assert [row for batch in batches for row in batch.rows] == list(range(23))
    assert sum(batch.loss_tokens for batch in batches) == rows.loss_tokens.sum()
    assert all((batch.cu_seqlens is not None) == packing for batch in batches)


def test_sizes_below_one_are_refused(rows: TokenSet) -> None:
    with pytest.raises(ValueError, match="batch_size 0 and accumulation 1 must be at least 1"):
        Batches(rows, batch_size=0)
