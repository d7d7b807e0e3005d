"""Cross-entropy of logits and of a head's hidden rows, beside the formulas and torch's own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    DEVICE,
    DRAWN,
    TRITON_DTYPES,
    assert_low_precision,
    assert_near,
    assert_no_worse,
    assert_same_bits,
    draw,
    evaluate,
    strided,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afina.kernels import cross_entropy as public
from afina.kernels import cross_entropy_chunks as chunked
from afina.kernels import cross_entropy_triton as in_triton
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
# The implementations of the head, with the dtype that each is compared in.
HEADS = pytest.mark.parametrize(
    ("head", "dtype"),
    [
        (partial(linear_cross_entropy, backend="torch"), torch.float64),
        (partial(linear_cross_entropy, backend="torch", lean=True), torch.float64),
        (partial(linear_cross_entropy, backend="triton"), torch.float32),
        (partial(linear_cross_entropy, backend="triton", lean=True), torch.float32),
    ],
    ids=["torch", "torch-lean", "triton", "triton-lean"],
)
LOGITS = pytest.mark.parametrize("backend", ["torch", "triton"])


@contextmanager
def chunks(rows: int) -> Iterator[None]:
    """Make chunks of at most so many rows, and in the lean mode tiles of 20 (fp64) to 80 (16 bits) columns."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHUNK_ROWS", "GPU_CHUNK_ROWS", "SUM_ROWS"):
            patch.setattr(chunked, name, (rows, rows))
        patch.setattr(chunked, "TILE_BYTES", dict.fromkeys(chunked.TILE_BYTES, 160 * rows))
        yield


