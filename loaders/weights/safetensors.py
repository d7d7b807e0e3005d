"""Safetensors both ways: no pickle, no mmap, and never a second copy of the model.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length; a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}; then the bytes of the tensors,
row-major, one after another without holes. A folder holds `model.safetensors`, or shards with
`model.safetensors.index.json`, whose "weight_map" says which shard holds which tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from afina.durable import open_file
from afina.errors import WeightsError, nearest
from afina.inside import own_path
from afina.loaders.jsonfile import parse_json, read_json, show
from afina.loaders.weights.stream import (
    PIECE,
    SAMPLE,
    as_bytes,
    consecutive,
    open_at,
    pieces,
    read_bytes,
    stored_bytes,
    stream,
)

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 100_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# In the order in which the format's own library lays tensors out: wide first, so that all stay aligned.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}


class Entry(NamedTuple):
    """Where one tensor lies: ``offset`` counts bytes from the start of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Later(NamedTuple):
    """A tensor to be written that exists only while it is: ``make`` returns it, with this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    layout: torch.layout = torch.strided

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One safetensors file, its header checked in full before anything is read or allocated.

    Raises WeightsError for anything but a regular file whose header is valid and whose tensors tile its bytes exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_at(self.path, self._bad) as file:
            self.entries, self.metadata = self._parse(file)

    def _bad(self, found: str, mend: str = "the file is damaged, download or save it again") -> WeightsError:
        return WeightsError(f"{self.path}: {found}: {mend}")

    def _parse(self, file: FileIO) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start == b"version ":
            raise self._bad("is a Git LFS pointer, not the weights", "run `git lfs pull` in its repository")
        if start[:4] == b"PK\x03\x04":
            raise self._bad("is a zip archive (a renamed pickle?), not safetensors", "convert the model to safetensors")
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length > MAX_HEADER:
            raise self._bad(f"announces a header of {length:,} bytes, more than the {MAX_HEADER:,} allowed")
        if size < 8 + length:
            raise self._bad(f"is truncated: {size:,} bytes where its header alone ends at {8 + length:,}")
        raw = file.read(length)
        # Counted, not parsed: a tensor has one "{" and fewer than ten ","; parsing more values takes too long.
        objects = raw.count(b"{") - 1 - (b'"__metadata__"' in raw)
        if max(objects, raw.count(b",") // 10) > MAX_TENSORS:
            raise self._bad(f"its header has the size of more than {MAX_TENSORS:,} tensors, the most allowed")
        header = parse_json(raw, f"{self.path}: header", error=WeightsError)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._bad('"__metadata__" in the header is not a map of strings')

        entries = {}
        spans = []
        for name, value in header.items():
            dtype, shape, begin, end = self._entry(name, value)
            entries[name] = Entry(dtype, shape, 8 + length + begin)
            spans.append((begin, end, name))
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
                raise self._bad(f"tensor {show(name)} {what}: it begins at byte {begin:,}, expected {position:,}")
            position = end
        if size != 8 + length + position:
            what = "is truncated" if size < 8 + length + position else "has trailing bytes"
            raise self._bad(f"{what}: {size:,} bytes where its header describes {8 + length + position:,}")
        return entries, metadata

    def _entry(self, name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"tensor {show(name)} is {show(value)} in the header, expected dtype, shape, data_offsets")
        kind, shape, span = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            mend = f"expected one of {', '.join(DTYPES)}; load an unquantised version of the model"
            raise self._bad(f"tensor {show(name)} has the unknown dtype {show(kind)}", mend)
        for field, limit in (shape, 64), (span, 2):  # 64: torch's own limit on dimensions
            if not isinstance(field, list) or len(field) > limit or any(type(n) is not int or n < 0 for n in field):
                raise self._bad(f"tensor {show(name)}: {show(field)} is no list of at most {limit} whole numbers")
        dtype = DTYPES[kind]
        if len(span) != 2 or max((*shape, *span)) >= 2**63 or span[1] - span[0] != math.prod(shape) * dtype.itemsize:
            raise self._bad(f"tensor {show(name)} {kind} {show(shape)} does not fill its data_offsets {show(span)}")
        return dtype, tuple(shape), span[0], span[1]

    def read_into(
        self, name: str, out: Tensor, *, rows: slice | None = None, transpose: bool = False, finite: bool = True
    ) -> None:
        """Fill ``out`` with a tensor of the file. See :meth:`Checkpoint.read_into`; ``finite``: refuse NaN and Inf."""
        dtype, shape, offset = self.entries[name]
        if rows is not None:
            first, last = consecutive(rows, shape[0])
            offset += first * math.prod(shape[1:]) * dtype.itemsize
            shape = (last - first, *shape[1:])
        with open_at(self.path, self._bad, offset) as file:
            stream(
                out,
                lambda target: read_bytes(file, as_bytes(target), self._bad),
                name=name,
                shape=shape,
                dtype=dtype,
                transpose=transpose,
                finite=finite,
                bad=self._bad,
                limit=PIECE,
            )

    def stored(self, name: str, limit: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of a tensor as they lie in the file, at most ``limit`` at a time, all in one buffer."""
        dtype, shape, offset = self.entries[name]
        with open_at(self.path, self._bad, offset) as file:
            yield from stored_bytes(file, math.prod(shape) * dtype.itemsize, self._bad, limit)


