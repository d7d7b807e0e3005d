"""Models from disk, a folder in the HF layout or a GGUF file, and to disk as a folder: config.json, safetensors,
tokenizer files."""

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

from afina.durable import open_file
from afina.engine.linear import Linear
from afina.engine.lora import load_adapter, set_adapter
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.nf4_weight import BITS, read_nf4, shapes_of_nf4
from afina.engine.weight_offload import HostWeights
from afina.errors import ConfigError, WeightsError, nearest
from afina.kernels.backend import requested
from afina.kernels.selftest import verify
from afina.loaders.families.common import HFTensor
from afina.loaders.families.registry import load_family
from afina.loaders.jsonfile import read_json
from afina.loaders.weights.bitsandbytes import QuantizedTensor, quantized_tensors
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.peft import base_format, find_base, is_adapter
from afina.loaders.weights.safetensors import Later, save_tensors
from afina.loaders.weights.source import Weights, open_weights, read_hf_config
from afina.manifest import check_manifest

if TYPE_CHECKING:
    from afina.loaders.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZE = {"nf4": None, **{f"nf4-{name}": dtype for name, dtype in DTYPES.items()}}
LISTED = 10  # problems named in one message
CHUNK_ROWS = 4096


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    allow_nonfinite: bool = False,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    weights: bool = True,
    offload_params: bool = False,
) -> GPT:
    """Load a model in eval mode.

    ``source``: a folder, a run folder (its best model), a GGUF file, "afina-tiny" or a hub id. ``dtype``: "float32",
    "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU. ``device``: "cpu", "cuda", or "auto".
    ``allow_nonfinite`` accepts NaN and Inf. ``quantize``: "nf4" holds the matrices of the layers as NF4 with double
    quantisation, made of the weights in ``dtype`` (QLoRA's frozen base: they have no gradient), "nf4-bfloat16" and so
    on of the weights in that dtype; None as the files do, so NF4 where bitsandbytes wrote them, whatever this says, but
    dequantised where a GGUF file has blocks. Raises ``WeightsError`` and ``ConfigError``. Weights are streamed: the
    peak is the model itself as it is held, and one buffer; quantising, also one tensor of the file and 50 MB.

    ``adapter``: a folder, run folder or hub id of an adapter to put on the model. An adapter as ``source`` is put on
    the base that it names; that is loaded as it was in training, so as NF4 for one of QLoRA.

    Without ``weights`` everything is checked, but no weight is read: the model has shapes only, on device "meta". With
    ``offload_params`` the layers' dense matrices are read into the host's memory, and come to the device in turn.
    """
    if quantize is not None and quantize not in QUANTIZE:
        raise ConfigError(
            f"quantize = {quantize!r}{nearest(quantize, QUANTIZE)}: expected {', '.join(QUANTIZE)} or None"
        )
    folder = resolve(source)
    if is_adapter(folder):
        base, where_it_is = find_base(folder)
        if adapter is not None:
            raise ConfigError(f"{source} is an adapter itself: load its base ({base}) with one of the two")
        adapter, folder = folder, where_it_is
    if adapter is not None:
        adapter = resolve(adapter)
        quantize = quantize or base_format(adapter)
    config, hf = read_config(folder)
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    published = hf.get("quantization_config") is not None  # and then its own choice of matrices holds
    check_memory(config, kind, _holder(where, offload_params), quantized=published or quantize is not None)
    files = open_weights(folder, allow_nonfinite=allow_nonfinite)
    model = GPT(config, device="meta", dtype=kind)
    model.hf_config = hf
    stored = quantized_tensors(files, announced=published)
    table = _match(model, files, stored)
    held = _held_quantized(model, table, stored, everything=quantize is not None and not published)
    for ours in held:
        _layer(model, ours).hold(None)  # it is never dense, not even for a moment
    values = kind if published else QUANTIZE.get(quantize or "") or kind
    if weights:
        check_manifest(folder)
        if where.type == "cuda":
            verify(where)
        if offload_params:
            model.host_weights = HostWeights(model.layers, where)
        model.to_empty(device=where)
        parameters = dict(model.named_parameters())
        for name, tensor in table.items():
            if tensor.ours in parameters:
                rows = parameters[tensor.ours][tensor.start : tensor.stop]
                files.read_into(name, tensor.in_file_order(rows), transpose=tensor.transpose)
    for ours, tensors in held.items():
        layer = _layer(model, ours)
        if weights:
            layer.hold(read_nf4(files, tensors, stored, values, where, dense=published))
        else:
            layer.hold(shapes_of_nf4(layer.out_features, layer.in_features, values))
    model.requires_grad_(True)
    model.hash_source, model.sample_source = files.fingerprint, files.sample
    if adapter is not None:
        set_adapter(model, load_adapter(model, adapter))
    return model.eval()


