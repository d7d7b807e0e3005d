"""``afina report``: write a run's report again, measuring what there was no time for at its end."""

from __future__ import annotations

import argparse
import math
from typing import Any

from afina.cli.options import Parser, Verb, option
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError


def add_options(parser: Parser) -> None:
    parser.usage = "afina report RUN [--minutes N] [--reference FILE] [options]"
    parser.add_argument("run", metavar="RUN", help="a run folder, finished or stopped")
    parser.add_argument("--minutes", metavar="N", help="measure with models for so long at most (default: all of it)")
    parser.add_argument(
        "--reference", metavar="FILE", help="text to ask for forgetting, passages divided by blank lines"
    )
    for name in ("device", "threads"):
        parser.add_setting(TrainConfig, name)


def run(args: argparse.Namespace) -> dict[str, Any]:
    minutes = None if args.minutes is None else _minutes(args.minutes)
    device = None if args.device is None else option(args, TrainConfig, "device")
    threads = option(args, TrainConfig, "threads")
    from afina.engine.runtime import prepare_process
    from afina.report.report import write_report

    prepare_process(threads=threads)
    seconds = None if minutes is None else 60 * minutes
    report = write_report(args.run, seconds=seconds, device=device, reference=args.reference)
    if not args.json:
        print(report.line)
        for name, why in report.found.missing.items():
            print(f"left out, {name}: {why}")
        print(report.path)
    return report.to_dict()


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e6:
        raise ConfigError(f"--minutes is {text!r}; expected a number from 0 on")
    return value


VERB = Verb("a run's report as a page: what got better, what changed, what it cost", add_options, run)
