"""``afina inspect``: training's own ids, mask and loss; base beside model; and wrong requests in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_model import saved, tiny_tokenizer

from afina.cli.inspect import row_numbers
from afina.cli.main import run
from afina.engine.evaluate import evaluate_loss
from afina.engine.weights import load_model
from afina.errors import ConfigError
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.train_bpe import train_bpe

pytestmark = pytest.mark.usefixtures("own_cache")
NASTY = "<script>alert('one')</script>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another of the same tokenizer, a LoRA run, and rows."""
    folder = tmp_path_factory.mktemp("place")
    saved(folder / "model")
    saved(folder / "other", num_hidden_layers=1)
    lines = [{"prompt": f"one two {i}\n", "completion": f" three {i} 🙂"} for i in range(12)]
    lines[4] = {"prompt": "how \u202e do\n", "completion": NASTY}
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [
        "train",
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "rows.jsonl"),
        "--method",
        "lora",
        "--quiet",
    ]
    argv += ["--lr", "0.01", "--lora_r", "4", "--max_steps", "4", "--threads", "1"]
    assert run([*argv, "--output_dir", str(folder / "run")]) == 0
    return folder


def json_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run(["inspect", *argv, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run(["inspect", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("afina: error: ")
    return line.removeprefix("afina: error: ")


def rows_of(place: Path) -> tuple[str, ...]:
    return ("--data", str(place / "rows.jsonl"), "--threads", "1")


def test_the_row_is_training_s_and_its_loss_is_eval_s(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, str(place / "model"), *rows_of(place), "--row", "3")
    tokenizer = load_tokenizer(place / "model")
    ids, loss_mask = prepare(place / "rows.jsonl", tokenizer, max_length=96, val_size=0.0).train.row(2)
    tokens = found["tokens"]
    assert [t["id"] for t in tokens] == ids.tolist()
    assert [t["trained"] for t in tokens] == loss_mask.tolist()
    assert [t["position"] for t in tokens] == list(range(len(ids)))
    assert "".join(t["text"] for t in tokens) == "one two 2\n three 2 🙂<|endoftext|>" == found["documents"][0]["text"]
    assert found["documents"][0]["where"].endswith("rows.jsonl: line 3")
    (place / "one.jsonl").write_text((place / "rows.jsonl").read_text().splitlines()[2])
    one = prepare(place / "one.jsonl", tokenizer, max_length=96, val_size=0.0).train
    assert found["documents"][0]["loss"] == pytest.approx(
        evaluate_loss(load_model(place / "model"), one).loss, abs=1e-4
    )
    assert set(tokens[1]) >= {"text", "id", "trained", "document", "position", "loss", "probability", "rank", "top"}
    assert len(tokens[1]["top"]) == 5
    assert "base" not in tokens[1]


def test_settings_decide_the_row(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows_of(place)
    whole = json_of(capsys, str(place / "model"), *data, "--row", "3", "--train_on_prompt")
    assert [t["trained"] for t in whole["tokens"]] == [False] + [True] * (len(whole["tokens"]) - 1)
    cut = json_of(capsys, str(place / "model"), *data, "--row", "3", "--max_length", "15", "--on_long", "truncate")
    assert len(cut["tokens"]) == 15 < len(whole["tokens"])
    assert [t["id"] for t in cut["tokens"]] == [t["id"] for t in whole["tokens"]][-15:]


def test_an_adapter_beside_its_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows_of(place)
    base = json_of(capsys, str(place / "model"), *data, "--row", "3,7-8")
    found = json_of(capsys, str(place / "run"), *data, "--row", "3,7-8", "--base")
    assert [d["row"] for d in found["documents"]] == [3, 7, 8]
    assert [d["document"] for d in found["documents"]] == [0, 1, 2]
    assert found["documents"][2]["start"] == sum(d["tokens"] for d in found["documents"][:2])
    # Positions begin again with each document.
    assert [t["document"] for t in found["tokens"] if t["position"] == 0] == [0, 1, 2]
    for token, alone in zip(found["tokens"], base["tokens"]):
        assert token["base"]["loss"] == pytest.approx(alone["loss"], abs=1e-5) if alone["loss"] else True
        assert [t["id"] for t in token["base"]["top"]] == [t["id"] for t in alone["top"]]
    assert found["documents"][0]["loss"] < found["documents"][0]["base_loss"]
    named = ("--adapter", str(place / "run"), "--base")
    adapted = json_of(capsys, str(place / "model"), *data, "--row", "3,7-8", *named)
    assert adapted["tokens"] == found["tokens"]
    other = json_of(capsys, str(place / "run"), *data, "--row", "3", "--base", str(place / "other"))
    alone = json_of(capsys, str(place / "other"), *data, "--row", "3")
    assert [t["base"]["loss"] for t in other["tokens"]] == [t["loss"] for t in alone["tokens"]]


def test_what_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(place / "run"), *rows_of(place), "--row", "5", "--base"]) == 0
    out, err = capsys.readouterr()
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", out)  # no colour, no control, where nothing is a terminal
    assert f"how \\u202e do↵\n[[{NASTY}<|endoftext|>]]" in out
    assert "rows.jsonl: line 5" in out.splitlines()[0]
    assert "base loss" in out
    assert "rows of prompt/completion" in err
    assert run(["inspect", str(place / "model"), *rows_of(place), "--row", "1-2", "--packed"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["document", "0", "1", "cu_seqlens"]


def test_the_page(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    argv = [str(place / "run"), *rows_of(place), "--row", "5", "--base", "--html", str(page)]
    assert run(["inspect", *argv]) == 0
    assert capsys.readouterr().out.startswith(f"{page}: row 5 ")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;" in text
    assert "\u202e" not in text
    assert f"--html {page} already exists" in refused(capsys, *argv)
    assert json_of(capsys, *argv, "--overwrite")["html"] == str(page)
    assert f"there is no folder {tmp_path / 'no'}" in refused(capsys, *argv[:-1], str(tmp_path / "no" / "page.html"))


def test_wrong_requests(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(place / "model"), rows_of(place)
    assert "has 12 rows, no row 13: rows are counted from 1" in refused(capsys, model, *data, "--row", "13")
    assert "--row '0': rows are counted from 1" in refused(capsys, model, *data, "--row", "0")
    assert "row 2 has 1 piece(s), no piece 2" in refused(capsys, model, *data, "--row", "2", "--piece", "2")
    assert "is no adapter, so name the model to compare with" in refused(capsys, model, *data, "--row", "2", "--base")
    assert "--adapter once" in refused(capsys, model, *data, "--row", "2", "--adapter", "a", "--adapter", "b")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no usable row" in refused(capsys, model, "--data", str(tmp_path / "empty.jsonl"), "--row", "1")
    assert str(tmp_path / "none") in refused(capsys, model, "--data", str(tmp_path / "none"), "--row", "1")
    assert "--row" in refused(capsys, model, *data)
    assert "none" in refused(capsys, str(tmp_path / "none"), *data, "--row", "1")


def test_a_base_of_another_tokenizer_is_refused_before_models_are_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "strange")
    train_bpe(["an entirely other text, and other words"] * 5, 300, ("<|endoftext|>",)).save(tmp_path / "strange")
    (tmp_path / "strange" / "model.safetensors").unlink()
    line = refused(capsys, str(place / "model"), *rows_of(place), "--row", "1", "--base", str(tmp_path / "strange"))
    assert "its tokenizer is another one (id 1 is '<|user|>'" in line
    assert "tokens cannot be put beside each other" in line


def test_chat_rows_need_a_template_or_an_end_of_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps(rows[0]))
    chat = ("--data", str(tmp_path / "chat.jsonl"), "--row", "1")
    found = json_of(capsys, str(place / "model"), *chat)
    assert found["tokens"][-1]["trained"]
    saved(tmp_path / "mute")
    config = tmp_path / "mute" / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    for name in ("chat_template.jinja", "generation_config.json"):
        (tmp_path / "mute" / name).unlink(missing_ok=True)
    stripped = json.loads((tmp_path / "mute" / "config.json").read_text())
    (tmp_path / "mute" / "config.json").write_text(json.dumps({k: v for k, v in stripped.items() if "eos" not in k}))
    assert "no end-of-text token: set eos_token" in refused(capsys, str(tmp_path / "mute"), *chat)


@pytest.mark.parametrize(
    ("text", "numbers"), [("1", [1]), ("3,7", [3, 7]), ("3-5, 9,4", [3, 4, 5, 9]), (" 2 - 2 ", [2]), ("007", [7])]
)
def test_row_numbers(text: str, numbers: list[int]) -> None:
    assert row_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "x", "1,", "-3", "5-3", "0-2", "1-99999999999", "1.5", "²", "1,200-250,300-360"])
def test_wrong_row_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="--row"):
        row_numbers(text)


def test_special_tokens_are_those_of_the_tiny_tokenizer() -> None:
    """The tests above name them."""
    assert tiny_tokenizer().token(1) == "<|user|>"
