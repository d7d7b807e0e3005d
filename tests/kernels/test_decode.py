"""Decoding attention is the last row of attention over the row's own keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_rounding import rounding_bounds
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DRAWN, TRITON_DTYPES, assert_near, draw, poisoned, strided
from torch import Tensor

from afina.kernels import decode
from afina.kernels.attention import attention
from afina.kernels.decode import _splits, decode_attention, decode_attention_reference


def cache(lengths: list[int], room: int, heads: int, dim: int, seed: int, window: int | None = None) -> Tensor:
    """Drawn keys; NaN wherever a row must not look."""
    x = draw(len(lengths), room, heads, dim, seed=seed)
    for row, length in zip(x, lengths):
        row[length:] = torch.nan
        if window is not None:
            row[: max(0, length - window)] = torch.nan
    return x


@DRAWN
@given(
    lengths=st.lists(st.integers(0, 9), max_size=4),
    room=st.integers(9, 12),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 4), (6, 3), (8, 1)]),
    dim=st.sampled_from([1, 16, 24, 80]),
    window=st.sampled_from([None, 1, 3, 50]),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([None, 0.7]),
)
def test_is_the_last_row_of_attention(
    lengths: list[int],
    room: int,
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> None:
    options: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
    q = draw(len(lengths), heads[0], dim) * 2
    k, v = (cache(lengths, room, heads[1], dim, seed, window) for seed in (1, 2))
    counts = torch.tensor(lengths, dtype=torch.int32)
    got = decode_attention(strided(q), strided(k), strided(v), counts, **options)
    want = torch.zeros_like(q)
    for row, length in enumerate(lengths):
        own = (x[row : row + 1, :length].nan_to_num(5.0) for x in (k, v))
        if length:
            want[row] = attention(q[row, None, None], *own, **options)[0, 0]
    assert_near([got], [want])
    assert_near([got], [decode_attention_reference(q, k, v, counts, **options)])


def test_repeats_and_no_gradient() -> None:
    q, k, v = draw(2, 4, 16), draw(2, 7, 2, 16, seed=1), draw(2, 7, 2, 16, seed=2)
    lengths = torch.tensor([7, 1], dtype=torch.int32)
    q, k, v = q.float().requires_grad_(), k.float(), v.float()
    got = decode_attention(q, k, v, lengths)
    assert not got.requires_grad
    assert torch.equal(got, decode_attention(q, k, v, lengths))
    assert_near([got[1]], [v[1, 0].repeat_interleave(2, 0)], 1e-6)  # one key: its value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in (draw(3, 4, 80), draw(3, 20, 2, 80, seed=1), draw(3, 20, 2, 80, seed=2)))
    lengths = torch.tensor([20, 20, 20], dtype=torch.int32)
    assert_within_rounding(decode_attention(q, k, v, lengths), q, k, v, lengths)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.ones(2, 4, 8, dtype=torch.int64)}),
        ("q", {"q": torch.ones(2, 1, 4, 8)}),
        ("k_cache", {"k_cache": torch.ones(2, 5, 3, 8)}),
        ("k_cache", {"k_cache": torch.ones(1, 5, 2, 8)}),
        ("k_cache", {"k_cache": torch.ones(2, 5, 2, 4)}),
        ("k_cache", {"k_cache": torch.ones(2, 5, 8)}),
        ("k_cache", {"k_cache": torch.ones(2, 5, 2, 8).half()}),
        ("v_cache", {"v_cache": torch.ones(2, 4, 2, 8)}),
        ("v_cache", {"v_cache": torch.ones(2, 5, 2, 8).half()}),
        ("lengths", {"lengths": torch.ones(3, dtype=torch.int32)}),
        ("lengths", {"lengths": torch.ones(2, dtype=torch.int64)}),
        ("lengths", {"lengths": torch.tensor([-1, 2], dtype=torch.int32)}),
        ("lengths", {"lengths": torch.tensor([1, 6], dtype=torch.int32)}),
        ("lengths", {"lengths": torch.ones(2, dtype=torch.int32, device="meta")}),
        ("window", {"window": 0}),
        ("softcap", {"softcap": 0.0}),
        ("k_cache", {"k_cache": torch.ones(2, 5, 0, 8)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_validation(name: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"q": torch.ones(2, 4, 8), "k_cache": torch.ones(2, 5, 2, 8)}
    good |= {"v_cache": good["k_cache"], "lengths": torch.ones(2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        decode_attention(**(good | change))


# ---------------------------------------------------------------- Triton


def assert_within_rounding(got: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: Any) -> None:
    """Each number differs from the formulas in fp64 by no more than `rounding_bounds` allows."""
    q, k, v, dtype, window = q.double(), k.double(), v.double(), q.dtype, options.get("window")
    want = decode_attention_reference(q, k, v, lengths, **options)
    rest = {name: x for name, x in options.items() if name != "window"}
    for row, length in enumerate(lengths.tolist()):
        first = max(0, length - (window or length))
        own = (x[row : row + 1, first:length] for x in (k, v))
        query = q[row, None, None]
        bound = rounding_bounds(query, *own, torch.zeros_like(query), dtype, causal=False, **rest)[0][0, 0]
        error = (got[row].double() - want[row]).abs()
        assert (error <= bound).all(), f"row {row}: {(error - bound).max()} beyond what is due to rounding"


@settings(DRAWN, max_examples=18)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 15, 16, 17, 50, 96, 97, 130]), min_size=1, max_size=3),
    room=st.sampled_from([130, 131, 160]),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3), (16, 1), (17, 1), (40, 2)]),
    dim=st.sampled_from([1, 16, 24, 80]),
    window=st.sampled_from([None, 1, 33, 50, 500]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    scale=st.sampled_from([None, 0.7]),
    dtype=st.sampled_from(TRITON_DTYPES),
    layout=st.sampled_from(["dense", "strided", "heads first"]),
)
def test_triton(
    lengths: list[int],
    room: int,
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    dtype: torch.dtype,
    layout: str,
) -> None:
    """Keys of a row split and not; what lies outside a row's keys is NaN, and uninitialised memory too."""
    options: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
    q = (2 * draw(len(lengths), heads[0], dim)).to(DEVICE, dtype)
    k, v = (cache(lengths, room, heads[1], dim, seed, window).to(DEVICE, dtype) for seed in (1, 2))
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    if layout == "strided":
        q, k, v = strided(q), strided(k), strided(v)
    elif layout == "heads first":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    with poisoned():
        got = decode_attention(q, k, v, counts, backend="triton", **options)
    assert got.dtype == dtype
    assert_within_rounding(got, q, k, v, counts, **options)
    assert torch.equal(got, decode_attention(q, k, v, counts, backend="triton", **options))


