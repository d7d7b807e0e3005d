"""Tokens on disk: every file of rows is tokenised once, into flat arrays that are mapped into memory.

A cache folder is named after the SHA-256 of all that decides its content. It is built under another name and put in
place when complete (`afina/durable.py`), so that several processes may build the same one.

Nothing in it is believed. Its manifest opens with the SHA-256 of the rest of itself, and holds the SHA-256 of each
array; how an array is laid out is said by this file and not by the manifest. A folder or a file of another user, or one
that others may write to, is not read. Each file is opened once, checked, and mapped by the same descriptor. A build
holds a lock on its working folder, so that those whose build was killed are known by it and swept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from afina.durable import WORKING_NAME, put, remove, working_folder
from afina.errors import DataError

MANIFEST, FORMAT = "manifest.json", "afina-tokens-2"
MAX_MANIFEST = 64 << 20
# One value a token.
TOKENS = {"ids": "<u4", "loss_mask": "|b1"}
# One value a row: where its tokens start, how many they are, how many have a loss, the file and line it was read from,
# the number of the row of the file that it is part of, and that row's digest.
ROWS = {"start": "<i8", "length": "<i4", "loss_tokens": "<i4", "file": "<i4", "line": "<i8", "unit": "<i8"}
ROWS |= {"digest": "|S16"}
COLUMNS = TOKENS | ROWS
OLD_WORKING_NAME = ".building-"  # how earlier versions began the name of a folder in which they built


class CacheError(DataError):
    """The cache on the disk cannot be used: it cannot be written, or it is somebody else's."""


class TokenCache:
    """Tokens and what is known of their rows: arrays, as attributes named like COLUMNS, and a ``report`` (JSON values).

    ``key``: what the folder is named after, where there is one.
    """

    ids: NDArray[Any]
    loss_mask: NDArray[np.bool_]
    start: NDArray[np.int64]
    length: NDArray[np.int32]
    loss_tokens: NDArray[np.int32]
    file: NDArray[np.int32]
    line: NDArray[np.int64]
    unit: NDArray[np.int64]
    digest: NDArray[np.bytes_]

    def __init__(self, files: Mapping[str, BinaryIO], vocab_size: int, report: dict[str, Any]) -> None:
        """Map the open ``files`` of all columns, which may be closed afterwards."""
        self.report, self.key = report, ""
        for name, kind in layout(vocab_size).items():
            file = files[name]
            # An empty file cannot be mapped.
            empty = os.fstat(file.fileno()).st_size == 0
            setattr(self, name, np.empty(0, kind) if empty else np.memmap(file, dtype=kind, mode="r"))


def layout(vocab_size: int) -> dict[str, str]:
    """The dtype of each column: ids take two bytes where the vocabulary allows it."""
    return COLUMNS | ({"ids": "<u2"} if vocab_size <= 1 << 16 else {})


