"""Afina: a lean, from-scratch, single-GPU fine-tuning engine.

Names are imported on first use, so that ``import afina`` and ``afina --help`` do not pay for torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# Torch's OpenMP threads wait for each other by spinning. Where another process wants a core too, a thread that spins
# holds the core that the thread it waits for needs, and a training step takes many times as long. The OpenMP library
# reads this limit on spinning when torch loads it, and what the user has set stays.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from afina.engine.generate import generate as generate
    from afina.engine.model import GPT as GPT
    from afina.engine.model_config import ModelConfig as ModelConfig
    from afina.engine.train import RunResult as RunResult
    from afina.engine.train_config import TrainConfig as TrainConfig
    from afina.engine.weights import load_model as load_model
    from afina.engine.weights import save_model as save_model
    from afina.errors import AfinaError as AfinaError
    from afina.loaders.text.source import load_tokenizer as load_tokenizer
    from afina.loaders.text.tokenizer import Tokenizer as Tokenizer
    from afina.report.finetune import finetune as finetune

_HOME = {
    "AfinaError": "afina.errors",
    "GPT": "afina.engine.model",
    "ModelConfig": "afina.engine.model_config",
    "RunResult": "afina.engine.train",
    "Tokenizer": "afina.loaders.text.tokenizer",
    "TrainConfig": "afina.engine.train_config",
    "finetune": "afina.report.finetune",
    "generate": "afina.engine.generate",
    "load_model": "afina.engine.weights",
    "load_tokenizer": "afina.loaders.text.source",
    "save_model": "afina.engine.weights",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'afina' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
