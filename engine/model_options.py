"""The options that several verbs share: which model and adapters, how to sample; and the model that they name."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.engine.sampling import Sampling
from afina.engine.settings import checked, fields
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError

if TYPE_CHECKING:
    from afina.engine.adapters import Adapter
    from afina.engine.cli import Parser
    from afina.engine.model import GPT
    from afina.loaders.tokenizer import Tokenizer


def model_options(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a run folder (its best model), a hub id or afina-tiny"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[NAME=]DIR",
        help="an adapter for MODEL: a run folder, a PEFT folder or a hub id; may be given several times",
    )
    for name in ("dtype", "device", "threads", "allow_nonfinite"):
        parser.add_setting(TrainConfig, name)


def open_model(args: argparse.Namespace, source: str) -> tuple[GPT, Tokenizer]:
    """The model and its tokenizer, as the options of ``model_options`` ask for, without --adapter."""
    from afina.engine.runtime import prepare_process
    from afina.engine.weights import load_model
    from afina.loaders.tokenizer import check_vocab, load_tokenizer

    dtype, device, threads, allow = (
        option(args, TrainConfig, name) for name in ("dtype", "device", "threads", "allow_nonfinite")
    )
    prepare_process(threads=threads)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=dtype, device=device, allow_nonfinite=allow)
    check_vocab(tokenizer, model.config.vocab_size)
    return model, tokenizer


def open_adapted(args: argparse.Namespace) -> tuple[GPT, Tokenizer, dict[str, Adapter | None]]:
    """MODEL with its adapters by name, the first of them active; one without name, {"": None}, where none is given."""
    from afina.engine.adapters import load_adapter, set_adapter
    from afina.loaders.adapter import is_adapter
    from afina.loaders.hub import resolve

    folders: dict[str, Path] = {}
    for text in args.adapter or ():
        name, named, source = text.partition("=")
        if not named or "/" in name or Path(text).exists():
            name, source = "", text
        folder = resolve(source)
        name = name or (folder.parent.name if folder.name == "best" else folder.name)
        if not is_adapter(folder):
            raise ConfigError(f"--adapter {text}: {folder} is a whole model, no adapter: give it as MODEL")
        if name in (*folders, "base"):
            raise ConfigError(f"--adapter {text}: {name!r} is taken: give each its own name, as in --adapter NAME=DIR")
        folders[name] = folder
    if folders and is_adapter(resolve(args.model)):
        raise ConfigError(f"{args.model} is an adapter itself: give its base as MODEL and both with --adapter")
    model, tokenizer = open_model(args, args.model)
    adapters: dict[str, Adapter | None] = {name: load_adapter(model, folder) for name, folder in folders.items()}
    if not adapters:
        return model, tokenizer, {"": model.adapter}
    set_adapter(model, next(iter(adapters.values())))
    return model, tokenizer, adapters


def option(args: argparse.Namespace, owner: type, name: str) -> Any:
    """A flag's value in the type of the setting it stands for, or the setting's default."""
    value, f = getattr(args, name), fields(owner)[name]
    if value is None:
        return f.default if f.default is not dataclasses.MISSING else {}
    return checked(owner, name, value, f"--{name}")


def sampling_options(parser: Parser) -> None:
    for name in fields(Sampling):
        parser.add_setting(Sampling, name, **({"action": "append"} if name == "stop" else {}))


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: option(args, Sampling, name) for name in fields(Sampling)}
