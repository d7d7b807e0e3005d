"""engine/buckets.py: the sizes, and padding that changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import TINY
from torch import Tensor

from afina.engine.buckets import STEP, Bucket, StaticInputs, bucket_size, inputs_of, static_bytes
from afina.engine.model import GPT
from afina.loaders.data.batches import MicroBatch

LENGTHS = (5, 1, 17, 9)


@given(st.integers(1, 1 << 20))
def test_sizes_are_few_and_near(count: int) -> None:
    size = bucket_size(count)
    assert size >= count
    assert size % STEP == 0
    assert size == bucket_size(size)
    assert size - count < max(STEP, (size + 3) // 4)
    assert count <= 256 or size < 1.25 * count


def test_sizes_from_256_to_4096() -> None:
    assert sorted({bucket_size(n) for n in range(257, 4097)}) == [
        320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096
    ]  # fmt: skip


def batch(*, share: float = 0.5, lengths: tuple[int, ...] = LENGTHS) -> MicroBatch:
    """Packed rows of which a ``share`` of the tokens has a loss, never the first of a row."""
    draw = torch.Generator().manual_seed(1)
    total = sum(lengths)
    ids = torch.randint(0, TINY.vocab_size, (1, total), generator=draw)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    labels = torch.where(torch.rand(1, total, generator=draw) < share, ids, -100)
    labels[0, bounds[:-1].long()] = -100
    count = int((labels != -100).sum())
    return MicroBatch(ids, labels, bounds, list(range(len(lengths))), count, total)


def model() -> GPT:
    made = GPT(TINY, device="cpu").train()
    made.init_weights(3)
    return made


def results(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def weighted(model: GPT, inputs: StaticInputs) -> Tensor:
    ids, spans, targets, weights, _ = inputs.inputs
    return model.weighted_loss(ids, targets, weights, spans=spans, positions=inputs.positions)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_padded_batch_has_the_loss_and_the_gradients_of_its_rows(share: float) -> None:
    """Some positions with a loss, or nearly all: the head then runs on every token."""
    rows, gpt = batch(share=share), model()
    expected = results(gpt, gpt.loss(rows.input_ids, rows.labels, cu_seqlens=rows.cu_seqlens) * 0.25)
    for bucket in (Bucket(64, 64 if share == 1.0 else 32), Bucket(128, 64)):
        static = StaticInputs(bucket, torch.device("cpu"))
        static.fill(rows, 4 * rows.loss_tokens)
        found = results(gpt, weighted(gpt, static))
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            assert (found[name] - want).norm() <= 2e-6 * want.norm(), (bucket, name)


def test_what_the_padding_holds_changes_no_bit() -> None:
    """Other tokens there, and other places for its targets."""
    rows, gpt, left = batch(share=0.3), model(), []
    for padding in (0, 7):
        static = StaticInputs(Bucket(64, 32), torch.device("cpu"))
        static.fill(rows, rows.loss_tokens)
        static.inputs.input_ids[0, sum(LENGTHS) :] = padding
        static.inputs.positions[rows.loss_tokens :] = padding
        left.append(results(gpt, weighted(gpt, static)))
    assert all(torch.equal(left[0][name], left[1][name]) for name in left[0])


def test_padding_alone_moves_nothing() -> None:
    gpt = model()
    found = results(gpt, weighted(gpt, StaticInputs(Bucket(64, 64), torch.device("cpu"))))
    assert all(not x.any() for x in found.values())


def test_buffers_stay_where_they_are_and_take_what_the_plan_says() -> None:
    bucket, rows = Bucket(64, 32), batch()
    static = StaticInputs(bucket, torch.device("cpu"))
    before = [x.data_ptr() for x in static.inputs]
    for divisor in (1, 3):
        static.fill(rows, divisor)
        for mine, new in zip(static.inputs, inputs_of(rows, bucket, divisor), strict=True):
            assert torch.equal(mine, new)
    assert [x.data_ptr() for x in static.inputs] == before
    assert sum(x.nbytes for x in static.inputs) == static_bytes(bucket)


def test_a_bucket_is_chosen_by_tokens_and_loss_positions() -> None:
    assert Bucket.of(batch(lengths=(200, 120), share=0.1)) == Bucket(320, 64)
    assert Bucket.of(batch(lengths=(200, 120), share=1.0)) == Bucket(320, 320)
    assert Bucket(320, 320).holds(Bucket(320, 64))
    assert not Bucket(320, 64).holds(Bucket(64, 128))
