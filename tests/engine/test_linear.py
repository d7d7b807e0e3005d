"""Linear layers with LoRA: values and gradients against torch's own autograd over the written-out formula."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afina.engine.linear import Linear, Lora, Part, Recompute, frozen_format
from afina.engine.nf4_weight import NF4Weight
from afina.kernels.cases import allowed_error
from afina.kernels.nf4 import quantize_nf4

WIDTH, ROWS = 7, 12
PARTS = {
    "all": [Part(0, 12, 3, 2.0)],
    "three": [Part(0, 6, 2, 0.5), Part(6, 9, 3, 1.5), Part(9, 12, 1, -1.0)],
    "first": [Part(0, 6, 3, 2.0)],
    "ends": [Part(0, 6, 2, 1.0), Part(9, 12, 3, 3.0)],
    "middle": [Part(6, 9, 2, 0.25)],
}
CPU = torch.device("cpu")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that fp32 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def frozen(weight: Tensor, *, bias: bool) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(draw(weight.shape[0], seed=2, dtype=weight.dtype), requires_grad=False)
    return layer


def trained(layer: Linear, parts: list[Part], *, dropout: float = 0.0, dora: bool = False) -> Lora:
    """Adapters that are no longer at their start, on ``layer``."""
    dtype = layer.dense(torch.float32).dtype
    layer.lora = lora = Lora(parts, layer.in_features, dropout=dropout, dora=dora, device=CPU, dtype=dtype)
    with torch.no_grad():
        for i, (_, a, b) in enumerate(lora.blocks()):
            rank = a.stop - a.start
            lora.A[a] = draw(rank, layer.in_features, seed=10 + i, dtype=dtype)
            lora.B[b, :rank] = draw(b.stop - b.start, rank, seed=20 + i, dtype=dtype)
    if lora.magnitude is not None:
        lora.magnitude.data.copy_(draw(len(lora.B), seed=30).abs() + 0.5)
    return lora


def formula(layer: Linear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x W^T + b + s drop(x) A^T B^T, each matrix made as it is written; for DoRA times m / |W + s B A|."""
    lora = layer.lora
    assert lora is not None
    weight = layer.dense(x.dtype)
    update, gains, row = torch.zeros_like(weight), weight.new_ones(len(weight)), 0
    for i, (start, stop, rank, scale) in enumerate(lora.parts):
        a = lora.A[i * lora.rank : i * lora.rank + rank]
        b = lora.B[row : row + stop - start, :rank]
        new = weight[start:stop] + scale * b @ a
        update = torch.cat([update[:start], scale * b @ a, update[stop:]])
        if lora.magnitude is not None:
            gain = lora.magnitude[row : row + stop - start] / new.detach().norm(dim=1)
            gains = torch.cat([gains[:start], gain, gains[stop:]])
        row += stop - start
    dropped = x if mask is None else x * mask / (1 - lora.dropout)
    y = (F.linear(x, weight) + F.linear(dropped, update)) * gains
    return y if layer.bias is None else y + layer.bias


