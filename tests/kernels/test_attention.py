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
from attention_rounding import rounding_bounds
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    DRAWN,
    TRITON_DTYPES,
    assert_low_precision,
    assert_near,
    assert_same_bits,
    draw,
    evaluate,
    poisoned,
    strided,
    upstream,
)
from torch import Tensor

from afina.kernels import attention as file
from afina.kernels import attention_triton
from afina.kernels.attention import attention, attention_reference

LENGTHS = [5, 0, 1, 7, 6, 1, 0]
PATHS = ["flash", "blocks", "tiles"]
SOMETIMES = {"softcap": [None, 1.5], "scale": [None, 0.9], "window": [None, 1, 3, 50]}


@contextmanager
def path(name: str) -> Iterator[None]:
    """flash: torch's, in 16 bits too; blocks: at these sizes all queries at once; tiles: 2 queries of a document."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("afina.kernels.backend.bfloat16_instructions", lambda: "AMX")
        if name != "flash":
            patch.setattr("afina.kernels.attention_torch.has_flash", lambda *_: False)
        if name == "tiles":
            patch.setattr("afina.kernels.attention_torch.BLOCK_ROWS", 2)
            patch.setattr("afina.kernels.attention_torch.BLOCK_SCORES", 1)
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


def triton(**options: Any) -> partial[Tensor]:
    return partial(attention, backend="triton", **options)


def check_triton(inputs: list[Tensor], dtype: torch.dtype, kind: str, options: dict[str, Any]) -> None:
    """Each number differs from the formulas in fp64 by no more than `rounding_bounds` allows."""
    inputs = [x.to(DEVICE, dtype) for x in inputs]
    low = [strided(x) for x in inputs] if kind == "strided" else inputs
    wide = [x.double() for x in low]
    exact = evaluate(partial(attention_reference, **options), wide, kind)
    with poisoned():
        ours = evaluate(triton(**options), low, kind)
    arguments = [*wide, upstream(exact[0], kind)]
    cu, rest = options.get("cu_seqlens"), {name: x for name, x in options.items() if name != "cu_seqlens"}
    if cu is None:
        bounds = rounding_bounds(*arguments, dtype, **rest)
    else:
        pieces = [rounding_bounds(*(x[None, a:b] for x in arguments), dtype, **rest) for a, b in pairwise(cu.tolist())]
        bounds = [torch.cat(parts, dim=1)[0] for parts in zip(*pieces)]
    for i, (got, want, bound) in enumerate(zip(ours, exact, bounds, strict=True)):
        assert got.dtype == dtype, i
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"result {i}: {(error - bound).max()} beyond what is due to rounding"


# The interpreter is slow: each example has all the groups, widths and options that fit into few tiles of 16.
TRITON_DRAWN = settings(DRAWN, max_examples=12, phases=[Phase.generate])
LENGTH = st.sampled_from([0, 1, 5, 16, 17, 33])
TRITON_OPTIONS = st.fixed_dictionaries(
    {
        "causal": st.sampled_from([True, True, False]),
        "window": st.sampled_from([None, 1, 7, 20, 40]),
        "softcap": st.sampled_from([None, 1.5]),
        "scale": st.sampled_from([None, 0.4, -0.4, 0.0]),
    }
)
HEADS = st.sampled_from([(1, 1), (2, 1), (3, 1), (7, 1), (2, 2), (4, 2)])
KIND = st.sampled_from(["dense", "strided", "broadcast"])


@TRITON_DRAWN
@given(
    sizes=st.tuples(LENGTH, LENGTH),
    square=st.booleans(),
    heads=HEADS,
    dim=st.sampled_from([16, 24, 64, 80]),
    options=TRITON_OPTIONS,
    dtype=st.sampled_from(TRITON_DTYPES),
    kind=KIND,
)
def test_triton_rectangles(
    sizes: tuple[int, int],
    square: bool,
    heads: tuple[int, int],
    dim: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    kind: str,
) -> None:
    """Rows that see nothing (S < T), no rows, no keys, and all options."""
    length, keys = sizes
    options = options | ({} if options["causal"] else {"window": None})
    batch, keys = (2 if heads[0] < 3 else 1), length if square else keys
    inputs = tokens(batch, length, heads=heads, dim=dim, keys=keys)
    check_triton(inputs, dtype, kind, options)


@TRITON_DRAWN
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 16, 21]), max_size=6),
    heads=HEADS,
    dim=st.sampled_from([16, 24]),
    options=TRITON_OPTIONS,
    dtype=st.sampled_from(TRITON_DTYPES),
    kind=KIND,
)
def test_triton_packed(
    lengths: list[int],
    heads: tuple[int, int],
    dim: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    kind: str,
) -> None:
    """Empty documents and short ones, several in a tile; windows longer than a document."""
    options = options | ({} if options["causal"] else {"window": None}) | {"cu_seqlens": offsets(lengths)}
    if not sum(lengths):
        empty = [x.to(DEVICE) for x in tokens(0, heads=heads, dim=dim)]
        assert [len(x) for x in evaluate(triton(**options), [x.float() for x in empty])] == [0] * 4
        return
    check_triton(tokens(sum(lengths), heads=heads, dim=dim), dtype, kind, options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3, "softcap": 2.0}], ids=str)
def test_triton_documents_do_not_touch(options: dict[str, Any]) -> None:
    """Not by a bit, though they share tiles; nor does a NaN pass from one to another, forward or backward."""
    cu = offsets([5, 0, 1, 19, 9])
    inputs = [x.to(DEVICE, torch.float32) for x in tokens(34, heads=(2, 1))]
    run = triton(cu_seqlens=cu, **options)
    before = evaluate(run, inputs)
    for a, b, values in [(0, 5, (torch.nan,)), (5, 6, (torch.nan,)), (6, 25, (3.0, torch.nan)), (25, 34, (torch.nan,))]:
        for value in values:
            changed = [x.clone() for x in inputs]
            for x in changed:
                x[a:b] += value
            after = evaluate(run, changed)
            for x, y in zip(before, after):
                assert torch.equal(x[:a], y[:a])
                assert torch.equal(x[b:], y[b:])
            assert not torch.equal(before[0], after[0])


def test_triton_gradient_of_nan_stays_in_its_document() -> None:
    cu = offsets([5, 20])
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in tokens(25, heads=(2, 1))]
    upstream = torch.ones(25, 2, 16, device=DEVICE)
    out = triton(cu_seqlens=cu)(*leaves)
    before = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    upstream[:5] = torch.nan
    after = torch.autograd.grad(out, leaves, upstream)
    for x, y in zip(before, after):
        assert torch.equal(x[5:], y[5:])
        assert y[:5].isnan().any()


def test_triton_extreme_scores() -> None:
    """Scores of +-1e4: a softmax of one or a few keys. In fp32 such a score is known to a few 1e-2, and so is p."""
    q, k, v = tokens(1, 20, heads=(2, 1))
    for options in ({}, {"softcap": 50.0}, {"causal": False}):
        for dtype in (torch.float32, torch.float16):
            check_triton([q * 60, k * 60, v], dtype, "dense", options)


@pytest.mark.slow
def test_triton_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a fused buffer and heads before tokens give the bits of contiguous tensors; so does any order."""
    fused = draw(2, 19, 8, 24, dtype=torch.float32).to(DEVICE)
    parts = [x.contiguous() for x in fused.split([4, 2, 2], dim=2)]
    want = evaluate(triton(window=9), parts)
    layouts = [list(fused.split([4, 2, 2], dim=2)), [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]]
    for layout in layouts:
        assert all(torch.equal(x, y) for x, y in zip(want, evaluate(triton(window=9), layout)))
    monkeypatch.setattr(attention_triton, "L2_BYTES", 0)
    assert all(torch.equal(x, y) for x, y in zip(want, evaluate(triton(window=9), parts)))
    packed = triton(cu_seqlens=offsets([7, 12]))
    first = [x[0] for x in parts]
    assert all(torch.equal(x, y) for x, y in zip(evaluate(packed, first), evaluate(packed, [x[0] for x in layouts[1]])))
    assert_same_bits(packed, first)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_saved_values_do_not_hold_the_fused_buffer(backend: str) -> None:
    """Queries and keys that were rotated lie elsewhere; the values alone would keep all three alive."""
    fused = draw(1, 5, 4, 16, dtype=torch.float32).to(DEVICE).requires_grad_()
    q, k, v = fused.split([2, 1, 1], dim=2)
    out = attention(q * 1.0, k * 1.0, v, backend=backend)
    saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert all(x.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr() for x in saved)
    out = attention(q, k, v, backend=backend)  # all of them needed: no copy
    assert out.grad_fn.saved_tensors[2].data_ptr() == v.data_ptr()  # type: ignore[union-attr]


