"""Pictures of benchmark rows: the roofline, and the time of each provider relative to ours.

    python benchmarks/plot.py benchmarks/results/gpu_*/benchmarks.jsonl --output benchmarks/results/gpu_h100

Writes roofline.png and .svg and times.png and .svg into the folder. Rows of several files are taken together, the
last one of a kind counts; skipped rows are left out. Needs matplotlib (the `peers` extra).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "afina"
# Colours by provider, so that a peer keeps its own in every picture.
COLOURS = {
    "afina": "#d1495b",
    "afina-lean": "#e8909c",
    "afina-sdpa": "#edae49",
    "afina-torch": "#f3d5a0",
    "eager": "#8d99ae",
    "compile": "#5c677d",
    "torch": "#33415c",
    "torch-fused": "#33415c",
    "torch-foreach": "#7d8597",
    "torch-linear": "#33415c",
    "flash": "#00798c",
    "cudnn": "#30a46c",
    "efficient": "#7cc6a4",
    "varlen": "#4d9de0",
    "flex": "#3d5a80",
    "flash-attn": "#1b4965",
    "sdpa": "#00798c",
    "liger": "#8e5aa8",
    "fla": "#b58cc9",
    "cce": "#6a4c93",
    "bitsandbytes": "#6a4c93",
    "transformers-sdpa": "#00798c",
    "transformers-eager": "#8d99ae",
    "transformers-liger": "#8e5aa8",
    "peft": "#00798c",
    "peft-liger": "#8e5aa8",
}
MARKERS = {"attention": "o", "linear_cross_entropy": "s", "decode": "^"}
LEAST, WIDEST = 0.25, 16.0  # bars begin and end here; the label of a longer one says how far it would go

Row = dict[str, Any]


def read(files: Iterable[Path]) -> list[Row]:
    """The timed rows of the files, one for each op, case, pass and provider."""
    found: dict[tuple[str, ...], Row] = {}
    for file in files:
        for line in file.read_text().splitlines():
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            if "ms" in row:
                found[tuple(row[key] for key in ("op", "case", "pass", "provider"))] = row
    return list(found.values())


def whole(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(op, case) -> provider -> its row of both passes, or of the only one."""
    chosen: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["pass"] == "backward":
            continue
        mine = chosen.setdefault((row["op"], row["case"]), {})
        if row["pass"] != "forward" or row["provider"] not in mine:
            mine[row["provider"]] = row
    return chosen


def relative(providers: dict[str, Row]) -> list[tuple[str, float, float]]:
    """(provider, time / ours, ms), fastest first; nothing where ours is missing."""
    if OURS not in providers:
        return []
    ours = providers[OURS]["ms"]
    return sorted(((name, row["ms"] / ours, row["ms"]) for name, row in providers.items()), key=lambda bar: bar[1])


def points(rows: Sequence[Row]) -> list[tuple[str, str, str, float, float]]:
    """(op, case, provider, operations a byte, TFLOP/s) of the rows that count operations and bytes."""
    made = []
    for (op, case), providers in whole(rows).items():
        for name, row in providers.items():
            if row.get("flops") and row.get("bytes"):
                made.append((op, case, name, row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9))
    return sorted(made, key=lambda point: point[3])


def columns(found: Sequence[tuple[str, str, str, float, float]]) -> list[tuple[str, list[str], float]]:
    """(op, cases, intensity): cases of one op whose intensities are all but the same stand in one column."""
    made: list[tuple[str, list[str], float]] = []
    for op, case, _, x, _ in found:
        for other, cases, at in made:
            if other == op and abs(x / at - 1) < 0.02:
                if case not in cases:
                    cases.append(case)
                break
        else:
            made.append((op, [case], x))
    return made


def spread(places: Sequence[float], least: float) -> list[float]:
    """Rising places moved as little as leaves `least` between neighbours."""
    groups: list[list[float]] = []  # [sum of (place - index * least), count, first index]
    for i, place in enumerate(places):
        groups.append([place - i * least, 1, i])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count, _ = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    out = []
    for total, count, first in groups:
        out += [total / count + (int(first) + j) * least for j in range(int(count))]
    return out


def _colour(name: str) -> str:
    return COLOURS.get(name, "#9aa0a6")