def run(
    layer: Linear, x: Tensor, compute: Callable[[Tensor], Tensor], *, below: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a loss that weighs every element of it differently."""
    x = x.detach().requires_grad_(below)
    y = compute(x)
    layer.zero_grad()
    y.backward(draw(*y.shape, seed=99, dtype=y.dtype))
    assert layer.lora is not None
    grads = {name: p.grad.clone() for name, p in layer.lora.named_parameters() if p.grad is not None}
    return y.detach(), grads | ({} if x.grad is None else {"x": x.grad})


def expected(layer: Linear, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``run`` has to give: the formula, in fp64."""
    exact = copy.deepcopy(layer).double()
    return run(exact, x.double(), lambda x: formula(exact, x, mask), below=True)


def agree(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    assert ours[1].keys() == theirs[1].keys()
    for name, found, right in [("y", ours[0], theirs[0]), *((n, ours[1][n], grad) for n, grad in theirs[1].items())]:
        error = (found.double() - right).abs().max() / right.abs().max()
        assert error < tolerance, f"{name}: {error:.1e} of the largest"


def near(ours: tuple[Tensor, dict[str, Tensor]], layer: Linear, x: Tensor, mask: Tensor | None = None) -> None:
    """``ours`` is fp32, and as good as the formula in fp32 on this machine, by the rule of ``kernels/cases.py``."""
    exact, plain = expected(layer, x, mask), run(layer, x, lambda x: formula(layer, x, mask))
    assert ours[1].keys() == exact[1].keys()
    for name in ("y", *exact[1]):
        found, right, other = (each[0] if name == "y" else each[1][name] for each in (ours, exact, plain))
        error = float((found.double() - right).abs().max())
        assert error <= allowed_error(other, right, torch.float32), f"{name}: {error:.1e} away"


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH), (3, 8, WIDTH)], ids=["2d", "3d", "many"])
def test_values_and_gradients_are_those_of_the_formula(
    parts: list[Part], bias: bool, dora: bool, dropout: float, shape: tuple[int, ...]
) -> None:
    dtype = torch.float32 if dora else torch.float64  # DoRA's norms are fp32
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=dtype), bias=bias)
    lora = trained(layer, parts, dropout=dropout, dora=dora)
    x = draw(*shape, seed=3, dtype=dtype)
    torch.manual_seed(5)
    mask = torch.empty(shape, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
    torch.manual_seed(5)
    ours = run(layer, x, layer)
    if dora:
        near(ours, layer, x, mask)
    else:
        agree(ours, expected(layer, x, mask), 1e-12)
    assert layer.weight is not None
    assert layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None
    # What fills lower ranks up has to stay zero.
    for i, part in enumerate(parts):
        assert not ours[1]["A"][i * lora.rank + part.rank : (i + 1) * lora.rank].any()
    for part, _, b in lora.blocks():
        assert not ours[1]["B"][b, part.rank :].any()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("shape", [(3, WIDTH), (2, 2, WIDTH), (2, 7, WIDTH)], ids=["2d", "3d", "many"])
def test_gradients_are_those_of_finite_differences(parts: list[Part], shape: tuple[int, ...]) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1), bias=True)
    lora = trained(layer, parts)
    x = draw(*shape, seed=3).requires_grad_()
    # gradcheck moves the parameters themselves, where the layer reads them.
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x), (x, lora.A, lora.B))
    again = Recompute(lambda x: x * 2, x)
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x * 2, again), (x, lora.A, lora.B))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_x_again_gives_the_same_bits_and_does_not_keep_x(
    dora: bool, dropout: float, dtype: torch.dtype
) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=dtype), bias=True)
    trained(layer, PARTS["three"], dropout=dropout, dora=dora)
    total = draw(2, 3, WIDTH, seed=3, dtype=dtype)
    kept: list[bool] = []

    def once(total: Tensor, *, again: bool) -> Tensor:
        torch.manual_seed(5)
        x = total * 3
        y = layer(x, Recompute(lambda total: total * 3, total) if again else None)
        alive = weakref.ref(x)
        del x
        gc.collect(0)
        kept.append(alive() is not None)
        return y

    saved = run(layer, total, lambda total: once(total, again=False))
    computed = run(layer, total, lambda total: once(total, again=True))
    assert kept == [True, False]
    assert torch.equal(saved[0], computed[0])
    assert saved[1].keys() == computed[1].keys() == {"x", "A", "B"} | ({"magnitude"} if dora else set())
    for name, grad in saved[1].items():
        assert torch.equal(grad, computed[1][name]), name


