"""The verbs of the command line: the options of each, and what it does with them.

Each verb's function takes the parsed options, prints for people, and returns what ``--json`` prints; where that has
``ok`` false, the exit status is 1. torch is imported only inside them, so that the help is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.engine.model_options import (
    model_options,
    open_adapted,
    open_model,
    option,
    sampling_of,
    sampling_options,
)
from afina.engine.sampling import Sampling
from afina.engine.settings import checked, fields
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from afina.engine.cli import Parser
    from afina.engine.model import GPT
    from afina.loaders.tokenizer import Tokenizer


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


def train(args: argparse.Namespace) -> dict[str, Any]:
    names = [*fields(TrainConfig)]
    names += [alias for f in fields(TrainConfig).values() for alias in f.metadata["aliases"]]
    flags = [(name, value) for name in names for value in getattr(args, name) or ()]
    config = TrainConfig.resolve(args.recipe, flags, prefix="--")
    resume = args.resume or _resume_word(args.resume_from_checkpoint)
    if resume and args.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other: keep one of them")
    if args.dry_run:
        config = _check(config, resume=resume, overwrite=args.overwrite)
        print(config.to_yaml(), end="")
        return config.to_dict()
    from afina.engine.train import finetune

    result = finetune(config, resume=resume, overwrite=args.overwrite, quiet=args.quiet)
    metrics = result.metrics
    if not args.quiet:
        print(f"best model: {metrics['best']} (dev loss {metrics['dev_loss_before']:.4f} -> {metrics['dev_loss']:.4f})")
        print(f"try it: afina generate {metrics['output_dir']} --prompt TEXT, or afina chat {metrics['output_dir']}")
    return dict(metrics)


def _check(config: TrainConfig, *, resume: bool, overwrite: bool) -> TrainConfig:
    """Everything that training would refuse before its first step and that shows without reading weights; returns the
    config with what depended on the model."""
    from afina.engine.config import ModelConfig
    from afina.engine.model import GPT
    from afina.engine.run_folder import RunFolder
    from afina.engine.train import choose_trained, refuse_adapter
    from afina.engine.weights import choose_device, read_config
    from afina.loaders.adapter import find_base, is_adapter
    from afina.loaders.checkpoint import Checkpoint
    from afina.loaders.hub import resolve
    from afina.loaders.jsonfile import read_json
    from afina.loaders.rows import read_rows
    from afina.loaders.tokenizer import check_vocab, load_tokenizer

    with RunFolder(str(config.output_dir), resume=resume, overwrite=overwrite):  # leaves the folder as it was
        choose_device(config.device)
        sources = {str(config.tokenizer or config.model), str(config.model or config.tokenizer)}
        chat = False
        if remote := [s for s in sources if s.count("/") == 1 and s[0] not in "./~" and not Path(s).exists()]:
            print(f"{remote[0]} is on the hub: its files are checked when training fetches them", file=sys.stderr)
        else:
            tokenizer = load_tokenizer(str(config.tokenizer or config.model))
            chat = tokenizer.chat_template is not None
            if config.init == "random":
                path = Path(str(config.config))
                ModelConfig.from_hf(read_json(path / "config.json" if path.is_dir() else path))
            else:
                folder = resolve(str(config.model))
                if is_adapter(folder):
                    refuse_adapter(str(config.model), find_base(folder)[0])
                Checkpoint(folder, allow_nonfinite=config.allow_nonfinite)
                fields, hf = read_config(folder)
                check_vocab(tokenizer, fields.vocab_size)
                model = GPT(fields, device="meta")
                model.hf_config = hf
                config = choose_trained(config, model)
        for source in filter(None, (config.data, config.val_file)):
            for _ in read_rows(source, columns=config.columns, skip_bad_lines=config.skip_bad_lines, chat=chat):
                pass
    return config


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


def generate_options(parser: Parser) -> None:
    parser.usage = "afina generate MODEL (--prompt TEXT [--chat] | --data FILE --output FILE) [options]"
    model_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="send --prompt as a user's message")
    parser.add_argument("--data", metavar="FILE", help="rows to complete")
    parser.add_argument("--output", metavar="FILE", help="where the completed rows go: a JSON line each")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    parser.add_argument("--batch_size", metavar="N", help="rows written at once [32]")
    for name in ("columns", "skip_bad_lines"):
        parser.add_setting(TrainConfig, name)
    sampling_options(parser)


def generate(args: argparse.Namespace) -> dict[str, Any]:
    if (args.prompt is None) == (args.data is None):
        raise ConfigError("generate needs one of --prompt TEXT and --data FILE")
    if (args.data is None) != (args.output is None):
        raise ConfigError("--data FILE and --output FILE go together")
    if args.chat and args.data is not None:
        raise ConfigError("--chat is for --prompt: rows of --data say themselves what they are")
    return _generate_rows(args) if args.data is not None else _generate_one(args)


def _generate_one(args: argparse.Namespace) -> dict[str, Any]:
    sampling = Sampling(**sampling_of(args))
    from afina.engine.adapters import set_adapter
    from afina.engine.generate import complete, encode_prompt

    model, tokenizer, adapters = open_adapted(args)
    ids = encode_prompt(model, tokenizer, [{"role": "user", "content": args.prompt}] if args.chat else args.prompt)
    started, tokens, texts = time.perf_counter(), 0, {}
    for name, adapter in adapters.items():
        set_adapter(model, adapter)
        (done,) = complete(model, tokenizer, [ids], sampling)
        texts[name] = done.text
        tokens += done.tokens
        if not args.json:
            print(f"== {name} ==\n{done.text}" if len(adapters) > 1 else done.text)
    speed = round(tokens / (time.perf_counter() - started), 1)
    several = {"texts": texts} if len(texts) > 1 else {}
    return {"text": next(iter(texts.values())), **several, "tokens": tokens, "tokens_per_second": speed}


def _generate_rows(args: argparse.Namespace) -> dict[str, Any]:
    sampling = Sampling(**sampling_of(args))
    batch_size = 32 if args.batch_size is None else checked(TrainConfig, "batch_size", args.batch_size, "--batch_size")
    output = Path(args.output)
    if output.is_dir() or (output.exists() and not args.overwrite):
        raise ConfigError(f"--output {output} already exists: choose another, or give --overwrite to replace a file")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}: make it, or choose another")
    from tqdm import tqdm

    from afina.engine.adapters import set_adapter
    from afina.engine.evaluate import answer_of
    from afina.engine.generate import complete, encode_prompt
    from afina.loaders.checkpoint import atomic_write
    from afina.loaders.rows import read_rows
    from afina.loaders.tokenizer import load_tokenizer

    rows = list(
        read_rows(
            args.data,
            columns=option(args, TrainConfig, "columns"),
            skip_bad_lines=option(args, TrainConfig, "skip_bad_lines"),
            chat=load_tokenizer(args.model).chat_template is not None,
            targets=False,
        )
    )
    model, tokenizer, adapters = open_adapted(args)
    prompts = [encode_prompt(model, tokenizer, row.example, where=row.example.where) for row in rows]
    started, tokens = time.perf_counter(), 0
    texts: dict[str, list[str]] = {}
    with atomic_write(output) as file, tqdm(total=len(rows) * len(adapters), unit="row", disable=None) as bar:
        for name, adapter in adapters.items():
            set_adapter(model, adapter)
            found = texts[name] = []
            for done in complete(model, tokenizer, prompts, sampling, batch_size=batch_size):
                found.append(done.text)
                tokens += done.tokens
                bar.update()
        for number, row in enumerate(rows):
            each = {name: found[number] for name, found in texts.items()}
            line = {**row.raw, "completion": next(iter(each.values()))} | (
                {"completions": each} if len(each) > 1 else {}
            )
            own = answer_of(row.example)
            line |= {} if own is None else {"reference": own}
            file.write(to_json(line).encode(errors="backslashreplace") + b"\n")  # half characters as JSON escapes
    seconds = time.perf_counter() - started
    print(f"{output}: {len(rows):,} rows, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
    speed = round(tokens / seconds, 1)
    return {"output": str(output), "rows": len(rows), "text": None, "tokens": tokens, "tokens_per_second": speed}


def to_json(value: Any) -> str:
    """One line of JSON; null for NaN and infinity, which JSON does not have, and text for what is not plain data."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), ensure_ascii=False, default=str)


