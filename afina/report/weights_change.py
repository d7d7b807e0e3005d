"""What training changed in the weights, matrix by matrix, read from the files one tensor at a time.

Of a model that was trained whole: |W' - W| / |W| in the Frobenius norm, and the share of elements that are not what
they were, in the dtype that the model is held in (in bfloat16 a small update may be rounded away). Of an adapter:
|s B A| / |W| by the rank-sized products alone, and the singular values of s B A with their effective rank, the
exponential of the entropy of their shares (Roy and Vetterli, "The effective rank", EUSIPCO 2007).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from afina.errors import WeightsError
from afina.loaders.weights.peft import AdapterFile
from afina.loaders.weights.source import Weights, open_weights

Poll = Callable[[], object]
_LAYER = re.compile(r"^(?:.*\.)?(\d+)\.(.+)$")


class MatrixChange(NamedTuple):
    """One tensor. ``relative``: |change| / |before|, None where the size before is not known. ``moved``: the share of
    its elements that changed, None for an adapter. ``spectrum``: singular values of the change, largest first, and
    ``effective_rank``, of an adapter."""

    name: str
    relative: float | None
    moved: float | None = None
    spectrum: tuple[float, ...] = ()
    effective_rank: float | None = None

    @property
    def layer(self) -> int | None:
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """The name within the layer, without what all weights end in."""
        match = _LAYER.match(self.name)
        return (match[2] if match else self.name).removesuffix(".weight")


@dataclass(frozen=True)
class WeightsChange:
    """All tensors that may have changed. ``dtype``: what elements were compared in. ``relative``: of all together.
    ``notes``: what could not be told, and why."""

    matrices: list[MatrixChange]
    adapter: bool
    dtype: str
    relative: float | None
    moved: float | None
    notes: list[str] = field(default_factory=list)


def whole_change(
    before: Path | Iterable[tuple[str, Tensor]], after: Path, *, poll: Poll | None = None
) -> WeightsChange:
    """Compare a model that was trained whole with what it was: a folder or GGUF file, or tensors by HF's names.

    Raises WeightsError where the two have no tensor in common.
    """
    files = open_weights(after)
    names = set(files.names())
    pairs = _stored(open_weights(before), names) if isinstance(before, Path) else iter(before)
    matrices, change, size, moved, count = [], 0.0, 0.0, 0, 0
    for name, old in pairs:
        if poll:
            poll()
        if name not in names or files.shape(name) != tuple(old.shape):
            continue
        new = files.read(name)
        old = old.to(new.dtype)
        a, b = _norm(new.float() - old.float()), _norm(old)
        differ = int((new != old).sum())
        matrices.append(MatrixChange(name, a / b if b else None, differ / max(1, new.numel())))
        change, size, moved, count = change + a * a, size + b * b, moved + differ, count + new.numel()
        dtype = str(new.dtype).removeprefix("torch.")
    if not matrices:
        raise WeightsError(f"{after} has no tensor in common with what it was trained from")
    left = len(names) - len(matrices)
    notes = [f"{left} tensors have no counterpart in the model before"] if left else []
    return WeightsChange(matrices, False, dtype, math.sqrt(change / size) if size else None, moved / count, notes)


def adapter_change(adapter: Path, base: Path | None, *, poll: Poll | None = None) -> WeightsChange:
    """What an adapter adds to its base; without the base's files only what the adapter says itself.

    DoRA's magnitudes are left out of the change: they scale rows, and have no spectrum. Raises WeightsError.
    """
    file = AdapterFile(adapter)
    weights = None if base is None else open_weights(base)
    known = set() if weights is None else set(weights.names())
    matrices, change, size, unknown = [], 0.0, 0.0, 0
    for module, names in file.lora.items():
        if poll:
            poll()
        values = file.config.scale(module) * product_spectrum(file.read(names["A"]), file.read(names["B"]))
        a, b = _norm(values), _weight_norm(weights, known, f"{module}.weight")
        unknown += b is None
        change, size = change + a * a, size + (b or 0.0) ** 2
        relative, spectrum = a / b if b else None, tuple(values.tolist())
        matrices.append(MatrixChange(f"{module}.weight", relative, None, spectrum, effective_rank(spectrum)))
    for name, stored in file.saved.items():  # trained whole beside the adapter
        if weights is None or name not in known:
            matrices.append(MatrixChange(name, None))
            continue
        new, old = file.read(stored).float(), weights.read(name).float()
        matrices.append(MatrixChange(name, _norm(new - old) / max(_norm(old), 1e-30)))
    notes = []
    if file.config.dora:
        notes.append("DoRA's magnitudes, which scale the rows besides, are not part of these figures")
    if unknown:
        why = "the base is not there" if weights is None else "the base holds them quantised"
        notes.append(f"{unknown} matrices have no relative change: {why}")
    return WeightsChange(matrices, True, "float32", math.sqrt(change / size) if size else None, None, notes)


def product_spectrum(a: Tensor, b: Tensor) -> Tensor:
    """The singular values of B A, largest first, for A (r, C) and B (O, r): those of an (r, r) matrix, fp64."""
    _, right = torch.linalg.qr(a.double().T)
    _, left = torch.linalg.qr(b.double())
    return torch.linalg.svdvals(left @ right.T)


def effective_rank(spectrum: Iterable[float]) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 where all are 0."""
    values = [value for value in spectrum if value > 0]
    total = math.fsum(values)
    return math.exp(-math.fsum(v / total * math.log(v / total) for v in values)) if values else 0.0


def _stored(weights: Weights, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name in weights.names():
        if name in names:
            yield name, weights.read(name)


def _weight_norm(weights: Weights | None, known: set[str], name: str) -> float | None:
    """The norm of a base's matrix; None where it is not there, or is held as codes of fewer bits."""
    if weights is None or name not in known or not weights.dtype(name).is_floating_point:
        return None
    return _norm(weights.read(name))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32))