@pytest.mark.parametrize("rows", [1, 8])
def test_triton_reads_nothing_outside(rows: int) -> None:
    """Lengths outside [0, S] count as the nearest inside; Inf past a row's length does not matter either."""
    q, k, v = (
        draw(*shape, dtype=torch.float32).to(DEVICE) for shape in ((rows, 4, 8), (rows, 40, 2, 8), (rows, 40, 2, 8))
    )
    k[:, 37:] = v[:, 37:] = torch.inf
    for found, meant in ((-5, 0), (37, 37)):
        counts = [torch.full((rows,), n, dtype=torch.int32, device=DEVICE) for n in (found, meant)]
        got, want = (decode_attention(q, k, v, n, backend="triton") for n in counts)
        assert torch.equal(got, want)
        assert_within_rounding(want, q, k, v, counts[1])
    room = [x[:, :30].contiguous() for x in (k, v)]
    counts = [torch.full((rows,), n, dtype=torch.int32, device=DEVICE) for n in (2**31 - 1, 30)]
    got, want = (decode_attention(q, *room, n, backend="triton") for n in counts)
    assert torch.equal(got, want)
    assert want.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 5, 2, 8), (3, 4, 0, 2, 8), (3, 0, 5, 2, 8), (2, 4, 5, 2, 0)])
def test_triton_sizes_of_zero(shape: tuple[int, ...]) -> None:
    batch, queries, room, heads, dim = shape
    q, k = torch.ones(batch, queries, dim, device=DEVICE), torch.ones(batch, room, heads, dim, device=DEVICE)
    for length in {0, room}:
        lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
        with poisoned():
            got = decode_attention(q, k, k, lengths, backend="triton")
        assert torch.equal(got, torch.full_like(q, float(length > 0)))


def test_triton_many_rows_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts exist only where there are too few programs otherwise, and their number knows nothing of the lengths."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(decode, "launch", lambda kernel, grid, *arguments, **options: seen.append(grid))
    for rows, room, window in (
        (1, 16, None),
        (1, 17, None),
        (1, 5000, None),
        (2, 5000, None),
        (3, 5000, None),
        (1, 5000, 40),
    ):
        k = torch.ones(rows, room, 2, 8, device=DEVICE)
        lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        decode_attention(k[:, 0], k, k, lengths, window=window, backend="triton")
    if DEVICE.type == "cpu":  # the interpreter's row of the launch table: 6 programs, 16 keys a step
        assert seen == [(2, 1), (2, 2), (2,), (2, 3), (2,), (4, 3), (4,), (6, 1), (2, 3), (2,)]
    assert seen[0] == (2, 1)
    assert seen[2] == (2,)


