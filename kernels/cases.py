"""Sample calls of each op: inputs, reference, plain formula, and how far from the reference a result may be.

The self-test (`selftest.py`), and through it `afina doctor`, run these calls with every option on; the tests of the
kernels share the rule. The compile gate and the benchmarks have calls of their own: the sizes here are ragged, so that
edges of tiles show, where the gate needs the multiples of 16 that models have, and a benchmark what fills a GPU.

The rule: an error of at most twice that of plain torch in the same dtype on the same machine, and a rounding of the
result (eight in fp32, where each product and sum rounds as the result does). It holds whatever the order of a sum is,
since that of torch's formula is as arbitrary as the kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels import launch
from afina.kernels.activation import geglu, geglu_reference, swiglu, swiglu_reference
from afina.kernels.adamw import adamw_, adamw_reference_
from afina.kernels.attention import attention, attention_reference, gluon_runs
from afina.kernels.blockwise import State8
from afina.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from afina.kernels.decode import decode_attention, decode_attention_reference
from afina.kernels.nf4 import dequantize_nf4, nf4_reference, quantize_nf4
from afina.kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from afina.kernels.rope import rope, rope_reference


def allowed_error(plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """How far a result may lie from ``exact`` (float64), where torch's formula in ``dtype`` gives ``plain``."""
    rounding = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)
    return float(2 * (plain.double() - exact).abs().max() + rounding * exact.abs().max())


class Case(NamedTuple):
    """A call of an op, and what it should give. `inputs` (float64) are converted to the dtype and passed by position.

    `call` takes `backend` too. `formula` is plain torch in the inputs' dtype, where the reference is not that already.
    """

    inputs: dict[str, Tensor]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    formula: Callable[..., Any] | None = None
    outputs: Sequence[str] = ("output",)
    gradients: bool = True


class Draw:
    """Normal float64 numbers, the same in every process. `large`: sizes for a GPU's tiles, not the interpreter's."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.large = device, launch.capability(device) > 0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return drawn.to(self.device)


def _glu(draw: Draw) -> list[Case]:
    inputs = {"gate_up": draw(5, 2 * (2051 if draw.large else 77))}
    return [Case(inputs, swiglu, swiglu_reference), Case(inputs, geglu, geglu_reference)]


def _norm(draw: Draw, op: Callable[..., Any], reference: Callable[..., Any], options: dict[str, Any]) -> list[Case]:
    """Many short rows, as in the norm of heads; and longer ones, the longest of several tiles, with a residual."""

    def call(x: Tensor, residual: Tensor, *weights: Tensor, backend: str) -> Any:
        return op(x, *weights, residual=residual, backend=backend, **options)

    def sums(x: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return reference(total, *weights, **options), total

    cases = []
    names = ("weight",) if op is rms_norm else ("weight", "bias")
    for rows, width in ((1300, 80), (9, 3001), (5, 20_001)) if draw.large else ((9, 5), (5, 77)):
        inputs = {"x": draw(rows, width), "residual": draw(rows, width)} | {name: draw(width) for name in names}
        cases.append(Case(inputs, call, sums, outputs=("output", "sum")))
    return cases


def _rope(draw: Draw) -> list[Case]:
    """Half of each head turns, on views of a fused buffer; then whole heads, normalised in the same pass."""
    tokens = 150 if draw.large else 5
    angle = 3 * draw(tokens, 16)
    # fp32 as the model keeps them; the reference takes the same numbers.
    cos, sin = angle.cos().float(), angle.sin().float()
    options: dict[str, Any] = {"eps": 1e-5, "weight_offset": 1.0}

    def turned(qk: Tensor, **chosen: Any) -> tuple[Tensor, Tensor]:
        return rope(qk[:, :4], qk[:, 4:], cos, sin, **chosen)

    def normed(qk: Tensor, q_weight: Tensor, k_weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return turned(qk, q_weight=q_weight, k_weight=k_weight, backend=backend, **options)

    def turned_reference(qk: Tensor) -> tuple[Tensor, Tensor]:
        return rope_reference(qk[:, :4], qk[:, 4:], cos, sin)

    def normed_reference(qk: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (rms_norm_reference(x, w, **options) for x, w in zip((qk[:, :4], qk[:, 4:]), weights))
        return rope_reference(q, k, cos, sin)

    return [
        Case({"qk": draw(tokens, 6, 72)}, turned, turned_reference, outputs=("q", "k")),
        Case(
            {"qk": draw(tokens, 6, 32), "q_weight": draw(32), "k_weight": draw(32)}, normed, normed_reference,
            outputs=("q", "k"),
        ),
    ]  # fmt: skip


def _scores(q: Tensor, k: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Of q (T, H, D) and k (S, H, D): (H, T, S), in their dtype."""
    s = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def _attention_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offsets: Sequence[int],
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of packed documents, every step in the inputs' dtype."""
    pieces = []
    for start, end in pairwise(offsets):
        key, value = (x[start:end].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        place = torch.arange(end - start, device=q.device)
        ahead = place - place[:, None] if causal else torch.zeros_like(place - place[:, None])
        hidden = (ahead > 0) if window is None else (ahead > 0) | (ahead <= -window)
        s = _scores(q[start:end], key, None, softcap).masked_fill(hidden, -torch.inf)
        pieces.append(torch.einsum("hij,jhd->ihd", torch.softmax(s, dim=-1), value))
    return torch.cat(pieces)


def _causal_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, T, H, D) to (B, S, H, D), every step in the inputs' dtype."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    queries, keys = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    hidden = keys > queries[:, None] + len(keys) - len(queries)
    s = torch.stack([_scores(*pair, None, None) for pair in zip(q, k)]).masked_fill(hidden, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(s, dim=-1).masked_fill(hidden, 0.0), v)


