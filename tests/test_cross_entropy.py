"""Cross-entropy of logits and of a head's hidden rows, beside the formulas and torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DRAWN, assert_low_precision, assert_near, assert_same_bits, draw, evaluate, strided
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afina.kernels import cross_entropy as file
from afina.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "softcap": st.sampled_from([None, 3.0]),
        "label_smoothing": st.sampled_from([0.0, 0.3]),
        "z_loss": st.sampled_from([0.0, 0.2]),
        "ignore_index": st.sampled_from([-100, 2]),
    }
)
IGNORED = st.sampled_from(["none", "some", "all"])
KINDS = st.sampled_from(["dense", "strided", "broadcast"])


@contextmanager
def chunks(rows: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "CHUNK_ROWS", (rows, rows))
        yield


def labels(rows: int, vocab: int, ignored: str = "none", ignore_index: int = -100) -> Tensor:
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(5))
    if ignored != "none":
        targets[:: 1 if ignored == "all" else 2] = ignore_index
    return targets


@DRAWN
@given(rows=st.integers(0, 9), vocab=st.integers(3, 40), ignored=IGNORED, kind=KINDS, options=OPTIONS)
def test_logits(rows: int, vocab: int, ignored: str, kind: str, options: dict[str, Any]) -> None:
    x, targets = draw(rows, vocab) * 3, labels(rows, vocab, ignored, options["ignore_index"])
    got = evaluate(lambda x: cross_entropy(x, targets, **options), [strided(x) if kind == "strided" else x], kind)
    assert_near(got, evaluate(lambda x: cross_entropy_reference(x, targets, **options), [x], kind))


@DRAWN
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 7),
    vocab=st.integers(3, 40),
    ignored=IGNORED,
    kind=KINDS,
    bias=st.booleans(),
    chunk=st.sampled_from([1, 2, 4, 100]),
    options=OPTIONS,
)
def test_linear(
    rows: int, width: int, vocab: int, ignored: str, kind: str, bias: bool, chunk: int, options: dict[str, Any]
) -> None:
    """With more rows than a chunk holds, and fewer."""
    inputs = [draw(rows, width) * 2, draw(vocab, width, seed=1), *([draw(vocab, seed=2)] if bias else [])]
    targets = labels(rows, vocab, ignored, options["ignore_index"])

    def run(f: Any, h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return f(h, w, targets, bias=b, **options)

    with chunks(chunk):
        got = evaluate(
            partial(run, linear_cross_entropy), [strided(x) if kind == "strided" else x for x in inputs], kind
        )
    assert_near(got, evaluate(partial(run, linear_cross_entropy_reference), inputs, kind))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_against_torch(reduction: str, smoothing: float, dtype: torch.dtype) -> None:
    h, w, b, targets = draw(11, 6), draw(700, 6, seed=1), draw(700, seed=2), labels(11, 700, "some")
    ours = {"reduction": reduction, "label_smoothing": smoothing}

    def oracle(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b), targets, **ours)  # type: ignore[arg-type]

    want = evaluate(oracle, [h, w, b])
    short = targets.to(dtype)
    with chunks(4):
        assert_near(evaluate(lambda h, w, b: linear_cross_entropy(h, w, short, bias=b, **ours), [h, w, b]), want)  # type: ignore[arg-type]
    assert_near(evaluate(lambda h, w, b: cross_entropy(F.linear(h, w, b), short, **ours), [h, w, b]), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_learn_from(reduction: str, rows: int) -> None:
    targets = torch.full((rows,), -100)
    for got in (
        evaluate(lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction), [draw(rows, 4), draw(5, 4)]),
        evaluate(lambda x: cross_entropy(x, targets, reduction=reduction), [draw(rows, 5) / 0.0]),  # even if infinite
    ):
        assert all(torch.equal(x, torch.zeros_like(x)) for x in got)


@pytest.mark.parametrize("outside", [-1, 5, 1 << 40])
def test_target_outside_the_vocabulary(outside: int) -> None:
    targets = torch.tensor([1, outside, -100, 4])
    bad = torch.tensor([False, True, False, False])
    h, w = draw(4, 3), draw(5, 3, seed=1)
    loss, dh, _ = evaluate(lambda h, w: linear_cross_entropy(h, w, targets, reduction="none"), [h, w])
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(dh.isnan(), bad[:, None].expand(4, 3))
    loss, dx = evaluate(lambda x: cross_entropy(x, targets, reduction="none"), [draw(4, 5)])
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(dx.isnan(), bad[:, None].expand(4, 5))
    for reduction in ("mean", "sum"):
        assert linear_cross_entropy(h, w, targets, reduction=reduction).isnan()
        assert cross_entropy(h @ w.t(), targets, reduction=reduction).isnan()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_no_gradient_is_made_for_what_is_frozen(
    frozen: tuple[int, ...], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    run = file._run

    def spy(*args: Any) -> Any:
        made.append(run(*args))
        return made[-1]

    monkeypatch.setattr(file, "_run", spy)
    inputs, targets = [draw(6, 4), draw(9, 4, seed=1), draw(9, seed=2)], labels(6, 9, "some")
    leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction)
    plain = [x.clone().requires_grad_() for x in inputs]
    want = linear_cross_entropy_reference(*plain[:2], targets, bias=plain[2])
    want.backward()
    mean = loss.sum() / (3 if reduction == "none" else 1)
    assert_near([mean.detach()], [want.detach()])
    if mean.requires_grad:
        mean.backward()
    for i, (x, y) in enumerate(zip(leaves, plain)):
        if i in frozen:
            assert x.grad is None
        else:
            assert_near([x.grad], [y.grad])  # type: ignore[list-item]
    for _, gradients in made:
        assert all(gradients[i] is None for i in frozen)


class _Largest(TorchDispatchMode):
    """The number of values of the largest tensor that any op makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return made


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_logits_are_never_whole(reduction: str) -> None:
    h, w, targets = draw(40, 2), draw(50, 2, seed=1), labels(40, 50, "some")
    with chunks(3), _Largest() as largest:
        evaluate(lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction, softcap=9.0), [h, w])
    assert largest.numel == 3 * 50


