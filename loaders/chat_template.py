"""Chat templates: Jinja source that came with a model, rendered without trusting it.

The environment is the one that transformers renders with (immutable sandbox, `trim_blocks`, `lstrip_blocks`, loop
controls, `tojson`, `raise_exception`, `strftime_now`), so a template writes the same text here and there. On top, a
template cannot run away: every loop and call is counted against a limit of steps and of seconds, the output has a
limit, and strings that grow by doubling or by a factor are stopped. The limits are checked inside the template's own
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
_SHORT = 256  # longest argument of the string methods and filters that can multiply a text
_MULTIPLIERS = frozenset({"replace", "join", "indent"})
_USELESS = ("batch", "center", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")
_WIDE = re.compile(r"\d{4}|\*|\{[^}]*\{")  # format strings that pad to a width of their own choosing
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


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
            self.filters[name] = self._short_arguments(self.filters[name])
        self.filters |= {"tojson": _to_json, "metered": self._metered, "capped": self._capped}
        self.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    def build(self, source: str) -> jinja2.Template:
        """Compile ``source`` with meters on its loops and caps on what its expressions join or write."""
        tree = self.parse(source)
        for node in list(tree.find_all((nodes.For, nodes.Concat, nodes.Add, nodes.Output))):
            if isinstance(node, nodes.For):
                node.iter = _filtered(node.iter, "metered")
            elif isinstance(node, nodes.Add):
                node.left, node.right = _filtered(node.left, "capped"), _filtered(node.right, "capped")
            elif isinstance(node, nodes.Concat | nodes.Output):
                node.nodes = [n if isinstance(n, nodes.TemplateData) else _filtered(n, "capped") for n in node.nodes]
        return self.from_string(tree)

    def _tick(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _Runaway(f"more than {MAX_STEPS:,} steps")
        if not self.steps & 255 and time.monotonic() > self.deadline:
            raise _Runaway(f"more than {MAX_SECONDS:g} seconds")

    def _metered(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._tick()
            yield item

    def _capped(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > self.limit:
            raise _Runaway(f"a text of more than {self.limit:,} characters")
        return value

    def _short_arguments(self, function: Any) -> Any:
        # Jinja passes its context first to filters that carry this mark; the value filtered comes next.
        given = 2 if hasattr(function, "jinja_pass_arg") else 1

        def short(*arguments: Any, **keywords: Any) -> Any:
            for argument in (*arguments[given:], *keywords.values()):
                _check_short(argument)
            return function(*arguments, **keywords)

        short.__dict__.update(function.__dict__)
        return short

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join":
                _check_short(owner)
            for argument in (*args, *kwargs.values()):
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
        elif operator == "**":
            if not (abs(left) < 1 << 16 and abs(right) <= 16):
                raise _Runaway("a number too large to be meant")
        elif operator == "*":
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            if not sizes[0] * sizes[1] < 1 << 53:
                raise _Runaway("a number too large to be meant")
            if not (isinstance(left, int | float) and isinstance(right, int | float)) and (
                sizes[0] * sizes[1] > self.limit
            ):
                raise _Runaway(f"a text of more than {self.limit:,} characters")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template. ``names``: what it may read besides the messages (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, where: str, names: Mapping[str, Any]) -> None:
        if len(source) > MAX_SOURCE:
            raise TokenizerError(
                f"{where}: the chat template has {len(source):,} characters, at most {MAX_SOURCE:,} are accepted"
            )
        self.source, self.where = source, where
        self._names = dict(names)
        self._sandbox = _Sandbox()
        self._lock = threading.Lock()  # one rendering at a time: the limits are counted in the environment
        try:
            self._template = self._sandbox.build(source)
        except _FAILURES as problem:
            line = getattr(problem, "lineno", None)
            at = f", line {line}" if line else ""
            raise TokenizerError(f"{where}: the chat template{at} cannot be compiled: {_brief(problem)}") from problem

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Return the text of ``messages``, with the header of a next assistant turn if asked for.

        DataError when the template refuses the messages or fails on them, TokenizerError when it goes past a limit.
        """
        size = sum(len(message["content"] or "") for message in messages)
        parts: list[str] = []
        with self._lock:
            box = self._sandbox
            box.steps, box.deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS
            left = box.limit = SPARE_OUTPUT + 4 * size
            try:
                for part in self._template.generate(
                    **self._names,
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                ):
                    parts.append(part)
                    left -= len(part)
                    if left < 0:
                        raise _Runaway(f"an output of more than {box.limit:,} characters")
            except _Runaway as problem:
                raise TokenizerError(
                    f"{self.where}: the chat template was stopped: {problem} for a conversation of {len(messages)} "
                    f"messages and {size:,} characters"
                ) from problem
            except _FAILURES as problem:
                raise DataError(f"the chat template refuses this conversation: {_brief(problem)}") from problem
        return "".join(parts)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _check_short(argument: Any) -> None:
    if (isinstance(argument, str) and len(argument) > _SHORT) or (isinstance(argument, int) and argument > _SHORT):
        raise _Runaway(f"a string operation with an argument over {_SHORT}")


def _brief(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; the models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