@pytest.mark.parametrize("again", [False, True])
def test_a_second_backward_is_an_error(again: bool) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1), bias=False)
    trained(layer, PARTS["all"])
    x = draw(4, WIDTH, seed=3)
    loss = layer(x, Recompute(lambda x: x, x) if again else None).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_nothing_is_computed_for_what_lies_below_a_layer_whose_input_needs_no_gradient(
    dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=torch.float32), bias=False)
    trained(layer, PARTS["three"], dora=dora)
    reads: list[int] = []
    dense = Linear.dense
    monkeypatch.setattr(Linear, "dense", lambda self, dtype: reads.append(1) or dense(self, dtype))
    for below, wanted in (False, 0), (True, 1):
        y = layer(draw(4, WIDTH, seed=3, dtype=torch.float32).requires_grad_(below))
        reads.clear()
        y.sum().backward()
        assert len(reads) == wanted  # only x's gradient multiplies with W


def test_without_gradients_nothing_is_kept() -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=torch.float32), bias=True)
    trained(layer, PARTS["three"], dora=True)
    x = draw(4, WIDTH, seed=3, dtype=torch.float32)
    with torch.no_grad():
        y = layer(x, Recompute(lambda x: pytest.fail("computed again"), x))
    assert y.grad_fn is None
    torch.testing.assert_close(y, formula(layer, x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", [(0, WIDTH), (1, WIDTH), (1, 0, WIDTH)])
def test_few_rows_and_none(dora: bool, shape: tuple[int, ...]) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=torch.float32), bias=True)
    trained(layer, PARTS["ends"], dora=dora)
    x = draw(*shape, seed=3, dtype=torch.float32)
    y, grads = run(layer, x, layer)
    assert y.shape == (*shape[:-1], ROWS)
    right = expected(layer, x)
    assert grads.keys() == right[1].keys()
    torch.testing.assert_close(y.double(), right[0], rtol=1e-5, atol=1e-5)
    for name, grad in right[1].items():
        torch.testing.assert_close(grads[name].double(), grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_inputs_and_gradients_of_any_strides(bias: bool) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1), bias=bias)
    trained(layer, PARTS["three"])
    wide = draw(3, 2, 2 * WIDTH, seed=3)
    for x in (wide.transpose(0, 1)[..., :WIDTH], wide[..., ::2], wide[:1, :, :WIDTH].expand(4, 2, WIDTH)):
        agree(run(layer, x, layer), expected(layer, x), 1e-12)
        # dy too: expanded (what sum() gives), and transposed.
        for change in (lambda y: y.sum(), lambda y: (y.transpose(0, 1) * draw(y.shape[1], len(y), ROWS, seed=4)).sum()):
            found = []
            for compute in layer, lambda x: formula(layer, x):
                layer.zero_grad()
                change(compute(x)).backward()
                assert layer.lora is not None
                found.append([layer.lora.A.grad, layer.lora.B.grad])
            for ours, theirs in zip(*found):
                torch.testing.assert_close(ours, theirs)


# NF4


def quantized(*, bias: bool, dtype: torch.dtype = torch.float32) -> Linear:
    layer = frozen(draw(ROWS, 64, seed=1, dtype=dtype), bias=bias)
    assert layer.weight is not None
    layer.hold(NF4Weight([(0, ROWS, *quantize_nf4(layer.weight))]))
    return layer


