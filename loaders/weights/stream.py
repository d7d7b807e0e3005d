"""From the bytes of a file into a tensor that exists already: a piece at a time, checked and converted on the way.

What the readers of all formats share, so that a fused or transposed parameter is filled without a second copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afina.errors import WeightsError
from afina.inside import open_own
from afina.loaders.jsonfile import show

PIECE = 4 * 2**20  # bytes that are read, checked and converted at a time
SAMPLE = 4096  # bytes of each tensor that tell a model from another one, quickly


class Bad(Protocol):
    """Makes the error of a file: what was found, and how to mend it where that is not to download it again."""

    def __call__(self, found: str, mend: str = ..., /) -> WeightsError: ...


@contextmanager
def open_at(path: Path, bad: Bad, offset: int = 0, *, own: bool = True) -> Iterator[FileIO]:
    """Open a file of a folder at a place, for the block; what the system refuses meanwhile is raised as ``bad`` makes
    it. ``own``: False for a file that the user named, which may be a link to any place. Raises WeightsError."""
    try:
        with open_own(path, error=WeightsError, buffering=0) if own else path.open("rb", buffering=0) as file:
            file.seek(offset)
            yield file
    except OSError as problem:
        raise bad(f"cannot be read ({problem.strerror})", "check the path and its permissions") from problem


def stream(
    out: Tensor,
    read: Callable[[Tensor], None],
    *,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    transpose: bool,
    finite: bool,
    bad: Bad,
    limit: int = PIECE,
) -> None:
    """Fill ``out``, any view on any device, with a tensor of a file, through one buffer of ``limit`` bytes.

    ``read`` fills a contiguous tensor on the CPU, of ``dtype``, with the values that come next in the file, where the
    tensor ``name`` has ``shape``. ``out`` has that shape, or the same with its first dimension split in several; with
    ``transpose``, that of the transpose.
    Floating point converts to ``out.dtype``; other dtypes must be equal. ``finite``: refuse NaN, Inf, and values that
    overflow ``out.dtype``. Raises what ``bad`` makes.
    """
    out = out.detach().t() if transpose else out.detach()
    if out.numel() != math.prod(shape) or tuple(out.shape[out.dim() - len(shape) + 1 :]) != shape[1:]:
        wanted = f"{'its transpose of shape' if transpose else 'shape'} {tuple(out.shape)} was expected"
        raise bad(f"tensor {show(name)} has shape {shape} where {wanted}", "config.json is of another model?")
    if dtype != out.dtype and not (dtype.is_floating_point and out.dtype.is_floating_point):
        raise bad(f"tensor {show(name)} is {dtype} where {out.dtype} was expected", "load unquantised weights")
    narrower = dtype != out.dtype and torch.finfo(out.dtype).max < torch.finfo(dtype).max
    buffer = torch.empty(min(limit, out.numel() * dtype.itemsize), dtype=torch.uint8)
    done = 0
    for piece in pieces(out, limit // max(dtype.itemsize, out.itemsize)):
        source = piece
        if dtype != out.dtype or piece.device.type != "cpu" or not piece.is_contiguous():
            source = buffer[: piece.numel() * dtype.itemsize].view(dtype).view(piece.shape)
        read(source)
        if finite and (wrong := _first_not_finite(source)) is not None:
            mend = "load a sound copy, or accept it with --allow-nonfinite"
            raise bad(f"tensor {show(name)} holds NaN or Inf (first at element {done + wrong:,})", mend)
        if dtype == torch.bool and source.numel() and int(source.view(torch.uint8).max()) > 1:
            raise bad(f"tensor {show(name)} is BOOL but holds bytes other than 0 and 1")
        if source is not piece:
            piece.copy_(source)
            if finite and narrower and _first_not_finite(piece) is not None:
                mend = "load it as bfloat16 or float32"
                raise bad(f"tensor {show(name)} holds values too large for {out.dtype}", mend)
        done += piece.numel()


def pieces(x: Tensor, limit: int) -> Iterator[Tensor]:
    """Yield views of ``x`` that cover it in row-major order, each of at most ``limit`` elements: whole rows, or of a
    contiguous tensor so many elements."""
    if x.is_contiguous():
        yield from x.view(-1).split(limit)
    elif x.dim() > 1 and (inner := x[0].numel()) > limit:
        for row in x:
            yield from pieces(row, limit)
    else:
        yield from x.split(limit // inner if x.dim() > 1 else limit)


def consecutive(rows: slice, count: int) -> tuple[int, int]:
    """The first row and the one after the last of a slice of ``count`` rows."""
    first, last, step = rows.indices(count)
    if step != 1 or last < first:
        raise ValueError(f"rows must be a slice of consecutive rows, got {rows}")
    return first, last


def as_bytes(x: Tensor) -> Any:
    """Return the memory of a contiguous CPU tensor as a flat numpy array of bytes."""
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8).numpy()  # x.view(-1) keeps the stride of one element


def read_bytes(file: FileIO, target: Any, bad: Bad) -> None:
    """Fill a writable buffer of bytes with those that come next in the file."""
    left = memoryview(target)
    while left:
        count = file.readinto(left)
        if not count:
            raise bad("ended while it was being read", "it changed meanwhile, load it again")
        left = left[count:]


def stored_bytes(file: FileIO, size: int, bad: Bad, limit: int) -> Iterator[memoryview]:
    """Yield the next ``size`` bytes of the file, at most ``limit`` at a time, all in one buffer."""
    buffer = bytearray(min(limit, size))
    for start in range(0, size, limit):
        piece = memoryview(buffer)[: size - start]
        read_bytes(file, piece, bad)
        yield piece


def _first_not_finite(x: Tensor) -> int | None:
    """Return the index in row-major order of the first NaN or Inf, None when all are finite."""
    if not (x.is_floating_point() or x.is_complex()):
        return None
    if x.dtype.itemsize == 1:
        x = x.float()
    if x.sum().isfinite():  # one cheap pass: NaN and Inf survive a sum; a large sum may overflow, so look again
        return None
    bad = x.isfinite().logical_not().flatten().nonzero()
    return int(bad[0]) if len(bad) else None
