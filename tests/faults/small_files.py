"""Files of at most two megabytes that ask for much work: 5 s and 1 GB, whatever becomes of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from afina.errors import ConfigError, WeightsError, nearest
from afina.loaders.data.dataset import prepare
from afina.loaders.jsonfile import read_json
from afina.loaders.text.render import Example, render_example
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import train_bpe

MB = 1_000_000
GOOD = json.dumps({"prompt": "What is two and two?", "completion": "It is four."}) + "\n"


def _row(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _talk(content: str, turns: int = 2) -> str:
    roles = ("user", "assistant")
    return _row(messages=[{"role": roles[i % 2], "content": content} for i in range(turns)])


def _thoughts(turns: int) -> str:
    """A conversation whose turns are found one by one: no row with the same roles knows them."""
    roles, more = ("user", "assistant"), {"reasoning_content": "Well."}
    return _row(
        messages=[{"role": roles[i % 2], "content": f"{i}", **(more if i % 6 == 5 else {})} for i in range(turns)]
    )


def _eos() -> str:
    return _tiny().eos_token or ""


@cache
def _tiny() -> Tokenizer:
    return load_tokenizer("afina-tiny")


def texts() -> dict[str, tuple[str, str]]:
    """Files of rows: name -> (suffix, content)."""
    eos, marks = _eos(), "e" + "\u0301\u0316" * (MB // 4)
    many = "".join(f'"k{i}": 1, ' for i in range(MB // 12))
    return {
        "one key": (".jsonl", "{" + '"a": 1, ' * (MB // 8) + '"a": 1}\n' + GOOD),
        "one key, escaped": (".jsonl", "{" + '"\\u0061": 1, ' * (MB // 13) + '"a": 1}\n' + GOOD),
        "many keys": (".jsonl", "{" + many + '"z": 1}\n' + GOOD),
        "one key in an array": (".json", "[{" + '"a": 1, ' * (MB // 8) + '"a": 1}]'),
        "brackets": (".jsonl", "[" * MB + "\n" + GOOD),
        "open objects": (".json", '[{"a":' * (MB // 6)),
        "an array of nothing": (".json", "[" + "1," * (MB // 2) + "1]"),
        "many empty lines": (".jsonl", "\n" * MB + GOOD),
        "digits": (".jsonl", '{"prompt": ' + "9" * MB + ', "completion": "a"}\n' + GOOD),
        "escapes": (".jsonl", '{"prompt": "' + "\\ud800" * (MB // 6) + '", "completion": "a"}\n' + GOOD),
        "end tokens in a text": (".jsonl", _row(text=eos * (MB // len(eos)))),
        "end tokens in a prompt": (".jsonl", _row(prompt=eos * (MB // len(eos)), completion="a")),
        "end tokens in messages": (".jsonl", _talk(eos * (MB // 2 // len(eos)))),
        "end tokens in plain text": (".txt", eos * (MB // len(eos))),
        "half end tokens": (".jsonl", _talk(eos[:-1] * (MB // 2 // len(eos)))),
        "5,000 turns": (".jsonl", _talk("Hello there.", 5000)),
        "6,000 turns": (".jsonl", _talk("Hi.", 6000)),
        "5,000 turns with thoughts": (".jsonl", _thoughts(5000)),
        "40,000 empty turns": (".jsonl", _talk("", 25_000)),
        "marks": (".jsonl", _row(text=marks)),
        "marks in plain text": (".txt", marks),
        "marks in messages": (".jsonl", _talk(marks)),
        "spaces": (".txt", " " * MB + "\n"),
        "spaces and lines": (".txt", (" \t" * 500 + "x\n") * (MB // 1000)),
        "returns": (".txt", "\r" * MB),
        "one long word": (".jsonl", _row(text="a" * MB)),
        "one long number": (".jsonl", _row(text="1" * MB)),
        "ideographs": (".jsonl", _row(text="\u4e2d" * (MB // 3))),
        "an open quote": (".csv", 'prompt,completion\n"' + "a,\n" * (MB // 3)),
        "many columns": (".csv", ",".join(f"c{i}" for i in range(MB // 8)) + "\n" + "," * (MB // 8)),
        "one column many times": (".csv", "a," * (MB // 2) + "\n"),
        "quotes": (".csv", 'prompt,completion\n"' + '""' * (MB // 2) + '",a\n'),
        "tabs": (".tsv", "\t" * MB + "\n"),
        "a deep value": (".jsonl", _row(prompt="a", completion="b")[:-2] + ', "c": ' + "[" * 900 + "]" * 900 + "}\n"),
    }


def parquets(folder: Path) -> Iterator[Path]:
    """Parquet files of a few kilobytes that stand for gigabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name: str, columns: dict[str, Any], **options: Any) -> Path:
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table(columns), path, compression="zstd", **options)
        return path

    big = pa.array(["a" * 4 * MB])
    yield write("text", {"text": pa.DictionaryArray.from_arrays(pa.array([0] * 1000, "int32"), big)})
    inner = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, "int32"), big)
    yield write("list of texts", {"text": pa.ListArray.from_arrays(pa.array([0, 1000]), inner)})
    numbers = pa.array([0], "int8").take(pa.array([0] * (40 * MB), "int32"))
    yield write("numbers", {"text": ["a"], "n": pa.ListArray.from_arrays(pa.array([0, len(numbers)]), numbers)})
    yield write("nulls", {"text": pa.nulls(40 * MB, "string")}, row_group_size=40 * MB)
    yield write("one text", {"text": ["a" * 100 * MB]}, use_dictionary=False)


