"""The errors a user can cause. At the command line each is one line and exit status 2, never a traceback."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable

_LONG, _MANY = 200, 200  # characters of a name, and names, that `nearest` compares


class AfinaError(Exception):
    """Base of every error that the user's request, files or settings cause.

    The message is one line: what was found, where (file, line or key), what was expected, how to mend it.
    """


class WeightsError(AfinaError):
    """Model weights that are missing, damaged or contradict their config."""


class ConfigError(AfinaError):
    """A model config, recipe or option that cannot be honoured."""


class TokenizerError(AfinaError):
    """Tokenizer files or chat templates that are missing, damaged or contradict the model."""


class DataError(AfinaError):
    """Training or evaluation rows that cannot be used."""


class RunError(AfinaError):
    """A run folder that cannot be written, resumed or overwritten."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the option closest to ``name`` and not ``name`` itself, or "" if none is."""
    name = name[:_LONG]
    known = [option for option in options if option != name and len(option) <= 2 * _LONG]
    if len(known) > _MANY:  # comparing in full takes 0.1 ms a pair
        known = sorted({*_around(name, known), *(option[::-1] for option in _around(name[::-1], _reversed(known)))})
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _reversed(names: list[str]) -> list[str]:
    return [name[::-1] for name in names]


def _around(name: str, names: list[str]) -> list[str]:
    """Those of ``names`` that stand beside ``name`` in the alphabet: they begin as it does."""
    names = sorted(names)
    place = bisect.bisect(names, name)
    return names[max(0, place - _MANY // 4) : place + _MANY // 4]
