"""The notebook is true: its cells run and print what is saved in it; it is valid, small and free of this machine."""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

import pytest
from conftest import REPO
from notebook import code_cells, run_cells

PATH = REPO / "examples" / "inside_one_step.ipynb"
NOTEBOOK: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def same(saved: str, found: str) -> bool:
    """Whether two texts differ at most in the last digits of their numbers. These come from sums of a few hundred
    fp32 products in six layers, whose order is the machine's: 1e-3 of the number, and two units of the last digit."""
    if NUMBER.sub("#", saved) != NUMBER.sub("#", found):
        return False
    for one, other in zip(NUMBER.findall(saved), NUMBER.findall(found)):
        unit = 10.0 ** -len(one.partition(".")[2])
        a, b = (float(text.replace(",", "")) for text in (one, other))
        if not ((a == b) if unit == 1 else math.isclose(a, b, rel_tol=1e-3, abs_tol=2 * unit)):
            return False
    return True


def texts(outputs: list[dict[str, Any]]) -> str:
    return "".join("".join(found["text"]) for found in outputs if found["output_type"] == "stream")


@pytest.fixture(scope="module")
def outputs() -> list[list[dict[str, Any]]]:
    return run_cells(NOTEBOOK)


def test_every_cell_prints_what_is_saved(outputs: list[list[dict[str, Any]]]) -> None:
    cells = code_cells(NOTEBOOK)
    assert len(cells) == len(outputs) > 10
    for number, (cell, found) in enumerate(zip(cells, outputs), 1):
        assert cell["execution_count"] == number
        assert same(texts(cell["outputs"]), texts(found)), f"cell {number} prints\n{texts(found)}"
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert kinds == [output["output_type"] for output in found]
    assert sum(len(found) for found in outputs) == sum(len(cell["outputs"]) for cell in cells)


def test_what_it_shows_is_so(outputs: list[list[dict[str, Any]]]) -> None:
    """Each comparison by hand holds, and the loss falls."""
    printed = "".join(map(texts, outputs))
    assert "False" not in printed
    assert printed.count("True") == 6
    before, after = map(float, re.findall(r"this row: ([\d.]+) before, ([\d.]+) after", printed)[0])
    assert after < before - 1


def test_it_is_valid_and_small() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert PATH.stat().st_size < 200_000
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
    images = [found["data"]["image/png"] for c in code_cells(NOTEBOOK) for found in c["outputs"] if "data" in found]
    assert len(images) == 2
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)


def test_the_files_and_functions_that_it_names_exist() -> None:
    words = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    paths = re.findall(r"`((?:engine|loaders|kernels)/[\w/]+\.py)`", words)
    assert len(paths) > 8
    for path in paths:
        assert (REPO / path).is_file(), path
    for name, path in re.findall(r"`(\w+)(?:\.\w+)?` \(`([\w/]+\.py)`\)", words):
        if name != "model":
            assert re.search(rf"(?:def|class) {name}\b", (REPO / path).read_text(encoding="utf-8")), (name, path)


def test_rounding_is_allowed_and_nothing_else() -> None:
    assert same("loss 4.5499, 60 tokens", "loss 4.5501, 60 tokens")
    assert not same("loss 4.5499", "loss 4.5599")
    assert not same("60 tokens", "61 tokens")
    assert not same("' the' 1.0", "' a' 1.0")
