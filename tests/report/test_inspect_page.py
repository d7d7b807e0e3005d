"""The page of a row: self-contained, nothing of the row is markup, base and model beside each other."""

from __future__ import annotations

import re

from test_tokens import BASE, NASTY, VIEWS, Reader

from afina.report.inspect_page import inspect_page
from afina.report.inspected import InspectedRow


def page(**changes: object) -> str:
    row = InspectedRow(3, f"{NASTY}\x1b.jsonl: line 4", 1, 1, 0, 0, VIEWS, BASE)
    return inspect_page([row], model=NASTY, base=NASTY, **changes)  # type: ignore[arg-type]


def test_nothing_of_a_row_or_a_name_is_markup_and_nothing_is_fetched() -> None:
    text = page()
    read = Reader(text)
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "link", "img", "iframe"}
    assert "\x1b" not in text
    assert "http://" not in text
    assert "https://" not in text
    policy = next(a for tag, a in read.tags if tag == "meta" and "http-equiv" in a)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert read.text.count(NASTY) > 5


def test_before_after_and_change() -> None:
    text = page()
    headings = re.findall("<h3>(.*?)</h3>", text)
    assert headings == ["Before: the base", "After: the model", "Change"]
    parts = text.split("<h3>")
    assert "loss-4" in parts[1].split("</div>")[0]  # exp(-3.5) is 3 %
    assert "loss-2" in parts[2].split("</div>")[0]
    assert "change-0" in parts[3].split("</div>")[0]
    assert "mean loss of the learnt tokens: base 3.9067, model 3.3367, change -0.5700" in text


def test_a_row_alone_and_its_places() -> None:
    row = InspectedRow(3, "rows.jsonl: line 4", 2, 5, 1, 40, VIEWS)
    text = inspect_page([row], model="m", base=None)
    assert re.findall("<h3>(.*?)</h3>", text) == ["Text"]
    assert "compared" not in text
    assert "row 3, piece 2 of 5 (rows.jsonl: line 4): 4 tokens, 3 of them learnt" in text
    assert "Document 1 of the packed sequence, from its token 40 on" in text
    targets = re.findall('href="#(.*?)"', text)
    assert targets == ["d1t0", "d1t1", "d1t2", "d1t3"]
    assert all(f'id="{target}"' in text for target in targets)
    assert "7 8 9 10" in text
