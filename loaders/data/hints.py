"""What is wrong with rows that cannot be read, what they probably are instead, and how their owner mends them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.loaders.jsonfile import NotFiniteError

MAX_LISTED = 20  # bad lines that one message lists
MAX_COUNTED = 10_000  # bad lines after which a file is not read any further
# Files that hold rows, but not as text or Parquet: what they are, and how to get the rows out.
FOREIGN = {
    ".xlsx": ("an Excel workbook", "save the sheet as CSV UTF-8"),
    ".xls": ("an Excel workbook", "save the sheet as CSV UTF-8"),
    ".ods": ("a spreadsheet", "save the sheet as CSV UTF-8"),
    ".arrow": ("an Arrow file", "datasets.Dataset.from_file(path).to_json('rows.jsonl')"),
    ".feather": ("an Arrow file", "pandas.read_feather(path).to_json('rows.jsonl', orient='records', lines=True)"),
    ".pkl": ("a pickle, which can run code", "write the rows as JSONL where they were made"),
    ".pickle": ("a pickle, which can run code", "write the rows as JSONL where they were made"),
    ".yaml": ("a YAML file", "write the rows as JSONL; a recipe is given without --data"),
    ".yml": ("a YAML file", "write the rows as JSONL; a recipe is given without --data"),
    ".docx": ("a Word document", "save it as plain text (.txt)"),
    ".pdf": ("a PDF", "write its text as .txt or JSONL"),
    ".md": ("Markdown", "name it .txt to train on it as one text"),
    ".zip": ("a zip archive", "unpack it"),
    ".tar": ("an archive of files", "unpack it"),
    ".bz2": ("a bzip2 archive", "unpack it with bunzip2"),
    ".xz": ("an xz archive", "unpack it with unxz"),
    ".zst": ("a zstd archive", "unpack it with unzstd"),
}
_RECORDS = 'df.to_json(path, orient="records", lines=True)'
_OVER_LINES = "an object over several lines? give each a line of its own: jq -c . FILE > rows.jsonl"
_STRING = r'"((?:[^"\\]|\\.)*)"'
# The start of a JSON object: its first key, whether its value is a list or an object, and what that begins with.
_FIRST_KEY = re.compile(rf"\s*\{{\s*{_STRING}\s*:\s*([\[{{]?)\s*(?:{_STRING}|([-\dtfn\[{{]?))")
_ROWS_INSIDE = re.compile(
    r'"(data|dataset|train|training|validation|test|rows|examples|items|records|samples|instances|entries|results)"'
    r"\s*:\s*\[\s*\{"
)


def json_fault(problem: Exception, text: str = "") -> tuple[str, str]:
    """Return what is wrong with a line of JSON, and a hint at how it came about, "" where there is none."""
    if isinstance(problem, NotFiniteError):
        mend = f"write null instead, as pandas' {_RECORDS} does"
        return f"{problem}, and JSON has no other", mend if problem.literal == "NaN" else ""
    if isinstance(problem, RecursionError):
        return "nested too deeply", ""
    if isinstance(problem, json.JSONDecodeError):
        return f"not valid JSON: {problem.msg} (column {problem.colno})", _line_hint(text, problem)
    return str(problem), ""


def _line_hint(text: str, problem: json.JSONDecodeError) -> str:
    rest = text[problem.pos :].strip()
    if problem.msg == "Extra data":
        if rest == ",":
            return "an array's lines? a comma ends the line: remove it, or put [ before the first line and ] last"
        if rest.startswith(("{", ",")):
            return "several objects on a line? give each a line of its own: jq -c . FILE > rows.jsonl"
    if re.match(r"\s*\{\s*'", text) or re.match(r"(None|True|False)\b", rest):
        return "Python's notation? write the rows with json.dumps"
    if rest.startswith(("“", "”", "‘", "„")):
        return "curly quotes? write straight ones"
    if not rest and text.rstrip().endswith(("{", "[", ",")):
        return _OVER_LINES
    return ""


def json_kind(start: str) -> str:
    """What a JSON file that opens with an object, and whose first line is no row, probably is, and how to mend it.

    ``start``: the first characters of the file. Returns "" where nothing is known.
    """
    found = _FIRST_KEY.match(start)
    if found is None:
        return ""
    key, opened, text, other = found.groups()

    def table(how: str) -> str:
        return f"is a table {how}, as pandas' to_json writes it: write rows instead, {_RECORDS}"

    if key in ("columns", "schema"):
        return table("with its columns apart")
    if opened == "{" and (key.isdigit() or (text or "").isdigit()):
        return table("by its index" if key.isdigit() else "by columns")
    rows = _ROWS_INSIDE.search(start)
    if rows and start.count("{", 0, rows.start()) - start.count("}", 0, rows.start()) == 1:  # not deeper inside
        mend = f"write them alone, jq -c '.{rows[1]}[]' FILE > rows.jsonl"
        return f"is an object that holds its rows under {rows[1]!r}: {mend}"
    if opened == "[" and (text is not None or other not in ("", "{", "[")):
        return table("by columns")
    return ""


def no_object_hint(value: Any) -> str:
    """How a line that is no object, but a list of messages, becomes a row; "" for other values."""
    turns = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return 'a bare conversation? write {"messages": [...]}' if turns and {"role", "from"} & value[0].keys() else ""


class BadLines:
    """The lines of a file that cannot be used: the first of them, and how many there are of each kind."""

    def __init__(self) -> None:
        self.listed: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.mend = ""

    def __len__(self) -> int:
        return self.kinds.total()

    def add(self, line: int, problem: str, kind: str, mend: str = "") -> None:
        """``kind``: as `bad_kind` gives it. The first ``mend`` that is given is the one that is told."""
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"line {line}: {problem}")
        self.kinds[kind] += 1
        self.mend = self.mend or mend

    def message(self) -> str:
        """One line, without the file's name."""
        mend = self.mend or "mend the file"
        count, more = len(self), "; and more" if len(self) > len(self.listed) else ""
        total = f"{count:,} or more" if count >= MAX_COUNTED else f"{count:,}"
        head = f"{total} bad lines ({by_kind(self.kinds)}): " if count > 1 else ""
        return f"{head}{'; '.join(self.listed)}{more}: {mend}, or leave them out with skip_bad_lines"


