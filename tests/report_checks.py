"""What every page must be: whole HTML, unique ids, nothing loaded from elsewhere, nothing that runs, usable by all."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A page taken apart; raises AssertionError where its tags do not balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value is not None]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another, in {self.open[-5:]}"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.tags if name in attrs]


def check_page(text: str) -> Page:
    """Take a page apart and check all of it."""
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert len(page.ids) == len(set(page.ids)), "ids come twice"
    policy = next(str(attrs["content"]) for _, attrs in page.tags if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert not {"script", "iframe", "object", "embed", "img", "link", "base", "form"} & set(names)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for reference in page.attributes("href") + page.attributes("xlink:href") + page.attributes("src"):
        assert reference.startswith("#"), f"leads out of the page: {reference}"
        assert reference[1:] in page.ids, f"leads nowhere: {reference}"
    for target in re.findall(r"url\(#?([^)]*)\)", text):
        assert target in page.ids, f"leads nowhere: url({target})"
    for labels in page.attributes("aria-labelledby"):
        assert set(labels.split()) <= set(page.ids)
    assert names.count("h1") == names.count("main") == names.count("header") == names.count("nav") == 1
    assert all(after - before <= 1 for before, after in zip([0, *page.headings], page.headings)), page.headings
    for tag, attrs in page.tags:
        if tag == "svg":
            assert attrs.get("role") == "img"
            assert attrs.get("aria-labelledby")
        if attrs.get("tabindex") is not None:
            assert (attrs["tabindex"], attrs.get("role")) == ("0", "region")
            assert attrs.get("aria-label")
    assert names.count("svg") == names.count("figure") == names.count("figcaption")
    return page
