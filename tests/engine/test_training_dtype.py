"""engine/training_dtype.py: a CPU with bfloat16 instructions is one whose products prove faster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from afina.durable import cache_folder
from afina.engine import training_dtype as module
from afina.engine.train import finetune
from afina.engine.training_dtype import training_dtype
from afina.errors import ConfigError

CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.dtype]:
    """A CPU with the instructions, on which bfloat16 products are 4 times as fast; what was timed, in order."""
    timed: list[torch.dtype] = []

    def seconds(dtype: torch.dtype) -> float:
        timed.append(dtype)
        return 1.0 if dtype == torch.float32 else 0.25

    monkeypatch.delenv("AFINA_CPU_DTYPE", raising=False)
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "bfloat16_instructions", lambda: "AMX")
    monkeypatch.setattr(module, "products_seconds", seconds)
    return timed


def test_gpus_and_plain_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFINA_CPU_DTYPE", raising=False)
    monkeypatch.setattr(module, "bfloat16_instructions", lambda: None)
    assert training_dtype(torch.device("cuda", 0))[0] == "bfloat16"
    dtype, why = training_dtype(CPU)
    assert dtype == "float32"
    assert "no bfloat16 instructions" in why


def test_what_was_measured_is_kept(measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, why = training_dtype(CPU)
    assert dtype == "bfloat16"
    assert "AMX" in why
    assert "4.0 times" in why
    monkeypatch.setattr(module, "products_seconds", None)  # what is known is not timed again
    assert training_dtype(CPU) == (dtype, why)
    assert measured == [torch.float32, torch.bfloat16]


def test_another_machine_is_measured_anew(measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    training_dtype(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # the same instructions, of which torch now makes nothing
    monkeypatch.setattr(module, "products_seconds", lambda dtype: 1.0)
    dtype, why = training_dtype(CPU)
    assert dtype == "float32"
    assert "1.0 times" in why
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"key": 3, "value": 9.0}', "\x00"])
def test_a_damaged_cache_is_measured_anew(text: str, measured: list[torch.dtype]) -> None:
    training_dtype(CPU)
    (path,) = cache_folder().iterdir()
    path.write_text(text)
    assert training_dtype(CPU)[0] == "bfloat16"
    assert len(measured) == 4
    assert json.loads(path.read_text())["value"] == 4.0


def test_a_cache_that_cannot_be_written(
    measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "file" / "cache"))
    assert training_dtype(CPU)[0] == training_dtype(CPU)[0] == "bfloat16"
    assert len(measured) == 4


def test_the_variable(measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("float32", "bfloat16"):
        monkeypatch.setenv("AFINA_CPU_DTYPE", asked)
        assert training_dtype(CPU)[0] == asked
    monkeypatch.setenv("AFINA_CPU_DTYPE", "bf16")
    with pytest.raises(ConfigError, match=r"AFINA_CPU_DTYPE=bf16: expected float32 or bfloat16 \(did you mean"):
        training_dtype(CPU)
    assert measured == []


def test_products_are_timed() -> None:
    assert 0 < module.products_seconds(torch.float32) < 5


def test_a_run_says_what_it_chose_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed where the choice would be another one, a run goes on as it began."""
    rows = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}."} for n in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": "afina-tiny", "data": str(data), "output_dir": str(tmp_path / "run"), "save_steps": 1}
    monkeypatch.setenv("AFINA_CPU_DTYPE", "bfloat16")
    result = finetune(**settings, max_steps=1, quiet=True)
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "dtype: bfloat16" in recipe
    assert "AFINA_CPU_DTYPE asks for it" in recipe
    monkeypatch.setenv("AFINA_CPU_DTYPE", "float32")
    result = finetune(**settings, max_steps=2, quiet=True, resume=True)
    assert result.metrics["steps"] == 2
    assert "dtype: bfloat16" in (tmp_path / "run" / "recipe.yaml").read_text()
    began_anew = finetune(**settings, max_steps=1, quiet=True, overwrite=True)
    assert began_anew.metrics["steps"] == 1
    assert "dtype: float32" in (tmp_path / "run" / "recipe.yaml").read_text()
