"""The model's own promises: isolation, loss, ties, recomputation, initialisation."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import parametrize, saved
from torch import Tensor

from afina.engine.lora import new_adapter
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig, RopeConfig
from afina.engine.weights import load_model
from afina.errors import ConfigError
from afina.kernels import backend as backends
from afina.loaders.weights.peft import AdapterConfig

TINY = ModelConfig(
    vocab_size=16,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=32,
    layer_windows=(None, None),
    layer_ropes=(0, 0),
    ropes=(RopeConfig("default", 10000.0, 4),),
)


def gradients(model: GPT, ids: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(ids, labels, **options).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def starts(*lengths: int) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@parametrize()
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    """Document A changed: B's logits and gradients stay the same to the bit, whatever A's length."""
    model = load_model(saved(name).folder).train()
    for a, b in ((30, 28), (7, 28), (28, 28)):
        cu_seqlens = starts(a, b)
        ids = torch.randint(0, 61, (1, a + b), generator=torch.Generator().manual_seed(a))
        changed = ids.clone()
        changed[0, :a] = (changed[0, :a] + 17) % 61
        labels = ids.clone()
        labels[0, :a] = -100
        with torch.no_grad():
            before, after = model(ids, cu_seqlens=cu_seqlens), model(changed, cu_seqlens=cu_seqlens)
        assert torch.equal(before[0, a:], after[0, a:])
        assert not torch.equal(before[0, :a], after[0, :a])
        first = gradients(model, ids, labels, cu_seqlens=cu_seqlens)
        second = gradients(model, changed, labels, cu_seqlens=cu_seqlens)
        assert all(torch.equal(grad, second[key]) for key, grad in first.items())


def test_no_label_crosses_a_boundary() -> None:
    """A document's first token is predicted by nothing, even where its label is not masked; empty documents too."""
    model = GPT(TINY)
    ids = torch.randint(0, 16, (1, 12), generator=torch.Generator().manual_seed(0))
    cu_seqlens = starts(0, 5, 0, 4, 3)
    losses = model.loss(ids, ids, cu_seqlens=cu_seqlens, reduction="none")[0]
    assert losses.nonzero().flatten().tolist() == [1, 2, 3, 4, 6, 7, 8, 10, 11]
    alone = [model.loss(ids[:, a:b], ids[:, a:b], reduction="none")[0] for a, b in ((0, 5), (5, 9), (9, 12))]
    assert torch.allclose(losses, torch.cat(alone), atol=1e-6)


@parametrize("llama", "gpt2", "gemma2", "olmo2")
def test_padding_changes_nothing(name: str) -> None:
    """Rows padded on the right, rows packed, and each alone: the same logits, loss and gradients."""
    model = load_model(saved(name).folder).train()
    rows = [torch.randint(0, 61, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 11, 3)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    packed, cu_seqlens = torch.cat(rows)[None], starts(20, 11, 3)
    with torch.no_grad():
        together, batch = model(packed, cu_seqlens=cu_seqlens)[0].split([20, 11, 3]), model(padded)
        for row, piece, got in zip(rows, together, batch):
            alone = model(row[None])[0]
            assert torch.allclose(piece, alone, atol=1e-5)
            assert torch.allclose(got[: len(row)], alone, atol=1e-5)
    first, second = gradients(model, padded, labels), gradients(model, packed, packed, cu_seqlens=cu_seqlens)
    for key, grad in first.items():
        assert torch.allclose(grad, second[key], atol=1e-5 * float(grad.abs().max()) + 1e-7), key


def counting_model() -> GPT:
    """Predicts for every token its successor: the layers add nothing, the head shifts one-hot embeddings by one."""
    model = GPT(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".o.weight", ".down.weight")):
                parameter.zero_()
        model.embed.weight.copy_(torch.eye(16))
        model.head.weight.copy_(50 * torch.eye(16).roll(1, 0))
    return model


def test_loss_is_shifted_by_one() -> None:
    model = counting_model()
    ids = torch.arange(3, 13)[None]
    assert model.loss(ids, ids) < 1e-6
    prompt = 4
    labels = ids.clone()
    labels[0, :prompt] = -100
    assert model.loss(ids, labels) < 1e-6
    # The first trained label is predicted at the last prompt position ...
    labels[0, prompt] = 0
    losses = model.loss(ids, labels, reduction="none")[0]
    assert losses[prompt] > 10
    assert losses.nonzero().flatten().tolist()[0] == prompt
    assert losses[prompt + 1 :].max() < 1e-6
    # ... and what is masked has no say.
    assert model.loss(ids, ids.new_full(ids.shape, -100)) == 0.0


