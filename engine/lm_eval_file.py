"""Task files in the YAML of lm-evaluation-harness (0.4), the part of it that needs no code: what they may say, and the
texts that they make of rows (https://github.com/EleutherAI/lm-evaluation-harness, `docs/task_guide.md`, `api/task.py`).

Understood are the keys of ``KEYS``; any other is refused by name, since a key that is passed over would give another
figure under the same name. Templates run in the sandbox of chat templates.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from afina.engine.train_config import read_yaml
from afina.errors import ConfigError, DataError, nearest
from afina.loaders.data.files import Reader, data_files
from afina.loaders.text.meter import Runaway
from afina.loaders.text.sandbox import FAILURES, Sandbox, brief

if TYPE_CHECKING:
    pass

_RENDERING: tuple[type[Exception], ...] = (Runaway, *FAILURES)
SHOT_SEED = 1234  # lm-evaluation-harness' own
MAX_NEW_TOKENS = 256
# output_type -> the metrics that can be asked for, and those that are taken where metric_list is missing.
METRICS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "generate_until": ("exact_match", "bleu", "chrf"),
    "loglikelihood": ("acc", "perplexity"),
}
DEFAULT_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
    "loglikelihood": ("acc", "perplexity"),
}
AGGREGATIONS = {"perplexity": "perplexity", "bleu": "bleu", "chrf": "chrf"}  # the others: mean
DATASETS = ("json", "csv", "parquet")
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
_WITHIN: dict[str, tuple[str, ...]] = {
    "dataset_kwargs": ("data_files",),
    "generation_kwargs": ("until", "max_gen_toks", "do_sample", "temperature"),
    "fewshot_config": ("sampler",),
    "metric_list": ("metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation"),
}
KEYS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "dataset_path": str,
    "dataset_kwargs": dict,
    **dict.fromkeys(SPLITS, str),
    "output_type": str,
    "doc_to_text": str,
    "doc_to_target": (str, int),
    "doc_to_choice": (str, list, dict),
    "target_delimiter": str,
    "fewshot_delimiter": str,
    "description": str,
    "num_fewshot": int,
    "fewshot_config": dict,
    "metric_list": list,
    "generation_kwargs": dict,
    "metadata": dict,  # says nothing about how the task is run
}


@dataclass(frozen=True)
class Doc:
    """A row as the file has it, and where."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class LmEvalTask:
    """A task file, checked. ``metrics``: (name, options of exact_match), the first being the main one."""

    path: Path
    name: str
    output_type: str
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | list[Any] | dict[str, Any] | None
    metrics: tuple[tuple[str, dict[str, bool]], ...]
    until: tuple[str, ...]
    data_files: dict[str, list[str]]
    splits: dict[str, str]
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    description: str = ""
    num_fewshot: int = 0
    first_shots: bool = False  # the first rows serve as examples, instead of drawn ones
    max_new_tokens: int = MAX_NEW_TOKENS

    @cached_property
    def _sandbox(self) -> Sandbox:
        plain = {"trim_blocks": False, "lstrip_blocks": False, "keep_trailing_newline": True}
        return Sandbox(undefined=jinja2.StrictUndefined, **plain)

    @cached_property
    def _templates(self) -> dict[str, jinja2.Template]:
        found = {}
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "description"):
            source = getattr(self, key)
            if isinstance(source, str):
                try:
                    found[key] = self._sandbox.build(source, followed=False)
                except FAILURES as problem:
                    raise ConfigError(f"{self.path}: {key} cannot be compiled: {brief(problem)}") from problem
        return found

    def _value(self, key: str, doc: Doc) -> Any:
        """What a key gives for a row: the column of that name, or what the template writes."""
        source = getattr(self, key)
        if not isinstance(source, str):
            return source
        if source in doc.values:
            return doc.values[source]
        limit = self._sandbox.begin([], sum(len(str(value)) for value in doc.values.values()))
        try:
            text = "".join(self._templates[key].generate(doc.values))
        except _RENDERING as problem:
            raise DataError(f"{doc.where}: {key} of {self.path} fails on it: {brief(problem)}") from problem
        if len(text) > limit:
            raise DataError(f"{doc.where}: {key} of {self.path} writes {len(text):,} characters of it")
        if key == "doc_to_choice" or (key == "doc_to_target" and text[:1] + text[-1:] == "[]"):
            try:
                return ast.literal_eval(text)
            except (SyntaxError, ValueError):
                return text
        return text

    def text(self, doc: Doc) -> str:
        text = self._value("doc_to_text", doc)
        if not isinstance(text, str):
            raise DataError(
                f"{doc.where}: doc_to_text gives {_kind(text)}, not a text: tasks of several inputs cannot run"
            )
        return text

    def choices(self, doc: Doc) -> list[str]:
        found = self._value("doc_to_choice", doc)
        found = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(found, list) or not found or not all(isinstance(choice, str) for choice in found):
            raise DataError(f"{doc.where}: doc_to_choice gives {_kind(found)}: expected a list of texts")
        return found

    def target(self, doc: Doc) -> str:
        """The answer's text; a number is that of a choice."""
        found = self._value("doc_to_target", doc)
        if self.doc_to_choice is not None:
            choices = self.choices(doc)
            if isinstance(found, str) and found not in choices and found.isdigit():
                found = int(found)
            if isinstance(found, int) and not isinstance(found, bool):
                if not 0 <= found < len(choices):
                    raise DataError(
                        f"{doc.where}: doc_to_target is choice {found}, but there are {len(choices)}, from 0"
                    )
                found = choices[found]
            if found not in choices:
                close = nearest(found, choices) if isinstance(found, str) else ""
                raise DataError(f"{doc.where}: its target {found!r} is none of its choices{close}: mend the row")
        if isinstance(found, list):
            raise DataError(f"{doc.where}: doc_to_target gives a list: tasks of several targets cannot run")
        return str(found)

    def contexts(self, docs: Sequence[Doc], pool: Sequence[Doc], *, same: bool) -> list[str]:
        """What the model reads for each row, the examples of ``pool`` before it. ``same``: the rows are in the pool."""
        if self.num_fewshot and len(pool) < self.num_fewshot + same:
            raise DataError(f"{self.path}: num_fewshot is {self.num_fewshot}, but there are {len(pool)} rows to take")
        draw = random.Random(SHOT_SEED)
        return [
            str(self._value("description", doc)) + self._shots(doc, pool, draw, same) + self.text(doc) for doc in docs
        ]

    def _shots(self, doc: Doc, pool: Sequence[Doc], draw: random.Random, same: bool) -> str:
        count = self.num_fewshot
        if not count:
            return ""
        if self.first_shots:
            chosen = [shot for shot in pool if not same or shot.values != doc.values][:count]
        else:
            chosen = draw.sample(pool, count + same)
            if same:
                chosen = [shot for shot in chosen if shot.values != doc.values][:count]
        return "".join(
            self.text(shot) + self.target_delimiter + self.target(shot) + self.fewshot_delimiter for shot in chosen
        )

    def docs(self, data: str | None, train_file: str | None) -> tuple[list[Doc], list[Doc], bool]:
        """The rows to measure, those that examples are taken from, and whether these are the same rows."""
        name = self.splits.get("test_split") or self.splits.get("validation_split")
        files = [data] if data else self._files(name)
        if not files:
            raise ConfigError(f"{self.path}: names no rows: give --data FILE, or data_files and a test_split in it")
        if not self.num_fewshot:
            return read_docs(files), [], False
        shots = self.splits.get("fewshot_split") or self.splits.get("training_split")
        pool = [train_file] if train_file else self._files(shots) if shots else []
        if not pool:
            raise ConfigError(
                f"{self.path}: num_fewshot is {self.num_fewshot}, but nothing names the rows to take examples from: "
                "give --train_file FILE, or a fewshot_split"
            )
        same = [Path(file).resolve() for file in pool] == [Path(file).resolve() for file in files]
        return read_docs(files), read_docs(pool), same

    def _files(self, split: str | None) -> list[str]:
        """The files of a split; a relative path starts where we are, else at the task's file."""
        if split is None and len(self.data_files) == 1:
            split = next(iter(self.data_files))
        if split is not None and split not in self.data_files:
            known = f"{nearest(split, self.data_files)}: it has {', '.join(self.data_files) or 'none'}"
            raise ConfigError(f"{self.path}: there is no split {split!r} in data_files{known}")
        found = self.data_files[split] if split is not None else []
        return [file if Path(file).exists() else str(self.path.parent / file) for file in found]


