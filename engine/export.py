"""Deployable weights: a model written in the layout that other programs load, proven before it is published."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.engine.model import GPT
from afina.engine.settings import SYNONYMS
from afina.engine.state import fsync_path
from afina.engine.weights import DTYPES, load_model, save_model
from afina.errors import ConfigError, RunError, nearest
from afina.loaders.checkpoint import Checkpoint
from afina.loaders.hub import resolve
from afina.loaders.tokenizer import load_tokenizer

FORMATS = ("hf", "peft", "gguf")
SAME, ROUNDED = 1e-5, 0.1  # largest relative error of the logits: weights as they were, weights rounded to fewer bits


class ExportFailedError(RuntimeError):
    """What was written does not compute what the model computes; it has been removed."""


def export(source: str | Path, output: str | Path, *, to: str = "hf", dtype: str = "auto") -> dict[str, Any]:
    """Write the model and tokenizer of ``source`` to the new folder ``output``; returns ``output`` and ``check``.

    ``dtype`` "auto" keeps the weights as they are stored. The files are written beside ``output``, loaded again, their
    float32 logits compared with the model's, and only then given their name. Raises RunError when ``output`` exists,
    ConfigError for a format or dtype that is not there, ExportFailedError when the logits differ.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to is {to!r}; expected {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    if to != "hf":
        raise ConfigError(f"--to {to} is not in this version: use --to hf, the layout that transformers loads")
    dtype = SYNONYMS.get(dtype, dtype)
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype is {dtype!r}; expected auto, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    output = Path(os.path.abspath(output))
    if output.exists() or output.is_symlink():
        raise RunError(f"{output} already exists and is left as it is: choose another --output")
    stored = _stored_dtype(resolve(source))
    target = stored if dtype == "auto" else DTYPES[dtype]
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32", device="cpu")
    expected = _logits(model)
    working = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_model(model.to(target), tokenizer, working)
        del model
        found = _logits(load_model(working, dtype="float32", device="cpu"))
        error = float((found - expected).abs().max() / expected.abs().max())
        limit = SAME if target == stored else ROUNDED
        if not error <= limit:
            raise ExportFailedError(
                f"the exported model's logits differ by {error:.2g} of the largest one (limit {limit:g}), so nothing "
                "was kept: try --dtype float32"
            )
        working.rename(output)
        fsync_path(output.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    check = {"logits_relative_error": error, "limit": limit, "dtype": str(target).removeprefix("torch.")}
    return {"output": str(output), "format": to, "check": check}


def _stored_dtype(folder: Path) -> torch.dtype:
    checkpoint = Checkpoint(folder)
    commonest = Counter(checkpoint.dtype(name) for name in checkpoint.names()).most_common(1)
    return commonest[0][0] if commonest and commonest[0][0] in DTYPES.values() else torch.float32


@torch.no_grad()
def _logits(model: GPT) -> Tensor:
    """The logits of one fixed row of random tokens."""
    length = min(64, model.config.max_positions)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return model(ids)
