"""Who writes in a run folder: a lock on the folder itself, which no file in it can take away, forge or redirect."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
from pathlib import Path

from afina.durable import write_text
from afina.errors import RunError
from afina.streams import say

LOCK = ".lock"  # says who holds the folder; it is not what is locked, where the file system locks folders
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # flock on some network file systems
NO_FOLDER_LOCKS = NO_LOCKS | {errno.EBADF}  # on NFS, a lock needs a descriptor that can write, which a folder's cannot
HOLDER = re.compile(r"PID [0-9]{1,10} on [\w.-]{1,64}", re.ASCII)


class MovedError(OSError):
    """The run's folder is no longer at its path: what is there now is another's, or nothing."""


class FolderLock:
    """A folder that no other process holds, until ``close``. The kernel lets go of it when its holder dies, however it
    dies, so none is ever stale. Raises RunError where another process holds it (named), OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        self._held = False
        try:
            self._take()
            self._held = True
            if len(self._handles) == 1:  # else the file itself is what is held, and must stay the one it is
                with contextlib.suppress(OSError):  # it is a help, and a full disk no reason not to hold the folder
                    write_text(path / LOCK, f"PID {os.getpid()} on {socket.gethostname()}\n")
            self.check()  # one that was still empty may have been removed, until the file was in it
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise MovedError unless the folder is still where it was when it was locked."""
        try:
            same = os.path.samestat(os.fstat(self._handles[0]), os.stat(self.path))
        except OSError:
            same = False
        if not same:
            raise MovedError(
                f"{self.path} is not the folder any more that this run began in: it was moved, removed or replaced, so "
                "nothing more is written; put it back and go on with --resume"
            )

    def clear(self) -> None:
        """Remove the file, and hold the folder still."""
        if self._held:
            with contextlib.suppress(OSError):
                os.unlink(LOCK, dir_fd=self._handles[0])
            self._held = False

    def close(self) -> None:
        self.clear()
        while self._handles:
            os.close(self._handles.pop())

    def _take(self) -> None:
        try:
            fcntl.flock(self._handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FOLDER_LOCKS:
                raise self._in_use() from error
            self._take_file()

    def _take_file(self) -> None:
        """Where folders cannot be locked: hold the file, which is not written to, since it may be anybody's."""
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(LOCK, flags, 0o644, dir_fd=self._handles[0])
            self._handles.append(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise self._in_use() from error
                say(f"afina: warning: {self.path} has no file locks; start no second run in it")
                return
            # The one who held it before may have removed the file between our two calls: then we hold nothing.
            with contextlib.suppress(FileNotFoundError):
                now = os.stat(LOCK, dir_fd=self._handles[0], follow_symlinks=False)
                if os.path.samestat(os.fstat(handle), now):
                    return
            os.close(self._handles.pop())

    def _in_use(self) -> RunError:
        holder = "unknown process"
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(LOCK, flags, dir_fd=self._handles[0]), "rb") as file:
                text = file.read(200).decode(errors="replace").strip()
                holder = text if HOLDER.fullmatch(text) else holder
        return RunError(f"{self.path} is in use by another run ({holder}); wait for it or stop it")
