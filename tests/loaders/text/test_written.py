"""loaders/text/written.py: values are found where they stand, in any order, and no conversation takes long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_templates import template_tokenizer, turn

from afina.errors import DataError
from afina.loaders.text.render import Example, render_example
from afina.loaders.text.written import MAX_SCANNED, Search

# It writes calls and tools as JSON.
SOURCE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_what_is_found() -> None:
    search = Search()
    search.into('b "c" \\"d\\" \\u00e9 ü 1.5 true null ' + "x" * 10_000 + " last first")
    for value in ("last", "first", "b", '"c"', '"d"', "é", "ü", 1.5, True, None, "last"):
        assert search.holds(value), value
    for value in ("z", '"e"', "É", 2, False):
        assert not search.holds(value), value
    search.into("another")
    assert not search.holds("first")


def talk(arguments: dict[str, Any], tools: int = 1) -> Example:
    call = {"id": "1", "type": "function", "function": {"name": "f0", "arguments": arguments}}
    functions = [{"type": "function", "function": {"name": f"f{n}", "parameters": {}}} for n in range(tools)]
    messages = (turn("user", "go"), turn("assistant", None, tool_calls=[call]))
    return Example(messages=messages, tools=tuple(functions), where="x")


@pytest.mark.parametrize(
    "row",
    [
        talk({f'"k{n}"': "v" for n in range(10_000)}),
        talk({"k": [f'"v{n}"' for n in range(10_000)]}),
        talk({"k": 1}, tools=3_000),
        # What stands first is looked for again and again.
        talk({"first": "a" * 100} | {f"k{n}": ["b" * 200, "a" * 100] for n in range(1_500)}),
    ],
)
def test_many_values_are_looked_for_where_the_last_one_stood(row: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, left = template_tokenizer(SOURCE), []
    find = Search._find
    monkeypatch.setattr(Search, "_find", lambda self, *a, **k: (find(self, *a, **k), left.append(self.left))[0])
    size = len(render_example(tokenizer, row).text)
    assert MAX_SCANNED - left[-1] < 400 * size  # each value by itself would take thousands of times the text


def test_a_search_without_end_is_refused() -> None:
    search = Search()
    search.into(json.dumps(["a" * 1000] * 1000))
    values = [f"{number} is not there" for number in range(10_000)]
    with pytest.raises(DataError, match="takes too long: split it"):
        any(map(search.holds, values))