def assert_right(function: Any, reference: Any, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Results and gradients are near the reference in fp64, and else no worse than the reference is in `dtype`.

    In fp64 1e-10 holds for every order of summation: a sum of at most 5,003 exponentials is off by as many roundings,
    1.1e-12 of it, and logits of order 10,000 by one rounding each, 1e-12.
    """
    if dtype == torch.float64:
        assert_near(evaluate(function, inputs), evaluate(reference, inputs))
    else:
        assert_low_precision(function, reference, reference, inputs, dtype)


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
    lean=st.booleans(),
    options=OPTIONS,
)
def test_linear(
    rows: int,
    width: int,
    vocab: int,
    ignored: str,
    kind: str,
    bias: bool,
    chunk: int,
    lean: bool,
    options: dict[str, Any],
) -> None:
    """There are more rows than a chunk holds, or fewer; the lean mode has one row or column of tiles, or several."""
    inputs = [draw(rows, width) * 2, draw(vocab, width, seed=1), *([draw(vocab, seed=2)] if bias else [])]
    targets = labels(rows, vocab, ignored, options["ignore_index"])

    def run(f: Any, h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return f(h, w, targets, bias=b, **options)

    with chunks(chunk):
        got = evaluate(
            partial(run, partial(linear_cross_entropy, lean=lean)),
            [strided(x) if kind == "strided" else x for x in inputs],
            kind,
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


@HEADS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_learn_from(head: Any, dtype: torch.dtype, reduction: str, rows: int) -> None:
    targets = torch.full((rows,), -100)
    inputs = [draw(rows, 4, dtype=dtype).to(DEVICE), draw(5, 4, dtype=dtype).to(DEVICE)]
    got = evaluate(lambda h, w: head(h, w, targets, reduction=reduction), inputs)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in got)


@LOGITS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_ignored_logits_may_be_infinite(backend: str, reduction: str, rows: int) -> None:
    targets = torch.full((rows,), -100)
    logits = draw(rows, 50, dtype=torch.float32).to(DEVICE) / 0.0
    got = evaluate(lambda x: cross_entropy(x, targets, reduction=reduction, backend=backend), [logits])
    assert all(torch.equal(x, torch.zeros_like(x)) for x in got)


@HEADS
@pytest.mark.parametrize("outside", [-1, 5, 1 << 40])
def test_target_outside_the_vocabulary(head: Any, dtype: torch.dtype, outside: int) -> None:
    targets = torch.tensor([1, outside, -100, 4])
    bad = torch.tensor([False, True, False, False], device=DEVICE)
    h, w = draw(4, 3, dtype=dtype).to(DEVICE), draw(5, 3, seed=1, dtype=dtype).to(DEVICE)
    with chunks(1):
        loss, dh, dw = evaluate(lambda h, w: head(h, w, targets, reduction="none"), [h, w])
        assert torch.equal(loss.isnan(), bad)
        assert torch.equal(dh.isnan(), bad[:, None].expand(4, 3))
        assert dw.isnan().all()
        for reduction in ("mean", "sum"):
            assert head(h, w, targets, reduction=reduction).isnan()


@LOGITS
@pytest.mark.parametrize("outside", [-1, 50, 1 << 40])
def test_target_outside_the_logits(backend: str, outside: int) -> None:
    targets = torch.tensor([1, outside, -100, 49])
    bad = torch.tensor([False, True, False, False], device=DEVICE)
    x = draw(4, 50, dtype=torch.float32).to(DEVICE)
    loss, dx = evaluate(lambda x: cross_entropy(x, targets, reduction="none", backend=backend), [x])
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(dx.isnan(), bad[:, None].expand(4, 50))
    for reduction in ("mean", "sum"):
        assert cross_entropy(x, targets, reduction=reduction, backend=backend).isnan()


@HEADS
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_no_gradient_is_made_for_what_is_frozen(
    head: Any, dtype: torch.dtype, frozen: tuple[int, ...], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    head_loss = public.head_loss

    def spy(*args: Any) -> Any:
        made.append(head_loss(*args))
        return made[-1]

    monkeypatch.setattr(public, "head_loss", spy)
    inputs, targets = [draw(6, 4), draw(9, 4, seed=1), draw(9, seed=2)], labels(6, 9, "some")
    leaves = [x.to(DEVICE, dtype, copy=True).requires_grad_(i not in frozen) for i, x in enumerate(inputs)]

    def formula(wide: torch.dtype) -> list[Tensor]:
        """Compute the mean, then its gradients."""
        own = [x.detach().to(wide, copy=True).requires_grad_() for x in leaves]
        mean = linear_cross_entropy_reference(*own[:2], targets.to(DEVICE), bias=own[2])
        return [mean.detach(), *torch.autograd.grad(mean, own)]

    plain, exact = formula(dtype), formula(torch.float64)

    def check(got: Tensor, i: int) -> None:
        if dtype == torch.float64:
            assert_near([got], [exact[i]])
        else:
            assert_no_worse([got], [plain[i]], [exact[i]], dtype)

    for rows in (2, 100):
        with chunks(rows):
            loss = head(*leaves[:2], targets, bias=leaves[2], reduction=reduction)
            mean = loss.sum() / (3 if reduction == "none" else 1)
            check(mean.detach(), 0)
            if mean.requires_grad:
                mean.backward()
        for i, x in enumerate(leaves):
            if i in frozen:
                assert x.grad is None
            else:
                check(x.grad, i + 1)  # type: ignore[arg-type]
                x.grad = None
    for _, gradients in made:
        assert all(gradients[i] is None for i in frozen)


@HEADS
def test_without_gradients_only_losses_are_made(head: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad no gradient is made, though the parameters want one; the logits stay as the product left them."""
    inputs = [draw(6, 4, dtype=dtype), draw(9, 4, seed=1, dtype=dtype)]
    h, w = (x.to(DEVICE).requires_grad_() for x in inputs)
    targets = labels(6, 9, "some")
    rooms: list[Tensor] = []
    step = chunked.launch_loss

    def spy(x: Tensor, grad: Tensor | None, *args: Any, **options: Any) -> None:
        before = x.clone()
        step(x, grad, *args, **options)
        assert grad is None
        assert torch.equal(x, before)
        rooms.append(x)

    with_gradients = head(h, w, targets).detach()
    monkeypatch.setattr(chunked, "launch_loss", spy)
    with torch.no_grad():
        assert torch.equal(head(h, w, targets), with_gradients)
    assert len(rooms) == (head.keywords["backend"] == "triton")


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


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}], ids=str)
def test_rows_of_logits_that_are_longer_than_the_vocabulary(options: dict[str, float]) -> None:
    """Rows of a large vocabulary that is no round number are filled up, and the filling must not count in any chunk."""
    vocab = chunked.CPU_PITCH + 27
    h, w, targets = draw(20, 5), draw(vocab, 5, seed=1), labels(20, vocab, "some")
    with chunks(3):
        got = evaluate(lambda h, w: linear_cross_entropy(h, w, targets, **options), [h, w])
    assert_near(got, evaluate(lambda h, w: cross_entropy_reference(h @ w.t(), targets, **options), [h, w]))


