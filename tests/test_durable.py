"""afina/durable.py: a file or a folder is whole or absent, and what a crash leaves is cleared up.

Crashes at every call that changes the disk are in tests/engine/test_checkpoint.py, kills in tests/cli/test_faults.py.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disk import files_limited_to, tree

from afina import durable
from afina.durable import (
    REPLACING,
    cache_folder,
    open_file,
    publish,
    put,
    recover,
    remember,
    remembered,
    remove,
    standing,
    sync,
    working_folder,
    write_text,
)
from afina.errors import DataError

RANDOM = re.compile(r"(tmp|old)-[0-9a-f]{16}")


@pytest.fixture(params=["one step", "two renames"])
def replacing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system call that exchanges two folders, and on file systems that have none."""
    if request.param == "two renames":
        monkeypatch.setattr(durable, "_renameat2", lambda one, other, flags: False)
    return str(request.param)


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is forced to the disk and what is renamed, in order, by name; working names without their random part."""
    seen: list[str] = []
    fsync, rename, exchange = os.fsync, Path.rename, durable._renameat2

    def log(text: str) -> None:
        seen.append(RANDOM.sub(r"\1", text))

    def logged_fsync(handle: int) -> None:
        log(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def logged_rename(path: Path, target: Path) -> Path:
        log(f"{path.name} -> {target.name}")
        return rename(path, target)

    def logged_exchange(one: Path, other: Path, flags: int) -> bool:
        if done := exchange(one, other, flags):
            log(f"{one.name} <-> {other.name}")
        return done

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    monkeypatch.setattr(durable, "_renameat2", logged_exchange)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[str]) -> None:
    write_text(tmp_path / "a", "ä")
    assert (tmp_path / "a").read_bytes() == "ä".encode()
    assert events == ["sync a.tmp", "a.tmp -> a", f"sync {tmp_path.name}"]


def test_so_is_a_folder_with_all_that_lies_in_it(tmp_path: Path, events: list[str]) -> None:
    with publish(tmp_path / "a") as working:
        folder_with(working, "text")
        folder_with(working / "inner", "text")
    renamed = events.index("a.tmp -> a")
    assert sorted(events[:renamed]) == sorted(["sync file", "sync file", "sync inner", "sync a.tmp"])
    assert events[renamed - 1] == "sync a.tmp"  # a folder's entries after what they name
    assert events[renamed + 1 :] == [f"sync {tmp_path.name}"]


def test_what_is_replaced_goes_last(replacing: str, tmp_path: Path, events: list[str]) -> None:
    before = folder_with(tmp_path / "a", "old")
    with publish(before) as working:
        folder_with(working, "new")
        assert (before / "file").read_text() == "old"
    assert tree(tmp_path) == {"a": None, "a/file": b"new"}
    renames = ["a.tmp <-> a"] if replacing == "one step" else ["a -> a.old", "a.tmp -> a"]
    assert events[-len(renames) - 1 :] == [*renames, f"sync {tmp_path.name}"]


def test_at_no_moment_is_the_name_free(tmp_path: Path) -> None:
    """Every call that changes the disk finds a folder of that name."""
    folder_with(tmp_path / "a", "old")
    missing: list[str] = []
    watched = [True]

    def look(event: str, arguments: object) -> None:
        if watched and event.startswith("os.") and not os.path.lexists(tmp_path / "a"):
            missing.append(event)

    sys.addaudithook(look)
    with publish(tmp_path / "a") as working:
        folder_with(working, "new")
    watched.clear()
    assert missing == []
    assert (tmp_path / "a" / "file").read_text() == "new"


WRITERS: dict[str, Callable[[Path], None]] = {
    "file": lambda path: path.write_text("half"),  # type: ignore[dict-item, return-value]
    "folder": lambda path: folder_with(path, "half"),  # type: ignore[dict-item, return-value]
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("writer's own"), OSError(28, "No space left")])
def test_a_writer_that_fails_changes_nothing(tmp_path: Path, kind: str, error: BaseException) -> None:
    folder_with(tmp_path / "a", "old")
    before = tree(tmp_path)

    def fail() -> None:
        with publish(tmp_path / "a") as working:
            WRITERS[kind](working)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_rename_that_fails_changes_nothing(
    replacing: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old") if kind == "file" else folder_with(tmp_path / "a", "old")
    before, rename = tree(tmp_path), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    def refuse(one: Path, other: Path, flags: int) -> int:
        return 5

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(durable, "_call", lambda: refuse)
    with pytest.raises(OSError, match="Input/output error"), publish(tmp_path / "a") as working:
        WRITERS[kind](working)
    assert tree(tmp_path) == before


def test_a_full_disk_is_said_as_the_caller_wants_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def save(error: type[DataError] | None) -> None:
        with open_file(tmp_path / "a", error=error) as file:
            file.write(b"x" * 100_000)

    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        save(None)
    line = f"{tmp_path}/a: cannot be written (File too large): free space there or choose another folder"
    with files_limited_to(1000), pytest.raises(DataError) as caught:
        save(DataError)
    assert str(caught.value) == line
    assert isinstance(caught.value.__cause__, OSError)
    assert tree(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_what_must_not_be_replaced_is_not(tmp_path: Path, kind: str) -> None:
    if kind == "link to nothing":
        (tmp_path / "a").symlink_to("absent")
    else:
        WRITERS[kind](tmp_path / "a")
    with pytest.raises(FileExistsError), publish(tmp_path / "a", replace=False) as working:
        folder_with(working, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_a_link_is_replaced_and_what_it_leads_to_is_not(replacing: str, tmp_path: Path, target: str) -> None:
    folder_with(tmp_path / "elsewhere", "kept")
    (tmp_path / "a").symlink_to(target)
    with publish(tmp_path / "a") as working:
        folder_with(working, "new")
    assert not (tmp_path / "a").is_symlink()
    assert tree(tmp_path) == {"a": None, "a/file": b"new", "elsewhere": None, "elsewhere/file": b"kept"}


def test_working_names_cannot_be_foreseen(tmp_path: Path) -> None:
    names = {working_folder(tmp_path / "a").name for _ in range(20)}
    assert len(names) == 20
    assert all(re.fullmatch(r"a\.tmp-[0-9a-f]{16}", name) for name in names)
    (tmp_path / f"a.tmp-{os.getpid()}").symlink_to(tmp_path / "precious")  # where earlier versions wrote
    write_text(tmp_path / "a", "mine")
    assert not (tmp_path / "precious").exists()
    recover(tmp_path)
    assert tree(tmp_path) == {"a": b"mine"}


def test_what_a_crash_moved_aside_is_found(tmp_path: Path) -> None:
    assert standing(tmp_path / "best") == tmp_path / "best"
    aside = folder_with(tmp_path / "best.old-0123456789abcdef", "moved aside")
    folder_with(tmp_path / "best.tmp-0123456789abcdef", "unfinished")
    assert standing(tmp_path / "best") == aside
    folder_with(tmp_path / "best", "there")
    assert standing(tmp_path / "best") == tmp_path / "best"
    (tmp_path / REPLACING).symlink_to(tmp_path / "elsewhere")
    folder_with(tmp_path / "elsewhere", "")
    folder_with(tmp_path / "elsewhere" / "best", "another's")
    assert standing(tmp_path / "best") == tmp_path / "best"
    (tmp_path / REPLACING).unlink()
    (tmp_path / "elsewhere").rename(tmp_path / REPLACING)
    assert standing(tmp_path / "best") == tmp_path / REPLACING / "best"


def test_recover_puts_back_and_clears_up(tmp_path: Path) -> None:
    folder_with(tmp_path / "best.old-7", "moved aside, and never replaced")
    folder_with(tmp_path / "other", "new")
    folder_with(tmp_path / "other.old-7", "replaced")
    folder_with(tmp_path / "third.tmp-7", "unfinished")
    (tmp_path / "run.json.tmp-8").write_text("half")
    (tmp_path / "notes.tmp").write_text("not ours")
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "notes.tmp", "other"]
    assert (tmp_path / "other" / "file").read_text() == "new"


def test_removing_is_in_one_piece(tmp_path: Path, events: list[str]) -> None:
    remove(folder_with(tmp_path / "a", "text"))
    remove(tmp_path / "absent")
    assert events == ["a -> a.tmp"]
    assert tree(tmp_path) == {}


def test_what_cannot_be_synced_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    working = folder_with(tmp_path / "working", "text")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        put(working, tmp_path / "a")
    with pytest.raises(OSError, match="Input/output error"):
        sync(working)
    assert not (tmp_path / "a").exists()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.setenv("AFINA_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "afina"


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    folder_with(tmp_path / "a", "kept")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": None, "a/file": b"kept"}


def test_a_rename_that_may_not_last_is_taken_back(
    replacing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's entries cannot be forced to the disk: the old folder is there again, and nothing is left over."""
    folder_with(tmp_path / "a", "old")
    before, fsync = tree(tmp_path), os.fsync

    def fail(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(tmp_path):
            raise OSError(5, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"), publish(tmp_path / "a") as working:
        folder_with(working, "new")
    assert tree(tmp_path) == before


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(50):
            write_text(tmp_path / "a", str(number) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # raises what a thread raised
    assert (tmp_path / "a").read_text() in [str(number) * 1000 for number in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("own_cache")
def test_what_was_found_out_is_remembered_under_all_that_it_depends_on() -> None:
    key = {"gpu": "H200", "versions": ["2.11", None], "pair": (1, 2)}
    assert remembered("check", key) is None
    remember("check", key, ["glu"])
    assert remembered("check", key) == ["glu"]
    assert remembered("check", key | {"gpu": "L4"}) is None
    assert remembered("other", key) is None
    remember("check", key, 1.5)
    assert remembered("check", key) == 1.5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"value": 1}', "\x00"])
def test_a_note_that_is_damaged_or_of_another_key_is_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path))
    remember("check", 1, 2)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert remembered("check", 1) is None


def test_where_nothing_can_be_written_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "file" / "cache"))
    remember("check", 1, 2)
    assert remembered("check", 1) is None
