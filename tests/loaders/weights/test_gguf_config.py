"""The config of a GGUF file: what was written comes back, and every key is honoured or refused by its name."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import (
    ARRAY,
    BOOL,
    CASES,
    FLOAT32,
    FLOAT64,
    INT32,
    STRING,
    UINT32,
    UINT64,
    Field,
    Raw,
    build,
    byte_level_bpe,
    edit,
    parts,
    random_model,
    write,
)
from hf_models import transformers

from afina.engine.model_config import ModelConfig
from afina.engine.weights import load_model, new_model
from afina.errors import AfinaError, ConfigError, WeightsError
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.weights.gguf_config import read_config
from afina.loaders.weights.gguf_file import GGUFFile


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The file of a case, made once."""
    folder, bpe = tmp_path_factory.mktemp("written"), byte_level_bpe()

    def get(name: str) -> bytes:
        path = folder / f"{name}.gguf"
        return (path if path.exists() else write(path, random_model(CASES[name]), bpe)).read_bytes()

    return get


@pytest.fixture
def file(written: Callable[[str], bytes], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the file of a case with other fields or tensors."""

    def make(name: str, *arguments: Any) -> Path:
        (tmp_path / "m.gguf").write_bytes(written(name))
        return edit(tmp_path / "m.gguf", *arguments)

    return make


def config_of(path: Path) -> ModelConfig:
    return ModelConfig.from_hf(read_config(GGUFFile(path)))


def refused(path: Path) -> str:
    with pytest.raises((ConfigError, WeightsError)) as caught:
        read_config(GGUFFile(path))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_comes_back(name: str, file: Callable[..., Path]) -> None:
    assert config_of(file(name)) == ModelConfig.from_hf(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_from_it(name: str, file: Callable[..., Path]) -> None:
    """As a config of its own it gives transformers' model the same sizes, rotary frequencies, windows and caps."""
    hf = read_config(GGUFFile(file(name)))
    ours, theirs = (transformers.AutoConfig.for_model(**config).to_dict() for config in (hf, CASES[name]))
    for config in (ours, theirs):
        for key in ("architectures", "bos_token_id", "eos_token_id", "pad_token_id"):
            config.pop(key, None)
    differ = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    # Said in full, where the config of the case left it to transformers: with the same meaning.
    assert differ <= {"head_dim", "rope_scaling", "rope_local_base_freq", "n_inner", "model_type", "sliding_window"}


def test_end_tokens_come_from_the_vocabulary(file: Callable[..., Path]) -> None:
    hf = read_config(GGUFFile(file("llama", {"tokenizer.ggml.bos_token_id": (UINT32, 3)})))
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (3, 0, None)
    hf = read_config(GGUFFile(file("llama", {"tokenizer.ggml.bos_token_id": (UINT32, 1000)})))
    assert hf["bos_token_id"] is None


# What llama.cpp takes for keys that are not there, and other ways to say the same.
SAME: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"llama.rope.dimension_count": None}),
    ("llama", {"llama.attention.key_length": None, "llama.attention.value_length": None}),
    ("llama", {"llama.rope.freq_base": None}),
    ("llama", {"llama.vocab_size": None}),
    ("llama", {"llama.rope.scaling.type": (STRING, "none"), "llama.rope.scaling.factor": (FLOAT32, 4.0)}),
    ("llama", {"llama.rope.scaling.finetuned": (BOOL, True)}),
    ("llama", {"llama.expert_count": (UINT32, 0), "llama.expert_used_count": (UINT32, 0)}),
    ("llama", {"llama.attention.scale": (FLOAT32, 0.25), "llama.attention.causal": (BOOL, True)}),
    ("llama", {"llama.attention.scale": (FLOAT32, 0.0)}),
    ("llama", {"llama.attention.sliding_window": (UINT32, 256)}),
    ("llama", {"llama.tensor_data_layout": (STRING, "Meta AI original pth"), "split.count": (UINT32, 1)}),
    ("llama-linear", {"llama.rope.scaling.type": None}),
    ("llama-linear", {"llama.rope.scaling.factor": None, "llama.rope.scale_linear": (FLOAT32, 4.0)}),
    ("qwen2-yarn", {"qwen2.rope.scaling.attn_factor": None, "qwen2.rope.scaling.yarn_ext_factor": (FLOAT32, 1.0)}),
    ("qwen2-yarn", {f"qwen2.rope.scaling.yarn_beta_{k}": (FLOAT32, v) for k, v in (("fast", 32.0), ("slow", 1.0))}),
    ("gemma2", {"gemma2.attention.sliding_window_pattern": (UINT32, 2)}),
    ("gemma3-6", {"gemma3.attention.sliding_window_pattern": (UINT32, 6), "gemma3.rope.freq_base_swa": None}),
    ("gpt2", {"gpt2.attention.head_count_kv": (UINT32, 4), "gpt2.attention.key_length": (UINT32, 16)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), SAME, ids=[f"{name} {', '.join(keys)}"[:60] for name, keys in SAME])
