"""Attention of one new token a sequence to its key/value cache (the decoding step of generation).

Row b has lengths[b] valid keys, its own the last of them; with a window only the last `window` of those count.
The query heads that share a key head are the rows of one small matrix, so the cache is read once and never repeated.
Bytes: 4 S Hkv D a row at 2-byte dtype; FLOPs 4 S Hq D. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afina.kernels.backend import check_floating, check_like, check_shape, choose


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    softcap: float | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for row, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - window)
        k, v = (x[row, first:length].to(wide).repeat_interleave(group, 1) for x in (k_cache, v_cache))
        scores = torch.einsum("hd,shd->hs", q[row].to(wide), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = torch.einsum("hs,shd->hd", torch.softmax(scores, dim=-1), v).to(q.dtype)
    return out


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    softcap: float | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """q (B, Hq, D), k_cache and v_cache (B, S, Hkv, D), lengths (B,) int32 in [0, S] -> (B, Hq, D). No gradient.

    The cache may hold anything past a row's length. A row of length 0 gives 0. scale defaults to D ** -0.5.
    Raises ValueError for shapes, dtypes, devices or options that do not fit.
    """
    choose("decode_attention", backend, q)
    check_floating("q", q)
    if q.dim() != 3:
        raise ValueError(f"q: expected (B, Hq, D), found {tuple(q.shape)}")
    batch, heads, dim = q.shape
    if k_cache.dim() != 4 or (k_cache.shape[0], k_cache.shape[3]) != (batch, dim) or heads % max(1, k_cache.shape[2]):
        raise ValueError(f"k_cache: expected (B, S, Hkv, D) to fit q {tuple(q.shape)}, found {tuple(k_cache.shape)}")
    check_shape("v_cache", v_cache, k_cache.shape)
    check_like("k_cache", k_cache, "q", q)
    check_like("v_cache", v_cache, "q", q)
    check_shape("lengths", lengths, (batch,))
    if lengths.dtype != torch.int32:
        raise ValueError(f"lengths: expected torch.int32, found {lengths.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, found {window}")
    if batch == 0:
        return torch.zeros_like(q)
    low, high = (int(x) for x in torch.aminmax(lengths))
    if low < 0 or high > k_cache.shape[1]:
        raise ValueError(f"lengths: expected in [0, {k_cache.shape[1]}], found {low} to {high}")
    if high == 0:
        return torch.zeros_like(q)
    first = 0 if window is None else max(0, low - window)
    k, v = k_cache[:, first:high], v_cache[:, first:high]
    position = torch.arange(first, high, device=q.device)
    ends = lengths.unsqueeze(1)
    hidden = position >= ends
    if window is not None:
        hidden |= position < ends - window
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.to(wide).unflatten(1, (k.shape[2], -1))  # (B, Hkv, G, D)
    scores = torch.matmul(rows, k.to(wide).permute(0, 2, 3, 1)).mul_(dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    p = torch.softmax(scores, dim=-1)
    if low == 0:
        p.masked_fill_((lengths == 0)[:, None, None, None], 0.0)
    # What lies past a row's length may be NaN or Inf, which a weight of 0 would not silence.
    v = v.to(wide).masked_fill(hidden[:, :, None, None], 0.0) if low < high or first else v.to(wide)
    return torch.matmul(p, v.transpose(1, 2)).flatten(1, 2).to(q.dtype)
