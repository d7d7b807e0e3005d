"""One model of a base and its adapter: the adapter's product added to the weights, in fp32, one matrix at a time.

Merging is where models are corrupted quietly: into another base than the adapter was trained on, a second time, without
its scale, in 16 bits. So the base is known by the SHA-256 of all its files, the sums are in fp32, and what comes out is
compared with base and adapter (``afina/export/compare.py``) before anybody gets it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from afina.engine.linear import Linear
from afina.engine.model import GPT
from afina.errors import WeightsError
from afina.loaders.weights.peft import BASE_HASH, AdapterFile, find_base
from afina.loaders.weights.source import open_weights


class Base(NamedTuple):
    """What an adapter is merged into: its name, its folder, and the SHA-256 of the weights that the adapter was trained
    on, which is None where another program wrote it."""

    name: str
    folder: Path
    recorded: str | None


def base_of(folder: Path, base: str | None) -> Base:
    """The base of an adapter folder: ``base``, or what the adapter names. Raises as ``find_base``."""
    name, found = find_base(folder, base)
    return Base(name, found, AdapterFile(folder).metadata.get(BASE_HASH))


def check_base(folder: Path, base: Base) -> None:
    """Read all the base's files. Raises WeightsError where they are not those that the adapter was trained on: another
    model, a changed one, or one that has the adapter merged in already."""
    if base.recorded is not None and base.recorded != (found := open_weights(base.folder).fingerprint()):
        raise WeightsError(
            f"{base.folder} is not the model that {folder} was trained on (SHA-256 of the weights {found[:12]}, "
            f"recorded {base.recorded[:12]}): another one, a changed one, or one with the adapter merged in already; "
            "give the right one with --base"
        )


@torch.no_grad()
def merge(model: GPT) -> None:
    """Make the active adapter, if any, part of the weights, and NF4 weights dense, in place.

    ``model`` must be fp32. Each matrix is done before the next is begun: the peak is the model and two of them. What
    the adapter trained whole is in the model already; the base's own copies are let go.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear) and (module.lora is not None or module.frozen_format is not None):
            weight = module.dense(torch.float32)
            if weight.dtype != torch.float32:
                raise ValueError(f"{name}: is {weight.dtype}; expected a model in float32")
            if module.lora is not None:
                weight = module.lora.merge(weight)
            module.hold(nn.Parameter(weight, requires_grad=False))
            module.lora = None
    model.adapter = None
    model.hf_config.pop("quantization_config", None)
