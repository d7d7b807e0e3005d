"""loaders/text/openings.py: what long conversations are trained on is what rendering every prompt would give."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import real_files
from chat_templates import (
    CHATML,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    QWEN3,
    QWEN25,
    SMOLLM2,
    TOOLS,
    result_turn,
    template_tokenizer,
    tool_call,
    turn,
)

from afina.errors import AfinaError, DataError
from afina.loaders.text import openings
from afina.loaders.text.chat_template import ChatTemplate
from afina.loaders.text.render import MAX_MESSAGES, Example, Rendered, render_example
from afina.loaders.text.tokenizer import Tokenizer

KINDS = ("plain", "in a row", "calls", "reasoning", "thoughts")


def talk(kind: str, length: int, seed: object = 0) -> Example:
    """A conversation of at least so many messages."""
    rng, messages = random.Random(f"{kind} {seed}"), []
    if rng.random() < 0.5:
        messages.append(turn("system", "Be kind."))
    while len(messages) < length:
        number = len(messages)
        messages.append(turn("user", f"question {number}"))
        thinks = kind in ("reasoning", "calls") and rng.random() < 0.3
        further: dict[str, Any] = {"reasoning_content": f"thought {number}"} if thinks else {}
        if kind == "calls" and rng.random() < 0.5:
            for _ in range(rng.randint(1, 2)):
                content = rng.choice([None, "", f"looking {number}"])
                messages.append(turn("assistant", content, tool_calls=[tool_call()], **further))
                messages.append(result_turn("blue"))
        if kind == "in a row" and rng.random() < 0.3:
            messages.append(turn("assistant", f"first {number}"))
        inline = kind == "thoughts" and rng.random() < 0.5
        thought = "<think>\n\nwell\n</think>\n\n" if inline else ""
        messages.append(turn("assistant", f"{thought}answer {number}", **further))
    return Example(messages=tuple(messages), tools=tuple(TOOLS) if kind == "calls" else None, where="x")


def rendered(tokenizer: Tokenizer, row: Example, first: int, monkeypatch: pytest.MonkeyPatch) -> Rendered | str:
    """The row with the turns of the ``first`` messages rendered, or why it is refused."""
    monkeypatch.setattr(openings, "RENDERED", first)
    try:
        return render_example(tokenizer, row)
    except AfinaError as problem:
        return str(problem)


def compare(
    source: str, name: str, length: int, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...] = KINDS
) -> int:
    """Long conversations of each kind under a template: how many are read, all of them as with every prompt."""
    tokenizer, right = template_tokenizer(source), 0
    for kind in kinds:
        row = talk(kind, length, name)
        every = rendered(tokenizer, row, 10**9, monkeypatch)
        assert rendered(tokenizer, row, 6, monkeypatch) == every, f"{name}, {kind}"
        right += isinstance(every, Rendered)
    return right


@pytest.mark.parametrize("source", [CHATML, QWEN25, SMOLLM2, LLAMA3, LLAMA2, MISTRAL, QWEN3])
def test_a_long_conversation_is_trained_on_what_every_prompt_would_show(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare(source, "here", 101, monkeypatch) >= 1  # above what is kept as a layout


@pytest.mark.slow
def test_real_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = real_files.chat_templates()
    assert sum(compare(source, name, 101, monkeypatch) for name, source in templates.items()) > 250


# Turns that are opened in a way that the roles before them do not show: in the loop, and where generation begins.
FAR = {
    "by number": ("loop.index > 90", "messages | length >= 90"),
    "by the question": ("loop.index0 and '2' in messages[loop.index0 - 1].content", "'2' in messages[-1].content"),
}


@pytest.mark.parametrize("look", FAR)
def test_a_template_that_looks_farther_is_rendered_for_every_turn(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last turn shows it, or two that stand alike and are opened in two ways."""
    inside, after = (f"{{% if {when} %}}so:{{% endif %}}" for when in FAR[look])
    turns = "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + inside + "{% endif %}"
    source = "{% for m in messages %}" + turns + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + after + "{% endif %}"
    assert compare(source, "here", 110, monkeypatch, ("plain",)) == 1


def test_the_work_grows_with_the_messages_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = template_tokenizer(QWEN3)
    write, written = ChatTemplate._write, Counter[int]()

    def counted(self: ChatTemplate, template: Any, messages: Any, tools: Any, prompt: bool) -> Any:
        written[length] += len(messages)
        return write(self, template, messages, tools, prompt)

    monkeypatch.setattr(ChatTemplate, "_write", counted)
    monkeypatch.setattr(openings, "RENDERED", 8)
    for length in (200, 400, 800):
        render_example(tokenizer, talk("thoughts", length))
    assert written[800] < 2.5 * written[400] < 6 * written[200]


def test_the_longest_conversation() -> None:
    tokenizer = template_tokenizer(CHATML)
    row = render_example(tokenizer, Example(messages=talk("plain", MAX_MESSAGES - 2).messages, where="x"))
    assert len(row.spans) == MAX_MESSAGES // 2 - 1
    with pytest.raises(DataError, match="expected at most 5,000: split the conversation"):
        render_example(tokenizer, talk("plain", MAX_MESSAGES + 1))


def test_a_template_that_no_turn_can_be_known_from_is_refused_when_it_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It writes all at once at its end, so turns are found by rendering each time."""
    source = (
        "{% set ns = namespace(out='') %}{% for m in messages %}"
        "{% set ns.out = ns.out ~ m.role ~ ':' ~ m.content ~ '<|im_end|>' %}{% endfor %}"
        "{{ ns.out }}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = template_tokenizer(source)
    assert len(render_example(tokenizer, talk("plain", 150)).spans) >= 74
    monkeypatch.setattr(openings, "MAX_RENDERED", 6_000)
    with pytest.raises(DataError, match="writes turns in too many ways to find them all among 15"):
        render_example(tokenizer, talk("in a row", 150))