def _attention(draw: Draw) -> list[Case]:
    """Documents of one token, of none, and of several tiles; grouped heads."""
    offsets = [0, 1, 1, 140, 141, 400] if draw.large else [0, 1, 1, 20, 56]
    # On the CPU, as the batches of a training run have it.
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device="cpu")

    def case(dim: int, **options: Any) -> Case:
        return Case(
            {"q": 2 * draw(offsets[-1], 4, dim), "k": draw(offsets[-1], 2, dim), "v": draw(offsets[-1], 2, dim)},
            partial(attention, cu_seqlens=cu_seqlens, **options),
            partial(attention_reference, cu_seqlens=cu_seqlens, **options),
            partial(_attention_formula, offsets=offsets, **options),
        )

    if draw.large:
        return [case(128), case(80, window=70, softcap=5.0)]
    return [case(32), case(20, window=18, softcap=5.0)]


def _attention_gluon(draw: Draw) -> list[Case]:
    """Packed documents as above, rows of a batch, and other lengths of keys; few kinds, for each is compiled."""
    offsets = [0, 1, 1, 140, 141, 400, 401, 700]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device="cpu")

    def case(*lead: int, dim: int, keys: int = 700, **options: Any) -> Case:
        places = [*lead[:-1], keys]
        shapes = {"q": (*lead, 4, dim), "k": (*places, 2, dim), "v": (*places, 2, dim)}
        return Case(
            {name: draw(*shape) for name, shape in shapes.items()},
            lambda q, k, v, backend: attention(q, k, v, backend="gluon" if backend == "triton" else backend, **options),
            partial(attention_reference, **options),
            partial(_attention_formula, offsets=offsets, causal=options.get("causal", True))
            if options
            else _causal_formula,
        )

    return [
        case(700, dim=128, cu_seqlens=cu_seqlens),
        case(700, dim=64, cu_seqlens=cu_seqlens, causal=False),
        case(700, dim=256, cu_seqlens=cu_seqlens),
        *(case(2, queries, dim=128, keys=keys) for queries, keys in ((700, 700), (200, 1000), (300, 100))),
        case(1, 700, dim=64),
    ]