def _dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 120


def _about(rows: Sequence[Row]) -> str:
    row = rows[0]
    versions = row.get("versions", {})
    words = [row.get("device", ""), *(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)]
    return ", ".join(word for word in words if word) + (" (no statement about performance)" if row.get("note") else "")


def roofline(rows: Sequence[Row]) -> Any:
    """Achieved rate over intensity, under what the GPU reached in a matrix product and a copy; None without rows."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    found = points(rows)
    if not found:
        return None
    stacks = columns(found)
    names = [name for name in COLOURS if any(name == point[2] for point in found)]
    names += sorted({point[2] for point in found} - set(names))
    figure, axes = plt.subplots(figsize=(11, 6.6), layout="constrained")
    low, high = min(x for *_, x, _ in found) / 3, max(x for *_, x, _ in found) * 3
    bottom, top = min(y for *_, y in found) / 2, max(y for *_, y in found) * 2
    peak, bandwidth = (
        next((row[key] for row in rows if row.get(key)), None) for key in ("ceiling_tflops", "ceiling_gbps")
    )
    if peak and bandwidth:
        ridge = 1e3 * peak / bandwidth
        low, high, top = min(low, ridge / 3), max(high, ridge * 3), max(top, peak * 2.2)
        axes.plot([low, ridge, high], [low * bandwidth / 1e3, peak, peak], color="#222", lw=1.6, zorder=1)
        axes.annotate(
            f"{peak:,.0f} TFLOP/s: bf16 matrix product, measured", (high, peak), (-4, 6), textcoords="offset points",
            ha="right", fontsize=9, zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    for op, _, name, x, y in found:
        ours = name.startswith(OURS)
        axes.scatter(
            x, y, s=70 if ours else 36, marker=MARKERS.get(op, "D"), color=_colour(name), zorder=4 if ours else 3,
            edgecolor="#222" if ours else "white", linewidth=0.9 if ours else 0.5,
        )  # fmt: skip
    # A column's number stands above the roof, moved aside where columns are close.
    span = math.log10(high / low)
    numbers = spread([math.log10(x) for *_, x in stacks], 0.028 * span)
    for number, ((op, cases, x), place) in enumerate(zip(stacks, numbers), start=1):
        rates = [y for other, case, _, _, y in found if other == op and case in cases]
        height = max(rates)
        axes.plot([x, x], [min(rates), height], color="#bbb", lw=0.8, zorder=2)
        axes.annotate(
            str(number), (x, height), (10**place, 1.02), xycoords="data", textcoords=("data", "axes fraction"),
            ha="center", va="bottom", fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": "#ddd", "lw": 0.6, "shrinkB": 4},
        )  # fmt: skip
    if peak and bandwidth:
        # Beside the slope, turned as it is drawn.
        x = math.sqrt(low * min(ridge, high))
        figure.canvas.draw()
        (x0, y0), (x1, y1) = axes.transData.transform([(low, low * bandwidth), (x, x * bandwidth)])
        axes.annotate(
            f"{bandwidth:,.0f} GB/s: copy, measured", (x, x * bandwidth / 1e3), (-3, 6), textcoords="offset points",
            rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)), rotation_mode="anchor", ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_xlabel("operations / byte of memory traffic, as counted from the shapes")
    axes.set_ylabel("TFLOP/s achieved")
    axes.grid(True, which="major", color="#eee", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D(
            [], [], marker="o", ls="", color=_colour(name), label=name, markeredgecolor="#222" if OURS in name else "w"
        )
        for name in names
    ]
    numbered = [
        Line2D(
            [],
            [],
            marker=MARKERS.get(op, "D"),
            ls="",
            color="#888",
            markersize=5,
            label=f"{i}  {op}: {', '.join(cases)}",
        )
        for i, (op, cases, _) in enumerate(stacks, start=1)
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9, title="provider")
    figure.legend(
        handles=numbered, loc="outside lower left", ncols=1 if len(numbered) < 4 else 2, frameon=False, fontsize=8.5
    )
    figure.suptitle(f"Roofline: {_about(rows)}", fontsize=11)
    return figure


def times(rows: Sequence[Row]) -> Any:
    """Bars of time / ours on a log axis, a panel an op; right of 1 is slower than ours. None where ours is missing."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    panels: dict[str, list[tuple[str, list[tuple[str, float, float]]]]] = {}
    for (op, case), providers in whole(rows).items():
        if len(bars := relative(providers)) > 1:
            panels.setdefault(op, []).append((case, bars))
    if not panels:
        return None
    heights = [sum(len(bars) + 1.6 for _, bars in cases) for cases in panels.values()]
    # Columns of panels, each panel in the shortest so far.
    count = min(len(panels), 1 if sum(heights) < 40 else 2 if sum(heights) < 120 else 3)
    stacks: list[list[str]] = [[] for _ in range(count)]
    tall = [0.0] * count
    for op, height in sorted(zip(panels, heights), key=lambda pair: -pair[1]):
        shortest = tall.index(min(tall))
        stacks[shortest].append(op)
        tall[shortest] += height + 3
    size = dict(zip(panels, heights))
    figure = plt.figure(figsize=(7 * count, 0.19 * max(tall) + 1.1))
    inch = 1 / figure.get_figheight()
    unit = (1 - 1.1 * inch) / max(tall)
    for i, stack in enumerate(stacks):
        place = 1 - 0.8 * inch
        for op in stack:
            height = size[op] * unit
            axes = figure.add_axes(((i + 0.04) / count, place - height - unit, 0.92 / count, height))
            place -= height + 3 * unit
            _panel(axes, op, panels[op])
            axes.set_xscale("log", base=2)
            axes.set_xlim(LEAST, 1.5 * WIDEST)
            ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticklabels([f"{tick:g}x" for tick in ticks], fontsize=8)
    title = f"Time relative to {OURS} (1x; shorter is faster; log axis)\n{_about(rows)}"
    figure.suptitle(title, fontsize=11, y=1 - 0.12 * inch, va="top")
    return figure


