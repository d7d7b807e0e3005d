"""``afina eval``: loss and task metrics on held-out rows, with intervals, beside another model's."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.cli.eval_table import Column, print_results
from afina.cli.options import READING, Parser, Verb, model_options, open_adapted, open_model, option, to_json
from afina.durable import open_file
from afina.engine.sampling import Sampling
from afina.engine.settings import checked
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError, DataError, WeightsError, nearest

if TYPE_CHECKING:
    from afina.engine.lm_eval_file import Doc, LmEvalTask
    from afina.engine.model import GPT
    from afina.engine.task_results import TaskResult
    from afina.loaders.data.dataset import Data
    from afina.loaders.text.render import Example
    from afina.loaders.text.tokenizer import Tokenizer


def add_options(parser: Parser) -> None:
    parser.usage = "afina eval MODEL --data FILE [--task T] [--base BASE] [options]"
    model_options(parser)
    parser.add_argument("--data", metavar="FILE", help="rows that the model has not learnt")
    parser.add_argument(
        "--task",
        default="auto",
        metavar="TASK",
        help="auto (guessed from the rows, and said), loss, generate, classify, translate, retrieve, chat; exact_match "
        "or classification (greedy answers, those figures alone); or lm-evaluation-harness' task file (.yaml) [auto]",
    )
    parser.add_argument("--base", metavar="BASE", help="another model, measured and compared on the same rows")
    parser.add_argument(
        "--options",
        metavar="A,B,...",
        help="what classify chooses from, or a file of it, one a line (default: a row's candidates, or all answers)",
    )
    parser.add_argument("--few_shot", metavar="N", help="solved rows of --train_file before each prompt")
    parser.add_argument("--train_file", metavar="FILE", help="where --few_shot takes its rows from")
    parser.add_argument("--output", metavar="FILE", help="write each row's prediction and score: a JSON line each")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    parser.add_argument("--ignore_case", action="store_true", help="compare answers without regard to case")
    parser.add_argument(
        "--max_new_tokens", metavar="N", help="tokens of an answer (default: what the longest one needs)"
    )
    for name in (*READING, "batch_size", "packing"):
        parser.add_setting(TrainConfig, name)


class Asked:
    """What is asked of each model: the options of the command line, read once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.reading = {name: option(args, TrainConfig, name) for name in READING}
        self.reading["roles"] = self.reading.pop("roles_to_train")
        self.batching = {name: option(args, TrainConfig, name) for name in ("batch_size", "packing")}
        self.new_tokens: int | None = None
        if args.max_new_tokens is not None:
            self.new_tokens = checked(Sampling, "max_new_tokens", args.max_new_tokens, "--max_new_tokens")
        self.shots: int | None = None
        if args.few_shot is not None:
            self.shots = _count(args.few_shot)
        from afina.engine.tasks import TASKS

        self.file: LmEvalTask | None = None
        self.docs: tuple[list[Doc], list[Doc], bool] = ([], [], False)
        if args.task.endswith((".yaml", ".yml")):
            self._read_task()
        elif args.task not in TASKS:
            raise ConfigError(f"--task is {args.task!r}; expected {', '.join(TASKS)}{nearest(args.task, TASKS)}")
        elif args.data is None:
            raise ConfigError("--data FILE is missing: the rows to measure the model on")
        elif bool(self.shots) != (args.train_file is not None):
            raise ConfigError(
                "--few_shot N and --train_file FILE go together: examples are taken from rows of their own"
            )
        self.options = _options(args.options)
        if self.options and args.task not in ("auto", "classify"):
            raise ConfigError(f"--options is for --task classify, not for {args.task}: leave it out")
        self.output = _output(args)
        self.task: str | None = None  # once it has been guessed

    def _read_task(self) -> None:
        from afina.engine.lm_eval_file import read_task

        for name in ("options", "max_new_tokens"):
            if getattr(self.args, name) is not None:
                raise ConfigError(f"--{name} and a task file contradict each other: the file says it")
        self.file = read_task(Path(self.args.task), num_fewshot=self.shots)
        self.docs = self.file.docs(self.args.data, self.args.train_file)

    def measure(self, source: str, model: GPT, tokenizer: Tokenizer, *, first: bool) -> Column:
        """Measure a model; the ``first`` is the one that is asked about."""
        if self.file is not None:
            return self._measure_file(source, model, tokenizer, self.file)
        from tqdm import tqdm

        from afina.engine.evaluate import evaluate_loss, loss_text_bytes
        from afina.engine.intervals import bootstrap
        from afina.engine.tasks import run_task
        from afina.loaders.data.dataset import prepare

        quiet = self.args.json
        length = min(self.reading["max_length"], model.config.max_positions)
        reading = self.reading | {"max_length": length}
        data = prepare(self.args.data, tokenizer, **reading, val_size=0.0, progress=not quiet)
        examples = [row.example for row in data.train.source_rows()]
        if first:
            print(data.summary().splitlines()[0], file=sys.stderr)
            _refuse_untaught(tokenizer, examples, source)
        shots = self._few_shot(tokenizer, data, examples)
        self._guess(data, examples)
        assert self.task is not None  # _guess has said it
        batches = math.ceil(len(data.train) / self.batching["batch_size"])
        with tqdm(total=batches, desc="loss", unit="batch", delay=1, disable=True if quiet else None) as bar:
            loss = evaluate_loss(model, data.train, **self.batching, poll=bar.update)
        samples = loss.samples(loss_text_bytes(data.train, tokenizer))
        found = {name: bootstrap(*sample) for name, sample in samples.items()}
        column = Column(
            source=source,
            task=self.task,
            rows=len(data.train),
            tokens=int(loss.tokens.sum()),
            places=[data.train.where(number) for number in range(len(data.train))],
            result=None,
            metrics={name: interval.value for name, interval in found.items()},
            intervals={name: (interval.low, interval.high) for name, interval in found.items()},
            samples=samples,
        )
        if self.task != "loss":
            result = run_task(
                model,
                tokenizer,
                examples,
                self.task,
                options=self.options,
                few_shot=shots,
                max_new_tokens=self.new_tokens,
                ignore_case=self.args.ignore_case,
                progress=not quiet,
            )
            self._add(column, result)
        return column

    def _measure_file(self, source: str, model: GPT, tokenizer: Tokenizer, file: LmEvalTask) -> Column:
        from afina.engine.lm_eval_task import run_lm_eval_task

        docs, pool, same = self.docs
        result = run_lm_eval_task(model, tokenizer, file, docs, pool, same=same, progress=not self.args.json)
        column = Column(source, file.name, len(docs), None, [doc.where for doc in docs], None)
        self._add(column, result)
        return column

    @staticmethod
    def _add(column: Column, result: TaskResult) -> None:
        """The task's metrics beside those of the loss (of conversations, the loss of all turns beside the rows')."""
        column.result = result
        column.metrics = result.metrics | column.metrics
        column.intervals = result.intervals | column.intervals
        column.samples = result.samples | column.samples

    def _guess(self, data: Data, examples: Sequence[Example]) -> None:
        if self.task is None:
            from afina.engine.tasks import guess_task

            task, why = self.args.task, "--task"
            if task == "auto":
                task, why = guess_task(data.report["schema"], examples)
            if self.options:
                task, why = "classify", "--options"
            self.task = task
            if self.args.task == "auto":
                print(f"task: {task} ({why}); another one with --task", file=sys.stderr)

    def _few_shot(self, tokenizer: Tokenizer, data: Data, examples: Sequence[Example]) -> list[Example]:
        """The same rows of --train_file for every prompt, none of which is measured."""
        if not self.shots:
            return []
        from collections import Counter

        from afina.loaders.data.dataset import permutation
        from afina.loaders.data.rows import read_rows

        counts: Counter[str] = Counter()
        reading = {name: self.reading[name] for name in ("columns", "skip_bad_lines", "roles")}
        chat = tokenizer.chat_template is not None
        rows = [row.example for row in read_rows(self.args.train_file, **reading, chat=chat, counts=counts)]
        schema = next(key[7:] for key in counts if key.startswith("schema:"))
        if schema != data.report["schema"]:
            theirs = f"those of {self.args.data} are {data.report['schema']}"
            raise DataError(f"{self.args.train_file}: its rows are {schema}, {theirs}: use examples of the same schema")
        measured = {_content(example) for example in examples}
        usable = [row for row in rows if _content(row) not in measured]
        if len(usable) < self.shots:
            found = f"{len(usable)} rows that are not measured"
            raise DataError(f"{self.args.train_file}: {found}, but --few_shot is {self.shots}: lower it")
        return [usable[number] for number in permutation(len(usable), 0)[: self.shots].tolist()]


