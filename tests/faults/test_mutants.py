"""The list of known bugs still fits the code: `make mutants` is too long to run with every change."""

from __future__ import annotations

import ast

import pytest
from mutants import MUTANTS, REPO, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_bug_can_be_put_in(mutant: Mutant) -> None:
    source = (REPO / mutant.file).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file} has changed: find the place again"
    ast.parse(source.replace(mutant.old, mutant.new))  # the bug is one of behaviour, not of spelling
    file, _, name = mutant.test.partition("::")
    (test,) = (node for node in ast.parse((REPO / file).read_text()).body if getattr(node, "name", "") == name)
    assert isinstance(test, ast.FunctionDef)
    assert "slow" not in [ast.unparse(mark).rpartition(".")[2] for mark in test.decorator_list]  # `make test` runs it


def test_the_docs_have_the_table() -> None:
    text = (REPO / "docs" / "reliability.md").read_text()
    for mutant in MUTANTS:
        assert f"| {mutant.name} | {mutant.bug} | `{mutant.test.removeprefix('tests/')}` |" in text


def test_the_names_differ() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
