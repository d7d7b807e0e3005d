"""The linear layers: a dense or NF4 weight, and LoRA beside it.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) leaves W as it is and learns a product of two thin matrices:

    y = x W^T + b + s drop(x) A^T B^T         x (N, C), W (O, C), A (r, C), B (O, r), s = alpha / r

rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) has s = alpha / sqrt(r). DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353) learns a magnitude m (O,) too: y = m / |W + s B A| (x W^T + s drop(x) A^T B^T) + b,
the norm taken of each row and held constant in the backward pass (section 4.3).

Our matrices hold several of the checkpoint's one below the other (q, k, v; gate, up). Each of these is a part with an
adapter of its own. Their A lie one below the other too, so that x is read once: h = drop(x) A^T is one product.

The frozen weight has no gradient, so the backward pass needs x for the gradients of A and B alone. Where x is cheap to
compute again from what another operation keeps anyway (x is the output of a norm or an activation), ``recompute`` does
so, and x need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afina.kernels.fp8_linear import fp8_linear
from afina.kernels.saved import Saved


class Recompute(NamedTuple):
    """How to compute a layer's input once more in the backward pass: ``compute(source)``. The graph keeps ``source`` as
    it keeps any saved tensor, so that under checkpointing it is freed and computed again too: ``compute`` must hold no
    activation itself."""

    compute: Callable[[Tensor], Tensor]
    source: Tensor


class Part(NamedTuple):
    """The rows ``start:stop`` of a matrix that have an adapter: its rank r, and its scale s."""

    start: int
    stop: int
    rank: int
    scale: float


class Lora(nn.Module):
    """The adapters of one matrix (O, C).

    ``A`` is (parts x R, C) and ``B`` (rows of all parts, R), where R is the largest rank: parts of a lower rank are
    filled up with zeros, which stay zeros. ``magnitude`` (rows of all parts,) is None without DoRA, and else fp32: it
    begins as the norm that it is divided by, and rounded to 16 bits the two would differ.
    """

    def __init__(
        self, parts: Sequence[Part], width: int, *, dropout: float, dora: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts, self.dropout = list(parts), dropout
        self.rank = max(part.rank for part in parts)
        rows = sum(part.stop - part.start for part in parts)
        self.A = nn.Parameter(torch.zeros(len(parts) * self.rank, width, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rows, self.rank, device=device, dtype=dtype))
        self.magnitude = nn.Parameter(torch.ones(rows, device=device)) if dora else None
        self._norm: Tensor | None = None

    def blocks(self) -> list[tuple[Part, slice, slice]]:
        """Each part with its rows of A and its rows of B (and of the magnitude)."""
        found, first = [], 0
        for i, part in enumerate(self.parts):
            last = first + part.stop - part.start
            found.append((part, slice(i * self.rank, i * self.rank + part.rank), slice(first, last)))
            first = last
        return found

    @torch.no_grad()
    def init(self, weight: Callable[[], Tensor], generator: torch.Generator) -> None:
        """Draw A uniformly within 1 / sqrt(C), as nn.Linear draws its weights. B stays 0, so nothing changes yet.
        W is asked for only where magnitudes start from it: one in 4 bits would be dequantised for it."""
        bound = 1 / math.sqrt(self.A.shape[1])
        for part, a, _ in self.blocks():
            self.A[a].copy_(torch.empty(part.rank, self.A.shape[1]).uniform_(-bound, bound, generator=generator))
        if self.magnitude is not None:
            self.magnitude.copy_(self.row_norms(weight()))

    def train(self, mode: bool = True) -> Lora:
        # Norms are kept in eval mode only: a kernel that moves the weights in place leaves no trace to check them by.
        self._norm = None
        return super().train(mode)

    def row_norms(self, weight: Tensor) -> Tensor:
        """|W + s B A| of each adapted row, fp32 (rows,), from products with r columns: the sum is never built."""
        if self._norm is not None:
            return self._norm
        found = []
        with torch.no_grad():
            for part, a, b in self.blocks():
                w, down, up = weight[part.start : part.stop], self.A[a], self.B[b, : part.rank].float()
                square = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).square()
                cross = (F.linear(w, down).float() * up).sum(1)
                own = ((up @ F.linear(down.float(), down.float())) * up).sum(1)
                found.append((square + (2 * part.scale * cross + part.scale**2 * own)).clamp(min=0).sqrt())
        norm = torch.cat(found)
        if not self.training:
            self._norm = norm
        return norm

    def gains(self, weight: Tensor) -> Tensor:
        """DoRA's m / |W + s B A| (O,) in the weight's dtype, 1 for rows without an adapter."""
        assert self.magnitude is not None
        gain = (self.magnitude / self.row_norms(weight)).to(weight.dtype)
        pieces, done = [], 0
        for part, _, b in self.blocks():
            pieces += [gain.new_ones(part.start - done), gain[b]]
            done = part.stop
        return torch.cat([*pieces, gain.new_ones(weight.shape[0] - done)])

    def merge(self, weight: Tensor) -> Tensor:
        """The one matrix (O, C), fp32, that stands for ``weight`` (O, C) and the adapter together."""
        merged = self.sum(weight.float())
        if self.magnitude is not None:
            for part, _, b in self.blocks():
                rows = merged[part.start : part.stop]
                rows.mul_((self.magnitude[b] / torch.linalg.vector_norm(rows, dim=1))[:, None])
        return merged

    @torch.no_grad()
    def sum(self, weight: Tensor) -> Tensor:
        """W + s B A (O, C), fp32 as ``weight`` (O, C) is, in memory of its own."""
        out, done = torch.empty_like(weight), 0
        for part, a, b in self.blocks():
            out[done : part.start] = weight[done : part.start]
            rows, done = slice(part.start, part.stop), part.stop
            up, down = self.B[b, : part.rank].float(), self.A[a].float()
            torch.addmm(weight[rows], up, down, alpha=part.scale, out=out[rows])
        out[done:] = weight[done:]
        return out


class QuantizedWeight(Protocol):
    """A frozen weight (O, C), held in another format than the one that the layer computes in: ``NF4Weight`` is one.

    It is a module. ``format`` names the format, and the dtype that the weight had before: "nf4-bfloat16". ``nbytes``
    is all that it holds. ``dense`` and ``rows`` give the weight, or its rows ``start:stop``, in ``dtype`` and in new
    memory.
    """

    @property
    def format(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def dense(self, dtype: torch.dtype) -> Tensor: ...

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor: ...


class PackedWeight(Protocol):
    """A layer's computation from a weight in another layout: see ``packed.PackedLinear``."""

    @property
    def weight(self) -> Any: ...

    def __call__(self, layer: Linear, x: Tensor) -> Tensor: ...


