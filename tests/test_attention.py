"""Attention on every path of the file beside the formulas, and documents that cannot touch each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DRAWN, assert_low_precision, assert_near, assert_same_bits, draw, evaluate, strided
from torch import Tensor

from afina.kernels import attention as file
from afina.kernels.attention import attention, attention_reference

LENGTHS = [5, 0, 1, 7, 6, 1, 0]
PATHS = ["default", "tiles"]
SOMETIMES = {"softcap": [None, 1.5], "scale": [None, 0.9], "window": [None, 1, 3, 50]}


@contextmanager
def path(name: str) -> Iterator[None]:
    """default: at these sizes all queries at once; tiles: blocks of 2 queries, a document at a time."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "tiles":
            patch.setattr(file, "BLOCK_ROWS", 2)
            patch.setattr(file, "BLOCK_SCORES", 1)
        yield


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def tokens(*lead: int, heads: tuple[int, int] = (4, 2), dim: int = 16, keys: int | None = None) -> list[Tensor]:
    own = lead if keys is None else (*lead[:-1], keys)
    return [draw(*lead, heads[0], dim) * 2, draw(*own, heads[1], dim, seed=1), draw(*own, heads[1], dim, seed=2)]


@DRAWN
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
    square=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (8, 1), (6, 3)]),
    dim=st.sampled_from([1, 16, 24, 80, 256]),
    causal=st.booleans(),
    options=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SOMETIMES.items()}),
    kind=st.sampled_from(["dense", "strided", "broadcast"]),
    name=st.sampled_from(PATHS),
)
def test_rectangles(
    shape: tuple[int, int, int],
    square: bool,
    heads: tuple[int, int],
    dim: int,
    causal: bool,
    options: dict[str, Any],
    kind: str,
    name: str,
) -> None:
    """No rows, one row, S > T, S < T, and all the options."""
    n, length, keys = shape
    inputs = tokens(n, length, heads=heads, dim=dim, keys=length if square else keys)
    options = {"causal": causal} | options | ({} if causal else {"window": None})
    lay = [strided(x) if kind == "strided" else x for x in inputs]
    with path(name):
        got = evaluate(partial(attention, **options), lay, kind)
    assert_near(got, evaluate(partial(attention_reference, **options), inputs, kind))


@DRAWN
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    causal=st.booleans(),
    options=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SOMETIMES.items()}),
    kind=st.sampled_from(["dense", "strided", "broadcast"]),
    name=st.sampled_from(PATHS),
)
def test_packed_documents(lengths: list[int], causal: bool, options: dict[str, Any], kind: str, name: str) -> None:
    inputs = tokens(sum(lengths))
    options = {"causal": causal} | options | ({} if causal else {"window": None})
    lay = [strided(x) if kind == "strided" else x for x in inputs]
    packed = {"cu_seqlens": offsets(lengths), **options}
    with path(name):
        got = evaluate(partial(attention, **packed), lay, kind)
    assert_near(got, evaluate(partial(attention_reference, **packed), inputs, kind))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_packed_is_separate_and_documents_do_not_touch(name: str, options: dict[str, Any]) -> None:
    inputs = tokens(sum(LENGTHS))
    cu = offsets(LENGTHS)
    run = partial(attention, cu_seqlens=cu, **options)
    spans = list(pairwise(cu.tolist()))
    with path(name):
        before = evaluate(run, inputs, "broadcast")
        for a, b in spans:
            alone = evaluate(partial(attention, **options), [x[None, a:b] for x in inputs], "broadcast")
            assert_near([x[a:b] for x in before], [x[0] for x in alone])
        for a, b in spans:
            for value in (3.0, torch.nan):
                changed = [x.clone() for x in inputs]
                for x in changed:
                    x[a:b] += value
                after = evaluate(run, changed, "broadcast")
                for x, y in zip(before, after):
                    assert torch.equal(x[:a], y[:a])
                    assert torch.equal(x[b:], y[b:])
                assert a == b or not torch.equal(before[0], after[0])


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["strided", "broadcast"])
def test_any_strides(heads: tuple[int, int], causal: bool, kind: str) -> None:
    inputs = tokens(2, 5, heads=heads)
    got = evaluate(partial(attention, causal=causal), [strided(x) for x in inputs], kind)
    assert_near(got, evaluate(partial(attention_reference, causal=causal), inputs, kind))


