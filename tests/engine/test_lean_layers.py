"""A decoding step on a CPU: what the layers compute, and of each row the same bits whatever the others are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import CASES, parametrize, saved
from tiny_model import adapted

from afina.engine import lean_layers
from afina.engine.decode_step import DecodeStep
from afina.engine.kv_pool import KVPool
from afina.engine.lean_layers import Angles, Casts, LeanStep, Seen
from afina.engine.model import GPT
from afina.engine.packed import PackedModel
from afina.engine.weights import load_model
from afina.kernels.backend import trusted

ADAPTERS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"dora": True}}
# ids, starts, lengths and places of three rows, of which two share a span, and of two that fill the batch up
TABLE = torch.tensor([[3, 4, 5, 0, 0], [0, 20, 20, 0, 0], [6, 40, 41, 0, 0], [5, 59, 60, 64, 64]])


def model_of(name: str, dtype: torch.dtype = torch.float32) -> GPT:
    """Norms' weights are all 1 at first, and biases 0: here they are not."""
    model = load_model(saved(name).folder).to(dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(dtype), alpha=0.05)
    return model


def pool_of(model: GPT) -> KVPool:
    pool = KVPool(model.config, 64, torch.device("cpu"), model.dtype)
    pool.memory.copy_(torch.randn(pool.memory.shape, generator=torch.Generator().manual_seed(0)))
    return pool


def compare(model: GPT, *, atol: float, rtol: float) -> None:
    """The step's logits, and the keys and values that it writes, with those of ``GPT`` itself."""
    pool = pool_of(model)
    step = DecodeStep(model, pool, 48)
    assert isinstance(step.lean, LeanStep)
    with torch.no_grad():
        expected = step.compute(TABLE)
        written = pool.memory.clone()
        pool.memory[..., TABLE[3], :] = 0
        with PackedModel(model), trusted():
            found = step(TABLE)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found[:3], expected[:3], atol=atol, rtol=rtol)
    torch.testing.assert_close(pool.memory[..., :-1, :], written[..., :-1, :], atol=atol, rtol=rtol)


@pytest.mark.parametrize(
    ("name", "adapter"), [(str(case), None) for case in CASES] + [("llama", adapter) for adapter in ADAPTERS]
)
def test_lean_layers_compute_what_layers_do(name: str, adapter: str | None) -> None:
    """In every family: on a CPU a step goes another way through the layers than all else does."""
    model = model_of(name)
    if adapter is not None:
        adapted(model, **ADAPTERS[adapter])
    compare(model, atol=2e-5, rtol=1e-4)


@parametrize("llama", "gemma2", "gpt2", "qwen3")
def test_float64_is_computed_in_float64(name: str) -> None:
    compare(model_of(name, torch.float64), atol=1e-10, rtol=1e-10)


@parametrize("llama", "gemma2", "gpt2", "qwen3")
def test_bfloat16_is_rounded_no_more_than_in_the_layers(name: str) -> None:
    """Few numbers, so the two errors differ by chance: 0.3 to 2 times, seen on one machine."""
    model = model_of(name, torch.bfloat16)
    pool = pool_of(model)
    step, exact = DecodeStep(model, pool, 48), copy.deepcopy(model).double()
    wide = KVPool(model.config, 64, torch.device("cpu"), torch.float64)
    wide.memory.copy_(pool.memory)
    with torch.no_grad():
        truth = DecodeStep(exact, wide, 48).compute(TABLE)[:3]
        theirs, (ours, memory) = step.compute(TABLE)[:3], (step(TABLE)[:3], pool.memory)
    assert ours.dtype == memory.dtype == torch.bfloat16
    assert (ours - truth).square().mean() < 4 * (theirs - truth).square().mean()
    assert (memory - wide.memory)[..., TABLE[3, :3], :].abs().max() < 0.1


@parametrize("llama", "gemma2")
def test_large_products_are_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def bmm(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    real = torch.bmm
    model = model_of(name)
    monkeypatch.setattr(lean_layers, "SMALL", 16 * 30)  # between what the rows have
    monkeypatch.setattr(lean_layers.torch, "bmm", bmm)
    compare(model, atol=2e-5, rtol=1e-4)
    every = 2 * 3 * model.config.num_layers  # of three rows, and as many times in ``compute``
    assert every < len(calls) < 2 * every


@parametrize("llama", "gemma2", "phi3-longrope", "qwen3")
def test_what_numpy_computes_of_a_row_does_not_depend_on_the_others(name: str) -> None:
    """Norms, rotation and attention, of rows at all places of batches, each compared with the row alone."""
    model = model_of(name)
    step = LeanStep(model, pool_of(model), 48)
    layer, draw = step.layers[0], np.random.default_rng(0)
    rows = [(0, 7), (7, 1), (8, 31), (40, 16), (56, 8), (20, 30), (3, 2)]
    heads = draw.standard_normal((len(rows), layer.heads + 2 * layer.kv_heads, layer.head_dim), np.float32)
    hidden = draw.standard_normal((len(rows), model.config.hidden_size), np.float32)
    angles = torch.from_numpy(draw.standard_normal((2, len(rows), layer.head_dim // 2), np.float32))

    def computed(at: list[int]) -> list[np.ndarray]:
        turned = heads[at].copy()
        Angles.of(*angles[:, at]).turn_(turned)
        seen = Seen([rows[i] for i in at], layer, np.dtype(np.float32))
        return [step.norm(hidden[at]), turned, layer._attended(turned, seen)]

    alone = [computed([i]) for i in range(len(rows))]
    for at in ([3, 2], [6, 0, 1], [0, 1, 2, 3, 4, 5, 6], [5, 4, 3, 2, 1]):
        for kind, found in enumerate(computed(at)):
            for place, i in enumerate(at):
                assert np.array_equal(found[place], alone[i][kind][0])


def test_what_is_not_finite_reaches_the_logits_without_a_warning() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.embed.weight[3] = torch.inf
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        logits = LeanStep(model, pool_of(model), 48)(TABLE)
    assert not logits[0].isfinite().any()
    assert logits[1:3].isnan().sum() < logits[1:3].numel()


def test_one_dtype_is_one_memory() -> None:
    x = torch.zeros(3)
    same, other = Casts(torch.float32), Casts(torch.bfloat16)
    same.array(x)[0] = 1
    same.memory(x)[1] = 2
    assert x.tolist() == [1, 2, 0]
    half = other.tensor(same.array(x))
    assert half.dtype == torch.bfloat16
    assert other.memory(half) is half
    assert other.array(half).tolist() == [1, 2, 0]