def eval_options(parser: Parser) -> None:
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
    for name in ("batch_size", "max_length", "on_long", "train_on_prompt", "packing", "columns", "skip_bad_lines"):
        parser.add_setting(TrainConfig, name)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_length", "on_long", "train_on_prompt", "columns", "skip_bad_lines", "batch_size", "packing")
    settings = {name: option(args, TrainConfig, name) for name in names}
    new_tokens = args.max_new_tokens and checked(Sampling, "max_new_tokens", args.max_new_tokens, "--max_new_tokens")
    from afina.engine.adapters import set_adapter
    from afina.engine.evaluate import TASKS, evaluate_loss, evaluate_task, learnt_bytes
    from afina.loaders.dataset import prepare
    from afina.loaders.hub import resolve

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
        size = learnt_bytes(data.train, tokenizer)
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


def chat_options(parser: Parser) -> None:
    model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    sampling_options(parser)


def chat(args: argparse.Namespace) -> dict[str, Any]:
    """Read messages from standard input until it ends; answers are printed as they are written."""
    sampling = sampling_of(args)
    Sampling(**sampling)
    from afina.engine.adapters import set_adapter
    from afina.engine.generate import stream

    model, tokenizer, adapters = open_adapted(args)
    person = sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input)
        print("/reset forgets the conversation, /quit (or Ctrl-D) leaves.")
        if args.adapter:
            print(f"/adapter NAME changes who answers: {', '.join([*adapters, 'base'])}")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages, turns = list(opening), 0
    while True:
        try:
            line = input("> " if person else "").strip()
        except EOFError:
            break
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(opening)
        elif args.adapter and line.split()[0] == "/adapter":
            name = line.removeprefix("/adapter").strip()
            if name in (*adapters, "base"):
                set_adapter(model, adapters.get(name))
            else:
                print(f"no adapter {name!r}: there are {', '.join([*adapters, 'base'])}", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; /reset and /quit are known", file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            answer = ""
            try:
                for piece in stream(model, tokenizer, asked, **sampling):
                    print(piece, end="", flush=True)
                    answer += piece
            except KeyboardInterrupt:  # cuts the answer short, not the conversation
                if not person:
                    raise
            except DataError as error:
                print(f"{error}; or /reset", file=sys.stderr)
                continue
            print(flush=True)
            messages = [*asked, {"role": "assistant", "content": answer}]
            turns += 1
    return {"turns": turns}


def export_options(parser: Parser) -> None:
    parser.usage = "afina export MODEL --to hf|peft|gguf --output DIR [options]"
    parser.add_argument(
        "model", metavar="MODEL", help="a run folder (its best model), a model's or adapter's folder, or a hub id"
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


def export(args: argparse.Namespace) -> dict[str, Any]:
    from afina.engine.export import export, summary

    result = export(
        args.model,
        args.output,
        to=args.to,
        dtype=args.dtype,
        base=args.base,
        base_name=args.base_name,
        data=args.data,
    )
    print(summary(result))
    return result


def demo_options(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", default="support", metavar="NAME", help="which demo [support]")
    parser.add_argument("--output_dir", default="out/demo", metavar="DIR", help="run folder [out/demo]")


def demo(args: argparse.Namespace) -> dict[str, Any]:
    from afina.engine.demo import run_demo

    return run_demo(args.name, output_dir=args.output_dir, json=args.json)


def doctor_options(parser: Parser) -> None:
    parser.usage = "afina doctor [KERNEL ...] [options]"
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only these, such as attention [all]")
    parser.add_setting(TrainConfig, "device")


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    device = option(args, TrainConfig, "device")
    from afina.engine.doctor import examine

    return examine(args.kernels, device)


Verb = tuple[str, Callable[["Parser"], None], Callable[[argparse.Namespace], dict[str, Any]]]
VERBS: dict[str, Verb] = {
    "train": ("fine-tune a model on your examples", train_options, train),
    "eval": ("loss and task metrics on held-out rows", eval_options, evaluate),
    "generate": ("continue a text, or complete a file of rows", generate_options, generate),
    "chat": ("talk to a model in the terminal", chat_options, chat),
    "export": ("write deployable weights, checked against the model", export_options, export),
    "doctor": ("this machine, and each kernel beside its reference on it", doctor_options, doctor),
    "demo": ("the whole story on the model and data inside the package", demo_options, demo),
}
