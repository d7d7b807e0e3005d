"""GGUF, the one file of weights, config and vocabulary that llama.cpp and all that is built on it read: both ways.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is a list of key-values (the config under
llama.cpp's names, `gguf_config.py`, and the vocabulary, `gguf_vocab.py`), a list of tensors, and their bytes
(`gguf_file.py` reads them). Here each tensor's name and what llama.cpp's converter does to its values stand beside the
way back.

The `gguf` package writes the format and takes blocks of quantised numbers apart; it is imported when that is done, not
before.
"""

from __future__ import annotations

import hashlib
import json
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
from afina.loaders.jsonfile import show
from afina.loaders.text.gguf_vocab import write_vocabulary
from afina.loaders.text.tokenizer import Tokenizer, check_vocab
from afina.loaders.weights.gguf_config import ARCHITECTURES, architecture_of, read_config, write_config
from afina.loaders.weights.gguf_file import PLAIN, GGUFFile, gguf_package
from afina.loaders.weights.gguf_rope import ROPE_FACTORS, rope_factors
from afina.loaders.weights.stream import SAMPLE

# The dtypes a file can be asked for -> the names of the format.
DTYPES = {
    **dict.fromkeys(("float32", "f32"), "F32"),
    **dict.fromkeys(("float16", "f16"), "F16"),
    **dict.fromkeys(("bfloat16", "bf16"), "BF16"),
    "q8_0": "Q8_0",
}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
# The largest magnitude that a dtype holds; a block of Q8_0 is 32 bytes from -127 to 127 and their scale, in float16.
_LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}

