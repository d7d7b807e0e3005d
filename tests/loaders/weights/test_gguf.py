"""GGUF files: every tensor where llama.cpp looks for it, the config under its names, the same ids, the same logits."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import BASE, TEXTS, byte_level_bpe, gguf, read_config, write
from torch import Tensor

import afina
from afina.engine.model import GPT
from afina.engine.weights import hf_tensors, load_model, new_model
from afina.errors import ConfigError, TokenizerError, WeightsError
from afina.loaders.text.gguf_vocab import read_vocabulary
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.weights.gguf import write_gguf

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"model_type": "gpt2", "vocab_size": 328, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GEMMA = BASE | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
CASES: dict[str, dict[str, Any]] = {
    "llama": BASE | {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama-3": BASE | {
        "model_type": "llama", "rope_scaling": ROPE | {"original_max_position_embeddings": 32}, "head_dim": 24,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "llama-linear": BASE | {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    "qwen2": BASE | {"model_type": "qwen2", "intermediate_size": 96},
    "qwen2-yarn": BASE | {
        "model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    },
    "qwen3": BASE | {
        "model_type": "qwen3", "head_dim": 32,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5,
        },
    },
    "gemma2": GEMMA | {
        "model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": GEMMA | {
        "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
    "gemma3-6": GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 6, "tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 96},
}  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return byte_level_bpe()


def random_model(config: dict[str, Any]) -> GPT:
    """Norms and biases random too, and matrices so large that attention is far from uniform and softcaps bend."""
    model = new_model(config, dtype="float32", device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    tied = model.config.tie_embeddings
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 2:
                p.copy_(noise * ((0.2 if tied else 1.0) if "embed" in name else 1.5 * p.shape[1] ** -0.5))
            else:
                p.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") and not model.config.norm_offset else 0.0))
    return model


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """name -> (type, values in float32)"""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


# --- Weights ----------------------------------------------------------------------------------------------------------

LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = LLAMA_NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
GPT2_NAMES = {
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
OUTER_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}  # fmt: skip


def their_name(model_type: str, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    names = GPT2_NAMES if model_type == "gpt2" else GEMMA_NAMES if "gemma" in model_type else LLAMA_NAMES
    return f"blk.{layer}.{names[part]}.{kind}"


def back(model: GPT, name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A tensor of the file as HF has it, row by row where the order differs."""
    model_type = model.hf_config["model_type"]
    if model_type == "gpt2" and ".c_" in name and array.ndim == 2:
        return array.T
    if "gemma" in model_type and "norm" in name:
        return array - 1
    if model_type in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        rows, size = np.empty_like(array), model.config.head_dim
        for head in range(len(array) // size):
            for i in range(size // 2):
                rows[head * size + i] = array[head * size + 2 * i]
                rows[head * size + size // 2 + i] = array[head * size + 2 * i + 1]
        return rows
    return array


@pytest.mark.parametrize("name", CASES)
def test_tensors(name: str, bpe: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CASES[name])
    found = read_tensors(write(tmp_path / "m.gguf", model, bpe))
    for key, tensor in hf_tensors(model):
        kind, array = found.pop(their_name(CASES[name]["model_type"], key))
        assert kind == "F32"
        # Norm weights plus one and minus one again are rounded twice.
        near = 1e-6 if "gemma" in name and "norm" in key else 0.0
        assert np.abs(back(model, key, array) - tensor.numpy()).max() <= near
    factors = found.pop("rope_freqs.weight", None)
    assert found == {}
    assert (factors is not None) == (name == "llama-3")
    if factors is not None:
        from afina.engine.rope_tables import inverse_frequencies

        rope = model.config.ropes[0]
        plain = rope.theta ** -(torch.arange(0, rope.dim, 2) / rope.dim)
        assert torch.allclose(plain / torch.from_numpy(factors[1].copy()), inverse_frequencies(rope), rtol=1e-5)


def test_dtypes(bpe: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CASES["qwen2"] | {"hidden_size": 96, "intermediate_size": 72})
    files = {dtype: read_tensors(write(tmp_path / dtype, model, bpe, dtype)) for dtype in ("f16", "bf16", "q8_0")}
    for key, tensor in hf_tensors(model):
        name = their_name("qwen2", key)
        (f16, halves), (bf16, brains), (q8, bytes_) = (files[dtype][name] for dtype in ("f16", "bf16", "q8_0"))
        if tensor.dim() == 1:
            assert (f16, bf16, q8) == ("F32",) * 3
            assert np.array_equal(bytes_, tensor.numpy())
            continue
        assert (f16, bf16, q8) == ("F16", "BF16", "F16" if "down_proj" in key else "Q8_0")  # rows of 72 do not divide
        assert np.array_equal(halves, tensor.half().float().numpy())
        assert np.array_equal(brains, tensor.bfloat16().float().numpy())
        if q8 == "Q8_0":
            blocks = tensor.reshape(-1, 32).numpy()
            largest = np.abs(blocks).max(axis=1, keepdims=True)
            # Half a step, and the step itself rounded to float16.
            assert (np.abs(bytes_.reshape(-1, 32) - blocks) <= largest * (0.5 / 127 + 2**-11) * 1.001).all()
            assert np.abs(bytes_.reshape(-1, 32) - blocks).max() > 0
    kinds = {dtype: read_config(tmp_path / dtype)["general.file_type"] for dtype in files}
    assert kinds == {"f16": 1, "bf16": 32, "q8_0": 7}
    assert read_tensors(write(tmp_path / "g", random_model(GPT2), bpe, "q8_0"))["position_embd.weight"][0] == "F32"


def test_bfloat16_weights_keep_their_bits(bpe: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CASES["qwen3"]).bfloat16()
    found = read_tensors(write(tmp_path / "m", model, bpe, "bfloat16"))
    for key, tensor in hf_tensors(model):
        assert np.array_equal(found[their_name("qwen3", key)][1], tensor.float().numpy())


def test_weights_stream(bpe: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CASES["llama"])
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for name, tensor in hf_tensors(model):
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy
            most = max(most, sum(ref() is not None for ref in alive))

    write_gguf(tmp_path / "m", model.hf_config, tensors, bpe, dtype="f16")
    assert most <= 1


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70000.0), ("float16", math.nan), ("q8_0", 1e7)])
def test_too_large_for_the_dtype(dtype: str, value: float, bpe: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CASES["qwen2"])
    with torch.no_grad():
        model.layers[1].mlp.down.weight[3, 4] = value
    with pytest.raises(WeightsError, match=r"^model\.layers\.1\.mlp\.down_proj\.weight: holds .*dtype bfloat16$"):
        write(tmp_path / "m", model, bpe, dtype)
    assert not (tmp_path / "m").exists()  # not half a file


