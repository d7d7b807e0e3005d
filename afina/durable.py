"""Files and folders that are whole or absent: the one way in which anything that must survive a crash is written.

Whatever is written goes to a working name beside its place, its bytes and its folder's entries are forced to the disk,
and only then is it renamed into place and the rename forced to the disk too. A rename is atomic, so under its own name
a file or a folder is the old one or the new one, whole (Pillai et al., "All File Systems Are Not Created Equal", OSDI
2014).

A folder is replaced by exchanging the two in one step (Linux's renameat2), and removed under the working name of the
new one. Where the file system cannot do that, it is moved aside first, and readers look for it there (``standing``).

Working names: ``X.tmp-N`` is unfinished, or being removed; ``X.old-N`` is a folder that was moved aside. N is 64 random
bits, so that nobody can put a file or a link there before. A kill leaves them behind; ``recover`` clears them up in a
folder that nobody else writes to.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from afina.errors import AfinaError, RunError
from afina.inside import open_own

MAX_JSON_BYTES = 64 << 20
WORKING_NAME = re.compile(r"(.+)\.(tmp|old)-[0-9a-f]+")
REPLACING = ".replacing"  # in a run folder: all that a run wrote which is about to replace the one there
OLD = ".old"  # in REPLACING: of what lies beside REPLACING, nothing is the new run's yet
NOREPLACE, EXCHANGE = 1, 2  # flags of renameat2, linux/fs.h


def cache_folder() -> Path:
    """Where caches lie, which can be deleted at any time: AFINA_CACHE, else ~/.cache/afina. Raises RuntimeError where
    there is no home folder."""
    return Path(os.environ.get("AFINA_CACHE") or "~/.cache/afina").expanduser()


def read_json(path: Path, *, error: type[AfinaError] = RunError) -> dict[str, Any]:
    """Read a JSON object of bounded size from a file of its folder (`afina/inside.py`). Raises ``error``.

    Not as strict as `loaders/jsonfile.py`: a run's own files may hold the infinity that a dev loss starts from.
    """
    try:
        with open_own(path, error=error) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_JSON_BYTES:
                raise error(f"{path} is damaged: {size} bytes, expected at most {MAX_JSON_BYTES}")
            value = json.loads(file.read())
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is damaged: not JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: expected a JSON object, found {type(value).__name__}")
    return value


def remembered(name: str, key: Any) -> Any:
    """What ``remember`` noted under this name and key; None where that is nothing, or cannot be read."""
    with contextlib.suppress(AfinaError, RuntimeError):  # RuntimeError: no home folder
        held = read_json(_noted(name, key))
        if held.get("key") == json.loads(json.dumps(key)):
            return held.get("value")
    return None


def remember(name: str, key: Any, value: Any) -> None:
    """Note in the cache, for later processes, what was found out under ``key``: all that it depends on, as JSON. Where
    nothing can be written they find it out again."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _noted(name, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"key": key, "value": value}, indent=1) + "\n")


def _noted(name: str, key: Any) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{name}-{digest}.json"


def working_name(path: Path, kind: str = "tmp") -> Path:
    """A name beside ``path`` that nothing has and nobody can foresee."""
    return path.with_name(f"{path.name}.{kind}-{os.urandom(8).hex()}")


def working_folder(path: Path, *, mode: int = 0o777) -> Path:
    """Make a folder of a working name beside ``path``, and return it."""
    working = working_name(path)
    working.mkdir(mode)
    return working


def standing(path: Path) -> Path:
    """Where that lies now which has the name ``path`` when all is well: a crash may have left it on its way there."""
    replacing = path.parent / REPLACING
    if not replacing.is_symlink() and any(os.path.lexists(replacing / name) for name in (path.name, OLD)):
        return replacing / path.name
    if not os.path.lexists(path) and path.parent.is_dir():
        for entry in path.parent.iterdir():
            if (match := WORKING_NAME.fullmatch(entry.name)) and match.groups() == (path.name, "old"):
                return entry
    return path


