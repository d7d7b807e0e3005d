"""What comes out of the cache is what a forward pass over the whole text gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hf_models import parametrize, saved

from afina.engine.kv_cache import KVCache
from afina.engine.model import GPT
from afina.engine.weights import load_model

TOLERANCE = 2e-5


def poisoned(model: GPT, batch: int, room: int) -> KVCache:
    cache = KVCache(model.config, batch, room)
    for x in (*cache.keys, *cache.values):
        x.fill_(torch.nan)  # what is not yet written must never be read
    return cache


def whole(model: GPT, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits (n, V) of each text, without a cache."""
    return [model(text[None])[0] for text in texts]


@parametrize()
@torch.no_grad()
def test_cached_equals_uncached(name: str) -> None:
    """Rows of different length: packed prefill in two chunks, a batched chunk, then single tokens; past the window (8)
    and, at different moments, past the original maximum of the scaled RoPEs (32)."""
    model = load_model(saved(name).folder)
    texts = list(torch.randint(0, 61, (3, 48), generator=torch.Generator().manual_seed(3)))
    cache = poisoned(model, 3, 48)
    at = [0, 0, 0]

    def check(logits: list[torch.Tensor], grown: list[int]) -> None:
        for row, count in enumerate(grown):
            at[row] += count
        expected = whole(model, [text[:n] for text, n in zip(texts, at)])
        for got, want, count in zip(logits, expected, grown):
            assert got.shape[0] == count
            assert torch.allclose(got, want[len(want) - count :], atol=TOLERANCE)
        assert cache.lengths.tolist() == at
        assert cache.lengths.dtype == torch.int32

    for grown in ([20, 27, 9], [5, 3, 0]):
        ids = torch.cat([text[n : n + g] for text, n, g in zip(texts, at, grown)])
        cu_seqlens = F.pad(torch.tensor(grown).cumsum(0), (1, 0)).int()
        check(list(model(ids[None], cu_seqlens=cu_seqlens, cache=cache)[0].split(grown)), grown)
    for count in (3, 1, 1, 1, 1, 1, 1):
        ids = torch.stack([text[n : n + count] for text, n in zip(texts, at)])
        check(list(model(ids, cache=cache)), [count] * 3)
    assert min(at) < 32 < max(at)
    # Rows leave, the others go on.
    cache.keep(torch.tensor([2, 0]))
    texts, at = [texts[2], texts[0]], [at[2], at[0]]
    for _ in range(2):
        check(list(model(torch.stack([text[n : n + 1] for text, n in zip(texts, at)]), cache=cache)), [1, 1])


@torch.no_grad()
def test_longrope_cache_is_computed_again_when_its_angles_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a row, at the token that passes the original maximum (32), wherever in a chunk it stands."""
    asked = []
    restart = KVCache.restart
    monkeypatch.setattr(KVCache, "restart", lambda self, *args: asked.append(restart(self, *args)) or asked[-1])
    model = load_model(saved("phi3-longrope").folder)
    texts = list(torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(4)))
    for first in (30, 32):
        cache = poisoned(model, 2, 40)
        ids = torch.cat([texts[0][:first], texts[1][:10]])[None]
        model(ids, cu_seqlens=torch.tensor([0, first, first + 10], dtype=torch.int32), cache=cache)
        chunk = torch.stack([texts[0][first : first + 5], texts[1][10:15]])
        rows = torch.tensor([4, 9])
        hidden = model.hidden(chunk, cache=cache, positions=rows)
        expected = torch.stack([x[-1] for x in whole(model, [texts[0][: first + 5], texts[1][:15]])])
        assert torch.allclose(model.logits(hidden), expected, atol=TOLERANCE)
        model(torch.stack([texts[0][first + 5 : first + 6], texts[1][15:16]]), cache=cache)
    assert sum(again is not None for again in asked) == 2


@torch.no_grad()
def test_rows_are_the_wanted_positions() -> None:
    model = load_model(saved("llama").folder)
    ids = torch.randint(0, 61, (2, 9))
    rows = torch.tensor([17, 3, 3])
    assert torch.allclose(model.hidden(ids, positions=rows), model.hidden(ids).flatten(0, 1)[rows], atol=1e-6)
    cache = KVCache(model.config, 2, 9)
    assert torch.allclose(
        model.hidden(ids, cache=cache, positions=rows), model.hidden(ids).flatten(0, 1)[rows], atol=1e-6
    )


def test_refuses_what_does_not_fit() -> None:
    model = load_model(saved("llama").folder)
    cache = KVCache(model.config, 2, 4)
    with pytest.raises(ValueError, match="2 rows as in the cache, found 3"):
        model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="2 documents as the cache has rows, found 1"):
        model(torch.zeros(1, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), cache=cache)
    with pytest.raises(ValueError, match="5 tokens do not fit into max_length = 4"):
        model(torch.zeros(2, 5, dtype=torch.int64), cache=cache)
    model(torch.zeros(1, 4, dtype=torch.int64), cu_seqlens=torch.tensor([0, 3, 4], dtype=torch.int32), cache=cache)
    model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    assert cache.lengths.tolist() == [4, 2]
    with pytest.raises(ValueError, match="5 tokens do not fit"):
        model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    assert cache.lengths.tolist() == [4, 2]


@parametrize("llama", "gemma2")
@torch.no_grad()
def test_a_prompt_goes_on_in_several_ways(name: str) -> None:
    """Rows repeat and are continued by unlike lengths; the cache they came from goes on as if nothing had happened."""
    model = load_model(saved(name).folder)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 61, (n,), generator=draw) for n in (4, 7)]
    cache = poisoned(model, 2, 16)
    model(torch.cat(prompts)[None], cu_seqlens=torch.tensor([0, 4, 11], dtype=torch.int32), cache=cache)
    chosen, ways = [1, 0, 0, 1, 1], [torch.randint(0, 61, (n,), generator=draw) for n in (3, 3, 3, 2, 1)]
    fanned = cache.fanned(torch.tensor(chosen))
    ends = torch.tensor([0, 3, 6, 9, 11, 12], dtype=torch.int32)
    found = model(torch.cat(ways)[None], cu_seqlens=ends, cache=fanned)[0].split([len(way) for way in ways])
    for row, way, logits in zip(chosen, ways, found, strict=True):
        (expected,) = whole(model, [torch.cat([prompts[row], way])])
        assert torch.allclose(logits, expected[len(prompts[row]) :], atol=TOLERANCE)
    assert cache.lengths.tolist() == [4, 7]
    again = model(torch.stack([ways[0], ways[0]]), cache=cache)
    for row in (0, 1):
        (expected,) = whole(model, [torch.cat([prompts[row], ways[0]])])
        assert torch.allclose(again[row], expected[-3:], atol=TOLERANCE)
