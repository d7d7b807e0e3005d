"""The house's floors: who may import whom, the links, no initialisers that shadow other packages, tests for all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FLOORS = {"kernels": {"kernels"}, "loaders": {"loaders"}, "engine": {"engine", "kernels", "loaders"}}


def imported(file: Path) -> set[str]:
    """Dotted names that ``file`` imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_stay_on_their_floors(floor: str) -> None:
    files = sorted((REPO / floor).rglob("*.py"))
    assert files, f"no files in {floor}/"
    for file in files:
        for name in imported(file):
            top = name.split(".")[0]
            assert top not in {"engine", "kernels", "loaders", "tests", "benchmarks"}, f"{file} imports {name}"
            if name.startswith("afina."):
                room = name.split(".")[1]
                assert room in FLOORS[floor] | {"errors", "__version__"}, f"{file} imports {name}"


@pytest.mark.parametrize("floor", FLOORS)
def test_links_and_no_initialisers(floor: str) -> None:
    link = REPO / "afina" / floor
    assert link.is_symlink()
    assert link.resolve() == REPO / floor
    assert not list((REPO / floor).rglob("__init__.py")), "an initialiser here would overwrite other packages"


# Files that are only reached through another one, whose tests they share.
TESTED_WITH = {
    "attention_blocks": "attention",
    "cross_entropy_rows": "cross_entropy",
    "commands": "cli",
    "gguf_check": "export",
    "model_options": "adapted_verbs",
    "positions": "config",
    "proof": "export",
    "sampling": "generate",
    "settings": "train_config",
    "tokenise": "dataset",
    "token_cache": "dataset",
}


def test_every_file_has_its_tests() -> None:
    for floor in FLOORS:
        for file in (REPO / floor).glob("*.py"):
            tests = REPO / "tests" / f"test_{TESTED_WITH.get(file.stem, file.stem)}.py"
            assert tests.is_file(), f"{floor}/{file.name} has no {tests.name}"
            if file.stem in TESTED_WITH:
                text = tests.read_text()
                found = f"afina.{floor}.{file.stem} import" in text or f"afina.{floor} import {file.stem}" in text
                assert found, f"{tests.name} leaves {file.stem} out"


def test_public_names_resolve_and_import_stays_light() -> None:
    code = (
        "import sys, afina, afina.errors, afina.engine.cli, afina.engine.train_config;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'import afina pulled in torch or numpy';"
        "[getattr(afina, name) for name in afina.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, timeout=120)
