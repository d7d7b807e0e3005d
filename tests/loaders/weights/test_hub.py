"""Where a model comes from; the hub is played by a local fake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from afina.errors import WeightsError
from afina.loaders.weights.hub import ALLOWED, IGNORED, resolve


def refused(source: str | Path, *expected: str) -> str:
    with pytest.raises(WeightsError) as caught:
        resolve(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((str(source), repr(source)))
    for text in expected:
        assert text in message
    return message


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the fake hub was asked for; nothing in this file may reach the network."""
    asked: list[Any] = []
    snapshot = folder_with(tmp_path / "snapshot", "config.json")

    def fake(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"]))
        assert options["allow_patterns"] == list(ALLOWED)
        assert options["ignore_patterns"] == list(IGNORED)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(folder_with(tmp_path / "cwd", "placeholder").resolve())
    return asked


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    model = folder_with(tmp_path / "model", "config.json")
    assert resolve(model) == resolve(str(model)) == model
    owned = folder_with(tmp_path / "cwd" / "owner" / "name", "config.json")
    assert resolve("owner/name") == owned.relative_to(tmp_path / "cwd")  # a folder wins over the hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == model
    assert calls == []


def test_run_folders(tmp_path: Path) -> None:
    run = folder_with(tmp_path / "run", "run.json", "checkpoint-3/model.safetensors")
    refused(run, "a run without a best model yet")
    folder_with(run, "best/config.json")
    assert resolve(run) == run / "best"
    assert resolve(run / "best") == run / "best"
    adapter = folder_with(tmp_path / "lora", "run.json", "best/adapter_config.json")
    assert resolve(adapter) == adapter / "best"


def test_the_built_in_model() -> None:
    folder = resolve("afina-tiny")
    assert folder.parts[-3:] == ("afina", "data", "afina-tiny")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json (found an empty folder): pass the folder of a model")
    many = folder_with(tmp_path / "many", *[f"{i}.txt" for i in range(10)])
    refused(many, "0.txt", "7.txt and 2 more")
    above = folder_with(tmp_path / "above", "v1/config.json", "notes.txt")
    refused(above, "found notes.txt, v1/", f"did you mean '{above}/v1'?")
    config = folder_with(tmp_path / "model", "config.json") / "config.json"
    refused(config, "is a file, and no GGUF file: pass the folder")


def test_paths_that_do_not_exist(tmp_path: Path, calls: list[Any]) -> None:
    folder_with(tmp_path / "cwd" / "smollm-135m", "config.json")
    refused("smolm-135m", "no such model (did you mean 'smollm-135m'?)", "'owner/name'")
    refused("afina-tini", "did you mean 'afina-tiny'?")
    refused("./smolm-135m", "did you mean 'smollm-135m'?")
    refused(str(tmp_path / "cwd" / "smollm"), "did you mean 'smollm-135m'?")
    refused("/no/where/model", "no such model: expected a folder")
    refused("~no-such-user/model", "cannot be read")
    with pytest.raises(WeightsError, match=r"cannot be read \(File name too long\)"):
        resolve("x" * 5000)
    for source in ("a/b/c", "runs/x/best", "../x", "owner/", "owner/name@", "-x/y", "", "a/b\n", "ö/ä", "a\0b"):
        with pytest.raises(WeightsError, match=r"^[^\n]+$"):
            resolve(source)
    with pytest.raises(WeightsError):
        resolve(Path("owner/name"))  # a Path is never a hub name
    assert calls == []


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None)),
        ("Owner.X/na_me-1.5B", ("Owner.X/na_me-1.5B", None)),
        ("owner/name@main", ("owner/name", "main")),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
    ],
)
def test_hub_names(tmp_path: Path, calls: list[Any], source: str, asked: Any) -> None:
    assert resolve(source) == tmp_path / "snapshot"
    assert calls == [asked]


def test_only_weights_configs_tokenizers_templates_and_licences_are_downloaded() -> None:
    wanted = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "special_tokens_map.json", "chat_template.jinja", "model.safetensors", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model.safetensors-00001-of-00002.safetensors", "README.md", "LICENSE.txt",
    ]  # fmt: skip
    unwanted = [
        "pytorch_model.bin", "modeling_x.py", "tokenizer.model", "consolidated.safetensors", "training_args.bin",
        "original/model.safetensors", "onnx/config.json", "x.pt", "x.pth", "x.gguf", "tf_model.h5",
        "flax_model.msgpack", "rust_model.ot", "handler.py", "model.py",
    ]  # fmt: skip
    found = filter_repo_objects(wanted + unwanted, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED))
    assert list(found) == wanted


def failing(monkeypatch: pytest.MonkeyPatch, problem: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 404


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (errors.RepositoryNotFoundError, ["neither a local folder", "nor a model on the hub", "hf auth login"]),
        (errors.GatedRepoError, ["only to accounts that asked", "accept its licence", "hf auth login"]),
        (errors.RevisionNotFoundError, ["no revision 'v9' of this model"]),
        (errors.HfHubHTTPError, ["the download failed (503 Server Error)", "run it again, it continues"]),
    ],
)
def test_answers_of_the_hub(monkeypatch: pytest.MonkeyPatch, kind: type[Any], expected: list[str]) -> None:
    failing(monkeypatch, kind("503 Server\n\n Error", response=Response()))
    refused("owner/name@v9", *expected)


def test_failures_of_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errors.LocalEntryNotFoundError("x\ny"))
    refused("owner/name", "the hub cannot be reached: run `hf download owner/name` on a connected machine and pass")
    for problem in (errors.HTTPError("reset"), ConnectionError("reset"), OSError(28, "reset"), RuntimeError("reset")):
        failing(monkeypatch, problem)
        refused("owner/name", "the download failed", "reset", "run it again")
    failing(monkeypatch, errors.HFValidationError("bad name"))
    refused("owner/na..me", "neither a local folder")
    failing(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        resolve("owner/name")


def test_a_near_local_name_is_offered_when_the_hub_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "cwd" / "models" / "smollm-135m", "config.json")
    failing(monkeypatch, errors.RepositoryNotFoundError("404", response=Response()))  # type: ignore[arg-type]
    refused("models/smolm-135m", "neither a local folder (did you mean 'smollm-135m'?) nor a model on the hub")


def test_a_repository_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "snapshot-of-a-dataset"
    empty.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(empty))
    with pytest.raises(WeightsError, match=r"no config\.json"):
        resolve("owner/name")


def run_offline(tmp_path: Path, source: str) -> subprocess.CompletedProcess[str]:
    """The real huggingface_hub with the network switched off and its cache in tmp_path / "hf"."""
    script = "import sys; from afina.loaders.weights.hub import resolve; print(resolve(sys.argv[1]))"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run(
        [sys.executable, "-c", script, source], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_real_client_offline(tmp_path: Path) -> None:
    missing = run_offline(tmp_path, "owner/name")
    last = missing.stderr.strip().splitlines()[-1]
    assert "WeightsError: owner/name: no local folder, not in the download cache, and the hub cannot be reached" in last

    commit = "0" * 40
    snapshot = tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots" / commit
    folder_with(snapshot, "config.json")
    folder_with(snapshot.parent.parent, "refs/main")
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    cached = run_offline(tmp_path, "owner/name")
    assert cached.stdout.strip() == str(snapshot), cached.stderr
