"""A run that takes the place of another one: the change is one rename, and the rest can be done again and again.

Every call at which it can be killed is in tests/faults/overwrite_kills.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from disk import tree

from afina.durable import OLD, REPLACING
from afina.engine import replacement
from afina.engine.replacement import finish, grow_beside, replace_run


def is_own(name: str) -> bool:
    return name in ("run.json", "best", "checkpoint-1", "checkpoint-9")


def two_runs(root: Path) -> Path:
    (root / "run.json").write_text("old")
    (root / "notes.txt").write_text("mine")
    (root / "elsewhere").write_text("kept")
    (root / "checkpoint-9").symlink_to("elsewhere")
    for folder in (root, new := grow_beside(root)):
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "w").write_text(folder.name)
    (new / "run.json").write_text("new")
    return new


def test_all_that_the_old_run_wrote_goes_and_nothing_else(tmp_path: Path) -> None:
    new = two_runs(tmp_path)
    before = tree(tmp_path)
    replace_run(tmp_path, new, is_own)
    left = {name: content for name, content in tree(tmp_path).items() if content is not None}
    assert left == {
        "run.json": b"new",
        "checkpoint-1/w": before[f"{new.name}/checkpoint-1/w"],
        "notes.txt": b"mine",
        "elsewhere": b"kept",
    }
    finish(tmp_path, is_own)  # again, of which there is nothing to do
    assert {name for name, content in tree(tmp_path).items() if content is not None} == left.keys()


def test_what_fails_before_the_rename_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = two_runs(tmp_path)
    before = tree(tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(replacement, "put", fail)
    with pytest.raises(OSError, match="Input/output"):
        replace_run(tmp_path, new, is_own)
    assert {name: content for name, content in tree(tmp_path).items() if Path(name).name != OLD} == before


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("root", "other"):
        (tmp_path / name / "run.json").write_text(name)
    (tmp_path / "other" / OLD).touch()
    (tmp_path / "root" / REPLACING).symlink_to(tmp_path / "other")
    before = tree(tmp_path)
    finish(tmp_path / "root", is_own)
    assert tree(tmp_path) == before
