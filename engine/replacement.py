"""A run that overwrites another one: it grows in a folder inside it, and takes its place with its first checkpoint.

Until then the run that is there stays as it is, and a run that never comes so far changes nothing. The change itself is
one rename, after which all that remains to be done can be done by anybody, as often as need be (``finish``):

    RUN/run.tmp-N        the new run grows here; a kill leaves it, and the next run in the folder removes it
    RUN/.replacing       the same folder when it holds a checkpoint: from here on the new run is the one that counts
    RUN/.replacing/.old  while it is there, what lies in RUN is the old run's, and goes; then the new run's is moved up

Those who only read look into ``.replacing`` first (`afina/durable.py`, ``standing``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from afina.durable import OLD, REPLACING, put, remove, sync_entry, working_folder


def grow_beside(root: Path) -> Path:
    """A folder inside ``root`` for a run that will replace the one there."""
    return working_folder(root / "run")


def replace_run(root: Path, new: Path, is_own: Callable[[str], bool]) -> None:
    """Let the run in ``new`` take the place of the one in ``root``. Raises OSError, with the old one as it was or with
    what ``finish`` completes. ``is_own``: which names in ``root`` are a run's."""
    (new / OLD).touch()
    put(new, root / REPLACING, replace=False)
    finish(root, is_own)


def finish(root: Path, is_own: Callable[[str], bool]) -> None:
    """Complete a replacement that was begun, if there is one. Raises OSError."""
    new = root / REPLACING
    if new.is_symlink() or not new.is_dir():
        return
    if (new / OLD).exists():
        for path in sorted(root.iterdir()):
            if is_own(path.name):
                remove(path)
        sync_entry(root)  # or an old file could be there again after a power cut, among the new ones
        (new / OLD).unlink()
        sync_entry(new)
    for path in sorted(new.iterdir()):
        path.rename(root / path.name)
    new.rmdir()
    sync_entry(root)
