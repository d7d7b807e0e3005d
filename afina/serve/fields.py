"""The fields of a request: each read once, with its type and range; what is wrong or unknown is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from afina.errors import AfinaError, nearest
from afina.loaders.data.conversations import kind_of
from afina.loaders.jsonfile import parse_json, show
from afina.serve.errors import RequestError


class _Bad(AfinaError):
    """What the reader of JSON raises for a body."""


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a request's body is. Raises RequestError for all that readers of JSON differ on."""
    try:
        return parse_json(data, "the request's body", error=_Bad)
    except _Bad as problem:
        raise RequestError(str(problem), code="invalid_json") from problem


class Fields:
    """Reads the fields of an object; ``prefix`` stands before their names in messages. null is as good as absent."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix
        self._known: set[str] = set()

    def name(self, name: str) -> str:
        return self._prefix + name

    def wrong(self, name: str, expected: str) -> RequestError:
        found = self._values.get(name)
        return RequestError(f"{self.name(name)} is {_shown(found)}; expected {expected}", self.name(name))

    def any(self, name: str) -> Any:
        """The value of a field as it is."""
        self._known.add(name)
        return self._values.get(name)

    def flag(self, name: str) -> bool:
        value = self.any(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, name: str) -> str | None:
        value = self.any(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def object(self, name: str) -> Fields | None:
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.name(name)}.")

    def ignored(self, names: Iterable[str]) -> None:
        """Fields that clients send and that change nothing here."""
        self._known |= set(names)

    def only(self, name: str, *values: Any, why: str) -> None:
        """A field that is accepted for those of its values that ask for nothing."""
        value = self.any(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in values):
            raise RequestError(f"{self.name(name)} is {_shown(value)}: {why}", self.name(name), code="unsupported")

    def done(self) -> None:
        """Refuse the fields that nobody asked for."""
        for name in self._values:
            if name not in self._known:
                shown = name if name.isprintable() and len(name) < 60 else show(name)
                told = f"{self._prefix}{shown} is no field of this request{nearest(name[:60], self._known)}"
                raise RequestError(told, self._prefix + name[:60], code="unknown_field")


def _shown(value: Any) -> str:
    return kind_of(value) if value is None or isinstance(value, dict | list) else show(value)
