"""A merged model computes what base and adapter compute; and is only ever made of the base that the adapter knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import saved, tiny_tokenizer
from torch import Tensor

from afina.engine.linear import Linear
from afina.engine.lora import new_adapter, save_adapter
from afina.engine.model import GPT
from afina.engine.weights import hf_tensors, load_model, new_model
from afina.errors import AfinaError, ConfigError
from afina.export.merge import Base, base_of, check_base, merge
from afina.loaders.weights.peft import BASE_HASH, AdapterConfig, is_adapter, write_adapter

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96, "vocab_size": 320, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "phi3": SIZES | {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": None},
    "gpt_neox": SIZES | {"model_type": "gpt_neox"},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96,
        "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
IDS = (torch.arange(40)[None] * 7) % 320
TOLERANCE = 2e-5  # fp32 at these sizes; each of the mistakes looked for gives more than 1e-2


def random_model(config: dict[str, Any]) -> GPT:
    """Matrices so large that a wrong one shows, norms and biases that are not 1 and 0."""
    model = new_model(config, dtype="float32", device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 1.5 * p.shape[1] ** -0.5 if p.dim() == 2 else 1.0 + 0.3 * noise)
    return model


def add_adapter(
    model: GPT,
    targets: tuple[str, ...] = ("all-linear",),
    whole: tuple[str, ...] = (),
    strength: float = 0.3,
    **kind: Any,
) -> GPT:
    """An adapter as if trained; of ``strength`` 0.3 it changes the logits by about as much as they are large."""
    adapter = new_adapter(
        model, AdapterConfig(**{"r": 4, "alpha": 12, **kind}), targets=targets, modules_to_save=whole, seed=0
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for lora in adapter.loras.values():
            lora.B.copy_(strength * torch.randn(lora.B.shape, generator=generator))
            if lora.magnitude is not None:
                lora.magnitude.mul_(1 + strength * torch.randn(lora.magnitude.shape, generator=generator))
        for name in adapter.saved:
            parameter = model.get_parameter(name)
            parameter.mul_(1 + strength * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def away(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_merged_model_computes_what_base_and_adapter_do(family: str, kind: str) -> None:
    model = random_model(FAMILIES[family])
    base = model(IDS)
    add_adapter(model, **KINDS[kind])
    expected = model(IDS)
    assert away(expected, base) > 0.1
    merge(model)
    assert away(model(IDS), expected) < TOLERANCE
    assert model.adapter is None
    assert not any(layer.lora for layer in model.modules() if isinstance(layer, Linear))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_only_the_rows_that_have_an_adapter_change(kind: str) -> None:
    """k of q, k, v and up of gate, up: by HF's names, so that no mistake about rows is made twice."""
    model = random_model(FAMILIES["llama"])
    before = {name: tensor.clone() for name, tensor in hf_tensors(model)}
    add_adapter(model, ("k_proj", "up_proj"), **KINDS[kind])
    loras = dict(model.adapter.loras) if model.adapter else {}
    merge(model)
    for name, tensor in hf_tensors(model):
        assert torch.equal(tensor, before[name]) != name.endswith(("k_proj.weight", "up_proj.weight")), name
    # The formula, written out, for one of them.
    lora = loras["layers.1.mlp.gate_up"]
    w = before["model.layers.1.mlp.up_proj.weight"].double()
    scale = 12 / 2 if kind == "rslora" else 12 / 4
    w = w + scale * (lora.B.double() @ lora.A.double())
    if lora.magnitude is not None:
        w = w * (lora.magnitude.double() / w.norm(dim=1))[:, None]
    found = dict(hf_tensors(model))["model.layers.1.mlp.up_proj.weight"]
    assert away(found.double(), w) < 1e-6


@torch.no_grad()
def test_nf4_weights_come_out_dense_with_or_without_an_adapter(tmp_path: Path) -> None:
    """What an adapter was trained on is the dequantised weights, and these it is added to."""
    folder = saved(tmp_path / "base", hidden_size=64, intermediate_size=64)
    for targets in ((), ("k_proj",), ("all-linear",)):
        model = load_model(folder, dtype="float32", quantize="nf4")
        dequantized = {name: tensor.clone() for name, tensor in hf_tensors(model)}
        if targets:
            add_adapter(model, targets)
        expected = model(IDS)
        merge(model)
        assert away(model(IDS), expected) < TOLERANCE
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(layer.quantized for layer in model.modules() if isinstance(layer, Linear))
        for name, tensor in hf_tensors(model):
            if "k_proj" not in name and targets != ("all-linear",):
                assert torch.equal(tensor, dequantized[name])
    original = load_model(folder, dtype="float32")
    assert away(add_adapter(original)(IDS), expected) > 1e-3  # the mistake that this is about


@torch.no_grad()
def test_a_tied_embedding_that_was_trained_whole(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    before = model.embed.weight.clone()
    add_adapter(model, ("q_proj",), ("embed_tokens",))
    expected = model(IDS)
    merge(model)
    assert away(model(IDS), expected) < TOLERANCE
    assert not torch.equal(model.embed.weight, before)


def test_a_model_in_16_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^layers.0.attn.qkv: is torch.bfloat16"):
        merge(add_adapter(random_model(FAMILIES["llama"]).to(torch.bfloat16)))


# --- The base ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = load_model(base, dtype="float32")
    save_adapter(add_adapter(model, base=str(base)), tiny_tokenizer(), tmp_path / "adapter")
    return tmp_path / "adapter"


Refusal = Callable[..., str]


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(AfinaError) as raised:
        work()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_base_is_found_where_it_was_or_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert is_adapter(adapter)
    assert not is_adapter(base)
    found = base_of(adapter, None)
    assert (found.name, found.folder) == (str(base), base)
    check_base(adapter, found)
    moved = base.rename(tmp_path / "moved")
    told = refusal(lambda: base_of(adapter, None))
    assert str(base) in told
    assert "if it has moved, name the base: --base BASE for afina export" in told
    found = base_of(adapter, str(moved))
    assert found.folder == moved
    check_base(adapter, found)
    assert "no such model" in refusal(lambda: base_of(adapter, str(base)))
    assert "is an adapter too" in refusal(lambda: base_of(adapter, str(adapter)))


def test_another_base_is_told_by_every_byte_of_it(base: Path, adapter: Path) -> None:
    """One bit in the middle of the weights: the quick hash that loading makes may not see it, this one does."""
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    told = refusal(lambda: check_base(adapter, base_of(adapter, None)))
    assert f"{base} is not the model that {adapter} was trained on" in told
    assert "--base" in told


def test_an_adapter_of_another_program_says_less(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = AdapterConfig(r=2, alpha=2, base=None, target_modules=("q_proj",))
    foreign = tmp_path / "foreign"
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    write_adapter(foreign, config, tensors, {})
    with pytest.raises(
        ConfigError, match="base_model_name_or_path is missing, so its base is not known: name the base: --base BASE"
    ):
        base_of(foreign, None)
    found = base_of(foreign, str(base))
    assert found == Base(str(base), base, None)
    check_base(foreign, found)  # nothing to compare with
    write_adapter(foreign, config, tensors, {BASE_HASH: "0" * 64})
    assert "recorded 000000000000" in refusal(lambda: check_base(foreign, base_of(foreign, str(base))))
