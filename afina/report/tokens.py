"""Tokens as HTML: text in which each learnt token's background goes by its loss or by its change, and a table.

Two scales of seven levels. Loss: one hue, its lightness falling in even steps. Change against a base: blue where the
loss fell, orange where it rose, so neither needs red told from green. The levels are CSS classes and the colours CSS
variables, which `TOKEN_CSS` defines for light and for dark. Colour says nothing that the table does not say in figures.
"""

from __future__ import annotations

import html
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afina.printable import printable

if TYPE_CHECKING:
    from afina.engine.token_view import Alternative, TokenView

# A level begins where the probability falls below one of these.
PROBABILITIES = (0.9, 0.5, 0.2, 0.05, 0.01, 0.001)
LOSS_BOUNDS = tuple(-math.log(p) for p in PROBABILITIES)
LOSS_LABELS = ("over 90%", "over 50%", "over 20%", "over 5%", "over 1%", "over 0.1%", "less")
# Nats by which the loss changed; the middle level is from -0.1 to 0.1.
CHANGE_BOUNDS = (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0)
CHANGE_LABELS = (
    "-2 and less",
    "-2 to -0.5",
    "-0.5 to -0.1",
    "about the same",
    "+0.1 to +0.5",
    "+0.5 to +2",
    "+2 and more",
)


@dataclass(frozen=True)
class Colours:
    """Background and ink of each level, as #rrggbb; each pair has a contrast of 4.5 and more (WCAG 2.2, AA)."""

    loss: tuple[tuple[str, str], ...]
    change: tuple[tuple[str, str], ...]


_DARK, _LIGHT = "#111111", "#ffffff"
ON_LIGHT = Colours(
    loss=(
        *((background, _DARK) for background in ("#fcf2f7", "#ebcddd", "#dfa4c4", "#d778a7")),
        *((background, _LIGHT) for background in ("#c53e7d", "#b21a60", "#890b47")),
    ),
    change=(
        ("#0c60a3", _LIGHT),
        *((background, _DARK) for background in ("#599fd8", "#bbddf6", "#f2f2ef", "#efd3ac", "#cf8634")),
        ("#91450d", _LIGHT),
    ),
)
ON_DARK = Colours(
    loss=(
        *((background, _LIGHT) for background in ("#392831", "#603b50", "#8d4c72")),
        *((background, _DARK) for background in ("#bf5c8f", "#f16fa7", "#ffa1bf", "#ffd5e2")),
    ),
    change=(
        *((background, _DARK) for background in ("#b1ddff", "#5497d9")),
        *((background, _LIGHT) for background in ("#285077", "#292927", "#694323")),
        *((background, _DARK) for background in ("#d2833b", "#fbd094")),
    ),
)


def _variables(colours: Colours) -> str:
    named = [(f"loss-{n}", pair) for n, pair in enumerate(colours.loss)]
    named += [(f"change-{n}", pair) for n, pair in enumerate(colours.change)]
    return " ".join(f"--{name}: {background}; --{name}-ink: {ink};" for name, (background, ink) in named)


def _classes() -> str:
    names = [f"{scale}-{n}" for scale in ("loss", "change") for n in range(7)]
    return "\n".join(f".{name} {{ background: var(--{name}); color: var(--{name}-ink); }}" for name in names)


# For a page that says `color-scheme: light dark` and has colours of its own: `--page`, `--muted`, `--line`, `--accent`.
TOKEN_CSS = f"""
:root {{ {_variables(ON_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(ON_DARK)} }} }}
{_classes()}
.tokens {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; font-family: ui-monospace, monospace; }}
.tokens .t {{ color: var(--muted); text-decoration: none; border-radius: 2px; padding: 1px 0; }}
.tokens .learnt {{ border-bottom: 2px solid var(--accent); box-decoration-break: clone; }}
.tokens .part {{ padding: 1px 3px; border-right: 1px solid var(--page); }}
.tokens .escape {{ opacity: .75; font-size: .85em; }}
{"".join(f".tokens .loss-{n} {{ color: var(--loss-{n}-ink); }}" for n in range(7))}
{"".join(f".tokens .change-{n} {{ color: var(--change-{n}-ink); }}" for n in range(7))}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 6px; list-style: none; margin: 8px 0; padding: 0;
  font-size: .8rem; }}
.legend li {{ padding: 1px 7px; border-radius: 3px; }}
.legend .name {{ padding-left: 0; color: var(--muted); }}
.scroll {{ overflow-x: auto; }}
.figures {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
.figures th, .figures td {{ padding: 3px 8px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
.figures th {{ font-weight: 600; vertical-align: bottom; }}
.figures .word {{ text-align: left; font-family: ui-monospace, monospace; white-space: pre; unicode-bidi: isolate; }}
.figures thead .word {{ font-family: inherit; }}
.figures tbody th {{ position: sticky; left: 0; background: var(--page); }}
.figures tr:target {{ outline: 2px solid var(--accent); }}
"""


def loss_level(loss: float) -> int:
    """0 where the token was nearly certain, 6 where its probability was below 0.1%."""
    return bisect_right(LOSS_BOUNDS, loss)


def change_level(change: float) -> int:
    """0 where the loss fell by 2 nats and more, 3 where it stayed, 6 where it rose by 2 and more."""
    level = bisect_right(CHANGE_BOUNDS, change)
    return 6 if math.isnan(change) else level


