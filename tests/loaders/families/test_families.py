"""Every family against transformers: logits, gradients, greedy text, and the way back to disk."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_models import BY_NAME, parametrize, saved, transformers

from afina.engine.kv_cache import KVCache
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.rope_tables import RopeTables, inverse_frequencies
from afina.engine.weights import hf_tensors, load_model, save_model
from afina.loaders.families.registry import MODEL_TYPES

# Past the sliding windows (8) and past the original maximum of the scaled RoPEs (32), and shorter than both.
LENGTHS = (1, 37, 5, 70, 23)


def documents(lengths: tuple[int, ...] = LENGTHS, vocab: int = 61, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (1, n), generator=generator) for n in lengths]


def packed(docs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    cu_seqlens = F.pad(torch.tensor([doc.shape[1] for doc in docs]).cumsum(0), (1, 0)).int()
    return torch.cat(docs, dim=1), cu_seqlens


def test_every_family_has_a_case() -> None:
    assert {json.loads((saved(n).folder / "config.json").read_text())["model_type"] for n in BY_NAME} == set(
        MODEL_TYPES
    )


@parametrize()
def test_logits_and_gradients(name: str) -> None:
    """Ragged documents packed for ours, one by one for transformers."""
    hf, folder = saved(name).model, saved(name).folder
    model = load_model(folder).train()
    docs = documents()
    ids, cu_seqlens = packed(docs)
    with torch.no_grad():
        logits = model(ids, cu_seqlens=cu_seqlens)
    theirs = [hf(doc).logits for doc in docs]
    assert (logits - torch.cat(theirs, dim=1)).abs().max() <= 1e-4
    assert logits.abs().max() > 1.0

    loss = model.loss(ids, ids, cu_seqlens=cu_seqlens)
    pairs = [(out[0, :-1], doc[0, 1:]) for out, doc in zip(theirs, docs)]
    expected = F.cross_entropy(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
    assert abs(loss.item() - expected.item()) <= 1e-5
    hf.zero_grad()
    expected.backward()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    wanted = {n: p.grad for n, p in hf.named_parameters()}
    # Where the exact gradient is 0 (a key's bias shifts all scores alike) only rounding is left: compare with the rest.
    tiny = 1e-6 * max(float(grad.norm()) for grad in wanted.values())
    compared = 0
    for key, grad in hf_tensors(model, {n: g for n, g in grads.items() if g is not None}):
        key = key.replace("embed_out.", "lm_head.")
        error, size = float((grad - wanted[key]).norm()), float(wanted[key].norm())
        assert error <= 1e-4 * size + tiny, f"{key}: {error:.2e} of {size:.2e}"
        compared += 1
    assert compared == len(wanted)


@parametrize()
def test_batched_equals_packed(name: str) -> None:
    model = load_model(saved(name).folder)
    docs = documents((40, 40))
    ids, cu_seqlens = packed(docs)
    with torch.no_grad():
        assert torch.allclose(model(torch.cat(docs)).flatten(0, 1), model(ids, cu_seqlens=cu_seqlens)[0], atol=1e-5)


def greedy(model: GPT, prompt: torch.Tensor, steps: int) -> list[int]:
    """Greedy decoding in which no pair of tokens occurs twice: random models otherwise repeat one token for ever."""
    cache = KVCache(model.config, 1, prompt.shape[1] + steps)
    text, new = prompt[0].tolist(), prompt
    for _ in range(steps):
        with torch.no_grad():
            logits = model(new, cache=cache)[0, -1]
        logits[[after for before, after in pairwise(text) if before == text[-1]]] = -torch.inf
        text.append(int(logits.argmax()))
        new = torch.tensor([text[-1:]])
    return text[prompt.shape[1] :]


@parametrize()
def test_greedy_text(name: str) -> None:
    hf, folder = saved(name).model, saved(name).folder
    prompt = documents((6,))[0]
    options = {"max_new_tokens": 64, "do_sample": False, "no_repeat_ngram_size": 2, "pad_token_id": 0}
    theirs = hf.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 6:].tolist()
    assert greedy(load_model(folder), prompt, 64) == theirs
    assert len(set(theirs)) > 10


@parametrize()
def test_saved_again(name: str, tmp_path: Path) -> None:
    hf, folder = saved(name).model, saved(name).folder
    save_model(load_model(folder), None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    again, info = type(hf).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    state = again.state_dict()
    assert state.keys() == hf.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in hf.state_dict().items())
    # The file itself holds the same tensors under the same names, not just something that loads.
    assert (tmp_path / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size


def hf_rope(name: str) -> list[tuple[torch.nn.Module, dict[str, str]]]:
    """The rotary modules of a case, in the order of our ``ropes``."""
    body = saved(name).model.base_model
    kinds = ("full_attention", "sliding_attention") if name == "gemma3_text" else (None,)
    return [(body.rotary_emb, {} if kind is None else {"layer_type": kind}) for kind in kinds]


@parametrize(*(name for name in BY_NAME if not name.startswith("gpt2")))
@pytest.mark.parametrize("last", [20, 1_000, 8_191, 131_071])
def test_rope_far_away(name: str, last: int) -> None:
    """cos and sin to the bit, far past the original maximum: one rounding of a frequency is 0.01 rad there."""
    config = ModelConfig.from_hf(json.loads((saved(name).folder / "config.json").read_text()))
    positions = torch.tensor([0, last // 2, last])
    for rope, (module, kind) in zip(config.ropes, hf_rope(name), strict=True):
        cos, sin = RopeTables(rope)(positions, torch.full_like(positions, last + 1))
        wanted = [x[0, :, : cos.shape[1]] for x in module(torch.zeros(1), positions[None], **kind)]
        assert cos.dtype == torch.float32
        assert torch.equal(cos, wanted[0])
        assert torch.equal(sin, wanted[1])


def test_far_positions_end_to_end(tmp_path: Path) -> None:
    """Logits at 8,000 positions with a RoPE stretched from 1,024."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=8192,
        rope_parameters=rope | {"original_max_position_embeddings": 1024, "rope_theta": 5e5},
    )  # fmt: skip
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(config).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    hf.save_pretrained(tmp_path)
    ids = documents((8_000,))[0]
    with torch.no_grad():
        difference = (load_model(tmp_path)(ids) - hf(ids).logits).abs()
    assert difference.max() <= 1e-4


@pytest.mark.parametrize("name", ["llama-llama3", "phi3-longrope"])
def test_rope_tables_stay_fp32_in_bf16(name: str) -> None:
    model = load_model(saved(name).folder, dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16
    model.to(torch.bfloat16)
    rope = model.ropes[0]
    assert rope.inv_freq(torch.device("cpu")).dtype == torch.float32
    assert torch.equal(rope.inv_freq(torch.device("cpu")), inverse_frequencies(rope.rope))
    cos, _ = rope(torch.arange(2000), torch.full((2000,), 2000))
    assert cos.dtype == torch.float32
    # The model runs in bf16 and stays near the fp32 one.
    ids = documents((40,))[0]
    with torch.no_grad():
        low, high = model(ids), load_model(saved(name).folder)(ids)
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).abs().mean() < 0.1 * high.abs().mean()
