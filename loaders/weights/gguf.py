"""GGUF, the one file of weights, config and vocabulary that llama.cpp and all that is built on it read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is a list of key-values (the config under
llama.cpp's names, and the vocabulary: `gguf_vocab.py`), a list of tensors, and their bytes. llama.cpp has the maths of
each architecture in code, so whatever a config asks for that this code does not compute is refused here: a key that
nobody reads would give a model that loads and is wrong.

The `gguf` package writes the format; it is imported when a file is written or read, not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from afina.errors import ConfigError, WeightsError, nearest
from afina.loaders.families.common import Fields
from afina.loaders.families.registry import load_family
from afina.loaders.text.gguf_vocab import gguf_package, write_vocabulary
from afina.loaders.text.tokenizer import Tokenizer, check_vocab

# The dtypes a file can be asked for -> the names of the format.
DTYPES = {
    **dict.fromkeys(("float32", "f32"), "F32"),
    **dict.fromkeys(("float16", "f16"), "F16"),
    **dict.fromkeys(("bfloat16", "bf16"), "BF16"),
    "q8_0": "Q8_0",
}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The largest magnitude that a dtype holds; a block of Q8_0 is 32 bytes from -127 to 127 and their scale, in float16.
_LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}

# model_type -> llama.cpp's architecture. Mistral is Llama there.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
}
_ROPES = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "gemma2": ("default", "linear"),
    "gemma3": ("default", "linear"),
}
# Gemma's attention scale is not in the file: llama.cpp knows the 27B models by their number of layers.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_SLIDING_PERIOD = {"gemma2": 2, "gemma3": 6}  # without a list in the file, every so manieth layer is full

COMPARED_ROWS = 64  # of a matrix, when a file is compared with what it was made of


def write_gguf(
    path: Path,
    hf_config: Mapping[str, Any],
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
    tokenizer: Tokenizer,
    *,
    dtype: str,
) -> None:
    """Write a model and its vocabulary to ``path``.

    ``hf_config``: the contents of config.json. ``tensors``: gives the weights under their HF names and in their HF
    shapes, of any float dtype and on any device; it is called twice, for the shapes and for the values, so that the
    weights stream and at most one is in memory twice. ``dtype``: "float32", "float16", "bfloat16" or "q8_0" for the
    matrices; as llama.cpp's own converter does, vectors and learned positions are float32 whatever is asked for, and
    q8_0 is float16 where a row is no multiple of 32. Raises ConfigError for what llama.cpp does not compute and without
    the `gguf` package, TokenizerError for a vocabulary that it would read differently, WeightsError for weights that
    the dtype cannot hold, or a file that cannot be written.
    """
    gguf = gguf_package()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: expected {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    family = load_family(hf_config)
    fields = family.config_fields(hf_config)
    arch = architecture_of(hf_config, fields)
    check_vocab(tokenizer, fields["vocab_size"])
    expected = {tensor.name for tensor in family.tensors(fields)}
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), fields["num_layers"]
    )

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[DTYPES[dtype]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_config(gguf, writer, arch, fields)
    write_vocabulary(gguf, writer, tokenizer, fields["vocab_size"])

    kinds: dict[str, str] = {}
    shapes = {name: converted(arch, fields, name, x.to("meta")).shape for name, x in tensors()}
    if factors := _rope_factors(fields):
        writer.add_tensor_info("rope_freqs.weight", (len(factors),), np.dtype(np.float32), 4 * len(factors))
    if shapes.keys() != expected:
        one = min(shapes.keys() ^ expected)
        what = "is missing" if one in expected else "belongs to no such model"
        raise WeightsError(f"{path}: {one} {what}, by config.json: give the weights and the config of one model")
    for name, shape in shapes.items():
        kind = kinds[name] = _kind(DTYPES[dtype], name, shape)
        quantization = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        theirs = names.get_name(name, (".weight", ".bias"))
        nbytes = shape.numel() // block * size
        writer.add_tensor_info(theirs, tuple(shape), np.dtype(np.float32), nbytes, raw_dtype=quantization)

    try:
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors:
                writer.write_tensor_data(np.array(factors, dtype=np.float32))
            for (name, tensor), expected_name in zip(tensors(), shapes, strict=True):
                assert name == expected_name
                array = _array(gguf, converted(arch, fields, name, tensor.detach().cpu()), kinds[name], name)
                writer.write_tensor_data(array)
    except OSError as problem:
        path.unlink(missing_ok=True)
        mend = "free space there or choose another place"
        raise WeightsError(f"{path}: cannot be written ({problem.strerror}): {mend}") from problem
    except BaseException:
        path.unlink(missing_ok=True)  # half a file must not pass for a model
        raise


# --- Weights ----------------------------------------------------------------------------------------------------------


def converted(arch: str, fields: Fields, name: str, x: Tensor) -> Tensor:
    """A tensor of the file as llama.cpp wants it: another order of rows, the transpose, or norm weights plus one."""
    if arch == "gpt2" and ".c_" in name and name.endswith(".weight"):
        return x.t()  # HF's Conv1D stores (in, out)
    if arch == "llama" and any(f".{p}_proj." in name for p in "qk"):
        # Its RoPE turns neighbours (0, 1), (2, 3), ...; HF's turns the halves (0, D/2), (1, D/2 + 1), ...
        heads = fields["num_heads" if ".q_proj." in name else "num_kv_heads"]
        return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return x.float() + 1  # HF multiplies by 1 + w
    return x


def _kind(kind: str, name: str, shape: torch.Size) -> str:
    if len(shape) == 1 or name.endswith(".wpe.weight"):
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind


def _array(gguf: Any, x: Tensor, kind: str, name: str) -> np.ndarray[Any, Any]:
    """The bytes of one tensor in the file."""
    if kind in _LARGEST and not (largest := float(x.abs().max())) <= _LARGEST[kind]:
        raise WeightsError(f"{name}: holds {largest:g}, too large for {kind.lower()}: export with dtype bfloat16")
    if kind == "Q8_0":
        quantized: np.ndarray[Any, Any] = gguf.quants.quantize(x.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        return quantized
    x = x.to(_TORCH[kind]).contiguous()
    return x.view(torch.int16).numpy() if kind == "BF16" else x.numpy()  # numpy has no bfloat16


def _rope_factors(fields: Fields) -> list[float]:
    """What llama.cpp divides the angle of each pair by: Llama 3.1's scaling, which is no key of the format."""
    rope = fields["ropes"][0] if fields.get("ropes") else {}
    if rope.get("kind") != "llama3":
        return []
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, rope["dim"], 2):
        turns = rope["original_max_positions"] / (2 * math.pi * rope["theta"] ** (i / rope["dim"]))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


