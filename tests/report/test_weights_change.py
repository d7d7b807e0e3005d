"""afina/report/weights_change.py: planted changes come out as they were planted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from afina.engine.lora import new_adapter, save_adapter
from afina.errors import WeightsError
from afina.loaders.weights.peft import AdapterConfig
from afina.loaders.weights.safetensors import write_safetensors
from afina.report.weights_change import adapter_change, effective_rank, product_spectrum, whole_change


def folder(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    write_safetensors(path / "model.safetensors", tensors)
    return path


def test_planted_changes(tmp_path: Path) -> None:
    one = {
        "model.embed_tokens.weight": torch.ones(4, 4),
        "model.layers.0.mlp.up_proj.weight": torch.ones(2, 8),
        "model.layers.11.mlp.up_proj.weight": torch.ones(2, 8),
    }
    two = {name: tensor.clone() for name, tensor in one.items()}
    two["model.layers.0.mlp.up_proj.weight"] *= 1.1
    two["model.layers.11.mlp.up_proj.weight"][0, 0] = 3.0
    found = whole_change(folder(tmp_path / "before", one), folder(tmp_path / "after", two))
    by_name = {matrix.name: matrix for matrix in found.matrices}
    still, all_moved, one_moved = (by_name[name] for name in sorted(by_name))
    assert (still.relative, still.moved, still.layer, still.kind) == (0.0, 0.0, None, "model.embed_tokens")
    assert all_moved.relative == pytest.approx(0.1, rel=1e-5)
    assert (all_moved.moved, all_moved.layer, all_moved.kind) == (1.0, 0, "mlp.up_proj")
    assert one_moved.relative == pytest.approx(2 / 4)
    assert (one_moved.moved, one_moved.layer) == (1 / 16, 11)
    assert found.moved == pytest.approx(17 / 48)
    assert found.relative == pytest.approx(math.sqrt((0.16 + 4) / 48), rel=1e-5)


def test_in_bfloat16_what_rounds_away_has_not_moved(tmp_path: Path) -> None:
    weight = torch.linspace(1, 2, 64).view(8, 8)
    one = folder(tmp_path / "before", {"x.0.w": weight})  # float32, and the model is held in bfloat16
    two = folder(tmp_path / "after", {"x.0.w": (weight.bfloat16() * 1.0001).bfloat16()})
    found = whole_change(one, two)
    assert (found.moved, found.relative, found.dtype) == (0.0, 0.0, "bfloat16")


def test_models_without_a_common_tensor(tmp_path: Path) -> None:
    one, two = (folder(tmp_path / name, {name: torch.ones(2)}) for name in "ab")
    with pytest.raises(WeightsError, match="no tensor in common"):
        whole_change(one, two)


def test_the_spectrum_is_that_of_the_product() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 30), torch.randn(20, 4)
    wanted = torch.linalg.svdvals((b @ a).double())[:4]
    assert torch.allclose(product_spectrum(a, b), wanted, rtol=1e-5)
    assert product_spectrum(a, torch.zeros(20, 4)).tolist() == [0.0] * 4


def test_effective_rank() -> None:
    assert effective_rank([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert effective_rank([5.0, 0.0]) == pytest.approx(1)
    assert effective_rank([0.0, 0.0]) == 0.0
    assert 1 < effective_rank([2.0, 1.0]) < 2


@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_beside_its_merged_matrix(tmp_path: Path, with_base: bool) -> None:
    from tiny_model import saved

    import afina

    base = saved(tmp_path / "base")
    model = afina.load_model(base)
    adapter = new_adapter(model, AdapterConfig(r=3, alpha=6.0, base=str(base)), targets=["q_proj", "down_proj"], seed=0)
    torch.manual_seed(1)
    for lora in adapter.loras.values():
        torch.nn.init.normal_(lora.B, std=0.1)
    save_adapter(model, None, tmp_path / "adapter")
    found = adapter_change(tmp_path / "adapter", base if with_base else None)
    assert [matrix.name for matrix in found.matrices] == sorted(
        f"model.layers.{n}.{name}.weight" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    for matrix in found.matrices:
        assert len(matrix.spectrum) == 3
        assert list(matrix.spectrum) == sorted(matrix.spectrum, reverse=True)
    if not with_base:
        assert found.relative is None
        assert any("the base is not there" in note for note in found.notes)
        return
    layer = model.layers[1].mlp.down
    change = layer.lora.merge(layer.weight) - layer.weight
    down = next(matrix for matrix in found.matrices if matrix.name == "model.layers.1.mlp.down_proj.weight")
    assert down.relative == pytest.approx(float(change.norm() / layer.weight.norm()), rel=1e-4)
    assert down.spectrum == pytest.approx(torch.linalg.svdvals(change.double())[:3].tolist(), rel=1e-4)
    assert not found.notes
