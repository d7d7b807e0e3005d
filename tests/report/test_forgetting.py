"""afina/report/forgetting.py: the reference text, the losses on it, and what they come to."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer

from afina.errors import DataError
from afina.report.forgetting import OWN, encode_reference, judge_forgetting, read_passages, reference_losses


def test_the_packages_text() -> None:
    passages = read_passages(OWN)
    words = [len(passage.split()) for passage in passages]
    assert len(passages) == 24 == len(set(passages))
    assert 1100 < sum(words) < 1500
    assert all(passage.isascii() and passage.endswith(".") for passage in passages)


def test_losses_are_those_of_each_passage_alone() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    reference = encode_reference(tokenizer, None, 96)
    found = reference_losses(model, reference)
    assert len(found) == len(reference.rows) > 24  # the tiny model reads 96 tokens: passages are cut
    ids, mask = reference.rows.row(5)
    assert not mask[0]
    assert mask[1:].all()
    row = torch.from_numpy(ids.astype(np.int64))[None]
    logits = model(row).log_softmax(-1)[0, :-1]
    wanted = -logits.gather(1, row[0, 1:, None]).sum().detach()
    assert found[5].tolist() == pytest.approx([float(wanted), len(ids) - 1], rel=1e-4)


def test_a_part_of_the_passages_is_spread_over_all() -> None:
    reference = encode_reference(tiny_tokenizer(), None, 2048)
    assert [ids.tolist() for ids in reference.part(5.0).rows.ids] == [ids.tolist() for ids in reference.rows.ids]
    third = reference.part(1 / 3)
    assert [ids.tolist() for ids in third.rows.ids] == [ids.tolist() for ids in reference.rows.ids[::3]]
    assert len(third.rows.loss_masks) == 8
    assert len(reference.part(0.0).rows) == 0


def test_a_model_against_itself_forgot_nothing() -> None:
    before = np.array([[30.0, 10], [55.0, 20], [22.0, 8], [31.0, 10], [60.0, 20], [24.0, 8]])
    same = judge_forgetting(before, before, "text")
    assert (same.word, same.found.difference) == ("no", 0.0)
    worse = before.copy()
    worse[:, 0] += 0.5 * worse[:, 1]
    forgot = judge_forgetting(before, worse, "text")
    assert forgot.word == "yes"
    assert forgot.found.difference == pytest.approx(0.5)
    assert (forgot.passages, forgot.tokens) == (6, 76)
    assert math.isclose(forgot.after - forgot.before, 0.5)


def test_own_text_is_read_in_passages(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(["one\r\ntwo", "three", "four", "five", "six"])).encode())
    assert read_passages(path) == ["one two", "three", "four", "five", "six"]
    reference = encode_reference(tiny_tokenizer(), path, 96)
    assert (reference.name, len(reference.rows)) == (str(path), 5)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "0 passages"), (b"one\n\ntwo", "2 passages"), (b"\xff\xfe\x00", "not UTF-8"), (b"x" * (1 << 21), "1 MB")],
)
def test_a_text_that_cannot_be_used(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_passages(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_passages(tmp_path / "absent.txt")