def test_triton_a_softcap_far_above_the_scores_changes_nothing() -> None:
    """Near 0 tanh must keep its relative precision: an error of one fp32 rounding of 1 would be one of 6e-4 in s."""
    q, k, v = (draw(*shape, dtype=torch.float32).to(DEVICE) for shape in ((1, 4, 8), (1, 40, 2, 8), (1, 40, 2, 8)))
    lengths = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    got, want = (decode_attention(q, k, v, lengths, softcap=cap, backend="triton") for cap in (1e4, None))
    # The division, tanh and the product round a score by at most 8 eps of it. Scores that are off by e move the output
    # by at most 2 e max |v|. The sums of p and p v, 40 at most, round as often on both sides.
    eps, largest = torch.finfo(torch.float32).eps, v.abs().max()
    scores = (q.view(1, 2, 2, 1, 8) * k.transpose(1, 2)[:, :, None]).sum(-1).abs().max() * 8**-0.5
    assert (got - want).abs().max() <= (2 * 8 * scores + 2 * 40) * eps * largest


def test_triton_leaves_long_heads_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, lengths = torch.ones(1, 1, 513), torch.ones(1, 3, 1, 513), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^q: backend 'triton' takes heads of at most 512 dimensions, found 513"):
        decode_attention(q, k, k, lengths, backend="triton")
    monkeypatch.setenv("AFINA_BACKEND", "triton")
    assert_near([decode_attention(q, k, k, lengths)], [q], 1e-6)


def test_splits_fill_whole_rounds_of_programs() -> None:
    """132 multiprocessors with two programs each; 8 key heads, and 64 tiles of keys."""
    assert [_splits(8 * batch, 264, 64) for batch in (1, 4, 16, 20, 33, 64)] == [33, 8, 2, 3, 1, 1]
    assert _splits(8, 264, 5) == 5  # no part without a key
    assert _splits(8, 264, 0) == 1
    for work in range(1, 600):
        best = _splits(work, 264, 64)
        rounds = [-(-work * n // 264) / n for n in range(1, best + 1)]
        assert min(rounds) == rounds[-1] < min(rounds[:-1], default=math.inf)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0, "scale": 0.7}])
def test_rows_of_a_pool(backend: str, options: dict[str, Any]) -> None:
    """Each row's tokens lie anywhere in one memory, the heads apart; between them is nothing that may be read."""
    lengths, starts = [5, 0, 9, 1], [20, 7, 2, 15]
    pools = []
    for seed in (1, 2):
        pool = torch.full((2, 30, 16), torch.nan)
        for row, (start, length) in enumerate(zip(starts, lengths)):
            pool[:, start : start + length] = draw(2, length, 16, seed=10 * seed + row)
        pools.append(pool.transpose(0, 1).to(DEVICE))
    k, v = pools
    q, counts = draw(4, 6, 16).float().to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    first = torch.tensor(starts, device=DEVICE)
    got = decode_attention(q, k, v, counts, starts=first, longest=9, backend=backend, **options)
    own = [torch.stack([x[s : s + 9].nan_to_num(0.0) for s in starts]) for x in (k, v)]
    assert_near([got], [decode_attention_reference(q, *own, counts, **options)], 1e-5)
    if backend == "torch":
        alone = [
            decode_attention(q[i : i + 1], k, v, counts[i : i + 1], starts=first[i : i + 1], **options)
            for i in range(4)
        ]
        assert torch.equal(got, torch.cat(alone))


def test_a_pool_is_checked() -> None:
    q, pool = draw(2, 2, 4).float(), draw(9, 2, 4).float()
    lengths, starts = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0, 5])
    decode_attention(q, pool, pool, lengths, starts=starts)
    with pytest.raises(ValueError, match="starts: expected int64"):
        decode_attention(q, pool, pool, lengths, starts=starts.int())
    with pytest.raises(ValueError, match="expected rows within the pool's 9, found 4 from 6 on"):
        decode_attention(q, pool, pool, lengths, starts=starts + 1)
    with pytest.raises(ValueError, match=r"k_cache: expected \(N, Hkv, D\)"):
        decode_attention(q, pool[None], pool[None], lengths, starts=starts)
