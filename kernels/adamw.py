"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), in place.

p <- p (1 - lr wd)        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

On a GPU one launch updates all parameters: each program takes a chunk of one tensor, found through tables of addresses.
All arithmetic is fp32. Bytes moved for one parameter with 2-byte gradients:
    fp32 parameter and moments, and a 16-bit copy for the model           4 + 4 + 4 read and written, 2, 2        28
    bf16 parameter, bf16 moments                                          2 + 2 + 2 read and written, 2           14
    bf16 parameter, 8-bit moments                                         2 + 1 + 1 read and written, 2           10
A bf16 parameter has 8 bits of mantissa: rounded to nearest it stays where it is under updates below 1/512 of it. Hence
the fp32 parameter with its copy, or stochastic rounding (Gupta et al. 2015, https://arxiv.org/abs/1502.02551), up with
the probability of the part cut off: 16 random bits are added below the bf16 mantissa. They come from Philox, a function
of seed, step and place, so that neither chunks nor the order of programs matter.

8-bit moments (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861): dynamic codes in blocks of 256 with their absmax
(blockwise.py). One departure: what is left of v never rounds to 0, where the next update would be divided by eps alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.backend import choose
from afina.kernels.blockwise import TINY, dynamic_code, from_blocks, midpoints, to_blocks
from afina.kernels.launch import cdiv, config, jit, launch, tl

BLOCK8 = 256  # values of an 8-bit moment that share an absmax
LEAST = tl.constexpr(TINY)


@dataclass(frozen=True, eq=False)
class State8:
    """A moment in 8 bits: ``codes`` uint8, shaped as the parameter; ``absmax`` fp32, one for each 256 of its values.

    ``signed``: codes of (-1, 1], for exp_avg, instead of [0, 1], for exp_avg_sq.
    """

    codes: Tensor
    absmax: Tensor
    signed: bool

    @classmethod
    def zeros_like(cls, param: Tensor, *, signed: bool) -> State8:
        codes = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
        return cls(codes, torch.zeros(cdiv(param.numel(), BLOCK8), device=param.device), signed)

    def fits(self, param: Tensor, signed: bool) -> bool:
        blocks, codes, absmax = cdiv(param.numel(), BLOCK8), self.codes, self.absmax
        typed = codes.dtype == torch.uint8 and absmax.dtype == torch.float32 and self.signed == signed
        return typed and absmax.shape == (blocks,) and codes.is_contiguous() and absmax.device == codes.device

    def dequantize(self) -> Tensor:
        """The moment in fp32."""
        code = dynamic_code(self.signed, self.codes.device)
        return from_blocks(self.codes.view(-1), self.absmax, code, BLOCK8).view(self.codes.shape)

    def quantize_(self, values: Tensor) -> None:
        """Hold `values`, shaped as the parameter."""
        bounds = midpoints(dynamic_code(self.signed, self.codes.device))
        codes, absmax = to_blocks(values.reshape(-1), bounds, BLOCK8)
        codes = codes.view(-1)[: values.numel()].view(values.shape)
        self.codes.copy_(codes if self.signed else codes.where(values == 0, codes.clamp(min=1)))
        self.absmax.copy_(absmax)


Moment = Tensor | State8


class Scalars(NamedTuple):
    """The factors of one update, in the kernel's order."""

    keep: float  # of the parameter, after weight decay
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    rate: float  # lr over the first moment's bias correction
    unbias: float  # of sqrt(v)
    eps: float


def adamw_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    beta1, beta2 = betas
    for param, raw, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs):
        grad = raw.to(param.dtype)
        param.mul_(1 - lr * weight_decay)
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@jit
def _address(record, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from a table; `ALIGNED` promises 16 bytes, so that loads are wide."""
    pointer = tl.load(record + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _load(pointer, place, inside, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(pointer + place, mask=inside, other=0)
    else:
        x = tl.load(pointer + place)
    return x


@jit
def _store(pointer, place, x, noise, inside, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr):
    """Round fp32 `x` to the pointer's type; if STOCHASTIC, bf16 by the lower 16 bits of `noise`, else to nearest."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            more = noise & 0xFFFF
        else:
            more = 0x7FFF + ((bits >> 16) & 1)
        special = (bits & 0x7F800000) == 0x7F800000  # infinity stays, NaN stays NaN
        out = (tl.where(special, tl.where(x == x, bits, bits | 0x400000), bits + more) >> 16).to(tl.int16)
        pointer = pointer.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        out = x.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + place, out, mask=inside)
    else:
        tl.store(pointer + place, out)


