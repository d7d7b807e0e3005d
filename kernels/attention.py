"""Softmax attention, causal or not, with grouped heads, packed documents, sliding window and softcap, and its gradient.

A query at position i of its document sees the keys j <= i (causal) with j > i - window:
    s_ij = scale * q_i . k_j       s <- softcap * tanh(s / softcap)       o_i = sum_j softmax(s_i)_j v_j
With p = softmax(s), delta_i = do_i . o_i, ds = p * (do v^T - delta) (* 1 - (s / softcap)^2):
    dv = p^T do       dq = scale * ds k       dk = scale * ds^T q
Saved are q, k, v, o and the log-sum-exp of each row of scores, from which the backward pass computes p again
(FlashAttention-2, https://arxiv.org/abs/2307.08691). A visible pair of query and key costs 4 Hq D FLOPs forward and 14
backward. Of those 14, 4 compute the scores and do v^T a second time, because dq has a kernel of its own: so nothing is
added up in an order left to chance.

On GPUs the kernels of `attention_triton.py` run, and on Hopper those of `attention_gluon.py` where `_takes_gluon` says
so; on CPUs and in float64 those of `attention_torch.py`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from afina.kernels import attention_triton, launch
from afina.kernels.attention_torch import Bucket, Options, has_flash, plan_buckets, torch_attention, visible
from afina.kernels.backend import check_floating, check_like, choose, document_offsets, requested, verified, wide_dtype
from afina.kernels.launch import config
from afina.kernels.saved import Saved

MAX_HEAD_DIM = 256  # of the Triton kernels
# Of the Gluon kernels: the versions of Triton that they are compiled and proved with, and the heads that they take.
GLUON_TRITON = ("3.6", "3.7")
GLUON_HEAD_DIMS = (64, 256)
GLUON_MAX_HEAD_DIM_BACKWARD = 128  # Beyond it dk and dv do not fit into registers.


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The formulas above, one document at a time and all scores at once; fp32 inside (fp64 for fp64).

    Shapes and options are those of `attention`.
    """
    if cu_seqlens is not None:
        options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
        offsets = cu_seqlens.tolist()
        pieces = [
            attention_reference(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0] for a, b in pairwise(offsets)
        ]
        return torch.cat(pieces) if pieces else torch.zeros_like(q)
    length, keys = q.shape[1], k.shape[1]
    seen = visible(length, keys, keys - length, causal, window, q.device)
    return _formula(q, k, v, seen, softcap, q.shape[-1] ** -0.5 if scale is None else scale)


def _formula(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Attention to the keys that are ``seen``, bool (T, S)."""
    wide, group = wide_dtype(q.dtype), q.shape[2] // k.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide).repeat_interleave(group, 2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).masked_fill(~seen, 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v.to(wide).repeat_interleave(group, 2)).to(q.dtype)


def gluon_runs(device: torch.device) -> bool:
    """Whether this is a Hopper GPU (or one whose launches are recorded) with a Triton that the Gluon kernels know."""
    known = launch.VERSION is not None and launch.VERSION.rpartition(".")[0] in GLUON_TRITON
    return known and launch.runnable(device) and launch.capability(device) // 10 == 9


def _takes_gluon(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    """Why the Gluon kernels cannot compute this call; None where they can.

    They know no window and no softcap, are made for Hopper, and have their tiles copied by its tensor memory
    accelerator, which needs beginnings and strides of whole 16 bytes.
    """
    if not gluon_runs(q.device):
        return f"a GPU of compute capability 9 and Triton {' or '.join(GLUON_TRITON)}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return "float16 or bfloat16"
    if options.window is not None or options.softcap is not None:
        return "no window and no softcap"
    if not GLUON_HEAD_DIMS[0] <= q.shape[-1] <= GLUON_HEAD_DIMS[1]:
        return f"heads of {GLUON_HEAD_DIMS[0]} to {GLUON_HEAD_DIMS[1]} dimensions"
    return None if all(map(_is_aligned, (q, k, v))) else "tensors whose starts and strides are multiples of 16 bytes"


def _is_aligned(x: Tensor) -> bool:
    steps = x.stride()[:-1]
    whole = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    return whole and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


class _TritonAttention(torch.autograd.Function):
    """Takes q (B, T, Hq, D), k and v (B, S, Hkv, D), or with the spans of packed documents (T, H, D).

    The Gluon kernels and the Triton kernels save the same, so that each pass can have its own.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, spans: Tensor | None, on_gluon: bool
    ) -> Any:
        ctx.options, ctx.spans = options, spans
        ctx.on_gluon = on_gluon and q.shape[-1] <= GLUON_MAX_HEAD_DIM_BACKWARD
        if v.untyped_storage().data_ptr() != q.untyped_storage().data_ptr():
            # A view of the fused QKV buffer would keep it alive though q and k have been rotated elsewhere.
            v = v.contiguous()
        q, k, v = (attention_triton.kernel_layout(x) for x in (q, k, v))
        kernels: Any = attention_triton
        if on_gluon:
            from afina.kernels import attention_gluon as kernels  # Where nothing can run it, nothing imports it.
        out, lse = kernels.forward(q, k, v, options, spans)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        kernels: Any = attention_triton
        if ctx.on_gluon:
            from afina.kernels import attention_gluon_backward as kernels

            dout = dout if _is_aligned(dout) else dout.contiguous()
        grads = kernels.backward(dout, q, k, v, out, lse, ctx.options, ctx.spans, wanted)
        return (*grads, None, None, None)


