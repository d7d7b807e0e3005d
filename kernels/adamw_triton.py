"""AdamW in Triton: the kernels and their launches; the formulas stand in `adamw.py`.

One launch updates all parameters that share their dtypes. A program takes a chunk, ROWS x 256 elements, of one tensor,
and finds the tensor in a table of addresses. The table has a line of eight 64-bit numbers for each tensor: the
addresses of the parameter, of both moments and of the copy, the number of elements, the tensor's first block of random
numbers, and the addresses of the absmax of both moments. An address is 0 where there is no such tensor.

Random bits come from Philox, as a function of the seed, the step and the element's place among the elements of all the
parameters of a call. So neither the size of the chunks nor the order of the programs changes a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.kernels.adamw_torch import Lists, Moment, Options
from afina.kernels.blockwise import BLOCK8, TINY, State8, dynamic_code, midpoints
from afina.kernels.launch import config, jit, launch, tl

# The columns of the table of addresses.
PARAM, EXP_AVG, EXP_AVG_SQ, COPY, NUMEL, RANDOM_BLOCK, EXP_AVG_ABSMAX, EXP_AVG_SQ_ABSMAX = map(tl.constexpr, range(8))
SMALLEST_ABSMAX = tl.constexpr(TINY)


class Tables(NamedTuple):
    """What tells a program what to update."""

    tensors: Any  # int64 (tensors, 8): the table of addresses
    grads: Any  # int64 (tensors,): the addresses of the gradients, which are new tensors at each step
    chunks: Any  # int32 (chunks, 2): the number of the tensor, and which of its chunks this is


class Scalars(NamedTuple):
    """The factors of one update."""

    decay: float  # 1 - lr * weight_decay; not read, like the other two that change, where they are `live`
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^t)
    v_correction: float  # 1 / sqrt(1 - beta2^t), which multiplies sqrt(v)
    eps: float


class Variant(NamedTuple):
    """What one compilation of the kernel is for."""

    PARAM: Any  # The element types; COPY is None where there are no copies.
    GRAD: Any
    MOMENT: Any
    COPY: Any
    STOCHASTIC: bool
    ALIGNED: bool  # All addresses are multiples of 16.
    ROWS: int


@jit
def _pointer(line, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Read a pointer from a line of a table; ALIGNED promises that 16 divides it, which makes loads wide."""
    pointer = tl.load(line + COLUMN).to(tl.pointer_type(TYPE))
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
    """Store fp32 `x` in the pointer's type, rounded to nearest, or with STOCHASTIC to bf16 by 16 bits of `noise`."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            more = noise & 0xFFFF
        else:
            more = 0x7FFF + ((bits >> 16) & 1)
        special = (bits & 0x7F800000) == 0x7F800000  # Infinity stays infinity, and NaN stays NaN.
        out = (tl.where(special, tl.where(x == x, bits, bits | 0x400000), bits + more) >> 16).to(tl.int16)
        pointer = pointer.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        out = x.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + place, out, mask=inside)
    else:
        tl.store(pointer + place, out)


@jit
def _nearest_code(scaled, bounds):
    """Find the nearest code of each value by bisection: it is the number of the 255 midpoints that lie below it."""
    code = tl.zeros(scaled.shape, tl.int32)
    for bit in tl.static_range(8):
        half = 128 >> bit
        code += tl.where(scaled > tl.load(bounds + code + half - 1), half, 0)
    return code


@jit
def _update(line, grad, start, size, codes, scalars, live, seed, variant: tl.constexpr, MASKED: tl.constexpr):
    """Update the elements from `start` on, ROWS x 256, of one tensor; MASKED where the tensor ends among them."""
    ROWS: tl.constexpr = variant.ROWS
    ALIGNED: tl.constexpr = variant.ALIGNED
    STOCHASTIC: tl.constexpr = variant.STOCHASTIC

    # What differs from update to update comes as a number, or is in memory where the launch is repeated as it was.
    if live is None:
        decay, step_size, v_correction = scalars.decay, scalars.step_size, scalars.v_correction
    else:
        decay, step_size, v_correction = tl.load(live), tl.load(live + 1), tl.load(live + 2)

    # Load parameters, gradients and moments.
    place = start + tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = place < size
    param = _pointer(line, PARAM, variant.PARAM, ALIGNED)
    exp_avg = _pointer(line, EXP_AVG, variant.MOMENT, ALIGNED)
    exp_avg_sq = _pointer(line, EXP_AVG_SQ, variant.MOMENT, ALIGNED)
    p = _load(param, place, inside, MASKED).to(tl.float32)
    g = _load(_pointer(grad, 0, variant.GRAD, ALIGNED), place, inside, MASKED).to(tl.float32)
    m = _load(exp_avg, place, inside, MASKED)
    v = _load(exp_avg_sq, place, inside, MASKED)

    # Dequantise 8-bit moments: the codes of m, then those of v, with their midpoints, take 512 places each.
    if codes is not None:
        block = start // 256 + tl.arange(0, ROWS)
        held = block * 256 < size
        m_absmax = _pointer(line, EXP_AVG_ABSMAX, tl.float32, False) + block
        v_absmax = _pointer(line, EXP_AVG_SQ_ABSMAX, tl.float32, False) + block
        m = tl.load(codes + m.to(tl.int32)) * tl.load(m_absmax, mask=held, other=0.0)[:, None]
        v = tl.load(codes + 512 + v.to(tl.int32)) * tl.load(v_absmax, mask=held, other=0.0)[:, None]

    # Compute the update.
    m = scalars.beta1 * m.to(tl.float32) + scalars.one_minus_beta1 * g
    v = scalars.beta2 * v.to(tl.float32) + scalars.one_minus_beta2 * g * g
    p = decay * p - step_size * (m / (tl.sqrt(v) * v_correction + scalars.eps))

    # Draw the noise of the rounding. A Philox block serves four neighbours. The 32 bits of an element serve its three
    # roundings: two take independent halves, and the third their exclusive or, which is independent of either half.
    if STOCHASTIC:
        draw = tl.load(line + RANDOM_BLOCK) + start // 4
        draw = draw + tl.arange(0, ROWS)[:, None] * 64 + tl.arange(0, 64)[None, :]
        r0, r1, r2, r3 = tl.randint4x(seed, draw)
        noise = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3)).to(tl.int32, bitcast=True)
    else:
        noise = tl.zeros(place.shape, tl.int32)

    # Store the parameters and their copies, which are rounded to nearest always.
    _store(param, place, p, noise, inside, STOCHASTIC, MASKED)
    if variant.COPY is not None:
        _store(_pointer(line, COPY, variant.COPY, ALIGNED), place, p, noise, inside, False, MASKED)

    # Store the moments, quantised in blocks of 256 where they are held in 8 bits.
    if codes is None:
        _store(exp_avg, place, m, noise >> 16, inside, STOCHASTIC, MASKED)
        _store(exp_avg_sq, place, v, noise ^ (noise >> 16), inside, STOCHASTIC, MASKED)
    else:
        if MASKED:
            m = tl.where(inside, m, 0.0)
            v = tl.where(inside, v, 0.0)
        m_max = tl.max(tl.abs(m), axis=1)
        v_max = tl.max(v, axis=1)
        tl.store(m_absmax, m_max, mask=held)
        tl.store(v_absmax, v_max, mask=held)
        m_code = _nearest_code(m * (1.0 / tl.maximum(m_max, SMALLEST_ABSMAX))[:, None], codes + 256)
        v_code = _nearest_code(v * (1.0 / tl.maximum(v_max, SMALLEST_ABSMAX))[:, None], codes + 768)
        # A second moment above 0 takes code 1 at least: as 0 it would leave the next update to be divided by eps alone.
        v_code = tl.where(v == 0.0, v_code, tl.maximum(v_code, 1))
        _store(exp_avg, place, m_code, noise, inside, False, MASKED)
        _store(exp_avg_sq, place, v_code, noise, inside, False, MASKED)


@jit(do_not_specialize=["seed"])
def _adamw(tables, codes, skip, scalars, live, seed, variant: tl.constexpr):
    """Update one chunk; codes (1024,) are those of 8-bit moments, None where the moments are not held so.

    `skip`, None or a pointer to one byte: where the byte is not 0, nothing changes. `live`, None or a pointer to the
    decay, the step size and the correction of v, fp32 (3,); then `seed` is a pointer, too.
    `seed` stays an argument of its own, because `do_not_specialize` does not reach into tuples: there, each kind of
    number would be compiled anew.
    """
    if skip is not None:  # noqa: SIM102 (decided when the kernel is compiled; the next line when it runs)
        if tl.load(skip) != 0:
            return
    if live is not None:
        seed = tl.load(seed)
    chunk = tables.chunks + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk).to(tl.int64)
    start = tl.load(chunk + 1).to(tl.int64) * (256 * variant.ROWS)
    line = tables.tensors + 8 * tensor
    grad = tables.grads + tensor
    size = tl.load(line + NUMEL)
    # Only the last chunk of a tensor pays for masks, which make loads narrow.
    if start + 256 * variant.ROWS <= size:
        _update(line, grad, start, size, codes, scalars, live, seed, variant, False)
    else:
        _update(line, grad, start, size, codes, scalars, live, seed, variant, True)


@dataclass(eq=False)
class Group:
    """Parameters that share their dtypes, and are updated in one launch."""

    members: list[int]  # their places in the lists of `adamw_`
    random_blocks: list[int]  # the block of four random numbers at which each of them starts
    tables: tuple[Tensor, Tensor] | None = None  # the tables of tensors and of chunks, made by the first launch
    aligned: bool = False  # whether all tensors but the gradients start at multiples of 16 bytes
    # The tables of gradients that launches to be repeated read: these stay where they are.
    fixed_grads: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


def data(moment: Moment) -> Tensor:
    """Return the tensor in the shape of the parameter that holds a moment."""
    return moment.codes if isinstance(moment, State8) else moment


def _tables(lines: list[tuple[int, ...]], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make the tables of tensors and of chunks, of `chunk` elements each, on the device."""
    tensors = torch.tensor(lines, device="cpu")
    counts = (tensors[:, NUMEL.value] + chunk - 1) // chunk
    tensor = torch.arange(len(lines), device="cpu").repeat_interleave(counts)
    first = (counts.cumsum(0) - counts)[tensor]
    place = torch.arange(len(tensor), device="cpu") - first
    return tensors.to(device), torch.stack([tensor, place], dim=1).int().to(device)


