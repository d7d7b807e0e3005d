"""The sandbox that chat templates are compiled and rendered in: what came with a model is never trusted.

The environment is the one that transformers renders with (immutable sandbox, `trim_blocks`, `lstrip_blocks`, loop
controls, `tojson`, `raise_exception`, `strftime_now`), so a template writes the same text here and there. On top, a
template cannot run away: loops and calls are counted against a limit of steps and of seconds, texts and the output
have a limit, and what could multiply a text in one step is refused. The limits are checked inside the template's own
steps, so they hold in any thread and need no signal, timer or process.

A template can also be compiled so that it tells, at each turn of its loops, which message it has come to.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # loop turns and calls of one rendering
MAX_SECONDS = 5.0
SPARE_OUTPUT = 1 << 20  # characters that a template may write besides four times its messages
_SHORT = 256  # longest argument of the string methods and filters that can multiply a text
_DEEP = 16  # longest indent and separator of JSON
_MULTIPLIERS = ("replace", "join", "indent")
_USELESS = ("batch", "center", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")
_WIDE = re.compile(r"\d{4}|\*|\{[^}]*\{")  # format strings that pad to a width of their own choosing
_SIZED = (str, list, tuple)  # what a template can make longer
FAILURES: tuple[type[Exception], ...] = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
)
FAILURES += (MemoryError, RecursionError, SyntaxError, TypeError, ValueError)


class Runaway(RuntimeError):
    """A template went past one of its limits."""


class _Generation(Extension):
    """`{% generation %}` marks assistant text for other libraries; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **syntax: Any) -> None:
        """``syntax``: options of jinja's environment in place of those that chat templates are written for."""
        syntax = {"trim_blocks": True, "lstrip_blocks": True, **syntax}
        super().__init__(extensions=[_Generation, "jinja2.ext.loopcontrols"], **syntax)
        self.steps, self.deadline, self.limit = 0, 0.0, SPARE_OUTPUT
        for name in _USELESS:
            del self.filters[name]
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        for name in _MULTIPLIERS:
            self.filters[name] = _short_arguments(self.filters[name])
        self.filters |= {"tojson": self._to_json, "metered": self._metered, "capped": self._capped}
        self.filters["shown"] = self._shown
        self.filters |= {"entered": self._entered, "assigned": self._assigned, "left": self._left}
        # The messages that are rendered, by identity; which of them each loop of the template has come to, the
        # outermost loop first; and the innermost of these: the one that is being written.
        self.numbers: dict[int, int] = {}
        self.loops: list[int | None] = []
        self.current: int | None = None
        self.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    def begin(self, messages: Sequence[Any], size: int) -> int:
        """Set the limits for one rendering of ``messages`` of ``size`` characters; returns how much it may write."""
        self.steps, self.deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS
        self.numbers, self.loops, self.current = {id(message): i for i, message in enumerate(messages)}, [], None
        self.limit = SPARE_OUTPUT + 4 * size
        return self.limit

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
                node.nodes = [_capped(item, "shown") for item in node.nodes]
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
            raise Runaway(f"more than {MAX_STEPS:,} steps")
        if not self.steps & 255 and time.monotonic() > self.deadline:
            raise Runaway(f"more than {MAX_SECONDS:g} seconds")

    def _metered(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item

    def _capped(self, value: Any) -> Any:
        if isinstance(value, _SIZED) and len(value) > self.limit:
            raise Runaway(f"a text of more than {self.limit:,} characters")
        return value

    def _shown(self, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            self._check_written(value, 4)
        return self._capped(value)

    def _check_written(self, value: Any, between: int) -> None:
        """Refuse a value whose text would be too long, with so many characters between its parts: a list that holds
        one list twice, which holds another twice, and so on, is small until somebody writes it."""
        size, left = 0, [value]
        while left:
            self.tick()
            item = left.pop()
            size += between + (len(item) if isinstance(item, str) else 0)
            if isinstance(item, dict):
                left += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                left += item
            if size > self.limit:
                raise Runaway(f"a text of more than {self.limit:,} characters")

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own filter escapes HTML; the models were trained on plain JSON.

        These options are all that templates use. ``json.dumps`` has others that call what they are given (``default``,
        ``cls``), outside of the sandbox.
        """
        lengths = [len(x) if isinstance(x, str) else int(x or 0) for x in (indent, *(separators or ()))]
        if max(lengths) > _DEEP:
            raise Runaway(f"JSON with an indent or a separator over {_DEEP}")
        self._check_written(value, 4 + sum(lengths))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

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
            raise Runaway("a format that pads its text")
        return method

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            if _WIDE.search(left):
                raise Runaway("a format that pads its text")
        elif operator != "%":
            sizes = [len(x) if isinstance(x, _SIZED) else abs(x) for x in (left, right)]
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if max(sizes) > 1 << 53 or (operator == "**" and sizes[1] > 16):
                raise Runaway("a number too large to be meant")
            if not numbers and sizes[0] * sizes[1] > self.limit:
                raise Runaway(f"a text of more than {self.limit:,} characters")
        return super().call_binop(context, operator, left, right)


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


def _capped(node: Any, name: str = "capped") -> Any:
    # What stands in the template itself is no longer than the template.
    return node if isinstance(node, nodes.Const | nodes.TemplateData) else _filtered(node, name)


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
        raise Runaway(f"a string operation with an argument over {_SHORT}")


def brief(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