class _Documents:
    """What follows from a cu_seqlens tensor, computed once for all layers and the backward pass."""

    def __init__(self, cu_seqlens: Tensor, tokens: int, version: int | None) -> None:
        self.version = version
        self.offsets = document_offsets(cu_seqlens, tokens)
        self.lengths = {b - a for a, b in pairwise(self.offsets) if b > a}
        self._made: dict[Any, Any] = {}

    def plan(self, exact: bool, device: torch.device) -> tuple[Bucket, ...]:
        """The documents' buckets for the torch path."""
        if (exact, device) not in self._made:
            self._made[exact, device] = plan_buckets(self.offsets, exact, device)
        return self._made[exact, device]

    def spans(self, cu_seqlens: Tensor, device: torch.device) -> Tensor:
        """(2, tokens) int32: where each token's document starts and where it ends."""
        if device not in self._made:
            bounds = cu_seqlens.to(device, non_blocking=True)
            ends = torch.stack((bounds[:-1], bounds[1:]))
            self._made[device] = ends.repeat_interleave(bounds.diff(), dim=1, output_size=self.offsets[-1])
        return self._made[device]


_documents = WeakIdKeyDictionary()


def _documents_of(cu_seqlens: Tensor, tokens: int) -> _Documents:
    """What follows from cu_seqlens, which is read and checked once for each tensor and its values.

    A tensor on a GPU makes the CPU wait for its values.
    """
    version = None if cu_seqlens.is_inference() else cu_seqlens._version  # inference tensors do not count theirs
    found = _documents.get(cu_seqlens)
    if found is None or version is None or found.version != version or found.offsets[-1] != tokens:
        found = _documents[cu_seqlens] = _Documents(cu_seqlens, tokens, version)
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options, documents: _Documents | None) -> Tensor:
    """torch's own attention. It chooses among several kernels, and their gradients may differ from run to run."""
    packed = documents is not None
    if documents is not None:
        length = max(documents.lengths, default=1)
        q, k, v = (x.unflatten(0, (x.shape[0] // length, length)) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = options.causal and q.shape[2] > 1  # one query sees all keys
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=options.scale, enable_gqa=grouped)
    out = out.transpose(1, 2)
    return out.flatten(0, 1) if packed else out


def _beyond_sdpa(q: Tensor, k: Tensor, options: Options, documents: _Documents | None) -> str | None:
    """What torch's own attention cannot express of this call, or None."""
    if options.softcap is not None:
        return "softcap"
    if options.window is not None:
        return "window"
    if documents is not None:
        return "documents of several lengths" if len(documents.lengths) > 1 else None
    length, keys = q.shape[1], k.shape[1]
    if keys == 0 or (options.causal and keys != length and length > 1):
        return f"{length} queries with {keys} keys"
    return None


def _masked(q: Tensor, k: Tensor, v: Tensor, options: Options, spans: Tensor) -> Tensor:
    """Attention within ``spans`` in plain torch, all scores at once: for small shapes, and where no kernel runs."""
    place = torch.arange(len(q), device=q.device)
    seen = visible(len(q), len(q), 0, options.causal, options.window, q.device)
    seen = seen & (place >= spans[0, :, None]) & (place < spans[1, :, None])
    return _formula(q[None], k[None], v[None], seen, options.softcap, options.scale)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    spans: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of q (B, T, Hq, D) to k and v (B, S, Hkv, D) -> (B, T, Hq, D). Hq is a multiple of Hkv; any strides.

    cu_seqlens: int32 (n + 1,), the boundaries of n packed documents that do not see each other; q, k and v are then
        (T, H, D). A tensor on the CPU is checked without a wait for the GPU, and the same tensor only once.
    spans: int32 (2, T) on q's device, in place of cu_seqlens: where the document of each token starts and where it
        ends. Nothing is read on the host, so a CUDA graph may change it; nor is it checked. "torch" then holds all
        scores, and "sdpa" cannot be had.
    causal: query i stands at position S - T + i and sees the keys up to there. Where S < T the first queries see no key
        and give 0.
    window: with w, which needs causal, a query sees only the last w of those keys, its own included.
    softcap: scores become softcap * tanh(score / softcap). scale defaults to D ** -0.5.
    backend: besides "triton" and "torch" also "gluon", the kernels for Hopper, and "sdpa", torch's
        scaled_dot_product_attention, each where it can compute the call. By default "gluon" is taken on a Hopper GPU
        where it has passed its self-test, and "sdpa" on a GPU where the launch table says so.
    Raises ValueError for shapes, dtypes, devices, boundaries or options that do not fit.
    """
    chosen = backend if backend in ("sdpa", "gluon") else choose("attention", backend, q)
    if cu_seqlens is not None and spans is not None:
        raise ValueError("spans: expected None where cu_seqlens is given")
    if spans is not None and (spans.dtype, spans.device) != (torch.int32, q.device):
        raise ValueError(f"spans: expected int32 on {q.device}, found {spans.dtype} on {spans.device}")
    _check(q, k, v, causal, window, softcap, packed=cu_seqlens is not None or spans is not None)
    if spans is not None and spans.shape != (2, q.shape[0]):
        raise ValueError(f"spans: expected (2, {q.shape[0]}), found {tuple(spans.shape)}")
    documents = None if cu_seqlens is None else _documents_of(cu_seqlens, q.shape[0])
    width = q.shape[-1]
    length = max(documents.lengths, default=0) if documents else k.shape[0 if spans is not None else 1]
    if window is not None and window >= length:
        window = None
    options = Options(causal, window, softcap, width**-0.5 if scale is None else scale)
    if chosen == "triton" and width > MAX_HEAD_DIM:
        if backend == "triton":
            raise ValueError(f"q: backend 'triton' takes heads of at most {MAX_HEAD_DIM} dimensions, found {width}")
        chosen = "torch"
    beyond = "spans" if spans is not None else _beyond_sdpa(q, k, options, documents)
    if backend == "sdpa" and beyond is not None:
        raise ValueError(f"backend: 'sdpa' cannot compute attention with {beyond}; use 'triton' or 'torch'")
    is_open = backend is None and requested(None, q.device) is None
    if backend is None and chosen == "triton" and beyond is None:
        chosen = config("attention_backend", q.device, dtype=q.dtype, size=width)["backend"]
    if chosen == "sdpa":
        return _sdpa(q, k, v, options, documents)
    if chosen == "torch":
        if spans is not None:
            return _masked(q, k, v, options, spans)
        plan = None if documents is None else documents.plan(not causal, q.device)
        return torch_attention(q, k, v, options, plan)
    if options.scale < 0:  # the kernels look for the largest score before they scale it
        q, options = -q, options._replace(scale=-options.scale)
    if documents is not None and cu_seqlens is not None:
        spans = documents.spans(cu_seqlens, q.device)
    on_gluon = chosen == "gluon"
    if on_gluon and (missing := _takes_gluon(q, k, v, options)) is not None:
        raise ValueError(f"backend: 'gluon' needs {missing}; use 'triton' or 'torch'")
    if is_open and chosen == "triton" and verified.get(("attention_gluon", q.device.index), False):
        on_gluon = _takes_gluon(q, k, v, options) is None
    return _TritonAttention.apply(q, k, v, options, spans, on_gluon)


def saved(
    dtype: torch.dtype,
    heads: int,
    backend: str,
    *,
    device: torch.device,
    window: int | None = None,
    softcap: float | None = None,
) -> Saved:
    """What `attention` keeps of each token: q, k and v; except for the blocked products of the torch path also the
    output and each query head's log-sum-exp. `window` is None where it hides nothing.

    v is kept as a copy where it is in other memory than q: as a view of a fused buffer it would keep q and k of before
    their rotation alive.
    """
    if backend == "torch" and not has_flash(dtype, device, window, softcap):
        return Saved(("q", "k", "v"))
    return Saved(("q", "k", "v", "out"), heads * wide_dtype(dtype).itemsize)


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, packed: bool
) -> None:
    check_floating("q", q)
    layout, dims = ("(T, H, D)", 3) if packed else ("(B, T, H, D)", 4)
    if q.dim() != dims:
        raise ValueError(f"q: expected {layout}, found {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        check_like(name, x, "q", q)
        if x.dim() != dims or x.shape[-1] != q.shape[-1] or x.shape[: dims - 3] != q.shape[: dims - 3]:
            raise ValueError(f"{name}: expected {layout} to fit q {tuple(q.shape)}, found {tuple(x.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, found {tuple(v.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[-2]}, found {k.shape[-2]}")
    if packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected q's {q.shape[0]} tokens, found {k.shape[0]}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window: expected at least 1, with causal=True, found {window} with causal={causal}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
