"""What ``afina eval`` found of each model: as JSON, and as a table with intervals and what changed below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from afina.printable import printable

if TYPE_CHECKING:
    from afina.engine.intervals import Paired
    from afina.engine.task_results import Sample, TaskResult

SHOWN = 5  # most frequent confusions
MATRIX = 8  # labels up to which the whole confusion matrix is shown


@dataclass
class Column:
    """What one model has shown on the rows; a task file measures no loss."""

    source: str
    task: str
    rows: int
    tokens: int | None
    places: list[str]
    result: TaskResult | None
    metrics: dict[str, float] = field(default_factory=dict)  # all, the loss too
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    differences: dict[str, Paired] = field(default_factory=dict)
    verdict: str | None = None

    @property
    def metric(self) -> str:
        """What the verdict is on."""
        if self.result:
            return self.result.metric
        return "loss" if "loss" in self.differences else "bits_per_byte"

    def to_dict(self, data: str | None) -> dict[str, Any]:
        own = self.result.metrics if self.result else {}
        found: dict[str, Any] = {"model": self.source, "data": data, "task": self.task, "rows": self.rows}
        found |= {name: self.metrics.get(name) for name in ("loss", "perplexity", "bits_per_byte")}
        found |= {"tokens": self.tokens, "metrics": own, "intervals": self.intervals}
        if self.result:
            found |= {"metric": self.metric, "details": self.result.details}
        if self.verdict:
            differences = {name: change._asdict() for name, change in self.differences.items()}
            found["comparison"] = {"metric": self.metric, "verdict": self.verdict, "differences": differences}
        return found


def print_results(columns: Mapping[str, Column], result: Mapping[str, Any]) -> None:
    """Print the table of all columns, and what the task has besides."""
    names = list(dict.fromkeys(name for column in columns.values() for name in _names(column)))
    lines = [["", *columns]]
    changed = {name: column for name, column in columns.items() if column.differences}
    if changed:
        lines[0] += ["difference" if len(changed) == 1 else f"{name} - base" for name in changed]
    counts = [[name, *(_whole(getattr(column, name)) for column in columns.values())] for name in ("rows", "tokens")]
    lines += [line + [""] * len(changed) for line in counts]
    for name in names:
        cells = [_figure(column.metrics.get(name), column.intervals.get(name)) for column in columns.values()]
        for column in changed.values():
            change = column.differences.get(name)
            cells.append(_figure(change.difference, (change.low, change.high), sign=True) if change else "")
        lines.append([name, *cells])
    _print_table(lines, str.ljust)
    for name, column in changed.items():
        change = column.differences[column.metric]
        who = "" if len(changed) == 1 else f"{name}: "
        rows = f"{change.won:,} rows rose, {change.lost:,} fell, {change.tied:,} stayed"
        print(f"{who}{column.metric}: {column.verdict} (p = {change.p:.2g}); {rows}")
    _print_details(result.get("details", {}))


def _names(column: Column) -> list[str]:
    """Metrics in the order in which they are shown: the loss first, then the task's main one."""
    first = [name for name in ("loss", "perplexity", "bits_per_byte") if name in column.metrics]
    main = [column.metric] if column.result else []
    return list(dict.fromkeys([*first, *main, *column.metrics]))


def _print_details(details: Mapping[str, Any]) -> None:
    confusion: Mapping[str, Mapping[str, int]] = details.get("confusion", {})
    labels = sorted({*confusion, *(found for row in confusion.values() for found in row)})
    pairs = [(count, wanted, found) for wanted, row in confusion.items() for found, count in row.items()]
    wrong = sorted((pair for pair in pairs if pair[1] != pair[2]), reverse=True)[:SHOWN]
    if confusion and len(labels) <= MATRIX:
        lines = [["wanted \\ given", *map(short, labels)]]
        lines += [[short(w), *(str(confusion[w].get(found, 0)) for found in labels)] for w in confusion]
        _print_table(lines, str.rjust)
    elif wrong:
        shown = "; ".join(f"{short(wanted)} as {short(found)} {count}" for count, wanted, found in wrong)
        print(f"most often taken for another: {shown}")
    if "turns" in details:
        shown = ", ".join(f"{turn['turn']}: {turn['loss']:.4f} ({turn['rows']:,} rows)" for turn in details["turns"])
        print(f"loss by assistant turn: {shown}")
    for name, signature in details.get("signatures", {}).items():
        print(f"{name}: {signature}")
    if "left_out" in details:
        print(details["left_out"])


def _whole(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _print_table(lines: list[list[str]], justify: Callable[[str, int], str]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for first, *cells in lines:
        shown = [first.ljust(widths[0]), *map(justify, cells, widths[1:])]
        print("  ".join(shown).rstrip())


def _figure(value: float | None, interval: tuple[float, float] | None = None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"

    def shown(number: float) -> str:
        plus = "+" if sign and number else ""
        return f"{number:{plus},.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:{plus}.4g}"

    return shown(value) + (f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else "")


def short(text: str, limit: int = 40) -> str:
    """A text from data or a model on one line, and cut."""
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
