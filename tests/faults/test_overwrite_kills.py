"""The short form of overwrite_kills.py, which says at its top how to run the long ones."""

from __future__ import annotations

from pathlib import Path

import overwrite_kills
import pytest


@pytest.mark.parametrize(("exchange", "best_last"), [(True, False), (False, True)])
def test_a_run_killed_while_it_overwrites_another_leaves_one_of_the_two(
    tmp_path: Path, exchange: bool, best_last: bool
) -> None:
    found = overwrite_kills.count(tmp_path, every=13, exchange=exchange, best_last=best_last)
    assert found.keys() - {("none", "new")} == {("old", "old"), ("new", "new")}
    assert best_last or ("none", "new") not in found
    assert found["old", "old"] > 3


@pytest.mark.slow
def test_kill_9_of_the_command_line(tmp_path: Path) -> None:
    found = overwrite_kills.count_cli(tmp_path, 8)
    assert found.keys() <= {("whole", "old"), ("whole", "new")}
