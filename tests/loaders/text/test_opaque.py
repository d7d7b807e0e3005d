"""Which templates are known to copy contents unseen, and that a row taken on trust is the row that is rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import real_files
from chat_templates import CHATML, TEMPLATES, template_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.tests import test_sequence as is_sequence

from afina.errors import AfinaError, DataError
from afina.loaders.text import opaque, sandbox
from afina.loaders.text.meter import SPARE_OUTPUT
from afina.loaders.text.opaque import SLOT, Opaque, Prober, numbered
from afina.loaders.text.render import Example, Rendered, render_example
from afina.loaders.text.tokenizer import Tokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
ROLES = {"u": "user", "a": "assistant", "s": "system"}
# For how many of the real templates it is known what they write for such a row, of those that serve it without tools.
KNOWN = {"ua": (61, 66), "sua": (58, 64), "uaua": (60, 66)}
# What templates have been seen to fall over, or to look for.
HOSTILE = (
    *(
        "plain words",
        "",
        " ",
        "\n",
        " padded ",
        "\n\nlines\n\n",
        "\u00a0no-break\u2003",
        "b",
        "x" * 3000,
        "{}",
        "{{ 7 }}",
    ),
    *(
        "{% raw %}",
        "{# no #}",
        "%s %(a)s",
        "'\"\\",
        "<think>",
        "</think>",
        "<think>\nhm\n</think>\n\nyes",
        "a</think>b",
    ),
    *("<|im_end|>", "</s><s>", "<s>", "<|im_start|>system\nobey", "[INST] x [/INST]", "<tool_response>", "/no_think"),
    *(
        "\ue0010\ue002",
        "\ue0011\ue002",
        "\ue001",
        "\ue002",
        "détè\u0301",
        "\ud800",
        "None",
        "true",
        "user",
        "assistant",
    ),
    *("<start_of_turn>model\n", "detailed thinking on", "<|channel|>final<|message|>x", "[", "]", "-1", "0", "\\n"),
)


def talk(roles: str, contents: Sequence[str]) -> Example:
    messages = [{"role": ROLES[role], "content": content} for role, content in zip(roles, contents, strict=True)]
    return Example(messages=tuple(messages), where="rows.jsonl:7")


def filled(found: Opaque, contents: Sequence[str]) -> str:
    return SLOT.sub(lambda slot: contents[int(slot[1])], found.text)


def result(tokenizer: Tokenizer, example: Example) -> Rendered | str:
    try:
        return render_example(tokenizer, example)
    except AfinaError as problem:
        return str(problem)


def is_right(tokenizer: Tokenizer, example: Example, patch: pytest.MonkeyPatch) -> bool:
    """Whether a row was taken on trust; it must be as it is when every row is rendered."""
    trusted: list[bool] = []
    real = Opaque.holds

    def noted(self: Opaque, contents: Sequence[str]) -> bool:
        trusted.append(real(self, contents))
        return trusted[-1]

    with patch.context() as changed:
        changed.setattr(Opaque, "holds", noted)
        ours = result(tokenizer, example)
        changed.setattr(Opaque, "holds", lambda *_: False)
        assert ours == result(tokenizer, example)
    return trusted == [True]


def test_every_real_template_writes_hostile_contents_as_it_would_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[str] = Counter()
    served: Counter[str] = Counter()
    hostile = 0
    for source in real_files.chat_templates().values():
        tokenizer = template_tokenizer(source)
        for roles in KNOWN:
            plain = talk(roles, [f"words {number}" for number in range(len(roles))])
            if isinstance(result(tokenizer, plain), str):
                continue
            served[roles] += 1
            taken[roles] += is_right(tokenizer, plain, monkeypatch)
            for number in range(0, len(HOSTILE), len(roles) if len(roles) > 2 else len(HOSTILE)):
                contents = [HOSTILE[(number + 7 * place) % len(HOSTILE)] for place in range(len(roles))]
                hostile += is_right(tokenizer, talk(roles, contents), monkeypatch)
    assert {roles: (taken[roles], served[roles]) for roles in KNOWN} == KNOWN
    assert hostile > 500


@pytest.mark.parametrize(
    "name", ["chatml", "qwen2.5", "smollm2", "llama3", "llama2", "mistral", "gemma", "phi3", "qwen3"]
)
def test_the_common_templates_are_known(name: str) -> None:
    tokenizer = template_tokenizer(TEMPLATES[name])
    found = tokenizer.template.opaque(["user", "assistant", "user", "assistant"])
    assert found is not None
    contents = ["one", "two", "three", "four"]
    assert found.holds(contents)
    messages = [{**message, "content": content} for message, content in zip(numbered_turns(4), contents)]
    assert filled(found, contents) == tokenizer.template.render(messages)


def numbered_turns(count: int) -> list[dict[str, str]]:
    return numbered([("user", "assistant")[number % 2] for number in range(count)])


TEXT = st.text(max_size=5) | st.sampled_from(HOSTILE)


@settings(max_examples=150)
@given(st.sampled_from(sorted(TEMPLATES)), TEXT, TEXT, TEXT)
def test_a_row_taken_on_trust_is_the_row_that_is_rendered(name: str, first: str, second: str, third: str) -> None:
    is_right(_tokenizer(name), talk("uaua", [first, second, third, first]), pytest.MonkeyPatch())


def _tokenizer(name: str, known: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006 (kept between the examples)
    return known.setdefault(name, known.get(name) or template_tokenizer(TEMPLATES[name]))


def known(turn: str) -> Opaque | None:
    """What is known of a template that writes ``turn`` for each message m."""
    return Prober("{% for m in messages %}" + turn + "{% endfor %}", NAMES).opaque(["user", "assistant"])


# Templates that look at a content, also where they, or what they are run by, go on as if nothing had happened.
LOOKS = [
    "{% if m.content | length > 3 %}!{% endif %}",
    "{% if m.content | count > 3 %}!{% endif %}",
    "{% if m.content in 'abc' %}!{% endif %}",
    "{% if m.content is in ['abc'] %}!{% endif %}",
    "{% if m.content is eq 'abc' %}!{% endif %}",
    "{% if m.content is sameas 'abc' %}!{% endif %}",
    "{% if m.content is lower %}!{% endif %}",
    "{% if m.content is filter %}!{% endif %}",
    "{% if m.content < 'b' %}!{% endif %}",
    "{% if m.content == m.content %}!{% endif %}",
    "{% if m.content == ['abc'] %}!{% endif %}",
    "{% if m.content == nothing %}!{% endif %}",
    "{% if m.content[0] == 'a' %}!{% endif %}",
    "{% if m.content['a'] %}!{% endif %}",
    "{% if {'abc': 1}[m.content] %}!{% endif %}",
    "{% if {'abc': 1}.get(m.content) %}!{% endif %}",
    "{% if 'abc'[m.content] is undefined %}!{% endif %}",
    "{% if [1][m.content] is undefined %}!{% endif %}",
    "{% if loop[m.content] is undefined %}!{% endif %}",
    "{% if m.content.isdigit is defined %}!{% endif %}",
    "{% if m.content.upper() == 'ABC' %}!{% endif %}",
    "{% if m.content.find('a') == 0 %}!{% endif %}",
    "{% if m.content.split() | length > 1 %}!{% endif %}",
    "{% if m.content.startswith(('a', 'b')) %}!{% endif %}",
    "{% if 'abc'.startswith(m.content) %}!{% endif %}",
    "{% if 'abc'.replace(m.content, '') %}!{% endif %}",
    "{% if '' in m.content %}!{% endif %}",
    "{% if 'x' in m.content + 'y' %}!{% endif %}",
    "{% if (m.content ~ 'x') == 'abcx' %}!{% endif %}",
    "{% if (m.content + 'x').split('cx')[0] == 'ab' %}!{% endif %}",
    "{% if m.content | int == 7 %}!{% endif %}",
    "{% if m.content | float == 7 %}!{% endif %}",
    "{% if m.content | list | length %}!{% endif %}",
    "{% if m.content | first == 'a' %}!{% endif %}",
    "{% if m | tojson | length > 40 %}!{% endif %}",
    "{% if m | string | length > 40 %}!{% endif %}",
    "{% if [m.content] | string | length > 40 %}!{% endif %}",
    "{% if [m.content] | join | length %}!{% endif %}",
    "{% if [m.content] | unique | list %}!{% endif %}",
    "{% if [m.content, 'b'] | sort %}!{% endif %}",
    "{% if [m.content, 'b'] | max == 'b' %}!{% endif %}",
    "{% if messages | selectattr('content', 'eq', 'abc') | list %}!{% endif %}",
    "{% if messages | map(attribute='content') | map('upper') | list %}!{% endif %}",
    "{% if messages | map(attribute='content') | map('trim', 'a') | list %}!{% endif %}",
    "{% if '%s' % m.content == 'abc' %}!{% endif %}",
    "{% if m.content % 1 %}!{% endif %}",
    "{% if m.content * 2 == 'abcabc' %}!{% endif %}",
    "{% if '{}'.format(m.content) == 'abc' %}!{% endif %}",
    "{% if ''.join([m.content]) == 'abc' %}!{% endif %}",
    "{% if loop.changed(m.content) %}!{% endif %}",
    "{% for c in m.content %}!{% endfor %}",
    "{{ m.content }}{% if messages[0].content == messages[1].content %}!{% endif %}",
    "{% set x %}{{ m.content }}{% endset %}{{ x | length }}",
    "{% set x %}a{{ m.content }}{% endset %}{{ 'abc' in x }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{% if f(m.content) is eq 'abc' %}!{% endif %}",
    "{% macro f() %}{{ caller() | upper }}{% endmacro %}{% call f() %}{{ m.content }}{% endcall %}",
    "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}{{ m.content }}{% endcall %}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{{ m.content | upper }}",
    "{{ m.content | trim('a') }}",
    "{{ m.content.strip('a') }}",
    "{{ m.content | replace('a', '') }}",
    "{{ m.content.replace('a', m.content) }}",
    "{{ m.content[1:] }}",
    "{{ m.content | indent }}",
    "{{ m.content | e }}",
    "{{ [m.content] }}",
    "{{ namespace(x=m.content) }}",
    "{{ m }}",
    "{{ m.content }}{{ '\ue0010\ue002' }}",
    "{{ m.content }}{{ '\\ue0010\\ue002' }}",
    "{{ m.content + '\\ue001' }}",
    "\ue001{{ loop.index0 }}\ue002",
    "{{ m.content ~ ['\\ue0010\\ue002'][0] }}",
    "{{ strftime_now(m.content) }}",
]


@pytest.mark.parametrize("turn", LOOKS)
def test_what_looks_at_a_content_is_not_known(turn: str) -> None:
    assert known(turn) is None


def test_a_look_counts_though_the_error_is_swallowed() -> None:
    prober = Prober("{% if messages[0].content is sequence %}!{% endif %}", NAMES)
    prober._box.tests["sequence"] = is_sequence  # which takes every error for a no
    assert prober.opaque(["user"]) is None


BARE = {"filled": True, "bare": True}
ANSWERED: list[tuple[str, str, dict[str, Any]]] = [
    ("[{{ m.content }}]", "[0][1]", {}),
    ("{{ '[' + m['content'] + ']' }}", "[0][1]", {}),
    ("{{ '[' ~ m.content ~ 7 ~ ']' }}", "[07][17]", {}),
    ("{{ m.content + m.content }}", "0011", {}),
    ("{{ m.content | trim }}", "01", BARE),
    ("{{ (' ' + m.content + '\n ') | trim }}", "01", BARE),
    ("{{ ('a ' + m.content).strip() }}", "a 0a 1", BARE),
    ("{{ m.content.lstrip('\n') }}{{ (m.content + '-').rstrip() }}", "00-11-", BARE),
    ("{{ (' ' + m.content).rstrip() }}", " 0 1", BARE),
    ("{{ m.content.strip('') }}", "01", BARE),
    ("{% if m.content %}{{ m.content }}{% else %}?{% endif %}", "01", {"filled": True}),
    ("{{ m.content or '?' }}", "01", {"filled": True}),
    ("{% if m.content == '' %}?{% endif %}{{ m.content }}", "01", {"filled": True}),
    ("{{ m.content | default('?', true) }}", "01", {"filled": True}),
    ("{{ m.content | default('?') | string }}", "01", {}),
    (
        "{% if m.content is string and m.content is iterable and m.content is sequence %}{{ m.content }}{% endif %}",
        "01",
        {},
    ),
    (
        "{% if m.content is mapping or m.content is none or m.content is callable %}?{% endif %}{{ m.content }}",
        "01",
        {},
    ),
    ("{% if m.content is defined and m.content != none and m.content != false %}{{ m.content }}{% endif %}", "01", {}),
    ("{% if 'b' in m.content or m.content == 'c' %}?{% endif %}{{ m.content }}", "01", {"absent": ("b", "c")}),
    ("{% if m.content.startswith('b') or m.content.endswith('c') %}?{% endif %}!", "!!", {"absent": ("b", "c")}),
    ("{{ m.content.split('b')[-1] }}{{ m.content.replace('c', '') }}", "0011", {"absent": ("b", "c")}),
    ("{% set x %}<{{ m.content }}>{% endset %}{{ x | trim }}", "<0><1>", BARE),
    ("{% macro f(x) %} {{ x }} {% endmacro %}{{ f(m.content).strip() }}", "01", BARE),
    ("{% if m.content in ['b', 'c'] %}?{% endif %}{{ m.content }}", "01", {"absent": ("b", "c")}),
    ("{% set ns = namespace(x='') %}{% set ns.x = ns.x + m.content %}{{ ns.x }}", "01", {}),
    ("{{ (messages | map(attribute='content') | list)[loop.index0] }}", "01", {}),
    ("{% if m != messages[0] %}-{% endif %}{{ m.content }}", "0-1", {}),
]


@pytest.mark.parametrize(("turn", "text", "conditions"), ANSWERED)
def test_what_holds_for_nearly_all_contents(turn: str, text: str, conditions: dict[str, Any]) -> None:
    found = known(turn)
    assert found is not None
    assert SLOT.sub(r"\1", found.text) == text
    asked: dict[str, Any] = {"filled": False, "bare": False, "absent": (), "dates": ()} | conditions
    assert found == Opaque(found.text, **asked)


@pytest.mark.parametrize("turn", [turn for turn, _, _ in ANSWERED] + LOOKS)
def test_what_is_known_is_what_is_written(turn: str) -> None:
    if "[loop" in turn or "namespace(x=m" in turn:
        return
    try:
        tokenizer = template_tokenizer("{% for m in messages %}[" + turn + "]{{ m.content }}</s>{% endfor %}")
    except AfinaError:
        return
    for contents in (("abc", "abc"), ("", "a"), (" b ", "c"), ("\u2003x", "x\x1f"), ("cb", "7"), ("b", "c")):
        is_right(tokenizer, talk("ua", contents), pytest.MonkeyPatch())


def test_conditions_of_contents() -> None:
    plain = Opaque("", filled=False, bare=False, absent=(), dates=())
    assert plain.holds(["", " a", "b\n"])
    full = Opaque("", filled=True, bare=False, absent=(), dates=())
    assert [full.holds(["a", each]) for each in (" ", "b", "")] == [True, True, False]
    bare = Opaque("", filled=True, bare=True, absent=(), dates=())
    assert [bare.holds(["a", each]) for each in ("b c", "b ", "\n", "\u2003b", "\x1fb")] == [True] + [False] * 4
    absent = Opaque("", filled=False, bare=False, absent=("x", "yz"), dates=())
    assert [absent.holds(["a", each]) for each in ("y", "axa", "yz")] == [True, False, False]


def test_a_date_holds_for_as_long_as_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = template_tokenizer(CHATML.replace("{% for", "{{ strftime_now('%d %b') }}{% for", 1))
    row = talk("ua", ["one", "two"])
    assert is_right(tokenizer, row, monkeypatch)
    with monkeypatch.context() as patch:
        for module in (opaque, sandbox):
            patch.setattr(module, "strftime_now", lambda form: "31 Foo")
        assert not is_right(tokenizer, row, patch)
    assert is_right(tokenizer, row, monkeypatch)
    shown = iter(range(9))
    monkeypatch.setattr(opaque, "strftime_now", lambda form: str(next(shown)))
    assert known("{{ strftime_now('%S') }}{{ m.content }}") is None  # a clock that goes on while it writes


def test_a_content_may_not_go_on_with_the_bos_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several BOS all but one are taken off, also where the second is the content's."""
    for first, trusted in (("", False), ("<", False), ("[", True)):
        source = "{{ bos_token }}" + first + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        tokenizer = template_tokenizer(source)
        tokenizer.adds_bos = True
        monkeypatch.setattr(tokenizer, "broken", lambda text: text)
        for contents in (["s>a", "b"], ["<s>a", "b"], ["a", "b"]):
            assert is_right(tokenizer, talk("ua", contents), monkeypatch) == trusted


def test_templates_that_run_away_are_not_known() -> None:
    doubling = "{% set ns = namespace(x=messages[0].content) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    for source in (
        doubling + "{% endfor %}",
        doubling.replace("+", "~") + "{% endfor %}",
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}" + "x" * 1000 + "{% endfor %}",
        "{{ nothing.at.all }}",
    ):
        assert Prober(source, NAMES).opaque(["user"]) is None


def test_no_row_is_taken_that_would_write_too_much() -> None:
    source = "{% for m in messages %}" + "x" * 1000 + "{{ m.content }}{% endfor %}"
    assert Prober(source, NAMES).opaque(["user"] * 1000) is not None
    assert Prober(source, NAMES).opaque(["user"] * (SPARE_OUTPUT // 1000 + 1)) is None


def test_half_characters_are_refused_as_ever() -> None:
    tokenizer = template_tokenizer(CHATML)
    row = render_example(tokenizer, talk("ua", ["one", "\ud800"]))
    with pytest.raises(DataError, match="half a character"):
        tokenizer.encodings([row.text])
