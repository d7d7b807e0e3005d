"""Around the writing of a GGUF file: whether it will do for a model, and whether its tensors are the model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afina.errors import WeightsError
from afina.loaders.families.registry import load_family
from afina.loaders.gguf_file import ARCHITECTURES, architecture_of, converted
from afina.loaders.gguf_vocab import gguf_package

ROWS = 64  # of a matrix


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
        step = max(1, wanted.shape[0] // ROWS) if wanted.dim() > 1 else 1
        expected = wanted[::step].float().cpu()
        values = torch.tensor(gguf.quants.dequantize(found.data[::step], found.tensor_type)).view_as(expected)
        largest = expected.abs().max()
        error = (values - expected).abs().max() / largest if largest > 0 else values.abs().max()
        yield Difference(name, found.tensor_type.name, float(error))
