"""Tokens on disk: every file of rows is tokenised once, into flat arrays that are mapped into memory.

A cache folder is named after the SHA-256 of all that decides its content. It is built under another name and put in
place when complete (`afina/durable.py`), so that several processes may build the same one, and its manifest holds each
array's size and checksum.
"""

from __future__ import annotations

import contextlib
import errno
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afina.durable import put, remove, working_folder
from afina.errors import DataError

MANIFEST = "manifest.json"
# One value a token.
TOKENS = {"ids": "<u4", "loss_mask": "|b1"}
# One value a row: where its tokens start, how many they are, how many have a loss, the file and line it was read from,
# the number of the row of the file that it is part of, and that row's digest.
ROWS = {"start": "<i8", "length": "<i4", "loss_tokens": "<i4", "file": "<i4", "line": "<i8", "unit": "<i8"}
ROWS |= {"digest": "|S16"}
COLUMNS = TOKENS | ROWS


class TokenCache:
    """The arrays of a complete cache folder, as attributes named like COLUMNS, and its ``report``."""

    ids: NDArray[Any]
    loss_mask: NDArray[np.bool_]
    start: NDArray[np.int64]
    length: NDArray[np.int32]
    loss_tokens: NDArray[np.int32]
    file: NDArray[np.int32]
    line: NDArray[np.int64]
    unit: NDArray[np.int64]
    digest: NDArray[np.bytes_]

    def __init__(self, folder: Path) -> None:
        """Raises ValueError or OSError when the folder is incomplete or damaged."""
        manifest = json.loads((folder / MANIFEST).read_text())
        self.folder, self.report = folder, manifest["report"]
        for name in COLUMNS:
            kind, size, checksum = manifest["columns"][name]
            path = folder / f"{name}.bin"
            if path.stat().st_size != size or _checksum(path) != checksum:
                raise ValueError(f"{path} is damaged")
            # An empty file cannot be mapped.
            array = np.memmap(path, dtype=kind, mode="r") if size else np.empty(0, kind)
            setattr(self, name, array)


def open_cache(folder: Path) -> TokenCache | None:
    """Return the cache in ``folder``, or None when there is none or it is damaged."""
    try:
        return TokenCache(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Writer:
    """Context in which a cache folder is built; ``commit`` puts it in its place, leaving without it removes it."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self.kinds = COLUMNS | ({"ids": "<u2"} if vocab_size <= 1 << 16 else {})
        self.sums = dict.fromkeys(COLUMNS, 0)

    def __enter__(self) -> Writer:
        with _disk(self.folder.parent):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = working_folder(self.folder)
            self.files = {name: (self.temporary / f"{name}.bin").open("wb") for name in COLUMNS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk refuses the rest of a buffer once more
                file.close()
        with contextlib.suppress(OSError):
            remove(self.temporary)

    def append(self, columns: Mapping[str, Any]) -> None:
        """Add values to each column."""
        with _disk(self.folder.parent):
            for name, values in columns.items():
                data = np.ascontiguousarray(values, dtype=self.kinds[name]).data.cast("B")
                self.sums[name] = zlib.crc32(data, self.sums[name])
                self.files[name].write(data)

    def commit(self, report: Mapping[str, Any]) -> TokenCache:
        """Publish the folder. Where another process was faster, its folder is the one returned."""
        with _disk(self.folder.parent):
            for file in self.files.values():
                file.close()
            sizes = {name: (self.temporary / f"{name}.bin").stat().st_size for name in COLUMNS}
            columns = {name: (self.kinds[name], sizes[name], self.sums[name]) for name in COLUMNS}
            (self.temporary / MANIFEST).write_text(json.dumps({"columns": columns, "report": report}))
            while True:
                try:
                    put(self.temporary, self.folder, replace=False)
                except OSError as problem:
                    if problem.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    if (cache := open_cache(self.folder)) is not None:
                        return cache
                    with contextlib.suppress(FileNotFoundError):  # damaged; another process may have removed it
                        remove(self.folder)
                else:
                    return TokenCache(self.folder)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a DataError."""
    try:
        yield
    except OSError as problem:
        mend = "free some space, or set AFINA_CACHE to another folder"
        raise DataError(f"{folder}: the token cache cannot be written ({problem.strerror}): {mend}") from problem


def _checksum(path: Path) -> int:
    result = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            result = zlib.crc32(chunk, result)
    return result
