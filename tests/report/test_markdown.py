"""Whatever a file, a model or a setting is called, it is shown and never becomes markup, a link or another page."""

from __future__ import annotations

import re

import pytest
import yaml

from afina.report.markdown import LONGEST, block, code, front_matter, prose, table

NASTY = [
    "# heading", "- item", "1. item", "1) item", "> quote", "* a *b*", "__init__", "`code` ``", "``", "`", "a|b|c",
    "<b>x</b>", "<script>alert(1)</script>", "[a](http://b)", "![a](b)", "a\n\nb", "a\r\n# b", "---\nx: y\n---",
    "&lt;b&gt;", "~~a~~", "http://evil.example/", "www.evil.example", "a@b.example", "\\", "a\\|b", "\x1b[31mred",
    "\u202etxt.exe", "a\u2028b", "===", "+ a", ": a", "$x$", "<!-- a -->", "```\nout", "", " ", "\ud800", "| -- |",
    "[^1]", "==a==", "\\`a\\`",
]  # fmt: skip


markdown_it = pytest.importorskip("markdown_it")
READER = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])


def words(markdown: str) -> str:
    """What a reader of CommonMark with tables shows."""
    html = READER.render(markdown)
    assert not re.search(r"<(?!/?(?:p|code|table|thead|tbody|tr|th|td|h1)>)", html), html
    text = re.sub(r"<[^>]+>", "", html)
    for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, letter)
    return text


@pytest.mark.parametrize("nasty", NASTY)
def test_a_value_is_shown_as_it_is(nasty: str) -> None:
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in nasty)
    for write in (code, prose):
        assert "\n" not in write(nasty)
        assert words(f"x {write(nasty)} y").strip().split() == f"x {shown} y".split()
        cells = words(table(("a", "b"), [(write(nasty), "end")])).split()
        assert cells[:2] == ["a", "b"]
        assert cells[-1] == "end"
        assert "".join(cells[2:-1]) == "".join(shown.split())
    # At the start of a line, too.
    assert words(f"{prose(nasty)}\n").split() == shown.split()
    assert words(f"# {prose(nasty)}\n").split() == shown.split()


def test_a_bare_address_is_no_link() -> None:
    for address in ("http://evil.example", "https://a.b", "www.evil.example", "a@b.example"):
        assert address not in prose(address)


def test_long_values_are_cut() -> None:
    assert len(code("a" * 10_000)) < LONGEST + 20
    assert len(prose("a" * 10_000)) < LONGEST + 20


@pytest.mark.parametrize("nasty", NASTY)
def test_a_block_ends_where_it_should(nasty: str) -> None:
    html = READER.render(block(f"a\n{nasty}\nb", "yaml") + "\n# after\n")
    assert html.count("<pre>") == html.count("</pre>") == 1
    assert html.endswith("<h1>after</h1>\n")
    assert html.index("\nb\n") < html.index("</pre>")


@pytest.mark.parametrize("nasty", [text for text in NASTY if "\ud800" not in text])
def test_the_front_matter_holds_values_only(nasty: str) -> None:
    values = {"license": nasty, "tags": [nasty, "x"], "model-index": [{"name": nasty, "results": []}]}
    written = front_matter(values)
    assert written.isascii()
    start, matter, rest = written.split("---\n") if "---" not in nasty else ("", written[4:-4], "")
    assert (start, rest) == ("", "")
    assert yaml.safe_load(matter) == values
    assert sum(line == "---" for line in written.splitlines()) == 2