# --- Config -----------------------------------------------------------------------------------------------------------


def architecture_of(hf: Mapping[str, Any], fields: Fields) -> str:
    """llama.cpp's name of the architecture. Raises ConfigError for what its code does not compute."""
    model_type = hf["model_type"]
    if model_type not in ARCHITECTURES:
        mend = "export with --to hf and convert that with llama.cpp's convert_hf_to_gguf.py"
        raise ConfigError(f"config.json: model_type = {model_type!r}: gguf is for {', '.join(ARCHITECTURES)}: {mend}")
    arch = ARCHITECTURES[model_type]
    for problem in _not_computed(arch, hf, fields):
        raise ConfigError(f"config.json ({model_type}): {problem}: export with --to hf, which transformers loads")
    return arch


def _not_computed(arch: str, hf: Mapping[str, Any], fields: Fields) -> Iterator[str]:
    """Each setting that llama.cpp's code for the architecture does not follow, in words."""
    gemma = arch.startswith("gemma")
    windows = {window for window in fields["layer_windows"] if window and window < fields["max_positions"]}
    if windows and not gemma:
        window = min(windows)
        mend = f"setting max_position_embeddings to {window} keeps what it computes up to there"
        yield f"sliding_window = {window}: llama.cpp's {arch} attends to all of the context ({mend})"
    for rope in fields.get("ropes", ()):
        if rope["kind"] not in _ROPES[arch]:
            yield f"RoPE of type {rope['kind']!r}: llama.cpp's {arch} knows {', '.join(_ROPES[arch])}"
        if rope["kind"] == "yarn" and (rope["beta_fast"], rope["beta_slow"], rope["truncate"]) != (32.0, 1.0, True):
            yield f"YaRN with other than beta_fast 32, beta_slow 1, truncate true: llama.cpp's {arch} reads none"
    if arch == "gemma3" and fields["ropes"][1]["kind"] != "default":
        yield "scaled RoPE in sliding layers: llama.cpp's gemma3 scales the full ones only"
    if arch not in ("llama", "gpt2") and fields.get("o_bias"):
        yield f"attention_bias = true: llama.cpp's {arch} adds none after attention"
    if arch == "qwen2" and fields["num_heads"] * fields["head_dim"] != fields["hidden_size"]:
        yield f"head_dim = {fields['head_dim']}: llama.cpp's qwen2 takes hidden_size / num_attention_heads"
    if arch == "gpt2" and fields["activation"] != "gelu_tanh":
        yield f"activation_function = {hf['activation_function']!r}: llama.cpp's gpt2 computes gelu_new"
    if arch == "gpt2" and fields["attention_scale"] is not None:
        yield "scale_attn_weights = false: llama.cpp's gpt2 scales the scores"
    if gemma:
        big = fields["num_layers"] == _GEMMA_27B[arch]
        size = fields["hidden_size"] // fields["num_heads"] if big else fields["head_dim"]
        if not math.isclose(fields["attention_scale"], size**-0.5, rel_tol=1e-6):
            wanted = round(fields["attention_scale"] ** -2)
            yield f"query_pre_attn_scalar = {wanted}: llama.cpp's {arch} of this size computes with {size}"
    if arch == "gemma2":
        for key, name in (("attention_softcap", "attn_logit"), ("logit_softcap", "final_logit")):
            if fields[key] is None:
                yield f"{name}_softcapping = None: llama.cpp's gemma2 always caps"
        if not fields["tie_embeddings"]:
            yield "tie_word_embeddings = false: llama.cpp's gemma2 has no output matrix of its own"


