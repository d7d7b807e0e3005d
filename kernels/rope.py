"""Rotary position embedding in the half layout (Su et al. 2021, https://arxiv.org/abs/2104.09864).

The first D_rot = 2 h dimensions of each head turn, in pairs (i, i + h), by the angle of the token's position:
    y1 = x1 cos - x2 sin       y2 = x2 cos + x1 sin       the other D - D_rot dimensions are copied
The transpose of a rotation turns back, so the backward pass is the same function with -sin, and saves only cos and sin.
Products are fp32, or fp64 for float64 input, and are rounded once. q and k are each read once and written once.

With weights, each head is first RMS-normalised over its D dimensions (the QK-norm of Qwen3 and Gemma 3; the formulas
stand in `norm.py`). Triton does both in the same pass over q and k, and backward in one pass over q, k and their
gradients, which moves half as many bytes as norm and rotation one after the other. For that q and k are saved, and
their statistics are computed again. The value between the two steps stays fp32 there, where two separate ops round it
to the type of q. The kernels are in `rope_triton.py`, the torch path is in `rope_torch.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afina.kernels.backend import check_floating, check_shape, choose, lean, wide_dtype
from afina.kernels.norm import rms_norm
from afina.kernels.rope_torch import TorchRope, turn
from afina.kernels.rope_triton import TritonRope
from afina.kernels.saved import Saved


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate by the formulas above; `rope` says what the arguments are."""

    def turn(x: Tensor) -> Tensor:
        h = cos.shape[-1]
        c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
        x1, x2, rest = x[..., :h], x[..., h : 2 * h], x[..., 2 * h :]
        return torch.cat([(x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), rest], dim=-1)

    return turn(q), turn(k)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q (..., T, Hq, D) and k (..., T, Hkv, D) by cos and sin (..., T, D_rot / 2); returns new q and k.

    cos and sin are fp32 (fp64 is allowed with fp64 q), get no gradient, and broadcast over the leading dimensions. q
    and k may have any strides, such as those of views of a fused QKV buffer; the results are contiguous. With q_weight
    and k_weight (D,) each head is RMS-normalised first, with `eps` and `weight_offset` as in `rms_norm`.

    Raises ValueError for shapes that do not fit, for D_rot > D, for wrong dtypes, for tensors on several devices, and
    for a backend that is unknown or cannot run.
    """
    if lean.on and q_weight is None:
        return turn(q, cos, sin), turn(k, cos, sin)
    _check(q, k, cos, sin, q_weight, k_weight)
    wide = wide_dtype(q.dtype)
    if choose("rope", backend, q) == "triton" and q.numel() and k.numel():
        lead, table = q.shape[:-3], cos.shape[-2:]
        cos, sin = (x.contiguous().expand(*lead, *table).reshape(lead.numel(), *table) for x in (cos, sin))
        return TritonRope.apply(q, k, cos, sin, q_weight, k_weight, eps, weight_offset)
    if q_weight is not None and k_weight is not None:
        q = rms_norm(q, q_weight, eps=eps, weight_offset=weight_offset, backend="torch")
        k = rms_norm(k, k_weight, eps=eps, weight_offset=weight_offset, backend="torch")
    ones = cos.new_ones(1).expand(*cos.shape[:-1], q.shape[-1] - 2 * cos.shape[-1])
    cos = torch.cat([cos, cos, ones], dim=-1).unsqueeze(-2).to(wide)
    return TorchRope.apply(q, k, cos, sin.unsqueeze(-2).to(wide))


def saved(dtype: torch.dtype, head_dim: int, heads: int, backend: str, *, normed: bool) -> Saved:
    """What `rope` keeps of each token with so many heads, those of q and k together; `normed`: with weights.

    Both backends keep sin. Triton keeps cos too, the torch path a copy of it as wide as a head instead. With weights q
    and k are kept as well, and on the torch path the rstd of each head.
    """
    wide, inputs = wide_dtype(dtype).itemsize, ("q", "k") if normed else ()
    if backend == "triton":
        return Saved(("cos", "sin", *inputs))
    return Saved(("sin", *inputs), (head_dim + (heads if normed else 0)) * wide)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    if cos.dim() < 2:
        raise ValueError(f"cos: expected (..., T, D_rot / 2), found {tuple(cos.shape)}")
    for name, x in (("q", q), ("k", k)):
        check_floating(name, x)
        if x.dim() < 3 or x.shape[-3] != cos.shape[-2] or x.shape[-1] < 2 * cos.shape[-1]:
            raise ValueError(
                f"{name}: expected (..., T, H, D) with T = {cos.shape[-2]} and D >= {2 * cos.shape[-1]} to fit cos "
                f"{tuple(cos.shape)}, found {tuple(x.shape)}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected q's head dimension {q.shape[-1]}, found {k.shape[-1]}")
    lead = q.shape[:-3]
    if k.shape[:-3] != lead:
        raise ValueError(f"k: expected q's leading dimensions {tuple(lead)}, found {tuple(k.shape[:-3])}")
    if len(cos.shape[:-2]) > len(lead) or any(a not in (1, b) for a, b in zip(cos.shape[-3::-1], lead[::-1])):
        raise ValueError(
            f"cos: expected leading dimensions that broadcast to q's {tuple(lead)}, found {tuple(cos.shape)}"
        )
    if cos.shape != sin.shape:
        raise ValueError(f"sin: expected cos's shape {tuple(cos.shape)}, found {tuple(sin.shape)}")
    wide = wide_dtype(q.dtype)
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in (torch.float32, wide):
            raise ValueError(f"{name}: expected torch.float32, found {x.dtype}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{'q' if q_weight is None else 'k'}_weight: expected with the other, found None")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(name, weight, q.shape[-1:])
    for name, other in (("k", k), ("cos", cos), ("sin", sin), ("q_weight", q_weight), ("k_weight", k_weight)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name}: expected on q's device {q.device}, found on {other.device}")
