"""How far attention may be from its formulas: what roundings can cause, in whatever order a machine takes sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afina.kernels.attention_torch import visible


def rounding_bounds(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dtype: torch.dtype, *, causal: bool = True, window: int | None = None,
    softcap: float | None = None, scale: float | None = None,
) -> list[Tensor]:  # fmt: skip
    """How far out, dq, dk and dv may be from the exact ones, number by number. All arguments and results are fp64.

    q and do are (B, T, Hq, D), k and v (B, S, Hkv, D), with the values that the computation got in `dtype`. Sums may be
    taken in fp32 in whatever order; p, ds and the results are rounded to `dtype`. Triton's interpreter cuts bf16
    results off instead, but leaves p and ds in fp32, which is no worse.

    A sum of n products, rounded by u each time, is off by at most n u times the sum of their sizes (Higham, Accuracy
    and Stability of Numerical Algorithms, 3.1). The errors of s, p, dp - delta and ds follow from each other.
    """
    u, u_low = (torch.finfo(x).eps / 2 for x in (torch.float32, dtype))
    least = torch.finfo(dtype).smallest_normal * u_low  # the rounding of numbers below the normal ones
    queries, dim, keys, group = q.shape[1], q.shape[3], k.shape[1], q.shape[2] // k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    q, k, v, do = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v, do))
    seen = visible(queries, keys, keys - queries, causal, window, q.device)
    s, sizes = scale * q @ k.mT, abs(scale) * q.abs() @ k.abs().mT
    t = torch.zeros_like(s) if softcap is None else torch.tanh(s / softcap)
    s, slope = (s if softcap is None else softcap * t), 1 - t * t
    p = s.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    largest = F.pad(s.abs() * seen, (0, 1)).amax(-1, keepdim=True)
    # s, with the roundings of its product and, through the slope, of the scale; of tanh; and, relative to p, of exp2.
    product_error = (dim + 4) * u * sizes
    steepest = slope if softcap is None else (slope + product_error / softcap).clamp(max=1)
    s_error = (steepest * product_error + u * (4 * (s.abs() + largest) + 16 * (softcap or 0) + 8)) * seen
    # The forward pass takes p and the sum of p from the same scores. So p / (1 - p) is off by the factor exp(s_error)
    # of the key and those of the others.
    p_error = p * (1 - p) * torch.expm1(s_error + F.pad(s_error, (0, 1)).amax(-1, keepdim=True))
    out, out_sizes = p @ v, p @ v.abs()
    out_error = p_error @ v.abs() + ((2 * keys + 8) * u + u_low) * out_sizes + u_low * out.abs() + (keys + 1) * least
    # The backward pass computes the scores again, maybe in another order than the log-sum-exp was made of.
    p_error = p * torch.expm1(s_error + (p * torch.expm1(s_error)).sum(-1, keepdim=True).log1p() + (2 * keys + 8) * u)
    x = do @ v.mT - (do * out).sum(-1, keepdim=True)  # dp - delta
    x_sizes = do.abs() @ v.abs().mT + (do * out).abs().sum(-1, keepdim=True)
    x_error = (dim + 2) * u * x_sizes + (do.abs() * out_error).sum(-1, keepdim=True)
    t_error = s_error / (softcap or torch.inf)
    slope_error = (2 * t.abs() + t_error) * t_error + 4 * u
    ds, p_most = p * slope * x, p + p_error
    ds_error = (p_error * slope + p_most * slope_error) * x.abs() + p_most * (slope + slope_error) * x_error
    ds_error += (4 * u + u_low) * (ds.abs() + ds_error) + least
    p_error += u_low * p_most + least

    def product(a: Tensor, a_error: Tensor, b: Tensor, terms: int, factor: float = 1.0, heads: int = 1) -> Tensor:
        exact, sizes, error = (
            (factor * x @ y).unflatten(1, (-1, heads)).sum(2)
            for x, y in ((a, b), (a.abs(), b.abs()), (a_error, b.abs()))
        )
        return (error.abs() + (terms + 2) * u * sizes.abs() + u_low * exact.abs() + least).transpose(1, 2)

    return [
        out_error.transpose(1, 2),
        product(ds, ds_error, k, keys, scale),
        product(ds.mT, ds_error.mT, q, group * queries, scale, group),
        product(p.mT, p_error.mT, do, group * queries, 1.0, group),
    ]
