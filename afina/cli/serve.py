"""``afina serve``: a model and its adapters behind OpenAI's API."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from afina.cli.options import Parser, Verb, exchanged, folder_name, model_options, open_adapted, option
from afina.engine.settings import fields
from afina.errors import ConfigError
from afina.serve.config import ServeConfig

if TYPE_CHECKING:
    from afina.serve.worker import Loaded


def add_options(parser: Parser) -> None:
    model_options(parser)
    for name in fields(ServeConfig):
        parser.add_setting(ServeConfig, name, **({"action": "append"} if name == "cors_origin" else {}))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until a signal ends it; what happens goes to standard error."""
    config = ServeConfig(**{name: option(args, ServeConfig, name) for name in fields(ServeConfig)})
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"afina serve needs {' and '.join(missing)}: pip install 'afina[serve]'")
    from afina.serve.server import serve

    return {"model": args.model, **serve(config, lambda: load(args, config), log)}


def load(args: argparse.Namespace, config: ServeConfig) -> Loaded:
    """The model with its adapters, by the names that requests give."""
    from functools import partial
    from pathlib import Path

    from afina.engine.batcher import Batcher
    from afina.engine.kv_pool import CPU_BYTES
    from afina.engine.lora import set_adapter
    from afina.engine.packed import release
    from afina.serve.worker import Loaded

    model, tokenizer, adapters = open_adapted(args)
    name = folder_name(args.model) if Path(args.model).exists() else args.model
    own = adapters.pop("", None)
    served = {name: own}
    if own is not None:  # MODEL is an adapter itself: what it was trained on is served beside it
        if name == "base":
            raise ConfigError(
                f"{args.model}: 'base' is the name of what it was trained on: give its folder another name"
            )
        served["base"] = None
    for other, adapter in adapters.items():
        if other in served:
            raise ConfigError(f"--adapter {other}=...: MODEL is served as {other!r}: give the adapter another name")
        served[other] = adapter
    total = None if config.cache_gb is None else int(config.cache_gb * 1e9)
    if total is None and model.device.type == "cpu":
        total = CPU_BYTES  # on a GPU each takes a part of what is free there
    release(model, keep=exchanged(served))
    share = None if total is None else total // len(served)
    batcher = partial(Batcher, model, tokenizer, max_rows=config.max_rows, cache_bytes=share)
    return Loaded(model, tokenizer, served, partial(set_adapter, model), batcher)


def log(line: str) -> None:
    """A line on standard error. That nobody reads it any more must neither end a request nor keep the server."""
    with contextlib.suppress(OSError):
        print(f"afina serve: {line}", file=sys.stderr, flush=True)


VERB = Verb("answer requests over HTTP, as OpenAI's API does", add_options, run)