def test_triton_gradients_that_nobody_asks_for() -> None:
    inputs = [x.to(DEVICE, torch.float32) for x in tokens(1, 9, heads=(2, 1))]
    want = evaluate(triton(), inputs, "broadcast")[1:]
    for wanted in ([0], [1], [2], [0, 2]):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        out = triton()(*leaves)
        out.backward(out.new_tensor(-1.75).expand(out.shape))
        for i, (x, y) in enumerate(zip(leaves, want)):
            assert (x.grad is None) if i not in wanted else torch.equal(x.grad, y), i


def test_boundaries_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    plain = file.document_offsets
    monkeypatch.setattr(file, "document_offsets", lambda *a: read.append(a) or plain(*a))
    q, k, v = (x.to(DEVICE, torch.float32) for x in tokens(6))
    for place in ("cpu", DEVICE):
        cu = offsets([2, 4]).to(place)
        for backend in ("triton", "torch"):
            first = attention(q, k, v, cu_seqlens=cu, backend=backend)
            assert torch.equal(first, attention(q, k, v, cu_seqlens=cu, backend=backend))
        assert len(read) == 1
        with pytest.raises(ValueError, match=r"^cu_seqlens: "):
            attention(q[:5], k[:5], v[:5], cu_seqlens=cu, backend="triton")
        attention(q, k, v, cu_seqlens=cu, backend="triton")
        cu[1] = 3
        for backend in ("triton", "torch"):
            changed = attention(q, k, v, cu_seqlens=cu, backend=backend)
            other = attention(q, k, v, cu_seqlens=offsets([3, 3]), backend=backend)
            assert torch.equal(changed, other)
            assert not torch.equal(changed, first)
        cu[1] = 7
        with pytest.raises(ValueError, match=r"^cu_seqlens: "):
            attention(q, k, v, cu_seqlens=cu, backend="triton")
        read.clear()
    with torch.inference_mode():
        cu = offsets([2, 4])
        attention(q, k, v, cu_seqlens=cu)
        cu[1] = 3
        assert torch.equal(attention(q, k, v, cu_seqlens=cu), attention(q, k, v, cu_seqlens=offsets([3, 3])))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa(heads: tuple[int, int], scale: float | None) -> None:
    for length, keys, options in [(5, 5, {}), (5, 7, {"causal": False}), (1, 4, {}), (0, 3, {"causal": False}),
                                  (4, 4, {"window": 4})]:  # fmt: skip
        options = {"scale": scale} | options
        inputs = tokens(2, length, heads=heads, keys=keys)
        got = evaluate(partial(attention, backend="sdpa", **options), [strided(x) for x in inputs], "strided")
        assert_near(got, evaluate(partial(attention_reference, **options), inputs, "strided"))
    for lengths in ([3, 0, 3, 3], [4], [0]):
        inputs, options = tokens(sum(lengths), heads=heads), {"cu_seqlens": offsets(lengths), "scale": scale}
        got = evaluate(partial(attention, backend="sdpa", **options), inputs)
        assert_near(got, evaluate(partial(attention_reference, **options), inputs))


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("softcap", {"softcap": 2.0}),
        ("window", {"window": 2}),
        ("documents of several lengths", {"cu_seqlens": offsets([1, 3])}),
        ("4 queries with 5 keys", {"k": torch.ones(1, 5, 1, 8), "v": torch.ones(1, 5, 1, 8)}),
        ("4 queries with 0 keys", {"k": torch.ones(1, 0, 1, 8), "v": torch.ones(1, 0, 1, 8), "causal": False}),
    ],
)
def test_sdpa_refuses(what: str, options: dict[str, Any]) -> None:
    x = torch.ones(1, 4, 1, 8)
    inputs = dict.fromkeys("qkv", x[0] if "cu_seqlens" in options else x) | options
    with pytest.raises(ValueError, match=f"^backend: 'sdpa' cannot compute attention with {what}"):
        attention(**inputs, backend="sdpa")


