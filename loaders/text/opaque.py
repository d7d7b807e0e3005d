"""Whether a chat template looks at what messages say, found out once for all conversations of the same roles.

Most templates only copy contents, so the text around them is the same in every conversation of the same roles, and
rendering each costs as much as tokenising it. But a template may also ask what a content says, and two that look alike
differ in that. So it is rendered once with contents that are no texts: a `Probe` can be written, joined to other texts
and stripped, and gives the few answers that hold for nearly all contents, each noted as something that a content must
have or lack (`Opaque.holds`). Whatever else is done with one is noted as a look at it, also where a template or Jinja
itself goes on after the error: then nothing is known, and every conversation is rendered.

A probe is no `str`, into which code in C could look without a word. It is told apart from a text by its type alone,
which filters and tests ask for; so those that are given one are chosen here by name, and all others count as a look.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from afina.loaders.text.meter import Runaway
from afina.loaders.text.sandbox import FAILURES, JOINED, SHOWN, Sandbox, strftime_now

SLOT = re.compile("\ue001([0-9]+)\ue002")  # what stands for a content: the number of its message
_OPENS_SLOT = "\ue001"
# What these answer does not depend on what a text says. The first two are answered for a text, which a probe is not.
_ITS_KIND = frozenset({"string", "iterable", "sequence"})
_KINDS = frozenset({"boolean", "callable", "defined", "false", "float", "integer", "mapping", "none", "number", "true"})
_KINDS |= {"undefined"}
_METHODS = frozenset({"strip", "lstrip", "rstrip", "split", "startswith", "endswith", "replace"})
_LOOKS: tuple[str, ...] = (
    "str",
    "repr",
    "format",
    "hash",
    "len",
    "iter",
    "reversed",
    "getitem",
    "index",
    "int",
    "float",
    "complex",
)
_LOOKS += ("lt", "le", "gt", "ge", "html", "add", "radd", "mod", "rmod", "mul", "rmul")


def numbered(roles: Sequence[str]) -> list[dict[str, str]]:
    """Messages of these roles whose contents are SLOTs."""
    return [{"role": role, "content": f"\ue001{number}\ue002"} for number, role in enumerate(roles)]


class Looked(RuntimeError):
    """A template did with a content what depends on what it says."""


_STOPS: tuple[type[Exception], ...] = (Looked, Runaway, *FAILURES)


@dataclass(frozen=True)
class Opaque:
    """What a template writes for some roles whatever the contents say, if only they are as ``holds`` asks.

    ``text``: with SLOTs for contents. ``filled``: no content may be empty. ``bare``: nor begin or end with a blank.
    ``absent``: texts that may stand in none. ``dates``: the forms of dates that the template asked for, and what they
    gave.
    """

    text: str
    filled: bool
    bare: bool
    absent: tuple[str, ...]
    dates: tuple[tuple[str, str], ...]

    def holds(self, contents: Sequence[str]) -> bool:
        """Whether the template writes :attr:`text` with these contents in place of the SLOTs, today."""
        if self.filled and not all(contents):
            return False
        if self.bare and [content.strip() for content in contents] != list(contents):
            return False
        for part in self.absent:
            if True in [part in content for content in contents]:
                return False
        return not self.dates or all(strftime_now(form) == shown for form, shown in self.dates)


@dataclass
class _Seen:
    """What a template asked of contents so far; the answers were those for contents that are as noted."""

    looked: bool = False
    filled: bool = False
    bare: bool = False
    absent: set[str] = field(default_factory=set)
    dates: dict[str, str] = field(default_factory=dict)

    def look(self) -> NoReturn:
        self.looked = True
        raise Looked("a content")


class Probe:
    """A text that is not known: that of one message, or texts and such joined. ``parts``: texts, and numbers of
    messages; one of these at least."""

    def __init__(self, seen: _Seen, parts: Iterable[str | int]) -> None:
        self._seen, self._parts = seen, tuple(part for part in parts if part != "")

    @property
    def parts(self) -> tuple[str | int, ...]:
        return self._parts

    def _lacks(self, text: Any) -> None:
        """Note that ``text`` stands in no content; asked of a content as it is only, for it may stand across parts."""
        if type(text) is not str or not text or len(self._parts) > 1:
            self._seen.look()
        self._seen.absent.add(text)

    def __bool__(self) -> bool:
        self._seen.filled = True
        return True

    def __eq__(self, other: object) -> bool:
        if other == "" and type(other) is str:
            return not self
        if other is not None and type(other) not in (bool, int, float):
            self._lacks(other)
        return False

    def __contains__(self, text: Any) -> bool:
        self._lacks(text)
        return False

    def startswith(self, text: Any) -> bool:
        return text in self

    def endswith(self, text: Any) -> bool:
        return text in self

    def split(self, separator: Any = None) -> list[Probe]:
        self._lacks(separator)
        return [self]

    def replace(self, old: Any, new: Any) -> Probe:
        self._lacks(old)
        if type(new) is not str:
            self._seen.look()
        return self

    def strip(self, characters: Any = None) -> Probe:
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: Any = None) -> Probe:
        parts = self._stripping(characters)
        while isinstance(parts[0], str):
            if left := parts[0].lstrip(characters):
                return Probe(self._seen, (left, *parts[1:]))
            del parts[0]
        return Probe(self._seen, parts)

    def rstrip(self, characters: Any = None) -> Probe:
        parts = self._stripping(characters)
        while isinstance(parts[-1], str):
            if left := parts[-1].rstrip(characters):
                return Probe(self._seen, (*parts[:-1], left))
            del parts[-1]
        return Probe(self._seen, parts)

    def _stripping(self, characters: Any) -> list[str | int]:
        """The parts; of one that is a content nothing is taken off, for it neither begins nor ends with a blank."""
        if characters is not None and not (type(characters) is str and (not characters or characters.isspace())):
            self._seen.look()
        self._seen.filled = self._seen.bare = True
        return list(self._parts)

    def __getattr__(self, name: str) -> Any:
        self._seen.look()


def _look(probe: Probe, *arguments: Any, **keywords: Any) -> NoReturn:
    probe._seen.look()


for _name in _LOOKS:
    setattr(Probe, f"__{_name}__", _look)


class Probing(Sandbox):
    """The sandbox of chat templates for contents that are probes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = _Seen()
        self.filters |= {name: self._asked(name, function) for name, function in self.filters.items()}
        self.filters |= {SHOWN: self._shown, JOINED: self._joined}
        self.tests = {name: self._asked_test(name, function) for name, function in dict[str, Any](self.tests).items()}
        self.globals["strftime_now"] = self._date

    # What is written while a macro or a block collects it is a text with SLOTs, until that is whole.

    def _shown(self, value: Any) -> Any:
        parts = value.parts if isinstance(value, Probe) else (value,)
        if any(isinstance(part, str) and _OPENS_SLOT in part for part in parts):
            self.seen.look()
        if isinstance(value, Probe):
            return "".join([part if isinstance(part, str) else f"\ue001{part}\ue002" for part in parts])
        return self.meter.shown(value)

    def concat(self, texts: Iterable[str]) -> Any:
        text = "".join(texts)
        return self._probe(text) if _OPENS_SLOT in text else text

    def _probe(self, text: str) -> Probe:
        """The probe of a text with SLOTs."""
        return Probe(self.seen, [int(part) if place % 2 else part for place, part in enumerate(SLOT.split(text))])

    def _joined(self, values: Sequence[Any]) -> Any:
        if any(isinstance(value, Probe) for value in values):
            texts = [self._shown(value if isinstance(value, str | Probe) else str(value)) for value in values]
            return self.concat([self.meter.made("".join(texts))])
        return super()._joined(values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not isinstance(left, Probe) and not isinstance(right, Probe):
            return super().call_binop(context, operator, left, right)
        if operator != "+" or not isinstance(left, str | Probe) or not isinstance(right, str | Probe):
            self.seen.look()
        return self._joined([left, right])

    def _asked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that may be given a probe only where it does not look into it."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def asked(*arguments: Any, **keywords: Any) -> Any:
            if not any(isinstance(x, Probe) for x in (*arguments, *keywords.values())):
                return function(*arguments, **keywords)
            value = arguments[first]
            if name in ("default", "d"):
                return function(*arguments, **keywords)
            if not isinstance(value, Probe) or len(arguments) > first + 1 or keywords:
                self.seen.look()
            if name == "trim":
                return value.strip()
            if name != "string" and " " not in name:  # a meter's own, whose names hold a space, asks for types alone
                self.seen.look()
            return value

        return asked

    def _asked_test(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def asked(*arguments: Any) -> Any:
            if any(isinstance(x, Probe) for x in arguments):
                if name in _ITS_KIND:
                    return True
                if name not in _KINDS:
                    self.seen.look()
            return function(*arguments)

        return asked

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Probe):
            return getattr(obj, attribute) if attribute in _METHODS else self.seen.look()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Probe) or isinstance(argument, Probe):
            self.seen.look()
        return super().getitem(obj, argument)

    def _date(self, form: str) -> str:
        shown = strftime_now(form)
        if self.seen.dates.setdefault(form, shown) != shown:  # a second ended
            self.seen.look()
        return shown


class Prober:
    """A template compiled to be asked what it does with contents. ``names``: what it may read besides messages."""

    def __init__(self, source: str, names: Mapping[str, Any]) -> None:
        self._box, self._names = Probing(), dict(names)
        self._own_slots = _OPENS_SLOT in source
        self._template = self._box.build(source, followed=False)

    def opaque(self, roles: Sequence[str]) -> Opaque | None:
        """What is written for messages of these roles, of nothing but a role and a content; None where it may depend
        on more of the contents than can be said."""
        if self._own_slots:
            return None
        box, seen = self._box, _Seen()
        box.seen = seen
        messages = [{"role": role, "content": Probe(seen, (number,))} for number, role in enumerate(roles)]
        left = box.begin(messages, 0)  # what every conversation may write, so that none is stopped for it
        names = self._names | {"messages": messages, "add_generation_prompt": False}
        parts = []
        try:
            for part in self._template.generate(names, tools=None, documents=None):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    return None
        except _STOPS:
            return None
        if seen.looked:
            return None
        return Opaque("".join(parts), seen.filled, seen.bare, tuple(sorted(seen.absent)), tuple(seen.dates.items()))
