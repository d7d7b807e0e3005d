"""``afina doctor``: this machine, and each kernel beside its reference on it."""

from __future__ import annotations

import argparse
from typing import Any

from afina.cli.options import Parser, Verb, option
from afina.engine.train_config import TrainConfig


def add_options(parser: Parser) -> None:
    parser.usage = "afina doctor [KERNEL ...] [options]"
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only these, such as attention [all]")
    parser.add_setting(TrainConfig, "device")


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = option(args, TrainConfig, "device")
    from afina.cli.doctor_checks import examine

    return examine(args.kernels, device)


VERB = Verb("this machine, and each kernel beside its reference on it", add_options, run)
