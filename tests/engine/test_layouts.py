"""Products from packed weights are those of the weights, and a weight that float16 would change is not put into it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from afina.engine import layouts, packed
from afina.engine.layouts import ROUNDING, Half, OneDNN, Plain, Rows, filled, fits_half, half_works, onednn_works
from afina.engine.row_exact import _agreeing

needs_onednn = pytest.mark.skipif(not onednn_works(torch.float32), reason="torch has no oneDNN here")
needs_half = pytest.mark.skipif(not half_works(), reason="torch has no float16 product here")


def bfloat16_weight(out: int, width: int) -> torch.Tensor:
    """Numbers of bfloat16 from 2^-17 on, which float16 holds as they are."""
    draw = torch.Generator().manual_seed(out + width)
    weight = (torch.randn(out, width, generator=draw) * 0.05).bfloat16().float()
    return torch.where(weight.abs() < 2.0**-17, 0.0, weight)


def test_where_there_is_vector_code_torch_has_the_products() -> None:
    """Else the tests of ``Half`` would all be left out, and nobody would see that it is never taken."""
    x86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert half_works() == (x86 and torch.backends.quantized.engine in ("x86", "fbgemm"))
    assert onednn_works(torch.float32) == torch.backends.mkldnn.is_available()


@needs_half
@pytest.mark.parametrize("shape", [(1, 1), (5, 577), (17, 3), (64, 512), (40, 1100)])
def test_half_computes_in_float32_and_comes_back(shape: tuple[int, int]) -> None:
    weight, bias = bfloat16_weight(*shape), torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, 3, shape[1], generator=torch.Generator().manual_seed(2))
    half = Half(weight)
    expected = x.double() @ weight.double().t() + bias.double()
    bound = 1e-6 * (x.double().abs() @ weight.double().abs().t() + 1)  # float16 sums would be off by a thousandth
    assert bool(((half(x, bias).double() - expected).abs() <= bound).all())
    torch.testing.assert_close(half(x) + bias, half(x, bias))
    assert torch.equal(half.dense(), weight)


@needs_half
def test_half_rounds_the_least_numbers_and_no_others() -> None:
    """What is below 2^-17 moves by no more than half a step of float16 there."""
    exponents = torch.arange(-40, 15).float()
    weight = torch.cat([torch.exp2(exponents) * m for m in (1.0, -1.2578125, 1.9921875)])[None].repeat(16, 1)
    assert fits_half(weight)
    back = Half(weight).dense()
    large = weight.abs() >= 2.0**-17
    assert torch.equal(back[large], weight[large])
    assert 0 < float((back - weight).abs().max()) <= ROUNDING
    torch.testing.assert_close(Half(weight)(torch.eye(weight.shape[1])).t(), back, atol=0, rtol=0)


@pytest.mark.parametrize("wrong", [1 + 2.0**-11, 65520.0, 0.1, float("inf"), float("nan")])
def test_what_float16_would_change_does_not_fit(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stands: the weight is compared in parts."""
    monkeypatch.setattr(layouts, "SLICE", 10)
    weight = bfloat16_weight(3, 11)
    assert fits_half(weight)
    assert not fits_half(weight.bfloat16())
    for at in (0, 17, 32):
        changed = weight.clone()
        changed.view(-1)[at] = wrong
        assert not fits_half(changed)