class SafetensorsFolder:
    """The weights of a model folder, one file or sharded, checked from their headers when it is opened.

    A shard must lie in the folder itself; `afina/inside.py` says which links are followed.
    ``allow_nonfinite``: read NaN and Inf instead of refusing them. Raises WeightsError.
    """

    config_name = "config.json"

    def __init__(self, folder: Path, *, allow_nonfinite: bool = False) -> None:
        self.path = Path(folder)
        self._finite = not allow_nonfinite
        self._home: dict[str, SafetensorsFile] = {}
        if os.path.lexists(self.path / SINGLE):
            file = SafetensorsFile(_inside(self.path, SINGLE))
            self._home = dict.fromkeys(file.entries, file)
        elif os.path.lexists(self.path / INDEX):
            self._open_shards(self.path / INDEX)
        else:
            raise WeightsError(_nothing_found(self.path))

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json(index, error=WeightsError, max_bytes=MAX_HEADER).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(f'{index}: has no "weight_map" from tensor names to shards: download it again')
        if len(weight_map) > MAX_TENSORS:
            raise WeightsError(f"{index}: names {len(weight_map):,} tensors, at most {MAX_TENSORS:,} are allowed")
        if wrong := [name for name, shard in weight_map.items() if not isinstance(shard, str)]:
            raise WeightsError(f'{index}: "weight_map" gives no file name for {show(wrong[0])}: download it again')
        for shard in sorted(set(weight_map.values())):
            file = SafetensorsFile(_inside(self.path, shard, index))
            for name in file.entries:
                if (place := weight_map.get(name)) != shard:
                    says = "does not list" if place is None else f"places in {show(place)}"
                    mend = "each tensor must be in one shard, download the model again"
                    raise WeightsError(f"{file.path}: holds tensor {show(name)}, which {INDEX} {says}: {mend}")
                self._home[name] = file
        if absent := [name for name in weight_map if name not in self._home]:
            where = f"{show(absent[0])} in {weight_map[absent[0]]}"
            more = f" ({len(absent)} such tensors)" if len(absent) > 1 else ""
            raise WeightsError(f"{index}: places {where}, which does not hold it{more}: download the model again")

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._home:
            raise WeightsError(f"{self.path}: holds no tensor {name!r}{nearest(name, self._home)}")
        return self._home[name]

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._home)

    def spelling(self, name: str) -> str:
        """Return the file's own name of a tensor: the same."""
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as the file stores it."""
        return self._file(name).entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor as the file stores it."""
        return self._file(name).entries[name].dtype

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in the file's shape and dtype."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor, *, rows: slice | None = None, transpose: bool = False) -> None:
        """Fill ``out``, which may be any view on any device, with a tensor, using one buffer of at most PIECE bytes.

        ``rows``: only these rows (first dimension) of the tensor in the file. ``transpose``: ``out`` (C, R) receives
        the transpose of the file's (R, C). Otherwise ``out`` has the shape of what is read, or the same with its first
        dimension split in several: file (6, C) -> ``out`` (2, 3, C). Floating point converts to ``out.dtype``; other
        dtypes must be equal. Raises WeightsError for another shape or dtype, for NaN or Inf, and for values that
        overflow ``out.dtype`` (unless ``allow_nonfinite``).
        """
        self._file(name).read_into(name, out, rows=rows, transpose=transpose, finite=self._finite)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of all names, dtypes, shapes and bytes, the same however they are sharded."""
        digest = hashlib.sha256()
        for name in self.names():
            file = self._file(name)
            dtype, shape, _ = file.entries[name]
            digest.update(json.dumps([name, _NAMES[dtype], shape]).encode())
            for piece in file.stored(name):
                digest.update(piece)
        return digest.hexdigest()

    def sample(self) -> str:
        """Return the SHA-256 (hex) of all names, dtypes and shapes, and of the first SAMPLE bytes of each tensor: quick
        to know, and even another fine-tuning of the same model has another."""
        digest = hashlib.sha256()
        for name in self.names():
            file = self._file(name)
            dtype, shape, _ = file.entries[name]
            digest.update(json.dumps([name, _NAMES[dtype], shape]).encode())
            digest.update(next(file.stored(name, SAMPLE), b""))
        return digest.hexdigest()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of one file, on the CPU; NaN and Inf pass. Raises WeightsError when it is damaged."""
    file = SafetensorsFile(Path(path))
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, _) in file.entries.items()}
    for name, out in tensors.items():
        file.read_into(name, out, finite=False)
    return tensors


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Later], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file as the safetensors library would, byte for byte, streaming each tensor, whatever its strides.

    The file appears under its name only when it is complete and on the disk. Raises WeightsError when it cannot be
    written, ValueError for a tensor that the format cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, x in tensors.items():
        if name == "__metadata__" or x.dtype not in _ORDER or x.layout != torch.strided:
            raise ValueError(f"tensors[{name!r}]: safetensors cannot hold this name or {x.dtype} {x.layout}")
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0]))
    position = 0
    for name, x in ordered:
        end = position + x.nbytes
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data begin at a multiple of 8
    if len(raw) > MAX_HEADER or len(tensors) > MAX_TENSORS:
        raise WeightsError(f"{path}: {len(tensors):,} tensors, header {len(raw):,} bytes: too many for one file")
    with open_file(Path(path), error=WeightsError) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, x in ordered:
            _write(file, x.make() if isinstance(x, Later) else x)