@lru_cache
def _codes(device: torch.device) -> Tensor:
    """Return the codes and midpoints of exp_avg, then of exp_avg_sq, fp32 (1024,); 511 and 1023 only fill up."""
    both = [dynamic_code(signed, device) for signed in (True, False)]
    return torch.cat([part for code in both for part in (code, midpoints(code), code[-1:])])


def update_triton(group: Group, lists: Lists, options: Options, skip: Tensor | None) -> None:
    """Update the parameters of a group, and what belongs to them, in place, unless `skip`, bool (), is true."""
    params, grads, exp_avgs, exp_avg_sqs, copies = lists
    held: tuple[Sequence[Any], ...] = (params, exp_avgs, exp_avg_sqs, copies)
    if any(isinstance(x, Tensor) and not x.is_contiguous() for xs in held for x in xs):
        # A chunk is a piece of memory, so strided tensors are updated in a dense copy. State8 is always dense.
        p, m, v, c = dense = [[x.contiguous() if isinstance(x, Tensor) else x for x in xs] for xs in held]
        update_triton(Group([], group.random_blocks), Lists(p, grads, m, v, c), options, skip)
        for xs, updated in zip(held, dense):
            for x, new in zip(xs, updated):
                if new is not x:
                    x.copy_(new)
        return
    device, first, copy = params[0].device, exp_avgs[0], copies[0]
    tile = dict(config("adamw", device))
    rows = tile.pop("ROWS")
    if group.tables is None:
        columns = [[x.data_ptr() for x in xs] for xs in (params, map(data, exp_avgs), map(data, exp_avg_sqs))]
        columns.append([0 if x is None else x.data_ptr() for x in copies])
        columns += [[x.numel() for x in params], group.random_blocks]
        columns += [[x.absmax.data_ptr() if isinstance(x, State8) else 0 for x in xs] for xs in (exp_avgs, exp_avg_sqs)]
        group.tables = _tables(list(zip(*columns)), BLOCK8 * rows, device)
        group.aligned = not any(pointer % 16 for column in columns[:4] for pointer in column)
    tensors, chunks = group.tables
    grads = [grad.contiguous() for grad in grads]
    addresses = tuple(grad.data_ptr() for grad in grads)
    live: Tensor | None = None
    seed: int | Tensor = 0
    if isinstance(options.step, Tensor):
        live, seed = _live_scalars(options), (options.seed or 0) | options.step << 32
        if addresses not in group.fixed_grads:
            group.fixed_grads[addresses] = _addresses(addresses, device)
        table = group.fixed_grads[addresses]
    else:
        table = _addresses(addresses, device)
        if options.seed is not None:
            seed = options.seed | options.step << 32
    tables = Tables(tensors, table, chunks)
    variant = Variant(
        _type(params[0]),
        _type(grads[0]),
        _type(data(first)),
        None if copy is None else _type(copy),
        options.seed is not None,
        group.aligned and not any(address % 16 for address in addresses),
        rows,
    )
    codes = _codes(device) if isinstance(first, State8) else None
    byte = None if skip is None else skip.view(torch.uint8)
    launch(_adamw, (len(chunks),), tables, codes, byte, _scalars(options), live, seed, variant=variant, **tile)
    # torch's own in-place updates do so too: a backward pass through an older forward pass is refused.
    torch.autograd.graph.increment_version([*params, *(x for x in copies if x is not None)])


def _addresses(addresses: Sequence[int], device: torch.device) -> Tensor:
    """These numbers on the device. They leave pinned memory, so that their copy does not wait for the GPU."""
    host = torch.tensor(addresses, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _changing(options: Options) -> tuple[Any, Any, Any]:
    """The decay, the step size and the correction of v: numbers, or float64 tensors where the step is one."""
    step, lr, beta1, beta2, _, weight_decay, _ = options
    if isinstance(step, Tensor):
        step = step.double()  # powers of integers would be fp32
    return 1.0 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5


def _live_scalars(options: Options) -> Tensor:
    """`_changing` in one fp32 (3,): computed on the device and rounded once, as a kernel rounds the numbers it gets."""
    return torch.stack(_changing(options)).float()


def _scalars(options: Options) -> Scalars:
    _, _, beta1, beta2, eps, _, _ = options
    decay, step_size, v_correction = (0.0,) * 3 if isinstance(options.step, Tensor) else _changing(options)
    return Scalars(decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, v_correction, float(eps))


def _type(x: Tensor) -> Any:
    """Return Triton's name of a tensor's element type."""
    return getattr(tl, str(x.dtype).removeprefix("torch."))
