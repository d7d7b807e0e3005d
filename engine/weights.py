"""Models from and to disk, in the HF layout: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afina.engine.config import ModelConfig
from afina.engine.model import GPT
from afina.errors import ConfigError, WeightsError, nearest
from afina.kernels.backend import requested
from afina.loaders.checkpoint import Checkpoint, atomic_write, save_tensors
from afina.loaders.families.common import Family, HFTensor
from afina.loaders.families.registry import load_family
from afina.loaders.hub import resolve
from afina.loaders.jsonfile import read_json

if TYPE_CHECKING:
    from afina.loaders.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LISTED = 10  # problems named in one message
CHUNK_ROWS = 4096


def load_model(source: str | Path, *, dtype: str = "auto", device: str = "auto", allow_nonfinite: bool = False) -> GPT:
    """Load a model in eval mode.

    ``source``: a folder, a run folder (its best model), "afina-tiny" or a hub id. ``dtype``: "float32", "bfloat16",
    "float16", or "auto": float32 on a CPU, bfloat16 on a GPU. ``device``: "cpu", "cuda", or "auto". ``allow_nonfinite``
    accepts NaN and Inf. Raises ``WeightsError`` and ``ConfigError``. Weights are streamed: the peak is the model itself
    in ``dtype`` and one buffer.
    """
    folder = resolve(source)
    config, hf = read_config(folder)
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    check_memory(config, kind, where)
    checkpoint = Checkpoint(folder, allow_nonfinite=allow_nonfinite)
    model = GPT(config, device="meta", dtype=kind)
    model.hf_config = hf
    table = _match(model, checkpoint, folder)
    model.to_empty(device=where)
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    for name, tensor in table.items():
        checkpoint.read_into(name, _view(parameters, tensor), transpose=tensor.transpose)
    model.hash_source = checkpoint.fingerprint
    return model.eval()


def new_model(
    config: str | Path | Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> GPT:
    """A randomly initialised model (in train mode) for an HF config: a config.json, a folder that holds one, or its
    contents. ``vocab_size`` replaces the config's. Raises ``ConfigError``."""
    if isinstance(config, str | Path):
        path = Path(config)
        config = read_json(path / "config.json" if path.is_dir() else path)
    hf = {**config, **({} if vocab_size is None else {"vocab_size": vocab_size})}
    fields = ModelConfig.from_hf(hf)
    hf.setdefault("architectures", [load_family(hf).architecture])
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    check_memory(fields, kind, where)
    model = GPT(fields, device="meta", dtype=kind).to_empty(device=where)
    model.init_weights(seed)
    model.hf_config = hf
    model.hash_source = lambda: hashlib.sha256(json.dumps([hf, seed], sort_keys=True).encode()).hexdigest()
    return model.train()


