"""The list of model families."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from afina.errors import ConfigError, nearest
from afina.loaders.families.common import Family
from afina.loaders.jsonfile import show

MODEL_TYPES = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)


def load_family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ``ConfigError`` for a model type that is missing or not supported."""
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES and isinstance(hf.get("text_config"), Mapping):
        raise ConfigError(
            f"config.json: model_type = {show(model_type)} reads more than text, and its language model is a part: "
            "save that part alone (docs/models.md has the lines for gemma3)"
        )
    if model_type not in MODEL_TYPES:
        hint = nearest(str(model_type)[:100], MODEL_TYPES)
        raise ConfigError(f"config.json: model_type = {show(model_type)}{hint}; supported: {', '.join(MODEL_TYPES)}")
    family: Family = importlib.import_module(f"afina.loaders.families.{model_type}").FAMILY
    return family
