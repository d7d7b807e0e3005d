"""``afina plan`` at the command line: the table, what to take, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afina.cli.main import run
from afina.engine.train_config import TrainConfig

HF = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "vocab_size": 3000,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a config.json, and no weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(HF))
    return str(tmp_path / "model")


def test_what_fits_and_what_to_take(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", model, "--memory", "1GB", "--batch-size", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    found = json.loads(last)
    assert err == ""
    assert lines[0].startswith(f"{model}: 290,624 parameters, 290,624 train (full), 2 x 1024 tokens, 1.0 GB")
    assert lines[1].split()[:4] == ["work", "activations", "optim", "in"]
    assert found["ok"]
    assert found["take"]["activation_policy"] == "keep"
    # What is to be pasted is a recipe.
    start = lines.index("take:")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("\n".join(line.strip() for line in lines[start + 1 :]))
    config = TrainConfig.resolve(recipe, {"model": model, "data": "d", "output_dir": "o"})
    assert {name: getattr(config, name) for name in found["take"]} == found["take"]
    # The same as a recipe, by the file itself, and with a flag over it.
    assert run(["plan", str(recipe), "--model", f"{model}/config.json", "--memory", "1GB", "--method=lora"]) == 0
    assert "train (lora), 2 x 1024" in capsys.readouterr().out


def test_what_does_not_fit_says_what_would(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model, "--memory", "640MB", "--batch_size", "64", "--max_length", "4096", "--json"]
    assert run(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["take"] is None
    assert not found["ok"]
    assert err.startswith("afina: error: ")
    assert len(err.splitlines()) == 1
    assert found["would_fit"]
    assert all(text in err for text in found["would_fit"])
    rows = next(text for text in found["would_fit"] if text.startswith("batch_size ")).split()[1]
    assert run(["plan", *arguments, "--batch_size", rows]) == 2  # two different values
    assert "two different values" in capsys.readouterr().err
    smaller = [rows if text == "64" else text for text in arguments]
    assert run(["plan", *smaller]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "lots"], "--memory is 'lots'; expected the device's memory, such as 24GB"),
        (["--method", "lroa"], "did you mean 'lora'"),
        (["--activation_policy", "selectiv"], "did you mean 'selective'"),
        (["--dtype", "bfloat61"], "did you mean 'bfloat16'"),
        (["--optim", "adamw_8bits"], "did you mean 'adamw_8bit'"),
        (["--model", "Qwen2.5-8B"], "is not on this machine (did you mean 'qwen2.5-"),
        (["--memry", "24GB"], "did you mean '--memory'"),
    ],
)
def test_wrong_requests(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--model": "qwen2.5-0.5b", "--memory": "24GB", arguments[0]: arguments[1]}
    assert run(["plan", *(text for pair in given.items() for text in pair)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


def test_without_a_gpu_the_memory_must_be_said(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(["plan", "--model", model]) == 2
    assert "give it, as in --memory 24GB" in capsys.readouterr().err
