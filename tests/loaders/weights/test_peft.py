"""loaders/weights/peft.py: what adapter folders say, in PEFT's layout, and every way in which one is refused."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from afina.errors import AfinaError, ConfigError, WeightsError
from afina.loaders.weights.peft import (
    BASE_HASH,
    BASE_SAMPLE,
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    AdapterFile,
    write_adapter,
)

A, B, M = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight", "lora_magnitude_vector"
PEFT = "base_model.model."
HEAD = "lm_head.weight"


def tensors() -> dict[str, Tensor]:
    return {A: torch.ones(2, 3), B: torch.full((4, 2), 2.0), HEAD: torch.zeros(5, 3)}


def write(folder: Path, content: dict[str, Tensor] | None = None, /, **changes: Any) -> Path:
    """A folder as PEFT writes it, with changed keys in its config; None leaves one out."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    save_file({PEFT + k: v for k, v in (tensors() if content is None else content).items()}, folder / WEIGHTS)
    return folder


def refused(error: type[AfinaError], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    config = AdapterConfig(
        r=2, alpha=4.0, base="some/model", dropout=0.1, rslora=True, dora=False, target_modules=("q_proj",),
        modules_to_save=("lm_head",), rank_pattern={"layers.0.q_proj": 1}, alpha_pattern={"q_proj": 0.5},
    )  # fmt: skip
    out = tmp_path / "new" / "folder"
    write_adapter(out, config, tensors(), {BASE_HASH: "abc", BASE_SAMPLE: "def"})
    file = AdapterFile(out)
    assert file.config == config
    assert file.metadata == {"format": "pt", BASE_HASH: "abc", BASE_SAMPLE: "def"}
    assert file.lora == {"model.layers.0.q_proj": {"A": PEFT + A, "B": PEFT + B}}
    assert file.saved == {HEAD: PEFT + HEAD}
    for name, value in tensors().items():
        assert file.shape(PEFT + name) == value.shape
        assert torch.equal(file.read(PEFT + name), value)
    first = [(out / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    write_adapter(out, file.config, tensors(), {BASE_HASH: "abc", BASE_SAMPLE: "def"})
    assert [(out / name).read_bytes() for name in (CONFIG, WEIGHTS)] == first
    assert sorted(p.name for p in out.iterdir()) == [CONFIG, WEIGHTS]
    assert load_file(out / WEIGHTS).keys() == {PEFT + name for name in tensors()}
    # As PEFT writes a whole number and what there is nothing of.
    plain = json.loads((out / CONFIG).read_text())
    assert type(plain["lora_alpha"]) is int
    assert replace(config, modules_to_save=()).to_peft()["modules_to_save"] is None
    assert replace(config, alpha=0.5).to_peft()["lora_alpha"] == 0.5


def test_every_key_that_we_write_is_one_of_pefts() -> None:
    peft = pytest.importorskip("peft")
    ours = AdapterConfig(r=2, alpha=4).to_peft()
    theirs = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", inference_mode=True).to_dict()
    assert ours.keys() <= theirs.keys()
    ours_alone = {"target_modules", "base_model_name_or_path", "peft_type", "task_type"}
    rest = {k: v for k, v in ours.items() if k not in ours_alone}
    assert rest == {k: theirs[k] for k in rest}


def test_every_default_of_peft_is_accepted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    save_file({PEFT + k: v for k, v in tensors().items()}, tmp_path / WEIGHTS)
    assert AdapterFile(tmp_path).config == AdapterConfig(r=8, alpha=8, target_modules=("q_proj",))


def test_scales() -> None:
    plain = AdapterConfig(r=4, alpha=8, rank_pattern={"k_proj": 16}, alpha_pattern={"v_proj": 2})
    assert plain.scale("model.q_proj") == 2.0
    assert plain.scale("model.k_proj") == 0.5
    assert plain.scale("model.v_proj") == 0.5
    stable = replace(plain, rslora=True)
    assert stable.scale("model.q_proj") == 4.0
    assert stable.scale("model.k_proj") == 2.0
    assert stable.scale("model.v_proj") == 1.0


@pytest.mark.parametrize(
    ("pattern", "module", "hit"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("_proj", "model.layers.0.q_proj", False),
        ("layers.1.q_proj", "model.layers.1.q_proj", True),
        ("layers.1.q_proj", "model.layers.11.q_proj", False),
        ("layers", "model.layers.1.q_proj", False),
        ("^model.layers.1.q_proj", "model.layers.1.q_proj", True),
        ("^layers.1.q_proj", "model.layers.1.q_proj", False),
        (r"layers\.\d\.q_proj$", "model.layers.1.q_proj", True),
        (r"layers\.\d\.q_proj", "model.layers.11.q_proj", False),
        ("q.proj", "model.q_proj", True),
    ],
)  # fmt: skip
def test_patterns_match_as_in_peft(pattern: str, module: str, hit: bool, tmp_path: Path) -> None:
    file = AdapterFile(write(tmp_path, rank_pattern={pattern: 7}))
    assert (file.config.rank(module) == 7) is hit
    other = pytest.importorskip("peft.utils.other")
    assert (other.get_pattern_key([pattern], module) == pattern) is (hit or pattern == module)


def test_the_first_pattern_that_matches_counts() -> None:
    config = AdapterConfig(r=4, alpha=8, rank_pattern={"q_proj": 2, "layers.0.q_proj": 3})
    assert config.rank("layers.0.q_proj") == 2


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("peft_type", "PROMPT_TUNING", "peft_type = 'PROMPT_TUNING': supported here: LORA"),
        ("peft_type", ..., "peft_type = None"),
        ("peft_type", ["LORA"], "peft_type"),
        ("bias", "lora_only", "bias = 'lora_only': trained biases are not supported"),
        ("bias", "all", "bias"),
        ("lora_bias", True, "lora_bias = True: not supported"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa': changes the base too"),
        ("init_lora_weights", "pissa_niter_16", "init_lora_weights"),
        ("init_lora_weights", "olora", "init_lora_weights"),
        ("init_lora_weights", "loftq", "init_lora_weights"),
        ("init_lora_weights", [1], "init_lora_weights"),
        ("use_qalora", True, "use_qalora = True: not supported"),
        ("layer_replication", [[0, 1]], "layer_replication"),
        ("trainable_token_indices", [1], "trainable_token_indices"),
        ("target_parameters", ["x"], "target_parameters"),
        ("a_new_key", 1, "a_new_key = 1: not supported"),
        ("a\nkey", 1, r"'a\\nkey' = 1: not supported"),
        ("k" * 9999, 1, "kkk.* = 1: not supported"),
        ("r", 0, "r = 0: expected a whole number from 1 to 65536"),
        ("r", -1, "r = -1"),
        ("r", 2.0, r"r = 2\.0"),
        ("r", True, "r = True"),
        ("r", "8", "r = '8'"),
        ("r", None, "r = None"),
        ("r", 10**9, "r = 1000000000"),
        ("lora_alpha", True, "lora_alpha = True"),
        ("lora_alpha", "16", "lora_alpha"),
        ("lora_alpha", 1e300, "lora_alpha"),
        ("lora_alpha", 10**400, "lora_alpha"),
        ("lora_dropout", 1, "lora_dropout = 1: expected a number from 0 to below 1"),
        ("lora_dropout", -0.1, "lora_dropout"),
        ("lora_dropout", False, "lora_dropout"),
        ("lora_dropout", 10**400, "lora_dropout"),
        ("use_rslora", 1, "use_rslora = 1: expected true or false"),
        ("use_dora", "yes", "use_dora"),
        ("fan_in_fan_out", 0, "fan_in_fan_out"),
        ("target_modules", 7, "target_modules"),
        ("target_modules", [7], "target_modules"),
        ("modules_to_save", {"a": 1}, "modules_to_save"),
        ("base_model_name_or_path", 7, "base_model_name_or_path"),
        ("rank_pattern", [1], "rank_pattern"),
        ("rank_pattern", {"q_proj": True}, "rank_pattern"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern"),
        ("rank_pattern", {"q_proj": 1.5}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": "1"}, "alpha_pattern"),
        ("alpha_pattern", {"q_proj": True}, "alpha_pattern"),
        ("alpha_pattern", {"q_proj": 10**400}, "alpha_pattern"),
        ("alpha_pattern", {"(a+)+b": 1}, "the pattern '.*' is not supported: expected names"),
        ("alpha_pattern", {".*.*.*.*q": 1}, "is not supported"),
        ("alpha_pattern", {"a\\": 1}, "is not supported"),
        ("alpha_pattern", {"\\1": 1}, "is not supported"),
        ("alpha_pattern", {"\\Q": 1}, "is not supported"),
        ("alpha_pattern", {"a)": 1}, "is not supported"),
        ("alpha_pattern", {"": 1}, "is not supported"),
        ("alpha_pattern", {"q" * 201: 1}, "is not supported"),
        ("alpha_pattern", {f"m{i}": 1 for i in range(10_001)}, "has 10,001 entries: expected at most 10,000"),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_config_that_cannot_be_honoured_is_refused(key: str, value: Any, match: str, tmp_path: Path) -> None:
    write(tmp_path)
    AdapterFile(tmp_path)
    write(tmp_path, **{key: value})
    refused(ConfigError, match, lambda: AdapterFile(tmp_path))
    refused(ConfigError, CONFIG, lambda: AdapterFile(tmp_path))


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_first_weights_that_leave_the_base_as_it_is_are_accepted(value: Any, tmp_path: Path) -> None:
    AdapterFile(write(tmp_path, init_lora_weights=value))


def test_many_patterns_are_read_fast(tmp_path: Path) -> None:
    patterns = {f"layers.{i}.{'.' * 150}q_proj": 1 for i in range(2_000)}
    config = AdapterFile(write(tmp_path, rank_pattern=patterns)).config
    start = time.perf_counter()
    for layer in range(40):
        assert config.rank(f"model.layers.{layer}.self_attn.q_proj") == 2
    assert time.perf_counter() - start < 5


CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "no B": ({A: torch.ones(2, 3)}, {}, "module 'model.layers.0.q_proj' has A, expected A, B"),
    "no A": ({B: torch.ones(2, 3)}, {}, "has B, expected A, B"),
    "no magnitude": (tensors(), {"use_dora": True}, r"has A, B, expected A, B, magnitude \(use"),
    "magnitude": (tensors() | {f"model.layers.0.q_proj.{M}": torch.ones(4)}, {}, r"magnitude, expected A, B \(use"),
    "embedding": ({"model.embed_tokens.lora_embedding_A": torch.ones(2, 3)}, {}, "embeddings train whole"),
    "bias": (tensors() | {"model.layers.0.q_proj.lora_B.bias": torch.ones(4)}, {}, r"lora_B.bias' is not supported"),
    "adapter name": ({"x.lora_A.default.weight": torch.ones(2, 3)}, {}, "is not supported"),
    "nothing": ({}, {}, "holds no weights at all"),
    "twice": (tensors() | {f"modules_to_save.{HEAD}": torch.ones(1), f"x.modules_to_save.{HEAD}": torch.ones(1),
                           f"x.{HEAD}": torch.ones(1)}, {}, "comes twice, by two names"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "changes", "match"), CASES.values(), ids=CASES)
def test_weights_that_are_no_lora_are_refused(
    content: dict[str, Tensor], changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(WeightsError, match, lambda: AdapterFile(write(tmp_path, content, **changes)))


def test_a_tensor_that_comes_with_and_without_the_prefix_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    content = load_file(tmp_path / WEIGHTS)
    save_file(content | {A: torch.zeros(2, 3)}, tmp_path / WEIGHTS)
    refused(WeightsError, f"{A}' comes twice", lambda: AdapterFile(tmp_path))


def test_both_spellings_of_the_magnitude_are_read(tmp_path: Path) -> None:
    for spelling in M, f"{M}.weight":
        content = tensors() | {f"model.layers.0.q_proj.{spelling}": torch.ones(4)}
        file = AdapterFile(write(tmp_path, content, use_dora=True))
        assert file.lora["model.layers.0.q_proj"]["magnitude"] == f"{PEFT}model.layers.0.q_proj.{spelling}"


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refused(WeightsError, "a pickle, which can run code and is never opened: convert it", lambda: AdapterFile(tmp_path))
    (tmp_path / "adapter_model.bin").unlink()
    refused(WeightsError, f"no {WEIGHTS}: save it again", lambda: AdapterFile(tmp_path))
    (tmp_path / CONFIG).unlink()
    refused(ConfigError, f"{CONFIG}: no such file", lambda: AdapterFile(tmp_path))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x00" * 8, b"\xff" * 100, (10).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (2).to_bytes(8, "little") + b"{}" + b"\x00", (9).to_bytes(8, "little") + b'{"a": {}}',
     (25).to_bytes(8, "little") + b'{"__metadata__":{"a":12}}', b"version https://git-lfs", b"PK\x03\x04" * 9],
)  # fmt: skip
def test_a_damaged_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(raw)
    refused(WeightsError, WEIGHTS, lambda: AdapterFile(tmp_path))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_neither_read_nor_written(bad: float, tmp_path: Path) -> None:
    content = tensors()
    content[B][3, 1] = bad
    file = AdapterFile(write(tmp_path / "theirs", content))
    refused(WeightsError, "lora_B.weight' holds NaN or Inf: use an earlier adapter", lambda: file.read(PEFT + B))
    config = AdapterConfig(r=2, alpha=4)
    refused(
        WeightsError, "lora_B.weight' holds NaN or infinity", lambda: write_adapter(tmp_path / "o", config, content, {})
    )
    assert not (tmp_path / "o").exists()
    # An adapter already there stays as it was.
    before = (tmp_path / "theirs" / WEIGHTS).read_bytes()
    with pytest.raises(WeightsError):
        write_adapter(tmp_path / "theirs", config, content, {})
    assert (tmp_path / "theirs" / WEIGHTS).read_bytes() == before


def test_a_folder_that_cannot_be_written_is_a_weights_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = AdapterConfig(r=2, alpha=4)
    for folder in tmp_path / "file", tmp_path / "file" / "below":
        refused(WeightsError, "cannot be made", lambda folder=folder: write_adapter(folder, config, tensors(), {}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from([10**400, "LORA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATTERN = st.dictionaries(st.text("ab.^$\\d(*+)1q_\n", max_size=8), st.integers(1, 9) | st.floats(0, 2), max_size=3)
KEYS = [*AdapterConfig(r=1, alpha=1).to_peft(), "lora_bias", "layers_to_transform"]


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), JSON, max_size=4),
    st.dictionaries(st.sampled_from(["rank_pattern", "alpha_pattern"]), PATTERN),
)
def test_whatever_a_config_holds_it_is_read_or_refused(changes: dict[str, Any], patterns: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), **{**changes, **patterns})
        try:
            config = AdapterFile(folder).config
        except AfinaError as problem:
            config, message = None, str(problem)
        else:
            message = ""
        assert "\n" not in message
        if config is None:
            return
        for module in "model.layers.0.q_proj", "b", "":
            assert 1 <= config.rank(module) <= 65_536
            assert math.isfinite(config.scale(module))
        # What was read can be written and read again.
        write_adapter(folder, config, tensors(), {})
        assert AdapterFile(folder).config == config
