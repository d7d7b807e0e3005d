"""Chat templates: Jinja source that came with a model, rendered without trusting it.

What a template writes comes in pieces, each with the message that it was written for: the compiled template tells, at
each turn of its loops, which message it has come to. So a turn is found whatever the template makes of it.

The environment is the one that transformers renders with (immutable sandbox, `trim_blocks`, `lstrip_blocks`, loop
controls, `tojson`, `raise_exception`, `strftime_now`), so a template writes the same text here and there. On top, a
template cannot run away: loops and calls are counted against a limit of steps and of seconds, texts and the output
have a limit, and what could multiply a text in one step is refused. The limits are checked inside the template's own
steps, so they hold in any thread and need no signal, timer or process.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from afina.errors import DataError, TokenizerError

MAX_SOURCE = 1 << 18  # characters of a template
MAX_STEPS = 1_000_000  # loop turns and calls of one rendering
MAX_SECONDS = 5.0
SPARE_OUTPUT = 1 << 20  # characters that a template may write besides four times its messages
# Where templates look for what a model thought before it answered: they are given it under each of these.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CANARY = ("canarykey", "canaryvalue")  # the argument of a call that shows how a template writes arguments
SLOT = re.compile("\ue001([0-9]+)\ue002")  # what stands for a content: the number of its message
_SHORT = 256  # longest argument of the string methods and filters that can multiply a text
_MULTIPLIERS = ("replace", "join", "indent")
_USELESS = ("batch", "center", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")
_WIDE = re.compile(r"\d{4}|\*|\{[^}]*\{")  # format strings that pad to a width of their own choosing
_SIZED = (str, list, tuple)  # what a template can make longer
_FAILURES: tuple[type[Exception], ...] = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
)
_FAILURES += (MemoryError, RecursionError, SyntaxError, TypeError, ValueError)


class _Runaway(RuntimeError):
    """A template went past one of its limits."""


class _Generation(Extension):
    """`{% generation %}` marks assistant text for other libraries; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.steps, self.deadline, self.limit = 0, 0.0, SPARE_OUTPUT
        for name in _USELESS:
            del self.filters[name]
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        for name in _MULTIPLIERS:
            self.filters[name] = _short_arguments(self.filters[name])
        self.filters |= {"tojson": _to_json, "metered": self._metered, "capped": self._capped}
        self.filters |= {"entered": self._entered, "assigned": self._assigned, "left": self._left}
        # The messages that are rendered, by identity; which of them each loop of the template has come to, the
        # outermost loop first; and the innermost of these: the one that is being written.
        self.numbers: dict[int, int] = {}
        self.loops: list[int | None] = []
        self.current: int | None = None
        self.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    def build(self, source: str, *, followed: bool) -> jinja2.Template:
        """Compile ``source`` with its loops metered and its texts capped; ``followed``: it tells at what message it is,
        which takes longer."""
        tree = self.parse(source)
        for node in list(tree.find_all(nodes.Node)):
            if isinstance(node, nodes.For):
                node.iter = _filtered(node.iter, "metered")
            elif isinstance(node, nodes.Add):
                node.left, node.right = _capped(node.left), _capped(node.right)
            elif isinstance(node, nodes.Concat | nodes.Output):
                node.nodes = [_capped(item) for item in node.nodes]
        if followed:
            tree.body = _followed(tree.body, 0, by_index=False)
        return self.from_string(tree)

    # A filter that takes the context is called at each turn; the compiler would fold another one's constants.
    @jinja2.pass_context
    def _entered(__self, __context: Any, item: Any, depth: int) -> Any:
        """Note that the loop inside ``depth`` others has come to ``item``: to a message, or to a tuple that holds one,
        else to some part of what the loop around it has come to."""
        self = __self
        del self.loops[depth:]
        items = item if isinstance(item, tuple) else (item,)
        around = self.loops[-1] if self.loops else None
        self.current = next((self.numbers[id(x)] for x in items if id(x) in self.numbers), around)
        self.loops.append(self.current)
        return item

    @jinja2.pass_context
    def _assigned(__self, __context: Any, value: Any, depth: int) -> Any:
        """Note that a loop over numbers has taken ``value``, if that is a message, by its number."""
        if id(value) in __self.numbers:
            __self._entered(__context, value, depth)
        return value

    @jinja2.pass_context
    def _left(__self, __context: Any, depth: int) -> None:
        del __self.loops[depth:]
        __self.current = __self.loops[-1] if __self.loops else None

    def tick(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _Runaway(f"more than {MAX_STEPS:,} steps")
        if not self.steps & 255 and time.monotonic() > self.deadline:
            raise _Runaway(f"more than {MAX_SECONDS:g} seconds")

    def _metered(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item

    def _capped(self, value: Any) -> Any:
        if isinstance(value, _SIZED) and len(value) > self.limit:
            raise _Runaway(f"a text of more than {self.limit:,} characters")
        return value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join":
                _check_short(owner)
            # Jinja's compiler adds keywords with an underscore for its own use.
            for argument in (*args, *(value for name, value in kwargs.items() if name[0] != "_")):
                _check_short(argument)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        method = super().wrap_str_format(value)
        if method is not None and _WIDE.search(value.__self__):
            raise _Runaway("a format that pads its text")
        return method

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            if _WIDE.search(left):
                raise _Runaway("a format that pads its text")
        elif operator != "%":
            sizes = [len(x) if isinstance(x, _SIZED) else abs(x) for x in (left, right)]
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if max(sizes) > 1 << 53 or (operator == "**" and sizes[1] > 16):
                raise _Runaway("a number too large to be meant")
            if not numbers and sizes[0] * sizes[1] > self.limit:
                raise _Runaway(f"a text of more than {self.limit:,} characters")
        return super().call_binop(context, operator, left, right)


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
        self.where, self.source, self._names, self._sandbox = where, source, dict(names), _Sandbox()
        self._lock = threading.Lock()  # one rendering at a time: the limits are counted in the environment
        self._header = ""
        try:
            self._template = self._sandbox.build(source, followed=False)
        except _FAILURES as problem:
            line = f", line {problem.lineno}" if isinstance(problem, jinja2.TemplateSyntaxError) else ""
            raise TokenizerError(f"{where}: the chat template{line} cannot be compiled: {_brief(problem)}") from problem
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

    def _check_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        if self._needs_tools and not tools:
            raise DataError("the chat template serves conversations with tools only: give the row tools")

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
            box.steps, box.deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS
            box.numbers, box.loops, box.current = {id(message): i for i, message in enumerate(messages)}, [], None
            left = box.limit = SPARE_OUTPUT + 4 * size
            names = self._names | {"messages": messages, "add_generation_prompt": prompt}
            try:
                for part in template.generate(names, tools=tools, documents=None):
                    parts.append((part, box.current))
                    left -= len(part)
                    if left < 0:
                        raise _Runaway(f"an output of more than {box.limit:,} characters")
            except _Runaway as problem:
                found = f"{problem} for {len(messages)} messages of {size:,} characters"
                raise TokenizerError(f"{self.where}: the chat template was stopped: {found}") from problem
            except _FAILURES as problem:
                raise DataError(f"the chat template refuses this conversation: {_brief(problem)}") from problem
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


def numbered(roles: Sequence[str]) -> list[dict[str, str]]:
    """Messages of these roles whose contents are SLOTs."""
    return [{"role": role, "content": f"\ue001{number}\ue002"} for number, role in enumerate(roles)]


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


def _filtered(node: Any, name: str, *arguments: Any) -> Any:
    constants = [nodes.Const(value, lineno=node.lineno) for value in arguments]
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)


def _followed(body: Sequence[nodes.Node], depth: int, *, by_index: bool) -> list[nodes.Node]:
    """Statements with a note of the message that each loop has come to; ``depth``: how many loops they stand in;
    ``by_index``: the innermost of them counts, so that a message is what is assigned in it.

    Only what writes to the output at once is followed: a macro's text belongs to who called it.
    """
    result: list[nodes.Node] = []
    for node in body:
        result.append(node)
        if isinstance(node, nodes.For) and not node.recursive:
            counts = any(isinstance(x, nodes.Name) and x.name == "range" for x in node.iter.find_all(nodes.Name))
            inner = _followed(node.body, depth + 1, by_index=counts)
            node.body = [_noted(_loaded(node.target), "entered", depth), *inner]
            result.append(_noted(nodes.Const(depth, lineno=node.lineno), "left"))
        elif isinstance(node, nodes.If):
            for part in (node, *node.elif_):
                part.body = _followed(part.body, depth, by_index=by_index)
            node.else_ = _followed(node.else_, depth, by_index=by_index)
        elif isinstance(node, nodes.With | nodes.Scope):
            node.body = _followed(node.body, depth, by_index=by_index)
        elif by_index and isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            result.append(_noted(_loaded(node.target), "assigned", depth - 1))
    return result


def _noted(node: nodes.Expr, name: str, *arguments: Any) -> nodes.Node:
    return nodes.ExprStmt(_filtered(node, name, *arguments), lineno=node.lineno)


def _loaded(target: Any) -> nodes.Expr:
    """What a loop's target or an assignment's holds, as an expression."""
    if isinstance(target, nodes.Tuple):
        return nodes.Tuple([_loaded(item) for item in target.items], "load", lineno=target.lineno)
    if isinstance(target, nodes.Name):
        return nodes.Name(target.name, "load", lineno=target.lineno)
    return nodes.Const(None, lineno=target.lineno)


def _capped(node: Any) -> Any:
    # What stands in the template itself is no longer than the template.
    return node if isinstance(node, nodes.Const | nodes.TemplateData) else _filtered(node, "capped")


def _short_arguments(function: Any) -> Any:
    # Jinja passes its context first to filters that carry this mark; the value filtered comes next.
    given = 2 if hasattr(function, "jinja_pass_arg") else 1

    def short(*arguments: Any, **keywords: Any) -> Any:
        for argument in (*arguments[given:], *keywords.values()):
            _check_short(argument)
        return function(*arguments, **keywords)

    short.__dict__.update(function.__dict__)
    return short


def _check_short(argument: Any) -> None:
    if (isinstance(argument, str) and len(argument) > _SHORT) or (isinstance(argument, int) and argument > _SHORT):
        raise _Runaway(f"a string operation with an argument over {_SHORT}")


def _brief(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **rest: Any) -> str:
    # Jinja's own filter escapes HTML; the models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **rest)
