"""Checkpoints that bitsandbytes quantised to NF4, as transformers saves them: what config and files say, all checked.

config.json has a "quantization_config". In the files a matrix NAME (out, in) is several tensors, each checked here
before anything uses it (https://github.com/bitsandbytes-foundation/bitsandbytes, ``QuantState.as_dict``):

    NAME                                      uint8 (ceil(out in / 2), 1): two codes of 4 bits a byte
    NAME.absmax                               of each block: float32; with double quantisation uint8, codes of 8 bits
    NAME.quant_map                            float32 (16,): what the codes of 4 bits mean
    NAME.nested_absmax, .nested_quant_map     float32, (256,): with double quantisation, what the codes of 8 bits mean
    NAME.quant_state.bitsandbytes__nf4        uint8, JSON: shape, blocksize, dtype, nested_offset and so on

Matrices that were left out of the quantisation (llm_int8_skip_modules) lie among them as they always do; the tensors,
not the list, say which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afina.errors import WeightsError, nearest
from afina.loaders.jsonfile import parse_json, show

if TYPE_CHECKING:  # the config is read without torch
    from torch import Tensor

    from afina.loaders.weights.source import Weights

SUPPORTED = "supported are bitsandbytes' nf4 and unquantised models"
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__"
MAX_STATE = 4096  # bytes of JSON; about 170 are written

# What a quantization_config may hold, and the one value of it that is supported (None: any). Which matrices are
# quantised, and how, each of them says itself; the type to compute in is the run's own; the rest is about 8-bit models.
_KEYS: Mapping[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "_load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_use_double_quant": None,
    "bnb_4bit_compute_dtype": None,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": None,
    "llm_int8_has_fp16_weight": None,
    "llm_int8_enable_fp32_cpu_offload": None,
}
_STATE_KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})


def unsupported(config: Any) -> str | None:
    """What is wrong with the "quantization_config" of a config.json, or None where it is bitsandbytes' nf4."""
    if not isinstance(config, dict):
        return "expected an object"
    method = config.get("quant_method")
    if method not in (None, "bitsandbytes"):  # old files leave it out
        return f"weights quantised by {show(method)} are not supported; {SUPPORTED}"
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return f"weights quantised to 8 bits are not supported; {SUPPORTED}"
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        return f"load_in_4bit is not set; {SUPPORTED}"
    if (kind := config.get("bnb_4bit_quant_type", "fp4")) != "nf4":  # fp4 is transformers' default
        return f"weights quantised to {show(kind)} are not supported; {SUPPORTED}"
    for key, value in config.items():
        if key not in _KEYS:
            return f"unknown key {show(key)}, refused because it may change the weights{nearest(key, _KEYS)}"
        if (only := _KEYS[key]) is not None and value is not None and value != only:
            return f"{key} = {show(value)} is not supported; expected {only!r}"
    return None


@dataclass(frozen=True)
class QuantizedTensor:
    """What the headers and the JSON of one matrix say. ``shape`` (out, in); ``dtype`` is that of the weight before,
    by name; ``nested_blocksize`` and ``offset`` are None without double quantisation."""

    name: str
    shape: tuple[int, int]
    dtype: str
    blocksize: int
    nested_blocksize: int | None = None
    offset: float | None = None

    def companions(self) -> list[str]:
        """Names of the tensors of the file that belong to this one."""
        parts = PARTS if self.nested_blocksize is not None else PARTS[:2]
        return [*(f"{self.name}.{part}" for part in parts), f"{self.name}.{STATE}nf4"]