def test_a_layer_answers_for_its_weight_whatever_holds_it() -> None:
    layer = frozen(draw(ROWS, 64, seed=1, dtype=torch.float32), bias=False)
    weight = layer.weight
    assert weight is not None
    assert frozen_format(layer) is layer.frozen_format is None
    assert layer.nbytes == ROWS * 64 * 4
    assert layer.dense(torch.bfloat16).data_ptr() == weight.data_ptr()
    assert torch.equal(layer.rows(3, 7, torch.float32), weight[3:7])

    packed = NF4Weight([(0, ROWS, *quantize_nf4(weight.bfloat16()))])
    layer.hold(packed)
    assert layer.weight is None
    assert frozen_format(nn.Sequential(nn.Linear(2, 2), layer)) == layer.frozen_format == "nf4-bfloat16"
    assert layer.nbytes == packed.nbytes
    for dtype in torch.float32, torch.bfloat16:
        assert layer.dense(dtype).dtype == dtype
        assert torch.equal(layer.dense(dtype), packed.dense(dtype))
        assert torch.equal(layer.rows(0, ROWS, dtype), packed.rows(0, ROWS, dtype))
    assert [name for name, _ in layer.named_parameters()] == []

    layer.hold(weight)
    assert layer.frozen_format is None
    assert layer.quantized is None
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)], ids=["2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_nf4_weight_without_adapters_is_a_frozen_dense_one(
    bias: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = quantized(bias=bias, dtype=dtype)
    found = []
    for compute in layer, lambda x: F.linear(x, layer.dense(dtype), layer.bias):
        x = draw(*shape, seed=3, dtype=dtype).requires_grad_()
        y = compute(x)
        y.backward(draw(*y.shape, seed=4, dtype=dtype))
        found.append((y.detach(), x.grad))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(found[0][0], found[1][0])
    assert not layer(draw(*shape, seed=3, dtype=dtype)).requires_grad


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_on_an_nf4_weight_are_those_on_its_dequantised_values(parts: list[Part], dora: bool) -> None:
    layer = quantized(bias=True)
    trained(layer, parts, dora=dora)
    x = draw(2, 5, 64, seed=3, dtype=torch.float32)
    ours = run(layer, x, layer)
    assert layer.weight is None
    layer.hold(nn.Parameter(layer.dense(torch.float32), requires_grad=False))
    near(ours, layer, x)


# The start, DoRA's norms, merging


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_fresh_adapter_changes_no_bit(dora: bool, dtype: torch.dtype, bias: bool) -> None:
    for layer in frozen(draw(ROWS, 64, seed=1, dtype=dtype), bias=bias), quantized(bias=bias, dtype=dtype):
        x = draw(3, 4, 64, seed=3, dtype=dtype)
        before = layer(x)
        layer.lora = Lora(PARTS["three"], 64, dropout=0.1, dora=dora, device=CPU, dtype=dtype)
        layer.lora.init(partial(layer.dense, dtype), torch.Generator().manual_seed(0))
        assert layer.lora.A.any()
        for mode in True, False:
            layer.train(mode)
            assert torch.equal(layer(x), before)


def test_a_starts_as_linear_layers_do_and_b_at_zero() -> None:
    parts = [Part(0, 50, 40, 1.0), Part(50, 90, 10, 1.0)]
    lora = Lora(parts, 64, dropout=0, dora=True, device=CPU, dtype=torch.float32)
    weight = draw(90, 64, seed=1, dtype=torch.float32)
    lora.init(lambda: weight, torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(64)  # of nn.Linear: kaiming_uniform_(a=sqrt(5))
    first, second = lora.A[:40], lora.A[40:50]
    for drawn in first, second:
        assert drawn.abs().max() <= bound
        assert 0.95 * bound < drawn.abs().max()
        assert abs(drawn.std().item() - bound / math.sqrt(3)) < 0.005
    assert not torch.equal(first[:10], second)
    assert not lora.A[50:].any()
    assert not lora.B.any()
    torch.testing.assert_close(lora.magnitude, weight.norm(dim=1))
    again = Lora(parts, 64, dropout=0, dora=True, device=CPU, dtype=torch.float32)
    again.init(lambda: weight, torch.Generator().manual_seed(0))
    assert torch.equal(again.A, lora.A)


def test_only_magnitudes_ask_for_the_weight() -> None:
    asked = []

    def weight() -> Tensor:
        asked.append(lora.magnitude is not None)
        return draw(90, 64, seed=1, dtype=torch.float32)

    for dora in (False, True):
        lora = Lora([Part(0, 90, 4, 1.0)], 64, dropout=0, dora=dora, device=CPU, dtype=torch.float32)
        lora.init(weight, torch.Generator())
    assert asked == [True]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_merging_gives_one_matrix_that_does_the_same(parts: list[Part], dora: bool) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=torch.float32), bias=True)
    lora = trained(layer, parts, dora=dora)
    assert layer.weight is not None
    before = layer.weight.clone()
    merged = lora.merge(layer.weight)
    assert torch.equal(layer.weight, before)
    assert merged.dtype == torch.float32
    touched = torch.zeros(ROWS, dtype=torch.bool)
    for part in parts:
        touched[part.start : part.stop] = True
    assert torch.equal((merged != before).any(1), touched)
    x = draw(20, WIDTH, seed=3, dtype=torch.float32)
    exact = expected(layer, x)[0]
    error = (F.linear(x, merged, layer.bias).double() - exact).abs().max()
    assert error <= allowed_error(formula(layer, x).detach(), exact, torch.float32)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_the_norms_of_dora_are_those_of_the_sum_that_is_never_built(parts: list[Part]) -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=torch.float32), bias=False)
    lora = trained(layer, parts, dora=True)
    assert layer.weight is not None
    plain = Lora(parts, WIDTH, dropout=0, dora=False, device=CPU, dtype=torch.float32)
    plain.A, plain.B = lora.A, lora.B
    merged = plain.merge(layer.weight).norm(dim=1)
    expected = torch.cat([merged[part.start : part.stop] for part in parts])
    torch.testing.assert_close(lora.row_norms(layer.weight), expected, rtol=1e-5, atol=1e-6)


