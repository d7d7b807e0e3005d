"""The short form of bombs.py: what is hostile is refused in one line, under limits that the kernel enforces."""

from __future__ import annotations

import pytest
from bombs import KINDS, fallen
from template_bombs import BOMBS


def test_there_are_enough() -> None:
    assert len(BOMBS) >= 80


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_cases_are_refused(kind: str) -> None:
    cases = list(KINDS[kind](0, 100))
    found = [fallen(case) for case in cases[:: 1 + len(cases) // 25]]
    assert [line for line in found if line] == []
