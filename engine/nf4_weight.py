"""The quantised base of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): weights that the model holds as
NF4, and dequantises a matrix at a time whenever it computes with them; and how they come from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afina.errors import WeightsError
from afina.kernels.blockwise import from_blocks
from afina.kernels.nf4 import NESTED, NF4State, dequantize_nf4, quantize_nf4
from afina.loaders.families.common import HFTensor
from afina.loaders.weights.bitsandbytes import QuantizedTensor, read_quantized
from afina.loaders.weights.source import Weights

BITS = 4.127  # bits of a weight with double quantisation (kernels/nf4.py)


class Part(NamedTuple):
    """The rows ``start:stop`` (rows, in) of a matrix: its codes and what they mean. Where ``state`` is None, the rows
    themselves: a checkpoint may leave out some of what we fuse."""

    start: int
    stop: int
    packed: Tensor
    state: NF4State | None


class NF4Weight(nn.Module):
    """A frozen weight (out, in) as NF4 codes, in one part for each matrix of the file (fused q, k, v are three).

    ``parts``: (start, stop, packed, state) each, together all rows in order, on one device. The module moves between
    devices as any does; dtypes it keeps, since its fp32 state is what gives the codes their exact meaning.
    ``shape`` is (out, in), ``nbytes`` all that it holds.
    """

    def __init__(self, parts: Sequence[tuple[int, int, Tensor, NF4State | None]]) -> None:
        super().__init__()
        self.parts = [Part(*part) for part in parts]
        width = self._width(self.parts[0])
        rows = 0
        for part in self.parts:
            shape = tuple(part.packed.shape if part.state is None else part.state.shape)
            if part.start != rows or shape != (part.stop - part.start, width):
                found = f"{part.start}:{part.stop} of shape {shape}"
                raise ValueError(f"parts: expected rows from {rows} on, {width} wide, found {found}")
            rows = part.stop
        self.shape = (rows, width)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), dequantised anew into its own memory: computed in fp32, rounded once, to ``dtype``."""
        return self.rows(0, self.shape[0], dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The rows ``start:stop`` of ``dense``; both must be where a part begins or ends."""
        chosen = [part for part in self.parts if start <= part.start and part.stop <= stop]
        if sum(part.stop - part.start for part in chosen) != stop - start:
            raise ValueError(f"rows: {start}:{stop} cuts a part in two")
        out = torch.empty(stop - start, self.shape[1], dtype=dtype, device=self.parts[0].packed.device)
        for part in chosen:
            room = out[part.start - start : part.stop - start]
            if part.state is None:
                room.copy_(part.packed)
            else:
                dequantize_nf4(part.packed, part.state, out=room)
        return out

    @property
    def format(self) -> str:
        """NF4, and the dtype that the weight had before, as ``load_model(quantize=...)`` takes it: "nf4-bfloat16"."""
        dtype = next(part.state.dtype for part in self.parts if part.state is not None)
        return f"nf4-{str(dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in _tensors(part))

    def extra_repr(self) -> str:
        return f"{self.shape}, parts={len(self.parts)}, {8 * self.nbytes / (self.shape[0] * self.shape[1]):.3f} bits"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Weight:
        # What .to(), .cuda() and .half() do to every tensor of a module: here the device changes, never a dtype.
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.parts[0].packed.device)).device
        self.parts = [
            part._replace(packed=part.packed.to(device), state=part.state and part.state.to(device))
            for part in self.parts
        ]
        return self

    @staticmethod
    def _width(part: Part) -> int:
        return part.packed.shape[1] if part.state is None else part.state.shape[1]


def _tensors(part: Part) -> Iterator[Tensor]:
    yield part.packed
    if part.state is not None:
        values = (getattr(part.state, field.name) for field in fields(part.state))
        yield from (value for value in values if isinstance(value, Tensor))


def shapes_of_nf4(rows: int, width: int, dtype: torch.dtype) -> NF4Weight:
    """A weight (rows, width) without values, on device "meta", as if made of one matrix in ``dtype`` with double
    quantisation."""
    count, blocksize = rows * width, 64
    blocks = -(-count // blocksize)
    with torch.device("meta"):
        packed, absmax = (torch.empty(size, dtype=torch.uint8) for size in ((-(-count // 2), 1), (blocks,)))
        code, offset = torch.empty(16), torch.empty(())
        nested = torch.empty(-(-blocks // NESTED)), torch.empty(256)
    state = NF4State(absmax, (rows, width), dtype, blocksize, code, offset, *nested)
    return NF4Weight([(0, rows, packed, state)])


def read_nf4(
    files: Weights,
    tensors: Mapping[str, HFTensor],
    stored: Mapping[str, QuantizedTensor],
    dtype: torch.dtype,
    device: torch.device,
    *,
    dense: bool,
) -> NF4Weight:
    """The weight that ``tensors``, by their names in the file, make up.

    A tensor of ``stored`` is NF4 in the file, and stays as it is. Any other is quantised here from its values in
    ``dtype``, as transformers has bitsandbytes do it; or it stays as it is, where ``dense`` says so because the file's
    author left it out. Raises ``WeightsError``.
    """
    parts = []
    state: NF4State | None
    for name, tensor in tensors.items():
        if name in stored:
            packed, state = _stored(files, stored[name], device)
        else:
            packed, state = _quantized(files, name, tensor, dtype, device, dense=dense)
        if state is not None:
            try:
                packed, state = by_heads(packed, state, tensor)
            except ValueError as problem:
                raise WeightsError(
                    f"{files.path}: tensor {name}: q, k and v of each head lie together and cannot be told apart "
                    f"quantised ({problem}): use the unquantised model, without quantize"
                ) from problem
        parts.append(Part(tensor.start, tensor.stop, packed, state))
    return NF4Weight(parts)


def _stored(files: Weights, stored: QuantizedTensor, device: torch.device) -> tuple[Tensor, NF4State]:
    """A matrix that the file holds as NF4."""
    found = {name: value.to(device) for name, value in read_quantized(files, stored).items()}
    dtype = getattr(torch, stored.dtype)
    state = NF4State(found["absmax"], stored.shape, dtype, stored.blocksize, found["quant_map"])
    if stored.nested_blocksize is not None:
        state = replace(
            state,
            offset=torch.tensor(stored.offset, dtype=torch.float32, device=device),
            nested_absmax=found["nested_absmax"],
            nested_code=found["nested_quant_map"],
            nested_blocksize=stored.nested_blocksize,
        )
    return found["packed"], state


def _quantized(
    files: Weights, name: str, tensor: HFTensor, dtype: torch.dtype, device: torch.device, *, dense: bool
) -> tuple[Tensor, NF4State | None]:
    """A matrix that the file holds dense, as codes, or with ``dense`` as it is."""
    shape = files.shape(name)
    weight = torch.empty(shape[::-1] if tensor.transpose else shape, dtype=dtype, device=device)
    files.read_into(name, weight, transpose=tensor.transpose)
    if dense:
        return weight, None
    try:
        return quantize_nf4(weight)
    except ValueError as problem:  # read with allow_nonfinite
        raise WeightsError(
            f"{files.path}: tensor {name} cannot be quantised ({problem}): load it without quantize"
        ) from problem


def by_heads(packed: Tensor, state: NF4State, tensor: HFTensor) -> tuple[Tensor, NF4State]:
    """The codes with their rows in our order (see ``HFTensor``), where the file has another.

    The blocks go with their rows. The codes of 8 bits cannot, since a block of them spans rows: absmax becomes fp32,
    with the same values. Raises ValueError where a block of weights spans rows too.
    """
    if tensor.heads is None:
        return packed, state
    out, width = state.shape
    if width % state.blocksize:
        raise ValueError(f"rows of {width} weights do not divide into blocks of {state.blocksize}")
    absmax = state.absmax
    if state.nested_absmax is not None and state.nested_code is not None and state.offset is not None:
        absmax = from_blocks(absmax, state.nested_absmax, state.nested_code, state.nested_blocksize) + state.offset
    absmax, packed = (tensor.to_ours(values.view(out, -1)) for values in (absmax, packed))
    return packed.view(-1, 1), replace(state, absmax=absmax.view(-1), offset=None, nested_absmax=None, nested_code=None)