def _write_config(gguf: Any, writer: Any, arch: str, fields: Fields) -> None:
    """The key-values that llama.cpp builds the model from."""
    writer.add_context_length(fields["max_positions"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_heads"])
    writer.add_vocab_size(fields["vocab_size"])
    if arch == "gpt2":
        writer.add_layer_norm_eps(fields["norm_eps"])
        return
    writer.add_layer_norm_rms_eps(fields["norm_eps"])
    writer.add_head_count_kv(fields["num_kv_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_rope_dimension_count(fields["head_dim"])

    rope = fields["ropes"][0]
    writer.add_rope_freq_base(rope["theta"])
    if rope["kind"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["kind"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["kind"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_positions"])
        # llama.cpp multiplies cos and sin by YaRN's own factor and by this one.
        own = 0.1 * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope["attention_factor"] / own)

    if arch in _SLIDING_PERIOD:
        slides = [window is not None for window in fields["layer_windows"]]
        if any(slides):
            writer.add_sliding_window(max(filter(None, fields["layer_windows"])))
        period = _SLIDING_PERIOD[arch]
        if slides != [(i + 1) % period != 0 for i in range(len(slides))] and (any(slides) or arch == "gemma2"):
            writer.add_sliding_window_pattern(slides)
        if fields.get("attention_softcap"):
            writer.add_attn_logit_softcapping(fields["attention_softcap"])
        if fields["logit_softcap"]:
            writer.add_final_logit_softcapping(fields["logit_softcap"])
    if arch == "gemma3":
        writer.add_rope_freq_base_swa(fields["ropes"][1]["theta"])


# --- Check ------------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A tensor by its HF name, how the file holds it ("F16", "Q8_0", ...), and the largest difference of its values as
    a share of the largest value."""

    name: str
    kind: str
    error: float


def check_architecture(hf_config: Mapping[str, Any]) -> None:
    """Raise ConfigError, before any long work, for a model that ``write_gguf`` would refuse by its config, and where
    the `gguf` package is not installed."""
    gguf_package()
    architecture_of(hf_config, load_family(hf_config).config_fields(hf_config))


def differences(
    path: Path, hf_config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[Difference]:
    """Each of ``tensors``, as ``write_gguf`` takes them, beside the file: of matrices some 64 rows, spread over all.

    Raises WeightsError for a tensor that the file lacks or has in another shape.
    """
    gguf = gguf_package()
    fields = load_family(hf_config).config_fields(hf_config)
    arch = ARCHITECTURES[hf_config["model_type"]]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, fields["num_layers"])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors:
        found = stored.get(names.get_name(name, (".weight", ".bias")))
        wanted = converted(arch, fields, name, tensor)
        shape = () if found is None else tuple(reversed(found.shape.tolist()))
        if found is None or shape != tuple(wanted.shape):
            raise WeightsError(f"{path}: {name} has shape {shape}, expected {tuple(wanted.shape)}: write it again")
        step = max(1, wanted.shape[0] // COMPARED_ROWS) if wanted.dim() > 1 else 1
        expected = wanted[::step].float().cpu()
        values = torch.tensor(gguf.quants.dequantize(found.data[::step], found.tensor_type)).view_as(expected)
        largest = expected.abs().max()
        error = (values - expected).abs().max() / largest if largest > 0 else values.abs().max()
        yield Difference(name, found.tensor_type.name, float(error))