def save_model(model: GPT, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write ``model`` to ``folder`` as transformers would: config.json as it was read (with the dtype of the weights),
    model.safetensors (and an index above 5 GB) under HF names, and the tokenizer's files. Raises ``WeightsError``."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise WeightsError(f"{folder}: cannot be made ({problem.strerror}): choose another folder") from problem
    save_tensors(hf_tensors(model), folder)
    hf = dict(model.hf_config)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    for key in [k for k in ("dtype", "torch_dtype") if k in hf] or ["dtype"]:
        hf[key] = dtype
    with atomic_write(folder / "config.json") as file:
        file.write(json.dumps(hf, indent=2, ensure_ascii=False).encode() + b"\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def hf_tensors(model: GPT, values: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under their HF names and in their HF shapes; or other ``values`` with our names and shapes
    (gradients, say)."""
    if values is None:
        values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for tensor in _table(model, load_family(model.hf_config)):
        view = _view(values, tensor)
        # Views of a larger parameter stay views: save_tensors streams them.
        yield tensor.name, view.t() if tensor.transpose else (view.flatten(0, 2) if tensor.heads else view)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config, and the contents of its config.json. Raises ``ConfigError``."""
    hf = read_json(Path(folder) / "config.json")
    return ModelConfig.from_hf(hf), hf


def choose_device(device: str) -> torch.device:
    """The device that a run asks for, once it is sure that it is here and that AFINA_BACKEND's kernels run on it."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(found if device == "auto" else device)
    except RuntimeError:
        raise ConfigError(
            f"device = {device!r}: expected auto, cpu or cuda{nearest(device, ('cpu', 'cuda'))}"
        ) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {device!r}: torch sees no GPU on this machine; use --device cpu")
    try:
        requested(None, chosen)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: expected auto, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a config whose weights alone cannot fit, before anything is allocated."""
    needed = config.num_parameters() * dtype.itemsize
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"config.json: {config.num_parameters():,} parameters (hidden_size {config.hidden_size}, "
            f"{config.num_layers} layers, vocab_size {config.vocab_size}) take {needed / 1e9:,.1f} GB in "
            f"{str(dtype).removeprefix('torch.')}, but the {device.type} has {memory / 1e9:,.1f} GB: "
            "check the sizes, or use a smaller model or dtype"
        )


def _table(model: GPT, family: Family) -> list[HFTensor]:
    return list(family.tensors(model.config.to_dict()))


def _view(values: Mapping[str, Tensor], tensor: HFTensor) -> Tensor:
    """Our rows that a tensor of the file holds: for ``heads`` as (heads, 3, D, ...), in the file's order."""
    rows = values[tensor.ours][tensor.start : tensor.stop]
    return rows.unflatten(0, (3, tensor.heads, -1)).transpose(0, 1) if tensor.heads else rows


def _match(model: GPT, checkpoint: Checkpoint, folder: Path) -> dict[str, HFTensor]:
    """The table by the names that this file uses. Raises ``WeightsError`` listing all that is missing or too much."""
    family = load_family(model.hf_config)
    table = {tensor.name: tensor for tensor in _table(model, family)}
    found = set(checkpoint.names())
    if not any(name.startswith(family.prefix) for name in found):
        # Saved from the bare body, without the head's class around it.
        table = {name.removeprefix(family.prefix): tensor for name, tensor in table.items()}
    embedding = next(name for name, tensor in table.items() if tensor.ours == "embed.weight")
    tied = model.config.tie_embeddings and family.head in found
    if tied and embedding not in found:  # of two equal tensors, the file kept the other
        table[family.head] = table.pop(embedding)
        tied = False
    parameters = dict(model.named_parameters())
    problems: list[str] = []

    def near(name: str, names: set[str]) -> str:
        return nearest(name, names) if len(problems) < LISTED else ""  # slow, and nobody reads the rest

    missing, extra = table.keys() - found, found - table.keys()
    for name, tensor in table.items():
        if name in missing:
            problems.append(f"{name} missing{near(name, extra)}")
            continue
        rows = parameters[tensor.ours][tensor.start : tensor.stop]
        shape = tuple(rows.t().shape if tensor.transpose else rows.shape)
        if checkpoint.shape(name) != shape:
            problems.append(f"{name} has shape {checkpoint.shape(name)}, expected {shape}")
    for name in sorted(extra):
        if tied and name == family.head:
            if not _equal(checkpoint, name, embedding):
                problems.append(
                    f"{name} differs from {embedding}, but config.json ties them: set tie_word_embeddings to false, "
                    "or remove the copy"
                )
        elif not any(re.search(pattern, name) for pattern in family.ignorable):
            problems.append(f"{name} unexpected{near(name, missing)}")
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise WeightsError(
            f"{folder}: the weights differ from config.json (model_type {family.model_type}) in {len(problems)} "
            f"places: {'; '.join(problems[:LISTED])}{more}: download the model again, or the config that belongs to it"
        )
    return table


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices of the file hold the same, compared in pieces."""
    shape = checkpoint.shape(one)
    if shape != checkpoint.shape(other) or checkpoint.dtype(one) != checkpoint.dtype(other) or len(shape) != 2:
        return False
    for start in range(0, shape[0], CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, shape[0]))
        pieces = [torch.empty(rows.stop - start, shape[1], dtype=checkpoint.dtype(one)) for _ in range(2)]
        for name, piece in zip((one, other), pieces):
            checkpoint.read_into(name, piece, rows=rows)
        if not torch.equal(*pieces):
            return False
    return True