# HF's names -> llama.cpp's, without ".weight" and ".bias": outside of the layers, and of a layer's parts.
_OUTER = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}  # fmt: skip
_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_GEMMA_PARTS = _PARTS | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip

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

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[DTYPES[dtype]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_config(gguf, writer, arch, fields)
    write_vocabulary(gguf, writer, tokenizer, fields["vocab_size"])

    kinds: dict[str, str] = {}
    shapes = {name: converted(arch, fields, name, x.to("meta")).shape for name, x in tensors()}
    if factors := rope_factors(fields):
        writer.add_tensor_info(ROPE_FACTORS, (len(factors),), np.dtype(np.float32), 4 * len(factors))
    if shapes.keys() != expected:
        one = min(shapes.keys() ^ expected)
        what = "is missing" if one in expected else "belongs to no such model"
        raise WeightsError(f"{path}: {one} {what}, by config.json: give the weights and the config of one model")
    for name, shape in shapes.items():
        kind = kinds[name] = _kind(DTYPES[dtype], name, shape)
        quantization = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        nbytes = shape.numel() // block * size
        writer.add_tensor_info(
            their_name(arch, name), tuple(shape), np.dtype(np.float32), nbytes, raw_dtype=quantization
        )

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


def their_name(arch: str, name: str) -> str:
    """llama.cpp's name of a tensor that HF calls ``name``."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{(_GEMMA_PARTS if arch.startswith('gemma') else _PARTS)[part]}.{kind}"


def converted(arch: str, fields: Fields, name: str, x: Tensor) -> Tensor:
    """A tensor of HF's as llama.cpp wants it: another order of rows, the transpose, or norm weights plus one."""
    if _is_transposed(arch, name):
        return x.t()
    if _is_plus_one(arch, name):
        return x.float() + 1
    heads = _turned_heads(arch, fields, name)
    return x if heads is None else _in_their_order(x, heads).flatten(0, 2)


def _is_transposed(arch: str, name: str) -> bool:
    return arch == "gpt2" and ".c_" in name and name.endswith(".weight")  # HF's Conv1D stores (in, out)


def _is_plus_one(arch: str, name: str) -> bool:
    return arch.startswith("gemma") and name.endswith("norm.weight")  # HF multiplies by 1 + w


def _turned_heads(arch: str, fields: Fields, name: str) -> int | None:
    """How many heads a matrix or bias of q or k has, where llama.cpp has their rows in another order; else None."""
    if arch == "llama" and any(f".{p}_proj." in name for p in "qk"):
        return int(fields["num_heads" if ".q_proj." in name else "num_kv_heads"])
    return None


def _in_their_order(x: Tensor, heads: int) -> Tensor:
    """A view of HF's rows (heads * D, ...) in llama.cpp's order (heads, D / 2, 2, ...), which may be written to: its
    RoPE turns neighbours (0, 1), (2, 3), ...; HF's turns the halves (0, D/2), (1, D/2 + 1), ..."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2)


class GGUFWeights:
    """The weights of a GGUF file under HF's names, in HF's shapes and order; see ``source.Weights``.

    A tensor that belongs to no such model keeps the file's name. Raises WeightsError and ConfigError.
    """

    config_name = "its header"

    def __init__(self, path: Path, *, allow_nonfinite: bool = False) -> None:
        self.path = Path(path)
        self.file = GGUFFile(self.path)
        self._finite = not allow_nonfinite
        hf = read_config(self.file)
        family = load_family(hf)
        self._fields = family.config_fields(hf)
        self._arch = ARCHITECTURES[hf["model_type"]]
        known = [tensor.name for tensor in family.tensors(self._fields)]
        self._theirs = {name: their_name(self._arch, name) for name in [*known, family.head]}
        ours = {theirs: name for name, theirs in self._theirs.items()}
        read = {ROPE_FACTORS} if self._arch == "llama" else set()  # by the config
        self._names = {ours.get(name, name): name for name in self.file.names() if name not in read}

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._names)

    def spelling(self, name: str) -> str:
        """Return the file's own name of a tensor, there or not."""
        return self._theirs.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as HF has it."""
        shape = self.file.shape(self._stored(name))
        return shape[::-1] if _is_transposed(self._arch, name) else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the file, float32 where it is quantised."""
        return self.file.dtype(self._stored(name))

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise WeightsError(f"{self.path}: holds no tensor {show(name)}{nearest(name, self._names)}: check the name")
        return self._names[name]

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in HF's shape and the file's dtype."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor, *, rows: slice | None = None, transpose: bool = False) -> None:
        """Fill ``out`` as :meth:`SafetensorsFolder.read_into` does. Raises ValueError for rows that do not lie together
        in the file, which the layers of some architectures have."""
        stored, arch = self._stored(name), self._arch
        turned = _is_transposed(arch, name)
        heads = _turned_heads(arch, self._fields, name)
        if (turned and rows is not None) or (heads is not None and (transpose or rows is not None)):
            raise ValueError(f"{name}: {'rows' if rows is not None else 'columns'} do not lie together in a GGUF file")
        if heads is not None and out.shape == self.file.shape(stored):
            out = _in_their_order(out.detach(), heads)
        self.file.read_into(
            stored,
            out,
            rows=rows,
            transpose=transpose != turned,
            finite=self._finite,
            add=-1.0 if _is_plus_one(arch, name) else 0.0,
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of all names, types, shapes and bytes."""
        return self._digest(None)

    def sample(self) -> str:
        """Return the SHA-256 (hex) of all names, types and shapes, and of the first SAMPLE bytes of each tensor."""
        return self._digest(SAMPLE)

    def _digest(self, limit: int | None) -> str:
        digest = hashlib.sha256()
        for name in self.file.names():
            digest.update(json.dumps([name, self.file.kind(name), self.file.shape(name)]).encode())
            pieces = self.file.stored(name) if limit is None else self.file.stored(name, limit)
            for piece in pieces:
                digest.update(piece)
                if limit is not None:
                    break
        return digest.hexdigest()


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
    x = x.to(PLAIN[kind]).contiguous()
    return x.view(torch.int16).numpy() if kind == "BF16" else x.numpy()  # numpy has no bfloat16


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
    fields = load_family(hf_config).config_fields(hf_config)
    arch = ARCHITECTURES[hf_config["model_type"]]
    file = GGUFFile(path)
    for name, tensor in tensors:
        stored = their_name(arch, name)
        wanted = converted(arch, fields, name, tensor)
        shape = file.shape(stored) if stored in file.entries else ()
        if shape != tuple(wanted.shape):
            raise WeightsError(f"{path}: {name} has shape {shape}, expected {tuple(wanted.shape)}: write it again")
        step = max(1, shape[0] // COMPARED_ROWS) if len(shape) > 1 else shape[0]
        error = largest = 0.0
        for first in range(0, shape[0], step):
            some = slice(first, first + 1 if len(shape) > 1 else None)
            expected = wanted[some].float().cpu()
            error = max(error, float((file.read(stored, some).float() - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
        yield Difference(name, file.kind(stored), error / largest if largest > 0 else error)
