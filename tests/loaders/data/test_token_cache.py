"""The token cache on the disk: nothing in it is believed, and what cannot be used is neither waited for nor refused.

What it holds, and what damage to its arrays does, is in test_dataset.py; every bit, in tests/faults/cache_flips.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk import flip_bit, tree
from tiny_model import tiny_tokenizer

from afina import durable
from afina.errors import DataError
from afina.loaders.data import token_cache, token_pass
from afina.loaders.data.dataset import Data, prepare
from afina.loaders.data.token_cache import COLUMNS, MANIFEST, Writer, open_cache, sweep
from afina.loaders.data.token_pass import Tokenise

Prepared = Callable[..., Data]
ONE_ROW = {name: np.ones(1, kind) for name, kind in COLUMNS.items()}
VOCABULARY = 500


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of one row of one token."""
    folder = tmp_path / "tokens" / "key"
    with Writer(folder, VOCABULARY) as writer:
        writer.append(ONE_ROW)
        writer.commit({"schema": "text"})
    return folder


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    rows = [{"prompt": f"question {i}?", "completion": f" answer {i}"} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**options: Any) -> Data:
        settings = {"max_length": 64, "cache_dir": tmp_path / "cache", "progress": False}
        return prepare(tmp_path / "a.jsonl", tiny_tokenizer(), **settings | options)

    return run


def test_no_byte_may_differ(folder: Path) -> None:
    assert open_cache(folder, VOCABULARY) is not None
    for path in sorted(folder.iterdir()):
        for offset in range(0, path.stat().st_size, 5):
            flip_bit(path, offset)
            assert open_cache(folder, VOCABULARY) is None, (path, offset)
            flip_bit(path, offset)
    assert open_cache(folder, VOCABULARY) is not None


def test_the_dtypes_are_those_of_the_code(folder: Path) -> None:
    """A manifest that says otherwise, with a checksum that is right, says nothing."""
    text = (folder / MANIFEST).read_bytes()[65:].replace(b'"format"', b'"columns": {"ids": ">u2"}, "format"')
    (folder / MANIFEST).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    cache = open_cache(folder, VOCABULARY)
    assert cache is not None
    assert cache.ids.dtype == np.dtype("<u2")
    assert cache.ids.tolist() == [1]


def test_a_cache_of_other_rows_is_none(folder: Path) -> None:
    folder.rename(folder.with_name("other"))
    assert open_cache(folder.with_name("other"), VOCABULARY) is None


@pytest.mark.parametrize("kind", ["link", "pipe", "writable"])
def test_only_own_files_are_read(folder: Path, tmp_path: Path, kind: str) -> None:
    path = folder / "ids.bin"
    if kind == "writable":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "ids.bin")
        path.symlink_to(tmp_path / "ids.bin") if kind == "link" else os.mkfifo(path)
    assert open_cache(folder, VOCABULARY) is None


def test_caches_are_for_their_user_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_cache_of_another_user_is_neither_read_nor_removed(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared()
    before = tree(tmp_path / "cache")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    second = prepared()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert f"belongs to another user ({owner}), whose tokens are not trusted: set AFINA_CACHE" in told[0]
    assert not second.report["cached"]
    assert second.fingerprint == first.fingerprint
    assert [second.train.row(n)[0].tolist() for n in range(len(second.train))] == [
        first.train.row(n)[0].tolist() for n in range(len(first.train))
    ]
    assert tree(tmp_path / "cache") == before


def test_a_cache_that_cannot_be_written_is_a_temporary_one(
    tmp_path: Path, prepared: Prepared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    data = prepared(cache_dir=tmp_path / "file")
    (told,) = capsys.readouterr().err.splitlines()
    assert "the token cache cannot be written (Not a directory): free some space, or set AFINA_CACHE" in told
    assert told.endswith("; this run's tokens go to a temporary one")
    assert data.fingerprint == prepared().fingerprint
    assert len(data.train.row(0)[0]) > 2
    assert list((tmp_path / "temporary").iterdir()) == []


def test_no_home_and_no_folder_named(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("afina.loaders.data.dataset.cache_folder", none)
    with pytest.raises(DataError, match=r"no folder for the token cache .*: set AFINA_CACHE to one"):
        prepared(cache_dir=None)


def change_content(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"answer 8", b"ANSWER 8"))


def change_content_and_restore_the_time(path: Path) -> None:
    facts = path.stat()
    change_content(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def replace_it(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [change_content, change_content_and_restore_the_time, replace_it])
def test_files_that_change_while_they_are_read(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    batches = Tokenise._batches

    def changed(self: Tokenise, progress: Any) -> Any:
        change(tmp_path / "a.jsonl")
        return batches(self, progress)

    monkeypatch.setattr(Tokenise, "_batches", changed)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was being read: run it again"):
        prepared()
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    monkeypatch.undo()
    assert not prepared().report["cached"]


def test_what_killed_builds_left_is_swept(tmp_path: Path, prepared: Prepared) -> None:
    tokens = tmp_path / "cache" / "tokens"
    tokens.mkdir(parents=True)
    for name in (".building-x1", "key.tmp-123", "key.tmp-0123456789abcdef"):
        (tokens / name).mkdir()
        (tokens / name / "ids.bin").write_bytes(b"half")
    (tokens / "link.tmp-1").symlink_to(tmp_path)
    (tokens / "mine").mkdir()
    with Writer(tokens / "other", VOCABULARY) as going_on:
        assert going_on.temporary is not None
        prepared()
        names = {path.name for path in tokens.iterdir()} - {going_on.temporary.name}
        assert going_on.temporary.is_dir()
    assert {name for name in names if len(name) != 64} == {"mine", "link.tmp-1"}
    assert (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_folder_that_is_swept_before_its_lock_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    made: list[Path] = []
    flock = fcntl.flock

    def swept(path: Path, *, mode: int) -> Path:
        made.append(durable.working_folder(path, mode=mode))
        if len(made) == 1 and moment == "before it is opened":
            sweep(path.parent)
        return made[-1]

    def late(handle: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        if moment == "before it is locked":
            sweep(made[-1].parent)
        flock(handle, operation)

    monkeypatch.setattr(token_cache, "working_folder", swept)
    monkeypatch.setattr(fcntl, "flock", late)
    with Writer(tmp_path / "tokens" / "key", VOCABULARY) as writer:
        writer.append(ONE_ROW)
        writer.commit({})
    assert len(made) == 2
    assert open_cache(tmp_path / "tokens" / "key", VOCABULARY) is not None
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["key"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / "x.tmp-1").mkdir()
    sweep(tmp_path)
    with Writer(tmp_path / "key", VOCABULARY) as writer:
        writer.append(ONE_ROW)
        writer.commit({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "x.tmp-1"]


def test_a_file_that_goes_away_while_it_is_read(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = token_pass.file_digest

    def gone(path: Path) -> str:
        found = digest(path)
        path.unlink()
        return found

    monkeypatch.setattr(token_pass, "file_digest", gone)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file"):
        prepared()
