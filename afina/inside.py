"""A file of a model, an adapter or a run is in its folder: the one way in which such a file is found and opened.

A folder may come from anybody, and what is read of it is trained on, generated from and copied into exports. So a link
in it may lead to another place in the same folder, at any depth, and nowhere else. The one exception is how
huggingface_hub lays out its cache: a file of ``models--OWNER--NAME/snapshots/REVISION`` is a link to a file in
``models--OWNER--NAME/blobs``. The folder itself may be reached by any links: it is what the user named. Files that the
user named, such as rows, recipes and single GGUF files, may be links too, and are not opened here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, RunError


def own_path(path: Path, *, error: type[AfinaError] = RunError) -> Path:
    """Where ``path``, a file or folder in the folder that is its parent, really lies. Nothing need be there. Raises
    ``error`` for a link that leads out of the folder."""
    home, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    if home in real.parents or any(real.parent == blobs for blobs in _blobs(home)):
        return real
    raise error(f"{path}: is a link out of its folder, to {real}: put a copy in its place")


def open_own(path: Path, *, error: type[AfinaError] = RunError, buffering: int = -1) -> Any:
    """Open a file of the folder that is its parent for reading, in bytes. Raises ``error`` for a link that leads out of
    it and for what is no regular file, OSError as ``open`` does."""
    real = own_path(path, error=error)
    # Should the file become a link or a pipe meanwhile, it is neither followed nor waited for.
    handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise error(f"{path}: is no regular file: put a copy of the file itself in its place")
    return os.fdopen(handle, "rb", buffering=buffering)


def _blobs(home: Path) -> list[Path]:
    """Where the files of a snapshot in the Hugging Face cache, or of a folder in one, really lie."""
    return [
        snapshots.parent / "blobs"
        for snapshots in home.parents
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    ]
