"""The tokens that a model has not learnt: of the packaged model, and of matrices made for the purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import saved, tiny_tokenizer

from afina.loaders.text.source import load_tokenizer
from afina.loaders.weights import untrained_tokens as module
from afina.loaders.weights.safetensors import read_safetensors, write_safetensors
from afina.loaders.weights.untrained_tokens import IMPOSSIBLE, untrained_tokens


def spelt(found: np.ndarray, tokenizer: object) -> set[str]:
    return {tokenizer.token(int(number)) for number in np.flatnonzero(found)}  # type: ignore[attr-defined]


def test_the_packaged_model_has_learnt_no_chat_template() -> None:
    tokenizer = load_tokenizer("afina-tiny")
    found = spelt(untrained_tokens("afina-tiny", tokenizer), tokenizer)
    assert {"<|user|>", "<|assistant|>", "<|end|>", "#"} <= found
    assert not {"<|endoftext|>", "Ġthe", "e", ".", "Ġ"} & found
    assert len(found) < 200


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")


def with_rows(model: Path, change: object) -> np.ndarray:
    """The ids that are found in the model whose embedding matrix (vocabulary, width) ``change`` has changed."""
    path = model / "model.safetensors"
    tensors = read_safetensors(path)
    change(tensors["model.embed_tokens.weight"])  # type: ignore[operator]
    write_safetensors(path, tensors)
    return np.flatnonzero(untrained_tokens(model, tiny_tokenizer()))


def letters() -> list[int]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.token_id(module.BYTE_LETTERS[byte]) for byte in IMPOSSIBLE]  # type: ignore[misc]


def test_a_cluster_around_the_impossible_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 32 * 50)  # several pieces

    def push(matrix: torch.Tensor) -> None:
        noise = torch.randn(len(letters()) + 2, 32, generator=torch.Generator().manual_seed(0)) * 0.05
        matrix[[*letters(), 1, 250]] = torch.full((32,), 3.0) + noise
        matrix[260] = torch.full((32,), 4.5)  # half as far from the middle as the mean of all is

    assert with_rows(model, push).tolist() == sorted([*letters(), 1, 250])


def test_rows_that_were_only_shrunk(model: Path) -> None:
    def shrink(matrix: torch.Tensor) -> None:
        matrix[[*letters(), 1]] *= 0.01

    assert with_rows(model, shrink).tolist() == sorted([*letters(), 1])


def test_nothing_where_the_reference_is_like_the_others(model: Path) -> None:
    assert with_rows(model, lambda matrix: None).tolist() == []


def test_equal_rows_where_the_vocabulary_lacks_such_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMPOSSIBLE", ())

    def equal(matrix: torch.Tensor) -> None:
        matrix[[2, 3, 300]] = matrix[3].clone()
        matrix[7] = 0.0

    assert with_rows(model, equal).tolist() == [2, 3, 7, 300]
