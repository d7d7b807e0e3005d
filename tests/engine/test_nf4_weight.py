"""NF4 weights: held by the model, made while loading, read from bitsandbytes' checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes_files import BNB, STATE, Tensors, by_hand, is_matrix, pack, state_of, state_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from afina.engine import weights
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.nf4_weight import BITS, NF4Weight, by_heads
from afina.engine.weights import check_memory, hf_tensors, load_model, new_model, save_model
from afina.errors import ConfigError, WeightsError
from afina.kernels import nf4
from afina.kernels.nf4 import NF4State, dequantize_nf4, quantize_nf4
from afina.loaders.families.common import HFTensor
from afina.loaders.weights import bitsandbytes
from afina.loaders.weights.safetensors import SafetensorsFolder

# Rows of whole blocks: bitsandbytes' CPU code unpacks no others right, and heads are sorted by rows.
TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SIZES: dict[str, Any] = TOKENS | {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
GPT2 = TOKENS | {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"num_key_value_heads": 2},
    "phi3": SIZES | {"num_key_value_heads": 2},
    "gpt2": GPT2,
    "gpt_neox": SIZES,
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
IDS = (torch.arange(40)[None] * 7) % 61
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family, on disk, unquantised."""
    root = tmp_path_factory.mktemp("plain")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            model = new_model({"model_type": family} | FAMILIES[family], seed=1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(6)
            save_model(model, None, folder)
        return folder

    return make


def packed_layers(model: GPT) -> dict[str, NF4Weight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Weight)}


def state_tensors(model: torch.nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, NF4Weight):
            for part in module.parts:
                found.append(part.packed)
                found += [x for x in vars(part.state).values() if isinstance(x, Tensor)] if part.state else []
    return found