def test_other_ways_to_say_the_same(name: str, fields: dict[str, Any], file: Callable[..., Path]) -> None:
    assert config_of(file(name, fields)) == ModelConfig.from_hf(CASES[name])


def test_what_is_honoured(file: Callable[..., Path]) -> None:
    def changed(name: str, fields: dict[str, Any]) -> ModelConfig:
        return config_of(file(name, fields))

    assert changed("gemma2", {"gemma2.attn_logit_softcapping": None}).attention_softcap == 50.0
    assert changed("gemma2", {"gemma2.final_logit_softcapping": None}).logit_softcap == 30.0
    assert changed("gemma2", {"gemma2.attention.sliding_window": None}).layer_windows == (4096, None, 4096)
    assert changed("gemma3-6", {"gemma3.attention.sliding_window": None}).layer_windows == (None,) * 6
    assert changed("gemma3-6", {"gemma3.final_logit_softcapping": (FLOAT32, 7.0)}).logit_softcap == 7.0
    pattern = {"gemma3.attention.sliding_window_pattern": (UINT32, 2)}
    assert changed("gemma3-6", pattern).layer_windows == (8, None) * 3
    assert changed("gemma3-6", pattern).layer_ropes == (1, 0) * 3
    assert changed("gemma3-6", {"gemma3.rope.freq_base_swa": (FLOAT32, 500.0)}).ropes[1].theta == 500.0
    fast = changed("qwen2-yarn", {"qwen2.rope.scaling.yarn_beta_fast": (FLOAT32, 16.0)})
    assert (fast.ropes[0].beta_fast, fast.ropes[0].beta_slow) == (16.0, 1.0)
    assert changed("qwen2-yarn", {"qwen2.rope.scaling.original_context_length": None}).ropes[0].kind == "yarn"
    assert changed("llama", {"llama.attention.layer_norm_rms_epsilon": (FLOAT32, 3e-7)}).norm_eps == 3e-7