def test_rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small vocabulary is held to the most rows of a chunk, a large one to its bytes."""
    monkeypatch.setattr(file, "CHUNK_ROWS", (2, 6))
    targets = labels(20, 10)
    for size, rows in ((1, 2), (160, 4), (10000, 6)):
        monkeypatch.setattr(file, "CHUNK_BYTES", size)
        with _Largest() as largest:
            linear_cross_entropy(draw(20, 1), draw(10, 1), targets)
        assert largest.numel == max(20, rows * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    x, targets = draw(6, 9, dtype=dtype) * 1e4, labels(6, 9)
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"softcap": 30.0}):
        got = evaluate(lambda x, o=options: cross_entropy(x, targets, **o), [x])
        assert all(y.isfinite().all() for y in got)
        assert_near(got, evaluate(lambda x, o=options: cross_entropy_reference(x, targets, **o), [x]), 1e-5)
        linear = partial(linear_cross_entropy, weight=torch.eye(9, dtype=dtype), targets=targets, **options)
        assert_near(evaluate(linear, [x]), got, 1e-5)


def test_wide_rows_and_repeats() -> None:
    """Rows much wider than a vector register, whose softmax is taken in place."""
    h, w, targets = draw(9, 8), draw(5003, 8, seed=1), labels(9, 5003, "some")
    with chunks(4):
        got = evaluate(lambda h, w: linear_cross_entropy(h, w, targets), [h, w])
        assert_same_bits(lambda h, w: linear_cross_entropy(h, w, targets), [h.float(), w.float()])
    assert_near(got, evaluate(lambda h, w: linear_cross_entropy_reference(h, w, targets), [h, w]))
    assert_same_bits(lambda x: cross_entropy(x, targets), [(h @ w.t()).float()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_precision(dtype: torch.dtype, reduction: str) -> None:
    inputs, targets = [draw(12, 32), draw(90, 32, seed=1) / 4, draw(90, seed=2)], labels(12, 90, "some")

    def run(f: Any, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return f(h, w, targets, bias=b, reduction=reduction)

    def formula(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b), targets, reduction=reduction)

    with chunks(5):
        assert_low_precision(
            partial(run, linear_cross_entropy), formula, partial(run, linear_cross_entropy_reference), inputs, dtype
        )
    own = {"targets": targets, "reduction": reduction}
    logits = [draw(12, 90) * 3]
    reference = partial(cross_entropy_reference, **own)  # type: ignore[arg-type]
    oracle = partial(F.cross_entropy, target=targets, reduction=reduction)
    assert_low_precision(partial(cross_entropy, **own), oracle, reference, logits, dtype)  # type: ignore[arg-type]
    assert cross_entropy(logits[0].to(dtype), targets).dtype == torch.float32


H, W, T = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("targets", {"targets": T[:2]}),
        ("targets", {"targets": T[:, None]}),
        ("targets", {"targets": T.float()}),
        ("targets", {"targets": T.to("meta")}),
        ("reduction", {"reduction": "avg"}),
        ("softcap", {"softcap": 0.0}),
        ("label_smoothing", {"label_smoothing": 1.0}),
        ("label_smoothing", {"label_smoothing": -0.1}),
        ("backend", {"backend": "cuda"}),
        ("rows", {"rows": H.long()}),
        ("rows", {"rows": H[0]}),
    ],
)
def test_validation(linear: bool, name: str, change: dict[str, Any]) -> None:
    first = "hidden" if linear else "logits"
    good: dict[str, Any] = {first: H, "targets": T} | ({"weight": W} if linear else {})
    if name == "rows":
        name, change = first, {first: change["rows"]}
    with pytest.raises(ValueError, match=f"^{name}: "):
        (linear_cross_entropy if linear else cross_entropy)(**(good | change))


@pytest.mark.parametrize("weight", [W.half(), W[:, :3], W[0]])
def test_validation_of_the_head(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^weight: "):
        linear_cross_entropy(H, weight, T)
    with pytest.raises(ValueError, match=r"^bias: "):
        linear_cross_entropy(H, W, T, bias=torch.ones(4))
