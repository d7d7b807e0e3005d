"""The config of a model as key-values of a GGUF file, there and back.

llama.cpp has the maths of each architecture in code, and reads its sizes from keys that begin with the architecture's
name. So there are two ways to be wrong unseen: to write a config whose settings llama.cpp does not compute, and to read
a file whose keys nobody honours. Both are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from afina.errors import ConfigError, WeightsError, nearest
from afina.loaders.families.common import MAX_LAYERS, Fields
from afina.loaders.families.registry import load_family
from afina.loaders.jsonfile import show
from afina.loaders.weights.gguf_file import GGUFFile
from afina.loaders.weights.gguf_rope import ROPE_FACTORS, llama3_scaling

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
_MODEL_TYPES = {arch: model_type for model_type, arch in ARCHITECTURES.items() if model_type != "mistral"}
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


# --- Writing ----------------------------------------------------------------------------------------------------------


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
        size = _gemma_scale(arch, fields["num_layers"], fields["hidden_size"], fields["num_heads"], fields["head_dim"])
        if not math.isclose(fields["attention_scale"], size**-0.5, rel_tol=1e-6):
            wanted = round(fields["attention_scale"] ** -2)
            yield f"query_pre_attn_scalar = {wanted}: llama.cpp's {arch} of this size computes with {size}"
    if arch == "gemma2":
        for key, name in (("attention_softcap", "attn_logit"), ("logit_softcap", "final_logit")):
            if fields[key] is None:
                yield f"{name}_softcapping = None: llama.cpp's gemma2 always caps"
        if not fields["tie_embeddings"]:
            yield "tie_word_embeddings = false: llama.cpp's gemma2 has no output matrix of its own"


def write_config(gguf: Any, writer: Any, arch: str, fields: Fields) -> None:
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
        writer.add_rope_scaling_attn_factors(rope["attention_factor"] / _yarn_own(rope["factor"]))

    if arch in _SLIDING_PERIOD:
        slides = [window is not None for window in fields["layer_windows"]]
        usual = _slides(len(slides), _SLIDING_PERIOD[arch])
        if any(slides):
            writer.add_sliding_window(max(filter(None, fields["layer_windows"])))
        if slides != usual and (any(slides) or arch == "gemma2"):
            writer.add_sliding_window_pattern(slides)
        if fields.get("attention_softcap"):
            writer.add_attn_logit_softcapping(fields["attention_softcap"])
        if fields["logit_softcap"]:
            writer.add_final_logit_softcapping(fields["logit_softcap"])
    if arch == "gemma3":
        writer.add_rope_freq_base_swa(fields["ropes"][1]["theta"])


# --- Both ways --------------------------------------------------------------------------------------------------------


def _gemma_scale(arch: str, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """What llama.cpp takes for query_pre_attn_scalar."""
    return hidden // heads if layers == _GEMMA_27B[arch] else head_dim


def _slides(layers: int, period: int) -> list[bool]:
    """Which layers have a sliding window where every ``period``-th is full."""
    return [(i + 1) % period != 0 for i in range(layers)]


def _yarn_own(factor: float) -> float:
    """What llama.cpp multiplies cos and sin by under YaRN, before the attention factor of the file."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


# --- Reading ----------------------------------------------------------------------------------------------------------