def bad_kind(reason: str) -> str:
    """What a bad line is counted under: its reason without what is its own (names, numbers, places, advice)."""
    if reason.startswith("holds "):
        return "no object {...}"
    kind = re.sub(r" \([^()]*\)|^message \d+( \([^()]*\))?: ", "", reason)
    kind = re.split(r": expected |: use one schema|; |, but | and JSON has ", kind)[0]
    kind = re.sub(r"'[^']*'|\"[^\"]*\"|[\[{].*", "...", kind)
    kind = re.sub(r"(?<![-\w])\d+", "N", re.sub(r"\.\.\.(, \.\.\.)+", "...", kind))
    return kind.removeprefix("... ").strip(" ,")[:80] or "unreadable"


def by_kind(kinds: Mapping[str, int]) -> str:
    """How many there are of each kind, the most frequent first."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{kind}: {number:,}" for kind, number in ordered[:5]) + ("; ..." if len(ordered) > 5 else "")


# Keys of rows that hold better and worse answers: which of them is the better one.
_PREFERRED = {
    ("chosen", "rejected"): "chosen",
    ("preferred_output", "non_preferred_output"): "preferred_output",
    ("response_j", "response_k"): "response_j",
}
_RANKED = (("response_0", "response_1"), ("completions", "labels"), ("completions", "scores"), ("responses", "ranks"))


def preference_hint(row: Mapping[str, Any]) -> str:
    """What a row of preference data is, and how its better answer is trained on; "" for a row that is none."""
    for keys, better in _PREFERRED.items():
        if keys[0] in row and keys[1] in row:
            named = f"preference data ({keys[0]} and {keys[1]}), which is not trained on as such"
            return f"{named}; to learn the better answers: {_better(row, better)}"
    for keys in _RANKED:
        if keys[0] in row and keys[1] in row:
            mend = "write rows of prompt and completion with the answers to be learnt"
            return f"reward or ranking data ({keys[0]} and {keys[1]}), which is not trained on as such: {mend}"
    return ""


def rated_hint(row: Mapping[str, Any]) -> str:
    """What a prompt and a completion with a verdict are, and how the good ones are trained on; "" without a verdict."""
    label = row.get("label")
    if not isinstance(label, bool) and str(label).lower() not in ("true", "false"):
        return ""
    keep = "keep the good ones, jq -c 'select(.label)' FILE > rows.jsonl"
    every = "to train on all of them say so: --columns completion=completion"
    return f"rated answers, good and bad (label is true or false, as KTO has them): {keep}; {every}"


def _better(row: Mapping[str, Any], better: str) -> str:
    """How to train on the answers under ``better``: settings, or a command where no setting does it."""
    if "input" in row and better == "preferred_output":
        return f"jq -c '{{messages: (.input.messages + .{better})}}' FILE > rows.jsonl"
    prompt, answer = row.get("prompt"), row[better]
    if isinstance(answer, list):
        # Beside a prompt that is a text, or none, a list of messages is a whole conversation, the prompt included.
        return f"--columns {'completion' if isinstance(prompt, list) else 'messages'}={better}"
    if isinstance(answer, str) and isinstance(prompt, str):
        return f"--columns completion={better}"
    if isinstance(answer, str) and prompt is None:
        prompts = ("question", "query", "instruction", "input")
        asked = next((key for key in prompts if isinstance(row.get(key), str)), "")
        return f"--columns prompt={asked},completion={better}" if asked else f"--columns text={better}"
    return "write rows of prompt and completion"


def is_saved_dataset(folder: Path) -> str:
    """How to get at the rows of a folder that `datasets.save_to_disk` wrote; "" for another folder."""
    if (folder / "dataset_dict.json").is_file():
        return "datasets.load_from_disk(path)['train'].to_json('rows.jsonl')"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return "datasets.load_from_disk(path).to_json('rows.jsonl')"
    return ""
