"""``afina generate``: continue one text, or complete the rows of a file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.cli.options import (
    Parser,
    Verb,
    exchanged,
    model_options,
    open_adapted,
    option,
    sampling_of,
    sampling_options,
    to_json,
    tools_of,
    tools_option,
)
from afina.durable import open_file
from afina.engine.sampling import Sampling
from afina.engine.settings import checked
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, WeightsError
from afina.printable import readable
from afina.streams import is_terminal

if TYPE_CHECKING:
    from afina.engine.generate import Completion
    from afina.loaders.text.tokenizer import Tokenizer


def add_options(parser: Parser) -> None:
    parser.usage = "afina generate MODEL (--prompt TEXT [--chat] | --data FILE --output FILE) [options]"
    model_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="send --prompt as a user's message")
    tools_option(parser)
    parser.add_argument("--data", metavar="FILE", help="rows to complete")
    parser.add_argument("--output", metavar="FILE", help="where the completed rows go: a JSON line each")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    parser.add_argument("--batch_size", metavar="N", help="rows written at once [32]")
    for name in ("columns", "skip_bad_lines"):
        parser.add_setting(TrainConfig, name)
    sampling_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if (args.prompt is None) == (args.data is None):
        raise ConfigError("generate needs one of --prompt TEXT and --data FILE")
    if (args.data is None) != (args.output is None):
        raise ConfigError("--data FILE and --output FILE go together")
    if args.chat and args.data is not None:
        raise ConfigError("--chat is for --prompt: rows of --data say themselves what they are")
    if args.tools is not None and not args.chat:
        raise ConfigError("--tools is for --chat: rows of --data bring their own tools")
    return _generate_rows(args) if args.data is not None else _generate_one(args)


def _generate_one(args: argparse.Namespace) -> dict[str, Any]:
    sampling = Sampling(**sampling_of(args))
    from afina.engine.generate import complete, encode_prompt
    from afina.engine.lora import set_adapter
    from afina.engine.packed import release

    model, tokenizer, adapters = open_adapted(args)
    release(model, keep=exchanged(adapters))
    prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
    ids = encode_prompt(model, tokenizer, prompt, tools=tools_of(args))
    started, tokens, texts, likely = time.perf_counter(), 0, {}, {}
    for name, adapter in adapters.items():
        set_adapter(model, adapter)
        (done,) = complete(model, tokenizer, [ids], sampling)
        texts[name] = done.text
        tokens += done.tokens
        likely[name] = likelihoods(tokenizer, done)
        if not args.json:
            text = readable(done.text) if is_terminal(sys.stdout) else done.text
            print(f"== {name} ==\n{text}" if len(adapters) > 1 else text)
    speed = round(tokens / (time.perf_counter() - started), 1)
    several: dict[str, Any] = {"texts": texts} if len(texts) > 1 else {}
    if sampling.logprobs is not None:
        several |= {"logprobs": likely if len(likely) > 1 else next(iter(likely.values()))}
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

    from afina.engine.generate import complete, encode_prompt
    from afina.engine.lora import set_adapter
    from afina.engine.packed import release
    from afina.engine.questions import answer_of
    from afina.loaders.data.rows import read_rows
    from afina.loaders.text.source import load_tokenizer

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
    release(model, keep=exchanged(adapters))
    prompts = [encode_prompt(model, tokenizer, row.example, where=row.example.where) for row in rows]
    started, tokens = time.perf_counter(), 0
    texts: dict[str, list[str]] = {}
    likely: dict[str, list[Any]] = {}
    total = len(rows) * len(adapters)
    with open_file(output, error=WeightsError) as file, tqdm(total=total, unit="row", disable=None) as bar:
        for name, adapter in adapters.items():
            set_adapter(model, adapter)
            found = texts[name] = []
            scores = likely[name] = []
            for done in complete(model, tokenizer, prompts, sampling, batch_size=batch_size):
                found.append(done.text)
                scores.append(likelihoods(tokenizer, done))
                tokens += done.tokens
                bar.update()
        for number, row in enumerate(rows):
            each = {name: found[number] for name, found in texts.items()}
            line = {**row.raw, "completion": next(iter(each.values()))} | (
                {"completions": each} if len(each) > 1 else {}
            )
            if sampling.logprobs is not None:
                both = {name: scores[number] for name, scores in likely.items()}
                line["logprobs"] = both if len(both) > 1 else next(iter(both.values()))
            own = answer_of(row.example)
            line |= {} if own is None else {"reference": own}
            file.write(to_json(line).encode(errors="backslashreplace") + b"\n")  # half characters as JSON escapes
    seconds = time.perf_counter() - started
    print(f"{output}: {len(rows):,} rows, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
    speed = round(tokens / seconds, 1)
    return {"output": str(output), "rows": len(rows), "text": None, "tokens": tokens, "tokens_per_second": speed}


def likelihoods(tokenizer: Tokenizer, done: Completion) -> list[dict[str, Any]]:
    """How likely each token was, of the model's own distribution, as JSON."""
    return [
        {
            "token": tokenizer.decode([each.token]),
            "id": each.token,
            "logprob": each.logprob,
            "top": [
                {"token": tokenizer.decode([token]), "id": token, "logprob": logprob} for token, logprob in each.top
            ],
        }
        for each in done.logprobs
    ]


VERB = Verb("continue a text, or complete a file of rows", add_options, run)
