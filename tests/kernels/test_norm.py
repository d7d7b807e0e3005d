"""RMSNorm and LayerNorm, with and without the residual add, beside torch's own."""

from __future__ import annotations

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

from afina.kernels import launch, norm_triton
from afina.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

KINDS = st.sampled_from(["dense", "strided", "broadcast"])
SHAPES = st.tuples(st.lists(st.integers(0, 4), max_size=2), st.integers(1, 40)).map(lambda pair: (*pair[0], pair[1]))


def tolerance(x: Tensor, eps: float, layer: bool, dtype: torch.dtype = torch.float64) -> float:
    """Return how far apart two right results of a norm and its gradients may be, whatever order they sum in.

    An error of one rounding in x becomes one of rstd * |x| in the normalised row, and dx is rstd times such a row. The
    rows here have at most 100 columns, and weights, gradients and their products are of order 1.
    """
    if x.numel() == 0:
        return 0.0
    centred = x.double() - x.double().mean(-1, keepdim=True) if layer else x.double()
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    condition = 1 + (rstd * x.double().abs()).max()
    return float(1024 * torch.finfo(dtype).eps * condition * rstd.max().clamp(min=1))


def with_residual(norm: Any) -> Any:
    return lambda x, residual, *rest: (norm(x + residual, *rest), x + residual)


@DRAWN
@given(
    shape=SHAPES,
    offset=st.sampled_from([0.0, 1.0]),
    eps=st.sampled_from([1e-6, 0.5]),
    residual=st.booleans(),
    kind=KINDS,
)
def test_rms_norm(shape: tuple[int, ...], offset: float, eps: float, residual: bool, kind: str) -> None:
    x, r, w = draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2)

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm_reference(x, w, eps=eps, weight_offset=offset)

    def oracle(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w + offset, eps)

    lay = strided if kind == "strided" else torch.clone
    if residual:
        inputs = [lay(x), lay(r), lay(w)]
        got = evaluate(lambda x, r, w: rms_norm(x, w, eps=eps, weight_offset=offset, residual=r), inputs, kind)
        wants = [evaluate(with_residual(f), [x, r, w], kind) for f in (reference, oracle)]
    else:
        got = evaluate(lambda x, w: rms_norm(x, w, eps=eps, weight_offset=offset), [lay(x), lay(w)], kind)
        wants = [evaluate(f, [x, w], kind) for f in (reference, oracle)]
    for want in wants:
        assert_near(got, want, tolerance(x + r if residual else x, eps, layer=False))


@DRAWN
@given(shape=SHAPES, bias=st.booleans(), eps=st.sampled_from([1e-5, 0.5]), residual=st.booleans(), kind=KINDS)
def test_layer_norm(shape: tuple[int, ...], bias: bool, eps: float, residual: bool, kind: str) -> None:
    x, r = draw(*shape), draw(*shape, seed=1)
    affine = [draw(shape[-1], seed=2), draw(shape[-1], seed=3)][: 1 + bias]

    def reference(x: Tensor, *affine: Tensor) -> Tensor:
        return layer_norm_reference(x, *affine, eps=eps)

    def oracle(x: Tensor, *affine: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *affine, eps=eps)

    lay = strided if kind == "strided" else torch.clone
    if residual:
        inputs = [lay(t) for t in (x, r, *affine)]
        got = evaluate(lambda x, r, *affine: layer_norm(x, *affine, eps=eps, residual=r), inputs, kind)
        wants = [evaluate(with_residual(f), [x, r, *affine], kind) for f in (reference, oracle)]
    else:
        got = evaluate(lambda x, *affine: layer_norm(x, *affine, eps=eps), [lay(t) for t in (x, *affine)], kind)
        wants = [evaluate(f, [x, *affine], kind) for f in (reference, oracle)]
    for want in wants:
        assert_near(got, want, tolerance(x + r if residual else x, eps, layer=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, r, w, b = draw(17, 96) * 4, draw(17, 96, seed=1), draw(96, seed=2), draw(96, seed=3)

    def formula(x: Tensor, w: Tensor) -> Tensor:
        return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))

    assert_low_precision(rms_norm, formula, rms_norm_reference, [x, w], dtype)
    plain, exact = with_residual(formula), with_residual(rms_norm_reference)
    assert_low_precision(lambda x, r, w: rms_norm(x, w, residual=r), plain, exact, [x, r, w], dtype)
    assert_low_precision(
        layer_norm, lambda x, w, b: F.layer_norm(x, (96,), w, b), layer_norm_reference, [x, w, b], dtype
    )


