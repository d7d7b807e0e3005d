"""afina/manifest.py: what changed in a published folder is found before anything is made of it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from disk import flip_bit

import afina
from afina.engine.train import finetune
from afina.errors import WeightsError
from afina.export.export import export
from afina.manifest import MANIFEST, check_manifest, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    write_manifest(folder, {"step": 7})
    return folder


def test_a_folder_as_it_was_and_one_that_knows_nothing(folder: Path, tmp_path: Path) -> None:
    check_manifest(folder)
    (folder / "README.md").write_text("came later")
    check_manifest(folder)
    content = read_manifest(folder)
    assert content is not None
    assert content["step"] == 7
    assert set(content["files"]) == {"config.json", "model.safetensors"}
    (tmp_path / "bare").mkdir()
    check_manifest(tmp_path / "bare")
    assert read_manifest(tmp_path / "bare") is None
    (tmp_path / "bare" / MANIFEST).write_text('{"files": 3, "made by": "somebody else"}')
    check_manifest(tmp_path / "bare")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda f: flip_bit(f / "model.safetensors", 501), "model.safetensors is damaged: its SHA-256"),
    "the end": (lambda f: os.truncate(f / "model.safetensors", 1000), "damaged: 1000 bytes, its manifest says 1024"),
    "gone": (lambda f: (f / "config.json").unlink(), "config.json cannot be read: No such file"),
    "a link": (
        lambda f: (
            (f.parent / "c").write_text("{}"),
            (f / "config.json").unlink(),
            (f / "config.json").symlink_to("../c"),
        ),
        "config.json: is a link out of its folder",
    ),
    "another folder's": (
        lambda f: (f / MANIFEST).write_text('{"format": "afina-manifest-1", "files": {"../secret": {}}}'),
        "it lists '../secret', which is no name of a file beside it",
    ),
    "no JSON": (lambda f: (f / MANIFEST).write_text("{"), "manifest.json is damaged: not JSON"),
    "no files": (
        lambda f: (f / MANIFEST).write_text('{"format": "afina-manifest-1", "files": []}'),
        "it lists no files",
    ),
    "a name": (
        lambda f: (f / MANIFEST).write_text('{"format": "afina-manifest-1", "files": {"\\u0000": {}}}'),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_changed_is_found_also_after_a_good_check(name: str, folder: Path) -> None:
    check_manifest(folder)
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(WeightsError) as refused:
        check_manifest(folder)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_any_flipped_bit_of_a_file_is_found(folder: Path) -> None:
    rng = random.Random(3)
    for _ in range(50):
        file = folder / rng.choice(["config.json", "model.safetensors"])
        place = rng.randrange(file.stat().st_size)
        flip_bit(file, place)
        with pytest.raises(WeightsError, match="SHA-256"):
            check_manifest(folder)
        flip_bit(file, place)


def test_weights_are_hashed_only_where_they_are_read(folder: Path) -> None:
    flip_bit(folder / "model.safetensors", 501)
    check_manifest(folder, weights=False)
    with pytest.raises(WeightsError, match="SHA-256"):
        check_manifest(folder)
    flip_bit(folder / "config.json", 1)
    with pytest.raises(WeightsError, match=r"config\.json is damaged"):
        check_manifest(folder, weights=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps with its best model, and a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}."} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(folder, max_steps=3)
    return folder


def train(folder: Path, **settings: object) -> dict[str, object]:
    given = {
        "model": "afina-tiny",
        "data": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "quiet": True,
    }
    given |= {"eval_steps": 1, "save_steps": 1, "save_total_limit": 3, "batch_size": 4, "warmup_steps": 0}
    return finetune(**given, **settings).metrics


def test_a_damaged_model_is_not_loaded_nor_exported(run: Path, tmp_path: Path) -> None:
    weights = run / "out" / "best" / "model.safetensors"
    manifest = read_manifest(run / "out" / "best")
    assert manifest is not None
    assert manifest["step"] == 3
    export(run / "out", tmp_path / "whole")
    flip_bit(weights, weights.stat().st_size - 100)
    try:
        for attempt in (
            lambda: afina.load_model(run / "out"),
            lambda: afina.load_model(run / "out" / "best"),
            lambda: export(run / "out", tmp_path / "damaged"),
        ):
            with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
                attempt()
    finally:
        flip_bit(weights, weights.stat().st_size - 100)
    afina.load_model(run / "out")
    exported = tmp_path / "whole" / "model.safetensors"
    afina.load_model(tmp_path / "whole")
    flip_bit(exported, exported.stat().st_size - 100)
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        afina.load_model(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_run_whose_best_model_is_lost_makes_another(damage: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    best = tmp_path / "copy" / "out" / "best"
    if damage == "gone":
        shutil.rmtree(best)
    else:
        flip_bit(best / "model.safetensors", 5000)
    metrics = train(tmp_path / "copy", max_steps=3, resume=True)
    assert metrics["best_step"] == 3
    check_manifest(best)
    whole = (run / "out" / "best" / "model.safetensors").read_bytes()
    assert (best / "model.safetensors").read_bytes() == whole


def test_what_a_run_says_of_its_best_model_is_true_of_the_one_that_is_there(run: Path, tmp_path: Path) -> None:
    """Back at step 1 and ended there, the best model is still the one of step 3."""
    shutil.copytree(run, tmp_path / "copy")
    out = tmp_path / "copy" / "out"
    before = read_manifest(out / "best")
    assert before is not None
    for step in (2, 3):
        shutil.rmtree(out / f"checkpoint-{step}")
    metrics = train(tmp_path / "copy", max_steps=1, resume=True)
    assert metrics["best_step"] == before["step"] == 3
    assert metrics["dev_loss"] == before["dev_loss"]
