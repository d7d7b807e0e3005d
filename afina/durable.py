"""Files and folders that are whole or absent: the one way in which anything that must survive a crash is written.

Whatever is written goes to a working name beside its place, its bytes and its folder's entries are forced to the disk,
and only then is it renamed into place and the rename forced to the disk too. A rename is atomic, so under its own name
a file or a folder is the old one or the new one, whole (Pillai et al., "All File Systems Are Not Created Equal", OSDI
2014).

Working names: ``X.tmp-N`` is unfinished, or being removed; ``X.old-N`` is a folder that a replacement has moved aside,
since a rename does not replace a folder. N is the writer's process number, or the next number that is free. A kill
leaves them behind; ``recover`` clears them up in a folder that nobody else writes to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from afina.errors import AfinaError, RunError

MAX_JSON_BYTES = 64 << 20
WORKING_NAME = re.compile(r"(.+)\.(tmp|old)-[0-9]+")


def cache_folder() -> Path:
    """Where caches lie, which can be deleted at any time: AFINA_CACHE, else ~/.cache/afina. Raises RuntimeError where
    there is no home folder."""
    return Path(os.environ.get("AFINA_CACHE") or "~/.cache/afina").expanduser()


def read_json(path: Path, *, error: type[AfinaError] = RunError) -> dict[str, Any]:
    """Read a JSON object of bounded size. Raises ``error``.

    Not as strict as `loaders/jsonfile.py`: a run's own files may hold the infinity that a dev loss starts from.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise error(f"{path} is damaged: {size} bytes, expected at most {MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is damaged: not JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: expected a JSON object, found {type(value).__name__}")
    return value


_lock = threading.Lock()
_claimed: set[Path] = set()  # working names that threads of this process have taken, and may not have made yet


@contextlib.contextmanager
def _claim(path: Path, kind: str = "tmp") -> Iterator[Path]:
    """Hold a working name beside ``path`` that nothing has, and no other thread will have meanwhile."""
    with _lock:
        number = os.getpid()
        while (found := path.with_name(f"{path.name}.{kind}-{number}")) in _claimed or os.path.lexists(found):
            number += 1
        _claimed.add(found)
    try:
        yield found
    finally:
        with _lock:
            _claimed.discard(found)


def working_folder(path: Path) -> Path:
    """Make a folder of a working name beside ``path``, and return it."""
    while True:
        with contextlib.suppress(FileExistsError), _claim(path) as working:  # another process may take the name
            working.mkdir()
            return working


@contextlib.contextmanager
def publish(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a free path beside ``path``, where the block makes a file or a folder; put it in place when it ends well.

    When it does not, or cannot be put in place, everything is as it was before. Raises what the block raises, OSError
    where something cannot be written, and FileExistsError where ``path`` exists and must not be replaced.
    """
    with _claim(path) as working:
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
    if os.path.lexists(path) and not replace:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if not (path.is_dir() and working.is_dir()):
        working.rename(path)
        _sync_one(path.parent)
        return
    with _claim(path, "old") as aside:
        try:
            path.rename(aside)
            working.rename(path)
            _sync_one(path.parent)
        except BaseException:
            if os.path.lexists(aside):
                if path.exists():  # the new one, of which the disk may know nothing
                    path.rename(working)
                aside.rename(path)
            raise
        remove(aside)


def sync(path: Path) -> None:
    """Force a file's bytes to the disk, or a folder's entries and all that lies in it."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    _sync_one(path)


def recover(folder: Path) -> None:
    """Finish or undo what a crash left in a folder: put back what had been moved aside, remove what is unfinished."""
    for path in sorted(folder.iterdir()):
        if match := WORKING_NAME.fullmatch(path.name):
            target = folder / match[1]
            if match[2] == "old" and not target.exists():
                path.rename(target)
            else:
                remove(path)
    _sync_one(folder)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there, so that a crash leaves no half of it under its own name."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.ExitStack() as stack:
            if not WORKING_NAME.fullmatch(path.name):
                path = path.rename(stack.enter_context(_claim(path)))
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