def test_rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small vocabulary is held to the most rows of a chunk, a large one to its bytes."""
    monkeypatch.setattr(chunked, "CHUNK_ROWS", (2, 6))
    targets = labels(20, 10)
    for size, rows in ((1, 2), (160, 4), (10000, 6)):
        monkeypatch.setattr(chunked, "CHUNK_BYTES", size)
        with _Largest() as largest:
            linear_cross_entropy(draw(20, 1), draw(10, 1), targets)
        assert largest.numel == max(20, rows * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    x, targets = draw(6, 9, dtype=dtype) * 1e4, labels(6, 9)
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"softcap": 30.0}):
        reference = partial(cross_entropy_reference, targets=targets, **options)
        assert all(y.isfinite().all() for y in evaluate(partial(cross_entropy, targets=targets, **options), [x]))
        assert_right(partial(cross_entropy, targets=targets, **options), reference, [x], dtype)

        def linear(x: Tensor, options: dict[str, float] = options) -> Tensor:
            return linear_cross_entropy(x, torch.eye(9, dtype=x.dtype), targets, **options)

        assert_right(linear, reference, [x], dtype)


def test_wide_rows_and_repeats() -> None:
    """The softmax of rows much wider than a vector register is taken in place."""
    h, w, targets = draw(9, 8), draw(5003, 8, seed=1), labels(9, 5003, "some")
    with chunks(4):
        got = evaluate(lambda h, w: linear_cross_entropy(h, w, targets), [h, w])
        assert_same_bits(lambda h, w: linear_cross_entropy(h, w, targets), [h.float(), w.float()])
    assert_near(got, evaluate(lambda h, w: linear_cross_entropy_reference(h, w, targets), [h, w]))
    assert_same_bits(lambda x: cross_entropy(x, targets), [(h @ w.t()).float()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("instructions", [None, "AMX"])  # with them the products are bfloat16's own
def test_low_precision(
    dtype: torch.dtype, reduction: str, instructions: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afina.kernels.backend.bfloat16_instructions", lambda: instructions)
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
    for bias in (torch.ones(4), torch.ones(5, device="meta")):
        with pytest.raises(ValueError, match=r"^bias: "):
            linear_cross_entropy(H, W, T, bias=bias)


@settings(DRAWN, max_examples=80)
@given(
    rows=st.sampled_from([0, 1, 3, 7]),
    width=st.sampled_from([1, 5, 16]),
    vocab=st.sampled_from([3, 33, 70, 257]),
    ignored=IGNORED,
    kind=KINDS,
    bias=st.booleans(),
    chunk=st.sampled_from([2, 3, 100]),
    lean=st.booleans(),
    dtype=st.sampled_from(TRITON_DTYPES),
    place=st.sampled_from([(torch.int64, "cpu"), (torch.int64, DEVICE), (torch.int32, DEVICE)]),
    options=OPTIONS,
)
def test_triton_linear(
    rows: int,
    width: int,
    vocab: int,
    ignored: str,
    kind: str,
    bias: bool,
    chunk: int,
    lean: bool,
    dtype: torch.dtype,
    place: tuple[torch.dtype, Any],
    options: dict[str, Any],
) -> None:
    inputs = [draw(rows, width) * 2, draw(vocab, width, seed=1), *([draw(vocab, seed=2)] if bias else [])]
    inputs = [x.float().to(DEVICE) for x in inputs]
    targets = labels(rows, vocab, ignored, options["ignore_index"])

    def head(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        own = targets.to(place[1], place[0]).repeat_interleave(2)[::2]
        return linear_cross_entropy(h, w, own, bias=b, lean=lean, backend="triton", **options)

    def reference(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return cross_entropy_reference(F.linear(h, w, b), targets.to(h.device), **options)

    with chunks(chunk):
        assert_low_precision(head, reference, reference, inputs, dtype, kind)


@settings(DRAWN, max_examples=50)
@given(
    rows=st.sampled_from([0, 1, 3, 7]),
    vocab=st.sampled_from([3, 63, 64, 70, 257]),
    ignored=IGNORED,
    kind=KINDS,
    padded=st.booleans(),
    dtype=st.sampled_from(TRITON_DTYPES),
    options=OPTIONS,
)
def test_triton_logits(
    rows: int, vocab: int, ignored: str, kind: str, padded: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    logits = (draw(rows, vocab) * 3).float().to(DEVICE)
    targets = labels(rows, vocab, ignored, options["ignore_index"]).to(DEVICE)

    def reference(x: Tensor) -> Tensor:
        return cross_entropy_reference(x, targets, **options)

    def ours(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 5), value=torch.nan)[:, :vocab] if padded else x  # rows further apart than they are long
        before = x.detach().clone()
        loss = cross_entropy(x, targets.repeat_interleave(2)[::2], backend="triton", **options)
        assert torch.equal(x, before)
        return loss

    assert_low_precision(ours, reference, reference, [logits], dtype, kind)


@HEADS
@pytest.mark.parametrize("vocab", [1, 2])
def test_one_class_and_two(head: Any, dtype: torch.dtype, vocab: int) -> None:
    """Where there is one class only, the loss and all gradients are 0."""
    inputs = [draw(3, 4, dtype=dtype).to(DEVICE), draw(vocab, 4, seed=1, dtype=dtype).to(DEVICE)]
    for smoothing in (0.0, 0.3):
        options = {"targets": labels(3, vocab, "some").to(DEVICE), "label_smoothing": smoothing}
        assert_right(partial(head, **options), partial(linear_cross_entropy_reference, **options), inputs, dtype)
        if vocab == 1:
            # A logit is rounded, and so are its products with the coefficients, which add up to 0.
            largest = (inputs[0] @ inputs[1].t()).abs().max() + 1
            rounding = 4 * torch.finfo(dtype).eps * largest
            assert max(x.abs().max() for x in evaluate(partial(head, **options), inputs)) <= rounding


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@LOGITS
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"softcap": 30.0}])
def test_triton_extreme_logits(backend: str, options: dict[str, Any]) -> None:
    """Large ones stay finite; impossible classes (-inf) get no gradient; NaN and inf stay in their row."""
    x, targets = draw(3, 100, dtype=torch.float32).to(DEVICE) * 1e4, labels(3, 100).to(DEVICE)
    function = partial(cross_entropy, targets=targets, backend=backend, **options)
    reference = partial(cross_entropy_reference, targets=targets, **options)
    assert all(y.isfinite().all() for y in evaluate(function, [x]))
    assert_low_precision(function, reference, reference, [x], torch.float32)
    x = draw(3, 100, dtype=torch.float32).to(DEVICE)
    x[:, :70] = -torch.inf  # more than a tile
    x[range(3), targets] = 1.0
    got, plain, exact = evaluate(function, [x]), evaluate(reference, [x]), evaluate(reference, [x.double()])
    assert_no_worse(got[1:], plain[1:], exact[1:], torch.float32)
    for value in (torch.nan, torch.inf):
        x[2, 99] = value
        loss, grad = evaluate(lambda x: function(x, reduction="none"), [x])
        if value == torch.nan or "softcap" not in options:
            assert torch.equal(loss.isnan(), torch.arange(3, device=DEVICE) == 2)
            assert torch.equal(grad.isnan().any(1), torch.arange(3, device=DEVICE) == 2)
    x = torch.full((2, 100), -torch.inf, device=DEVICE)
    x[1] = 0.0
    if "softcap" not in options:
        assert function(x, targets=targets[:2] * 0, reduction="none").isnan().tolist() == [True, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@HEADS
def test_extreme_logits_of_the_head(head: Any, dtype: torch.dtype) -> None:
    x, targets = draw(3, 70, dtype=dtype).to(DEVICE) * 1e4, labels(3, 70)
    weight = torch.eye(70, dtype=dtype, device=DEVICE)
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"softcap": 30.0}):
        reference = partial(cross_entropy_reference, targets=targets.to(DEVICE), **options)
        with chunks(2):
            assert_right(lambda x, o=options: head(x, weight, targets, **o), reference, [x], dtype)


@HEADS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits(head: Any, dtype: torch.dtype, reduction: str) -> None:
    inputs = [draw(7, 6, dtype=dtype), draw(70, 6, seed=1, dtype=dtype), draw(70, seed=2, dtype=dtype)]
    targets = labels(7, 70, "some")
    with chunks(3):
        assert_same_bits(
            lambda h, w, b: head(h, w, targets, bias=b, reduction=reduction), [x.to(DEVICE) for x in inputs]
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice(reduction: str) -> None:
    """Gradients made in the forward pass are scaled in place, but not where the graph is used again.

    The factors are powers of two, so nothing is rounded by them, wherever they are multiplied in.
    """
    h, w = (draw(n, 5, seed=n, dtype=torch.float32).to(DEVICE).requires_grad_() for n in (6, 70))
    x = draw(6, 70, dtype=torch.float32).to(DEVICE).requires_grad_()
    targets = labels(6, 70, "some").to(DEVICE)
    for loss, leaves in (
        (linear_cross_entropy(h, w, targets, reduction=reduction, backend="triton"), [h, w]),
        (cross_entropy(x, targets, reduction=reduction, backend="triton"), [x]),
    ):
        once = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
        plain = [g.clone() for g in once]
        for factor in (-4.0, 0.5):
            scaled = torch.autograd.grad(loss, leaves, torch.full_like(loss, factor), retain_graph=factor < 0)
            assert_near(scaled, [factor * g for g in plain], 0.0)
        assert_near(once, plain, 0.0)


def test_wide_rows_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile is that of GPUs, and the rows are shorter than it, exactly as long, and of many tiles."""
    monkeypatch.setattr(in_triton, "config", lambda *a, **k: {"DEPTH": 4, "LANES": 2048} if k else {"BLOCK": 8192})
    targets = torch.tensor([0, -100, 5000])
    for vocab in (8191, 8192, 40_003):
        x = draw(3, vocab, dtype=torch.float32).to(DEVICE) * 3
        reference = partial(cross_entropy_reference, targets=targets.to(DEVICE))
        function = partial(cross_entropy, targets=targets, backend="triton")
        assert_low_precision(function, reference, reference, [x], torch.float32)