def test_which_layout_a_weight_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 where it changes nothing, oneDNN for the others, and neither for small ones or where torch has none."""
    small, middle, large = bfloat16_weight(8, 8), bfloat16_weight(512, 256), bfloat16_weight(512, 512)
    inexact = large + 2.0**-20

    def kinds() -> list[Any]:
        return [type(packed.packed(weight)) for weight in (small, middle, large, inexact)]

    dense = OneDNN if onednn_works(torch.float32) else Plain
    if half_works():
        assert kinds() == [Plain, Half, Half, dense]
    monkeypatch.setattr(packed, "half_works", lambda: False)
    assert kinds() == [Plain, Plain, dense, dense]
    monkeypatch.setattr(packed, "onednn_works", lambda dtype: False)
    assert kinds() == [Plain] * 4
    assert packed.packed(large.to("meta")) is None


def test_half_is_taken_only_where_it_has_vector_code(monkeypatch: pytest.MonkeyPatch) -> None:
    half_works.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not half_works()
    monkeypatch.undo()
    half_works.cache_clear()


@needs_half
def test_rows_of_half_have_the_same_bits_in_several_batches() -> None:
    """Its code takes up to six rows at a time, and other code the last one or two: not all sizes agree."""
    half = Half(bfloat16_weight(96, 64))
    assert {4, 6, 8, 12, 24} <= _agreeing(half, 64, [1, 2, 3, 4, 6, 8, 12, 24, 36], torch.float32)


def test_a_plain_weight_computes_what_it_did() -> None:
    weight, bias, x = bfloat16_weight(40, 24), torch.randn(40), torch.randn(3, 5, 24)
    plain = Plain(weight)
    for rows in (x, x[0]):
        torch.testing.assert_close(plain(rows), rows @ weight.t())
        torch.testing.assert_close(plain(rows, bias), rows @ weight.t() + bias)
    assert torch.equal(plain.dense(), weight)
    assert plain.data.data_ptr() == weight.data_ptr()


@needs_onednn
@pytest.mark.parametrize("shape", [(61, 32), (300, 33), (2048, 96), (5, 7)])
def test_rows_are_read_where_onednn_has_laid_them(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layout = OneDNN(weight)
    rows = Rows.within(layout, weight)
    if rows is None and torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("oneDNN has other blocks on this CPU, so a model keeps its embedding")
    assert rows is not None
    ids = torch.tensor([[0, shape[0] - 1, 3], [2, 2, 1]])
    assert torch.equal(rows(ids), weight[ids])
    assert rows(ids[0, :0]).shape == (0, shape[1])
    before = weight[ids].clone()
    weight.zero_()  # what is read is not the weight that it came from
    del layout
    assert torch.equal(rows(ids), before)


class Laid:
    """A weight as oneDNN might have it: ``n`` rows side by side, ``k`` numbers of each at a time, the rest NaN."""

    def __init__(self, weight: Tensor, n: int, k: int, fill: int) -> None:
        out, width = weight.shape
        whole = weight.new_full((-(-out // n) * n, -(-width // fill) * fill), torch.nan)
        whole[:out, :width] = weight
        self.laid = whole.view(-1, n, whole.shape[1] // k, k).transpose(1, 2).flatten()

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.laid


@pytest.mark.parametrize(("n", "k"), [(64, 1), (64, 2), (48, 2), (16, 1), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_blocks_are_found_or_refused(n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randn(131, 38, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = Rows.within(cast("OneDNN", Laid(weight, n, k, 16)), weight)
    assert rows is not None
    assert rows.blocks.shape[1::2] == (n, k)
    assert torch.equal(rows(torch.arange(131)), weight)
    laid = Laid(weight, n, k, 16)
    last = (laid.laid == weight[-1, -1]).nonzero()[-1]
    laid.laid[last] += 1  # one number is another: it is no such layout
    assert Rows.within(cast("OneDNN", laid), weight) is None
    assert Rows.within(cast("OneDNN", Laid(weight, 24, 1, 16)), weight) is None


def test_few_numbers_of_rows_are_computed() -> None:
    """oneDNN keeps code for each, so a prompt of another length is none."""
    sizes = [filled(rows) for rows in range(1, 1025)]
    assert all(rows <= size == filled(size) <= max(4, 1.6 * rows) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes[:256])) == 24
    assert len(set(sizes)) == 36


@needs_onednn
def test_rows_that_fill_up_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=draw) for shape in ((40, 24), (40,), (40, 24)))
    layout = OneDNN(weight)
    expected = torch.nn.functional.linear(x, weight, bias)
    for count in (1, 2, 3, 4, 17, 38, 40):
        torch.testing.assert_close(layout(x[:count], bias), expected[:count], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layout(x[None, :count], bias), expected[None, :count], atol=1e-5, rtol=1e-5)
    met: list[int] = []
    monkeypatch.setattr(layouts, "filled", lambda rows: met.append(rows) or rows)
    layout(x[:2, None])
    assert met == [2]
