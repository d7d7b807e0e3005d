"""Products from packed weights are those of the weights, and a weight that float16 would change is not put into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from afina.engine import layouts, packed
from afina.engine.layouts import ROUNDING, Half, OneDNN, Plain, fits_half, half_works, onednn_works
from afina.engine.row_exact import _agreeing

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