def bools(*values: bool) -> tuple[int, Any]:
    return ARRAY, (BOOL, list(values))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"general.architecture": None}, "general.architecture is missing: supported: llama, qwen2,"),
    ("llama", {"general.architecture": (STRING, "lama")}, "general.architecture = 'lama' (did you mean 'llama'?)"),
    ("llama", {"general.architecture": (STRING, "mamba")}, "general.architecture = 'mamba'"),
    ("llama", {"general.architecture": (UINT32, 3)}, "general.architecture = 3"),
    ("llama", {"general.type": (STRING, "adapter")}, "general.type = 'adapter': expected 'model'"),
    ("llama", {"split.count": (UINT32, 3)}, "split.count = 3, expected 1: join the parts with llama-gguf-split"),
    ("llama", {"llama.block_count": None}, "llama.block_count is missing: expected a whole number"),
    ("llama", {"llama.block_count": (UINT32, 0)}, "llama.block_count = 0"),
    ("llama", {"llama.block_count": (UINT32, 10**9)}, "llama.block_count = 1000000000: the file holds 30 tensors"),
    ("llama", {"llama.embedding_length": (FLOAT32, 64.0)}, "llama.embedding_length = 64.0: expected a whole number"),
    ("llama", {"llama.embedding_length": (INT32, -64)}, "llama.embedding_length = -64"),
    ("llama", {"llama.context_length": None}, "llama.context_length is missing"),
    ("llama", {"llama.attention.head_count": (ARRAY, (INT32, [4, 4, 2]))}, "llama.attention.head_count = [4, 4, 2]"),
    ("llama", {"llama.attention.head_count": (BOOL, True)}, "llama.attention.head_count = True"),
    ("llama", {"llama.attention.head_count_kv": (UINT32, 3)}, "4 attention heads do not divide into 3"),
    (
        "llama",
        {"llama.attention.head_count": (UINT32, 3), "llama.attention.key_length": None},
        "llama.embedding_length = 64: not divisible by the 3 heads",
    ),
    ("llama", {"llama.attention.value_length": (UINT32, 8)}, "llama.attention.value_length = 8: not supported"),
    ("llama", {"llama.rope.dimension_count": (UINT32, 8)}, "llama.rope.dimension_count = 8: not supported"),
    ("llama", {"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    ("llama", {"llama.attention.layer_norm_rms_epsilon": (FLOAT32, float("nan"))}, "epsilon = nan: expected a number"),
    ("llama", {"llama.rope.freq_base": (FLOAT32, float("inf"))}, "llama.rope.freq_base = inf"),
    ("llama", {"llama.rope.freq_base": (FLOAT64, 5e-324)}, "llama.rope.freq_base = 5e-324"),
    ("llama", {"llama.rope.freq_base": (STRING, "1e4")}, "llama.rope.freq_base = '1e4'"),
    ("llama", {"llama.rope.scaling.type": (STRING, "longrope")}, "rope.scaling.type = 'longrope': supported: none, li"),
    ("llama", {"llama.rope.scaling.type": (STRING, "llama3")}, "rope.scaling.type = 'llama3'"),
    ("gemma2", {"gemma2.rope.scaling.type": (STRING, "yarn")}, "gemma2.rope.scaling.type = 'yarn'"),
    ("llama", {"llama.rope.scaling.attn_factor": (FLOAT32, 1.5)}, "attn_factor = 1.5: supported with"),
    ("qwen2-yarn", {"qwen2.rope.scaling.yarn_ext_factor": (FLOAT32, 0.5)}, "yarn_ext_factor = 0.5: not supported"),
    ("qwen2-yarn", {"qwen2.rope.scaling.yarn_log_multiplier": (FLOAT32, 0.1)}, "yarn_log_multiplier = 0.1: unknown"),
    (
        "llama-3",
        {"llama.rope.scaling.type": (STRING, "linear"), "llama.rope.scaling.factor": (FLOAT32, 2.0)},
        "llama.rope.scaling.type = 'linear': two scalings at once, this one and the tensor rope_freqs.weight",
    ),
    ("llama", {"llama.attention.sliding_window": (UINT32, 8)}, "llama.attention.sliding_window = 8: llama.cpp's llama"),
    ("qwen3", {"qwen3.attention.sliding_window": (UINT32, 8)}, "qwen3.attention.sliding_window = 8"),
    ("llama", {"llama.expert_count": (UINT32, 8)}, "llama.expert_count = 8: not supported (it changes the maths)"),
    ("llama", {"llama.attention.scale": (FLOAT32, 0.3)}, "llama.attention.scale = 0.3: not supported; supported: 0.25"),
    ("gemma2", {"gemma2.attention.scale": (FLOAT32, 0.3)}, "gemma2.attention.scale = 0.3"),
    ("llama", {"llama.attention.causal": (BOOL, False)}, "llama.attention.causal = False"),
    ("llama", {"llama.logit_scale": (FLOAT32, 2.0)}, "llama.logit_scale = 2.0: unknown key, refused because"),
    ("llama", {"llama.atention.head_count": (UINT32, 4)}, "(did you mean 'llama.attention.head_count'?)"),
    ("llama", {"llama.attn_logit_softcapping": (FLOAT32, 50.0)}, "llama.attn_logit_softcapping = 50.0: unknown key"),
    ("gemma3-6", {"gemma3.attn_logit_softcapping": (FLOAT32, 50.0)}, "gemma3.attn_logit_softcapping = 50.0: unknown"),
    ("gemma2", {"gemma2.attn_logit_softcapping": (FLOAT32, 0.0)}, "gemma2.attn_logit_softcapping = 0.0"),
    ("gemma3-6", {"gemma3.attention.sliding_window_pattern": bools(True)}, "expected a period, or a list of 6 bools"),
    ("gemma3-6", {"gemma3.attention.sliding_window_pattern": (UINT32, 0)}, "sliding_window_pattern = 0"),
    ("gpt2", {"gpt2.attention.head_count_kv": (UINT32, 2)}, "gpt2.attention.head_count_kv = 2"),
    ("gpt2", {"gpt2.attention.key_length": (UINT32, 8)}, "gpt2.attention.key_length = 8"),
    ("gpt2", {"gpt2.rope.freq_base": (FLOAT32, 1e4)}, "gpt2.rope.freq_base = 10000.0: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "expected"), REFUSED, ids=[expected[:50] for *_, expected in REFUSED])
def test_refused(name: str, fields: dict[str, Any], expected: str, file: Callable[..., Path]) -> None:
    path = file(name, fields)
    if "do not divide" in expected:  # the model's own check, which comes when one is made
        with pytest.raises(ConfigError, match=expected):
            load_model(path)
    else:
        assert expected in refused(path)


def test_every_key_that_is_written_is_needed_or_has_a_default(file: Callable[..., Path]) -> None:
    """No key of the architecture is read and thrown away: with another value the config is another, or refused."""
    for name in ("llama", "qwen2-yarn", "gemma2", "gemma3_text", "gpt2"):
        path = file(name)
        expected, fields = config_of(path), GGUFFile(path).fields
        arch = fields["general.architecture"]
        for key, value in fields.items():
            if not key.startswith(f"{arch}."):
                continue
            if isinstance(value, str):
                other: tuple[int, Any] = (STRING, "none")
            elif not isinstance(value, int | float):
                other = bools(*(not one for one in value.tolist()))
            else:
                other = (FLOAT32, value * 1.5) if isinstance(value, float) else (UINT32, value * 2)
            changed = file(name, {key: other})
            found = None
            with contextlib.suppress(ConfigError, WeightsError):
                found = config_of(changed)
            assert found != expected, key


def test_a_vocabulary_alone_is_no_model(file: Callable[..., Path]) -> None:
    assert "holds no tensors: a vocabulary alone is no model" in refused(file("llama", None, dict.clear))
    no_embedding = refused(file("llama", None, lambda tensors: tensors.pop("token_embd.weight")))
    assert "holds no tensor token_embd.weight" in no_embedding


def test_biases_are_known_by_the_tensors(file: Callable[..., Path]) -> None:
    def without(tensors: dict[str, Raw]) -> None:
        for name in [name for name in tensors if name.endswith(".bias")]:
            del tensors[name]

    assert (config_of(file("llama-3")).qkv_bias, config_of(file("llama-3")).mlp_bias) == (True, True)
    plain = config_of(file("llama-3", None, without))
    assert (plain.qkv_bias, plain.o_bias, plain.mlp_bias) == (False, False, False)


def test_gemma_27b_scales_by_another_rule(tmp_path: Path) -> None:
    bpe: Tokenizer = byte_level_bpe()
    config = CASES["gemma2"] | {"num_hidden_layers": 46, "query_pre_attn_scalar": 16, "hidden_size": 64}
    path = write(tmp_path / "m.gguf", new_model(config, dtype="float32", device="cpu"), bpe)
    assert config_of(path).attention_scale == 16**-0.5
    assert torch.equal(load_model(path).norm.weight, torch.zeros(64))


ODD: list[tuple[int, Any]] = [
    *((UINT32, n) for n in (0, 1, 2, 3, 4, 7, 8, 16, 31, 64, 65, 72, 128, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1)),
    *((UINT64, n) for n in (1, 2**63, 2**64 - 1)), *((INT32, n) for n in (-1, -(2**31), 4)),
    *((FLOAT32, x) for x in (0.0, -1.0, 1e-38, 1e38, 0.5, 4.0, float("nan"), float("inf"))),
    *((FLOAT64, x) for x in (5e-324, 1e308, float("-inf"))), (BOOL, True), (BOOL, False),
    *((STRING, text) for text in ("", "none", "linear", "yarn", "llama3", "model", "é\n" * 300)),
    (ARRAY, (BOOL, [True, False, True])), (ARRAY, (INT32, [])), (ARRAY, (INT32, [4] * 3)), (ARRAY, (STRING, ["a"])),
]  # fmt: skip


@pytest.mark.slow
def test_fuzzed_configs(file: Callable[..., Path], tmp_path: Path) -> None:
    """3,000 models with other keys and shapes: loaded, or refused in one line, in bounded time."""
    rng = random.Random(0)
    loaded = 0
    start = time.process_time()
    for name in ("llama-3", "qwen2-yarn", "gemma2", "gemma3_text", "gpt2"):
        before, tensors = parts(file(name))
        sound = [field for field in before if not field.key.startswith("tokenizer.")]
        arch = next(field.value for field in sound if field.key == "general.architecture")
        more = ["attention.scale", "expert_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"]
        more += ["attention.sliding_window", "attention.sliding_window_pattern", "attention.causal", "new"]
        keys = [field.key for field in sound] + [f"{arch}.{key}" for key in more] + ["split.count"]
        for _ in range(600):
            fields, some = {field.key: field for field in sound}, dict(enumerate(tensors))
            for _ in range(rng.choice((1, 1, 2))):
                key = rng.choice(keys)
                if rng.random() < 0.2:
                    fields.pop(key, None)
                else:
                    fields[key] = Field(key, *rng.choice(ODD))
            if rng.random() < 0.3:
                number = rng.randrange(len(tensors))
                tensor = some.pop(number)
                if rng.random() < 0.5:
                    some[number] = tensor._replace(shape=tensor.shape[::-1], name=rng.choice(tensors).name + "x")
            (tmp_path / "fuzz.gguf").write_bytes(build(fields.values(), some.values()).data)
            try:
                load_model(tmp_path / "fuzz.gguf", weights=False)
                loaded += 1
            except AfinaError as problem:
                message = str(problem)
                assert "\n" not in message
                assert len(message) < 2000
    assert 100 < loaded < 2000, loaded
    assert time.process_time() - start < 90