def open_cache(folder: Path, vocab_size: int) -> TokenCache | None:
    """Return the cache in ``folder``, or None when there is none or it is damaged. Raises CacheError where it is
    another user's."""
    try:
        owner = os.lstat(folder).st_uid
        if owner != os.geteuid():
            mend = "set AFINA_CACHE to a folder of your own"
            raise CacheError(f"{folder}: belongs to another user ({owner}), whose tokens are not trusted: {mend}")
        with contextlib.ExitStack() as stack:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            manifest = stack.enter_context(_own_file(handle, MANIFEST))
            content = _content(manifest.read(MAX_MANIFEST))
            if (content["format"], content["key"]) != (FORMAT, folder.name):
                raise ValueError("a manifest of something else")
            files = {name: stack.enter_context(_own_file(handle, f"{name}.bin")) for name in COLUMNS}
            for name, file in files.items():
                if hashlib.file_digest(file, "sha256").hexdigest() != content["sha256"][name]:
                    raise ValueError(f"{name}: not what was written")
            return TokenCache(files, vocab_size, content["report"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def sweep(parent: Path) -> None:
    """Remove what killed builds left in a folder of caches: working folders of this user whose lock nobody holds."""
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            if WORKING_NAME.fullmatch(path.name) or path.name.startswith(OLD_WORKING_NAME):
                with contextlib.suppress(OSError):
                    _sweep(path)


def _sweep(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
    finally:
        os.close(handle)


class Writer:
    """Context in which a cache folder is built; ``commit`` puts it in its place, leaving without it removes it.

    ``folder``: None for a cache of this process alone, in files that have no name and go with it.
    Raises CacheError, from the first to the last, for what the disk refuses.
    """

    def __init__(self, folder: Path | None, vocab_size: int) -> None:
        self.folder, self.vocab_size = folder, vocab_size
        self.layout = layout(vocab_size)
        self.sums = {name: hashlib.sha256() for name in COLUMNS}
        self.files: dict[str, BinaryIO] = {}
        self.temporary: Path | None = None
        self._lock = -1

    def __enter__(self) -> Writer:
        try:
            with self._disk():
                if self.folder is not None:
                    self.folder.parent.mkdir(parents=True, exist_ok=True)
                    self._make_folder(self.folder)
                for name in COLUMNS:
                    self.files[name] = self._new_file(f"{name}.bin")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk refuses the rest of a buffer once more
                file.close()
        if self.temporary is not None:
            with contextlib.suppress(OSError):
                remove(self.temporary)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def append(self, columns: Mapping[str, Any]) -> None:
        """Add values to each column."""
        with self._disk():
            for name, values in columns.items():
                data = np.ascontiguousarray(values, dtype=self.layout[name]).data.cast("B")
                self.sums[name].update(data)
                self.files[name].write(data)

    def commit(self, report: Mapping[str, Any]) -> TokenCache:
        """Publish the folder. Where another process was faster, its folder is the one returned."""
        kept: dict[str, Any] = json.loads(json.dumps(report))
        with self._disk():
            for file in self.files.values():
                file.flush()
            cache = TokenCache(self.files, self.vocab_size, kept)
            if self.folder is None or self.temporary is None:
                return cache
            sums = {name: digest.hexdigest() for name, digest in self.sums.items()}
            content = {"format": FORMAT, "key": self.folder.name, "sha256": sums, "report": kept}
            text = json.dumps(content).encode()
            with self._new_file(MANIFEST) as manifest:
                manifest.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
            while True:
                try:
                    put(self.temporary, self.folder, replace=False)
                    return cache
                except OSError as problem:
                    if problem.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                if (other := open_cache(self.folder, self.vocab_size)) is not None:
                    return other
                with contextlib.suppress(FileNotFoundError):  # damaged; another process may have removed it
                    remove(self.folder)

    def _make_folder(self, folder: Path) -> None:
        """Make a working folder for this user alone, and hold its lock."""
        while True:
            working = working_folder(folder, mode=0o700)
            with contextlib.suppress(FileNotFoundError):  # swept by another process before the lock was taken
                self._lock = os.open(working, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with contextlib.suppress(OSError):  # a file system without locks, where nothing is swept either
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                working.lstat()
                self.temporary = working
                return
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def _new_file(self, name: str) -> BinaryIO:
        if self.temporary is None:
            return tempfile.TemporaryFile(prefix="afina-tokens-")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return os.fdopen(os.open(self.temporary / name, flags, 0o600), "w+b")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn what the disk refuses into a CacheError."""
        try:
            yield
        except OSError as problem:
            place = tempfile.gettempdir() if self.folder is None else self.folder.parent
            reason, mend = problem.strerror or problem, "free some space, or set AFINA_CACHE to another folder"
            raise CacheError(f"{place}: the token cache cannot be written ({reason}): {mend}") from problem


@contextlib.contextmanager
def _own_file(folder: int, name: str) -> Iterator[BufferedReader]:
    """Open a file of an open folder, which must be a regular one that this user alone may write to."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise ValueError(f"{name}: not this user's own")
        yield file


def _content(raw: bytes) -> dict[str, Any]:
    """What a manifest holds. Raises ValueError where it is not as it was written, to the bit."""
    if raw[:65] != hashlib.sha256(raw[65:]).hexdigest().encode() + b"\n":
        raise ValueError("a damaged manifest")
    content = json.loads(raw[65:])
    if not isinstance(content, dict):
        raise ValueError("a manifest of something else")
    return content
