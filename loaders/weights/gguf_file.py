"""One GGUF file, read with bounds: everything that it claims is checked before anything is read or allocated for it.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian:
    "GGUF", version (uint32), number of tensors and of key-values (uint64 each);
    each key-value: key (string), type (uint32), value; a string is its length (uint64) and so many bytes of UTF-8, an
    array the type of its elements (uint32), their number (uint64) and the elements;
    each tensor: name (string), number of dimensions (uint32), dimensions (uint64 each, the fastest first), type
    (uint32), offset (uint64) from where the data begin;
    the data, each tensor at a multiple of ``general.alignment``, one after another.

Quantised tensors are dequantised by the `gguf` package, which is imported when one is read, not before.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from afina.errors import ConfigError, WeightsError, nearest
from afina.loaders.jsonfile import show
from afina.loaders.weights.stream import PIECE, Bad, as_bytes, consecutive, open_at, read_bytes, stored_bytes, stream

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# What a file may claim, far above what real ones do: a vocabulary of 262,144 tokens takes 20 MB.
MAX_HEADER = 64 * 2**20
MAX_FIELDS = 10_000
MAX_TENSORS = 100_000
MAX_STRINGS = 4_000_000  # in all arrays together
MAX_KEY, MAX_NAME, MAX_DIMS = 65_535, 64, 4
ALIGNMENT = "general.alignment"
CHUNK = 2**20  # bytes of the header that are read at a time

# Types of values by their number: a format of ``struct``, and numpy's name of it.
_SCALARS = {
    0: ("<B", "u1"), 1: ("<b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("<B", "u1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9

# The types of tensors that are read: numbers a block, and bytes a block.
KINDS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# All types of ggml by their number, so that a type that is not read is refused by its name.
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
QUANTIZATION_VERSION = 2  # of ggml's blocks: the first had others under the same names
DEQUANTIZED = 2**20  # bytes of float32 that are made of blocks at a time


class Entry(NamedTuple):
    """Where one tensor lies: ``shape`` in torch's order, ``offset`` in bytes from the start of the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """One GGUF file of version 2 or 3, little-endian, its header checked in full when it is opened.

    ``fields``: the key-values as Python's int, float, bool, str and list of str; arrays of numbers and of bools as
    numpy arrays. A float32 is the shortest decimal that float32 rounds to it: 1e-05, not 9.999999747378752e-06.

    Raises WeightsError, one line, for anything but a regular file whose header is valid and whose tensors fill its
    bytes, one after another.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise self._bad("no such file", "check the path")
        with open_at(self.path, self._bad, own=False) as file:
            self.fields, self.entries = self._parse(_Header(file, self._bad))

    def _bad(self, found: str, mend: str = "the file is damaged, download or export it again") -> WeightsError:
        return WeightsError(f"{self.path}: {found}: {mend}")

    # --- Header -------------------------------------------------------------------------------------------------------

    def _parse(self, header: _Header) -> tuple[dict[str, Any], dict[str, Entry]]:
        tensors, count = self._start(header)
        fields: dict[str, Any] = {}
        for number in range(count):
            key = header.string(f"key {number + 1}", MAX_KEY)
            if not key or not key.isascii() or not key.isprintable():
                raise self._bad(f"key {number + 1} is {show(key)}, expected printable ASCII")
            if key in fields:
                raise self._bad(f"key {show(key)} is given twice", "keep one of them")
            fields[key] = self._value(header, key)
        alignment = fields.get(ALIGNMENT, 32)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self._bad(f"{ALIGNMENT} = {show(alignment)}, expected a power of two from 8 to 1,048,576")
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for number in range(tensors):
            name = header.string(f"the name of tensor {number + 1}", MAX_NAME)
            if name in found:
                raise self._bad(f"tensor {show(name)} is given twice")
            found[name] = self._tensor(header, name)
        entries = self._places(header, found, alignment)
        self._check_kinds(fields, entries)
        return fields, entries

    def _start(self, header: _Header) -> tuple[int, int]:
        """The numbers of tensors and of key-values, once the file is of a kind that is read."""
        magic = header.take(min(8, header.size), "the start")
        if magic[:4] != MAGIC:
            if magic.startswith(b"version "):
                raise self._bad("is a Git LFS pointer, not the weights", "run `git lfs pull` in its repository")
            raise self._bad(f"is no GGUF file (it begins with {magic[:4]!r})", "expected one that begins with GGUF")
        version = int.from_bytes(magic[4:], "little")
        if len(magic) == 8 and 1 <= version >> 24 <= max(VERSIONS) and not version & 0xFFFFFF:
            raise self._bad("is big-endian, which is not supported", "convert it with gguf-convert-endian")
        if len(magic) == 8 and version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise self._bad(f"has version {version}, supported are {known}", "convert the model again")
        tensors, count = header.number("<Q", "the number of tensors"), header.number("<Q", "the number of keys")
        # The least bytes that each takes: of a key-value 8 + 1 + 4 + 1, of a tensor 8 + 4 + 8 + 4 + 8.
        for what, claimed, limit, least in (("tensors", tensors, MAX_TENSORS, 32), ("keys", count, MAX_FIELDS, 14)):
            if claimed > limit or claimed * least > header.left:
                raise self._bad(f"claims {claimed:,} {what}, at most {min(limit, header.left // least):,} are possible")
        return tensors, count

    def _value(self, header: _Header, key: str) -> Any:
        kind = header.number("<I", key)
        if kind == _STRING:
            return header.string(key, MAX_HEADER)
        if kind != _ARRAY:
            value = header.number(self._scalar(kind, key)[0], key)
            if kind == _FLOAT32:
                return float(str(np.float32(value)))
            if kind == _BOOL and value > 1:
                raise self._bad(f"{key} is a bool but holds {value}, expected 0 or 1")
            return bool(value) if kind == _BOOL else value
        kind, count = header.number("<I", key), header.number("<Q", key)
        if kind == _ARRAY:
            raise self._bad(f"{key} is an array of arrays, which is not supported", "remove the key")
        if kind == _STRING:
            return header.strings(count, key)
        dtype = np.dtype(self._scalar(kind, key)[1])
        values = np.frombuffer(header.take(count * dtype.itemsize, key), dtype=dtype)
        if kind == _BOOL:
            if count and values.max() > 1:
                raise self._bad(f"{key} is an array of bools but holds {values.max()}, expected 0 and 1")
            return values.view(np.bool_)
        return values

    def _scalar(self, kind: int, key: str) -> tuple[str, str]:
        if kind not in _SCALARS:
            raise self._bad(f"{key} has the unknown type {kind}, expected 0 to 12")
        return _SCALARS[kind]

    def _tensor(self, header: _Header, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """Type, shape, offset from where the data begin, and size in bytes."""
        where = f"tensor {show(name)}"
        dims = header.number("<I", where)
        if not 1 <= dims <= MAX_DIMS:
            raise self._bad(f"{where} has {dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(header.number("<Q", where) for _ in range(dims))[::-1]
        number, offset = header.number("<I", where), header.number("<Q", where)
        kind = _TYPES.get(number)
        if kind not in KINDS:
            what = f"the unknown type {number}" if kind is None else f"the type {kind}, which is not supported"
            raise self._bad(f"{where} has {what}", f"use a file in {', '.join(KINDS)}")
        block, size = KINDS[kind]
        if 0 in shape or math.prod(shape) >= 2**62:
            raise self._bad(f"{where} has the impossible shape {shape}")
        if shape[-1] % block:
            raise self._bad(f"{where} is {kind} with rows of {shape[-1]}, expected a multiple of {block}")
        return kind, shape, offset, math.prod(shape) // block * size

    def _places(
        self, header: _Header, found: dict[str, tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, Entry]:
        """The tensors where they lie, once they are known to fill the rest of the file."""
        start = -(-header.position // alignment) * alignment
        end = 0
        for name, (_, _, offset, size) in sorted(found.items(), key=lambda item: item[1][2]):
            expected = -(-end // alignment) * alignment
            if offset != expected:
                problem = "leaves a hole before it" if offset > expected else "overlaps the tensor before it"
                problem = "is not aligned" if offset % alignment else problem
                raise self._bad(f"tensor {show(name)} {problem}: it begins at byte {offset:,}, expected {expected:,}")
            end = offset + size
            if start + end > header.size:
                told = f"{header.size:,} bytes where tensor {show(name)} ends at {start + end:,}"
                raise self._bad(f"is truncated: {told}")
        last = -(-end // alignment) * alignment
        if header.size > start + last:  # the padding of the last tensor may be there or not
            raise self._bad(f"has trailing bytes: {header.size:,} where its tensors end at {start + end:,}")
        return {name: Entry(kind, shape, start + offset, size) for name, (kind, shape, offset, size) in found.items()}

    def _check_kinds(self, fields: dict[str, Any], entries: dict[str, Entry]) -> None:
        """What the file says of its quantisation may not contradict its tensors."""
        quantized = next((name for name, entry in entries.items() if entry.kind not in PLAIN), None)
        version = fields.get("general.quantization_version", QUANTIZATION_VERSION)
        if quantized is not None and (type(version) is not int or version != QUANTIZATION_VERSION):
            found = f"general.quantization_version = {show(version)}, expected {QUANTIZATION_VERSION}"
            raise self._bad(f"{found}, since tensor {show(quantized)} is {entries[quantized].kind}", "quantise it anew")
        other = next((name for name, entry in entries.items() if entry.kind != "F32"), None)
        said = fields.get("general.file_type")
        if type(said) is int and said == 0 and other is not None:  # of the other types only "mostly" is said
            found = f"general.file_type = 0 says that all is F32, but tensor {show(other)} is {entries[other].kind}"
            raise self._bad(found, "correct the one that is wrong")

    # --- Tensors ------------------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise self._bad(f"holds no tensor {show(name)}{nearest(name, self.entries)}", "check the name")
        return self.entries[name]

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in torch's order: the reverse of the file's."""
        return self._entry(name).shape

    def kind(self, name: str) -> str:
        """Return the type of a tensor in the file: "F32", "Q4_1", ..."""
        return self._entry(name).kind

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is read in: its own, or float32 where it is quantised."""
        return PLAIN.get(self._entry(name).kind, torch.float32)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or consecutive rows of it (first dimension), on the CPU; NaN and Inf pass."""
        count, *inner = self.shape(name)
        first, last = (0, count) if rows is None else consecutive(rows, count)
        out = torch.empty(last - first, *inner, dtype=self.dtype(name))
        self.read_into(name, out, rows=rows, finite=False)
        return out

    def read_into(
        self,
        name: str,
        out: Tensor,
        *,
        rows: slice | None = None,
        transpose: bool = False,
        finite: bool = True,
        add: float = 0.0,
    ) -> None:
        """Fill ``out`` with a tensor, or with ``rows`` of it, as :func:`stream` says.

        Quantised values are float32. ``add`` is added to every value, in :meth:`dtype`. Raises WeightsError, and
        ConfigError where the tensor is quantised and the `gguf` package is not installed.
        """
        kind, shape, offset, _ = self._entry(name)
        block, size = KINDS[kind]
        if rows is not None:
            first, last = consecutive(rows, shape[0])
            before = first * math.prod(shape[1:])
            if before % block:
                raise ValueError(f"rows of {name} must begin with a block of {block} numbers, got {rows}")
            offset += before // block * size
            shape = (last - first, *shape[1:])
        decode = None if kind in PLAIN else _dequantizer(kind)
        with open_at(self.path, self._bad, offset, own=False) as file:

            def read(target: Tensor) -> None:
                if decode is None:
                    read_bytes(file, as_bytes(target), self._bad)
                else:
                    raw = np.empty((1, target.numel() // block * size), dtype=np.uint8)
                    read_bytes(file, raw.reshape(-1), self._bad)
                    target.view(-1).copy_(torch.from_numpy(decode(raw)).view(-1))
                if add:
                    target.add_(add)

            stream(
                out,
                read,
                name=name,
                shape=shape,
                dtype=self.dtype(name),
                transpose=transpose,
                finite=finite,
                bad=self._bad,
                limit=PIECE if decode is None else DEQUANTIZED,
            )

    def stored(self, name: str, limit: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of a tensor as they lie in the file, at most ``limit`` at a time, all in one buffer."""
        _, _, offset, nbytes = self._entry(name)
        with open_at(self.path, self._bad, offset, own=False) as file:
            yield from stored_bytes(file, nbytes, self._bad, limit)


def _dequantizer(kind: str) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """The `gguf` package's own way from blocks to float32."""
    gguf = gguf_package()
    number = gguf.GGMLQuantizationType[kind]

    def decode(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with np.errstate(all="ignore"):  # a damaged scale gives Inf or NaN, which is found and named
            values: np.ndarray[Any, Any] = gguf.quants.dequantize(raw, number)
        return values

    return decode


def gguf_package() -> Any:
    """The `gguf` package. Raises ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError:
        mend = "pip install 'afina[gguf]'"
        raise ConfigError(f"gguf: the package that writes and reads the format is not installed: {mend}") from None
    return gguf


class _Header:
    """The front of a file, read as it is needed; no length is believed before so many bytes have been read."""

    def __init__(self, file: FileIO, bad: Bad) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self._file, self._bad = file, bad
        self._buffer = bytearray()
        self._strings = 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes; ``what`` they are of."""
        start = self.position
        self._need(count, what)
        self.position = start + count
        return bytes(self._buffer[start : start + count])

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str, limit: int) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise self._bad(f"{what} is a text of {length:,} bytes, at most {limit:,} are allowed")
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as problem:
            raise self._bad(f"{what}: byte {problem.start} of a text is not UTF-8") from problem

    def strings(self, count: int, what: str) -> list[str]:
        """An array of texts: the one place where there are so many that a call for each would take long."""
        self._strings += count
        if count * 8 > self.left or self._strings > MAX_STRINGS:
            most = min(self.left // 8, MAX_STRINGS)
            raise self._bad(f"{what} is an array of {count:,} texts, at most {most:,} are possible")
        found: list[str] = []
        buffer, unpack = self._buffer, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.position + 8 > len(buffer):
                self._need(8, what)
            start = self.position + 8
            end = start + unpack(buffer, self.position)[0]
            if end > len(buffer):
                self._need(end - self.position, what)
            try:
                found.append(buffer[start:end].decode())
            except UnicodeDecodeError as problem:
                raise self._bad(f"{what}: byte {problem.start} of text {len(found)} is not UTF-8") from problem
            self.position = end
        return found

    def _need(self, count: int, what: str) -> None:
        """Have so many bytes from the present position on in the buffer."""
        end = self.position + count
        if end > self.size:
            raise self._bad(f"is truncated: {what} needs {count:,} bytes where {self.left:,} are left")
        if end > MAX_HEADER:
            raise self._bad(f"has a header of more than {MAX_HEADER:,} bytes, the most allowed (at {what})")
        if (missing := end - len(self._buffer)) > 0:
            # Not more than the file has when it was opened, nor than the header may have.
            ahead = min(max(missing, CHUNK), self.size - len(self._buffer))
            piece = bytearray(ahead)
            read_bytes(self._file, piece, self._bad)
            self._buffer += piece
