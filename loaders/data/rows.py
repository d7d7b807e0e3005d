"""Rows to examples: the schemas in use, found without being told, and the cleaning of their texts.

=======================  ==========================================================================================
`text`                   a text to continue
`prompt`, `completion`   two texts, or two lists of messages
`instruction`, `output`  and perhaps `input` (alpaca): messages if the model has a chat template, else alpaca's prompt
`messages`               a list of {role, content}, and perhaps `tools` (OpenAI, TRL)
`conversations`          a list of {from, value} (sharegpt), and perhaps `system` and `tools`
`text`, `label`          text and a line break, then the label
=======================  ==========================================================================================

All but `text` may have `candidates`, a list of texts of which the answer is one: for evaluation, training ignores them.
``columns`` maps our key to the file's: ``{"prompt": "question", "completion": "answer"}``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

from afina.errors import DataError, nearest
from afina.loaders.data.conversations import Unfit, kind_of, read_conversation
from afina.loaders.data.files import Reader, Record, Source, as_text, clean_text, data_files, source_name
from afina.loaders.data.hints import MAX_COUNTED, BadLines, bad_kind, preference_hint, rated_hint
from afina.loaders.jsonfile import show
from afina.loaders.text.render import Example, Rendered, render_example
from afina.loaders.text.tokenizer import Tokenizer

# In the order in which they are looked for: a row may have other keys besides.
SCHEMAS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
    "text/label": ("text", "label"),
    "text": ("text",),
}
_SUPPORTED = "one of " + ", ".join("{" + ", ".join(keys) + "}" for keys in SCHEMAS.values())
KEYS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "label",
    "system",
    "tools",
    "candidates",
)
_TOOL_KEYS = {"tools", "functions", "parallel_tool_calls"}  # the last says how calls were made: not what is learnt
_ALSO = {
    "instruction/output": {"input", "candidates"},
    "messages": {"candidates", *_TOOL_KEYS},
    "conversations": {"system", "candidates", *_TOOL_KEYS},
    "prompt/completion": {"tools", "candidates"},
    "text/label": {"candidates"},
}
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
ALPACA = _ALPACA.format("") + "### Instruction:\n{}\n\n### Response:\n"
ALPACA_INPUT = (
    _ALPACA.format(", paired with an input that provides further context")
    + "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)


_DIGESTED = json.JSONEncoder(default=str)  # json.dumps would make one for every row


def _spelt(messages: Sequence[Mapping[str, Any]], tools: Any, trained: list[int]) -> str:
    """A conversation as JSON. It is written by hand where messages are a role of ours and a text: in half the time."""
    parts = []
    for message in messages if tools is None else ():
        if len(message) > 2 or message["content"] is None:
            break
        parts.append(f'{{"role": "{message["role"]}", "content": {encode_basestring_ascii(message["content"])}}}')
    if len(parts) < len(messages):
        return _DIGESTED.encode([messages, tools, trained])
    return f"[[{', '.join(parts)}], null, {trained}]"


@dataclass(slots=True)
class Row:
    """A row: where it was read, its values as the file has them, and the example they make.

    ``digest``: 16 bytes, equal for equal examples. ``size``: characters.
    ``more``: the text goes on in the next row. ``number``: its place among the rows that were read, from 0; a line may
    hold several rows.
    """

    path: Path
    line: int
    raw: dict[str, Any]
    example: Example = field(init=False)
    digest: bytes = b""
    size: int = 0
    more: bool = False
    number: int = 0

    @property
    def where(self) -> str:
        return self.example.where

    def rendered(self, tokenizer: Tokenizer) -> Rendered:
        """The text the model is trained on, and the ranges that are learnt (the prompt is not)."""
        return render_example(tokenizer, self.example)


def read_rows(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad_lines: bool = False,
    chat: bool = False,
    targets: bool = True,
    roles: Collection[str] = ("assistant",),
    counts: Counter[str] | None = None,
    progress: Callable[[int], object] | None = None,
    left_out: Callable[[Path, int, str], object] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a file, of a folder of files, or of several, in order, whatever their schema.

    ``columns`` maps keys of the schemas to the keys of the file. ``chat``: instructions become messages. ``targets``:
    rows must hold what is to be learnt (else a missing completion is "" and a conversation may end with the user).
    ``roles``: whose turns in a conversation are learnt where the row does not say it itself.
    ``counts`` receives "rows", "bad_lines", "empty", "numbers" (taken as their text), and by prefix: the schema's name
    under "schema:", unused keys under "unused:", kinds of bad lines under "bad:", and under "taken:" what had to be
    found out about the files to read them.
    ``progress`` is called with the bytes read since its last call. ``left_out`` is called with the file, the line and
    the problem of each bad line, and with the problem "" for each empty row.

    Raises DataError, one line naming the file and up to 20 bad lines; with ``skip_bad_lines`` these are only counted,
    and the error is left for when no row can be used.
    """
    columns = dict(columns or {})
    for key in columns:
        if key not in KEYS:
            raise DataError(f"columns: {key!r} is no key of a schema{nearest(key, KEYS)}: expected {', '.join(KEYS)}")
    counts = Counter() if counts is None else counts
    shape = _Shape(columns, chat, targets, roles, counts)
    usable, first_problem = 0, ""
    for path in data_files(source):
        reader = Reader(path, {*KEYS, *columns.values()})
        bad = BadLines()
        seen = 0
        for number, record in enumerate(reader):
            counts["rows"] += not record.more
            problem, kind, row = record.problem, record.problem, None
            if not problem:
                try:
                    row = shape.row(path, record)
                except Unfit as unfit:
                    problem, kind = str(unfit), unfit.kind
            if left_out and (problem or row is None):
                left_out(path, record.line, problem)
            if problem:
                told = reader.likeness if number == 0 else ""
                first_problem = first_problem or f"{path}: {told or f'line {record.line}: {problem}'}"
                kind = bad_kind(kind)
                counts.update({"bad_lines": 1, f"bad:{kind}": 1})
                bad.add(record.line, problem, kind, record.mend)
                if not skip_bad_lines and (told or (not shape.name and len(bad) == 1 and not record.problem)):
                    raise DataError(first_problem)
                if not skip_bad_lines and len(bad) >= MAX_COUNTED:
                    break
            elif row is None:
                counts["empty"] += 1
            elif skip_bad_lines or not bad:
                row.number = usable
                usable += 1
                yield row
            if progress and reader.done - seen >= 1 << 16:
                progress(reader.done - seen)
                seen = reader.done
        if bad and not skip_bad_lines:
            raise DataError(f"{path}: {bad.message()}")
        counts.update({f"taken:{fact}": 1 for fact in reader.taken})
        if progress:
            progress(reader.done - seen)
    counts.update({f"schema:{shape.name}": 1} if shape.name else {})
    counts.update({f"unused:{key}": 1 for key in sorted(shape.unused)})
    if not usable:
        found = first_problem or ("every row is empty" if counts["empty"] else "the file is empty")
        raise DataError(f"{source_name(source)}: no usable row ({found}): expected {_SUPPORTED}")