def read_docs(files: Sequence[str]) -> list[Doc]:
    """The rows of data files, as they are. Raises DataError naming a line that cannot be read."""
    docs = []
    for path in data_files(list(files)):
        for record in Reader(path, set()):
            where = f"{path}: line {record.line}"
            if record.problem:
                raise DataError(f"{where}: {record.problem}")
            docs.append(Doc(where, record.value))
    if not docs:
        raise DataError(f"{', '.join(map(str, files))}: no row to measure")
    return docs


def read_task(path: Path, *, num_fewshot: int | None = None) -> LmEvalTask:
    """A task file, checked; ``num_fewshot`` in place of its own. Raises ConfigError naming the line and key."""
    given: dict[str, Any] = {}
    where: dict[str, str] = {}
    for place, key, value in read_yaml(path, "task"):
        if key not in KEYS:
            raise ConfigError(
                f"{place} is not a key that afina understands{nearest(key, KEYS)}; it knows {', '.join(KEYS)}"
            )
        if value is None:
            continue
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise ConfigError(f"{place} is {_kind(value)}, which is not what it takes")
        for inner in value if isinstance(value, list) and key in _WITHIN else [value]:
            for name in inner if isinstance(inner, dict) and key in _WITHIN else ():
                if name not in _WITHIN[key]:
                    known = ", ".join(_WITHIN[key])
                    raise ConfigError(
                        f"{place}: {name} is not understood{nearest(str(name), _WITHIN[key])}; expected {known}"
                    )
        given[key], where[key] = value, place
    for key in ("doc_to_text", "doc_to_target"):
        if key not in given:
            raise ConfigError(f"{path}: {key} is missing: a task says what the model reads and what is right")
    kind = given.get("output_type", "generate_until")
    if kind not in METRICS:
        raise ConfigError(f"{where['output_type']} is {kind!r}; expected {', '.join(METRICS)}{nearest(kind, METRICS)}")
    if (kind == "multiple_choice") and "doc_to_choice" not in given:
        raise ConfigError(f"{path}: doc_to_choice is missing: multiple_choice chooses among its texts")
    if given.get("dataset_path", "json") not in DATASETS:
        raise ConfigError(
            f"{where['dataset_path']} is {given['dataset_path']!r}, and only local files are read: use one of "
            f"{', '.join(DATASETS)} with dataset_kwargs.data_files, or leave it out and give --data FILE"
        )
    sampler = given.get("fewshot_config", {}).get("sampler", "default")
    if sampler not in ("default", "first_n"):
        raise ConfigError(f"{where['fewshot_config']}: sampler is {sampler!r}; expected default or first_n")
    shots = given.get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    if shots < 0:
        raise ConfigError(f"{where['num_fewshot']} is {shots}; expected 0 or more")
    delimiter = given.get("fewshot_delimiter", "\n\n")
    until, most = _generation(given.get("generation_kwargs", {}), where.get("generation_kwargs", ""), delimiter)
    return LmEvalTask(
        path=path,
        name=given.get("task", path.stem),
        output_type=kind,
        doc_to_text=given["doc_to_text"],
        doc_to_target=given["doc_to_target"],
        doc_to_choice=given.get("doc_to_choice"),
        metrics=_metrics(given.get("metric_list"), kind, where.get("metric_list", "")),
        until=until,
        data_files=_data_files(given.get("dataset_kwargs", {}).get("data_files"), where.get("dataset_kwargs", "")),
        splits={name: given[name] for name in SPLITS if name in given},
        target_delimiter=given.get("target_delimiter", " "),
        fewshot_delimiter=delimiter,
        description=given.get("description", ""),
        num_fewshot=shots,
        first_shots=sampler == "first_n",
        max_new_tokens=most,
    )