def assert_same(one: GPT, other: GPT) -> None:
    for x, y in zip(state_tensors(one), state_tensors(other), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def refusal(folder: Path, error: type[Exception] = WeightsError, **options: Any) -> str:
    with pytest.raises(error) as raised:
        load_model(folder, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- The weight itself ------------------------------------------------------------------------------------------------


def random_parts(rows: tuple[int, ...] = (5, 3, 8), width: int = 96) -> tuple[NF4Weight, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parts: list[tuple[int, int, Tensor, NF4State | None]] = []
    dense = []
    start = 0
    for i, count in enumerate(rows):
        w = torch.randn(count, width, generator=generator)
        packed, state = quantize_nf4(w, double_quant=i != 1)
        parts.append((start, start + count, packed, state))
        dense.append(dequantize_nf4(packed, state))
        start += count
    return NF4Weight(parts), dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_puts_the_parts_one_below_the_other(dtype: torch.dtype) -> None:
    weight, dense = random_parts()
    assert weight.shape == (16, 96)
    got = weight.dense(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, torch.cat(dense).to(dtype))
    assert torch.equal(weight.rows(5, 16, dtype), got[5:])
    assert weight.dense(dtype).data_ptr() != got.data_ptr()
    with pytest.raises(ValueError, match="cuts a part in two"):
        weight.rows(0, 7, dtype)


def test_bits_and_bytes_of_a_weight() -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    weight = NF4Weight([(0, 1024, *quantize_nf4(w))])
    assert weight.nbytes == sum(x.nbytes for x in state_tensors(weight))
    assert 8 * weight.nbytes / 2**20 == pytest.approx(BITS, abs=0.01)
    assert "(1024, 1024), parts=1, 4.13" in repr(weight)


def test_casting_and_moving_leave_the_state_alone() -> None:
    weight, dense = random_parts()
    module = torch.nn.ModuleDict({"linear": torch.nn.Linear(4, 4), "weight": weight})
    before = [x.clone() for x in state_tensors(module)]
    for cast in (module.to(torch.bfloat16), module.half(), module.double(), copy.deepcopy(module), module.to("cpu")):
        assert [x.dtype for x in state_tensors(cast)] == [x.dtype for x in before]
        assert all(map(torch.equal, state_tensors(cast), before))
    assert module["linear"].weight.dtype == torch.float64
    assert torch.equal(weight.dense(torch.float32), torch.cat(dense))
    moved = copy.deepcopy(module).to("meta", torch.bfloat16)
    assert {x.device.type for x in state_tensors(moved)} == {"meta"}
    assert [x.dtype for x in state_tensors(moved)] == [x.dtype for x in before]


@pytest.mark.gpu
def test_moving_to_the_gpu_and_back() -> None:
    weight, dense = random_parts()
    before = [x.clone() for x in state_tensors(weight)]
    weight.to("cuda", torch.bfloat16)
    assert {x.device.type for x in state_tensors(weight)} == {"cuda"}
    assert torch.equal(weight.dense(torch.float32).cpu(), torch.cat(dense))
    weight.cpu()
    assert all(map(torch.equal, state_tensors(weight), before))


def test_parts_must_fit() -> None:
    packed, state = quantize_nf4(torch.ones(4, 64))
    for parts in (
        [(1, 5, packed, state)],
        [(0, 3, packed, state)],
        [(0, 4, packed, state), (4, 5, torch.ones(1, 9), None)],
    ):
        with pytest.raises(ValueError, match=r"^parts: expected rows from"):
            NF4Weight(parts)


@pytest.mark.parametrize("double_quant", [True, False])
def test_sorting_heads_sorts_rows(double_quant: bool) -> None:
    heads, dim, width = 5, 4, 64
    w = torch.randn(heads * 3 * dim, width, generator=torch.Generator().manual_seed(2))
    packed, state = quantize_nf4(w, double_quant=double_quant)
    want = dequantize_nf4(packed, state).view(heads, 3, dim, width).transpose(0, 1).reshape(-1, width)
    tensor = HFTensor("qkv", "qkv", 0, len(w), heads=heads)
    assert torch.equal(dequantize_nf4(*by_heads(packed, state, tensor)), want)
    with pytest.raises(ValueError, match="rows of 32 weights do not divide into blocks of 64"):
        by_heads(*quantize_nf4(torch.ones(60, 32)), tensor)


# --- Loading ----------------------------------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_layout_of_bitsandbytes(
    family: str, double_quant: bool, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each matrix comes out as its codes mean it, and the model computes what a dense one of these weights does."""
    source = plain(family)
    model = load_model(by_hand(source, tmp_path, double_quant=double_quant))
    read = dict(hf_tensors(model))
    original = load_file(source / "model.safetensors")
    assert read.keys() == original.keys()
    for name, tensor in original.items():
        if is_matrix(name, tensor):
            weight = tensor.t() if family == "gpt2" else tensor
            want = dequantize_nf4(*quantize_nf4(weight, double_quant=double_quant))
            tensor = want.t() if family == "gpt2" else want
        assert torch.equal(read[name], tensor), name

    held = packed_layers(model)
    assert len(held) == 4 * 2
    for name in held:
        layer = model.get_submodule(name.removesuffix(".quantized"))
        assert layer.weight is None
    assert {"embed.weight", "norm.weight"} <= dict(model.named_parameters()).keys()
    save_model(model, None, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = load_model(tmp_path / "dense")
    assert not packed_layers(dense)
    assert torch.equal(model(IDS), dense(IDS))
    assert (model(IDS) - load_model(source)(IDS)).abs().max() > 1e-3
    assert model.fingerprint == SafetensorsFolder(tmp_path).fingerprint() != dense.fingerprint


@FAMILY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantising_while_loading(family: str, dtype: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    """The same codes as in a checkpoint made of the weights in the dtype that is asked for."""
    source = plain(family)
    folder = by_hand(source, tmp_path, dtype=getattr(torch, dtype))
    model = load_model(source, dtype=dtype, quantize="nf4")
    assert_same(model, load_model(folder, dtype=dtype))
    assert len(packed_layers(model)) == 4 * 2
    assert model.fingerprint == load_model(source).fingerprint


def test_a_checkpoint_stays_as_it_is_quantised(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """What its author left out stays dense, alone or beside quantised rows of the same fused matrix."""
    folder = by_hand(plain("llama"), tmp_path, skip=r"v_proj|layers\.1\.mlp\.(gate|up)|o_proj", double_quant=False)
    original = load_file(plain("llama") / "model.safetensors")
    for options in ({}, {"quantize": "nf4"}):
        model = load_model(folder, **options)
        assert sorted(packed_layers(model)) == [
            "layers.0.attn.qkv.quantized", "layers.0.mlp.down.quantized", "layers.0.mlp.gate_up.quantized",
            "layers.1.attn.qkv.quantized", "layers.1.mlp.down.quantized",
        ]  # fmt: skip
        kinds = [part.state is None for part in model.layers[0].attn.qkv.quantized.parts]
        assert kinds == [False, False, True]
        read = dict(hf_tensors(model))
        for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            assert torch.equal(read[name], original[name])
        assert not torch.equal(read[Q0], original[Q0])


def test_old_configs_and_sharded_or_bare_files(plain: Callable[[str], Path], tmp_path: Path) -> None:
    source, bare = plain("llama"), {}
    whole = load_model(by_hand(source, tmp_path / "whole"))
    old = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": None}
    assert_same(load_model(by_hand(source, tmp_path / "old", config=old)), whole)

    def strip(tensors: Tensors) -> None:
        bare.update({name.removeprefix("model."): tensors.pop(name) for name in list(tensors)})
        tensors.update(bare)

    assert_same(load_model(by_hand(source, tmp_path / "bare", edit=strip)), whole)


def test_a_new_model_of_a_quantised_config_is_dense() -> None:
    model = new_model({"model_type": "llama", **FAMILIES["llama"], "quantization_config": BNB})
    assert "quantization_config" not in model.hf_config
    assert not packed_layers(model)


def test_saving_in_the_dtype_of_the_model(plain: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(plain("gpt2"), dtype="bfloat16", quantize="nf4")
    save_model(model, None, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in again.values()} == {torch.bfloat16}
    for name, tensor in hf_tensors(model):
        assert torch.equal(again[name], tensor.bfloat16())
        assert tensor.dtype == (torch.float32 if is_matrix(name, tensor) else torch.bfloat16)
    assert torch.equal(load_model(tmp_path, dtype="bfloat16")(IDS), model(IDS))


def test_hf_tensors_dequantises_one_matrix_at_a_time(
    plain: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(plain("llama"), quantize="nf4")
    made: list[str] = []
    rows = NF4Weight.rows

    def counted(self: NF4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        made.append("")
        return rows(self, start, stop, dtype)

    monkeypatch.setattr(NF4Weight, "rows", counted)
    before = 0
    for name, tensor in hf_tensors(model):
        assert len(made) - before == is_matrix(name, tensor)
        before = len(made)
    assert before == 2 * 7


# --- Beside bitsandbytes itself, where it is installed ----------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize(("double_quant", "dtype"), [(True, "float32"), (True, "bfloat16"), (False, "float32")])
def test_beside_bitsandbytes(
    family: str, double_quant: bool, dtype: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    """What transformers and bitsandbytes write is read to the bit, computes the same, and is what we quantise to."""
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    kind, auto = getattr(torch, dtype), transformers.AutoModelForCausalLM
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    setting = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=kind)
    made = auto.from_pretrained(plain(family), quantization_config=setting, dtype=kind, device_map="cpu")
    made.save_pretrained(tmp_path)

    ours, theirs = load_model(tmp_path, dtype=dtype), auto.from_pretrained(tmp_path, dtype=kind, device_map="cpu")
    parameters, count = dict(theirs.named_parameters()), 0
    for name, tensor in hf_tensors(ours):
        if (parameter := parameters.get(name)) is None or not isinstance(parameter, bnb.nn.Params4bit):
            continue
        dense = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(tensor.to(kind), dense.t() if family == "gpt2" else dense), name
        count += 1
    assert count == 2 * {"llama": 7, "phi3": 4, "gpt2": 4, "gpt_neox": 4}[family]
    if dtype == "float32":
        for module in theirs.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        theirs.train()  # in eval mode it may repack the codes for a kernel that computes in bf16
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)

    if double_quant and family != "gpt_neox":  # whose absmax we hold as they are
        own = load_model(plain(family), dtype=dtype, quantize="nf4")
        apart = []
        for mine, read in zip(packed_layers(own).values(), packed_layers(ours).values(), strict=True):
            for one, other in zip(mine.parts, read.parts, strict=True):
                assert one.state is not None
                assert other.state is not None
                assert torch.equal(one.packed, other.packed)
                # Its CPU code takes the second nearest of the 8-bit codes now and then, and another mean by one bit.
                apart.append((one.state.absmax.int() - other.state.absmax.int()).abs())
                torch.testing.assert_close(one.state.offset, other.state.offset, rtol=3e-7, atol=0)
        assert torch.cat(apart).max() <= 1
        assert torch.cat(apart).float().mean() <= 0.01


# --- Memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from afina.engine.nf4_weight import NF4Weight
from afina.engine.weights import load_model, save_model
from afina.kernels import nf4
nf4.PIECE = 1 << 19  # 8 MB of temporaries
def memory(key):  # VmHWM, the peak: unlike ru_maxrss it does not start at the parent process's
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
torch.set_num_threads(1)
def quantised(folder):
    model = load_model(folder, dtype="float32", quantize="nf4")
    weights = [m for m in model.modules() if isinstance(m, NF4Weight)]
    return model, weights
save_model(quantised(sys.argv[1])[0], None, sys.argv[1] + "/again")  # imports, allocator
before = memory("VmRSS")
model, weights = quantised(sys.argv[2])
held = sum(p.nbytes for p in model.parameters()) + sum(w.nbytes for w in weights)
dense = 4 * sum(w.shape[0] * w.shape[1] for w in weights)
print(memory("VmHWM") - before, held, dense)
save_model(model, None, sys.argv[3])
print(memory("VmHWM") - before, held, dense)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("published", [False, True])
def test_peak_memory(published: bool, plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Loading takes the quantised model, one tensor and 12 MB; saving it dense, what making one tensor takes."""
    sizes = {"model_type": "llama", "vocab_size": 64, "hidden_size": 1024, "num_attention_heads": 8}
    sizes |= {"num_hidden_layers": 4, "intermediate_size": 2048, "max_position_embeddings": 64}
    folder = tmp_path / "model"
    save_model(new_model(sizes), None, folder)
    if published:
        folder = by_hand(folder, tmp_path / "published")
    command = [sys.executable, "-c", MEASURE, str(plain("llama")), str(folder), str(tmp_path / "out")]
    # Else glibc keeps some of what was freed, and the peak tells of its heap.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    (loading, held, dense), (saving, *_) = [
        [int(number) for number in line.split()] for line in run.stdout.splitlines()
    ]
    one = 4 * 1024 * 2048
    assert dense == 4 * (4 * 1024 * 1024 + 3 * 1024 * 2048) * 4
    assert held < 0.14 * dense
    assert loading <= held + one + 12e6 < dense / 3
    assert saving <= held + 3 * one < dense / 3


def test_memory_is_checked_as_it_will_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_hf({"model_type": "llama", **FAMILIES["llama"]})
    model, cpu = GPT(config, device="meta"), torch.device("cpu")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers."))
    exact = (config.num_parameters() - matrices) * 2 + matrices * BITS / 8
    for memory, fits in ((int(exact) + 1, True), (int(exact) - 1, False)):
        monkeypatch.setattr(weights.os, "sysconf", lambda key, n=memory: 1 if key == "SC_PAGE_SIZE" else n)
        with pytest.raises(ConfigError, match="in bfloat16, but the cpu has"):
            check_memory(config, torch.bfloat16, cpu)
        if fits:
            check_memory(config, torch.bfloat16, cpu, quantized=True)
        else:
            with pytest.raises(ConfigError, match="in bfloat16 and nf4, but the cpu has"):
                check_memory(config, torch.bfloat16, cpu, quantized=True)


def test_a_quantised_model_may_be_larger_than_memory(
    plain: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, published = plain("llama"), by_hand(plain("llama"), tmp_path)
    half = 2 * ModelConfig.from_hf(json.loads((source / "config.json").read_text())).num_parameters()
    monkeypatch.setattr(weights.os, "sysconf", lambda key: 1 if key == "SC_PAGE_SIZE" else half)
    assert "in float32, but the cpu has" in refusal(source, ConfigError)
    assert_same(load_model(source, quantize="nf4"), load_model(published))


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "weights quantised by 'gptq' are not supported; supported are bitsand"),
        ({"quant_method": "awq"}, "'awq' are not supported"),
        ({"quant_method": "mxfp4"}, "'mxfp4' are not supported"),
        ({"quant_method": "fp8"}, "'fp8' are not supported"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors' are not supported"),
        ({"quant_method": "hqq"}, "'hqq' are not supported"),
        ({"quant_method": ["bitsandbytes"]}, "are not supported"),
        (BNB | {"bnb_4bit_quant_type": "fp4"}, "weights quantised to 'fp4' are not supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "weights quantised to 'fp4' are not supported"),
        (BNB | {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True}, "weights quantised to 8 bits"),
        (BNB | {"load_in_4bit": False}, "load_in_4bit = False is not supported; expected True"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit is not set"),
        (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage = 'bfloat16' is not supported"),
        (BNB | {"bnb_4bit_blocksise": 64}, "unknown key 'bnb_4bit_blocksise', refused"),
        ("bitsandbytes", "expected an object"),
    ],
)
def test_schemes_that_are_refused(config: Any, message: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    said = refusal(by_hand(plain("llama"), tmp_path, config=config), ConfigError)
    assert "quantization_config = " in said
    assert message in said


def test_other_values_of_quantise(plain: Callable[[str], Path]) -> None:
    assert "did you mean 'nf4'?" in refusal(plain("llama"), ConfigError, quantize="nf3")


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.update(quant_type="fp4"), "quant_type is 'fp4', expected nf4"),
        (lambda s: s.update(blocksize=48), "blocksize is 48, expected 32, 64"),
        (lambda s: s.update(blocksize=True), "blocksize is True, expected"),
        (lambda s: s.update(blocksize=64.0), "blocksize is 64.0, expected"),
        (lambda s: s.update(blocksize=128), "is uint8 (64,), expected uint8 (32,)"),
        (lambda s: s.update(dtype="float64"), "dtype is 'float64', expected float32, float16, bfloat16"),
        (
            lambda s: s.update(shape=[64, 63]),
            "uint8 (2048, 1), expected uint8 (2016, 1) for a quantised matrix of shape",
        ),
        (lambda s: s.update(shape=[32, 128]), f"{Q0} has shape (32, 128), expected (64, 64)"),
        (lambda s: s.update(shape=[4096]), "shape is [4096], expected [out, in]"),
        (lambda s: s.update(shape=[-64, -64]), "shape is [-64, -64], expected [out, in]"),
        (lambda s: s.update(shape=None), "shape is None, expected [out, in]"),
        (lambda s: s.update(shape=[64, 2**62]), "expected [out, in]"),
        (lambda s: s.update(nested_blocksize=0), "nested_blocksize is 0, expected"),
        (lambda s: s.update(nested_dtype="float16"), "nested_dtype is 'float16', expected float32"),
        (lambda s: s.update(nested_offset="0.5"), "nested_offset is '0.5', expected a number"),
        (lambda s: s.update(nested_offset=1e300), "nested_offset is 1e+300, expected a number"),
        (lambda s: s.update(nested_offset=float("nan")), "'NaN' is not a finite number"),
        (lambda s: s.pop("nested_offset"), "has the keys 'blocksize', 'dtype'"),
        (lambda s: s.pop("shape"), "expected blocksize, dtype, nested_blocksize"),
        (lambda s: s.update(extra=1), "'extra'"),
    ],
)
def test_states_that_are_refused(edit: Edit, message: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        says = state_of(tensors, Q0)
        edit(says)
        tensors[f"{Q0}.{STATE}"] = state_tensor(says)

    said = refusal(by_hand(plain("llama"), tmp_path, edit=change))
    assert message in said
    assert "q_proj" in said


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("", torch.zeros(2048, 1, dtype=torch.int8), "is int8 (2048, 1), expected uint8 (2048, 1)"),
        ("", torch.zeros(1, 2048, dtype=torch.uint8), "is uint8 (1, 2048), expected uint8 (2048, 1)"),
        ("", None, "holds no tensor"),
        (".absmax", torch.zeros(64), "is float32 (64,), expected uint8 (64,)"),
        (".absmax", torch.zeros(63, dtype=torch.uint8), "is uint8 (63,), expected uint8 (64,)"),
        (".absmax", None, "holds no tensor"),
        (".quant_map", torch.zeros(15), "is float32 (15,), expected float32 (16,)"),
        (".quant_map", torch.full((16,), torch.nan), "holds NaN or Inf"),
        (".nested_absmax", torch.tensor([torch.inf]), "holds NaN or Inf"),
        (".nested_absmax", torch.zeros(2), "is float32 (2,), expected float32 (1,)"),
        (".nested_quant_map", torch.zeros(256).half(), "is float16 (256,), expected float32 (256,)"),
        (".nested_quant_map", None, "holds no tensor"),
        (f".{STATE}", torch.zeros(5000, dtype=torch.uint8), "expected at most 4096 uint8"),
        (f".{STATE}", torch.zeros(170), "is torch.float32 (170,), expected at most"),
        (f".{STATE}", torch.zeros(170, dtype=torch.uint8), "not valid JSON"),
        (f".{STATE}", state_tensor([1, 2]), "JSON object"),
        (f".{STATE}", None, f"{Q0}.absmax unexpected"),
        (".quant_state.bitsandbytes__fp4", state_tensor({}), "is quantised as 'fp4', which is not supported"),
        (".SCB", torch.zeros(64), f"{Q0}.SCB unexpected"),
    ],
)
def test_parts_that_are_refused(
    suffix: str, value: Tensor | None, message: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        tensors.pop(Q0 + suffix, None)
        if value is not None:
            tensors[Q0 + suffix] = value

    assert message in refusal(by_hand(plain("llama"), tmp_path, edit=change))


def test_checkpoints_that_are_refused(plain: Callable[[str], Path], tmp_path: Path) -> None:
    def quantize_head(tensors: Tensors) -> None:
        tensors.update(pack("lm_head.weight", tensors["lm_head.weight"]))

    source = plain("llama")
    said = refusal(by_hand(source, tmp_path / "head", edit=quantize_head))
    assert "lm_head.weight is quantised, which only the matrices of the layers may be" in said
    assert "no tensor is quantised, but config.json has a" in refusal(by_hand(source, tmp_path / "none", skip="."))
    assert "but config.json has no quantization_config" in refusal(by_hand(source, tmp_path / "forgot", config=None))

    small = {"model_type": "gpt_neox", **SIZES, "hidden_size": 96}
    save_model(new_model(small), None, tmp_path / "small")
    for folder, options in (("small", {"quantize": "nf4"}), ("packed", {})):
        if folder == "packed":
            by_hand(tmp_path / "small", tmp_path / "packed")
        assert "rows of 96 weights do not divide into blocks of 64" in refusal(tmp_path / folder, **options)


def test_what_is_not_finite_is_never_quantised(plain: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(plain("llama"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[Q0][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    assert "holds NaN or Inf" in refusal(tmp_path, quantize="nf4")
    said = refusal(tmp_path, quantize="nf4", allow_nonfinite=True)
    assert f"tensor {Q0} cannot be quantised (weight: expected finite values" in said


def test_damaged_states_raise_the_typed_error(plain: Callable[[str], Path], tmp_path: Path) -> None:
    """Any byte of the JSON may change: the model loads, or is refused as damaged weights are."""
    folder = by_hand(plain("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = f"{Q0}.{STATE}"
    good = tensors[name]
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        bad = good.clone()
        for _ in range(generator.randint(1, 3)):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        save_file(tensors | {name: bad}, folder / "model.safetensors")
        try:
            load_model(folder)
        except WeightsError:
            refused += 1
    assert refused > 50


def test_both_floors_know_the_same_block_sizes() -> None:
    assert bitsandbytes.BLOCKSIZES == nf4.BLOCKSIZES
    assert set(bitsandbytes.DTYPES) == set(weights.DTYPES)
