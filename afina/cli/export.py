"""``afina export``: write weights that other programs load."""

from __future__ import annotations

import argparse
from typing import Any

from afina.cli.options import Parser, Verb


def add_options(parser: Parser) -> None:
    parser.usage = "afina export MODEL --to hf|peft|gguf --output DIR [options]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder (its best model), a model's or adapter's folder, a GGUF file, or a hub id",
    )
    parser.add_argument(
        "--to",
        default="hf",
        metavar="hf|peft|gguf",
        help="hf: what transformers loads, an adapter merged into its base; peft: the adapter alone; gguf: one file "
        "for llama.cpp, an adapter merged [hf]",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to create; for gguf also a file to create: NAME.gguf"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16 or float16, for gguf also q8_0; auto keeps what is stored, for gguf float16 [auto]",
    )
    parser.add_argument("--base", metavar="MODEL", help="where an adapter's base is now (default: where it was)")
    parser.add_argument(
        "--base_name", metavar="NAME", help="what PEFT shall load as the base (default: what the adapter names)"
    )
    parser.add_argument(
        "--data", metavar="FILE", help="rows that the result is compared on (default: the run's dev rows)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from afina.export.export import export, summary
    from afina.report.card import model_card

    result = export(
        args.model,
        args.output,
        to=args.to,
        dtype=args.dtype,
        base=args.base,
        base_name=args.base_name,
        data=args.data,
        card=model_card,
    )
    print(summary(result))
    return result


VERB = Verb("write deployable weights, checked against the model", add_options, run)
