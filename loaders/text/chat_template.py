"""Chat templates: Jinja source that came with a model, rendered in a sandbox, and what one does with a conversation.

What a template writes comes in pieces, each with the message that it was written for: the compiled template tells, at
each turn of its loops, which message it has come to. So a turn is found whatever the template makes of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from afina.errors import DataError, TokenizerError
from afina.loaders.text.meter import Runaway
from afina.loaders.text.opaque import SLOT, Opaque, Prober, numbered
from afina.loaders.text.sandbox import FAILURES, Sandbox, brief

MAX_SOURCE = 1 << 15  # characters of a template; the longest of 70 published ones has 16,714
# Where templates look for what a model thought before it answered: they are given it under each of these.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CANARY = ("canarykey", "canaryvalue")  # the argument of a call that shows how a template writes arguments


class ChatTemplate:
    """A compiled chat template. ``names``: what it may read besides the messages (`bos_token`, `eos_token`, ...).

    ``turn_end``: what it writes after an assistant turn. ``generation_prompt``: how it opens one; ``opened_thought``:
    what of that is not in front of an answer without a thought ("<think>", often "").
    TokenizerError when it cannot be compiled or does not write a user's and an assistant's message exactly once.
    """

    def __init__(self, source: str, where: str, names: Mapping[str, Any]) -> None:
        if len(source) > MAX_SOURCE:
            size = f"{len(source):,} characters, at most {MAX_SOURCE:,} are accepted"
            raise TokenizerError(f"{where}: the chat template has {size}")
        self.where, self.source, self._names, self._sandbox = where, source, dict(names), Sandbox()
        self._lock = threading.Lock()  # one rendering at a time: the limits are counted in the environment
        self._header = ""
        try:
            self._template = self._sandbox.build(source, followed=False)
        except FAILURES as problem:
            line = f", line {problem.lineno}" if isinstance(problem, jinja2.TemplateSyntaxError) else ""
            raise TokenizerError(f"{where}: the chat template{line} cannot be compiled: {brief(problem)}") from problem
        self._needs_tools = False
        try:
            try:
                self._learn()
            except DataError:
                self._needs_tools = True  # made for conversations with tools, of which it wants to write a list
                self._learn()
        except DataError as problem:
            raise TokenizerError(f"{where}: of a user's and an assistant's message, {problem}") from problem

    def _learn(self) -> None:
        """Find out how the template opens and ends a turn of the assistant."""
        talk = self._canary("user", "assistant")
        user = numbered(["user"])
        opened, closed = (self._text(user, self._some_tools, flag) for flag in (True, False))
        _, answer = SLOT.finditer(talk)
        self.turn_end = talk[answer.end() :]
        if opened == closed and talk.startswith(opened):
            # The template knows no generation prompt: open the turn as it is opened before an answer.
            header = talk[len(opened) : answer.start()]
            self._header = header if header.strip() else ""
        prompt = opened.removeprefix(closed) if opened.startswith(closed) else ""
        if not prompt:  # what it writes last without being asked, or instead of an end
            pieces = list(self._write(self._following, user, self._some_tools, True))
            last = max((i for i, (_, number) in enumerate(pieces) if number is not None), default=len(pieces) - 1)
            prompt = "".join([part for part, _ in pieces[last + 1 :]])
        self.generation_prompt = prompt
        header = talk[: answer.start()].removeprefix(opened.removesuffix(prompt))
        same = next((i for i, (a, b) in enumerate(zip(header, prompt)) if a != b), min(len(header), len(prompt)))
        self.opened_thought = prompt[same:].strip()

    @property
    def _some_tools(self) -> list[dict[str, Any]] | None:
        schema = {"name": "look", "description": "look", "parameters": {"type": "object", "properties": {}}}
        return [{"type": "function", "function": schema}] if self._needs_tools else None

    def _canary(self, *roles: str) -> str:
        text = self._text(numbered(roles), self._some_tools, False)
        for number, role in enumerate(roles):
            times = [match[1] for match in SLOT.finditer(text)].count(str(number))
            if times != 1:
                raise DataError(f"the chat template writes message {number + 1} ({role}) {times} times, not once")
        return text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of ``messages``, with the header of a next assistant turn if asked for.

        ``tools``: JSON schemas of the functions that may be called. DataError when the template refuses the messages or
        fails on them, TokenizerError when it goes past a limit.
        """
        self._check_tools(tools)
        messages = [m if len(m) == 2 and m["content"] is not None else self.adapted(m) for m in messages]
        return self._text(messages, tools, add_generation_prompt)

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[str, int | None]]:
        """Return the text of :meth:`render` in pieces, each with the number of the message that the template had come
        to when it wrote it; None outside of its loops over messages."""
        self._check_tools(tools)
        return self._write(self._following, [self.adapted(message) for message in messages], tools, False)

    def opaque(self, roles: Sequence[str]) -> Opaque | None:
        """What is written for messages of these roles whatever they say, as `Prober.opaque` has it."""
        with self._lock:
            return self._prober.opaque(roles)

    def _check_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        if self._needs_tools and not tools:
            raise DataError("the chat template serves conversations with tools only: give the row tools")

    @cached_property
    def _prober(self) -> Prober:
        return Prober(self.source, self._names)

    @cached_property
    def _following(self) -> jinja2.Template:
        return self._sandbox.build(self.source, followed=True)

    def _text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompt: bool
    ) -> str:
        return "".join([text for text, _ in self._write(self._template, messages, tools, prompt)])

    def _write(
        self,
        template: jinja2.Template,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        prompt: bool,
    ) -> list[tuple[str, int | None]]:
        size = sum([_size(item) for item in messages]) + _size(tools or ())
        parts: list[tuple[str, int | None]] = []
        with self._lock:
            box = self._sandbox
            left = limit = box.begin(messages, size)
            names = self._names | {"messages": messages, "add_generation_prompt": prompt}
            try:
                for part in template.generate(names, tools=tools, documents=None):
                    parts.append((part, box.current))
                    left -= len(part)
                    if left < 0:
                        raise Runaway(f"an output of more than {limit:,} characters")
            except Runaway as problem:
                found = f"{problem} for {len(messages)} messages of {size:,} characters"
                raise TokenizerError(f"{self.where}: the chat template was stopped: {found}") from problem
            except FAILURES as problem:
                raise DataError(f"the chat template refuses this conversation: {brief(problem)}") from problem
        if prompt and self._header:
            parts.append((self._header, None))
        return parts

    # How a template wants what conversations write in several ways

    def adapted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message of its own, so that it can be told from all others, in the form that this template reads."""
        message = dict(message)
        if message["content"] is None:
            self._set_content(message)
        if thought := message.get("reasoning_content"):
            message |= dict.fromkeys(_REASONING_KEYS, thought)
        if "tool_calls" in message and self._arguments_as_text:
            message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        return message

    def _set_content(self, message: dict[str, Any], form: str | None = None) -> None:
        """Leave out a content that is null, or write it as this template reads it (or in the ``form`` named)."""
        form = form or self._null_form
        if form == "missing":
            del message["content"]
        else:
            message["content"] = None if form == "null" else ""

    @cached_property
    def _null_form(self) -> str:
        """How to say that a call has no content: some templates fail on a missing one, or on null, or write "None"."""
        forms = ["missing", "null", "empty"]
        for answered in (False, True):
            texts = {f: self._canary_call(f, as_text=self._arguments_as_text, answered=answered) for f in forms}
            forms = [form for form, text in texts.items() if text is not None and "None" not in text] or forms
        return forms[0]

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether a call's arguments must be their JSON text, as OpenAI has them, and not an object."""
        marks = [quote + _CANARY[0] for quote in ("'", '\\"')]  # an object as Python spells it, and JSON inside JSON

        def right(text: str | None) -> bool:
            return text is not None and all(part in text for part in _CANARY) and not any(m in text for m in marks)

        return not right(self._canary_call("empty", as_text=False)) and right(self._canary_call("empty", as_text=True))

    def _canary_call(self, form: str, *, as_text: bool, answered: bool = False) -> str | None:
        """The text of a conversation with a call and no content, ``answered`` or not, or None where the template fails
        on it."""
        call: dict[str, Any] = {"name": "look", "arguments": dict([_CANARY])}
        call = {"id": "call00001", "type": "function", "function": call}
        call = _with_text_arguments(call) if as_text else call
        turns: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
        turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
        self._set_content(turns[1], form)
        if answered:
            turns.append({"role": "tool", "content": "seen", "tool_call_id": call["id"], "name": "look"})
            turns.append({"role": "assistant", "content": "done"})
        try:
            return self._text(turns, self._some_tools, False)
        except DataError:
            return None


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _size(value: Any) -> int:
    """About how many characters the texts in a value have."""
    if isinstance(value, dict):
        return sum([len(item) if type(item) is str else len(key) + _size(item) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return sum([_size(item) for item in value])
    return len(value) if isinstance(value, str) else 8
