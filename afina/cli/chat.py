"""``afina chat``: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from afina.cli.options import (
    Parser,
    Verb,
    exchanged,
    model_options,
    open_adapted,
    sampling_of,
    sampling_options,
    tools_of,
    tools_option,
)
from afina.engine.sampling import Sampling
from afina.errors import DataError
from afina.printable import readable
from afina.streams import is_terminal


def add_options(parser: Parser) -> None:
    model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    tools_option(parser)
    sampling_options(parser, without=("logprobs",))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read messages from standard input until it ends; answers are printed as they are written."""
    sampling = sampling_of(args, without=("logprobs",))
    Sampling(**sampling)
    tools = tools_of(args)
    from afina.engine.batcher import Batcher
    from afina.engine.generate import stream
    from afina.engine.lora import set_adapter
    from afina.engine.packed import release

    model, tokenizer, adapters = open_adapted(args)
    release(model, keep=exchanged(adapters))
    batcher = Batcher(model, tokenizer, max_rows=1)
    person = sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input)
        print("/reset forgets the conversation, /quit (or Ctrl-D) leaves.")
        if tools:
            print("/tool RESULT answers a call that the model made.")
        if args.adapter:
            print(f"/adapter NAME changes who answers: {', '.join([*adapters, 'base'])}")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages, turns = list(opening), 0
    while True:
        try:
            line = input("> " if person else "").strip()
        except EOFError:
            break
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(opening)
        elif args.adapter and line.split()[:1] == ["/adapter"]:
            name = line.removeprefix("/adapter").strip()
            if name in (*adapters, "base"):
                set_adapter(model, adapters.get(name))
            else:
                print(f"no adapter {name!r}: there are {', '.join([*adapters, 'base'])}", file=sys.stderr)
        elif line.startswith("/") and not (tools and line.startswith("/tool ")):
            print(f"unknown command {line.split()[0]}; /reset and /quit are known", file=sys.stderr)
        elif line:
            result = line.removeprefix("/tool ").strip()
            asked = [*messages, {"role": "user" if result == line else "tool", "content": result}]
            answer = ""
            try:
                for piece in stream(model, tokenizer, asked, tools=tools, batcher=batcher, **sampling):
                    print(readable(piece) if is_terminal(sys.stdout) else piece, end="", flush=True)
                    answer += piece
            except KeyboardInterrupt:  # cuts the answer short, not the conversation
                if not person:
                    raise
            except DataError as error:
                print(f"{error}; or /reset", file=sys.stderr)
                continue
            print(flush=True)
            messages = [*asked, {"role": "assistant", "content": answer}]
            turns += 1
    return {"turns": turns}


VERB = Verb("talk to a model in the terminal", add_options, run)
