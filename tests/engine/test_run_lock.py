"""The lock on a run folder: nothing in the folder can take it away, and nothing outside it is touched through it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from disk import tree

from afina.engine import run_lock
from afina.engine.run_lock import LOCK, FolderLock, MovedError
from afina.errors import RunError


def held(path: Path) -> str:
    """The message of a second holder, which must be refused."""
    with pytest.raises(RunError) as refused:
        FolderLock(path)
    return str(refused.value)


def test_a_removed_file_changes_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert f"in use by another run (PID {os.getpid()} on " in held(tmp_path)
    (tmp_path / LOCK).unlink()
    assert "in use by another run (unknown process)" in held(tmp_path)
    lock.close()
    FolderLock(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link", "pipe"])
def test_what_the_file_leads_to_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "hard link":
        (folder / LOCK).hardlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(folder / LOCK)
    else:
        (folder / LOCK).symlink_to(precious if kind == "link" else tmp_path / "absent")
    lock = FolderLock(folder)
    assert not (folder / LOCK).is_symlink()
    assert "in use by another run" in held(folder)
    lock.close()
    assert tree(tmp_path) == {"precious": b"years of work", "run": None}


@pytest.mark.parametrize("kind", ["link", "escape"])
def test_who_holds_it_is_read_from_no_other_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret").write_text("PID 1 on secret")
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run" / LOCK).unlink()
    if kind == "link":
        (tmp_path / "run" / LOCK).symlink_to(tmp_path / "secret")
    else:
        (tmp_path / "run" / LOCK).write_text("PID 1 on \x1b]0;title\x07")
    assert "(unknown process)" in held(tmp_path / "run")
    lock.close()


def test_a_folder_that_moves_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    lock.check()
    folder.rename(tmp_path / "moved")
    with pytest.raises(MovedError, match=r"/run is not the folder any more .* go on with --resume"):
        lock.check()
    folder.mkdir()
    (folder / LOCK).write_text("of another run")
    with pytest.raises(MovedError):
        lock.check()
    lock.close()
    assert tree(tmp_path) == {"run": None, f"run/{LOCK}": b"of another run", "moved": None}


def test_an_empty_folder_removed_before_the_lock_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another run, which made it and ended before it began: a lock on it would be none."""
    flock = fcntl.flock

    def late(handle: int, operation: int) -> None:
        (tmp_path / "run").rmdir()
        (tmp_path / "run").mkdir()
        flock(handle, operation)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(MovedError):
        FolderLock(tmp_path / "run")


def no_locks_on_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS has it."""
    flock = fcntl.flock

    def refuse(handle: int, operation: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_where_folders_cannot_be_locked_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks_on_folders(monkeypatch)
    (tmp_path / LOCK).write_text("PID 7 on elsewhere\n")  # left by a killed run, and not emptied
    lock = FolderLock(tmp_path)
    assert (tmp_path / LOCK).read_text() == "PID 7 on elsewhere\n"
    assert "in use by another run (PID 7 on elsewhere)" in held(tmp_path)
    lock.close()
    FolderLock(tmp_path).close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / LOCK).symlink_to("precious")
    with pytest.raises(OSError, match="symbolic link"):
        FolderLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_file_that_goes_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file is locked: its holder closed and another made a new one; a lock on the old one is none."""
    others: list[FolderLock] = []
    no_locks_on_folders(monkeypatch)
    flock = fcntl.flock

    def late(handle: int, operation: int) -> None:
        if not others and not os.path.isdir(f"/proc/self/fd/{handle}"):
            monkeypatch.setattr(fcntl, "flock", flock)
            (tmp_path / LOCK).unlink()
            others.append(FolderLock(tmp_path))
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert "in use by another run" in held(tmp_path)
    others[0].close()


def test_no_locks_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    FolderLock(tmp_path).close()
    assert "has no file locks; start no second run in it" in capsys.readouterr().err