def test_mixed_dtypes_keep_their_own() -> None:
    x, w = draw(3, 8, dtype=torch.bfloat16), draw(8, dtype=torch.float32)
    for norm in (rms_norm, layer_norm):
        y, dx, dw = evaluate(norm, [x, w])
        assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_statistics_are_wide() -> None:
    """The squares of these values overflow fp16."""
    x = torch.full((2, 64), 1000.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=torch.float16)), torch.ones_like(x))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_one_output_used_frozen_inputs_and_repeats(norm: Any) -> None:
    x, r, w = draw(5, 7), draw(5, 7, seed=1), draw(7, seed=2)
    for used in (0, 1):
        got = evaluate(lambda x, r, u=used: norm(x, w, residual=r)[u], [x, r])
        want = evaluate(lambda x, r, u=used: (norm(x + r, w), x + r)[u], [x, r])
        assert_near(got, want)
    leaf = w.clone().requires_grad_()
    assert_near(torch.autograd.grad(norm(x, leaf).sum(), leaf), [norm(x, torch.ones_like(w)).sum(0)])  # x is frozen
    assert_same_bits(lambda x, r, w: norm(x, w, residual=r), [x.float(), r.float(), w.float()])


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.ones(2, 4, dtype=torch.int64)}),
        ("x", {"x": torch.tensor(1.0)}),
        ("weight", {"weight": torch.ones(3)}),
        ("weight", {"weight": torch.ones(1, 4)}),
        ("residual", {"residual": torch.ones(1, 4)}),
        ("residual", {"residual": torch.ones(2, 4, dtype=torch.float64)}),
        ("backend", {"backend": "cuda"}),
    ],
)
def test_validation(norm: Any, name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        norm(**({"x": torch.ones(2, 4), "weight": torch.ones(4)} | change))


def test_validation_of_the_bias() -> None:
    with pytest.raises(ValueError, match=r"^bias: "):
        layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(2, 4))


def formula(x: Tensor, w: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0) -> Tensor:
    """Compute RMSNorm as torch does it in x's dtype."""
    return (w + weight_offset) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def torch_layer_norm(x: Tensor, w: Tensor, b: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


@settings(DRAWN, max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 5, 9]),
    width=st.sampled_from([1, 3, 8, 31, 64, 100]),
    dtype=st.sampled_from(TRITON_DTYPES),
    kind=KINDS,
    residual=st.booleans(),
    option=st.booleans(),
    layer=st.booleans(),
)
def test_triton(
    rows: int, width: int, dtype: torch.dtype, kind: str, residual: bool, option: bool, layer: bool
) -> None:
    """Rows are shorter and longer than a tile, a program has one and several; `option` is a bias or a weight offset."""
    x, r = (3 * draw(rows, width, seed=i).float() + 1 for i in range(2))
    affine = [draw(width, seed=2).float(), draw(width, seed=3).float()][: 1 + (layer and option)]
    offset = 1.0 if option and not layer else 0.0
    function = partial(layer_norm, eps=0.3) if layer else partial(rms_norm, eps=0.3, weight_offset=offset)
    plain, exact = (
        (partial(torch_layer_norm, eps=0.3), partial(layer_norm_reference, eps=0.3))
        if layer
        else (partial(f, eps=0.3, weight_offset=offset) for f in (formula, rms_norm_reference))
    )
    if residual:
        assert_low_precision(
            lambda x, r, *affine: function(x, *affine, residual=r, backend="triton"),
            with_residual(plain), with_residual(exact), [t.to(DEVICE) for t in (x, r, *affine)], dtype, kind,
        )  # fmt: skip
    else:
        inputs = [t.to(DEVICE) for t in (x, *affine)]
        assert_low_precision(partial(function, backend="triton"), plain, exact, inputs, dtype, kind)


@pytest.mark.slow
@pytest.mark.parametrize("width", [24, 70])
@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_triton_heads_of_a_fused_buffer(norm: Any, width: int) -> None:
    """These rows lie evenly apart only within a token, in x, residual and gradient; none of them may be misread."""
    qkv = draw(2, 3, 7, width, dtype=torch.float32).to(DEVICE)
    q, r, w = qkv[:, :, :4], qkv[:, :, 3:], draw(width, seed=1, dtype=torch.float32).to(DEVICE)
    for kind in ("dense", "strided"):
        for arrange in (lambda t: t, lambda t: t.transpose(1, 2)):

            def run(q: Tensor, r: Tensor, w: Tensor, backend: str, arrange: Any = arrange) -> tuple[Tensor, Tensor]:
                return norm(arrange(q), w, residual=arrange(r), backend=backend)

            # evaluate() detaches its inputs, which keeps their strides.
            got, plain = (evaluate(partial(run, backend=name), [q, r, w], kind) for name in ("triton", "torch"))
            exact = evaluate(partial(run, backend="torch"), [q.double(), r.double(), w.double()], kind)
            assert_no_worse(got, plain, exact, torch.float32)
            assert got[0].is_contiguous()
            assert got[1].is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("width", [40, 100])
