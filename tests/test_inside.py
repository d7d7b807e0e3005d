"""afina/inside.py: files of a folder are in it, and the Hugging Face cache goes on working."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import saved, tiny_tokenizer

import afina
from afina.engine.run_folder import RunFolder
from afina.errors import AfinaError, RunError, TokenizerError, WeightsError
from afina.export.export import export
from afina.inside import open_own, own_path
from afina.loaders.text.source import load_tokenizer
from afina.loaders.weights.hub import resolve

SECRET = "a private file\n"


def test_links_inside_are_followed_and_links_out_are_not(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "real").write_text("inside")
    outside.write_text("outside")
    (folder / "a").symlink_to("parts/real")
    (folder / "b").symlink_to(outside)
    (folder / "c").symlink_to("b")
    (folder / "d").symlink_to(tmp_path / "absent")
    (folder / "e").symlink_to(folder)
    (tmp_path / "modelling").mkdir()
    (tmp_path / "modelling" / "f").write_text("of a folder whose name begins with ours")
    (folder / "f").symlink_to("../modelling/f")
    (tmp_path / "by link").symlink_to(folder)
    for named in (folder, tmp_path / "by link"):
        with open_own(named / "a") as file:
            assert file.read() == b"inside"
        for name in "bcdef":
            with pytest.raises(WeightsError, match=f"/{name}: is a link out of its folder, to .*: put a copy"):
                open_own(named / name, error=WeightsError)
    assert own_path(folder / "absent") == folder / "absent"
    with pytest.raises(FileNotFoundError):
        open_own(folder / "absent")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir() if kind == "folder" else os.mkfifo(tmp_path / "a")
    with pytest.raises(RunError, match="/a: is no regular file"):
        open_own(tmp_path / "a")


def hub_cache(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub lays it out."""
    home = tmp_path / "hub" / "models--some--one"
    snapshot = home / "snapshots" / "0123abcd"
    saved(snapshot)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(home / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert afina.load_model(snapshot).config.vocab_size > 1
    assert load_tokenizer(snapshot).encode("a")
    (tmp_path / "shortcut").symlink_to(snapshot)
    afina.load_model(tmp_path / "shortcut")
    other = tmp_path / "hub" / "models--some--other"
    (other / "blobs").mkdir(parents=True)
    (other / "blobs" / "x").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--some--other/blobs/x")
    with pytest.raises(AfinaError, match=r"config\.json: is a link out of its folder"):
        afina.load_model(snapshot)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_every_file_of_a_model_is_its_own(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model")
    path = folder / name
    outside = tmp_path / "outside"
    path.rename(outside) if path.exists() else outside.write_text(SECRET)
    path.symlink_to(outside)
    with pytest.raises(AfinaError, match=f"{name}: is a link out of its folder, to .*outside"):
        export(folder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    if name.startswith(("tokenizer", "chat")):
        with pytest.raises(TokenizerError):
            load_tokenizer(folder)


def test_unused_files_are_not_copied(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (tmp_path / "secret").write_text(SECRET)
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    (folder / "vocab.json").write_text(SECRET)
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    export(folder, tmp_path / "exported")
    afina.save_model(afina.load_model(folder), afina.load_tokenizer(folder), tmp_path / "saved")
    for made in (tmp_path / "exported", tmp_path / "saved"):
        assert {"merges.txt", "vocab.json", "notes.txt"}.isdisjoint(path.name for path in made.iterdir())


def test_saving_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "out").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    afina.save_model(afina.load_model(saved(tmp_path / "model")), tiny_tokenizer(), tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "years of work"
    afina.load_model(tmp_path / "out")


LINKS: dict[str, Callable[[Path], str]] = {
    "best": lambda run: "best",
    "a checkpoint": lambda run: "checkpoint-2",
    "metrics": lambda run: "metrics.jsonl",
    "record": lambda run: "run.json",
    "half a replacement": lambda run: ".replacing",
}


@pytest.mark.parametrize("which", LINKS)
def test_a_link_in_a_run_folder_is_refused_before_the_run_starts(tmp_path: Path, which: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    with RunFolder(run) as folder:
        folder.begin({"a": 1}, {})
    name = LINKS[which](run)
    shutil.move(run / name, outside) if (run / name).exists() else outside.mkdir()
    (run / name).symlink_to(outside)
    with pytest.raises(RunError, match=f"/{name}.* is a link"):
        RunFolder(run, resume=True)
    assert outside.exists()


def test_a_best_model_elsewhere_is_not_the_runs(tmp_path: Path) -> None:
    saved(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "best").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"/best: is a link out of its folder"):
        resolve(tmp_path / "run")
    (tmp_path / "run" / "best").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "run" / "best.old-0123456789abcdef")
    for named in (tmp_path / "run", tmp_path / "run" / "best"):
        assert resolve(named).name == "best.old-0123456789abcdef"