@jit
def _nearest(scaled, bounds):
    """The nearest code of each value: how many of the 255 midpoints lie below it, by bisection."""
    code = tl.zeros(scaled.shape, tl.int32)
    for bit in tl.static_range(8):
        half = 128 >> bit
        code += tl.where(scaled > tl.load(bounds + code + half - 1), half, 0)
    return code


@jit
def _update(
    record, grad, start, size, codes, keep, beta1, rest1, beta2, rest2, rate, unbias, eps, seed,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, COPY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS x 256 elements of one tensor from `start` on; MASKED where the tensor ends among them."""
    place = start + tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = place < size
    param = _address(record, 0, PARAM, ALIGNED)
    exp_avg = _address(record, 1, MOMENT, ALIGNED)
    exp_avg_sq = _address(record, 2, MOMENT, ALIGNED)
    p = _load(param, place, inside, MASKED).to(tl.float32)
    g = _load(_address(grad, 0, GRAD, ALIGNED), place, inside, MASKED).to(tl.float32)
    m = _load(exp_avg, place, inside, MASKED)
    v = _load(exp_avg_sq, place, inside, MASKED)
    if codes is not None:
        # For m, then v: 256 codes and their 255 midpoints, in 512 places.
        row = start // 256 + tl.arange(0, ROWS)
        held = row * 256 < size
        m_scales = _address(record, 6, tl.float32, False) + row
        v_scales = _address(record, 7, tl.float32, False) + row
        m = tl.load(codes + m.to(tl.int32)) * tl.load(m_scales, mask=held, other=0.0)[:, None]
        v = tl.load(codes + 512 + v.to(tl.int32)) * tl.load(v_scales, mask=held, other=0.0)[:, None]
    m = beta1 * m.to(tl.float32) + rest1 * g
    v = beta2 * v.to(tl.float32) + rest2 * g * g
    p = keep * p - rate * (m / (tl.sqrt(v) * unbias + eps))
    if STOCHASTIC:
        # A Philox block serves four neighbours, an element's 32 bits of it all three roundings: by two independent
        # halves, and by their exclusive or, which is independent of either.
        block = tl.load(record + 5) + start // 4 + tl.arange(0, ROWS)[:, None] * 64 + tl.arange(0, 64)[None, :]
        r0, r1, r2, r3 = tl.randint4x(seed, block)
        noise = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3)).to(tl.int32, bitcast=True)
    else:
        noise = tl.zeros(place.shape, tl.int32)
    _store(param, place, p, noise, inside, STOCHASTIC, MASKED)
    if COPY is not None:
        _store(_address(record, 3, COPY, ALIGNED), place, p, noise, inside, False, MASKED)
    if codes is None:
        _store(exp_avg, place, m, noise >> 16, inside, STOCHASTIC, MASKED)
        _store(exp_avg_sq, place, v, noise ^ (noise >> 16), inside, STOCHASTIC, MASKED)
    else:
        if MASKED:
            m = tl.where(inside, m, 0.0)
            v = tl.where(inside, v, 0.0)
        m_scale = tl.max(tl.abs(m), axis=1)
        v_scale = tl.max(v, axis=1)
        tl.store(m_scales, m_scale, mask=held)
        tl.store(v_scales, v_scale, mask=held)
        m_code = _nearest(m * (1.0 / tl.maximum(m_scale, LEAST))[:, None], codes + 256)
        v_code = _nearest(v * (1.0 / tl.maximum(v_scale, LEAST))[:, None], codes + 768)
        _store(exp_avg, place, m_code, noise, inside, False, MASKED)
        _store(exp_avg_sq, place, tl.where(v == 0.0, v_code, tl.maximum(v_code, 1)), noise, inside, False, MASKED)


@jit(do_not_specialize=["seed"])
def _adamw(
    tensors, grads, chunks, codes, keep, beta1, rest1, beta2, rest2, rate, unbias, eps, seed,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, COPY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor: chunks (n, 2) = [tensor, chunk of it]; tensors (count, 8) as _tables makes them."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk).to(tl.int64)
    start = tl.load(chunk + 1).to(tl.int64) * (256 * ROWS)
    record = tensors + 8 * tensor
    size = tl.load(record + 4)
    # Only a tensor's last chunk pays for masks, which make loads narrow.
    if start + 256 * ROWS <= size:
        _update(
            record, grads + tensor, start, size, codes, keep, beta1, rest1, beta2, rest2, rate, unbias, eps, seed,
            PARAM, GRAD, MOMENT, COPY, STOCHASTIC, ALIGNED, ROWS, False,
        )  # fmt: skip
    else:
        _update(
            record, grads + tensor, start, size, codes, keep, beta1, rest1, beta2, rest2, rate, unbias, eps, seed,
            PARAM, GRAD, MOMENT, COPY, STOCHASTIC, ALIGNED, ROWS, True,
        )  # fmt: skip


@dataclass(eq=False)
class _Group:
    """Tensors of one dtype each, for one launch."""

    members: list[int]  # places in adamw_'s lists
    blocks: list[int]  # the random block, of 4 elements, at which each tensor starts
    tables: tuple[Tensor, Tensor] | None = None  # on the GPU, made by the first launch
    aligned: bool = False  # whether all tensors start at multiples of 16 bytes


@dataclass(eq=False)
class _Plan:
    """What one set of parameters, moments and copies, checked to fit together, needs at every step."""

    memory: list[int]
    shapes: list[torch.Size]
    devices: list[torch.device]
    groups: list[_Group]
    refs: list[Any]


# By the identities of the tensors and the gradients' dtypes. A plan goes with the first of its tensors that does.
_plans: dict[tuple[Any, ...], _Plan] = {}


def _data(x: Moment) -> Tensor:
    return x.codes if isinstance(x, State8) else x


def _plan(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    copies: Sequence[Tensor | None],
) -> _Plan:
    """The plan for these lists; ValueError where their members do not fit together."""
    fixed: list[Any] = [*params, *exp_avgs, *exp_avg_sqs, *copies]
    key = (*map(id, fixed), *[grad.dtype for grad in grads])
    tensors = fixed[: 3 * len(params)] + [x for x in copies if x is not None]
    if State8 in map(type, tensors):
        tensors = [y for x in tensors for y in ((x.codes, x.absmax) if isinstance(x, State8) else (x,))]
    memory = list(map(Tensor.data_ptr, tensors))
    shapes, devices = [grad.shape for grad in grads], [grad.device for grad in grads]
    plan = _plans.get(key)
    # Memory and shapes can change under a tensor, when its .data is set.
    if plan and plan.memory == memory and plan.shapes == shapes and plan.devices == devices:
        return plan
    groups: dict[Any, _Group] = {}
    block = 0
    for i, (param, grad, exp_avg, exp_avg_sq, copy) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, copies)):
        _check(i, params[0].device, param, grad, exp_avg, exp_avg_sq, copy)
        kind = (param.dtype, grad.dtype, _data(exp_avg).dtype, None if copy is None else copy.dtype)
        group = groups.setdefault(kind, _Group([], []))
        group.members.append(i)
        group.blocks.append(block)
        block += cdiv(param.numel(), 4)

    def forget(_: Any, plans: dict[tuple[Any, ...], _Plan] = _plans) -> None:
        plans.pop(key, None)

    refs = [weakref.ref(x, forget) for x in fixed if x is not None]
    if len(_plans) >= 16:
        _plans.pop(next(iter(_plans)))
    plan = _plans[key] = _Plan(memory, shapes, devices, list(groups.values()), refs)
    return plan


def _tables(records: list[tuple[int, ...]], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device: the records int64 (tensors, 8), and int32 (n, 2) = [tensor, chunk of it] for each chunk."""
    tensors = torch.tensor(records, device="cpu")
    counts = (tensors[:, 4] + chunk - 1) // chunk
    owner = torch.arange(len(records), device="cpu").repeat_interleave(counts)
    first = (counts.cumsum(0) - counts)[owner]
    place = torch.arange(len(owner), device="cpu") - first
    return tensors.to(device), torch.stack([owner, place], dim=1).int().to(device)


@lru_cache
def _codes(device: torch.device) -> Tensor:
    """The codes and midpoints of exp_avg, then of exp_avg_sq, fp32 (1024,); places 511 and 1023 are never read."""
    both = [dynamic_code(signed, device) for signed in (True, False)]
    return torch.cat([part for code in both for part in (code, midpoints(code), code[-1:])])


def _triton(
    group: _Group,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    copies: Sequence[Tensor | None],
    scalars: Scalars,
    step: int,
    seed: int | None,
) -> None:
    lists: tuple[Sequence[Any], ...] = (params, exp_avgs, exp_avg_sqs, copies)
    if any(isinstance(x, Tensor) and not x.is_contiguous() for xs in lists for x in xs):
        # Chunks are of memory, so strided tensors are updated in a dense copy. State8 is dense always.
        p, m, v, c = dense = [[x.contiguous() if isinstance(x, Tensor) else x for x in xs] for xs in lists]
        _triton(_Group([], group.blocks), p, grads, m, v, c, scalars, step, seed)
        for xs, updated in zip(lists, dense):
            for x, new in zip(xs, updated):
                if new is not x:
                    x.copy_(new)
        return
    device, first, copy = params[0].device, exp_avgs[0], copies[0]
    options = config("adamw", device)
    if group.tables is None:
        columns = [[x.data_ptr() for x in xs] for xs in (params, map(_data, exp_avgs), map(_data, exp_avg_sqs))]
        columns.append([0 if x is None else x.data_ptr() for x in copies])
        columns += [[x.numel() for x in params], group.blocks]
        columns += [[x.absmax.data_ptr() if isinstance(x, State8) else 0 for x in xs] for xs in (exp_avgs, exp_avg_sqs)]
        group.tables = _tables(list(zip(*columns)), BLOCK8 * options["ROWS"], device)
        group.aligned = not any(pointer % 16 for column in columns[:4] for pointer in column)
    tensors, chunks = group.tables
    grads = [grad.contiguous() for grad in grads]
    addresses = [grad.data_ptr() for grad in grads]
    # Gradients are new tensors every step. Their addresses leave pinned memory without waiting for the GPU.
    host = torch.tensor(addresses, device="cpu", pin_memory=device.type == "cuda")
    uploaded = host.to(device, non_blocking=True)
    launch(
        _adamw, (len(chunks),), tensors, uploaded, chunks, _codes(device) if isinstance(first, State8) else None,
        *scalars, 0 if seed is None else seed | step << 32,
        PARAM=_type(params[0]), GRAD=_type(grads[0]), MOMENT=_type(_data(first)),
        COPY=None if copy is None else _type(copy), STOCHASTIC=seed is not None,
        ALIGNED=group.aligned and not any(address % 16 for address in addresses), **options,
    )  # fmt: skip
    # As torch's own in-place updates do, so that a backward pass through an older forward pass is refused.
    torch.autograd.graph.increment_version([*params, *(x for x in copies if x is not None)])


def _type(x: Tensor) -> Any:
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def _torch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    copies: Sequence[Tensor | None],
    step: int,
    seed: int | None,
    options: dict[str, Any],
) -> None:
    dtype, device = params[0].dtype, params[0].device
    generator = None
    if seed is not None:
        # A generator on a CPU takes 32 bits of a seed.
        generator = torch.Generator(device).manual_seed((seed + 2654435761 * step) % 2**32)
    # torch's fused update takes tensors of one dtype, and walks memory without regard to strides.
    same = isinstance(exp_avgs[0], Tensor) and exp_avgs[0].dtype == dtype
    work = dtype if same and not (generator and dtype == torch.bfloat16) else torch.float32
    lists: tuple[Sequence[Moment], ...] = (params, exp_avgs, exp_avg_sqs)
    dense = [[_dense(x, work) for x in xs] for xs in lists]
    torch._fused_adamw_(
        dense[0],
        [_dense(grad, work) for grad in grads],
        dense[1],
        dense[2],
        [],
        [torch.tensor(float(step), device=device)] * len(params),
        amsgrad=False,
        maximize=False,
        **options,
    )
    if given := [copy for copy in copies if copy is not None]:  # all or none
        torch._foreach_copy_(given, dense[0])
    for xs, updated in zip(lists, dense):
        for x, new in zip(xs, updated):
            if isinstance(x, State8):
                x.quantize_(new)
            elif new is not x:
                x.copy_(_stochastic(new, generator) if generator and x.dtype == torch.bfloat16 else new)


