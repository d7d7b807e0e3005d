"""``afina advise``: should I fine-tune, and how? Measured on the user's own rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.cli.options import Parser, Verb, option
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError

if TYPE_CHECKING:
    from afina.advise.evidence import Evidence

_READING = (
    "val_file",
    "max_length",
    "on_long",
    "train_on_prompt",
    "columns",
    "skip_bad_lines",
    "roles_to_train",
    "batch_size",
)


def add_options(parser: Parser) -> None:
    parser.usage = "afina advise FILE --model M [--minutes N] [--recipe FILE] [options]"
    parser.add_argument("data", metavar="FILE", help="the rows you would train on: a file or a folder of them")
    parser.add_setting(TrainConfig, "model")
    parser.add_argument(
        "--minutes", metavar="N", help="time at most (default: 2.5 for models below 20 M parameters, else 15)"
    )
    parser.add_argument("--task", default="auto", help="what the rows ask for, as in afina eval [auto]")
    parser.add_argument("--recipe", metavar="FILE", help="write the advised settings there, for afina train")
    for name in (*_READING, "seed", "dtype", "device", "threads"):
        parser.add_setting(TrainConfig, name)


def run(args: argparse.Namespace) -> dict[str, Any]:
    minutes = _minutes(args.minutes)
    if args.model is None:
        raise ConfigError("--model is missing: a folder, a GGUF file, a hub id or afina-tiny")
    if args.recipe and not Path(args.recipe).absolute().parent.is_dir():  # before minutes are spent
        raise ConfigError(f"--recipe {args.recipe}: {Path(args.recipe).parent} is no folder: make it, or name another")
    from afina.advise.measure import advise
    from afina.advise.parts import Request
    from afina.advise.recipe import recipe_text
    from afina.durable import write_text

    reading = {name: option(args, TrainConfig, name) for name in _READING if getattr(args, name) is not None}
    others = {name: option(args, TrainConfig, name) for name in ("seed", "dtype", "device", "threads")}
    request = Request(data=args.data, model=args.model, minutes=minutes, task=args.task, reading=reading, **others)
    advice = advise(request, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(f"verdict: {advice.decision.verdict}")
    for reason in advice.decision.reasons:
        print(f"- {reason}")
    _show_scores(advice.evidence)
    if args.recipe:
        if advice.recipe is None:
            print(f"no recipe: no training run was needed for this; {args.recipe} is not written")
        else:
            write_text(Path(args.recipe), recipe_text(advice))
            print(f"recipe: {args.recipe}; run it with: afina train {args.recipe}")
    return {
        "verdict": advice.decision.verdict,
        "reasons": advice.decision.reasons,
        "evidence": advice.evidence.to_dict(),
        "recipe": advice.recipe,
    }


def _show_scores(evidence: Evidence) -> None:
    """What each way of doing the task scored on the judging rows."""
    points = [point.score for point in evidence.curve if point.score is not None]
    scores = [*filter(None, [evidence.trivial]), *evidence.prompts, *evidence.simple, *points]
    if scores:
        print(f"{evidence.metric + ' on rows held out':42} {'score':>8}   95 % interval")
    for score in scores:
        print(f"{score.name:42} {score.value:8.3f}   {score.low:.3f} to {score.high:.3f}")


def _minutes(text: str | None) -> float | None:
    """The minutes asked for. Raises ConfigError where they are no positive number."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ConfigError(f"--minutes is {text!r}; expected a number above 0, such as 5")
    return value


VERB = Verb("should I fine-tune, and how? measured on your rows", add_options, run)
