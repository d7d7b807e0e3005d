"""The sandbox that chat templates are compiled and rendered in: what came with a model is never trusted.

The environment is the one that transformers renders with (immutable sandbox, `trim_blocks`, `lstrip_blocks`, loop
controls, `tojson`, `raise_exception`, `strftime_now`), so a template writes the same text here and there. On top, a
template cannot run away: filters, tests and methods come from lists, and whatever makes, reads or writes a value goes
through a `Meter`, before it is done where it could multiply what it is given. This costs less than rendering in a
process of its own would: a row's way there and back alone takes longer than all that is counted for it.

A template can also be compiled so that it tells, at each turn of its loops, which message it has come to.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from afina.loaders.text.meter import Meter, Runaway

_DEEP = 16  # longest indent and separator of JSON
_SHORT = 256  # longest indent of a text, and form of a date
# Filters that look at no more than the length of what they are given, or pass its items on one by one.
_CHEAP = frozenset({"count", "d", "default", "first", "last", "length", "items"})
_LAZY = frozenset({"map", "reject", "rejectattr", "select", "selectattr"})
_SORTS = frozenset({"dictsort", "sort", "unique"})
_FILTERS = _CHEAP | _LAZY | _SORTS
_FILTERS |= {"abs", "capitalize", "e", "escape", "float", "indent", "int", "join", "list", "lower", "max", "min"}
_FILTERS |= {"replace", "reverse", "round", "safe", "string", "title", "trim", "upper"}
_TYPES = frozenset({"boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none"})
_TYPES |= {"number", "sameas", "sequence", "string", "true", "undefined", "filter", "test"}
_NUMERIC = frozenset({"divisibleby", "even", "odd"})  # of a text, "%" is not the rest of a division
_TESTS = _TYPES | _NUMERIC | {"!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in"}
_TESTS |= {"le", "lessthan", "lower", "lt", "ne", "upper"}
_GLOBALS = ("dict", "namespace", "range")
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (
        str,
        frozenset({"capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"})
        | {"isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower"}
        | {"lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"}
        | {"rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"},
    ),
    (Mapping, frozenset({"copy", "get", "items", "keys", "values"})),
    (list, frozenset({"copy", "count", "index"})),
    (tuple, frozenset({"count", "index"})),
)
_WIDE = re.compile(r"\d{4}|\*|\{[^}]*\{")  # format strings that pad to a width of their own choosing
_WIDTH = 999  # which a format string may pad to
_MAX_POWER = 16
_MAX_NUMBER = 1 << 53
FAILURES: tuple[type[Exception], ...] = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
)
FAILURES += (MemoryError, RecursionError, SyntaxError, TypeError, ValueError)
# No name in a template can hold a space: these filters are ours alone.
_MADE, _READ, _TURNS = "made ", "read ", "turns "
SHOWN, JOINED = "shown ", "joined "  # what is written; what `~` makes
_ENTERED, _ASSIGNED, _LEFT = "entered ", "assigned ", "left "


class _Generation(Extension):
    """`{% generation %}` marks assistant text for other libraries; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, **syntax: Any) -> None:
        """``syntax``: options of jinja's environment in place of those that chat templates are written for."""
        syntax = {"trim_blocks": True, "lstrip_blocks": True, **syntax}
        super().__init__(extensions=[_Generation, "jinja2.ext.loopcontrols"], optimized=False, **syntax)
        meter = self.meter = Meter()
        self.filters = {name: self._guarded(name, self.filters[name]) for name in sorted(_FILTERS)}
        self.filters |= {"tojson": self._to_json, _MADE: meter.made, _READ: meter.read, _TURNS: meter.turns}
        self.filters |= {SHOWN: meter.shown, JOINED: self._joined}
        self.filters |= {_ENTERED: self._entered, _ASSIGNED: self._assigned, _LEFT: self._left}
        self.tests = {name: self._guarded_test(name, self.tests[name]) for name in sorted(_TESTS)}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"raise_exception": _refuse, "strftime_now": strftime_now}
        # The messages that are rendered, by identity; which of them each loop of the template has come to, the
        # outermost loop first; and the innermost of these: the one that is being written.
        self.numbers: dict[int, int] = {}
        self.loops: list[int | None] = []
        self.current: int | None = None

    def begin(self, messages: Sequence[Any], size: int) -> int:
        """Set the limits for one rendering of ``messages`` of ``size`` characters; returns how much it may write."""
        self.meter.start(len(messages), size)
        self.numbers, self.loops, self.current = {id(message): i for i, message in enumerate(messages)}, [], None
        return self.meter.limit

    def build(self, source: str, *, followed: bool) -> jinja2.Template:
        """Compile ``source`` with all that it makes metered; ``followed``: it tells at what message it is, which takes
        longer."""
        self.meter.stop()
        tree = _Metering().visit(self.parse(source))
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

    # Values

    def _joined(self, values: Sequence[Any]) -> str:
        """What `~` makes of its operands."""
        self.meter.fits(sum([len(x) if isinstance(x, str) else self.meter.weigh(x) for x in values]))
        text: str = self.meter.made("".join(map(str, values)))
        return text

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
        self.meter.weigh(value, 4 + sum(lengths), lengths[0])
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        made: str = self.meter.made(text)
        return made

    # What templates call

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that accounts for what it reads and makes, and refuses what would make too much."""
        meter = self.meter
        before: dict[str, Callable[..., None]] = {
            "join": self._before_join,
            "replace": self._before_replace,
            "indent": self._before_indent,
        }
        check = before.get(name)
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja passes its context before the value
        plain = name not in _LAZY | _SORTS | {"list"} and check is None

        @functools.wraps(function)
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            if plain and len(arguments) == first + 1 and not keywords and isinstance(arguments[first], str):
                return meter.made(function(*arguments[:first], meter.read(arguments[first])))
            given = list(arguments)
            given[first:] = [meter.turns(x) if isinstance(x, Iterator) else x for x in given[first:]]
            if name in _LAZY:
                if not isinstance(given[first], Iterator):
                    given[first] = meter.turns(given[first] or ())
                return function(*given, **keywords)
            if name not in _CHEAP:
                if isinstance(given[first], Iterator):
                    given[first] = list(given[first])
                for argument in (*given[first:], *keywords.values()):
                    meter.read(argument)
                size = meter.weigh(given[first]) if name in _SORTS or name in ("min", "max", "string", "safe") else 0
                if name in _SORTS:
                    rounds = len(given[first]).bit_length()
                    meter.spend((len(given[first]) * rounds >> 2) + (size * rounds >> 6))
                elif name == "list" and isinstance(given[first], str):
                    meter.spend(len(given[first]))
                elif name == "round":
                    _check_round(*given[first:], **keywords)
                if check is not None:
                    check(*given[first:], **keywords)
            return meter.made(function(*given, **keywords))

        return guarded

    def _before_join(self, value: Any, d: Any = "", attribute: Any = None) -> None:
        self.meter.weigh(value, 4 + len(d if isinstance(d, str) else repr(d)))

    def _before_replace(self, s: Any, old: Any, new: Any, count: Any = None) -> None:
        text, old, new = str(s), str(old), str(new)
        times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
        self.meter.fits(len(text) + times * (len(new) - len(old)))

    def _before_indent(self, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> None:
        size = len(width) if isinstance(width, str) else int(width)
        if size > _SHORT:
            raise Runaway(f"an indent of more than {_SHORT} characters")
        text = str(s)
        self.meter.fits(len(text) + size * (1 + len(text.splitlines())))

    def _guarded_test(self, name: str, function: Any) -> Callable[..., Any]:
        if name in _TYPES:
            return function

        @functools.wraps(function)
        def guarded(*arguments: Any) -> Any:
            for argument in arguments:
                if name in _NUMERIC and not isinstance(argument, int | float):
                    raise TypeError(f"{name} is asked of what is no number")
                self.meter.read(argument)
            return function(*arguments)

        return guarded

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        meter.spend()
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, LoopContext):  # a recursive loop: what it is called with is not in any `for`
            args = (meter.turns(args[0]), *args[1:]) if args else args
        elif owner is not None or __obj is dict:
            # Jinja's compiler adds keywords with an underscore for its own use.
            args = tuple([list(meter.turns(x)) if isinstance(x, Iterator) else x for x in args])
            for argument in (*args, *(value for name, value in kwargs.items() if name[0] != "_")):
                meter.read(argument)
            if isinstance(owner, str | list | tuple):
                meter.read(owner)
                name = __obj.__name__
                if isinstance(owner, str) and name == "join" and args:
                    meter.weigh(args[0], 4 + len(owner))
                elif isinstance(owner, str) and name == "replace":
                    __self._before_replace(owner, *args)
        return meter.made(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        closed = isinstance(obj, int | float | range | type | Iterator) and not isinstance(obj, LoopContext)
        return not closed and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        method = super().wrap_str_format(value)
        if method is None:
            return None
        form: str = value.__self__

        def formatted(*arguments: Any, **keywords: Any) -> Any:
            self._check_format(form, "{", (arguments, keywords))
            return method(*arguments, **keywords)

        return formatted

    def _check_format(self, form: str, mark: str, values: Any) -> None:
        if _WIDE.search(form):
            raise Runaway("a format that pads its text")
        self.meter.read(form)
        self.meter.fits(len(form) + form.count(mark) * (_WIDTH + self.meter.weigh(values)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            return self.meter.made(left + right)
        if operator == "%" and isinstance(left, str):
            self._check_format(left, "%", right)
        elif operator in ("*", "**"):
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if max(sizes) > _MAX_NUMBER or (operator == "**" and sizes[1] > _MAX_POWER):
                raise Runaway("a number too large to be meant")
            if not numbers:
                self.meter.fits(sizes[0] * sizes[1])
        return self.meter.made(super().call_binop(context, operator, left, right))


class _Metering(NodeTransformer):
    """Puts the meter's filters around what the syntax itself makes and reads."""

    def __init__(self) -> None:
        self._buffered = 0

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._inside(node, node.recursive)
        node.iter = _filtered(node.iter, _TURNS)
        return node

    def _inside(self, node: Any, buffered: bool = True) -> Any:
        """Visit what is below a node, whose text is kept until it is whole if ``buffered``."""
        self._buffered += buffered
        self.generic_visit(node)
        self._buffered -= buffered
        return node

    visit_AssignBlock = visit_Block = visit_CallBlock = visit_FilterBlock = visit_Macro = _inside

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        shown: list[nodes.Expr] = []
        for item in node.nodes:
            if isinstance(item, nodes.TemplateData) and self._buffered:
                item = nodes.Const(item.data, lineno=item.lineno)
            elif isinstance(item, nodes.TemplateData):
                shown.append(item)  # it is counted when it leaves the template
                continue
            shown.append(_filtered(item, SHOWN))
        node.nodes = shown
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _read(node.expr)
        for operand in node.ops:
            operand.expr = _read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, _MADE)
        node.arg = _read(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _read(node.key)
        return node

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if stored or _constant(node) else _filtered(node, _MADE)

    visit_List = visit_Tuple = visit_Dict = _literal


def _constant(node: Any) -> bool:
    """Whether an expression is written out in the template: it is no larger than that."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return len(node.items) <= _DEEP and all(map(_constant, node.items))
    return isinstance(node, nodes.Const)


def _read(node: Any) -> Any:
    return node if _constant(node) else _filtered(node, _READ)


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
            node.body = [_noted(_loaded(node.target), _ENTERED, depth), *inner]
            result.append(_noted(nodes.Const(depth, lineno=node.lineno), _LEFT))
        elif isinstance(node, nodes.If):
            for part in (node, *node.elif_):
                part.body = _followed(part.body, depth, by_index=by_index)
            node.else_ = _followed(node.else_, depth, by_index=by_index)
        elif isinstance(node, nodes.With | nodes.Scope):
            node.body = _followed(node.body, depth, by_index=by_index)
        elif by_index and isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            result.append(_noted(_loaded(node.target), _ASSIGNED, depth - 1))
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


def _check_round(value: Any, precision: Any = 0, method: str = "common") -> None:
    if not isinstance(value, int | float) or not isinstance(precision, int) or abs(precision) > _MAX_POWER:
        raise TypeError(f"round needs a number, and a precision up to {_MAX_POWER}")


def strftime_now(form: str) -> str:
    """The date of now as ``form`` says. Raises Runaway for a form that makes much of it."""
    if len(form) > _SHORT or _WIDE.search(form):
        raise Runaway("a date of a form that pads its text")
    return datetime.now().strftime(form)


def brief(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
