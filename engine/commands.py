"""The verbs of the command line: the options of each, and what it does with them.

Each verb's function takes the parsed options, prints for people, and returns what ``--json`` prints. torch is imported
only inside them, so that the help is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from afina.engine.settings import fields
from afina.engine.train_config import LORA_NAMES, TrainConfig
from afina.errors import ConfigError

if TYPE_CHECKING:
    from afina.engine.cli import Parser


def train_options(parser: Parser) -> None:
    parser.usage = "afina train [RECIPE.yaml] [--model M] --data FILE --output_dir DIR [options]"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file of settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir")
    parser.add_argument("--resume_from_checkpoint", nargs="?", const="true", help=argparse.SUPPRESS)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="check the request, print the resolved recipe and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for name in fields(TrainConfig):
        parser.add_setting(TrainConfig, name, action="append")
    for name in LORA_NAMES:
        parser.add_argument(f"--{name}", action="append", help=argparse.SUPPRESS)


def train(args: argparse.Namespace) -> dict[str, Any]:
    names = [*fields(TrainConfig), *LORA_NAMES]
    names += [alias for f in fields(TrainConfig).values() for alias in f.metadata["aliases"]]
    flags = [(name, value) for name in names for value in getattr(args, name) or ()]
    config = TrainConfig.resolve(args.recipe, flags, prefix="--")
    resume = args.resume or _resume_word(args.resume_from_checkpoint)
    if resume and args.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other: keep one of them")
    if args.dry_run:
        print(config.to_yaml(), end="")
        return config.to_dict()
    from afina.engine.train import finetune

    result = finetune(config, resume=resume, overwrite=args.overwrite, quiet=args.quiet)
    return dict(result.metrics)


def _resume_word(value: str | None) -> bool:
    """``--resume_from_checkpoint`` as other trainers take it: true, false, or a path, which Afina finds by itself."""
    if value is None or value.lower() in ("false", "none", "null"):
        return False
    if value.lower() != "true":
        raise ConfigError(
            f"--resume_from_checkpoint is {value!r}: Afina continues from the newest valid checkpoint of --output_dir; "
            "use --resume"
        )
    return True


Verb = tuple[str, Callable[["Parser"], None], Callable[[argparse.Namespace], dict[str, Any]]]
VERBS: dict[str, Verb] = {
    "train": ("fine-tune a model on your examples", train_options, train),
}
