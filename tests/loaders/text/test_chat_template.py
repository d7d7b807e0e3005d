"""Chat templates: the same text as transformers, and templates that cannot run away."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
from chat_templates import TEMPLATES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from afina.errors import AfinaError, DataError, TokenizerError
from afina.loaders.text import chat_template, meter
from afina.loaders.text.chat_template import ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
ROLES = {"u": "user", "a": "assistant", "s": "system"}


def talk(roles: str, *contents: str) -> list[dict[str, str]]:
    return [{"role": ROLES[role], "content": content} for role, content in zip(roles, contents)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("roles", ["u", "ua", "uaua", "sua"])
def test_writes_what_transformers_writes(name: str, roles: str) -> None:
    messages = talk(roles, " one\n", "<think>\nhm\n</think>\n\ntwo ", "user", "déjà 中文")
    for prompt in (True, False):
        try:
            expected: Any = render_jinja_template(
                [messages], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **NAMES
            )[0][0]
        except Exception as problem:
            with pytest.raises(DataError, match=str(problem)[:20]):
                ChatTemplate(TEMPLATES[name], "x", NAMES).render(messages, add_generation_prompt=prompt)
            continue
        found = ChatTemplate(TEMPLATES[name], "x", NAMES).render(messages, add_generation_prompt=prompt)
        # The one without a generation prompt gets one, or the answer would have to open its own turn.
        assert found == expected + ("### assistant:\n" if name == "plain" and prompt else "")


def test_functions_that_templates_use() -> None:
    source = (
        "{{ {'b': '<é>', 'a': 1} | tojson }}{{ [1] | tojson(indent=2) }}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
        "{% if tools is none and documents is none %}{{ undefined_name }}!{% endif %}\n"
        "  {% if true %}\n?\n  {% endif %}\n"
    )
    text = ChatTemplate(source, "x", NAMES).render(talk("ua", "q", "r"))
    assert text == '{"b": "<é>", "a": 1}[\n  1\n]' + time.strftime("%Y") + "qr!?\n"


# Wrong templates

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("inside", ["main thread", "another thread"])
def test_a_template_that_runs_away_is_stopped(inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/faults has more of them, and limits that the kernel enforces."""
    monkeypatch.setattr(meter, "MAX_STEPS", 20_000)
    caught: list[BaseException] = []

    def load() -> None:
        try:
            ChatTemplate(TALK + LOOPS, "folder", NAMES)
        except TokenizerError as problem:
            caught.append(problem)

    if inside == "main thread":
        load()
    else:
        thread = threading.Thread(target=load)
        thread.start()
        thread.join(60)
    assert len(caught) == 1
    assert "folder: " in str(caught[0])
    assert "\n" not in str(caught[0])


def test_json_calls_nothing_that_it_is_given() -> None:
    for option in ("default=cycler.__init__", "default=raise_exception", "cls=dict", "object_hook=dict"):
        with pytest.raises(TokenizerError):
            ChatTemplate(TALK + f"{{{{ [1] | tojson({option}) }}}}", "folder", NAMES)


def test_the_time_limit_stops_what_the_step_limit_would_let_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(meter, "MAX_STEPS", 10**12)
    start = time.monotonic()
    with pytest.raises(TokenizerError, match=r"stopped: more than 0\.2 seconds"):
        ChatTemplate(TALK + LOOPS, "folder", NAMES)
    assert time.monotonic() - start < 5


def test_the_step_limit_stops_what_the_time_limit_would_let_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "MAX_SECONDS", 1e9)
    monkeypatch.setattr(meter, "MAX_STEPS", 1000)
    monkeypatch.setattr(meter, "STEPS_A_MESSAGE", 0)
    with pytest.raises(TokenizerError, match=r"stopped: more than 1,0\d\d steps"):
        ChatTemplate(TALK + "{% for a in range(999) %}{% for b in range(99) %}{% endfor %}{% endfor %}", "x", NAMES)


def test_source_size_and_syntax() -> None:
    with pytest.raises(TokenizerError, match="has 32,769 characters, at most 32,768"):
        ChatTemplate("a" * (chat_template.MAX_SOURCE + 1), "folder", NAMES)
    with pytest.raises(TokenizerError, match="line 2 cannot be compiled: Encountered unknown tag 'oops'"):
        ChatTemplate("\n{% oops %}", "folder", NAMES)
    with pytest.raises(TokenizerError, match="cannot be compiled"):
        ChatTemplate("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "folder", NAMES)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{% include 'x' %}",
        "{{ messages[0].update({'content': 'x'}) }}",
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    with pytest.raises(TokenizerError):
        ChatTemplate(TALK + attack, "folder", NAMES)


def test_canaries() -> None:
    with pytest.raises(TokenizerError, match=r"message 2 \(assistant\) 0 times, not once"):
        ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "folder", NAMES)
    with pytest.raises(TokenizerError, match=r"message 1 \(user\) 2 times, not once"):
        ChatTemplate(TALK + "{{ messages[0].content }}", "folder", NAMES)
    with pytest.raises(TokenizerError, match=r"of a user's and an assistant's message, .*no thanks"):
        ChatTemplate("{{ raise_exception('no thanks') }}", "folder", NAMES)


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(["{%", "%}", "{{", "}}", " if ", "for m in messages", "endfor", "m.content", "endif", "|trim"])
        | st.sampled_from(["set x = ", "messages", "loop", "[", "]", "(", ")", "*", "**", "'a'", "9", "-", "macro f()"])
        | st.text(max_size=5),
        max_size=20,
    )
)
@example(["{{", "9", "//", "0", "}}"])
def test_fuzzed_templates_end_in_the_typed_error(parts: list[str]) -> None:
    with contextlib.suppress(AfinaError):
        ChatTemplate(TALK + " ".join(parts), "folder", NAMES).render(talk("u", "hi"))