def tokenizer_bombs() -> dict[str, dict[str, Any]]:
    """Changes of a tokenizer.json: name -> keys."""
    padding = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x", "pad_to_multiple_of": None}
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    around = {"SpecialToken": {"id": "z", "type_id": 0}}
    parts = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]

    def post(ids: list[int], times: int) -> dict[str, Any]:
        special = {"z": {"id": "z", "ids": ids, "tokens": ["z"] * len(ids)}}
        return {"post_processor": {"type": "TemplateProcessing", "single": [around] * times + parts[:1], "pair": parts,
                                   "special_tokens": special}}  # fmt: skip

    def split(pattern: str) -> dict[str, Any]:
        part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return {"pre_tokenizer": part}

    return {
        "regex: a repetition of a repetition": split("(a+)+$"),
        "regex: alternatives": split("(a|a)*c"),
        "regex: twenty options": split("([ab]?){20}c"),
        "regex: the third power": split("a*a*a*b[^c]"),
        "regex: a reference": split(r"(.*)\1x"),
        "regex of a normalizer": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|ab)*c"}, "content": "x"}},
        "padding": {"padding": padding | {"strategy": {"Fixed": 10**9}}},
        "padding to multiples": {"padding": padding | {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9}},
        "normalizer": {"normalizer": {"type": "Sequence", "normalizers": [replace] * 4}},
        "normalizer that matches nothing": {"normalizer": replace | {"pattern": {"Regex": ""}}},
        "decoder": {"decoder": {"type": "Sequence", "decoders": [replace] * 4}},
        "ids around a text": post([0] * MB, 1),
        "many around a text": post([0], 10_000),
        "ids above the vocabulary": post([999_999], 1),
        "RoBERTa's ids": {"post_processor": {"type": "RobertaProcessing", "sep": ["a", 5000], "cls": ["b", 6000],
                                             "trim_offsets": True, "add_prefix_space": True}},
    }  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], object], bool | None]]:
    """(name, what to run, whether it must be refused)."""

    def trained(write: Callable[[Path], Path]) -> Callable[[], object]:
        def run() -> object:
            with TemporaryDirectory() as name:
                folder = Path(name)
                return prepare(write(folder), _tiny(), max_length=512, seed=0, cache_dir=folder / "cache")

        return run

    _tiny()
    for name, (suffix, content) in texts().items():

        def write(folder: Path, suffix: str = suffix, content: str = content) -> Path:
            path = folder / f"rows{suffix}"
            path.write_text(content, encoding="utf-8")
            return path

        yield name, trained(write), None
    packed = gzip.compress(b"\n" * 64 * MB, 1)
    yield "a gzip of lines", trained(lambda folder: _gzip(folder, packed)), True
    for number, name in enumerate(("text", "list of texts", "numbers", "nulls", "one text")):
        yield f"Parquet: {name}", _parquet(number), None

    base = json.loads(train_bpe(["a b a b"] * 4, 262, ["</s>"], "</s>").files()["tokenizer.json"])
    for name, changes in tokenizer_bombs().items():

        def load(changes: dict[str, Any] = changes) -> None:
            files = {"tokenizer.json": json.dumps(base | changes).encode(), "tokenizer_config.json": b"{}"}
            tokenizer = Tokenizer(files, "folder")
            tokenizer.decode(tokenizer.encode("a b a"))

        yield f"tokenizer: {name}", load, "padding" not in changes or None
    for name, ids in {"below 0": [-1], "large": [2**70], "none": [None], "text": ["a"]}.items():
        yield f"decode: {name}", lambda ids=ids: _tiny().decode(ids), True
    yield "decode: above the vocabulary", lambda: _tiny().decode([10**6]), False
    yield "config: one key", _config("{" + '"a": 1,\n' * (MB // 8) + '"a": 1}'), True
    yield "config: numbers", _config('{"a": [' + "NaN,\n" * (MB // 5) + "1]}"), True
    yield "90,000 wrong names", _wrong_names, True
    for count, refused in ((5000, False), (6000, True)):
        turns = tuple({"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(count))
        row = Example(messages=turns, where="row 1")
        yield f"render {count:,} turns", partial(render_example, _tiny(), row), refused


def _parquet(number: int) -> Callable[[], object]:
    def run() -> object:
        with TemporaryDirectory() as name:
            path = Path(name, "rows.parquet")
            path.write_bytes(_made_parquets()[number])
            return prepare(path, _tiny(), max_length=512, seed=0, cache_dir=Path(name, "cache"))

    _made_parquets()
    return run


@cache
def _made_parquets() -> list[bytes]:
    with TemporaryDirectory() as name:
        return [path.read_bytes() for path in parquets(Path(name))]


def _gzip(folder: Path, packed: bytes) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(packed)
    return path


def _config(text: str) -> Callable[[], object]:
    def run() -> object:
        with TemporaryDirectory() as name:
            path = Path(name, "config.json")
            path.write_text(text)
            return read_json(path, error=ConfigError)

    return run


def _wrong_names() -> None:
    names = [f"model.layers.{i // 9}.mlp.wrong_{i % 9}.weight" for i in range(90_000)]
    wanted = [f"model.layers.{i // 9}.mlp.right_{i % 9}.weight" for i in range(90_000)]
    raise WeightsError("; ".join(f"{name}{nearest(name, wanted)}" for name in names[:10]))
