"""What the verbs share: the parser, the options that name a model, its adapters and how to sample, and the model they
name; and the one line of JSON that ``--json`` prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from afina.engine.sampling import Sampling
from afina.engine.settings import FALSE_WORDS, TRUE_WORDS, checked, fields, flag_help, kinds
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from afina.engine.lora import Adapter
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

# The settings of a training run that decide what its rows are.
READING = ("max_length", "on_long", "train_on_prompt", "columns", "skip_bad_lines", "roles_to_train")


class Parser(argparse.ArgumentParser):
    """argparse with underscores and dashes alike, booleans in every spelling, and errors as ConfigError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.booleans: set[str] = set()

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def add_setting(self, owner: type, name: str, **kwargs: Any) -> None:
        """The flag of a setting and of its aliases. Booleans also as ``--name`` and ``--no-name``."""
        shown: dict[str, Any] = flag_help(owner, name)
        for flag in (name, *fields(owner)[name].metadata["aliases"]):
            if kinds(owner)[name] is bool:
                self.booleans.add(f"--{flag}")
            self.add_argument(f"--{flag}", **kwargs, **(shown if flag == name else {"help": argparse.SUPPRESS}))

    def normalised(self, argv: list[str]) -> list[str]:
        """Flags in the one spelling that argparse knows; unknown ones refused with the nearest name."""
        out: list[str] = []
        queue = list(argv)
        while queue:
            token = queue.pop(0)
            if token == "--":
                return [*out, token, *queue]
            if not token.startswith("--"):
                out.append(token)
                continue
            typed, equals, value = token.partition("=")
            flag = "--" + typed[2:].replace("-", "_")
            positive = "--" + flag.removeprefix("--no_")
            if flag not in self._option_string_actions and positive in self.booleans:
                if equals:
                    raise ConfigError(f"{typed} takes no value; found {token}")
                out.append(f"{positive}=false")
            elif flag not in self._option_string_actions:
                known = [name for name in self._option_string_actions if name.startswith("--")]
                raise ConfigError(f"{typed} is not an option of {self.prog}{nearest(flag, known)}")
            elif flag in self.booleans and not equals:
                given = bool(queue) and queue[0].lower() in TRUE_WORDS + FALSE_WORDS
                out.append(f"{flag}={queue.pop(0) if given else 'true'}")
            else:
                out.append(flag + equals + value)
        return out


class Verb(NamedTuple):
    """A verb of the command line: its line in the help, what adds its options, and what runs it.

    ``run`` takes the parsed options, prints for people, and returns what ``--json`` prints; where that has ``ok``
    false, the exit status is ``failed``. A verb's file imports torch only inside its functions: the help is quick.
    """

    summary: str
    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]
    failed: int = 1


def model_options(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a run folder (its best model), a GGUF file, a hub id or afina-tiny"
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
    from afina.loaders.text.source import load_tokenizer
    from afina.loaders.text.tokenizer import check_vocab

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
    from afina.engine.lora import load_adapter, set_adapter
    from afina.loaders.weights.hub import resolve
    from afina.loaders.weights.peft import is_adapter

    folders: dict[str, Path] = {}
    for text in args.adapter or ():
        name, named, source = text.partition("=")
        if not named or "/" in name or Path(text).exists():
            name, source = "", text
        folder = resolve(source)
        name = name or (folder_name(folder.parent) if folder.name == "best" else folder_name(folder))
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


def folder_name(path: str | Path) -> str:
    """The last part of a path, of "." and ".." too; never empty."""
    return os.path.basename(os.path.abspath(path)) or str(path)


def exchanged(adapters: Mapping[str, Adapter | None]) -> set[str]:
    """The parameters of the base that a change of adapter exchanges, because one of them trained them whole."""
    return {name for adapter in adapters.values() if adapter is not None for name in adapter.inactive}


def option(args: argparse.Namespace, owner: type, name: str) -> Any:
    """A flag's value in the type of the setting it stands for, or the setting's default."""
    value, f = getattr(args, name), fields(owner)[name]
    if value is None:
        return f.default if f.default is not dataclasses.MISSING else {}
    return checked(owner, name, value, f"--{name}")


def tools_option(parser: Parser) -> None:
    parser.add_argument("--tools", metavar="FILE", help="JSON list of the functions that the model may call")


def tools_of(args: argparse.Namespace) -> tuple[dict[str, Any], ...] | None:
    """The tools of ``tools_option``'s file. Raises DataError."""
    if args.tools is None:
        return None
    from afina.loaders.data.conversations import Unfit, read_tools

    try:
        tools = read_tools(Path(args.tools).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "not UTF-8"
        raise DataError(f"--tools {args.tools}: cannot be read ({reason}): check the path") from problem
    except Unfit as problem:
        raise DataError(f"--tools {args.tools}: {problem}") from problem
    if tools is None:
        raise DataError(f"--tools {args.tools}: holds no tool: expected a list of {{type, function}}")
    return tools


def sampling_options(parser: Parser, *, without: Sequence[str] = ()) -> None:
    for name in (name for name in fields(Sampling) if name not in without):
        parser.add_setting(Sampling, name, **({"action": "append"} if name == "stop" else {}))


def sampling_of(args: argparse.Namespace, *, without: Sequence[str] = ()) -> dict[str, Any]:
    return {name: option(args, Sampling, name) for name in fields(Sampling) if name not in without}


def to_json(value: Any) -> str:
    """One line of JSON; null for NaN and infinity, which JSON does not have, and text for what is not plain data."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), ensure_ascii=False, default=str)
