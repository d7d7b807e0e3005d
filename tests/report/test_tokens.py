"""Tokens as HTML: nothing of a row is markup, the scales are ordered and readable, the table has every figure."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from afina.engine.token_view import Alternative, TokenView
from afina.printable import printable
from afina.report import tokens
from afina.report.tokens import ON_DARK, ON_LIGHT, TOKEN_CSS, Colours, token_spans, token_table

NASTY = "<script>alert(1)</script>&\"'"


def view(n: int, text: str, loss: float | None = 1.0, *, trained: bool = True, piece: str | None = None) -> TokenView:
    if loss is None:
        return TokenView(n, 7 + n, text, trained, None, None, None, (), piece or text)
    top = (Alternative(3, NASTY, 0.5), Alternative(4, "\x1b[31m\u202e", 0.25))
    return TokenView(n, 7 + n, text, trained, loss, math.exp(-loss), 1 + n, top, piece or text)


VIEWS = [
    view(0, "a", None, trained=False),
    view(1, NASTY),
    view(2, "\n\x1b[0m\u202eb", 0.01),
    view(3, "", 9.0, piece="\\xe2"),
]
BASE = [
    view(0, "a", None, trained=False),
    view(1, NASTY, 3.5),
    view(2, "\n\x1b[0m\u202eb", 0.02),
    view(3, "", 8.2, piece="\\xe2"),
]


class Reader(HTMLParser):
    """The tags with their attributes, and the text, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def lightness(colour: str) -> float:
    return 116 * luminance(colour) ** (1 / 3) - 16


@pytest.mark.parametrize(("colours", "dark"), [(ON_LIGHT, False), (ON_DARK, True)])
def test_the_scales_are_ordered_by_lightness_and_readable(colours: Colours, dark: bool) -> None:
    for background, ink in (*colours.loss, *colours.change):
        low, high = sorted((luminance(background), luminance(ink)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (background, ink)
    steps = [lightness(background) for background, _ in colours.loss]
    differences = [b - a if dark else a - b for a, b in pairwise(steps)]
    assert min(differences) > 8  # seen as steps, also without colour
    assert max(differences) < 2 * min(differences)
    away = [abs(lightness(background) - lightness(colours.change[3][0])) for background, _ in colours.change]
    assert away[:4] == sorted(away[:4], reverse=True)
    assert away[3:] == sorted(away[3:])
    # Blue against orange: the two ends differ in what people with any colour blindness see, blue against yellow.
    for n, sign in ((0, 1), (1, 1), (5, -1), (6, -1)):
        red, _, blue = (int(colours.change[n][0][i : i + 2], 16) for i in (1, 3, 5))
        assert sign * (blue - red) > 40


def test_levels() -> None:
    assert [tokens.loss_level(-math.log(p)) for p in (1, 0.91, 0.6, 0.3, 0.1, 0.02, 0.002, 1e-9)] == [
        0,
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert [tokens.change_level(c) for c in (-3, -1, -0.2, 0, 0.2, 1, 3)] == list(range(7))
    assert tokens.loss_level(math.nan) == tokens.change_level(math.nan) == 6
    assert tokens.loss_level(math.inf) == 6
    assert len(tokens.LOSS_LABELS) == len(tokens.CHANGE_LABELS) == 7


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é世🙂", "plain é世🙂"),
        ("\n\t\x1b[0m\x00\x9b", "\\n\\t\\x1b[0m\\x00\\x9b"),
        ("\u202e\u2066\u200b\ufeff\u00a0\u2028", "\\u202e\\u2066\\u200b\\ufeff\\xa0\\u2028"),
        ("\ud83d \U000e0001", "\\ud83d \\U000e0001"),
    ],
)
def test_what_cannot_be_seen_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_text_of_a_row_is_never_markup() -> None:
    for page in (
        token_spans(VIEWS, link="x"),
        token_spans(VIEWS, BASE),
        token_table(VIEWS, BASE, link="x", caption=NASTY),
    ):
        read = Reader(page)
        assert "script" not in {tag for tag, _ in read.tags}
        assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
        assert NASTY in read.text
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", page)
        assert "\\x1b[0m\\u202e" in read.text


def test_each_token_has_its_level_and_leads_to_its_row_of_the_table() -> None:
    read = Reader(token_spans(VIEWS, link="r1t"))
    links = [attributes for tag, attributes in read.tags if tag == "a"]
    assert [a["href"] for a in links] == ["#r1t0", "#r1t1", "#r1t2", "#r1t3"]
    assert [a["class"] for a in links] == ["t", "t learnt loss-2", "t learnt loss-0", "t learnt part loss-6"]
    assert read.text == f"a{NASTY}↵\n\\x1b[0m\\u202eb"
    changed = [a["class"] for tag, a in Reader(token_spans(VIEWS, BASE)).tags if (a["class"] or "").startswith("t ")]
    assert changed == ["t learnt change-0", "t learnt change-3", "t learnt part change-5"]
    anchors = [a["id"] for tag, a in Reader(token_table(VIEWS, link="r1t")).tags if tag == "tr" and "id" in a]
    assert anchors == ["r1t0", "r1t1", "r1t2", "r1t3"]


def test_what_is_not_learnt_has_no_colour() -> None:
    asked = [view(0, "a", None, trained=False), view(1, "b", 3.0, trained=False)]
    assert [a["class"] for tag, a in Reader(token_spans(asked)).tags if tag == "span"] == ["t", "t"]
    assert "not learnt" in token_spans(asked)
    assert "change-" not in token_spans(asked, BASE[:2])


def test_the_table_says_everything_that_colour_says() -> None:
    page = token_table(VIEWS, BASE, caption="all")
    rows = [re.sub("<[^>]*>", "|", row) for row in re.findall("<tr.*?</tr>", page)]
    assert len(rows) == 1 + len(VIEWS)
    for cell in ("3.500", "1.000", "36.8%", "-2.500", "yes"):
        assert f"|{cell}|" in rows[2], cell
    assert "|no|" in rows[1]
    assert "|&quot;\\xe2&quot;|" in rows[4]
    assert page.count("<table") == page.count("</table>") == 1
    assert 'scope="col"' in page
    assert 'scope="row"' in page


def test_the_css_has_every_class_that_is_used() -> None:
    used = set(re.findall(r'class="([^"]*)"', token_spans(VIEWS, BASE) + token_spans(VIEWS) + tokens.legend()))
    for name in {name for names in used for name in names.split()} - {"t"}:
        assert f".{name}" in TOKEN_CSS, name
    for n in range(7):
        assert TOKEN_CSS.count(f"--loss-{n}:") == TOKEN_CSS.count(f"--change-{n}:") == 2  # light and dark


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(1.0, "100.0%"), (0.123, "12.3%"), (0.001, "0.1%"), (0.00042, "0.04%"), (1e-7, "<0.001%")],
)
def test_percent(probability: float, shown: str) -> None:
    assert tokens.percent(probability) == shown