# Keys after the architecture's name that change nothing here, and keys that may have one value only.
_HARMLESS = ("rope.scaling.finetuned",)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # q and k as llama.cpp has them
}


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The config of a file as the contents of an HF config.json.

    Raises ConfigError, one line with the file, the key, what was found and what was expected, for an architecture that
    is not supported, and for keys that are missing, contradict each other or ask for something that is not computed.
    """
    reader = _Reader(file)
    arch = reader.arch
    embedding = "token_embd.weight"
    if embedding not in file.entries:
        found = "holds no tensors" if not file.entries else f"holds no tensor {embedding}"
        raise WeightsError(f"{file.path}: {found}: a vocabulary alone is no model, use the file with the weights")
    model_type = _MODEL_TYPES[arch]
    hf: dict[str, Any] = {"model_type": model_type}
    hf["vocab_size"] = reader.size("vocab_size", file.shape(embedding)[0])
    layers, heads = reader.layers(), reader.size("attention.head_count")
    hidden, positions = reader.size("embedding_length"), reader.size("context_length")
    if hidden % heads and f"{arch}.attention.key_length" not in file.fields:
        raise reader.error("embedding_length", f"not divisible by the {heads} heads, and there is no key_length")
    head_dim = reader.size("attention.key_length", hidden // heads)
    reader.fixed("attention.value_length", head_dim)
    for key, values in _FIXED.items():
        reader.fixed(key, *values)
    reader.general()
    if arch == "gpt2":
        hf |= _gpt2(reader, layers, heads, hidden, positions)
    else:
        hf |= {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": reader.size("feed_forward_length"),
            "max_position_embeddings": positions,
            "num_attention_heads": heads,
            "num_key_value_heads": reader.size("attention.head_count_kv", heads),
            "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": reader.number("rope.freq_base", 10_000.0),
            "tie_word_embeddings": arch == "gemma2" or "output.weight" not in file.entries,
        }
        if arch != "qwen2" or head_dim * heads != hidden:
            hf["head_dim"] = head_dim
        if arch == "llama":
            hf["attention_bias"] = "blk.0.attn_q.bias" in file.entries
            hf["mlp_bias"] = "blk.0.ffn_up.bias" in file.entries
        reader.fixed("rope.dimension_count", head_dim)
        if scaling := _scaling(reader, head_dim, hf["rope_theta"], positions):
            hf["rope_scaling"] = scaling
    if arch in _SLIDING_PERIOD:
        hf |= _gemma(reader, layers, head_dim, hf)
    elif (window := reader.size("attention.sliding_window", None)) and window < positions:
        raise reader.error("attention.sliding_window", f"llama.cpp's {arch} attends to all of the context")
    reader.scale(hf.get("query_pre_attn_scalar", head_dim) ** -0.5)
    reader.finish()
    hf["architectures"] = [load_family(hf).architecture]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = file.fields.get(f"tokenizer.ggml.{key}_token_id")
        hf[f"{name}_token_id"] = number if type(number) is int and 0 <= number < hf["vocab_size"] else None
    try:
        load_family(hf).config_fields(hf)
    except ConfigError as problem:
        raise ConfigError(f"{file.path}: its keys make a config that cannot be used: {problem}") from problem
    return hf


class _Reader:
    """Reads the keys of one architecture and remembers them, so that ``finish`` can refuse what nobody understood."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        arch = file.fields.get("general.architecture")
        if not isinstance(arch, str) or arch not in _MODEL_TYPES:
            near = nearest(arch, _MODEL_TYPES) if isinstance(arch, str) else ""
            found = f"general.architecture = {show(arch)}" if arch is not None else "general.architecture is missing"
            raise ConfigError(f"{file.path}: {found}{near}: supported: {', '.join(_MODEL_TYPES)}")
        self.arch: str = arch
        self._seen = {f"{arch}.{key}" for key in _HARMLESS}

    def error(self, key: str, expected: str) -> ConfigError:
        full = key if key.startswith("general.") else f"{self.arch}.{key}"
        found = f"{full} = {show(self._value(full))}" if full in self.file.fields else f"{full} is missing"
        return ConfigError(f"{self.file.path}: {found}: {expected}")

    def _value(self, full: str) -> Any:
        value = self.file.fields.get(full)
        return value.tolist() if isinstance(value, np.ndarray) else value  # an array is true and false at once

    def get(self, key: str) -> Any:
        key = f"{self.arch}.{key}"
        self._seen.add(key)
        return self._value(key)

    def size(self, key: str, default: int | None = -1) -> Any:
        """A whole number from 1 on; required where there is no default. 0 is none where the default is None."""
        value = self.get(key)
        if value is None and default != -1:
            return default
        if default is None and value == 0 and type(value) is int:
            return None
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.error(key, f"expected a whole number from 1 to {2**31 - 1}")
        return value

    def layers(self) -> int:
        count: int = self.size("block_count")
        if count > min(MAX_LAYERS, len(self.file.entries)):
            raise self.error("block_count", f"the file holds {len(self.file.entries):,} tensors, too few for so many")
        return count

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
            raise self.error(key, "expected a number above 0, from 1e-30 to 1e30")
        return float(value)

    def fixed(self, key: str, *values: Any) -> None:
        """A key that may be absent or have one of ``values``: anything else changes the maths and is refused."""
        value = self.get(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            expected = ", ".join(map(repr, values))
            raise self.error(key, f"not supported (it changes the maths); supported: {expected}")

    def scale(self, usual: float) -> None:
        """The attention's scale; 0 or none is the usual one, which is the one that a config can have."""
        value = self.get("attention.scale")
        if value not in (None, 0) and not (type(value) is float and math.isclose(value, usual, rel_tol=1e-5)):
            raise self.error("attention.scale", f"not supported; supported: {usual:.6g}")

    def general(self) -> None:
        """What is said of the file as a whole: that it is all of a model."""
        if self._value("general.type") not in (None, "model"):
            raise self.error("general.type", "expected 'model'; an adapter, a projector or a matrix is none by itself")
        if (parts := self._value("split.count")) not in (None, 0, 1):
            mend = "join the parts with llama-gguf-split --merge"
            raise ConfigError(f"{self.file.path}: split.count = {show(parts)}, expected 1: {mend}")

    def finish(self) -> None:
        unknown = sorted(key for key in self.file.fields if key.startswith(f"{self.arch}.") and key not in self._seen)
        if unknown:
            hint = nearest(unknown[0], self._seen)
            key = unknown[0].removeprefix(f"{self.arch}.")
            raise self.error(key, f"unknown key, refused because it may change the maths{hint}")


def _gpt2(reader: _Reader, layers: int, heads: int, hidden: int, positions: int) -> dict[str, Any]:
    reader.fixed("attention.head_count_kv", heads)
    reader.fixed("attention.key_length", hidden // heads)
    return {
        "n_layer": layers,
        "n_head": heads,
        "n_embd": hidden,
        "n_positions": positions,
        "n_inner": reader.size("feed_forward_length"),
        "layer_norm_epsilon": reader.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in reader.file.entries,
    }


def _gemma(reader: _Reader, layers: int, head_dim: int, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, softcaps and attention scale of Gemma 2 and 3; what the file leaves out is llama.cpp's default."""
    arch = reader.arch
    found: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}
    scale = _gemma_scale(arch, layers, hf["hidden_size"], hf["num_attention_heads"], head_dim)
    found["query_pre_attn_scalar"] = scale
    window = reader.size("attention.sliding_window", None)
    pattern = reader.get("attention.sliding_window_pattern")
    if pattern is None or type(pattern) is int:
        period = _SLIDING_PERIOD[arch] if pattern is None else reader.size("attention.sliding_window_pattern")
        slides = _slides(layers, period)
    elif isinstance(pattern, list) and len(pattern) == layers and all(type(one) is bool for one in pattern):
        slides = pattern
    else:
        raise reader.error("attention.sliding_window_pattern", f"expected a period, or a list of {layers} bools")
    if arch == "gemma2":
        found["attn_logit_softcapping"] = reader.number("attn_logit_softcapping", 50.0)
        found["final_logit_softcapping"] = reader.number("final_logit_softcapping", 30.0)
        window = window or 4096
    else:
        if reader.get("final_logit_softcapping") is not None:
            found["final_logit_softcapping"] = reader.number("final_logit_softcapping")
        found["rope_local_base_freq"] = reader.number("rope.freq_base_swa", 10_000.0)
        slides = slides if window else [False] * layers
    found["sliding_window"] = window or 4096  # without sliding layers any will do
    found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
    return found


def _scaling(reader: _Reader, head_dim: int, theta: float, positions: int) -> dict[str, Any]:
    """The contents of ``rope_scaling``, none for plain RoPE."""
    kind, known = reader.get("rope.scaling.type"), _ROPES[reader.arch]
    factor = reader.number("rope.scaling.factor", 1.0)
    old = reader.number("rope.scale_linear", 1.0)  # what the key was called once
    original = reader.size("rope.scaling.original_context_length", positions)
    extra = reader.number("rope.scaling.attn_factor", 1.0)
    fast, slow = (reader.number(f"rope.scaling.yarn_beta_{name}", usual) for name, usual in (("fast", 32), ("slow", 1)))
    for name in ("ext", "attn"):
        reader.fixed(f"rope.scaling.yarn_{name}_factor", 1.0)
    factor = old if factor == 1.0 else factor
    names = {"default": "none"}
    if kind is not None and kind not in [names.get(name, name) for name in known if name != "llama3"]:
        raise reader.error("rope.scaling.type", f"supported: none, {', '.join(n for n in known if n != 'default')}")
    if kind != "yarn" and extra != 1.0:
        raise reader.error("rope.scaling.attn_factor", "supported with rope.scaling.type = 'yarn' only")
    if reader.arch == "llama" and ROPE_FACTORS in reader.file.entries:
        if kind not in (None, "none") and factor != 1.0:
            raise reader.error("rope.scaling.type", f"two scalings at once, this one and the tensor {ROPE_FACTORS}")
        return llama3_scaling(reader.file, head_dim, theta)
    if kind == "none" or (kind != "yarn" and factor == 1.0):
        return {}
    if kind != "yarn":
        return {"rope_type": "linear", "factor": factor}
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if extra != 1.0:
        found["attention_factor"] = _shortest(extra, _yarn_own(factor))
    return found | ({"beta_fast": fast, "beta_slow": slow} if (fast, slow) != (32.0, 1.0) else {})


def _shortest(stored: float, unit: float) -> float:
    """The shortest decimal that, divided by ``unit``, is ``stored`` in float32: what the file was made of."""
    exact = stored * unit
    rounded = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((value for value in rounded if np.float32(value / unit) == np.float32(stored)), exact)