def new_model(
    config: str | Path | Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    weights: bool = True,
    offload_params: bool = False,
) -> GPT:
    """A randomly initialised model (in train mode) for an HF config: a config.json, a folder that holds one, or its
    contents. ``vocab_size`` replaces the config's. ``weights`` and ``offload_params`` are those of ``load_model``.
    Raises ``ConfigError``."""
    if isinstance(config, str | Path):
        path = Path(config)
        config = read_json(path / "config.json" if path.is_dir() else path.resolve())
    hf = {**config, **({} if vocab_size is None else {"vocab_size": vocab_size})}
    fields = ModelConfig.from_hf(hf)
    hf.pop("quantization_config", None)  # of the weights that the config came with
    hf.setdefault("architectures", [load_family(hf).architecture])
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    check_memory(fields, kind, _holder(where, offload_params))
    model = GPT(fields, device="meta", dtype=kind)
    if weights:
        if where.type == "cuda":
            verify(where)
        if offload_params:
            model.host_weights = HostWeights(model.layers, where)
        model.to_empty(device=where)
        model.init_weights(seed)
    model.hf_config = hf
    model.hash_source = lambda: hashlib.sha256(json.dumps([hf, seed], sort_keys=True).encode()).hexdigest()
    model.sample_source = model.hash_source
    return model.train()