@contextlib.contextmanager
def publish(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a free path beside ``path``, where the block makes a file or a folder; put it in place when it ends well.

    When it does not, or cannot be put in place, everything is as it was before. Raises what the block raises, OSError
    where something cannot be written, and FileExistsError where ``path`` exists and must not be replaced.
    """
    working = working_name(path)
    try:
        yield working
        put(working, path, replace=replace)
    finally:
        with contextlib.suppress(OSError):
            remove(working)


@contextlib.contextmanager
def open_file(path: Path, *, error: type[AfinaError] | None = None) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; the file changes only when the block ends well and its bytes are on the disk.

    What the disk refuses is raised as OSError, or as ``error`` with a line that says so.
    """
    try:
        with publish(path) as working, working.open("xb") as file:
            yield file
    except OSError as problem:
        if error is None:
            raise
        mend = "free space there or choose another folder"
        raise error(f"{path}: cannot be written ({problem.strerror}): {mend}") from problem


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, whole or not at all. Raises OSError."""
    with open_file(path) as file:
        file.write(text.encode())


def put(working: Path, path: Path, *, replace: bool = True) -> None:
    """Give a finished file or folder its name, in one piece and durably.

    Raises OSError with ``path`` as it was; FileExistsError where it exists and must not be replaced, IsADirectoryError
    for a file where a folder is.
    """
    sync(working)
    if not replace:
        if not _renameat2(working, path, NOREPLACE):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            working.rename(path)
        sync_entry(path.parent)
    elif working.is_dir() and (path.is_dir() or path.is_symlink()):
        _put_in_place_of(path, working)
    else:
        working.rename(path)
        sync_entry(path.parent)


def _put_in_place_of(path: Path, working: Path) -> None:
    """Give a finished folder the name of another one, or of a link, which is removed; where it fails, all is undone."""
    if _renameat2(working, path, EXCHANGE):
        try:
            sync_entry(path.parent)
        except BaseException:
            _renameat2(working, path, EXCHANGE)
            raise
        remove(working)  # the old one, since the exchange
        return
    aside = working_name(path, "old")
    try:
        path.rename(aside)
        working.rename(path)
        sync_entry(path.parent)
    except BaseException:
        if os.path.lexists(aside):
            if os.path.lexists(path):  # the new one, of which the disk may know nothing
                path.rename(working)
            aside.rename(path)
        raise
    remove(aside)


def _renameat2(one: Path, other: Path, flags: int) -> bool:
    """Rename in one step, as ``flags`` say; False where the system or the file system cannot. Raises OSError."""
    if (call := _call()) is None:
        return False
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as Python's own rename does, for those who watch
    if (error := call(one, other, flags)) in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    if error:
        raise OSError(error, os.strerror(error), str(one), None, str(other))
    return True


@functools.cache
def _call() -> Callable[[Path, Path, int], int] | None:
    """Linux's renameat2 as a function that returns the error's number; None on systems without it."""
    import ctypes

    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    here = -100  # AT_FDCWD: paths count from the working folder

    def call(one: Path, other: Path, flags: int) -> int:
        failed = function(here, os.fsencode(one), here, os.fsencode(other), flags)
        return ctypes.get_errno() if failed else 0

    return call


def sync(path: Path) -> None:
    """Force a file's bytes to the disk, or a folder's entries and all that lies in it."""
    if path.is_symlink():  # of ours none is one, and what another's leads to is not ours to open
        return
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    sync_entry(path)


def recover(folder: Path) -> None:
    """Finish or undo what a crash left in a folder: put back what had been moved aside, remove what is unfinished."""
    for path in sorted(folder.iterdir()):
        if match := WORKING_NAME.fullmatch(path.name):
            target = folder / match[1]
            if match[2] == "old" and not os.path.lexists(target):
                path.rename(target)
            else:
                remove(path)
    sync_entry(folder)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there, so that a crash leaves no half of it under its own name."""
    if path.is_dir() and not path.is_symlink():
        if not WORKING_NAME.fullmatch(path.name):
            path = path.rename(working_name(path))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_entry(path: Path) -> None:
    """Force a file's bytes to the disk, or a folder's entries, without what lies in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