def quantized_tensors(files: Weights, *, announced: bool) -> dict[str, QuantizedTensor]:
    """The quantised matrices of a checkpoint by name; only their JSON has been read.

    ``announced``: config.json has a quantization_config. Raises WeightsError, one line, where the tensors contradict
    that, and for a matrix with parts missing, of other sizes or types, or with JSON that does not say what it must.
    """
    marker = f".{STATE}"
    found = {}
    for state in files.names():
        name, mark, kind = state.rpartition(marker)
        if mark:
            found[name] = _read_state(files, name, state, kind)
    if bool(found) != announced:
        weights, config = ("no tensor", "a") if announced else (next(iter(found)), "no")
        raise WeightsError(
            f"{files.path}: {weights} is quantised, but config.json has {config} quantization_config: download "
            "the config that belongs to the weights"
        )
    return found


def read_quantized(files: Weights, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one matrix, on the CPU: "packed" and those of ``PARTS`` that it has."""
    parts = PARTS if tensor.nested_blocksize is not None else PARTS[:2]
    return {"packed": files.read(tensor.name)} | {part: files.read(f"{tensor.name}.{part}") for part in parts}


def _read_state(files: Weights, name: str, state: str, kind: str) -> QuantizedTensor:
    where = f"{files.path}: tensor {show(state)}"

    def bad(found: str) -> WeightsError:
        return WeightsError(f"{where}: {found}: download the model again, or quantise it anew")

    if kind != "nf4":
        raise WeightsError(f"{where}: is quantised as {show(kind)}, which is not supported; {SUPPORTED}")
    shape = files.shape(state)
    if str(files.dtype(state)) != "torch.uint8" or len(shape) != 1 or shape[0] > MAX_STATE:
        raise bad(f"is {files.dtype(state)} {shape}, expected at most {MAX_STATE} uint8")
    values = parse_json(files.read(state).numpy().tobytes(), where, error=WeightsError)
    nested = not _NESTED_KEYS.isdisjoint(values)
    expected = _STATE_KEYS | (_NESTED_KEYS if nested else set())
    if values.keys() != expected:
        raise bad(f"has the keys {', '.join(map(show, sorted(values)))}, expected {', '.join(sorted(expected))}")

    def choice(key: str, options: tuple[Any, ...]) -> Any:
        value = values[key]
        # True == 1, and a float may equal a whole number, but neither is one.
        if type(value) is not type(options[0]) or value not in options:
            raise bad(f"{key} is {show(value)}, expected {', '.join(map(str, options))}")
        return value

    choice("quant_type", ("nf4",))
    size = values["shape"]
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or not 1 <= n < 2**31 for n in size):
        raise bad(f"shape is {show(size)}, expected [out, in]")
    tensor = QuantizedTensor(name, (size[0], size[1]), choice("dtype", DTYPES), choice("blocksize", BLOCKSIZES))
    if nested:
        choice("nested_dtype", ("float32",))
        offset = values["nested_offset"]
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < 3e38:
            raise bad(f"nested_offset is {show(offset)}, expected a number of float32")
        tensor = QuantizedTensor(
            name, tensor.shape, tensor.dtype, tensor.blocksize, choice("nested_blocksize", BLOCKSIZES), float(offset)
        )
    _check_parts(files, tensor)
    return tensor


def _check_parts(files: Weights, tensor: QuantizedTensor) -> None:
    count = math.prod(tensor.shape)
    blocks = -(-count // tensor.blocksize)
    nested = tensor.nested_blocksize
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "": ("uint8", (-(-count // 2), 1)),
        ".absmax": ("float32" if nested is None else "uint8", (blocks,)),
        ".quant_map": ("float32", (16,)),
    }
    if nested is not None:
        wanted |= {".nested_absmax": ("float32", (-(-blocks // nested),)), ".nested_quant_map": ("float32", (256,))}
    for suffix, (dtype, shape) in wanted.items():
        name = tensor.name + suffix
        found = str(files.dtype(name)).removeprefix("torch."), files.shape(name)
        if found != (dtype, shape):
            raise WeightsError(
                f"{files.path}: tensor {show(name)} is {found[0]} {found[1]}, expected {dtype} {shape} for a "
                f"quantised matrix of shape {tensor.shape}: download the model again"
            )
