"""``afina demo``: the seven steps of fine-tuning, told on data inside the package."""

from __future__ import annotations

import argparse
from typing import Any

from afina.cli.options import Parser, Verb


def add_options(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", default="support", metavar="support|sentiment", help="which demo [support]")
    parser.add_argument("--output_dir", default="out/demo", metavar="DIR", help="run folder [out/demo]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from afina.cli.demo_story import run_demo

    return run_demo(args.name, output_dir=args.output_dir, json=args.json)


VERB = Verb("the whole story on data inside the package", add_options, run)