@pytest.mark.parametrize("name", PATHS)
def test_which_keys_are_seen(name: str) -> None:
    """Equal scores and one-hot values: a row of the output is the row of the mask over the number of keys seen."""

    def seen(length: int, keys: int, **options: Any) -> list[list[int]]:
        with path(name):
            out = attention(
                torch.zeros(1, length, 1, 4), torch.ones(1, keys, 1, 4), torch.eye(4)[None, :keys, None], **options
            )
        return [[j for j in range(4) if row[j] > 0] for row in out[0, :, 0]]

    assert seen(4, 4) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert seen(4, 4, window=2) == [[0], [0, 1], [1, 2], [2, 3]]
    assert seen(4, 4, window=1) == [[0], [1], [2], [3]]
    assert seen(2, 4) == [[0, 1, 2], [0, 1, 2, 3]]
    assert seen(2, 4, window=2) == [[1, 2], [2, 3]]
    assert seen(4, 2) == [[], [], [0], [0, 1]]
    assert seen(2, 3, causal=False) == [[0, 1, 2]] * 2
    assert seen(3, 0) == [[]] * 3


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 3.0}, {"causal": False}], ids=str)
def test_long_rows_against_torch(options: dict[str, Any]) -> None:
    """Several blocks of the real size, beside torch's own attention (softcap: beside the reference)."""
    inputs = tokens(2, 150, heads=(2, 1), dim=24)
    mask = torch.ones(150, 150, dtype=torch.bool).tril().triu(1 - options.get("window", 150))
    mask = mask | (not options.get("causal", True))

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k.expand_as(q), v.expand_as(q)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    want = evaluate(partial(attention_reference, **options) if "softcap" in options else oracle, inputs)
    assert_near(evaluate(partial(attention, **options), inputs), want)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("packed", [False, True])
def test_same_bits_twice(name: str, packed: bool) -> None:
    inputs = [x.float() for x in (tokens(sum(LENGTHS)) if packed else tokens(2, 9))]
    with path(name):
        assert_same_bits(partial(attention, cu_seqlens=offsets(LENGTHS) if packed else None), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PATHS)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    with path(name):
        assert_low_precision(attention, formula, attention_reference, tokens(2, 20, dim=80), dtype)


def test_large_scores_stay_finite() -> None:
    q, k, v = (x.float() for x in tokens(1, 6))
    for name in PATHS:
        with path(name):
            assert all(x.isfinite().all() for x in evaluate(attention, [q * 1e3, k * 1e3, v]))


X, KV = torch.ones(1, 3, 4, 8), torch.ones(1, 3, 2, 8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": X.long()}),
        ("q", {"q": X[0]}),
        ("k", {"k": KV.half()}),
        ("k", {"k": KV[0]}),
        ("k", {"k": KV[..., :4]}),
        ("k", {"k": KV.expand(2, 3, 2, 8)}),
        ("v", {"v": KV.half()}),
        ("v", {"v": KV[:, :2]}),
        ("k", {"k": X[:, :, :3], "v": X[:, :, :3]}),
        ("k", {"k": X[:, :, :0], "v": X[:, :, :0]}),
        ("window", {"window": 0}),
        ("window", {"window": 2, "causal": False}),
        ("softcap", {"softcap": 0.0}),
        ("backend", {"backend": "cuda"}),
        ("q", {"cu_seqlens": offsets([3])}),
        ("k", {"q": X[0], "k": KV[0, :2], "v": KV[0, :2], "cu_seqlens": offsets([3])}),
        ("cu_seqlens", {"q": X[0], "k": KV[0], "v": KV[0], "cu_seqlens": offsets([2])}),
        ("cu_seqlens", {"q": X[0], "k": KV[0], "v": KV[0], "cu_seqlens": offsets([3]).long()}),
    ],
)
def test_validation(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        attention(**({"q": X, "k": KV, "v": KV} | change))
