"""The tables of the use cases' pages are those of the results."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

from case_tables import OWN, REAL, overview, read, shown, table

# Which page holds the table of which case.
PAGES = {**{name: name for name in OWN}, "sst2": "sentiment", "banking77": "support", "multi30k": "translation"}


def line(model: str, **figures: dict[str, list[float]]) -> dict[str, Any]:
    took = {"training": {"cpu": 25.7, "wall": 82.6}}
    gains = {name: [0.1, -0.1, 0.3, 0.4, "no difference"] for name in figures if name != "fine_tuned"}
    more = {"figures": figures, "fine_tuned_against": gains, "seconds": took}
    return {"case": "c", "model": model, "dev_rows": 60, "train_rows": 400, "steps": 27, **more}


def test_a_figure_and_its_interval() -> None:
    assert shown("accuracy", [0.8167, 0.7167, 0.9]) == "81.7 (71.7 to 90.0)"
    assert shown("chrf", [33.77, 30.48, 36.81]) == "33.8 (30.5 to 36.8)"
    assert shown("mrr@10", [0.7, 0.6, 0.8]) == "0.70 (0.60 to 0.80)"


def test_a_table_has_a_row_a_system_and_takes_the_last_line_of_a_model() -> None:
    old = line("afina-tiny", zero_shot={"accuracy": [0, 0, 0]}, fine_tuned={"accuracy": [0, 0, 0]})
    new = line("afina-tiny", zero_shot={"accuracy": [0.2, 0.1, 0.3]}, fine_tuned={"accuracy": [0.5, 0.4, 0.6]})
    assert table("c", [old, new]).splitlines() == [
        "|  | `afina-tiny`: accuracy, % |",
        "| -- | -- |",
        "| asked as it is (zero-shot) | 20.0 (10.0 to 30.0) |",
        "| **fine-tuned** | 50.0 (40.0 to 60.0) |",
        "| dev rows, training rows | 60, 400 |",
        "| steps; training took | 27; 26 s of a core |",
    ]


def test_the_overview_names_the_best_simple_method() -> None:
    figures = {name: {"accuracy": [value, 0, 1]} for name, value in (("majority", 0.3), ("tfidf_lr", 0.4))}
    found = overview([line("afina-tiny", **figures, fine_tuned={"accuracy": [0.5, 0.4, 0.6]})], ["c"]).splitlines()[-1]
    assert found == (
        "| c | `afina-tiny` | accuracy, % | too long | too long | 50.0 (40.0 to 60.0) | "
        "40.0 (0.0 to 100.0): TF-IDF and logistic regression | no difference |"
    )


@pytest.mark.parametrize("case", sorted({line["case"] for line in read()} & PAGES.keys()))
def test_a_page_has_its_table(case: str) -> None:
    page = (REPO / "examples" / PAGES[case] / "README.md").read_text(encoding="utf-8")
    assert plain(table(case, read())) in plain(page)


@pytest.mark.parametrize("cases", [OWN, REAL], ids=["own", "real"])
def test_the_overview_is_that_of_the_results(cases: list[str]) -> None:
    assert plain(overview(read(), cases)) in plain((REPO / "examples" / "README.md").read_text(encoding="utf-8"))


def plain(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.splitlines())