def run(args: argparse.Namespace) -> dict[str, Any]:
    asked = Asked(args)
    from afina.engine.lora import set_adapter
    from afina.loaders.weights.hub import resolve

    if args.base:
        resolve(args.base)  # before the first model is measured
    model, tokenizer, adapters = open_adapted(args)
    if asked.output and len(adapters) > 1:
        raise ConfigError("--output is for the predictions of one model: give one --adapter")
    columns: dict[str, Column] = {}
    for name, adapter in adapters.items():
        set_adapter(model, adapter)
        columns[name or "model"] = asked.measure(args.model, model, tokenizer, first=not columns)
    base: Column | None = None
    if args.base or args.adapter:
        set_adapter(model, None)
        if args.base:
            del model  # room for the next one
            model, tokenizer = open_model(args, args.base)
        base = asked.measure(args.base or args.model, model, tokenizer, first=False)
        for column in columns.values():
            _compare(base, column)
    data = args.data or args.task
    found = {name: column.to_dict(data) for name, column in columns.items()}
    first = next(iter(columns.values()))
    result = dict(next(iter(found.values())))
    if len(columns) > 1:
        result["adapters"] = found
    if base:
        result["base"] = base.to_dict(data)
    if asked.output:
        _write(asked.output, first, base)
        result["output"] = str(asked.output)
    print_results(columns | ({"base": base} if base else {}), result)
    return result