def test_weights_of_another_model(bpe: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CASES["qwen2"])
    less = [item for item in hf_tensors(model) if "layers.2.mlp.up" not in item[0]]
    more = [*hf_tensors(model), ("model.extra.weight", torch.zeros(3))]
    for some, match in (
        (less, r"layers\.2\.mlp\.up_proj\.weight is missing"),
        (more, "extra.weight belongs to no such"),
    ):
        with pytest.raises(WeightsError, match=match):
            write_gguf(tmp_path / "m", model.hf_config, lambda some=some: iter(some), bpe, dtype="f16")


def test_cannot_be_written(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be written"):
        write(tmp_path / "missing" / "m.gguf", random_model(CASES["llama"]), bpe)


# --- Config -----------------------------------------------------------------------------------------------------------


def test_config_llama(bpe: Tokenizer, tmp_path: Path) -> None:
    found = read_config(write(tmp_path / "m", random_model(CASES["llama-3"]), bpe))
    expected = {
        "context_length": 256, "embedding_length": 64, "block_count": 3, "feed_forward_length": 72, "vocab_size": 328,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 24,
        "attention.value_length": 24, "rope.dimension_count": 24, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }  # fmt: skip
    assert {k.removeprefix("llama."): v for k, v in found.items() if k.startswith("llama.")} == expected
    assert (found["general.architecture"], found["general.type"], found["general.file_type"]) == ("llama", "model", 0)


def test_config_rope(bpe: Tokenizer, tmp_path: Path) -> None:
    def scaling(name: str) -> dict[str, Any]:
        found = read_config(write(tmp_path / name, random_model(CASES[name]), bpe))
        return {key.split(".", 1)[1]: value for key, value in found.items() if ".rope." in key}

    linear = {
        "rope.dimension_count": 16,
        "rope.freq_base": 1e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4,
    }
    assert scaling("llama-linear") == linear
    yarn = {
        "rope.dimension_count": 16, "rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 8,
        "rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.0,
    }  # fmt: skip
    assert scaling("qwen2-yarn") == yarn
    own = 0.1 * math.log(4) + 1
    assert scaling("qwen3")["rope.scaling.attn_factor"] == pytest.approx(1.5 / own)


def test_config_gemma(bpe: Tokenizer, tmp_path: Path) -> None:
    two = read_config(write(tmp_path / "2", random_model(CASES["gemma2"]), bpe))
    assert two["gemma2.attention.sliding_window"] == 8
    assert "gemma2.attention.sliding_window_pattern" not in two  # every second, as llama.cpp knows
    assert (two["gemma2.attn_logit_softcapping"], two["gemma2.final_logit_softcapping"]) == (2.0, 3.0)
    three = read_config(write(tmp_path / "3", random_model(CASES["gemma3_text"]), bpe))
    assert three["gemma3.attention.sliding_window_pattern"] == [True, False, True]
    assert (three["gemma3.rope.freq_base"], three["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
    assert three["gemma3.rope.scaling.factor"] == 8.0
    assert "gemma3.final_logit_softcapping" not in three
    assert "gemma3.attention.sliding_window_pattern" not in read_config(
        write(tmp_path / "6", random_model(CASES["gemma3-6"]), bpe)
    )


LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED = [
    (BASE | {"model_type": "olmo2"}, "model_type = 'olmo2': gguf is for llama, .*convert_hf_to_gguf"),
    (CASES["mistral"] | {"sliding_window": 8}, "sliding_window = 8: .*max_position_embeddings to 8"),
    (CASES["qwen2"] | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window = 8"),
    (CASES["llama"] | {"rope_scaling": LONG}, "RoPE of type 'longrope'"),
    (CASES["qwen3"] | {"rope_scaling": ROPE | {"original_max_position_embeddings": 32}}, "RoPE of type 'llama3'"),
    (CASES["gemma2"] | {"rope_scaling": YARN}, "RoPE of type 'yarn'"),
    (CASES["qwen3"] | {"rope_scaling": YARN | {"beta_fast": 16.0}}, "YaRN with other than beta_fast 32"),
    (CASES["qwen3"] | {"rope_scaling": YARN | {"truncate": False}}, "YaRN with other than beta_fast 32"),
    (CASES["qwen3"] | {"attention_bias": True}, "attention_bias = true"),
    (CASES["gemma3_text"] | {"attention_bias": True}, "attention_bias = true"),
    (CASES["qwen2"] | {"head_dim": 32}, "head_dim = 32: llama.cpp's qwen2 takes hidden_size / num_attention_heads"),
    (GPT2 | {"activation_function": "gelu"}, "activation_function = 'gelu'"),
    (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights = false"),
    (CASES["gemma2"] | {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar = 24: .* computes with 32"),
    (CASES["gemma2"] | {"num_hidden_layers": 46}, "query_pre_attn_scalar = 32: .* computes with 16"),
    (CASES["gemma2"] | {"attn_logit_softcapping": None}, "attn_logit_softcapping = None"),
    (CASES["gemma2"] | {"final_logit_softcapping": None}, "final_logit_softcapping = None"),
    (CASES["gemma2"] | {"tie_word_embeddings": False}, "tie_word_embeddings = false"),
    (
        GEMMA | {"model_type": "gemma3_text", "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        }},
        "scaled RoPE in sliding layers",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_what_llama_cpp_does_not_compute(config: dict[str, Any], message: str, bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        write_gguf(tmp_path / "m", config, lambda: iter(()), bpe, dtype="f16")
    assert "\n" not in str(found.value)
    assert "--to hf" in str(found.value)
    assert not (tmp_path / "m").exists()


def test_windows_that_change_nothing(bpe: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "m", random_model(CASES["mistral"] | {"sliding_window": 256}), bpe)


def test_dtype_unknown(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype = 'q8': expected float32, .*did you mean"):
        write(tmp_path / "m", random_model(CASES["llama"]), bpe, "q8")


def test_without_the_package(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CASES["llama"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (lambda: write(tmp_path / "m", model, bpe), lambda: read_vocabulary(tmp_path / "m")):
        with pytest.raises(ConfigError, match=r"pip install 'afina\[gguf\]'$"):
            call()


def test_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no row among the model's 328 embeddings"):
        write(tmp_path / "m", random_model(CASES["llama"]), load_tokenizer("afina-tiny"))


# --- llama.cpp itself -------------------------------------------------------------------------------------------------


def their_logits(path: Path, ids: list[int]) -> Tensor:
    llama_cpp = pytest.importorskip("llama_cpp")
    # The KV cache in float32, or it alone would make the difference.
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(path), logits_all=True, n_ctx=128, verbose=False, n_threads=1, **cache)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.mark.parametrize("name", CASES)
def test_logits_of_llama_cpp(name: str, bpe: Tokenizer, tmp_path: Path) -> None:
    model = random_model(CASES[name])
    ids = torch.randint(0, 300, (100,), generator=torch.Generator().manual_seed(2))
    theirs = their_logits(write(tmp_path / "m.gguf", model, bpe), ids.tolist())
    with torch.no_grad():
        ours = model(ids[None])[0]
    error = float((ours - theirs).abs().max() / ours.abs().max())
    print(f"{name}: {error:.1e}")
    # llama.cpp looks GELU up in a table of float16.
    assert error < (2e-3 if "gemma" in name or "gpt2" in name else 1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("f32", 1e-4), ("f16", 5e-3), ("bf16", 2e-2), ("q8_0", 5e-2)])
def test_afina_tiny_in_llama_cpp(dtype: str, limit: float, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = load_model("afina-tiny", dtype="float32", device="cpu"), load_tokenizer("afina-tiny")
    path = write(tmp_path / "m.gguf", model, tokenizer, dtype)
    text = tokenizer.render([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special=False)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    error = float((ours - their_logits(path, ids)).abs().max() / ours.abs().max())
    print(f"afina-tiny {dtype}: {error:.1e}")
    assert error < limit
    theirs = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, n_threads=1)
    for sample in TEXTS:
        assert theirs.tokenize(sample.encode(), special=True) == tokenizer.encode(sample), sample
    answer = theirs.create_completion(text, max_tokens=32, temperature=0.0)["choices"][0]["text"]
    if dtype == "f32":
        question = [{"role": "user", "content": "What is the capital of France?"}]
        assert answer == afina.generate(model, tokenizer, question, max_new_tokens=32, temperature=0.0)
