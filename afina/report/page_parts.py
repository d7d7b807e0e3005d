"""Pieces of HTML that the report is made of. Whatever is passed in as text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from afina.printable import printable
from afina.report.charts import Chart
from afina.report.measure import ShownRow

ROW_TEXT = 700  # characters shown of a row
CELL_TEXT = 300  # and of a value in a table


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor, its heading and its HTML."""

    anchor: str
    heading: str
    body: str

    @property
    def html(self) -> str:
        return (
            f'<section aria-labelledby="{self.anchor}"><h2 id="{self.anchor}">{text(self.heading)}</h2>'
            f"{self.body}</section>"
        )

    def emptied(self) -> Section:
        """Without its body, where the page would be too large with it."""
        return replace(self, body=note("Left out: with it, the page would be larger than 3 MB."))


def text(value: object, limit: int = CELL_TEXT) -> str:
    """Plain text as HTML: escaped, what cannot be seen as escapes, cut after ``limit`` characters."""
    shown = str(value)
    more = len(shown) - limit
    shown = shown if more <= 0 else f"{shown[:limit]} … ({more:,} more characters)"
    return html.escape(printable(shown.replace("\n", " ↵ ")))


def note(told: str) -> str:
    return f'<p class="note">{text(told, 2000)}</p>'


def facts_list(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values, as a description list."""
    return f'<dl class="facts">{"".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in pairs)}</dl>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table that scrolls by itself where the page is narrow; the first column names the row."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table class="figures">'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(chart: Chart, explained: str = "") -> str:
    """A chart with its title, and its numbers in a table that can be opened."""
    told = f'<p class="note">{text(explained, 600)}</p>' if explained else ""
    numbers = table(chart.heads, chart.rows, chart.title)
    if chart.scale:
        items = "".join(f'<li><span class="heat-{n}"></span>{text(label)}</li>' for n, label in enumerate(chart.scale))
        told = f'<ul class="scale" aria-label="Scale">{items}</ul>{told}'
    return (
        f"<figure><figcaption>{text(chart.title)}</figcaption>{chart.svg}{told}"
        f"<details><summary>The numbers</summary>{numbers}</details></figure>"
    )


def shown_rows(rows: Sequence[ShownRow]) -> str:
    """Dev rows with their losses and their text, in which what is learnt is marked."""
    items = []
    for row in rows:
        change = row.after - row.before
        head = (
            f'<p class="where">{text(row.where)}<span class="change">{row.before:.3f} → {row.after:.3f} '
            f"({change:+.3f} nats a token, {row.tokens:,} tokens)</span></p>"
        )
        items.append(f"<li>{head}{row_text(row)}</li>")
    return f'<ol class="rows">{"".join(items)}</ol>'


def row_text(row: ShownRow) -> str:
    """A row's text: its end, which holds what is learnt, where it is too long to show whole."""
    left, parts = ROW_TEXT, []
    for piece, learnt in reversed(row.pieces):
        if left <= 0:
            break
        kept = piece[-left:]
        left -= len(kept)
        shown = "".join(html.escape(printable(c)) if c != "\n" else "\n" for c in kept)
        parts.append(f"<mark>{shown}</mark>" if learnt else shown)
    cut = sum(len(piece) for piece, _ in row.pieces) - (ROW_TEXT - max(0, left))
    before = f'<span class="note">… ({cut:,} characters before)</span> ' if cut > 0 else ""
    return f'<pre class="text" dir="auto">{before}{"".join(reversed(parts))}</pre>'
