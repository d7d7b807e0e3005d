"""``afina eval``: loss and task metrics on held-out rows."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from afina.cli.options import READING, Parser, Verb, model_options, open_adapted, open_model, option
from afina.engine.sampling import Sampling
from afina.engine.settings import checked
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, nearest

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer


def add_options(parser: Parser) -> None:
    parser.usage = "afina eval MODEL --data FILE [--task T] [--base BASE] [options]"
    model_options(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="rows that the model has not learnt")
    parser.add_argument(
        "--task",
        default="auto",
        metavar="auto|loss|exact_match|classification",
        help="exact_match and classification answer each row and compare; auto: classification for text and label, "
        "else loss [auto]",
    )
    parser.add_argument("--base", metavar="BASE", help="another model, measured on the same rows")
    parser.add_argument("--ignore_case", action="store_true", help="compare answers without regard to case")
    parser.add_argument(
        "--max_new_tokens", metavar="N", help="tokens of an answer (default: what the longest one needs)"
    )
    for name in (*READING, "batch_size", "packing"):
        parser.add_setting(TrainConfig, name)


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: option(args, TrainConfig, name) for name in (*READING, "batch_size", "packing")}
    settings["roles"] = settings.pop("roles_to_train")
    new_tokens = args.max_new_tokens and checked(Sampling, "max_new_tokens", args.max_new_tokens, "--max_new_tokens")
    from afina.engine.evaluate import TASKS, evaluate_loss, evaluate_task, loss_text_bytes
    from afina.engine.lora import set_adapter
    from afina.loaders.data.dataset import prepare
    from afina.loaders.weights.hub import resolve

    if args.task not in TASKS:
        raise ConfigError(f"--task is {args.task!r}; expected {', '.join(TASKS)}{nearest(args.task, TASKS)}")
    batching = {name: settings.pop(name) for name in ("batch_size", "packing")}

    def measure(source: str, model: GPT, tokenizer: Tokenizer, *, summary: bool = False) -> dict[str, Any]:
        length = min(settings["max_length"], model.config.max_positions)
        data = prepare(args.data, tokenizer, **settings | {"max_length": length}, val_size=0.0, progress=not args.json)
        if summary:
            print(data.summary().splitlines()[0], file=sys.stderr)
        task = args.task
        if task == "auto":
            task = "classification" if data.report["schema"] == "text/label" else "loss"
        size = loss_text_bytes(data.train, tokenizer)
        result = evaluate_loss(model, data.train, **batching, text_bytes=size) | {"rows": len(data.train)}
        metrics = {}
        if task != "loss":
            examples = [row.example for row in data.train.source_rows()]
            metrics = evaluate_task(
                model, tokenizer, examples, task, ignore_case=args.ignore_case, max_new_tokens=new_tokens
            )
        return {"model": source, "data": args.data, "task": task, **result, "metrics": metrics}

    if args.base:
        resolve(args.base)  # before the first model is measured
    model, tokenizer, adapters = open_adapted(args)
    columns: dict[str, dict[str, Any]] = {}
    for name, adapter in adapters.items():
        set_adapter(model, adapter)
        columns[name] = measure(args.model, model, tokenizer, summary=not columns)
    result = next(iter(columns.values()))
    if len(columns) > 1:
        result = result | {"adapters": dict(columns)}
    if args.base or args.adapter:
        set_adapter(model, None)
        if args.base:
            del model  # room for the next one
            model, tokenizer = open_model(args, args.base)
        result["base"] = columns["base"] = measure(args.base or args.model, model, tokenizer)
    if len(columns) > 1:
        print(" " * 14 + "".join(f" {name or 'model':>14}" for name in columns))
    for name, value in [*result.items(), *result["metrics"].items()]:
        if isinstance(value, int | float):
            values = [column.get(name, column["metrics"].get(name, math.nan)) for column in columns.values()]
            print(f"{name:14}" + "".join(f" {found:>14,.6g}" for found in values))
    return result


VERB = Verb("loss and task metrics on held-out rows", add_options, run)
