"""engine/optim.py: decay on matrices only, equality with torch, clipping, bf16 weights that still learn, state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.optim import AdamW


def small_model(**changes: object) -> GPT:
    hf = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    } | changes  # fmt: skip
    return GPT(ModelConfig.from_hf(hf))


def test_zero_gradients_shrink_matrices_by_lr_times_decay_and_nothing_else() -> None:
    model = small_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = AdamW(model, decay=model.decay_parameters(), weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(lr=0.5)
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and name != "embed.weight"
        expected = before[name] * (1 - 0.5 * 0.1) if matrix else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
    assert any(p.dim() == 1 for p in model.parameters())


def test_equals_torch_adamw_over_twenty_steps() -> None:
    model = small_model()
    twin = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    decay = model.decay_parameters()
    groups = [
        {"params": [t for t, (n, _) in zip(twin, model.named_parameters()) if (n in decay) == on], "weight_decay": wd}
        for on, wd in ((True, 0.1), (False, 0.0))
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    ours = AdamW(model, decay=decay, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, t in zip(model.parameters(), twin):
            p.grad = torch.randn(p.shape, generator=generator)
            t.grad = p.grad.clone()
        norm = ours.clip_(1.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(twin, 1.0)), rel=1e-5)
        ours.step(1e-2)
        theirs.step()
    for p, t in zip(model.parameters(), twin):
        torch.testing.assert_close(p, t, rtol=1e-5, atol=1e-6)


def test_tied_embedding_is_held_once() -> None:
    assert "head.weight" not in AdamW(small_model(), decay=set()).params
    assert "head.weight" in AdamW(small_model(tie_word_embeddings=False), decay=set()).params


def test_bf16_weights_move_under_updates_smaller_than_their_rounding() -> None:
    model = small_model().to(torch.bfloat16)
    weight = model.norm.weight
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = AdamW(model, decay=set(), weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step(lr=1e-3)  # AdamW turns a constant gradient into steps of lr
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), torch.zeros(16), atol=0.01, rtol=0)


def test_state_comes_back_bit_for_bit_and_foreign_state_is_refused() -> None:
    def run(optimizer: AdamW, steps: range) -> None:
        for i in steps:
            for p in optimizer.params.values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
            optimizer.step(1e-2)

    straight = AdamW(small_model(), decay=set())
    run(straight, range(6))
    first = AdamW(small_model(), decay=set())
    run(first, range(3))
    saved = {group: {n: t.clone() for n, t in members.items()} for group, members in first.state().items()}
    second = AdamW(small_model(), decay=set())
    second.load_state(saved, first.num_updates)
    run(second, range(3, 6))
    assert second.num_updates == 6
    for group, members in straight.state().items():
        for name, tensor in members.items():
            assert torch.equal(tensor, second.state()[group][name])
    with pytest.raises(ValueError, match="another model"):
        AdamW(small_model(hidden_size=32), decay=set()).load_state(saved, 3)