def _compare(base: Column, column: Column) -> None:
    """What changed from the base to a model, and whether that is better."""
    from afina.engine.intervals import verdict
    from afina.engine.task_results import LOWER_IS_BETTER, paired_samples

    if base.places != column.places:
        raise DataError(
            f"{column.source} reads {column.rows:,} rows and {base.source} {base.rows:,}, not the same ones: give a "
            "--max_length that leaves both the same, or shorten the longest rows"
        )
    before = dict(base.samples)
    if base.tokens != column.tokens:  # other tokenizers: a loss a token is not one
        for name in ("loss", "perplexity"):
            before.pop(name, None)
    column.differences = paired_samples(before, column.samples)
    better_if_higher = column.metric not in LOWER_IS_BETTER
    column.verdict = verdict(column.differences[column.metric], higher_is_better=better_if_higher)


def _write(path: Path, column: Column, base: Column | None) -> None:
    """Each row's prediction, and the base's, as JSON lines in the order of the rows."""

    def rows(found: Column) -> list[dict[str, Any]]:
        if found.result:
            return found.result.rows
        sums = found.samples["loss"].values.tolist()
        return [{"where": place, "loss": loss, "tokens": n} for place, (loss, n) in zip(found.places, sums)]

    lines = rows(column)
    if base:
        shown = ("prediction", "score", "loss")
        theirs = [{f"base_{key}": row[key] for key in shown if key in row} for row in rows(base)]
        lines = [row | other for row, other in zip(lines, theirs, strict=True)]
    with open_file(path, error=WeightsError) as file:
        for line in lines:
            file.write(to_json(line).encode(errors="backslashreplace") + b"\n")


def _output(args: argparse.Namespace) -> Path | None:
    if args.output is None:
        return None
    path = Path(args.output)
    if path.is_dir() or (path.exists() and not args.overwrite):
        raise ConfigError(f"--output {path} already exists: choose another, or give --overwrite to replace a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}: make it, or choose another")
    return path


def _options(text: str | None) -> list[str] | None:
    """The options that --options lists, or that stand in the file it names, one a line."""
    if text is None:
        return None
    try:
        listed = Path(text).read_text(encoding="utf-8-sig").splitlines() if Path(text).is_file() else text.split(",")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"--options {text}: cannot be read as UTF-8 text: check the file") from problem
    found = [option.strip() for option in listed if option.strip()]
    if len(found) < 2:
        raise ConfigError(f"--options {text}: {len(found)} options; expected at least 2, as in --options yes,no")
    return found


def _count(text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"--few_shot is {text!r}; expected a whole number")
    return int(text)


def _content(example: Example) -> str:
    return repr((example.text, example.prompt, example.completion, example.messages))


def _refuse_untaught(tokenizer: Tokenizer, examples: Sequence[Example], source: str) -> None:
    """A model without a chat template has not learnt to answer conversations."""
    if tokenizer.chat_template is None:
        for example in examples:
            if example.messages is not None:
                raise DataError(
                    f"{example.where}: is a conversation, and {source} has no chat template: give a model that has one "
                    "(chat_template.jinja in its folder), or rows of prompt and completion"
                )


VERB = Verb("loss and task metrics on held-out rows", add_options, run)