def _generation(given: dict[str, Any], place: str, delimiter: str) -> tuple[tuple[str, ...], int]:
    until = given.get("until", [delimiter])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(text, str) and text for text in until):
        raise ConfigError(f"{place}: until is {_kind(until)}: expected texts to stop before")
    if given.get("do_sample") or float(given.get("temperature") or 0.0):
        raise ConfigError(f"{place}: answers are greedy here: set do_sample to false and temperature to 0")
    most = given.get("max_gen_toks", MAX_NEW_TOKENS)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ConfigError(f"{place}: max_gen_toks is {most!r}; expected a whole number above 0")
    return tuple(until), most


def _metrics(given: list[Any] | None, kind: str, place: str) -> tuple[tuple[str, dict[str, bool]], ...]:
    if given is None:
        return tuple((name, {}) for name in DEFAULT_METRICS[kind])
    found = []
    for entry in given:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if name not in METRICS[kind]:
            known = ", ".join(METRICS[kind])
            raise ConfigError(
                f"{place}: metric {name!r} is none of {kind}'s{nearest(str(name), METRICS[kind])}; expected {known}"
            )
        if (how := entry.get("aggregation", "mean")) != (usual := AGGREGATIONS.get(name, "mean")):
            raise ConfigError(f"{place}: aggregation of {name} is {how!r}; only {usual!r} is computed")
        options = {key: bool(entry[key]) for key in ("ignore_case", "ignore_punctuation") if key in entry}
        if options and name != "exact_match":
            raise ConfigError(f"{place}: {', '.join(options)} is for exact_match, not for {name}")
        found.append((name, options))
    if not found:
        raise ConfigError(f"{place} holds no metric; expected some of {', '.join(METRICS[kind])}")
    return tuple(found)


def _data_files(given: Any, place: str) -> dict[str, list[str]]:
    """Files by split, as `datasets` takes them: a path, a list of paths, or such by split."""
    if given is None:
        return {}
    splits = given if isinstance(given, dict) else {"train": given}
    found = {str(name): [files] if isinstance(files, str) else files for name, files in splits.items()}
    for files in found.values():
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise ConfigError(f"{place}: data_files is {_kind(files)}: expected paths, or paths by split")
        if remote := next((file for file in files if "://" in file), None):
            raise ConfigError(f"{place}: {remote} is remote, and only local files are read: fetch it first")
    return found


def _kind(value: Any) -> str:
    names = {
        str: "a text",
        list: "a list",
        dict: "a mapping",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)
