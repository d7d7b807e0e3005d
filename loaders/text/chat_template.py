"""Chat templates: Jinja source that came with a model, rendered without trusting it.

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
        self.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    def build(self, source: str) -> jinja2.Template:
        """Compile ``source`` with its loops metered and its texts capped."""
        tree = self.parse(source)
        for node in list(tree.find_all(nodes.Node)):
            if isinstance(node, nodes.For):
                node.iter = _filtered(node.iter, "metered")
            elif isinstance(node, nodes.Add):
                node.left, node.right = _capped(node.left), _capped(node.right)
            elif isinstance(node, nodes.Concat | nodes.Output):
                node.nodes = [_capped(item) for item in node.nodes]
        return self.from_string(tree)

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

    ``turn_end``: what it writes after an assistant turn.
    TokenizerError when it cannot be compiled or does not write a user's and an assistant's message exactly once.
    """

    def __init__(self, source: str, where: str, names: Mapping[str, Any]) -> None:
        if len(source) > MAX_SOURCE:
            size = f"{len(source):,} characters, at most {MAX_SOURCE:,} are accepted"
            raise TokenizerError(f"{where}: the chat template has {size}")
        self.where, self._names, self._sandbox = where, dict(names), _Sandbox()
        self._lock = threading.Lock()  # one rendering at a time: the limits are counted in the environment
        self._header = ""
        try:
            self._template = self._sandbox.build(source)
        except _FAILURES as problem:
            line = f", line {problem.lineno}" if isinstance(problem, jinja2.TemplateSyntaxError) else ""
            raise TokenizerError(f"{where}: the chat template{line} cannot be compiled: {_brief(problem)}") from problem
        try:
            talk = self._canary("user", "assistant")
            opened, closed = (self.render(numbered(["user"]), add_generation_prompt=flag) for flag in (True, False))
        except DataError as problem:
            raise TokenizerError(f"{where}: of a user's and an assistant's message, {problem}") from problem
        _, answer = SLOT.finditer(talk)
        self.turn_end = talk[answer.end() :]
        if opened == closed and talk.startswith(opened):
            # The template knows no generation prompt: open the turn as it is opened before an answer.
            header = talk[len(opened) : answer.start()]
            self._header = header if header.strip() else ""

    def _canary(self, *roles: str) -> str:
        text = self.render(numbered(roles))
        for number, role in enumerate(roles):
            times = [match[1] for match in SLOT.finditer(text)].count(str(number))
            if times != 1:
                raise DataError(f"the chat template writes message {number + 1} ({role}) {times} times, not once")
        return text

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Return the text of ``messages``, with the header of a next assistant turn if asked for.

        DataError when the template refuses the messages or fails on them, TokenizerError when it goes past a limit.
        """
        size = sum(len(message["content"]) for message in messages)
        parts: list[str] = []
        with self._lock:
            box = self._sandbox
            box.steps, box.deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS
            left = box.limit = SPARE_OUTPUT + 4 * size
            names = self._names | {"messages": messages, "add_generation_prompt": add_generation_prompt}
            try:
                for part in self._template.generate(names, tools=None, documents=None):
                    parts.append(part)
                    left -= len(part)
                    if left < 0:
                        raise _Runaway(f"an output of more than {box.limit:,} characters")
            except _Runaway as problem:
                found = f"{problem} for {len(messages)} messages of {size:,} characters"
                raise TokenizerError(f"{self.where}: the chat template was stopped: {found}") from problem
            except _FAILURES as problem:
                raise DataError(f"the chat template refuses this conversation: {_brief(problem)}") from problem
        return "".join(parts) + (self._header if add_generation_prompt else "")


def numbered(roles: Sequence[str]) -> list[dict[str, str]]:
    """Messages of these roles whose contents are SLOTs."""
    return [{"role": role, "content": f"\ue001{number}\ue002"} for number, role in enumerate(roles)]


def _filtered(node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


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