def _dense(x: Moment, dtype: torch.dtype) -> Tensor:
    x = x.dequantize() if isinstance(x, State8) else x
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def _stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 `x` in bf16, rounded up or down with the probability that makes the mean exact."""
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits = (x.view(torch.int32) + noise) >> 16
    return torch.where(x.isfinite(), bits.to(torch.int16).view(torch.bfloat16), x.to(torch.bfloat16))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Moment],
    exp_avg_sqs: Sequence[Moment],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    copies: Sequence[Tensor | None] | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW update of all `params` and their moments, in place; `step` counts from 1, this update included.

    A gradient may have any floating point type. Moments have their parameter's dtype, or fp32, or are both `State8`
    (the last two not for float64). `copies[i]`, if given and not None, receives the new parameter in its own dtype.

    `seed`, from 0 to 2**32 - 1, rounds whatever is written to bf16 parameters and moments stochastically: the same seed
    and step give the same bits, on one backend (they draw differently). Copies are rounded to nearest, and so is all
    else without a seed: a bf16 parameter without one stands still under updates below 1/512 of it.

    Raises ValueError for lists of different lengths, shapes, dtypes or devices that do not fit, step < 1.
    """
    if copies is None:
        copies = [None] * len(params)
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(copies):
        raise ValueError(
            f"params: {len(params)} tensors, but {len(grads)} grads, {len(exp_avgs)} exp_avgs, "
            f"{len(exp_avg_sqs)} exp_avg_sqs, {len(copies)} copies"
        )
    if step < 1:
        raise ValueError(f"step: expected a count from 1, found {step}")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected None or 0 to 2**32 - 1, found {seed}")
    if not params:
        return
    beta1, beta2 = map(float, betas)
    scalars = Scalars(
        1.0 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, float(eps),
    )  # fmt: skip
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
    lists: Any = (params, grads, exp_avgs, exp_avg_sqs, copies)
    groups = _plan(*lists).groups
    chosen = [choose("adamw", backend, params[group.members[0]]) for group in groups]
    for group, name in zip(groups, chosen):
        p, g, m, v, c = lists
        if len(groups) > 1:
            p, g, m, v, c = ([xs[i] for i in group.members] for xs in lists)
        if name == "triton":
            _triton(group, p, g, m, v, c, scalars, step, seed)
        else:
            _torch(p, g, m, v, c, step, seed, options)


