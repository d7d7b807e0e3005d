"""Bad weights at the command line: one line that names file and fault, status 2, and nothing on disk is changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import saved
from torch import Tensor

from afina.cli.main import run
from afina.loaders.weights.safetensors import INDEX, SINGLE, save_tensors

NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path.parent / "cache"))
    return Path(shutil.copytree(sound, tmp_path / "model"))


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Damage that rewrites the header of the file and leaves its data."""

    def damage(model: Path) -> None:
        raw = (model / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + length])
        change(content)
        changed = json.dumps(content).encode()
        (model / SINGLE).write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])

    return damage


def shift(name: str, by: int) -> Callable[[Path], None]:
    return header(lambda content: content[name].update(data_offsets=[n + by for n in content[name]["data_offsets"]]))


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        content = load_file(model / SINGLE)
        change(content)
        save_file(content, model / SINGLE)

    return damage


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Split the file into shards and damage their index."""

    def damage(model: Path) -> None:
        save_tensors(list(load_file(model / SINGLE).items()), model, max_shard_bytes=50_000)
        content = json.loads((model / INDEX).read_text())
        change(content["weight_map"])
        (model / INDEX).write_text(json.dumps(content))

    return damage


def in_two_shards(model: Path) -> None:
    index(lambda weight_map: None)(model)
    shard = sorted(model.glob("model-*.safetensors"))[-1]
    save_file(load_file(shard) | {EMBED: load_file(shard.with_name("model-00001" + shard.name[11:]))[EMBED]}, shard)


def linked(model: Path) -> None:
    (model / SINGLE).rename(model.parent / "elsewhere.safetensors")
    (model / SINGLE).symlink_to("../elsewhere.safetensors")


def pickled(model: Path) -> None:
    torch.save(load_file(model / SINGLE), model / "pytorch_model.bin")
    (model / SINGLE).unlink()


def written(content: bytes) -> Callable[[Path], Any]:
    return lambda model: (model / SINGLE).write_bytes(content)


MANY = b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_001)) + b"}"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated": (lambda model: os.truncate(model / SINGLE, 20_000), [SINGLE, "is truncated"]),
    "trailing": (lambda model: (model / SINGLE).open("ab").write(b"\0"), [SINGLE, "has trailing bytes"]),
    "overlap": (shift(NORM, -4), [SINGLE, repr(NORM), "overlaps"]),
    "hole": (shift(NORM, 4), [SINGLE, "leaves a hole"]),
    "overflow": (shift(NORM, 2**63), [SINGLE, repr(NORM), "does not fill its data_offsets"]),
    "bad JSON": (written(b'\x04\0\0\0\0\0\0\0{"a"'), [SINGLE, "header: line 1: not valid JSON"]),
    "huge header": (written(b"\1\0\0\1\0\0\0\0{}"), [SINGLE, "16,777,216"]),
    "many tensors": (written(len(MANY).to_bytes(8, "little") + MANY), [SINGLE, "more than 100,000 tensors"]),
    "unknown dtype": (header(lambda content: content[NORM].update(dtype="Q4")), [SINGLE, repr(NORM), "dtype 'Q4'"]),
    "pointer": (written(b"version https://git-lfs.github.com/spec/v1\n"), [SINGLE, "git lfs pull"]),
    "missing": (tensors(lambda content: content.pop(NORM)), [f"{NORM} missing"]),
    "unexpected": (tensors(lambda content: content.update(extra=torch.ones(1))), ["extra unexpected"]),
    "shape": (tensors(lambda content: content.update({NORM: torch.ones(31)})), [f"{NORM} has shape (31,)", "(32,)"]),
    "quantised": (
        tensors(lambda content: content.update({NORM: torch.ones(32, dtype=torch.int8)})),
        [SINGLE, repr(NORM), "torch.int8"],
    ),
    "path": (index(lambda places: places.update({NORM: "../x.safetensors"})), [INDEX, "'../x.safetensors'"]),
    "missing shard": (index(lambda places: places.update(extra="x.safetensors")), [INDEX, "x.safetensors: no such"]),
    "absent from its shard": (index(lambda places: places.update(extra=places[NORM])), [INDEX, "'extra'"]),
    "in two shards": (in_two_shards, [repr(EMBED), "places in 'model-00001"]),
    "link": (linked, [SINGLE, "link out of its folder"]),
    "pickle": (pickled, ["pytorch_model.bin", "never opened", "convert"]),
    "nothing": (lambda model: (model / SINGLE).unlink(), [f"no {SINGLE}", "found"]),
    "no config": (lambda model: (model / "config.json").unlink(), ["no config.json", SINGLE]),
}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a request that must fail with status 2 and one line; returns it."""

    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    assert run(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("afina: error: ")
    assert "Traceback" not in err
    assert state() == before
    return line


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_weights(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = DAMAGE[case]
    damage(model)
    line = refused(tmp_path, capsys, "generate", str(model), "--prompt", "one two")
    assert all(words in line for words in expected), line
    assert str(model) in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights(value: float, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors(lambda content: content[NORM].__setitem__(3, value))(model)
    line = refused(tmp_path, capsys, "generate", str(model), "--prompt", "one two")
    assert all(words in line for words in (SINGLE, repr(NORM), "NaN or Inf", "element 3", "--allow-nonfinite")), line


def test_training_starts_no_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"one {i}", "completion": f" two {i}"}) + "\n" for i in range(20)))
    os.truncate(model / SINGLE, 20_000)
    output = tmp_path / "run"
    line = refused(tmp_path, capsys, "train", "--model", str(model), "--data", str(rows), "--output_dir", str(output))
    assert "is truncated" in line
    assert not output.exists()


def test_models_that_are_not_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(tmp_path, capsys, "generate", str(model) + "l", "--prompt", "one")
    assert "did you mean 'model'?" in line
    line = refused(tmp_path, capsys, "generate", str(model / "config.json"), "--prompt", "one")
    assert "is a file" in line
