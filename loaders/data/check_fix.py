"""The cleaned copy of a file of rows: what `check_data` found and nobody has to decide about is dropped or mended.

Dropped: unreadable lines, empty rows, exact and near-duplicates (the first stays), rows that the dev file has too.
Mended: wrong letters where reading them back is exact; control characters go. Every other row keeps its keys and its
values. What comes out is checked again, and cleaned until nothing is found: two rows may be equal once they are mended.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.durable import publish
from afina.errors import ConfigError, DataError
from afina.loaders.data.check import Findings, check_data
from afina.loaders.data.files import Source, SpelledFloat, data_files, kind_of_file, source_name
from afina.loaders.data.mojibake import CONTROL, is_mojibake, mend, mend_value
from afina.loaders.data.rows import KEYS, read_rows

_SETTINGS = ("val_file", "columns", "roles", "similarity", "seed", "progress")
PASSES = 20  # each drops or mends a row; two or three are usual
_FLOAT = "\ue000\ue001{}\ue001\ue000"  # private-use characters that stand where a number keeps its spelling


@dataclass
class Fixed:
    """What `fix_data` changed: for each kind of change, the lines of the original in order. ``rows``: rows written."""

    output: str
    rows: int
    changes: dict[str, list[int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = {name: {"count": len(lines), "lines": lines[:10]} for name, lines in self.changes.items()}
        return {"output": self.output, "rows": self.rows, "changes": plain}


def refuse_output(source: Source, val_file: Source | None, output: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where the cleaned rows cannot go to ``output``; nothing is changed."""
    inputs = data_files(source) + (data_files(val_file) if val_file is not None else [])
    if kind_of_file(output) != ".jsonl" or output.suffix == ".gz":
        raise ConfigError(f"--fix {output}: the cleaned rows are JSON lines: name a file that ends in .jsonl")
    if output.is_dir():
        raise ConfigError(f"--fix {output}: is a folder: name a file in it")
    if not output.parent.is_dir():
        raise ConfigError(f"--fix {output}: {output.parent} is no folder: make it first")
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise ConfigError(f"--fix {output}: is what is checked, which is never changed: name another file")
    if any(Path(item).resolve() == output.parent.resolve() for item in _folders(source)):
        raise ConfigError(
            f"--fix {output}: lies in the folder that is checked, and would be read with it: go elsewhere"
        )
    if output.exists() and not overwrite:
        raise ConfigError(f"--fix {output}: exists already: name another file, or give --overwrite")
    if kind_of_file(inputs[0]) == ".txt":
        raise ConfigError(f"--fix is for rows, and {source_name(source)} is plain text: clean it in an editor")


def _folders(source: Source) -> list[Path]:
    items = [source] if isinstance(source, str | Path) else source
    return [path for item in items if (path := Path(item)).is_dir()]


def fix_data(source: Source, output: Path, *, overwrite: bool = False, **settings: Any) -> Fixed:
    """Write the rows of ``source``, cleaned, to ``output`` as JSON lines, and return what was changed.

    ``settings``: those of `check_data`, of which the ones that need no tokenizer count. The file appears whole or not
    at all. Raises ConfigError (see `refuse_output`) and DataError: no row is left, or the disk refuses.
    """
    refuse_output(source, settings.get("val_file"), output, overwrite=overwrite)
    settings = {name: settings[name] for name in _SETTINGS if name in settings}
    changes: dict[str, list[int]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
            current: Source = source
            lines: list[int] | None = None
            for number in range(PASSES):
                found = check_data(current, **settings)
                target = Path(folder) / f"rows-{number}.jsonl"
                clean, lines = _pass(current, found, target, settings, lines, changes)
                if not lines:
                    raise DataError(f"{source_name(source)}: no row would be left: look at what is found without --fix")
                current = target
                if clean:
                    break
            with publish(output, replace=overwrite) as working:
                target.rename(working)
    except OSError as problem:
        raise DataError(f"{output}: cannot be written ({problem.strerror}): free space, or go elsewhere") from problem
    return Fixed(str(output), len(lines or ()), {name: sorted(places) for name, places in changes.items()})


def _pass(
    source: Source,
    found: Findings,
    target: Path,
    settings: Mapping[str, Any],
    origin: list[int] | None,
    changes: dict[str, list[int]],
) -> tuple[bool, list[int]]:
    """Write the rows of ``source`` without those that are dropped, mended; whether nothing had to be changed, and the
    lines of the original that were written. ``origin``: those of the rows of ``source``, None for the original."""
    columns = dict(settings.get("columns") or {})
    kept: list[int] = []
    clean = True

    def note(change: str, line: int) -> None:
        nonlocal clean
        changes.setdefault(change, []).append(line if origin is None else origin[line - 1])
        clean = False

    def left_out(path: Path, line: int, problem: str) -> None:
        note("unreadable_rows" if problem else "empty_rows", line)

    reading: dict[str, Any] = {"columns": columns, "skip_bad_lines": True, "chat": True, "left_out": left_out}
    reading |= {"roles": settings["roles"]} if "roles" in settings else {}
    names = set(columns.values())
    with target.open("x", encoding="utf-8", newline="\n") as file:
        for row in read_rows(source, **reading):
            if reason := found.dropped.get(row.number):
                note(reason, row.line)
                continue
            value, mended = mend_row(row.raw, names)
            for change in mended:
                note(change, row.line)
            kept.append(row.line if origin is None else origin[row.line - 1])
            file.write(json_line(value) + "\n")
    return clean, kept


def mend_row(row: Mapping[str, Any], columns: set[str]) -> tuple[dict[str, Any], set[str]]:
    """Return a row with the texts mended under the keys that training reads, and which changes that were."""
    changes: set[str] = set()

    def change(text: str) -> str:
        if text.isprintable() and text.isascii():
            return text
        mended = mend(text)
        if is_mojibake(mended):
            return text  # what is half mended nobody could mend any more
        if mended != text:
            changes.add("mojibake")
        cleaned = CONTROL.sub("", mended)
        if cleaned != mended:
            changes.add("control_characters")
        return cleaned

    read = {key for key in row if key in columns or key.strip().lower() in KEYS}
    return {key: mend_value(value, change) if key in read else value for key, value in row.items()}, changes


def json_line(value: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON. A number keeps its spelling (19.90), which is what its text is; what JSON does
    not have becomes null (NaN) or text (a date, as Parquet files hold them)."""
    spellings: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, SpelledFloat):
            spellings.append(value.spelling)
            return _FLOAT.format(len(spellings) - 1)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(value), ensure_ascii=False, default=str)
    for number, spelling in enumerate(spellings):
        text = text.replace(json.dumps(_FLOAT.format(number), ensure_ascii=False), spelling, 1)
    return text
