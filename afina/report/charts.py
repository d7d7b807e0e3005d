"""The report's figures, as SVG that stands in the page.

Matplotlib draws with stand-in colours, which become CSS variables afterwards, so that a figure follows the page into
the dark. Text stays text (``svg.fonttype`` none), so a browser sets it in the page's font. Ids carry the figure's name,
since a page has several, and come out of a fixed salt; there is no date: the same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from afina.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]
MAX_POINTS = 400  # of a curve; more than a figure has pixels for
TABLE_ROWS = 60  # of a curve's numbers
WIDTH = 5.8  # inches
MAX_LABEL = 24  # characters of a name

# Stand-ins for the page's colours. The heat map's levels follow them.
INK, MUTED, GRID, ONE, TWO, FAINT, PAGE = (f"#0000a{n}" for n in range(7))
LEVELS = tuple(f"#0000b{n}" for n in range(7))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", ONE: "series-1", TWO: "series-2", FAINT: "series-faint"}
_VARIABLES |= {PAGE: "page"} | {colour: f"heat-{n}" for n, colour in enumerate(LEVELS)}
_RC: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "afina",
    "font.family": "DejaVu Sans",  # it comes with matplotlib, so a layout is the same everywhere
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "path.simplify": False,
    "axes.formatter.useoffset": False,
}


class Chart(NamedTuple):
    """A figure: its ``svg``, and what it shows in words and numbers for those who do not see it."""

    name: str
    title: str
    description: str
    svg: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    scale: tuple[str, ...] = ()  # of a heat map: what each level stands for


class Dot(NamedTuple):
    """A value before or after, with its interval."""

    value: float
    low: float
    high: float


def curves(
    name: str,
    title: str,
    *,
    line: Points,
    label: str,
    smooth: bool = False,
    marks: Points = (),
    marks_label: str = "",
    best: tuple[float, float] | None = None,
    level: tuple[float, str] | None = None,
    log: bool = False,
) -> Chart:
    """A figure of values by step: ``line``, with ``smooth`` also its moving mean; ``marks``, points of another series;
    a ring around ``best``; a dashed line at ``level``."""
    shown = thinned(line)
    with _figure() as (axes, finish):
        if smooth:
            axes.plot(*zip(*shown), color=FAINT, linewidth=0.8)
            shown = thinned(smoothed(line))
        axes.plot(*zip(*shown), color=ONE, linewidth=1.6, label=f"{label}, smoothed" if smooth else label)
        if marks:
            axes.plot(
                *zip(*thinned(marks)), color=TWO, linewidth=1.4, linestyle="--", marker="o", markersize=4,
                label=marks_label,
            )  # fmt: skip
        if best:
            axes.plot(*best, marker="o", markersize=10, markerfacecolor="none", color=TWO, label="best", linestyle="")
        if level:
            axes.axhline(level[0], color=MUTED, linewidth=1, linestyle=":", label=level[1])
        if log:
            _log_scale(axes, [y for _, y in shown])
        axes.set(xlabel="step")
        if marks or best or level or smooth:
            axes.legend()
        first, last = line[0], line[-1]
        told = f"{label} from {first[1]:.4g} at step {first[0]:,.0f} to {last[1]:.4g} at step {last[0]:,.0f}"
        if marks:
            low = min(marks, key=lambda point: point[1])
            told += f"; {marks_label} from {marks[0][1]:.4g} to {marks[-1][1]:.4g}"
            told += f", lowest {low[1]:.4g} at step {low[0]:,.0f}"
        svg = finish(name, title, told)
    return Chart(name, title, told, svg, *_table(line, label, marks, marks_label))


def _table(line: Points, label: str, marks: Points, marks_label: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Steps and values, as many as can be read: at every mark the line's value there, else evenly spaced ones."""
    values = dict(line)
    if not marks:
        few = line[:: max(1, math.ceil(len(line) / TABLE_ROWS))]
        return ("step", label), [(f"{x:,.0f}", f"{y:.4g}") for x, y in few]
    few = marks[:: max(1, math.ceil(len(marks) / TABLE_ROWS))]
    return ("step", marks_label, label), [
        (f"{x:,.0f}", f"{y:.4f}", f"{values[x]:.4f}" if x in values else "-") for x, y in few
    ]