def save_tensors(
    tensors: Iterable[tuple[str, Tensor | Later]], folder: Path, *, max_shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write the weights of a model folder and return the files: one, or numbered shards and their index.

    Shards are filled in the given order. Weights of an earlier save in the folder are replaced. Raises WeightsError
    when something cannot be written, ValueError for a name given twice.
    """
    folder = Path(folder)
    shards: list[dict[str, Tensor | Later]] = [{}]
    used = total = 0
    seen: set[str] = set()
    for name, x in tensors:
        if name in seen:
            raise ValueError(f"tensors: {name!r} is given twice")
        seen.add(name)
        size = x.nbytes
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = x
        used += size
        total += size

    files = [folder / f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [folder / SINGLE]
    for path, shard in zip(files, shards):
        write_safetensors(path, shard, {"format": "pt"})
    if len(shards) > 1:
        places = {name: path.name for path, shard in zip(files, shards) for name in sorted(shard)}
        files.append(folder / INDEX)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with open_file(files[-1], error=WeightsError) as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")
    stale = {folder / SINGLE, folder / INDEX, *folder.glob("model-[0-9]*-of-[0-9]*.safetensors")}
    for path in stale - set(files):
        path.unlink(missing_ok=True)
    return files


def _write(file: BinaryIO, x: Tensor) -> None:
    for piece in pieces(x.detach(), PIECE // x.itemsize):
        file.write(as_bytes(piece.cpu().contiguous()))


def _inside(folder: Path, name: str, index: Path | None = None) -> Path:
    """Return the path of a weights file, which must be a file of the folder."""
    place = f"{index}: " if index else ""
    if (
        len(name.encode()) > 255
        or name != Path(name).name
        or "\\" in name
        or not name.isprintable()
        or not name.endswith(".safetensors")
    ):
        raise WeightsError(f"{place}{show(name)} is no plain .safetensors file name: shards lie beside their index")
    if not own_path(folder / name, error=WeightsError).is_file():
        raise WeightsError(f"{place}{folder / name}: no such file: download the model again, all shards included")
    return folder / name


def _nothing_found(folder: Path) -> str:
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if others := [name for name in names if name.endswith(".safetensors")]:
        mend = "download the index too" if len(others) > 1 else f"rename it {SINGLE} if it holds the whole model"
        return f"{folder}: holds {', '.join(others[:3])} but neither {SINGLE} nor {INDEX}: {mend}"
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        convert = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted')"
        return (
            f"{folder}: the weights are pickles ({', '.join(pickles[:3])}), which can run code and are never opened: "
            f"convert them once with transformers: {convert}"
        )
    found = ", ".join(names[:8]) or "nothing"
    mend = "download it, or if its repository has only .bin files, convert them to safetensors"
    return f"{folder}: no {SINGLE} and no {INDEX} (found {found}): {mend}"