def _panel(axes: Any, op: str, cases: list[tuple[str, list[tuple[str, float, float]]]]) -> None:
    y = 0.0
    for case, bars in cases:
        axes.text(1.04 * LEAST, y, case, fontsize=8.5, va="center", ha="left", fontweight="bold", zorder=5)
        y += 1
        for name, ratio, ms in bars:
            end = min(max(ratio, 1.1 * LEAST), WIDEST)
            axes.barh(y, end - LEAST, left=LEAST, height=0.78, color=_colour(name), zorder=3)
            text = f"{name}  {ratio:.2f}x  {_ms(ms)}" if ratio >= 0.1 else f"{name}  {ratio:.1g}x  {_ms(ms)}"
            weight = "bold" if name == OURS else "normal"
            if ratio > 3:  # inside, where there is room
                text = f"{text} " if ratio <= WIDEST else f"{text} \u25b8 "
                ink = "white" if _dark(_colour(name)) else "black"
                axes.text(end, y, text, fontsize=8, va="center", ha="right", zorder=5, fontweight=weight, color=ink)
            else:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
                at = end * 1.03
                axes.text(at, y, text, fontsize=8, va="center", ha="left", zorder=5, fontweight=weight, bbox=box)
            y += 1
        y += 0.6
    axes.axvline(1, color=_colour(OURS), lw=1, ls=(0, (3, 2)), zorder=4)
    axes.set_ylim(y - 0.6, -0.8)
    axes.set_yticks([])
    axes.set_title(op, loc="left", fontsize=10.5, fontweight="bold")
    axes.grid(True, axis="x", color="#eee", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _ms(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms" if ms >= 0.1 else f"{1e3 * ms:.0f} µs"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures that the rows allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text in an SVG stays text, and the same rows give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "afina", "font.family": "DejaVu Sans"})
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("roofline", roofline(rows)), ("times", times(rows))):
        if figure is None:
            continue
        for kind in ("png", "svg"):
            made.append(folder / f"{name}.{kind}")
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(made[-1], dpi=150, facecolor="white", metadata=metadata)
        plt.close(figure)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines of the benchmarks")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the pictures (default: here)")
    args = parser.parse_args()
    rows = read(args.files)
    if not rows:
        print(f"plot.py: no timed row in {', '.join(map(str, args.files))}", file=sys.stderr)
        return 2
    for path in draw(rows, args.output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