def test_triton_refuses_wide_heads() -> None:
    x = torch.ones(1, 2, 1, 264, device=DEVICE)
    with pytest.raises(ValueError, match=r"^q: "):
        attention(x, x, x, backend="triton")
    assert attention(x, x, x).shape == x.shape


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.5, "scale": 0.9}, {"causal": False}])
def test_spans_on_the_device_are_the_same_documents(options: dict[str, Any], backend: str) -> None:
    """Also after they change in place, as between two replays of a CUDA graph."""
    total = sum(LENGTHS)
    q, k, v = (x.to(DEVICE, torch.float32).requires_grad_() for x in tokens(total))
    spans = torch.zeros(2, total, dtype=torch.int32, device=DEVICE)
    for lengths in (LENGTHS, [total - 4, 4]):
        bounds = offsets(lengths)
        ends = torch.stack([bounds[:-1], bounds[1:]]).repeat_interleave(bounds.diff(), dim=1)
        spans.copy_(ends)
        found = attention(q, k, v, spans=spans, backend=backend, **options)
        expected = attention(q, k, v, cu_seqlens=bounds, backend=backend, **options)
        up = draw(*found.shape, seed=3).to(found)
        pairs = [(found, expected)]
        pairs += list(zip(*(torch.autograd.grad(y, (q, k, v), up) for y in (found, expected))))
        for a, b in pairs:
            assert torch.equal(a, b) if backend == "triton" else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_spans_that_do_not_fit_are_refused() -> None:
    q, k, v = (x.to(DEVICE) for x in tokens(6))
    good = torch.stack([torch.zeros(6), torch.full((6,), 6.0)]).int().to(DEVICE)
    bad = {"expected int32": good.long(), r"expected \(2, 6\)": good[:, :5], "int32 on": good.to("meta")}
    for found, spans in bad.items():
        with pytest.raises(ValueError, match=f"^spans: .*{found}"):
            attention(q, k, v, spans=spans)
    with pytest.raises(ValueError, match=r"^spans: expected None where cu_seqlens"):
        attention(q, k, v, spans=good, cu_seqlens=offsets([6]))
    with pytest.raises(ValueError, match="sdpa"):
        attention(q, k, v, spans=good, backend="sdpa")