def _decode_formula(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Sequence[int], window: int | None = None, softcap: float | None = None
) -> Tensor:
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        key, value = (x[row, first:length].repeat_interleave(q.shape[1] // k.shape[2], 1) for x in (k, v))
        p = torch.softmax(_scores(q[row, None], key, None, softcap), dim=-1)
        out[row] = torch.einsum("hij,jhd->ihd", p, value)[0]
    return out


def _decode(draw: Draw) -> list[Case]:
    """Rows of no key, one key, and many, with NaN after them."""
    lengths = [1200, 0, 1, 777] if draw.large else [120, 0, 1, 77]
    counts = torch.tensor(lengths, dtype=torch.int32, device=draw.device)

    def case(dim: int, **options: Any) -> Case:
        k, v = (draw(len(lengths), lengths[0] + 50, 2, dim) for _ in range(2))
        for row, length in enumerate(lengths):
            k[row, length:] = v[row, length:] = torch.nan

        def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
            return decode_attention(q, k, v, counts, backend=backend, **options)

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return decode_attention_reference(q, k, v, counts, **options)

        formula = partial(_decode_formula, lengths=lengths, **options)
        inputs = {"q": 2 * draw(len(lengths), 6, dim), "k_cache": k, "v_cache": v}
        return Case(inputs, call, reference, formula, gradients=False)

    return [case(128), case(80, window=lengths[-1] // 2, softcap=5.0)]


def _targets(draw: Draw, rows: int, vocab: int) -> Tensor:
    """Some of them ignored."""
    targets = torch.randint(vocab, (rows,), generator=draw.generator, device="cpu")
    targets[::3] = -100
    return targets.to(draw.device)


def _cross_entropy(draw: Draw) -> list[Case]:
    rows, vocab = (37, 20_011) if draw.large else (7, 131)
    targets = _targets(draw, rows, vocab)
    options: dict[str, Any] = {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2}
    return [
        Case(
            {"logits": 3 * draw(rows, vocab)},
            partial(cross_entropy, targets=targets, **chosen),
            partial(cross_entropy_reference, targets=targets, **chosen),
        )
        for chosen in ({}, {**options, "reduction": "none"})
    ]


def _linear_cross_entropy(draw: Draw) -> list[Case]:
    rows, width, vocab = (300, 200, 5003) if draw.large else (7, 24, 67)
    targets = _targets(draw, rows, vocab)
    inputs = {"hidden": draw(rows, width), "weight": draw(vocab, width) / width**0.5, "bias": draw(vocab)}
    options: dict[str, Any] = {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "sum"}

    def case(lean: bool, options: dict[str, Any]) -> Case:
        def call(hidden: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
            return linear_cross_entropy(hidden, weight, targets, bias=bias, lean=lean, backend=backend, **options)

        def reference(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear_cross_entropy_reference(hidden, weight, targets, bias=bias, **options)

        def formula(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return cross_entropy_reference(F.linear(hidden, weight, bias), targets, **options)

        return Case(inputs, call, reference, formula)

    return [case(False, {}), case(False, options), case(True, options)]


def _adamw(draw: Draw) -> list[Case]:
    """fp32 parameters with a copy in the dtype; and parameters of the dtype with 8-bit moments."""
    shapes = (1,), (700, 3), (513,)
    options: dict[str, Any] = {"step": 3, "lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    inputs = {f"{name} {i}": draw(*shape) for name in ("param", "grad") for i, shape in enumerate(shapes)}

    def lists(tensors: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        params = [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in tensors[: len(shapes)]]
        grads = list(tensors[len(shapes) :])
        wide = [g.to(p.dtype) for g, p in zip(grads, params)]
        return params, grads, [0.5 * g for g in wide], [0.1 * g * g for g in wide]

    def flat(*found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x for xs in found for x in xs)

    def call(*tensors: Tensor, backend: str) -> tuple[Tensor, ...]:
        params, grads, first, second = lists(tensors)
        copies = [torch.empty_like(g) for g in grads]
        adamw_(params, grads, first, second, copies=copies, backend=backend, **options)
        return flat(params, first, second, copies)

    def reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        params, grads, first, second = lists(tensors)
        adamw_reference_(params, grads, first, second, **options)
        return flat(params, first, second, [p.to(g.dtype) for p, g in zip(params, grads)])

    def packed(*tensors: Tensor, backend: str) -> tuple[Tensor, ...]:
        params, grads = [x.clone() for x in tensors[: len(shapes)]], tensors[len(shapes) :]
        moments = [[State8.zeros_like(p, signed=signed) for p in params] for signed in (True, False)]
        adamw_(params, grads, *moments, backend=backend, **{**options, "step": 1})
        return flat(params, *([x.dequantize() for x in xs] for xs in moments))

    def from_zero(*tensors: Tensor) -> tuple[Tensor, ...]:
        params, grads, *_ = lists(tensors)
        first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
        adamw_reference_(params, grads, first, second, **{**options, "step": 1})
        return flat(params, first, second)

    members = [f"{name} {i}" for name in ("parameter", "exp_avg", "exp_avg_sq", "copy") for i in range(len(shapes))]
    eight = [f"{name}, 8-bit moments" for name in members[: 3 * len(shapes)]]
    return [
        Case(inputs, call, reference, outputs=members, gradients=False),
        Case(inputs, packed, from_zero, partial(packed, backend="torch"), outputs=eight, gradients=False),
    ]


def _nf4(draw: Draw) -> list[Case]:
    weight = draw(301, 67)  # a last block that is not full

    def case(double_quant: bool) -> Case:
        packed, state = quantize_nf4(weight.float(), double_quant=double_quant)

        def call(like: Tensor, backend: str) -> Tensor:
            return dequantize_nf4(packed, state, out=torch.empty_like(like), backend=backend)

        def reference(like: Tensor) -> Tensor:
            return nf4_reference(packed, state, like.dtype)

        return Case({"weight": weight}, call, reference, gradients=False)

    return [case(True), case(False)]


# The ops under the names that they give to `choose`.
CASES: dict[str, Callable[[Draw], list[Case]]] = {
    "glu": _glu,
    "rms_norm": partial(
        _norm, op=rms_norm, reference=rms_norm_reference, options={"eps": 1e-5, "weight_offset": 1.0}
    ),
    "layer_norm": partial(_norm, op=layer_norm, reference=layer_norm_reference, options={"eps": 1e-5}),
    "rope": _rope,
    "attention": _attention,
    "decode_attention": _decode,
    "linear_cross_entropy": _linear_cross_entropy,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
    "nf4": _nf4,
}  # fmt: skip
# Of kernels that not every GPU has: op -> its cases, and whether the device has them.
SPECIAL_CASES: dict[str, tuple[Callable[[Draw], list[Case]], Callable[[torch.device], bool]]] = {
    "attention_gluon": (_attention_gluon, gluon_runs),
}