@parametrize("llama-llama3", "gpt2", "gpt_neox", "gpt_neox-serial", "olmo2", "gemma2", "smollm3")
def test_masked_loss_is_that_of_the_logits(name: str) -> None:
    """The loss that computes trained positions only, against cross-entropy on all logits, gradients included."""
    model = load_model(saved(name).folder).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (3, 17), generator=generator)
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    results = gradients(model, ids, labels)
    loss = model.loss(ids, labels)
    model.zero_grad()
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-6)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        size = float(parameter.grad.abs().max())
        assert torch.allclose(results[key], parameter.grad, atol=1e-5 * size + 1e-7), key
    kept = labels[:, 1:] != -100
    each = model.loss(ids, labels, reduction="none")
    assert each.shape == labels.shape
    assert (each[:, 1:] != 0).equal(kept)
    assert torch.allclose(each.sum() / kept.sum(), loss, atol=1e-6)
    assert torch.allclose(model.loss(ids, labels, reduction="sum"), each.sum(), atol=1e-4)


def test_all_labels_masked() -> None:
    model = GPT(TINY)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    grads = gradients(model, ids, torch.full_like(ids, -100))
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(not grad.any() for grad in grads.values())
    with pytest.raises(ValueError, match="labels: expected"):
        model.loss(ids, ids[:, 1:])


def test_tied_gradient_is_the_sum_of_both_uses() -> None:
    tied, untied = GPT(dataclasses.replace(TINY, tie_embeddings=True)), GPT(TINY)
    state = dict(tied.state_dict())
    assert "head.weight" not in state
    untied.load_state_dict(state | {"head.weight": state["embed.weight"].clone()})
    assert tied.head_weight is tied.embed.weight
    ids = torch.randint(0, 16, (2, 12), generator=torch.Generator().manual_seed(0))
    one, two = gradients(tied, ids, ids), gradients(untied, ids, ids)
    assert two["embed.weight"].norm() > 0.01 * two["head.weight"].norm()
    assert torch.allclose(one["embed.weight"], two["embed.weight"] + two["head.weight"], atol=1e-7)


