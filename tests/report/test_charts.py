"""afina/report/charts.py: figures of planted numbers: the same bytes each time, colours of the page, numbers beside."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from afina.report.charts import (
    MAX_POINTS,
    Chart,
    Dot,
    before_after,
    curves,
    heat_map,
    histogram,
    levels,
    smoothed,
    spectra,
    thinned,
)

LINE = [(float(n), 5 / (1 + n)) for n in range(1, 40)]
MAKERS: list[Callable[[], Chart]] = [
    lambda: curves("loss", "Loss", line=LINE, label="loss", smooth=True, marks=LINE[::9], marks_label="dev"),
    lambda: curves("norm", "Norm", line=LINE, label="norm", log=True, level=(1.0, "clipped to 1")),
    lambda: histogram("rows", "Rows", [0.1 * n - 1 for n in range(15)], of="dev rows"),
    lambda: before_after("dots", "Metrics", [("accuracy", Dot(0.2, 0.1, 0.3), Dot(0.8, 0.7, 0.9))]),
    lambda: heat_map("heat", "Heat", "share", {("q", 0): 0.1, ("q", 1): 0.5, ("v", 1): 0.2}, lambda v: f"{v:.0%}"),
    lambda: spectra("spectra", "Spectra", {"q": [1.0, 0.5], "v": [1.0, 0.2]}),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_figure(make: Callable[[], Chart]) -> None:
    chart = make()
    assert chart.svg == make().svg
    head = f'<svg class="chart" role="img" aria-labelledby="{chart.name}-title {chart.name}-desc" viewBox="'
    assert chart.svg.startswith(head)
    assert f'<title id="{chart.name}-title">{chart.title}</title>' in chart.svg
    assert f">{chart.description}</desc>" in chart.svg
    assert not re.findall(r"#[0-9a-f]{6}\b|http|<style|<metadata|DejaVu", chart.svg)
    assert "var(--" in chart.svg
    assert "<text" in chart.svg, "text stays text"
    assert all(found.startswith(f"{chart.name}-") for found in re.findall(r'\bid="([^"]*)"', chart.svg))
    assert chart.rows
    assert all(len(row) == len(chart.heads) for row in chart.rows)


def test_the_numbers_are_those_planted() -> None:
    loss, norm, rows, dots, heat, values = (make() for make in MAKERS)
    assert loss.description.startswith("loss from 2.5 at step 1 to 0.125 at step 39; dev from 2.5 to ")
    assert loss.rows[0] == ("1", "2.5000", "2.5000")
    assert norm.rows[0] == ("1", "2.5")
    assert rows.description == "of 15 dev rows the loss fell in 10 and rose in 4"
    assert sum(int(row[1]) for row in rows.rows) == 15
    assert dots.rows == [("accuracy", "0.2000 (0.1000 to 0.3000)", "0.8000 (0.7000 to 0.9000)")]
    assert heat.rows == [("q", "10%", "50%"), ("v", "-", "20%")]
    assert heat.description == "share from 10% (q, layer 0) to 50% (q, layer 1)"
    assert values.description.endswith("q 2, v 1")


def test_the_darkest_cell_is_the_largest() -> None:
    chart = MAKERS[4]()
    assert re.findall(r"heat-(\d)", chart.svg) == ["0", "6", "3"]
    assert chart.scale[0] == "from 10%"
    assert len(chart.scale) == 7


def test_levels() -> None:
    assert levels([1.0, 1.0]) == []
    assert levels([0.0, 7.0]) == pytest.approx([1, 2, 3, 4, 5, 6])
    assert levels([1.0, 128.0]) == pytest.approx([2, 4, 8, 16, 32, 64])


def test_many_points_are_thinned_and_none_invented() -> None:
    many = [(float(n), float(n % 7)) for n in range(100_000)]
    few = thinned(many)
    assert len(few) <= MAX_POINTS
    assert (few[0], few[-1]) == (many[0], many[-1])
    assert 2.9 < sum(y for _, y in few[1:-1]) / (len(few) - 2) < 3.1
    assert thinned(LINE) == LINE


def test_smoothing_does_not_lag() -> None:
    straight = [(float(n), 2.0 * n) for n in range(200)]
    assert [y for _, y in smoothed(straight)] == pytest.approx([y for _, y in straight])
    assert smoothed([(1.0, 5.0)]) == [(1.0, 5.0)]
    noisy = [(float(n), float(n % 2)) for n in range(400)]
    assert all(0.4 < y < 0.6 for _, y in list(smoothed(noisy))[10:-10])


def test_text_of_a_label_is_no_markup() -> None:
    chart = before_after("x", "<b>&", [("<script>$x^2$", Dot(0, 0, 0), Dot(1, 1, 1))])
    assert "<script>" not in chart.svg
    assert "&lt;script&gt;$x^2$" in chart.svg
    assert '<title id="x-title">&lt;b&gt;&amp;</title>' in chart.svg
