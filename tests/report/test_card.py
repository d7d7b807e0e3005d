"""The model card says what the run's files say, for the hub and for people, and nothing that they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import saved

from afina.cli.main import run
from afina.engine.train import finetune
from afina.report.card import model_card

pytestmark = pytest.mark.usefixtures("own_cache")
SECRET = "sesame opens"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("models") / "my base")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, es]\n---\n")
    return folder


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps whose rows are easy to know again."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"one two {i}", "completion": f" three {i} {SECRET}"} for i in range(40)]
    rows += [rows[0], {"prompt": "a", "completion": " b" * 200}]
    (folder / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "val_size": 0.2, "eval_steps": 1}
    finetune(
        model=str(base), data=str(folder / "my rows.jsonl"), output_dir=str(folder / "lora"), method="lora", quiet=True,
        max_length=64, **settings,
    )  # fmt: skip
    return folder / "lora"


def of(folder: Path, **changes: Any) -> str:
    facts: dict[str, Any] = {"name": "out", "format": "hf", "base": None, "base_folder": None, "check": {}}
    return model_card(folder, **{**facts, "files": ["model.safetensors"], "modelfile": None, **changes})


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, matter, text = card.split("---\n", 2)
    return yaml.safe_load(matter), text


def test_of_a_run(lora: Path, base: Path) -> None:
    record = json.loads((lora / "run.json").read_text())
    card = of(lora / "best", format="peft", base=str(base), base_folder=base)
    matter, text = parts(card)
    assert matter["license"] == "apache-2.0"
    assert matter["language"] == ["en", "es"]
    assert (matter["library_name"], matter["pipeline_tag"]) == ("peft", "text-generation")
    assert matter["tags"] == ["afina", "lora"]
    assert "base_model" not in matter  # a folder of this machine is no model of the hub
    (result,) = matter["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(record["finished"]["dev_loss"], abs=1e-4)
    assert "`my base`, fine-tuned with Afina (method `lora`)." in text
    assert "Licence: `apache-2.0`, as `README.md` of the base says." in text
    assert "Better: dev loss" in text
    assert "95 % interval" in text
    for line in (
        "| file | `my rows.jsonl` |",
        "| rows read | 42 |",
        f"| rows held out | {record['data']['dev_rows']} |",
        "| duplicates, left out | 1 |",
        "| rows longer than max_length, left out | 1 |",
        f"| SHA-256 of rows, order and split | `{record['facts']['data_sha256']}` |",
    ):
        assert line in text, text
    for line in ("learning_rate: 0.01\n", "max_steps: 3\n", "data: my rows.jsonl\n", "model: my base\n"):
        assert line in text
    assert "batch_size" not in text  # as it is by default
    finished = record["finished"]
    assert f"| {finished['dev_loss_before']:.4f} (" in text
    assert f"| {finished['dev_loss']:.4f} (" in text
    assert "The best of 3 evaluations" in text
    assert "PeftModel.from_pretrained(model, place)" in text
    assert 'from_pretrained("BASE")  # the folder of my base' in text
    assert "apply_chat_template" not in text  # of prompts and completions
    # What is nobody else's business.
    for private in (str(lora.parent), str(base.parent), SECRET, record["started"]["host"] + "\n"):
        assert private not in card


def test_the_hub_can_read_it(lora: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(of(lora / "best", format="peft", base="owner/some.model@main", base_folder=None))
    assert card.data.base_model == "owner/some.model"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.license == "unknown"
    (result,) = card.data.eval_results
    assert result.metric_type == "loss"
    assert 'from_pretrained("owner/some.model")' in card.text
    assert "vllm serve owner/some.model --enable-lora" in card.text
    assert hub.ModelCard(of(lora / "best", base="owner/x")).data.to_dict()["base_model_relation"] == "finetune"


def test_of_a_model_whose_training_is_not_known(base: Path, tmp_path: Path) -> None:
    matter, text = parts(
        of(base, format="gguf", files=["m.gguf"], modelfile="Modelfile", check={"ollama_limits": ["x"]})
    )
    assert matter["tags"] == ["afina"]
    assert not {"model-index", "base_model", "base_model_relation"} & matter.keys()
    assert "How it was trained is not known" in text
    assert "Licence: `apache-2.0`, as `README.md` of where it came from says." in text
    assert "## Recipe" not in text
    assert "llama-server -m m.gguf\nollama create my-model -f Modelfile\n" in text
    assert "- Ollama: x." in text
    (tmp_path / "model").mkdir()
    matter, text = parts(of(tmp_path / "model"))
    assert matter["license"] == "unknown"
    assert "Licence: unknown: look at where it came from." in text


def test_what_is_missing_is_said(lora: Path, base: Path, tmp_path: Path) -> None:
    def changed(**values: Any) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        (folder / "best").mkdir(parents=True)
        record = json.loads((lora / "run.json").read_text()) | values
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    _, text = parts(of(changed() / "best"))
    assert "Unknown: the dev loss was not measured before and after" in text
    assert "were not measured both before and after" in text
    _, text = parts(of(changed(finished=None) / "best"))
    assert "The run did not come to its end." in text
    bare = changed(data=None, facts=None, started={})
    _, text = parts(of(bare / "best"))
    assert "Versions: unknown" in text
    skipped = changed()
    lines = [json.dumps({"step": n, "loss": 1.0, "lr": 0.1, "skipped": n == 2}) for n in (1, 2, 3)]
    (skipped / "metrics.jsonl").write_text("\n".join(lines))
    assert "1 of 3 steps were skipped" in of(skipped / "best")
    (bare / "run.json").write_text("{")
    matter, text = parts(of(bare / "best"))
    assert "Its run's files cannot be read" in text
    assert matter["license"] == "unknown"


def test_hostile_names_stay_names(lora: Path, tmp_path: Path) -> None:
    nasty = 'x"\n---\nlicense: mit\n# h\n<script>|`\x1b]0;a\x07\u202e [a](b)'
    record = json.loads((lora / "run.json").read_text())
    record["config"] |= {"model": nasty, "data": nasty}
    record["data"] |= {"data": nasty, "schema": nasty, "val_file": nasty}
    record["facts"]["data_sha256"] = nasty
    record["started"]["versions"] = {nasty: nasty}
    (tmp_path / "best").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(record))
    for changes in ({}, {"base": nasty, "format": "peft"}, {"format": "gguf", "files": [nasty], "modelfile": nasty}):
        card = of(tmp_path / "best", name=nasty, **changes)
        assert card.isascii() or all(c.isprintable() or c == "\n" for c in card)
        assert "\x1b" not in card
        assert "\u202e" not in card
        lines = card.splitlines()
        assert lines.count("---") == 2
        assert sum(line.startswith("# ") for line in lines) == 1
        assert "license: mit" not in lines
        assert parts(card)[0]["license"] == "unknown"
        assert not any(line.startswith(("<script", "[a](b)", "# h")) for line in lines)


def test_the_verb_writes_it(lora: Path, base: Path, tmp_path: Path) -> None:
    for to, place in (("hf", "out"), ("peft", "adapter"), ("gguf", "file.gguf")):
        assert run(["export", str(lora), "--to", to, "--output", str(tmp_path / place)]) == 0
    texts = [(tmp_path / name).read_text() for name in ("out/README.md", "adapter/README.md", "file.README.md")]
    for text, library in zip(texts, ("transformers", "peft", "gguf")):
        assert f"library_name: {library}\n" in text
        assert "license: apache-2.0\n" in text
        assert "| rows read | 42 |" in text
    assert "of the largest from those of the model" in texts[0]
    assert "ollama create my-model -f file.Modelfile" in texts[2]