@parametrize("llama", "gemma3_text", "olmo2", "gpt2")
@pytest.mark.parametrize(("dtype", "adapted"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_activation_policies_change_nothing(name: str, adapted: bool, dtype: str) -> None:
    model = load_model(saved(name).folder, dtype=dtype).train()
    if adapted:
        new_adapter(model, AdapterConfig(base=None, r=4, alpha=8), targets=["all-linear"], seed=0)
        for parameter in model.parameters():  # a fresh adapter's B is 0, and so is the gradient of its A
            parameter.data.add_(0.01 if parameter.requires_grad else 0.0)
    ids = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.where(ids % 3 > 0, -100)
    policies = ("keep", "selective", "full", "offload", "auto")
    found: dict[str, dict[str, Tensor]] = {}
    for policy in policies:
        model.set_activation_policy(policy)
        assert model.gradient_checkpointing == (policy in ("full", "offload"))
        model.zero_grad()
        loss = model.loss(ids, labels, cu_seqlens=starts(25, 15))
        loss.backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        found[policy] = {"loss": loss.detach(), **grads}
    assert len(found["keep"]) > 3
    assert all(value.abs().max() > 0 for value in found["keep"].values())
    # Where layers are computed again, the sum of residual and branch is made before the norm, and its gradient is then
    # rounded once more in 16 bits.
    equal_to = dict.fromkeys(policies, "keep") | ({"full": "full", "offload": "full"} if dtype == "bfloat16" else {})
    for policy, other in equal_to.items():
        assert found[policy].keys() == found[other].keys()
        assert all(torch.equal(value, found[other][key]) for key, value in found[policy].items()), policy


@parametrize("llama", "gpt_neox", "gemma3_text", "olmo2")
def test_gradient_checkpointing_runs_a_layer_twice(name: str) -> None:
    model = load_model(saved(name).folder).train()
    ids = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.where(ids % 3 > 0, -100)
    plain = gradients(model, ids, labels, cu_seqlens=starts(25, 15))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.layers[0].register_forward_pre_hook(count)
    model.gradient_checkpointing = True
    again = gradients(model, ids, labels, cu_seqlens=starts(25, 15))
    handle.remove()
    assert calls == 2  # once forward, once in the backward pass
    assert all(torch.equal(grad, again[key]) for key, grad in plain.items())


def test_learned_positions_end() -> None:
    model = load_model(saved("gpt2").folder)
    model(torch.zeros(1, 128, dtype=torch.int64))
    with pytest.raises(ConfigError, match="129 tokens is longer than the model's 128 learned positions"):
        model(torch.zeros(1, 129, dtype=torch.int64))
    # Packed, each document counts for itself.
    model(torch.zeros(1, 200, dtype=torch.int64), cu_seqlens=starts(100, 100))


def test_shapes_are_checked() -> None:
    model = GPT(TINY)
    with pytest.raises(ValueError, match=r"expected \(B, T\), found \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \(1, T\) with cu_seqlens, found \(2, 3\)"):
        model(torch.zeros(2, 3, dtype=torch.int64), cu_seqlens=starts(3))


def test_initial_weights() -> None:
    config = dataclasses.replace(
        TINY, vocab_size=500, hidden_size=128, intermediate_size=256, head_dim=32, norm_offset=1.0, o_bias=True
    )
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    model = GPT(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    again, other = GPT(config), GPT(config)
    other.init_weights(1)
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.dim() == 1:
            assert not p.any(), name  # biases, and norms stored as weight - 1
            continue
        assert not torch.equal(p, r), name
        expected = 0.02 / 2 if name.endswith((".o.weight", ".down.weight")) else 0.02
        assert abs(p.std().item() / expected - 1) < 0.05, name
    assert (GPT(TINY).norm.weight == 1).all()


def test_decay_is_for_matrices() -> None:
    model = GPT(dataclasses.replace(TINY, qkv_bias=True, qk_norm="head", learned_positions=True))
    rest = {name for name, _ in model.named_parameters()} - model.decay_parameters()
    assert {name.split(".")[-2] for name in model.decay_parameters()} == {"qkv", "o", "gate_up", "down", "head"}
    assert {name for name in rest if not name.startswith("layers")} == {
        "embed.weight",
        "pos_embed.weight",
        "norm.weight",
    }


@parametrize()
def test_parameter_count_from_the_sizes(name: str) -> None:
    model = load_model(saved(name).folder)
    assert model.config.num_parameters() == model.num_parameters()
    assert model.num_parameters() == sum(p.numel() for p in saved(name).model.parameters())


def test_embedding_scale_is_rounded_to_the_dtype() -> None:
    """Gemma was trained with sqrt(hidden size) in bf16."""
    hf = copy.deepcopy(saved("gemma2").model.base_model.embed_tokens).to(torch.bfloat16)
    model = load_model(saved("gemma2").folder, dtype="bfloat16")
    ids = torch.arange(61)[None]
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        assert torch.equal(seen[0], hf(ids))
    hf.to(torch.float32)


def test_attention_backends_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    model, windowed = GPT(TINY), GPT(dataclasses.replace(TINY, layer_windows=(8, None)))
    capped = GPT(dataclasses.replace(TINY, attention_softcap=5.0))
    for backend in ("sdpa", "torch", "auto"):
        model.set_attention_backend(backend, longest=100, device=cpu)
        assert model.attention_backend == (None if backend == "auto" else backend)
    windowed.set_attention_backend("sdpa", longest=8, device=cpu)  # no window is shorter than a sequence
    with pytest.raises(ConfigError, match=r"attention_backend is sdpa, .* a window of 8 tokens"):
        windowed.set_attention_backend("sdpa", longest=9, device=cpu)
    with pytest.raises(ConfigError, match=r"attention_backend is sdpa, .* capped scores"):
        capped.set_attention_backend("sdpa", longest=9, device=cpu)
    monkeypatch.setattr(backends, "runnable", lambda device: device.type == "cuda")  # as without the interpreter
    with pytest.raises(ConfigError, match=r"^attention_backend: 'triton' needs a GPU"):
        model.set_attention_backend("triton", longest=9, device=cpu)


@pytest.mark.gpu
def test_labels_on_the_cpu_and_no_wait_for_the_gpu() -> None:
    """The same loss and gradients as with labels on the GPU, without one synchronisation in between."""
    model = GPT(TINY, device="cuda").train()
    ids = torch.randint(0, 16, (1, 40), generator=torch.Generator().manual_seed(0))
    labels, cu_seqlens, on_gpu = ids.where(ids % 3 > 0, -100), starts(25, 15), ids.cuda()
    want = gradients(model, on_gpu, labels.cuda(), cu_seqlens=cu_seqlens.cuda())  # self-tests and compilation too
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = gradients(model, on_gpu, labels, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(got[name], want[name]) for name in want)