def histogram(name: str, title: str, changes: Sequence[float], *, of: str, bins: int = 30) -> Chart:
    """How many ``of`` something changed by how many nats a token; zero is marked. What lies farther out than all but a
    hundredth counts at the edge."""
    import numpy as np

    low, high = (float(v) for v in np.quantile(changes, [0.01, 0.99]))
    edge = max(abs(low), abs(high), 1e-6)
    counts, edges = np.histogram(np.clip(changes, -edge, edge), bins=bins, range=(-edge, edge))
    fell, rose = sum(v < 0 for v in changes), sum(v > 0 for v in changes)
    told = f"of {len(changes):,} {of} the loss fell in {fell:,} and rose in {rose:,}"
    with _figure(height=2.5) as (axes, finish):
        colours = [ONE if right <= 1e-12 else TWO for right in edges[1:]]
        axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=colours)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set(xlabel="change, nats a token", ylabel=of)
        axes.locator_params(axis="x", nbins=6)
        svg = finish(name, title, told)
    rows = [(f"{a:+.3f} to {b:+.3f}", f"{count:,}") for a, b, count in zip(edges, edges[1:], counts.tolist()) if count]
    return Chart(name, title, told, svg, ("change, nats a token", of), rows)


def before_after(name: str, title: str, metrics: Sequence[tuple[str, Dot, Dot]], *, unit: str = "") -> Chart:
    """Metrics before and after, each with its interval, on one scale, in ``unit``."""
    labels = [label_of(metric) for metric, _, _ in metrics]
    with _figure(height=0.75 + 0.5 * len(metrics), labels=labels) as (axes, finish):
        for row, (_, one, two) in enumerate(metrics):
            for shift, dot, colour, marker in ((-0.14, one, MUTED, "o"), (0.14, two, ONE, "s")):
                axes.plot([dot.low, dot.high], [row + shift] * 2, color=colour, linewidth=2)
                label = {"o": "before", "s": "after"}[marker] if row == 0 else None
                axes.plot(dot.value, row + shift, color=colour, marker=marker, markersize=6, linestyle="", label=label)
        axes.set_yticks(range(len(metrics)), labels)
        axes.set_ylim(len(metrics) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=unit)
        axes.legend(loc="best")
        told = "; ".join(f"{metric} {one.value:.3f} before, {two.value:.3f} after" for metric, one, two in metrics)
        svg = finish(name, title, told)
    rows = [
        (metric, *(f"{dot.value:.4f} ({dot.low:.4f} to {dot.high:.4f})" for dot in (one, two)))
        for metric, one, two in metrics
    ]
    return Chart(name, title, told, svg, ("metric", "before", "after"), rows)


def heat_map(
    name: str, title: str, unit: str, cells: Mapping[tuple[str, int], float], show: Callable[[float], str]
) -> Chart:
    """Values by kind of matrix (rows) and layer (columns), in seven levels from the least to the largest of them.

    ``show``: how a value is written.
    """
    from matplotlib.collections import PolyCollection

    kinds, layers = sorted({kind for kind, _ in cells}), sorted({layer for _, layer in cells})
    place, line = ({key: n for n, key in enumerate(keys)} for keys in (layers, kinds))
    bounds = levels(cells.values())
    squares, colours = [], []
    for (kind, layer), value in cells.items():
        x, y = place[layer], line[kind]
        squares.append([(x + 0.04, y + 0.04), (x + 0.96, y + 0.04), (x + 0.96, y + 0.96), (x + 0.04, y + 0.96)])
        colours.append(LEVELS[bisect_right(bounds, value)])
    most, least = (pick(cells, key=lambda cell: cells[cell]) for pick in (max, min))
    told = (
        f"{unit} from {show(cells[least])} ({least[0]}, layer {least[1]}) to {show(cells[most])} ({most[0]}, layer "
        f"{most[1]})"
    )
    labels = [label_of(kind) for kind in kinds]
    with _figure(height=0.9 + 0.32 * len(kinds), labels=labels) as (axes, finish):
        axes.add_collection(PolyCollection(squares, facecolors=colours, edgecolors="none"))
        axes.set(xlim=(0, len(layers)), ylim=(len(kinds), 0), xlabel="layer")
        axes.set_yticks([n + 0.5 for n in range(len(kinds))], labels)
        every = max(1, math.ceil(len(layers) / 16))
        axes.set_xticks([n + 0.5 for n in range(0, len(layers), every)], [str(layer) for layer in layers[::every]])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        svg = finish(name, title, told)
    rows = [
        (kind, *(show(cells[kind, layer]) if (kind, layer) in cells else "-" for layer in layers)) for kind in kinds
    ]
    heads = ("matrix", *(f"layer {layer}" for layer in layers))
    edges = [f"from {show(bound)}" for bound in (cells[least], *bounds)]
    return Chart(name, title, told, svg, heads, rows, tuple(edges))


