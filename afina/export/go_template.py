"""The part of Go's text/template that exported Ollama templates are written in: read, and executed as Go would.

An export that says "this template writes what training saw" has executed the template on conversations and compared the
texts. So this reads the template's own text, trimming included, and knows no more of the language than the exporter
writes (https://pkg.go.dev/text/template):

    text   {{ "literal" }}   {{ .Field }}   {{ $name }}   {{ $name := value }}   {{ $name = value }}
    {{ range .Messages }} ... {{ end }}   {{ if eq value value }} ... {{ else if ... }} ... {{ else }} ... {{ end }}

where ``{{-`` and ``-}}`` take the white space off the text beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_STRING = r'"(?:[^"\\]|\\.)*"'
_ACTION = re.compile(rf'{{{{(-\s)?((?:{_STRING}|[^"}}])*?)(\s-)?}}}}', re.DOTALL)
_WORD = re.compile(rf"{_STRING}|:=|=|\$\w+|\.\w+|\w+")
_WORDS = re.compile(rf"\s*(?:(?:{_WORD.pattern})\s*)*")
_ESCAPE = re.compile(r"\\(?:([\\\"nrt])|u([0-9a-f]{4})|U([0-9a-f]{8}))")
_NAMED = {"\\": "\\", '"': '"', "n": "\n", "r": "\r", "t": "\t"}
_LETTERS = {character: f"\\{name}" for name, character in _NAMED.items()}
_SPACE = " \t\r\n"  # what Go trims

Piece = str | tuple[str, ...]  # a text, or the words of an action


class GoTemplateError(ValueError):
    """A template outside of the part that is known here, or that Go would refuse."""


def quoted(text: str) -> str:
    """``text`` as a string literal of Go in printable ASCII, which no reader of a Modelfile drops or trims."""

    def letter(character: str) -> str:
        number = ord(character)
        if 0x20 <= number < 0x7F:
            return character
        return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"

    return '"' + "".join([_LETTERS.get(character) or letter(character) for character in text]) + '"'


def execute(source: str, data: Mapping[str, Any]) -> str:
    """What the template writes for ``data``, whose values are texts and lists of such mappings. GoTemplateError."""
    running = _Execution(_read(source))
    if running.block(0, data, live=True) != len(running.pieces):
        raise GoTemplateError("an {{ end }} or {{ else }} that ends nothing")
    return "".join(running.parts)


def _read(source: str) -> list[Piece]:
    pieces: list[Piece] = []
    at, trim = 0, False

    def add(text: str, *, before: bool) -> None:
        if "{{" in text:
            raise GoTemplateError(f"not known here: {text[text.index('{{') :][:80]!r}")
        text = text.lstrip(_SPACE) if trim else text
        pieces.append(text.rstrip(_SPACE) if before else text)

    for match in _ACTION.finditer(source):
        add(source[at : match.start()], before=bool(match[1]))
        if not _WORDS.fullmatch(match[2]) or not (words := tuple(_WORD.findall(match[2]))):
            raise GoTemplateError(f"not known here: {match[0][:80]!r}")
        pieces.append(words)
        at, trim = match.end(), bool(match[3])
    add(source[at:], before=False)
    return pieces


class _Execution:
    """One execution: the pieces, what they have written so far, and the variables of the blocks that are open."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.parts: list[str] = []
        self.scopes: list[dict[str, str]] = []

    def block(self, at: int, data: Mapping[str, Any], *, live: bool) -> int:
        """Execute from ``at`` up to the end or else of this block; where that stands. Of a block that is not ``live``
        that alone is looked for."""
        self.scopes.append({})
        while at < len(self.pieces):
            piece = self.pieces[at]
            if isinstance(piece, str):
                self.parts += [piece] * live
            elif piece[0] in ("end", "else"):
                break
            elif piece[0] == "if":
                at = self.choice(at, data, live=live)
            elif piece[0] == "range":
                at = self.loop(at, data, live=live)
            elif live:
                self.action(piece, data)
            at += 1
        self.scopes.pop()
        return at

    def loop(self, at: int, data: Mapping[str, Any], *, live: bool) -> int:
        end = self.block(at + 1, data, live=False)
        if self.pieces[end : end + 1] != [("end",)]:
            raise GoTemplateError("a {{ range }} without its {{ end }}")
        items = self.value(self.pieces[at][1:], data) if live else []
        if not isinstance(items, list):
            raise GoTemplateError(f"range over {self.pieces[at][1:]}, which is no list")
        for item in items:
            self.block(at + 1, item, live=True)
        return end

    def choice(self, at: int, data: Mapping[str, Any], *, live: bool) -> int:
        """Execute the branch whose condition holds; where the end stands."""
        words, chosen = tuple(self.pieces[at]), False
        while True:
            holds = live and not chosen and (words == ("else",) or self.holds(words, data))
            chosen |= holds
            at = self.block(at + 1, data, live=holds)
            if at == len(self.pieces):
                raise GoTemplateError("an {{ if }} without its {{ end }}")
            words = tuple(self.pieces[at])
            if words == ("end",):
                return at

    def holds(self, words: tuple[str, ...], data: Mapping[str, Any]) -> bool:
        words = words[words[0] == "else" :]
        if len(words) != 4 or words[:2] != ("if", "eq"):
            raise GoTemplateError(f"the condition {' '.join(words)!r} is not known here")
        return bool(self.value(words[2:3], data) == self.value(words[3:], data))

    def action(self, words: tuple[str, ...], data: Mapping[str, Any]) -> None:
        if words[1:2] == (":=",):
            self.scopes[-1][words[0]] = self.value(words[2:], data)
        elif words[1:2] == ("=",):
            self.scope(words[0])[words[0]] = self.value(words[2:], data)
        else:
            self.parts.append(self.value(words, data))

    def scope(self, name: str) -> dict[str, str]:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope
        raise GoTemplateError(f"{name!r} is not known here")

    def value(self, words: Sequence[str], data: Mapping[str, Any]) -> Any:
        if len(words) != 1:
            raise GoTemplateError(f"{' '.join(words)!r} is not known here")
        (word,) = words
        if word[0] == '"':
            return _ESCAPE.sub(lambda m: _NAMED[m[1]] if m[1] else chr(int(m[2] or m[3], 16)), word[1:-1])
        if word[0] == "." and word[1:] in data:
            return data[word[1:]]
        return self.scope(word)[word]
