"""Markdown of values from elsewhere: names, paths and settings that must not become markup, links or another page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from afina.printable import printable

LONGEST = 200  # characters of one value
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#~&$@])|(?<=:)(?=//)|(?<=www)(?=\.)|(?<=^\d)(?=[.)]\s)")


def code(value: object) -> str:
    """A value as it is, in a span of code: nothing in it is markup, and it stays on its line."""
    text = printable(str(value), limit=LONGEST) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " * (text.startswith("`") or text.endswith("`"))
    return f"{fence}{pad}{text}{pad}{fence}"


def prose(value: object) -> str:
    """A value as plain words inside of a line: nothing that markdown or HTML takes as markup, or as an address, is."""
    text = _MARKUP.sub(lambda match: "\\" + (match[1] or ""), printable(str(value), limit=LONGEST))
    return f"\\{text}" if text[:1] in ("-", "+", "=", ":", ">") else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are markdown already."""
    lines = [head, ["--"] * len(head), *rows]
    return "".join("| " + " | ".join([cell.replace("|", "\\|") for cell in cells]) + " |\n" for cells in lines)


def block(text: str, language: str = "") -> str:
    """Lines of code, each of them printable, between fences that none of them closes."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    lines = "\n".join(printable(line) for line in text.split("\n"))
    return f"{fence}{language}\n{lines}\n{fence}\n"


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML that the hub reads at the top of a card; in ASCII, so that no reader sees another text than it says."""
    import yaml

    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=False, width=10_000)}---\n"