class Linear(nn.Module):
    """y = x W^T + b: x (..., C) -> (..., O).

    W (O, C) is either the parameter ``weight`` or frozen in ``quantized``; the other one is None. Callers ask the layer
    (``dense``, ``rows``, ``nbytes``, ``frozen_format``) and need not know which.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.quantized: QuantizedWeight | None = None
        self.lora: Lora | None = None
        self.fp8 = False  # in training, while W is a parameter
        self.packed: PackedWeight | None = None  # used without gradient, also where neither of the two is there
        self.recompute: bool | None = None  # None: with an adapter (see ``recomputes``)

    def hold(self, weight: nn.Parameter | QuantizedWeight | None) -> None:
        """Replace W (O, C). None lets the present one go, so that another can be made in its memory."""
        self.weight = weight if isinstance(weight, nn.Parameter) else None
        self.quantized = None if isinstance(weight, nn.Parameter) else weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (O, C): the parameter as it is, or dequantised to ``dtype``."""
        if self.quantized is not None:
            return self.quantized.dense(dtype)
        if self.weight is None and self.packed is not None:
            return self.packed.weight.dense()
        assert self.weight is not None
        return self.weight

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The rows ``start:stop`` of ``dense(dtype)``, which are those of one or several of the file's matrices."""
        if self.quantized is not None:
            return self.quantized.rows(start, stop, dtype)
        return self.dense(dtype)[start:stop]

    @property
    def nbytes(self) -> int:
        """Bytes of W as it is held."""
        held = self.weight if self.quantized is None else self.quantized
        if held is None:
            assert self.packed is not None
            return self.packed.weight.nbytes
        return held.nbytes

    def workspace_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the new memory that a product takes for W: dequantised, or in FP8 beside a copy that is rounded."""
        if self.fp8:
            return self.out_features * self.in_features * (dtype.itemsize + 1)
        return 0 if self.quantized is None else self.out_features * self.in_features * dtype.itemsize

    @property
    def frozen_format(self) -> str | None:
        """The format that W is frozen in, such as "nf4-bfloat16"; None where it is a parameter."""
        return None if self.quantized is None else self.quantized.format

    def recomputes(self) -> bool:
        """Whether x is computed again in the backward pass, where that is cheap, and not kept for it."""
        return self.lora is not None if self.recompute is None else self.recompute

    def forward(self, x: Tensor, recompute: Recompute | None = None) -> Tensor:
        """``recompute`` computes x a second time, in the backward pass, so that x itself need not be kept."""
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed(self, x)
        lora = self.lora
        if not torch.is_grad_enabled() or not self.recomputes():
            recompute = None
        if lora is None and self.quantized is None:
            if recompute is None or self.weight is None or not self.weight.requires_grad:
                return self._dense_product(x)
            with _recomputed(x, recompute):
                return self._dense_product(x)
        if lora is None:
            return _AdaptedLinear.apply(x, None, None, self, self.bias, None, None)
        mask = None
        if lora.dropout and self.training:
            mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - lora.dropout)
        if lora.magnitude is None:
            return _AdaptedLinear.apply(x, lora.A, lora.B, self, self.bias, mask, recompute)
        gains = lora.gains(self.dense(x.dtype))
        y = _AdaptedLinear.apply(x, lora.A, lora.B, self, self.bias, mask, recompute) * gains
        # The bias is added inside, as without an adapter: added afterwards, it would round the sum once more, and a
        # fresh adapter would not leave bf16 outputs as they are.
        return y if self.bias is None else y + self.bias * (1 - gains)

    def _dense_product(self, x: Tensor) -> Tensor:
        if self.fp8 and self.weight is not None and self.training and torch.is_grad_enabled():
            return fp8_linear(x, self.weight, self.bias)
        return F.linear(x, self.dense(x.dtype), self.bias)


@contextmanager
def _recomputed(x: Tensor, recompute: Recompute) -> Iterator[None]:
    """Operations in this context keep, in place of x and views of it, what computes x again. The backward pass then
    runs on the same values as it would with x, whichever operations they are, so it gives the same bits."""
    memory, source = x.untyped_storage()._cdata, recompute.source.detach()

    def pack(kept: Tensor) -> Tensor | tuple[Any, ...]:
        same = kept.untyped_storage()._cdata == memory
        return (kept.size(), kept.stride(), kept.storage_offset()) if same else kept

    def unpack(kept: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return recompute.compute(source).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _AdaptedLinear(torch.autograd.Function):
    """x, A, B -> x W^T + b + s drop(x) A^T B^T, for a frozen W and b. A and B are None without an adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, layer: Linear, bias: Tensor | None,
        mask: Tensor | None, recompute: Recompute | None,
    ) -> Tensor:  # fmt: skip
        lora, h = layer.lora, None
        ctx.layer, ctx.compute = layer, None if recompute is None else recompute.compute
        ctx.summed = mask is None and sums(layer, x.numel() // max(1, layer.in_features), x.dtype)
        y = F.linear(x, _weight(layer, x.dtype, ctx.summed), bias)
        if a is not None and b is not None and lora is not None and not ctx.summed:
            h = F.linear(_dropped(x, mask, lora.dropout), a).flatten(0, -2)
            rows = y.flatten(0, -2)
            for part, at, bt in lora.blocks():
                out = rows[:, part.start : part.stop]
                out.addmm_(h[:, at], b[bt, : part.rank].t(), alpha=part.scale)
        source = x if recompute is None else recompute.source
        ctx.save_for_backward(None if a is None else source, a, b, h, mask)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h, mask = ctx.saved_tensors
        layer, lora = ctx.layer, ctx.layer.lora
        rows = dy.flatten(0, -2)
        da = db = dh = dx = None
        if a is not None:
            if ctx.compute is not None:
                with torch.no_grad():
                    x = ctx.compute(x)
            x = _dropped(x, mask, lora.dropout).flatten(0, -2)
            h = F.linear(x, a) if h is None else h
            dh, db = torch.zeros_like(h), torch.zeros_like(b)
            for part, at, bt in lora.blocks():
                out, up = rows[:, part.start : part.stop], b[bt, : part.rank]
                torch.mm(out, up, out=dh[:, at]).mul_(part.scale)
                # The product is made transposed: so it reads the long rows of dy as they lie, twice as fast on a CPU.
                db[bt, : part.rank] = (h[:, at].t() @ out).mul_(part.scale).t()
            da = dh.t() @ x
        if ctx.needs_input_grad[0]:
            weight = _weight(layer, dy.dtype, ctx.summed)
            dx = rows @ weight
            if dh is not None and mask is not None:
                dx += _dropped(dh @ a, mask.flatten(0, -2), lora.dropout)
            elif dh is not None and not ctx.summed:
                dx.addmm_(dh, a)
            dx = dx.view(*dy.shape[:-1], weight.shape[1])
        return dx, da, db, None, None, None, None


def frozen_format(model: nn.Module) -> str | None:
    """The format that ``model`` holds its frozen weights in, such as "nf4-bfloat16"; None where all are parameters."""
    formats = (module.frozen_format for module in model.modules() if isinstance(module, Linear))
    return next((found for found in formats if found is not None), None)


def saved(layer: Linear, rows: int, dtype: torch.dtype) -> Saved:
    """What ``layer`` keeps of x (rows, C) in ``dtype``: x itself for its own gradient or an adapter's, unless a
    ``Recompute`` is given, whose ``source`` it keeps instead; h = x A^T, unless it computes with the sum of W and B A;
    with dropout the mask; with DoRA the product before its gain, the gain, and the norms in it."""
    lora = layer.lora
    if lora is None:
        return Saved(("x",) if layer.weight is not None and layer.weight.requires_grad else ())
    dropped = lora.dropout > 0 and layer.training
    h = lora.A.shape[0] if dropped or not sums(layer, rows, dtype) else 0
    row = h * dtype.itemsize + (layer.in_features if dropped else 0)
    if lora.magnitude is None:
        return Saved(("x",), row)
    out = layer.out_features * dtype.itemsize
    return Saved(("x",), row + out, out + lora.magnitude.nbytes)


def sums(layer: Linear, rows: int, dtype: torch.dtype) -> bool:
    """Whether ``layer`` computes x (W + s B A)^T for x (rows, C) instead of two products.

    For many rows the sum is cheaper than a second product with thin matrices. It is made in fp32 alone: in 16 bits most
    of what B A adds to W would be rounded away.
    """
    out, width = layer.out_features, layer.in_features
    return layer.lora is not None and dtype == torch.float32 and rows * (out + width) > 2 * out * width


def _weight(layer: Linear, dtype: torch.dtype, summed: bool) -> Tensor:
    weight = layer.dense(dtype)
    return layer.lora.sum(weight) if summed and layer.lora is not None else weight


def _dropped(x: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    return x if mask is None else x * mask / (1 - rate)
