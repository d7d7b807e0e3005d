"""Decoding attention is the last row of attention over the row's own keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DRAWN, assert_near, draw, strided
from torch import Tensor

from afina.kernels.attention import attention
from afina.kernels.decode import decode_attention, decode_attention_reference


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
    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    p = torch.softmax(torch.einsum("bhd,bshd->bhs", q, keys) * 80**-0.5, dim=-1)
    plain = torch.einsum("bhs,bshd->bhd", p, values)
    exact = decode_attention_reference(q.double(), k.double(), v.double(), lengths)
    error, allowed = ((x.double() - exact).abs().max() for x in (decode_attention(q, k, v, lengths), plain))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


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
        ("window", {"window": 0}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_validation(name: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"q": torch.ones(2, 4, 8), "k_cache": torch.ones(2, 5, 2, 8)}
    good |= {"v_cache": good["k_cache"], "lengths": torch.ones(2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        decode_attention(**(good | change))
