"""``afina train``: fine-tune a model on the rows of a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.cli.options import Parser, Verb
from afina.engine.settings import fields
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError


def add_options(parser: Parser) -> None:
    parser.usage = "afina train [RECIPE.yaml] [--model M] --data FILE --output_dir DIR [options]"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file of settings; flags override it")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir")
    parser.add_argument("--resume_from_checkpoint", nargs="?", const="true", help=argparse.SUPPRESS)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output_dir")
    parser.add_argument("--dry_run", action="store_true", help="check the request, print the resolved recipe and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for name in fields(TrainConfig):
        parser.add_setting(TrainConfig, name, action="append")


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = [*fields(TrainConfig)]
    names += [alias for f in fields(TrainConfig).values() for alias in f.metadata["aliases"]]
    flags = [(name, value) for name in names for value in getattr(args, name) or ()]
    config = TrainConfig.resolve(args.recipe, flags, prefix="--")
    resume = args.resume or _resume_word(args.resume_from_checkpoint)
    if resume and args.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other: keep one of them")
    if args.dry_run:
        config, notes = _check(config, resume=resume, overwrite=args.overwrite)
        print(config.to_yaml(notes), end="")
        return config.to_dict()
    from afina.report.finetune import finetune

    result = finetune(config, resume=resume, overwrite=args.overwrite, quiet=args.quiet)
    metrics = result.metrics
    if not args.quiet:
        print(f"best model: {metrics['best']} (dev loss {metrics['dev_loss_before']:.4f} -> {metrics['dev_loss']:.4f})")
        if metrics["report"]:
            print(f"{metrics['verdict_line']}\nreport: {metrics['report']}")
        print(f"try it: afina generate {metrics['output_dir']} --prompt TEXT, or afina chat {metrics['output_dir']}")
    return dict(metrics)


def _check(config: TrainConfig, *, resume: bool, overwrite: bool) -> tuple[TrainConfig, Mapping[str, str]]:
    """The checks of training itself; where the model is on the hub, only those that need none of its files."""
    sources = {str(config.tokenizer or config.model), str(config.model or config.tokenizer)}
    remote = [s for s in sources if s.count("/") == 1 and s[0] not in "./~" and not Path(s).exists()]
    if not remote:
        from afina.engine.train import check_run

        return check_run(config, resume=resume, overwrite=overwrite)
    from afina.engine.optim import bytes_per_parameter
    from afina.engine.run_folder import RunFolder
    from afina.engine.weights import choose_device, choose_dtype
    from afina.loaders.data.rows import read_rows

    print(f"{remote[0]} is on the hub: its files are checked when training fetches them", file=sys.stderr)
    with RunFolder(str(config.output_dir), resume=resume, overwrite=overwrite):  # leaves the folder as it was
        device = choose_device(config.device)
        bytes_per_parameter(config.optim, choose_dtype(config.dtype, device))  # refuses dtypes that optim is not for
        for source in filter(None, (config.data, config.val_file)):
            for _ in read_rows(
                source, columns=config.columns, skip_bad_lines=config.skip_bad_lines, roles=config.roles_to_train
            ):
                pass
    unknown = {} if config.learning_rate else {"learning_rate": "by the model's width, once it is fetched"}
    return config, unknown


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


VERB = Verb("fine-tune a model on your examples", add_options, run)