def test_rows_of_a_chunk_on_a_gpu() -> None:
    def rows(count: int, vocab: int, dtype: torch.dtype = torch.bfloat16, learns: bool = True, **more: int) -> int:
        return chunked._chunk_rows((vocab, more.pop("width", 0)), count, dtype, "triton", learns, **more)

    assert rows(100_000, 128_256) == 4096
    assert rows(100_000, 128_256, learns=False) == 2048  # nothing is added up, so half the room will do
    assert rows(100_000, 262_147) == rows(100_000, 128_256, torch.float32) == 2048
    assert rows(4097, 1000) == 2176  # two of nearly one size
    assert rows(8192, 1000) == 4096
    assert rows(5, 1000) == 128
    assert rows(0, 1000) > 0
    # Qwen's head just misses the room of a small GPU, and fits that of one of 80 GB.
    assert rows(100_000, 151_936) == 2048
    assert rows(100_000, 151_936, room=85_000_000_000 // chunked.GPU_CHUNK_SHARE) == 4096
    # One chunk, as long as its logits take no more room than the sum in fp32 that several chunks need.
    assert rows(4096 + 2 * 896, 128_256, width=896) == 4096 + 2 * 896
    assert rows(4097 + 2 * 896, 128_256, width=896) == 3072  # two
    for dtype, learns in ((torch.float32, True), (torch.bfloat16, False)):  # neither needs such a sum
        assert rows(4096, 128_256, dtype, learns, width=4096) == 2048


def test_room_for_a_chunk_by_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for total, room in ((24 << 30, 1_100_000_000), (141 << 30, 2_365_587_456)):
        found = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert chunked._room(torch.device("cuda", 0)) == chunked._room(torch.device("meta")) == room
        assert chunked._room(torch.device("cpu")) == 1_100_000_000


def test_sums_of_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the three ways that a torch may have on a GPU, the best one that gives the right sum is taken."""
    a, b, before = (
        draw(5, 3, dtype=torch.bfloat16),
        draw(3, 4, seed=1, dtype=torch.bfloat16),
        draw(5, 4, seed=2).float(),
    )
    mm, addmm = torch.mm, torch.addmm

    def mixed_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return mm(a.float(), b.float()).to(out_dtype)

    def mixed_addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor, **scales: Any) -> None:
        assert out_dtype == out.dtype == torch.float32
        out.copy_(addmm(total, a.float(), b.float(), **scales))

    def wrong_addmm(total: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
        mixed_addmm(total, a, b, **(options | {"beta": 0}))

    for patched, name in (
        ({"mm": mixed_mm, "addmm": mixed_addmm}, "_fused"),
        ({"mm": mixed_mm, "addmm": wrong_addmm}, "mixed"),
        ({"mm": mixed_mm}, "mixed"),
        ({}, "_beside"),
    ):
        with monkeypatch.context() as patch:
            for function, stand_in in patched.items():
                patch.setattr(torch, function, stand_in)
            product = chunked._mixed_product.__wrapped__(torch.bfloat16, torch.device("cpu"))
            assert getattr(product, "__name__", "mixed") == name
            for beta in (0, 1):
                total = before.clone() if beta else torch.full_like(before, torch.nan)
                product(total, a, b, beta, -0.5)
                want = beta * before.double() - 0.5 * (a.double() @ b.double())
                # Each of the three products and the sums of them and of what was there before is rounded once; where
                # the product stands beside the total, in 16 bits.
                eps = torch.finfo(torch.bfloat16 if name == "_beside" else torch.float32).eps
                terms = beta * before.abs() + 0.5 * (a.abs().double() @ b.abs().double())
                assert ((total - want).abs() <= 4 * eps * terms).all()


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lean", [True, False])
def test_nothing_waits_for_the_gpu(reduction: str, lean: bool) -> None:
    """Nothing waits when the targets are on the CPU. (On a GPU torch itself watches, from the second call on.)"""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    h, w, b = (draw(*shape, dtype=dtype).to(DEVICE).requires_grad_() for shape in ((6, 4), (70, 4), (70,)))
    targets = labels(6, 70, "some")
    for watched in (False, True):
        if watched and DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with _NoWaiting(), chunks(2):
                loss = linear_cross_entropy(h, w, targets, bias=b, reduction=reduction, lean=lean, backend="triton")
                loss.backward(torch.ones_like(loss))
                loss = cross_entropy(h, targets % 4, reduction=reduction, backend="triton")
                loss.backward(torch.ones_like(loss))
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, int]] = {}  # where: bytes, tensors
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(made):
            where = x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0
            if where and (where in self.live or where not in given):
                size, tensors = self.live.get(where, (x.untyped_storage().nbytes(), 0))
                self.bytes += 0 if tensors else size
                self.live[where] = (size, tensors + 1)
                weakref.finalize(x, self._freed, where)
        self.peak = max(self.peak, self.bytes)
        return made

    def _freed(self, where: int) -> None:
        size, tensors = self.live.pop(where)
        if tensors > 1:
            self.live[where] = (size, tensors - 1)
        else:
            self.bytes -= size


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", ["none", "some"])
def test_the_lean_mode_holds_little(
    backend: str, dtype: torch.dtype, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a sixteenth of its sizes it holds a sixteenth of what it may; a chunk's logits alone would be twice that."""
    monkeypatch.setattr(chunked, "SUM_BYTES", chunked.SUM_BYTES // 16)
    monkeypatch.setattr(chunked, "TILE_BYTES", {name: size // 16 for name, size in chunked.TILE_BYTES.items()})
    monkeypatch.setattr(in_triton, "config", lambda *a, **k: {"DEPTH": 4, "LANES": 2048} if k else {"BLOCK": 8192})
    if backend == "triton":
        # What is computed is of no matter here, and slow; on a GPU, sums of 16-bit products make no copy.
        monkeypatch.setattr(in_triton, "launch", lambda *args, **options: None)
        monkeypatch.setattr(chunked, "_accumulate", lambda *args: None)
    rows, width, vocab = 900 if ignored == "some" else 450, 1024, 1500
    device = DEVICE if backend == "triton" else "cpu"
    h, w = (draw(n, width, seed=n, dtype=dtype).to(device).requires_grad_() for n in (rows, vocab))
    targets = labels(rows, vocab, ignored)
    for softcap in (None, 10.0):
        with _Peak() as memory:
            loss = linear_cross_entropy(h, w, targets, softcap=softcap, lean=True, backend=backend)
            gradients = torch.autograd.grad(loss, [h, w])
        held = memory.peak - sum(g.nbytes for g in gradients)
        assert 1e6 < held < 100e6 / 16


@HEADS
def test_row_weights_are_the_weights_of_the_rows_losses(head: Any, dtype: torch.dtype) -> None:
    """And the host reads nothing on the way, forward or backward."""
    hidden, weight = (draw(n, 8, seed=n).to(DEVICE, dtype).requires_grad_() for n in (70, 33))
    targets = torch.arange(70, device=DEVICE) % 33
    targets[::3] = -100
    row_weights = torch.rand(70, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    options: dict[str, Any] = {"softcap": 3.0, "label_smoothing": 0.3, "z_loss": 0.2}
    rows = linear_cross_entropy_reference(hidden, weight, targets, reduction="none", **options)
    want = torch.autograd.grad(exact := (rows * row_weights).sum(), (hidden, weight))
    with pytest.MonkeyPatch.context() as patch, chunks(32):
        for read in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
            patch.setattr(Tensor, read, None)
        loss = head(hidden, weight, targets, reduction="sum", row_weights=row_weights, **options)
        found = torch.autograd.grad(loss, (hidden, weight))
    for got, expected in zip((loss, *found), (exact, *want), strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not found[0][::3].any()


@HEADS
def test_row_weights_know_a_target_that_is_none(head: Any, dtype: torch.dtype) -> None:
    hidden, weight = (draw(n, 8, seed=n).to(DEVICE, dtype).requires_grad_() for n in (3, 5))
    ones = torch.ones(3, device=DEVICE, dtype=dtype)
    loss = head(hidden, weight, torch.tensor([1, 7, -100], device=DEVICE), reduction="sum", row_weights=ones)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan()
    assert [bool(row.isnan().any()) for row in dhidden] == [False, True, False]
    with pytest.raises(ValueError, match=r"^reduction: expected 'sum' with row_weights, found 'mean'"):
        head(hidden, weight, torch.tensor([1, 2, 3], device=DEVICE), row_weights=ones)
    with pytest.raises(ValueError, match=r"^row_weights"):
        head(hidden, weight, torch.tensor([1, 2, 3], device=DEVICE), reduction="sum", row_weights=ones[:2])
