"""The weights and the config of a model, whatever it lies in: a folder in the HF layout, or a GGUF file.

``hub.resolve`` gives the one or the other; what follows asks here and does not know the format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afina.loaders.jsonfile import read_json
from afina.loaders.weights.gguf import GGUFWeights
from afina.loaders.weights.gguf_config import read_config
from afina.loaders.weights.gguf_file import GGUFFile
from afina.loaders.weights.safetensors import SafetensorsFolder


class Weights(Protocol):
    """The tensors of one model on the disk, under HF's names and in HF's shapes."""

    path: Path
    config_name: str  # what says the sizes, for messages

    def names(self) -> list[str]: ...

    def spelling(self, name: str) -> str:
        """How the file itself spells a tensor's name, for messages."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...

    def read_into(self, name: str, out: Tensor, *, rows: slice | None = None, transpose: bool = False) -> None: ...

    def fingerprint(self) -> str:
        """SHA-256 of all that the files hold of the weights."""

    def sample(self) -> str:
        """SHA-256 of so much of them that another model has another."""


def open_weights(path: Path, *, allow_nonfinite: bool = False) -> Weights:
    """The weights in what ``resolve`` gave, checked from their headers. Raises WeightsError, and ConfigError for a GGUF
    file whose keys make no config."""
    if path.is_file():
        return GGUFWeights(path, allow_nonfinite=allow_nonfinite)
    return SafetensorsFolder(path, allow_nonfinite=allow_nonfinite)


def read_hf_config(path: Path) -> dict[str, Any]:
    """The contents of the model's config.json, or what a GGUF file says in its place. Raises ConfigError, and
    WeightsError for a damaged file."""
    return read_config(GGUFFile(path)) if path.is_file() else read_json(path / "config.json")
