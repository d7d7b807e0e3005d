"""Names and texts from strangers' files reach the terminal as escapes, cut, whoever prints them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_model import saved

from afina.cli.main import run
from afina.engine import generate
from afina.loaders.weights.safetensors import read_safetensors, write_safetensors

pytestmark = pytest.mark.usefixtures("own_cache")
ORDER = "\x1b]0;owned\x07\u202e\x9b2J"  # renames the window, turns letters round, clears the screen
SHOWN = r"\x1b]0;owned\x07\u202e\x9b2J"
ROW = '{"prompt": "one", "completion": " two"}\n'


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


class Printed(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Printed]


@pytest.fixture
def afina(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a verb whose standard output is a terminal, or a file, and whose messages go to another."""

    def command(*arguments: object, terminal: bool = True) -> Printed:
        out, err = tmp_path / "out.txt", tmp_path / "err.txt"
        kind = Terminal if terminal else io.TextIOWrapper
        with kind(out.open("wb"), encoding="utf-8") as stdout, Terminal(err.open("wb"), encoding="utf-8") as stderr:
            monkeypatch.setenv("NO_COLOR", "1")
            monkeypatch.setattr(sys, "stdout", stdout)
            monkeypatch.setattr(sys, "stderr", stderr)
            status = run([str(argument) for argument in arguments])
        monkeypatch.undo()
        return Printed(status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    return command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "base")


def copied(base: Path, folder: Path, **config: Any) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        if file.name != "manifest.json":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | config))
    return folder


def refused(printed: Printed) -> str:
    """The one line of an error, which nothing obeys."""
    assert printed.status == 2, printed
    (line,) = printed.err.splitlines()
    assert line.startswith("afina: error: ")
    assert line.isprintable()
    assert len(line) < 5000
    return line


def test_errors_show_names_and_do_not_obey_them(base: Path, tmp_path: Path, afina: Command) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({ORDER: 1, "b": 2}) + "\n")
    train = ("train", "--model", base, "--output_dir", tmp_path / "run", "--data", rows)
    assert "owned" in refused(afina(*train))
    rows.write_text(ROW * 20)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({ORDER: 1}))
    assert "owned" in refused(afina("train", recipe, *train[1:]))
    assert "owned" in refused(afina(*train[:-1], tmp_path / f"{ORDER}.jsonl"))
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / f"a{ORDER}").write_text("")
    assert "owned" in refused(afina("generate", listed, "--prompt", "x"))
    assert "owned" in refused(afina("generate", copied(base, tmp_path / "key", **{ORDER: 1}), "--prompt", "x"))
    odd = copied(base, tmp_path / "type", model_type=ORDER + "x" * 1_000_000)
    assert "owned" in refused(afina("generate", odd, "--prompt", "x"))
    tensors = read_safetensors(base / "model.safetensors")
    more = copied(base, tmp_path / "tensors")
    write_safetensors(more / "model.safetensors", tensors | {ORDER: tensors["model.norm.weight"]}, {})
    assert "owned" in refused(afina("generate", more, "--prompt", "x"))
    template = copied(base, tmp_path / "template")
    (template / "chat_template.jinja").write_text("{{ raise_exception('" + ORDER + "') }}")
    assert "owned" in refused(afina("generate", template, "--chat", "--prompt", "x"))


def test_what_is_printed_of_data_and_by_a_model(
    base: Path, tmp_path: Path, afina: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / f"rows{ORDER}.jsonl"
    rows.write_text(json.dumps({"prompt": "a" + ORDER, "completion": ORDER, ORDER: ORDER}) + "\n" + ROW * 3)
    checked = afina("check", rows)
    assert SHOWN in checked.out
    assert all(c.isprintable() or c in "\n\t" for c in checked.out + checked.err)

    def says(*arguments: Any, **options: Any) -> Iterator[generate.Completion]:
        yield generate.Completion(f"a{ORDER}\x1b[1mb\u200dc\nd", 4)

    monkeypatch.setattr(generate, "complete", says)
    request = ("generate", base, "--prompt", "one")
    assert afina(*request).out == f"a{SHOWN}\\x1b[1mb\u200dc\nd\n"
    monkeypatch.setattr(generate, "complete", says)
    assert afina(*request, terminal=False).out == f"a{ORDER}\x1b[1mb\u200dc\nd\n"  # a program reads it