def save_model(model: GPT, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write ``model`` to ``folder`` as transformers would: config.json as it was read (with the dtype of the weights),
    model.safetensors (and an index above 5 GB) under HF names, and the tokenizer's files. NF4 weights are written
    dequantised, one matrix at a time. Raises ``WeightsError``."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise WeightsError(f"{folder}: cannot be made ({problem.strerror}): choose another folder") from problem
    kind = model.dtype
    save_tensors(_named(model, _parameters(model), kind), folder)
    hf = {key: value for key, value in model.hf_config.items() if key != "quantization_config"}
    dtype = str(kind).removeprefix("torch.")
    for key in [k for k in ("dtype", "torch_dtype") if k in hf] or ["dtype"]:
        hf[key] = dtype
    with open_file(folder / "config.json", error=WeightsError) as file:
        file.write(json.dumps(hf, indent=2, ensure_ascii=False).encode() + b"\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def hf_tensors(model: GPT, values: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The model's weights under their HF names and in their HF shapes; or other ``values`` with our names and shapes
    (gradients, say). A matrix that is held as NF4 is dequantised to fp32 when its turn comes: keep one at a time."""
    for name, tensor in _named(model, _parameters(model) if values is None else values, torch.float32):
        yield name, tensor.make() if isinstance(tensor, Later) else tensor


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config, and the contents of its config.json or what its GGUF file says in its place. ``folder`` is
    what ``resolve`` gave. Raises ``ConfigError``."""
    hf = read_hf_config(Path(folder))
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


def _holder(device: torch.device, offload_params: bool) -> torch.device:
    """The device whose memory holds nearly all of the weights."""
    return torch.device("cpu") if offload_params else device


def check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device, *, quantized: bool = False) -> None:
    """Refuse a config whose weights alone cannot fit, before anything is allocated. ``quantized``: the matrices of the
    layers are held as NF4."""
    count = config.num_parameters()
    packed = config.num_layers * _layer_matrices(config) if quantized else 0
    needed = (count - packed) * dtype.itemsize + packed * BITS / 8
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        held = str(dtype).removeprefix("torch.") + (" and nf4" if quantized else "")
        raise ConfigError(
            f"the config: {count:,} parameters (hidden_size {config.hidden_size}, {config.num_layers} layers, "
            f"vocab_size {config.vocab_size}) take {needed / 1e9:,.1f} GB in {held}, but the {device.type} has "
            f"{memory / 1e9:,.1f} GB: check the sizes, or use a smaller model or dtype"
        )


def _layer_matrices(config: ModelConfig) -> int:
    """How many weights the matrices of one layer hold."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.hidden_size * (2 * (q + kv) + (3 if config.gated else 2) * config.intermediate_size)


def _layer(model: GPT, ours: str) -> Linear:
    """The layer that a matrix's name belongs to."""
    layer = model.get_submodule(ours.rpartition(".")[0])
    assert isinstance(layer, Linear)
    return layer


def _parameters(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _named(model: GPT, values: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor | Later]]:
    """``values`` as the file has them; a matrix that the model holds quantised is made, in ``dtype``, in its turn."""
    for tensor in model.config.tensors(model.hf_config):
        if tensor.ours in values:
            # Views of a larger parameter stay views where they can: save_tensors streams them.
            yield tensor.name, tensor.to_file(values[tensor.ours][tensor.start : tensor.stop])
            continue
        layer = _layer(model, tensor.ours)
        shape = (tensor.stop - tensor.start, layer.in_features)

        def make(layer: Linear = layer, tensor: HFTensor = tensor) -> Tensor:
            return tensor.to_file(layer.rows(tensor.start, tensor.stop, dtype))

        yield tensor.name, Later(shape[::-1] if tensor.transpose else shape, dtype, make)


def _held_quantized(
    model: GPT, table: Mapping[str, HFTensor], stored: Mapping[str, QuantizedTensor], *, everything: bool
) -> dict[str, dict[str, HFTensor]]:
    """Our matrices to hold as NF4, each with the tensors of the file that it is made of: those of which the file holds
    a part quantised, or ``everything`` that may be."""
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers.")}
    held: dict[str, dict[str, HFTensor]] = {}
    for name, tensor in table.items():
        if tensor.ours in matrices:
            held.setdefault(tensor.ours, {})[name] = tensor
    return {ours: tensors for ours, tensors in held.items() if everything or not stored.keys().isdisjoint(tensors)}


def _match(model: GPT, files: Weights, stored: Mapping[str, QuantizedTensor]) -> dict[str, HFTensor]:
    """The table by the names that this file uses; ``stored`` are its quantised matrices. Raises ``WeightsError``
    listing all that is missing or too much."""
    family = load_family(model.hf_config)
    table = {tensor.name: tensor for tensor in model.config.tensors(model.hf_config)}
    found = set(files.names())
    found -= {name for tensor in stored.values() for name in tensor.companions()}
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

    def told(name: str) -> str:
        return files.spelling(name)

    def near(name: str, names: set[str]) -> str:
        # It is slow, and the rest is not shown.
        return nearest(told(name), map(told, names)) if len(problems) < LISTED else ""

    missing, extra = table.keys() - found, found - table.keys()
    for name, tensor in table.items():
        if name in missing:
            problems.append(f"{told(name)} missing{near(name, extra)}")
            continue
        rows = parameters[tensor.ours][tensor.start : tensor.stop]
        if name in stored and (rows.dim() != 2 or not tensor.ours.startswith("layers.")):
            problems.append(f"{told(name)} is quantised, which only the matrices of the layers may be")
            continue
        # bitsandbytes has (out, in) everywhere: transformers turns what it stores transposed.
        shape = tuple(rows.t().shape if tensor.transpose and name not in stored else rows.shape)
        has = stored[name].shape if name in stored else files.shape(name)
        if has != shape:
            problems.append(f"{told(name)} has shape {has}, expected {shape}")
    for name in sorted(extra):
        if tied and name == family.head:
            if not _equal(files, name, embedding):
                problems.append(
                    f"{told(name)} differs from {told(embedding)}, but {files.config_name} ties them: set "
                    "tie_word_embeddings to false, or remove the copy"
                )
        elif not any(re.search(pattern, name) for pattern in family.ignorable):
            problems.append(f"{told(name)} unexpected{near(name, missing)}")
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise WeightsError(
            f"{files.path}: the weights differ from {files.config_name} (model_type {family.model_type}) in "
            f"{len(problems)} places: {'; '.join(problems[:LISTED])}{more}: download the model again, or the config "
            "that belongs to it"
        )
    return table


def _equal(files: Weights, one: str, other: str) -> bool:
    """Whether two matrices of the file hold the same, compared in pieces."""
    shape = files.shape(one)
    if shape != files.shape(other) or files.dtype(one) != files.dtype(other) or len(shape) != 2:
        return False
    for start in range(0, shape[0], CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, shape[0]))
        pieces = [torch.empty(rows.stop - start, shape[1], dtype=files.dtype(one)) for _ in range(2)]
        for name, piece in zip((one, other), pieces):
            files.read_into(name, piece, rows=rows)
        if not torch.equal(*pieces):
            return False
    return True
