"""Every example can be run as it lies there: its recipe resolves, its data loads whole, its script makes its data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny_model import tiny_tokenizer

from afina.engine.train_config import TrainConfig
from afina.loaders.data.dataset import prepare

REPO = Path(__file__).resolve().parent.parent
USE_CASES = {
    "support": "messages",
    "content": "instruction/output",
    "translation": "instruction/output",
    "retrieval": "conversations",
    "sentiment": "text/label",
}


def test_each_use_case_is_a_folder_with_recipe_and_words() -> None:
    for name in USE_CASES:
        folder = REPO / "examples" / name
        assert {"recipe.yaml", "README.md", "make_data.py"} <= {p.name for p in folder.iterdir()}
        command = "afina demo" if name == "support" else f"afina train examples/{name}/recipe.yaml"
        assert command in (folder / "README.md").read_text(encoding="utf-8")
        assert f"examples/{name}/README.md" in (REPO / "examples" / "README.md").read_text().replace(
            f"]({name}/", f"](examples/{name}/"
        )


@pytest.mark.parametrize("name", USE_CASES)
def test_recipe_and_data(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPO)  # the paths in a recipe are those of the repository's root
    config = TrainConfig.resolve(f"examples/{name}/recipe.yaml")
    assert config.model == "afina-tiny"
    assert config.output_dir == f"out/{name}"
    assert config.data is not None
    data = prepare(
        config.data,
        tiny_tokenizer(),
        max_length=8 * config.max_length,  # a tokenizer of 320 tokens makes long rows of these
        val_file=config.val_file,
        val_size=config.val_size,
        seed=config.seed,
        columns=config.columns,
        cache_dir=tmp_path,
        progress=False,
    )
    report = data.report
    assert report["schema"] == USE_CASES[name]
    assert report["usable"] == report["rows"] >= 200
    assert report["unused"] == []
    assert report["dev_rows"] >= 20
    assert data.train.loss_tokens.min() > 0


@pytest.mark.parametrize("name", [name for name in USE_CASES if name != "support"])  # which has a test of its own
def test_the_script_makes_the_data(name: str, tmp_path: Path) -> None:
    folder = REPO / "examples" / name
    spec = importlib.util.spec_from_file_location(f"make_{name}", folder / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(tmp_path)
    (made,) = tmp_path.iterdir()
    assert made.read_bytes() == (folder / made.name).read_bytes()
