"""``afina inspect``: a row token by token, as training sees it and as a model predicts it."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.cli.options import READING, Parser, Verb, model_options, open_adapted, open_model, option
from afina.durable import open_file
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, DataError, TokenizerError, WeightsError

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.engine.token_view import TokenView
    from afina.loaders.data.dataset import TokenSet
    from afina.loaders.text.tokenizer import Tokenizer

OWN = ""  # what --base is without a value
MOST = 100  # rows of one call: each is a page of figures


def add_options(parser: Parser) -> None:
    parser.usage = "afina inspect MODEL --data FILE --row N [--base [BASE]] [options]"
    model_options(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="rows, as afina train takes them")
    parser.add_argument(
        "--row", required=True, metavar="N", help="which row, counted from 1 as the file has them; also 3,7 and 3-7"
    )
    parser.add_argument("--piece", metavar="K", default="1", help="which piece of a text that is cut into several [1]")
    parser.add_argument(
        "--base",
        nargs="?",
        const=OWN,
        metavar="BASE",
        help="a model to compare with; without a value, the one that an adapter was trained on",
    )
    parser.add_argument("--packed", action="store_true", help="show how the rows lie in one packed sequence")
    parser.add_argument("--html", metavar="FILE", help="write a page, in place of the figures in the terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --html")
    for name in READING:
        parser.add_setting(TrainConfig, name)


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: option(args, TrainConfig, name) for name in READING}
    settings["roles"] = settings.pop("roles_to_train")
    numbers, piece = row_numbers(args.row), whole_number(args.piece, "--piece")
    page = checked_page(args.html, args.overwrite)
    if len(args.adapter or ()) > 1:
        raise ConfigError("inspect looks at one adapter at a time: give --adapter once")
    from afina.engine.lora import set_adapter
    from afina.engine.token_view import view_row
    from afina.loaders.data.dataset import prepare
    from afina.loaders.data.row_lookup import find_rows
    from afina.loaders.text.source import load_tokenizer
    from afina.report.inspect_page import inspect_page
    from afina.report.inspected import InspectedRow
    from afina.report.token_terminal import Terminal, lines_of, packing_table

    if args.base:  # before the first model is read
        check_same_tokens(load_tokenizer(args.base), load_tokenizer(args.model), args.base)
    model, tokenizer, _ = open_adapted(args)
    if args.base == OWN and model.adapter is None:
        raise ConfigError(f"--base: {args.model} is no adapter, so name the model to compare with, as in --base MODEL")
    length = min(settings["max_length"], model.config.max_positions)
    data = prepare(args.data, tokenizer, **settings | {"max_length": length}, val_size=0.0, progress=not args.json)
    print(data.summary().splitlines()[0], file=sys.stderr)
    found = find_rows(data, tokenizer, numbers)
    for row in found:
        if piece > len(row.pieces):
            raise DataError(f"{row.where}: row {row.number:,} has {len(row.pieces):,} piece(s), no piece {piece:,}")
    chosen = [row.pieces[piece - 1] for row in found]

    def views(model: GPT, token_set: TokenSet) -> list[list[TokenView]]:
        return [view_row(model, tokenizer, *token_set.row(number)) for number in chosen]

    after, before = views(model, data.train), None
    if args.base is not None:
        set_adapter(model, None)
        if args.base:
            del model  # room for the next one
            model, _ = open_model(args, args.base)
        before = views(model, data.train)

    rows, start = [], 0
    for n, row in enumerate(found):
        side = None if before is None else before[n]
        rows.append(InspectedRow(row.number, row.where, piece, len(row.pieces), n, start, after[n], side))
        start += len(after[n])
    base = None if args.base is None else args.base or "its base"
    if page:
        with open_file(page, error=WeightsError) as file:
            file.write(inspect_page(rows, model=args.model, base=base).encode())
    if page and not args.json:
        print(f"{page}: {', '.join(row.title for row in rows)}")
    elif not args.json:
        terminal = Terminal.of(sys.stdout)
        for line in packing_table(rows) if args.packed else ():
            print(line)
        for shown in rows if not args.packed else ():
            print("\n".join(lines_of(shown, terminal)), end="\n\n")
    result = {"model": args.model, "base": base, "data": args.data, "html": args.html}
    tokens = [token for row in rows for token in row.tokens()]
    return result | {"documents": [row.to_dict() for row in rows], "tokens": tokens}


def row_numbers(text: str) -> list[int]:
    """The rows that "3,7-9" stands for, in that order. Raises ConfigError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,15})\s*(?:-\s*([0-9]{1,15})\s*)?", part)
        if match is None:
            raise ConfigError(f"--row {text!r}: expected a number from 1 on, or several as in 3,7 or 3-7")
        first = int(match[1])
        last = int(match[2] or first)
        if first < 1 or last < first or last - first >= MOST:
            why = "rows are counted from 1" if first < 1 else f"expected a range of 1 to {MOST} rows"
            raise ConfigError(f"--row {text!r}: {why}")
        found += [number for number in range(first, last + 1) if number not in found]
    if len(found) > MOST:
        raise ConfigError(f"--row {text!r}: {len(found)} rows, and at most {MOST} are shown at once")
    return found


def whole_number(text: str, flag: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < 1:
        raise ConfigError(f"{flag} is {text!r}: expected a number from 1 on")
    return int(text)


def checked_page(name: str | None, overwrite: bool) -> Path | None:
    """Where the page goes, if it can go there. Raises ConfigError."""
    if name is None:
        return None
    page = Path(name)
    if page.is_dir() or (page.exists() and not overwrite):
        raise ConfigError(f"--html {page} already exists: choose another, or give --overwrite to replace a file")
    if not page.parent.is_dir():
        raise ConfigError(f"--html {page}: there is no folder {page.parent}: make it, or choose another")
    return page


def check_same_tokens(base: Tokenizer, ours: Tokenizer, name: str) -> None:
    """Raise TokenizerError where an id stands for another token in the base."""
    size = max(base.vocab_size, ours.vocab_size)
    for number in range(size):
        if (one := ours.token(number)) != (other := base.token(number)):
            told = f"{number} is {one!r} in {ours.where} and {other!r} in {base.where}"
            raise TokenizerError(
                f"--base {name}: its tokenizer is another one (id {told}), so tokens cannot be put beside each other: "
                "compare with a model of the same tokenizer, or use afina eval"
            )


VERB = Verb("a row token by token: what is learnt, and how well it is predicted", add_options, run)
