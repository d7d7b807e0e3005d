"""Model folders as transformers saves them once bitsandbytes has quantised them, written by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afina.kernels.nf4 import quantize_nf4

Tensors = dict[str, Tensor]
BNB = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip
STATE = "quant_state.bitsandbytes__nf4"


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and re.search(r"\.(layers|h)\.\d+\.", name) is not None


def pack(name: str, weight: Tensor, *, double_quant: bool = True) -> Tensors:
    """The tensors that bitsandbytes makes of a matrix (out, in)."""
    packed, state = quantize_nf4(weight, double_quant=double_quant)
    says: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": str(weight.dtype).removeprefix("torch.")}
    says["shape"] = list(weight.shape)
    parts = {name: packed, f"{name}.absmax": state.absmax, f"{name}.quant_map": state.code.clone()}
    if state.nested_absmax is not None and state.nested_code is not None and state.offset is not None:
        says |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": state.offset.item()}
        parts |= {f"{name}.nested_absmax": state.nested_absmax, f"{name}.nested_quant_map": state.nested_code.clone()}
    return parts | {f"{name}.{STATE}": state_tensor(says)}


def state_tensor(says: Any) -> Tensor:
    return torch.tensor(list(json.dumps(says).encode()), dtype=torch.uint8)


def state_of(tensors: Tensors, name: str) -> dict[str, Any]:
    return json.loads(bytes(tensors[f"{name}.{STATE}"].tolist()))


def by_hand(
    source: Path,
    folder: Path,
    *,
    double_quant: bool = True,
    dtype: torch.dtype = torch.float32,
    skip: str = "$nothing",
    edit: Callable[[Tensors], object] = lambda tensors: None,
    config: dict[str, Any] | None = BNB,
) -> Path:
    """A model's folder as transformers saves it once bitsandbytes has quantised it, but for matrices like ``skip``."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    hf = json.loads((folder / "config.json").read_text())
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if is_matrix(name, tensor) and not re.search(skip, name):
            weight = tensor.t() if hf["model_type"] == "gpt2" else tensor
            tensors |= pack(name, weight.to(dtype), double_quant=double_quant)
        else:
            tensors[name] = tensor
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    hf = {key: value for key, value in hf.items() if key != "quantization_config"}
    if config is not None:
        hf["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(hf))
    return folder
