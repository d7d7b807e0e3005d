"""`afina serve` where it cannot serve: one line, exit status 2; and what its settings are."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny_model import saved

from afina.cli.main import run
from afina.cli.options import Parser
from afina.cli.serve import add_options, load
from afina.engine.lora import new_adapter, save_adapter
from afina.engine.weights import load_model
from afina.errors import ConfigError
from afina.loaders.weights.peft import AdapterConfig
from afina.serve.config import ServeConfig


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFINA_API_KEY", raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("models")
    saved(folder / "model")
    saved(folder / "other", num_hidden_layers=1)
    model = load_model(folder / "model")
    new_adapter(model, AdapterConfig(base="model", r=2, alpha=4), targets=["all-linear"], seed=1)
    save_adapter(model, None, folder / "adapter")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    port = [] if any(word.startswith("--port") for word in argv) else ["--port", "0"]
    assert run(["serve", *argv, *port]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("afina: error: ")
    assert "Traceback" not in err
    return line.removeprefix("afina: error: ")


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(capsys, "afina-tiny", "--port", str(port))
    assert line == f"--port {port}: is in use on 127.0.0.1: choose another, or 0 for a free one"


def test_addresses_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be listened on" in refused(capsys, "afina-tiny", "--host", "192.0.2.1", "--api_key", "k")
    assert "no address of this machine" in refused(capsys, "afina-tiny", "--host", "no such host", "--api_key", "k")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_another_address_needs_a_key(capsys: pytest.CaptureFixture[str], host: str) -> None:
    line = refused(capsys, "afina-tiny", "--host", host)
    assert line.startswith(f"host {host} can be reached from other machines: give --api_key or set AFINA_API_KEY")


def test_models_and_adapters_that_do_not_fit(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    adapter = place / "adapter"
    assert "no such model" in refused(capsys, str(place / "nothing"))
    for argv, told in (
        ((str(place / "other"), "--adapter", f"a={adapter}"), "was trained on another base"),
        ((str(place / "model"), "--adapter", f"a={adapter}", "--adapter", f"a={adapter}"), "'a' is taken"),
        ((str(place / "model"), "--adapter", f"model={adapter}"), "MODEL is served as 'model'"),
        ((str(place / "model"), "--adapter", f"a={place / 'other'}"), "is a whole model, no adapter"),
        ((str(place / "model"), "--adapter", f"a={place / 'nothing'}"), "no such model"),
    ):
        assert told in refused(capsys, *argv), argv


def test_an_adapter_in_a_folder_called_base(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be served as what it was trained on, without a word."""
    monkeypatch.chdir(place)  # where the adapter's own base is found
    (place / "base").symlink_to("adapter")
    assert "'base' is the name of what it was trained on" in refused(capsys, "base")


def test_names_of_folders_that_are_given_as_dots(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter without a name would be taken for MODEL's own, and answer under the base's name."""
    parser = Parser()
    add_options(parser)

    def names(*argv: str) -> list[str]:
        return list(load(parser.parse_args(argv), ServeConfig()).adapters)

    monkeypatch.chdir(place / "adapter")
    assert names("../model", "--adapter", ".") == ["model", "adapter"]
    assert names("../model", "--adapter", "=.") == ["model", "adapter"]
    monkeypatch.chdir(place / "model")
    assert names(".") == ["model"]


def test_the_extra_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert refused(capsys, "afina-tiny") == "afina serve needs uvicorn: pip install 'afina[serve]'"


WRONG: list[tuple[str, str, str]] = [
    ("port", "65536", "from 0 to 65535"), ("port", "-1", "from 0 to 65535"), ("port", "http", "a whole number"),
    ("max_rows", "0", "above 0"), ("max_queue", "-1", "0 or more"), ("cache_gb", "0", "above 0"),
    ("grace", "2", "3 or more"), ("request_timeout", "0", "above 0"), ("api_key", "a b", "no header can carry"),
    ("cors_origin", "*", "a page's origin"), ("cors_origin", "https://example.com/", "a page's origin"),
    ("log_requests", "perhaps", "true or false"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_settings(capsys: pytest.CaptureFixture[str], number: int) -> None:
    name, value, told = WRONG[number]
    line = refused(capsys, "afina-tiny", f"--{name}={value}")
    assert name in line
    assert told in line


def test_the_key_also_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_API_KEY", "secret")
    assert ServeConfig(host="0.0.0.0").api_key == "secret"
    assert ServeConfig(api_key="other").api_key == "other"


def test_which_addresses_are_this_machine_s_alone() -> None:
    settings: dict[str, Any] = {"api_key": "k"}
    for host, alone in (("localhost", True), ("127.0.0.5", True), ("::1", True), ("0.0.0.0", False), ("local", False)):
        assert ServeConfig(host=host, **settings).loopback is alone
    with pytest.raises(ConfigError):
        ServeConfig(host="localhost.evil.com")
