"""afina/report/page.py: the page of planted facts: whole, bounded in size, escaped, readable in light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from report_checks import check_page

from afina.engine.dev_rows import DevRows
from afina.engine.intervals import Paired
from afina.engine.token_view import Alternative, TokenView
from afina.engine.train_config import TrainConfig
from afina.report.facts import RunFacts
from afina.report.measure import Measured, ShownRow, TokenRow
from afina.report.page import MAX_BYTES, report_page
from afina.report.page_parts import ROW_TEXT, row_text, text
from afina.report.page_style import REPORT_CSS
from afina.report.sections import duration, training
from afina.report.verdict import Forgetting, judge
from afina.report.weights_change import MatrixChange, WeightsChange

HOSTILE = "<script>document.title='ran'</script>\x1b[31m\u202e</pre>&"


def planted(name: str = "m", rows: int = 40, steps: int = 30) -> RunFacts:
    draw = np.random.default_rng(0)
    before = draw.normal(3, 0.2, rows)
    dev = DevRows([f"{name}.jsonl: line {n}" for n in range(rows)], np.full(rows, 10), before * 10, before * 8, steps)
    lines = [
        {"step": n, "loss": 3 - n / steps, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.1, "tokens": 100}
        for n in range(1, steps + 1)
    ]
    evaluations = [{"step": n, "dev_loss": 3 - n / steps, "best": n > 0} for n in range(0, steps + 1, 10)]
    config = TrainConfig(model=name, data=f"{name}.jsonl", output_dir="out", learning_rate=1e-3)
    record = {"started": {"versions": {"torch": "2"}}, "data": {"rows": 50, "schema": name}, "finished": {"steps": 30}}
    return RunFacts(Path("out"), record, config, lines, evaluations, dev)


def views(text: str, count: int) -> list[TokenView]:
    top = tuple(Alternative(n, text, 0.2) for n in range(3))
    return [TokenView(n, n, text, n > 0, 1.0 if n else None, 0.3 if n else None, 2, top, text) for n in range(count)]


def measured(text: str, tokens: int = 6, rows: int = 2) -> Measured:
    shown = [ShownRow(f"{text}: line 1", 10, 3.0, 2.0, [(text, False), (text, True)])] * rows
    row = TokenRow(f"{text}: line 1", 0, tokens, views(text, tokens), views(text, tokens))
    found = Paired(0.3, 0.2, 0.4, 0.01, 1, 2, 3)
    matrices = [MatrixChange(f"model.layers.{n}.mlp.{text}.weight", 0.01 * n, 0.1 * n) for n in range(1, 4)]
    return Measured(
        won=shown,
        lost=shown,
        same=shown,
        forgetting=Forgetting(3.0, 3.3, found, 24, 1000, text),
        passages=[0.1, 0.2, 0.5],
        tokens=[row] * rows,
        weights=WeightsChange(matrices, False, "float32", 0.02, 0.2, [text]),
        missing={"answers": text},
    )


def page_of(facts: RunFacts, found: Measured) -> str:
    return report_page(facts, judge(facts.dev_rows), found, training(facts))


def test_a_whole_page() -> None:
    source = page_of(planted(), measured("word"))
    page = check_page(source)
    assert "Better: dev loss 2." in page.text.replace("\n", "")
    assert "Forgot: +0.300 nats a token" in page.text
    assert "40 rows won, 0 lost and 0 unchanged" in page.text
    for heading in ("Training", "Token by token", "Forgetting", "What changed in the weights", "Recipe and versions"):
        assert heading in page.text
    assert "answers before and after: word" in page.text
    assert source == page_of(planted(), measured("word"))


def test_nothing_of_a_row_or_a_setting_is_markup() -> None:
    page = check_page(page_of(planted(HOSTILE), measured(HOSTILE)))
    assert "<script>document.title='ran'</script>" in page.text  # as text
    assert not set(page.source) & {"\x1b", "\u202e"}
    assert "\\x1b[31m\\u202e" in page.text


def test_a_run_that_has_only_begun_has_a_page() -> None:
    facts = planted()
    begun = RunFacts(facts.folder, {}, facts.config, [], [], None)
    page = check_page(page_of(begun, Measured(missing={"rows": "no", "tokens": "no"})))
    assert "Unknown: the dev loss was not measured" in page.text
    assert "No training step has been done yet." in page.text
    assert "not finished: step 0" in page.text


def test_a_page_is_never_larger_than_3_mb() -> None:
    """What is longest goes first; the verdict and the rest stay."""
    huge = page_of(planted(rows=3000, steps=20_000), measured("<&" * 400, tokens=160, rows=4))
    assert len(huge.encode()) <= MAX_BYTES
    page = check_page(huge)
    assert "Left out: with it, the page would be larger than 3 MB." in page.text
    assert "Better: dev loss" in page.text
    assert "loss-title" in page.ids


def test_long_text_is_cut_and_says_so() -> None:
    assert text("x" * 1000, 10) == "x" * 10 + " … (990 more characters)"
    row = ShownRow("a: line 1", 3, 1.0, 2.0, [("p" * 5000, False), ("answer", True)])
    shown = row_text(row)
    assert "<mark>answer</mark>" in shown
    assert f"({5006 - ROW_TEXT:,} characters before)" in shown
    assert shown.count("p") < ROW_TEXT + 30


@pytest.mark.parametrize(
    ("seconds", "told"), [(3.21, "3.2 s"), (119.9, "119.9 s"), (150, "2 min 30 s"), (7300, "2 h 1 min")]
)
def test_duration(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_contrast_reaches_aa(scheme: int) -> None:
    """WCAG 2.2: text 4.5, lines of figures 3."""
    blocks = re.findall(r":root \{([^}]*)\}", REPORT_CSS)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for background in ("page", "card"):
        for name in ("ink", "muted", "accent", "good", "bad", "plain"):
            assert contrast(name, background) >= 4.5, (name, background)
        for name in ("series-1", "series-2"):
            assert contrast(name, background) >= 3, (name, background)
    assert len(blocks) == 2