def _candidates(given: Any) -> tuple[str, ...] | None:
    """The texts that a row offers as answers; None where it holds no such list, which only some tasks need."""
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        return None
    return tuple(clean_text(text) for text in given)


class _Shape:
    """The schema of some files, taken from their first row, and how their rows become examples."""

    def __init__(
        self, columns: Mapping[str, str], chat: bool, targets: bool, roles: Collection[str], counts: Counter[str]
    ) -> None:
        self.columns, self.chat, self.targets, self.roles = dict(columns), chat, targets, roles
        self.chosen = bool(columns)  # the user has said which columns are meant
        self.counts = counts
        self.renamed = set(columns.values())
        self.required = {
            name: set(keys) - (set() if targets else {"completion", "output"}) for name, keys in SCHEMAS.items()
        }
        self.name, self.first_row = "", ""
        self.unused: set[str] = set()

    def row(self, path: Path, record: Record) -> Row | None:
        """Return the row, None when there is nothing in it to learn. Raises Unfit."""
        where = f"{path}: line {record.line}"
        value = self._named(record.value)
        if not self.name or not self.required[self.name] <= value.keys():
            self._choose(value, record.value, where)
            value = self._named(record.value)
        row = Row(path, record.line, record.value, more=record.more)
        fields = self.make(value, row)
        if fields is None:
            return None
        row.example = Example(**fields, where=where, candidates=_candidates(value.get("candidates")))
        if row.example.messages is not None:
            content = _spelt(fields["messages"], fields.get("tools"), sorted(fields["trained"])).encode()
        else:  # cleaned: no control character is left in a text
            content = "\0".join(map(str, fields.values())).encode()
        row.digest = blake2b(content, digest_size=16).digest()
        row.size = len(content)
        return row

    def _named(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of a row under our names."""
        if not self.columns:
            return raw
        # A key of ours that another column stands for is not meant, also where a row lacks that column.
        value = {key: item for key, item in raw.items() if key not in self.renamed and key not in self.columns}
        return value | {ours: raw[theirs] for ours, theirs in self.columns.items() if theirs in raw}

    def _schema(self, value: Mapping[str, Any]) -> str:
        return next((name for name, keys in self.required.items() if keys <= value.keys()), "")

    def _fold_case(self, raw: Mapping[str, Any]) -> str:
        """Take keys that are ours but for case and blanks, as "Prompt" is, if they make a schema; return its name."""
        named = self._named(raw)
        ours = {key.strip().lower(): key for key in raw if key not in self.renamed}
        folded = {name: ours[name] for name in KEYS if name in ours and name not in {*named, *self.columns}}
        name = self._schema({**named, **folded})
        if name:
            self.columns |= folded
            self.renamed |= set(folded.values())
            self.counts.update({f"taken:{theirs!r} read as {name!r}": 1 for name, theirs in folded.items()})
        return name

    def _choose(self, value: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> None:
        name = self._schema(value)
        if not name and not self.name:
            name = self._fold_case(raw)
        found = ", ".join(map(show, islice(raw, 10))) or "none"
        found += f" and {len(raw) - 10:,} more" if len(raw) > 10 else ""
        if self.name:
            if self.name == "text/label" and name == "text":
                raise Unfit("the label is missing")
            kind = f" ({name})" if name else ""
            raise Unfit(f"has the keys {found}{kind}, but {self.first_row} is {self.name}: use one schema in a file")
        if self.targets and not self.chosen:
            hint = "" if name else preference_hint(raw)
            if name == "prompt/completion":
                hint = rated_hint(raw)
            if hint:
                raise Unfit(hint)
        if not name:
            known = sorted(set().union(*SCHEMAS.values()))
            absent = next((theirs for theirs in self.columns.values() if theirs not in raw), None)
            if absent is not None:
                hint = f", no column {absent!r}{nearest(absent, raw)}"
            else:
                others = [key for key in raw if key not in known]
                hint = next((f", {show(key)}{close}" for key in others[:10] if (close := nearest(key, known))), "")
            example = next((key for key in raw if key not in KEYS), "question")
            mend = f"rename them with columns, as in {{'prompt': {example!r}}}"
            raise Unfit(f"found the keys {found}{hint}; expected {_SUPPORTED}; {mend}")
        self.name, self.first_row = name, where
        self.make: Callable[[Mapping[str, Any], Row], dict[str, Any] | None] = {
            "messages": self._messages,
            "conversations": self._messages,
            "prompt/completion": self._prompt_completion,
            "instruction/output": self._instruction_output,
            "text/label": self._text_label,
            "text": self._text,
        }[name]
        self.unused = set(raw) - self.renamed - set(SCHEMAS[name]) - _ALSO.get(name, set())

    def _string(self, value: Mapping[str, Any], key: str) -> str:
        """The text under a key; numbers and booleans are taken as their text, and counted."""
        given = value.get(key)
        if isinstance(given, str):
            return given
        text = as_text(given)
        if text is None:
            if isinstance(given, float):
                raise Unfit(f"{key} is {given}, which is no number: write null, or the text that is meant")
            raise Unfit(f"{key} is {kind_of(given)}: expected a text or a number")
        self.counts["numbers"] += 1
        return text

    def _answer(self, value: Mapping[str, Any], key: str) -> str:
        if not self.targets and value.get(key) is None:
            return ""
        return clean_text(self._string(value, key))

    def _text(self, value: Mapping[str, Any], row: Row) -> dict[str, Any] | None:
        text = clean_text(self._string(value, "text"), end=not row.more)
        return {"text": text} if text.strip() else None

    def _text_label(self, value: Mapping[str, Any], row: Row) -> dict[str, Any] | None:
        label = value["label"]
        if label is None or label == "" or label != label:  # NaN is how tables often write what is missing
            raise Unfit("the label is missing")
        text, label = clean_text(self._string(value, "text")), clean_text(self._string(value, "label")).strip()
        return {"prompt": text + "\n", "completion": label} if text.strip() else None

    def _prompt_completion(self, value: Mapping[str, Any], row: Row) -> dict[str, Any] | None:
        prompt, answer = value["prompt"], value.get("completion")
        if isinstance(prompt, list):
            turns = [] if answer is None and not self.targets else answer
            if not isinstance(turns, list):
                raise Unfit(f"prompt is a list of messages, but completion is {kind_of(turns)}: expected a list too")
            learnt = frozenset(range(len(prompt), len(prompt) + len(turns)))
            return self._conversation([*prompt, *turns], value, learnt=learnt)
        # The end of a prompt stays as it is: the completion follows it without a space of its own.
        prompt, answer = clean_text(self._string(value, "prompt"), end=False), self._answer(value, "completion")
        return {"prompt": prompt, "completion": answer} if answer or not self.targets else None

    def _instruction_output(self, value: Mapping[str, Any], row: Row) -> dict[str, Any] | None:
        task, answer = clean_text(self._string(value, "instruction")), self._answer(value, "output")
        given = "" if value.get("input") is None else clean_text(self._string(value, "input"))
        if self.targets and not answer:
            return None
        if self.chat:
            user = {"role": "user", "content": f"{task}\n\n{given}" if given else task}
            messages = (user, {"role": "assistant", "content": answer}) if answer else (user,)
            trained = frozenset(i for i, message in enumerate(messages) if message["role"] in self.roles)
            return {"messages": messages, "trained": trained}
        prompt = ALPACA_INPUT.format(task, given) if given else ALPACA.format(task)
        return {"prompt": prompt, "completion": answer}

    def _messages(self, value: Mapping[str, Any], row: Row) -> dict[str, Any] | None:
        turns, system = value[self.name], value.get("system")
        if system and isinstance(turns, list) and self.name == "conversations":
            turns = [{"role": "system", "content": system}, *turns]
        return self._conversation(turns, value)

    def _conversation(
        self, turns: Any, value: Mapping[str, Any], *, learnt: frozenset[int] | None = None
    ) -> dict[str, Any] | None:
        """``learnt``: messages besides which none is learnt."""
        tools = value.get("tools") or value.get("functions")
        messages, tools, trained = read_conversation(turns, tools, roles=self.roles)
        if learnt is not None:
            trained &= learnt
        if self.targets and not trained:
            if not any(message["role"] in self.roles for message in messages):
                raise Unfit(f"no {' or '.join(self.roles)} turn to learn from")
            raise Unfit("no turn to learn from: all have weight 0 or train false")
        filled = any(messages[number]["content"] or "tool_calls" in messages[number] for number in trained)
        return {"messages": messages, "tools": tools, "trained": trained} if filled or not self.targets else None
