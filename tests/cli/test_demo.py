"""The demo tells the story of a real run: its numbers are the run's, and it spoils no folder that is not its own."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny_model import CONFIG, tiny_tokenizer

import afina
from afina.cli import demo_story as demo
from afina.cli import main as cli
from afina.engine.train_config import TrainConfig
from afina.engine.weights import new_model, save_model
from afina.errors import ConfigError, RunError

SUPPORT = Path(afina.__file__).parent / "data" / "support"


def row(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for afina/data: a tiny random model, and rows whose first word decides the answer."""
    root = tmp_path_factory.mktemp("package")
    tokenizer = tiny_tokenizer()
    save_model(new_model(CONFIG, vocab_size=tokenizer.vocab_size, seed=3), tokenizer, root / "model")
    (root / "support").mkdir()
    answers = {"one": "the fox jumps", "dog": "open the door"}
    for split, numbers in (("train", range(10, 34)), ("dev", range(40, 43))):
        rows = [row(f"{word} {number}", answer) for number in numbers for word, answer in answers.items()]
        (root / "support" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    recipe = {"model": str(root / "model"), "batch_size": 8, "learning_rate": 1e-2, "epochs": 10, "eval_steps": 15}
    (root / "support" / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"max_length": 64, "threads": 1}))
    return root


@pytest.fixture(autouse=True)
def _use_the_package(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "PACKAGED", package)
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))


def test_seven_steps_with_the_numbers_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "demo"
    result = demo.run_demo(output_dir=out)
    text = capsys.readouterr().out
    assert re.findall(r"\[(\d)/7\]", text) == list("1234567")
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines() if not line.strip().startswith("afina ")) <= 110

    assert result["exact_match_before"] == 0.0
    assert result["exact_match"] == 1.0
    assert result["dev_rows"] == 6
    assert len(result["examples"]) == 3
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [line["dev_loss"] for line in logged if "dev_loss" in line]
    assert result["dev_loss_before"] == measured[0]
    assert result["dev_loss"] == min(measured[1:])
    for loss in measured:
        assert f"{loss:.3f}" in text  # the learning curve shows every evaluation
    assert f"loss {next(line['loss'] for line in logged if line['step'] == 1):.3f}" in text
    assert re.search(r"exact match +0\.0% +100\.0% +\(6 of 6", text)
    assert "learn     | the fox jumps<|end|>" in text
    assert "read      | <|user|>one 10<|end|><|assistant|>" in text

    # The model that the story ends with is the one on disk, and answers as shown.
    model, tokenizer = afina.load_model(out), afina.load_tokenizer(out)
    first = result["examples"][0]
    assert afina.generate(model, tokenizer, [{"role": "user", "content": first["question"]}]) == first["after"]
    assert first["after"] == first["reference"]


def test_json_is_the_last_line_and_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--output_dir", str(tmp_path / "demo"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    wanted = {"output_dir", "best", "steps", "train_loss", "dev_loss_before", "dev_loss", "trained_tokens"}
    assert wanted | {"tokens_per_second", "peak_memory_gb", "exact_match", "seconds"} <= set(result)


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path: Path, package: Path) -> None:
    out = tmp_path / "demo"
    first = demo.run_demo(output_dir=out, json=True)
    again = demo.run_demo(output_dir=out, json=True)
    assert again["dev_loss"] == pytest.approx(first["dev_loss"])

    record = json.loads((out / "run.json").read_text())
    for key, value in (("model", "somewhere/else"), ("data", "mine/rows.jsonl")):
        changed = record | {"config": record["config"] | {key: value}}
        (out / "run.json").write_text(json.dumps(changed))
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        with pytest.raises(RunError, match=f"{re.escape(str(out))} holds another run .*{value}.*another --output_dir"):
            demo.run_demo(output_dir=out, json=True)
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty and not a run folder"):
        demo.run_demo(output_dir=tmp_path, json=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_unknown_demo_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no demo 'suport' \\(did you mean 'support'"):
        demo.run_demo("suport", output_dir=tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "?Oh,? said he"), ("utf-8", "“Oh,” said he")])
def test_any_terminal_can_show_what_a_model_writes(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    example = {"question": "Who?", "before": "“Oh,” said he", "after": "No.", "reference": "Yes."}
    demo.Page().compare(example)
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert shown in text
    assert "not the expected answer" in text
    assert "expected  | Yes." in text


@pytest.mark.parametrize(
    ("name", "value", "styled"), [("TERM", "xterm", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)]
)
def test_styles_only_on_a_terminal_that_wants_them(
    name: str, value: str, styled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    demo.Page().title("Hello")
    assert ("\x1b" in capsys.readouterr().out) is styled


def test_the_packaged_recipe_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.resolve(SUPPORT / "recipe.yaml")
    assert config.model == "afina-tiny"
    for path in (config.data, config.val_file):
        assert Path(str(path)).parent.as_posix() == "afina/data/support"
        assert (SUPPORT / Path(str(path)).name).is_file()
    if not (SUPPORT.parent / "afina-tiny" / "config.json").is_file():
        pytest.skip("afina-tiny is not in this checkout")
    tokenizer = afina.load_tokenizer("afina-tiny")
    for line in (SUPPORT / "dev.jsonl").read_text().splitlines():
        answer = json.loads(line)["messages"][-1]["content"]
        assert len(tokenizer.encode(answer, add_special=False)) < demo.DEMOS["support"].new_tokens