def levels(values: Iterable[float]) -> list[float]:
    """Where the seven levels of a heat map begin, but for the first: in equal steps, or in equal ratios where the
    largest value is many times the least. None where all values are the same."""
    low, high = min(values := list(values)), max(values)
    if high - low <= 1e-9 * abs(high):
        return []
    steps = range(1, len(LEVELS))
    if low > 0 and high > 4 * low:
        return [low * (high / low) ** (n / len(LEVELS)) for n in steps]
    return [low + (high - low) * n / len(LEVELS) for n in steps]


def spectra(name: str, title: str, kinds: Mapping[str, Sequence[float]]) -> Chart:
    """Singular values of each kind of matrix, as shares of the largest."""
    marks = "osD^v<>Pd*"
    with _figure() as (axes, finish):
        for n, (kind, values) in enumerate(kinds.items()):
            axes.plot(
                range(1, len(values) + 1), values, color=(ONE, TWO, MUTED)[n % 3], linewidth=1.2, markersize=4,
                marker=marks[n % len(marks)], linestyle=("-", "--", ":")[n // 3 % 3], label=label_of(kind),
            )  # fmt: skip
        axes.set(xlabel="singular value, largest first", ylabel="share of the largest", ylim=(0, 1.03))
        axes.legend(fontsize=8, ncols=2)
        halves = {kind: sum(value >= 0.5 for value in values) for kind, values in kinds.items()}
        told = "singular values of at least half the largest: " + ", ".join(f"{k} {n}" for k, n in halves.items())
        svg = finish(name, title, told)
    longest = max(map(len, kinds.values()))
    rows = [(kind, *(f"{v:.3f}" for v in values), *["-"] * (longest - len(values))) for kind, values in kinds.items()]
    return Chart(name, title, told, svg, ("matrix", *map(str, range(1, longest + 1))), rows)


def label_of(name: str) -> str:
    """A name of a file's own, such as a tensor's, as a figure can show it."""
    return printable(name if len(name) <= MAX_LABEL else f"{name[:MAX_LABEL]}…")


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """At most so many points: means of neighbours, the first and the last as they are."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most - 2))
    groups = [points[start : start + size] for start in range(1, len(points) - 1, size)]
    middle = [tuple(math.fsum(column) / len(group) for column in zip(*group)) for group in groups]
    return [points[0], *middle, points[-1]]  # type: ignore[list-item]  # pairs again


def smoothed(points: Points) -> Points:
    """Each point as the mean of its neighbours, a twentieth of all points around it and fewer at both ends, so that the
    curve neither lags behind nor is pulled at its ends."""
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    reach = len(points) // 40
    found = []
    for n, (x, _) in enumerate(points):
        side = min(reach, n, len(points) - 1 - n)
        found.append((x, (sums[n + side + 1] - sums[n - side]) / (2 * side + 1)))
    return found


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, some inside each power of ten where there are few powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    few = max(values) / min(values) < 1000
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@contextmanager
def _figure(*, height: float = 3.0, labels: Sequence[str] = ()) -> Iterator[tuple[Axes, Any]]:
    """Axes to draw in, and what makes SVG of them: ``finish(name, title, description)``.

    Margins are set here, by the length of the ``labels`` beside the axes: to have matplotlib find them takes as long as
    the drawing. ``height`` in inches; a figure is as wide as fits twice beside each other.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        left = max([0.72, *(0.25 + 0.085 * len(label) for label in labels)])
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((left / WIDTH, 0.5 / height, 1 - (left + 0.1) / WIDTH, 1 - 0.58 / height))

        def finish(name: str, title: str, description: str) -> str:
            out = io.StringIO()
            with warnings.catch_warnings():  # a name in another script: the browser has a font for it
                warnings.simplefilter("ignore", UserWarning)
                figure.savefig(out, format="svg", metadata={"Date": None})
            return inline(out.getvalue(), name, title, description)

        yield axes, finish


def inline(svg: str, name: str, title: str, description: str) -> str:
    """Matplotlib's SVG file as part of a page: unique ids, the page's colours and font, a title and a description."""
    body = svg[svg.index("<svg") :]
    start, body = body.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', start)
    assert view is not None
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->|\n", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    # The font's size stays; its family is the page's.
    body = re.sub(r"font: (?:[\w]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    label = f'<title id="{name}-title">{html.escape(printable(title))}</title>'
    label += f'<desc id="{name}-desc">{html.escape(printable(description))}</desc>'
    head = f'<svg class="chart" role="img" aria-labelledby="{name}-title {name}-desc" {view[0]}>'
    return head + label + body