def test_triton_dtypes_frozen_inputs_and_repeats(norm: Any, width: int) -> None:
    x, r, w = (draw(*shape, seed=i).to(DEVICE) for i, shape in enumerate([(11, width), (11, width), (width,)]))
    triton = partial(norm, backend="triton")
    for low in (torch.bfloat16, torch.float16):
        got = evaluate(triton, [x.to(low), w.float()])
        plain, exact = (evaluate(norm, [x.to(low).to(wide), w.float().to(wide)]) for wide in (torch.float32, x.dtype))
        assert [t.dtype for t in got] == [low, low, torch.float32]
        assert_no_worse(got[2:], plain[2:], exact[2:], torch.float32)  # summed in fp32, and never rounded to 16 bits
    x, r, w = x.float(), r.float(), w.float()
    assert_same_bits(lambda x, r, w: triton(x, w, residual=r), [x, r, w])

    def one(op: Any, used: int, x: Tensor, r: Tensor) -> Tensor:
        return op(x, w.to(x.dtype), residual=r)[used]

    def only_the_weight(op: Any, w: Tensor) -> Tensor:
        return op(x.to(w.dtype), w)

    for used in (0, 1):  # one output; the weight frozen
        assert_low_precision(
            partial(one, triton, used), partial(one, norm, used), partial(one, norm, used), [x, r], torch.float32
        )
    plain = partial(only_the_weight, norm)
    assert_low_precision(partial(only_the_weight, triton), plain, plain, [w], torch.float32)


def test_triton_only_the_bias_is_trained() -> None:
    x, w = draw(5, 8).float().to(DEVICE), torch.ones(8, device=DEVICE)
    b = torch.zeros(8, device=DEVICE, requires_grad=True)
    layer_norm(x, w, b, backend="triton").sum().backward()
    assert torch.equal(b.grad, torch.full_like(b, 5.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [33, 100])
def test_triton_extreme_values(width: int) -> None:
    ones = torch.ones(width, dtype=torch.float16, device=DEVICE)
    big = torch.full((2, width), 1e4, dtype=torch.float16, device=DEVICE)
    assert torch.equal(rms_norm(big, ones, backend="triton"), torch.ones_like(big))
    big[:, ::2] *= -1
    y, dx, _ = evaluate(partial(layer_norm, backend="triton"), [big, ones])
    plain, exact = (torch_layer_norm(big.to(wide), ones.to(wide)) for wide in (torch.float32, torch.float64))
    assert_no_worse([y], [plain.half()], [exact], torch.float16)
    assert dx.isfinite().all()
    # A large common part: mean(x^2) - mean(x)^2 would have no digit left.
    x, w = (
        (shift + draw(*shape, dtype=torch.float32)).to(DEVICE) for shift, shape in ((1000, (3, width)), (0, (width,)))
    )
    exact = layer_norm(x.double(), w.double())
    # Two roundings of the mean, which is as large as x, and a few of what is left.
    rstd = torch.rsqrt(x.double().var(-1, correction=0).min())
    allowed = 4 * torch.finfo(torch.float32).eps * rstd * x.abs().max() * w.abs().max()
    assert (layer_norm(x, w, backend="triton").double() - exact).abs().max() <= allowed
    # All zeros: eps alone stands below the root.
    zeros = torch.zeros(3, width, device=DEVICE)
    for norm in (rms_norm, layer_norm):
        y, dx, _ = evaluate(partial(norm, eps=1e-4, backend="triton"), [zeros, ones.float()])
        assert torch.equal(y, zeros)
        plain, exact = (
            evaluate(partial(norm, eps=1e-4, backend="torch"), [zeros.to(wide), ones.to(wide)])
            for wide in (torch.float32, torch.float64)
        )
        assert_no_worse([dx], plain[1:2], exact[1:2], torch.float32)
    # NaN stays in its row.
    zeros[1, 2] = torch.nan
    for norm in (rms_norm, layer_norm):
        y = norm(zeros, ones.float(), backend="triton")
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


def _with_programs(count: int, *args: Any, **options: Any) -> dict[str, Any]:
    row = launch.config(*args, **options)
    return row | {"PROGRAMS_PER_SM": count} if "PROGRAMS_PER_SM" in row else row


@pytest.mark.parametrize("width", [40, 100])
def test_triton_any_number_of_programs_sums_all_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program takes all rows; or there are fewer programs than tiles of rows, or more."""
    inputs = [draw(11, width), draw(width, seed=1), draw(width, seed=2)]
    for count in (1, 2, 100):
        monkeypatch.setattr(norm_triton, "config", partial(_with_programs, count))
        assert_low_precision(
            partial(layer_norm, backend="triton"), torch_layer_norm, layer_norm_reference,
            [x.to(DEVICE) for x in inputs], torch.float32,
        )  # fmt: skip


def test_programs_of_a_backward_pass_are_the_launch_tables_for_each_multiprocessor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    norm_triton._multiprocessors.cache_clear()
    options = {"PROGRAMS_PER_SM": 5, "num_warps": 4}
    assert norm_triton.programs(options, torch.device("cuda", 0)) == 5 * 132
    assert options == {"num_warps": 4}  # the rest is the launch's
    norm_triton._multiprocessors.cache_clear()
    for kernel in ("norm_backward", "rope_norm_backward"):
        assert all(row["PROGRAMS_PER_SM"] > 0 for row in launch.table()[kernel])
