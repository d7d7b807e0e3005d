"""The loss of a language model's head, forward and backward: from the hidden states, and from logits.

    python benchmarks/bench_cross_entropy.py --quick
    python benchmarks/bench_cross_entropy.py --cases 4096x4096x128256 --providers afina liger

Cases: rows x width x vocabulary (with "80% ignored": four of five targets are -100), and plain rows x vocabulary.
Only both passes together are timed: where the gradient is computed is up to the version. Providers: afina (Triton),
afina-lean (no chunk of logits), afina-torch, eager (as transformers writes it), compile, torch-linear
(F.linear_cross_entropy, chunked), liger, fla, cce (Cut Cross-Entropy).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import costs
import torch
import torch.nn.functional as F
from harness import DEVICE, Case, Function, Unavailable, compiled, main, provider, randn, reference, wide
from torch import Tensor

from afina.kernels.cross_entropy import cross_entropy, cross_entropy_reference, linear_cross_entropy

REFERENCE_ROWS = 1024  # whose logits the reference holds at a time


class Shape(NamedTuple):
    rows: int
    width: int
    vocab: int
    ignored: float = 0.0


LINEAR = {
    "gpu": [Shape(4096, 4096, 128_256), Shape(4096, 4096, 128_256, 0.8), Shape(8192, 2304, 256_000)],
    "cpu": [Shape(2048, 192, 4096), Shape(2048, 576, 16384)],
    "tiny": [Shape(19, 24, 101), Shape(19, 24, 101, 0.8)],
}
PLAIN = {"gpu": [(4096, 128_256)], "cpu": [(512, 16384)], "tiny": [(19, 101)]}


def expected(inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """The mean loss and its gradients, some rows at a time."""
    hidden, weight, targets = inputs
    matrix = weight.detach().to(wide()).requires_grad_()
    dweight, dhidden, losses = torch.zeros_like(matrix), [], []
    kept = max(1, int((targets != -100).sum()))
    for start in range(0, hidden.shape[0], REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        h = hidden[rows].detach().to(wide()).requires_grad_()
        loss = cross_entropy_reference(h @ matrix.t(), targets[rows], reduction="sum") / kept
        dh, dw = torch.autograd.grad(loss, (h, matrix), upstream[0].to(loss.dtype))
        losses.append(loss.detach())
        dhidden.append(dh)
        dweight += dw
    return [torch.stack(losses).sum(), torch.cat(dhidden), dweight]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def eager_plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def torch_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Function:
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: function(hidden, weight, targets, options=options)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: liger_fused_linear_cross_entropy(hidden, weight, targets)


def liger_plain(logits: Tensor, targets: Tensor) -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda: liger_cross_entropy(logits, targets)  # it leaves the gradient in the logits, its own copy


def fla(hidden: Tensor, weight: Tensor, targets: Tensor) -> Function:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return lambda: fused_linear_cross_entropy_loss(hidden, targets, weight)


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Function:
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda: cut(hidden, weight, targets)


def linear_case(shape: Shape) -> Case:
    kept = shape.rows - round(shape.ignored * shape.rows)

    def inputs() -> list[Tensor]:
        targets = torch.randint(shape.vocab, (shape.rows,), device=DEVICE)
        targets[torch.randperm(shape.rows, device=DEVICE)[kept:]] = -100
        hidden = randn(shape.rows, shape.width, grad=True)
        # As in a trained head: logits have a deviation of about 1.
        return [hidden, randn(shape.vocab, shape.width, grad=True, scale=shape.width**-0.5), targets]

    ignored = f" {shape.ignored:.0%} ignored" if shape.ignored else ""
    return Case(
        "linear_cross_entropy",
        f"{shape.rows}x{shape.width}x{shape.vocab}{ignored}",
        inputs,
        lambda inputs: [torch.ones((), device=DEVICE)],
        expected,
        {
            "afina": provider(partial(linear_cross_entropy, backend="triton")),
            "afina-lean": provider(partial(linear_cross_entropy, lean=True, backend="triton")),
            "afina-torch": provider(partial(linear_cross_entropy, backend="torch")),
            "eager": provider(eager),
            "compile": lambda *x: partial(compiled(eager), *x),
            "torch-linear": torch_linear,
            "liger": liger,
            "fla": fla,
            "cce": cce,
        },
        costs.linear_cross_entropy(shape.rows, kept, shape.width, shape.vocab, randn(0).itemsize),
    )


def plain_case(rows: int, vocab: int) -> Case:
    def inputs() -> list[Tensor]:
        return [randn(rows, vocab, grad=True), torch.randint(vocab, (rows,), device=DEVICE)]

    return Case(
        "cross_entropy",
        f"plain {rows}x{vocab}",
        inputs,
        lambda inputs: [torch.ones((), device=DEVICE)],
        reference(cross_entropy_reference),
        {
            "afina": provider(partial(cross_entropy, backend="triton")),
            "afina-torch": provider(partial(cross_entropy, backend="torch")),
            "eager": provider(eager_plain),
            "compile": lambda *x: partial(compiled(eager_plain), *x),
            "liger": liger_plain,
        },
        costs.cross_entropy(rows, vocab, randn(0).itemsize),
    )


def cases(scale: str) -> list[Case]:
    return [linear_case(shape) for shape in LINEAR[scale]] + [plain_case(*shape) for shape in PLAIN[scale]]


if __name__ == "__main__":
    sys.exit(main(__doc__, cases))
