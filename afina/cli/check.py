"""``afina check``: what a file of rows is, what is wrong with it, and a cleaned copy of it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.cli.options import Parser, Verb, option
from afina.engine.settings import FRACTION, Settings, setting
from afina.engine.train_config import TrainConfig

if TYPE_CHECKING:
    from afina.loaders.data.check import Findings
    from afina.loaders.data.check_findings import Problem
    from afina.loaders.data.check_fix import Fixed
    from afina.loaders.data.rows import Row
    from afina.loaders.text.tokenizer import Tokenizer

# The settings of a training run that decide what its rows are.
_DATA = ("max_length", "on_long", "train_on_prompt", "val_file", "val_size", "seed", "columns", "skip_bad_lines")
_COLOURS = {"error": "31", "warning": "33", "note": "36", "learnt": "32", "dim": "2"}
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff]")
BAR = 40  # characters of the longest bar
PART = 400  # characters of a part of a row that are shown
PARTS = 16  # parts of a row that are shown
LABELS = 5  # most frequent labels that are shown, and rarest


@dataclass(frozen=True)
class CheckSettings(Settings):
    """What only a check has."""

    similarity: float = setting(
        0.8, "rows that share so much of their text are near-duplicates (0: do not look for them)", limit=FRACTION
    )


def add_options(parser: Parser) -> None:
    parser.usage = "afina check FILE [--model M] [--val_file F] [--fix OUT] [options]"
    parser.add_argument(
        "data", metavar="FILE", help="rows to check: .jsonl, .json, .csv, .tsv, .parquet, .txt, a folder"
    )
    for name in ("model", "tokenizer", *_DATA, "roles_to_train", "allow_nonfinite"):
        parser.add_setting(TrainConfig, name)
    parser.add_setting(CheckSettings, "similarity")
    parser.add_argument("--fix", metavar="OUT", help="write the cleaned rows to OUT, a .jsonl file")
    parser.add_argument("--overwrite", action="store_true", help="let --fix replace OUT")
    parser.add_argument("--strict", action="store_true", help="exit status 1 for warnings too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: option(args, TrainConfig, name) for name in _DATA}
    settings["roles"] = tuple(
        role.strip() for text in option(args, TrainConfig, "roles_to_train") for role in text.split(",")
    )
    settings["similarity"] = option(args, CheckSettings, "similarity")
    settings["progress"] = sys.stderr.isatty()
    from afina.loaders.data.check import check_data
    from afina.loaders.data.check_fix import fix_data, refuse_output

    if args.fix is not None:
        refuse_output(args.data, args.val_file, Path(args.fix), overwrite=args.overwrite)
    tokenizer, unmet = None, None
    if args.model is not None or args.tokenizer is not None:
        from afina.loaders.text.source import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer or args.model)
    if args.model is not None and tokenizer is not None:
        from afina.loaders.weights.untrained_tokens import untrained_tokens

        allow = option(args, TrainConfig, "allow_nonfinite")
        unmet = untrained_tokens(args.model, tokenizer, allow_nonfinite=allow)
    found = check_data(args.data, tokenizer, unmet=unmet, **settings)
    colour = _Colour(sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for line in _story(found, tokenizer, colour, train_on_prompt=settings["train_on_prompt"]):
        print(line)
    result = found.to_dict()
    if args.fix is not None:
        fixed = fix_data(args.data, Path(args.fix), overwrite=args.overwrite, **settings)
        for line in _changes(fixed):
            print(line)
        result["fix"] = fixed.to_dict()
    bad = ("error", "warning") if args.strict else ("error",)
    return result | {"ok": found.worst() not in bad}


class _Colour:
    def __init__(self, on: bool) -> None:
        self.on = on

    def __call__(self, text: str, name: str) -> str:
        return f"\x1b[{_COLOURS[name]}m{text}\x1b[0m" if self.on else text

    def learnt(self, text: str) -> str:
        """A trained part of a row: coloured, or in brackets that no text has."""
        lines = text.split("\n")
        return "\n".join(self(line, "learnt") for line in lines) if self.on else f"\u27e6{text}\u27e7"


def _story(found: Findings, tokenizer: Tokenizer | None, colour: _Colour, *, train_on_prompt: bool) -> Iterable[str]:
    split = " (" + ", ".join(f"{count:,} {name}" for name, count in found.split.items()) + ")" if found.split else ""
    used = f"{found.usable:,} usable" if found.usable <= found.rows else f"cut into {found.usable:,}"
    yield f"{found.data}: {found.rows:,} rows of {found.schema}, {used}{split}"
    yield from (f"  {_safe(fact)}" for fact in found.taken)
    if found.unused:
        yield f"  not used: {_safe(', '.join(found.unused))}"
    if found.tokens:
        share = f"{found.trained_tokens or 0:,} of them learnt ({(found.trained_tokens or 0) / found.tokens:.0%})"
        yield f"  {found.tokens:,} tokens of {found.characters / found.tokens:.1f} characters, {share}"
    else:
        yield f"  {found.characters:,} characters; --model M counts tokens, and looks at what is learnt"
    for name, spread in ((found.unit, found.lengths), ("learnt tokens", found.loss_tokens)):
        if spread:
            figures = ", ".join(f"{key} {value:,}" for key, value in spread.items())
            yield f"  {name} a row: {figures}"
    yield from _histogram(found)
    yield from _labels(found)
    if not found.problems:
        yield "no problem found"
    for problem in found.problems:
        yield from _problem(problem, colour)
    for row in found.shown:
        yield from _row(row, tokenizer, colour, train_on_prompt=train_on_prompt)


def _histogram(found: Findings) -> Iterable[str]:
    most = max((count for *_, count in found.histogram), default=0)
    for low, high, count in found.histogram:
        bar = "\u2588" * round(BAR * count / most) or ("\u258f" if count else "")
        yield f"  {f'{low:,}-{high:,}':>13} {bar} {count:,}"


def _labels(found: Findings) -> Iterable[str]:
    if found.labels:
        items = [f"{_safe(label)} {count:,}" for label, count in found.labels.items()]
        shown = items if len(items) <= 2 * LABELS + 1 else [*items[:LABELS], "...", *items[-LABELS:]]
        yield f"  {len(items):,} labels: {', '.join(shown)}"


def _problem(problem: Problem, colour: _Colour) -> Iterable[str]:
    yield f"{colour(f'{problem.severity:7}', problem.severity)} {problem.name} ({problem.count:,}): {problem.what}"
    if problem.places:
        several = len({place.path for place in problem.places}) > 1
        places = [f"{place.path.name}:{place.line}" if several else f"{place.line}" for place in problem.places]
        more = ", ..." if problem.count > len(places) else ""
        yield f"        {'at' if several else 'lines'} {', '.join(places)}{more}"
    for note in problem.notes[:3]:
        yield f"        {_safe(note)}"
    yield f"        mend: {problem.mend}"


def _row(row: Row, tokenizer: Tokenizer | None, colour: _Colour, *, train_on_prompt: bool) -> Iterable[str]:
    """The row as it is learnt, the trained parts marked."""
    from afina.errors import DataError

    try:
        parts = [part for part in _parts(row, tokenizer, train_on_prompt) if part[0]]
    except DataError:  # a row that the chat template refuses, which is among the problems
        return
    marks = "coloured" if colour.on else "in \u27e6 \u27e7"
    yield colour(f"line {row.line}, what is learnt {marks}:", "dim")
    cut = [*parts[: PARTS // 2], ("\u2026", False), *parts[-PARTS // 2 :]] if len(parts) > PARTS else parts
    text = "".join(colour.learnt(_safe(_short(part))) if learnt else _safe(_short(part)) for part, learnt in cut)
    yield from (f"  {line}" for line in text.rstrip("\n").split("\n"))


def _parts(row: Row, tokenizer: Tokenizer | None, train_on_prompt: bool) -> Iterable[tuple[str, bool]]:
    """The text of a row in parts, and which of them are learnt."""
    example = row.example
    if tokenizer is not None:
        from afina.loaders.text.render import render_example

        rendered = render_example(tokenizer, example, train_on_prompt=train_on_prompt)
        at = 0
        for start, end in rendered.spans:
            yield rendered.text[at:start], False
            yield rendered.text[start:end], True
            at = end
        yield rendered.text[at:], False
    elif example.messages is not None:
        for number, message in enumerate(example.messages):
            yield f"{message['role']}: ", False
            content = message["content"] or str(message.get("tool_calls", ""))
            yield content, train_on_prompt or number in (example.trained or ())
            yield "\n", False
    else:
        yield example.prompt or "", train_on_prompt
        yield (example.completion if example.text is None else example.text) or "", True


def _short(text: str) -> str:
    if len(text) <= PART:
        return text
    left = f"\u2026 ({len(text) - PART:,} characters) \u2026"
    return f"{text[: PART // 2]}{left}{text[-PART // 2 :]}"


def _safe(text: str) -> str:
    """Text from the data without what a terminal would obey or hide."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def _changes(fixed: Fixed) -> Iterable[str]:
    yield f"{fixed.output}: {fixed.rows:,} rows written"
    for name, lines in fixed.changes.items():
        verb = "mended" if name in ("mojibake", "control_characters") else "dropped"
        more = ", ..." if len(lines) > 10 else ""
        yield f"  {verb} {len(lines):,} for {name}: lines {', '.join(map(str, lines[:10]))}{more}"
    if not fixed.changes:
        yield "  nothing had to be changed"


VERB = Verb("what a file of rows is, what is wrong with it, and a cleaned copy", add_options, run)