def level_class(view: TokenView, before: TokenView | None) -> str:
    """The CSS class of a token's background: of the change where ``before`` is what the base makes of it, "" where it
    is not learnt."""
    if not view.trained or view.loss is None:
        return ""
    if before is None or before.loss is None:
        return f"loss-{loss_level(view.loss)}"
    return f"change-{change_level(view.loss - before.loss)}"


def figures(view: TokenView, before: TokenView | None = None) -> str:
    """A token's figures in words, for a tooltip."""
    if view.loss is None or view.probability is None:
        return "first token: nothing predicts it"
    text = f"loss {view.loss:.2f}, probability {percent(view.probability)}, rank {view.rank:,}"
    if before is not None and before.loss is not None:
        text += f"; base: loss {before.loss:.2f}, rank {before.rank:,}; change {view.loss - before.loss:+.2f}"
    return text if view.trained else f"{text}; not learnt"


def percent(probability: float) -> str:
    """A probability in per cent, with as many digits as tell it from 0 and from 100."""
    value = 100 * probability
    return f"{value:.1f}%" if value >= 0.1 else f"{value:.1g}%" if value > 1e-3 else "<0.001%"


def legend(*, change: bool = False) -> str:
    """The levels of a scale, as an HTML list."""
    scale, labels = ("change", CHANGE_LABELS) if change else ("loss", LOSS_LABELS)
    name = "change of the loss, in nats" if change else "probability of the token"
    items = "".join(f'<li class="{scale}-{n}">{label}</li>' for n, label in enumerate(labels))
    return f'<ul class="legend"><li class="name">{name}:</li>{items}<li class="name">not learnt: grey</li></ul>'


def token_spans(views: Sequence[TokenView], before: Sequence[TokenView] | None = None, *, link: str = "") -> str:
    """The text of a row as HTML, each token with its colour and, for a mouse, its figures.

    ``before``: the same tokens as the base sees them; the colour is that of the change then. ``link``: each token leads
    to the row of `token_table` with this anchor. Text is escaped, controls are shown as escapes, and a line break as a
    sign before it. A token that adds no text, being a part of a character, is a strip of colour before the character.
    """
    return '<div class="tokens" dir="auto">' + "".join(_spans(views, before, link)) + "</div>"


def _spans(views: Sequence[TokenView], before: Sequence[TokenView] | None, link: str) -> Iterable[str]:
    for n, view in enumerate(views):
        old = None if before is None else before[n]
        kinds = ["learnt"] * view.trained + ["part"] * (not view.text)
        names = " ".join(["t", *kinds, level_class(view, old)]).rstrip()
        tag, where = ("a", f' href="#{html.escape(link)}{n}"') if link else ("span", "")
        yield f'<{tag} class="{names}"{where} title="{html.escape(figures(view, old))}">{_shown(view)}</{tag}>'


def _shown(view: TokenView) -> str:
    parts = []
    for character in view.text:
        shown = printable(character)
        if character == "\n":
            parts.append('<span class="escape">↵</span>\n')
        elif shown == character:
            parts.append(html.escape(character))
        else:
            parts.append(f'<span class="escape">{shown}</span>')
    return "".join(parts)


def quoted(text: str) -> str:
    """A token as a table shows it: between quotes, since spaces count."""
    return f'"{printable(text)}"'


def alternatives(found: Iterable[Alternative]) -> str:
    return "  ".join(f"{quoted(each.text)} {percent(each.probability)}" for each in found)


def token_table(
    views: Sequence[TokenView], before: Sequence[TokenView] | None = None, *, link: str = "", caption: str = ""
) -> str:
    """All figures of a row's tokens as an HTML table; ``link``: the anchors that `token_spans` leads to."""
    sides = [("", views)] if before is None else [("base: ", before), ("model: ", views)]
    heads = ["position", "id", "learnt"]
    cells = "".join(f'<th scope="col">{head}</th>' for head in heads) + '<th scope="col" class="word">text</th>'
    for name, _ in sides:
        cells += "".join(f'<th scope="col">{name}{head}</th>' for head in ("loss", "probability", "rank"))
    cells += "" if before is None else '<th scope="col">change of the loss</th>'
    cells += "".join(f'<th scope="col" class="word">{name}likeliest tokens</th>' for name, _ in sides)
    rows = []
    for n, view in enumerate(views):
        anchor = f' id="{html.escape(link)}{n}"' if link else ""
        row = f"<td>{view.position}</td><td>{view.id}</td><td>{'yes' if view.trained else 'no'}</td>"
        row += f'<th scope="row" class="word">{html.escape(quoted(view.text or view.piece))}</th>'
        row += "".join("".join(f"<td>{cell}</td>" for cell in numbers(side[n])) for _, side in sides)
        if before is not None:
            row += f'<td class="{level_class(view, before[n])}">{change(view, before[n])}</td>'
        row += "".join(f'<td class="word">{html.escape(alternatives(side[n].top))}</td>' for _, side in sides)
        rows.append(f"<tr{anchor}>{row}</tr>")
    head = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    table = f'<table class="figures">{head}<thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption or "tokens")}">{table}</div>'
    )


def numbers(view: TokenView) -> tuple[str, str, str]:
    """Loss, probability and rank as text, dashes for a first token."""
    if view.loss is None or view.probability is None:
        return "-", "-", "-"
    return f"{view.loss:.3f}", percent(view.probability), f"{view.rank:,}"


def change(view: TokenView, before: TokenView) -> str:
    return "-" if view.loss is None or before.loss is None else f"{view.loss - before.loss:+.3f}"