def test_the_norms_of_dora_are_kept_in_evaluation_only_until_the_mode_is_set_again() -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1, dtype=torch.float32), bias=False)
    lora = trained(layer, PARTS["all"], dora=True)
    x = draw(4, WIDTH, seed=3, dtype=torch.float32)

    def check() -> None:
        torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-5, atol=1e-5)

    assert layer.weight is not None
    layer.eval()
    check()
    assert lora.row_norms(layer.weight) is lora.row_norms(layer.weight)
    for mode in True, False:
        lora.A.data.mul_(2.0)  # as an optimizer does: no trace but the values
        layer.train(mode)
        check()
    layer.train()
    check()
    lora.A.data.mul_(2.0)  # a step in training needs no call
    check()


# Dropout


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone() -> None:
    layer = frozen(draw(ROWS, WIDTH, seed=1), bias=True)
    lora = trained(layer, PARTS["all"], dropout=0.5)
    x = draw(4, WIDTH, seed=3)
    full = formula(layer, x)
    layer.eval()
    torch.testing.assert_close(layer(x), full)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    lora.B.data.zero_()
    assert torch.equal(layer(x), F.linear(x, layer.dense(x.dtype), layer.bias))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(rate: float) -> None:
    layer = frozen(torch.zeros(1, 1, dtype=torch.float64), bias=False)
    layer.lora = lora = Lora([Part(0, 1, 1, 1.0)], 1, dropout=rate, dora=False, device=CPU, dtype=torch.float64)
    lora.A.data.fill_(1.0)
    lora.B.data.fill_(1.0)
    torch.manual_seed(0)
    y = layer(torch.ones(100_000, 1, dtype=torch.float64)).detach()
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - rate)}
    assert abs((y == 0).double().mean().item() - rate) < 0.01
    assert abs(y.mean().item() - 1) < 0.03


def test_ranks_and_scales_are_those_of_their_part() -> None:
    """Written out for a layer with weight 0, with numbers that can be followed."""
    layer = frozen(torch.zeros(3, 2, dtype=torch.float64), bias=False)
    layer.lora = lora = Lora(
        [Part(0, 1, 1, 10.0), Part(1, 3, 2, 100.0)], 2, dropout=0, dora=False, device=CPU, dtype=torch.float64
    )
    assert lora.A.shape == (4, 2)
    assert lora.B.shape == (3, 2)
    lora.A.data.copy_(torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 1]]))
    lora.B.data.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    assert layer(torch.tensor([[2.0, 3.0]], dtype=torch.float64)).tolist() == [[20.0, 500.0, 300.0]]