def _check(
    i: int, device: torch.device, param: Tensor, grad: Tensor, exp_avg: Moment, exp_avg_sq: Moment, copy: Tensor | None
) -> None:
    """ValueError where the i-th members of adamw_'s lists do not fit together."""
    if not param.is_floating_point():
        raise ValueError(f"params[{i}]: expected a floating point tensor, found {param.dtype}")
    first, second = (x.codes if isinstance(x, State8) else x for x in (exp_avg, exp_avg_sq))
    for name, x in (("params", param), ("grads", grad), ("exp_avgs", first), ("exp_avg_sqs", second), ("copies", copy)):
        if x is None:
            continue
        if x.shape != param.shape:
            raise ValueError(
                f"{name}[{i}]: expected the parameter's shape {tuple(param.shape)}, found {tuple(x.shape)}"
            )
        if x.device != device:
            raise ValueError(f"{name}[{i}]: expected on {device} as params[0], found on {x.device}")
    for name, x in (("grads", grad), ("copies", copy)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name}[{i}]: expected a floating point tensor, found {x.dtype}")
    if isinstance(exp_avg, State8) and param.dtype != torch.float64:
        for name, state, signed in (("exp_avgs", exp_avg, True), ("exp_avg_sqs", exp_avg_sq, False)):
            if not isinstance(state, State8) or not state.fits(param, signed):
                raise ValueError(f"{name}[{i}]: expected as made by State8.zeros_like(params[{i}], signed={signed})")
    elif first.dtype != param.dtype and (first.dtype != torch.float32 or param.dtype == torch.float64):
        raise ValueError(f"exp_avgs[{i}]: expected {param.dtype}, torch.float32 or State8, found {first.dtype}")
    elif second.dtype != first.dtype:
        raise ValueError(f"exp_avg_sqs[{i}]: expected {first.dtype} as exp_avgs, found {second.dtype}")
