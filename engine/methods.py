"""What trains: all weights (full), adapters (lora), adapters on a base in 4 bits (qlora), or some tensors (freeze)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from afina.engine.lora import new_adapter, whole_parameters
from afina.engine.model import GPT
from afina.engine.train_config import ADAPTED, TrainConfig
from afina.errors import ConfigError, nearest
from afina.loaders.weights.peft import AdapterConfig

# The default learning rate at a width of 2,048, and the power of the width that it falls with.
FULL_RATE = (5e-5, 1.5)
ADAPTER_RATE = (5e-4, 0.78)


def choose_trained(config: TrainConfig, model: GPT) -> TrainConfig:
    """Let train what ``config.method`` says, adding adapters where it asks for them; returns the config with what that
    depended on the model for. Raises ConfigError for names that the model does not have."""
    if model.adapter is not None:
        refuse_adapter(str(config.model), model.adapter.config.base)
    if config.method == "freeze":
        config = replace(config, trainable=config.trainable or default_trainable(model))
        model.train_only(choose_patterns(model, config.trainable or ()))
    elif config.method in ADAPTED:
        folder = Path(str(config.model)).expanduser()
        adapter = AdapterConfig(
            base=str(folder.resolve()) if folder.exists() else config.model,
            r=config.lora_r or 0,
            alpha=config.lora_alpha or 0,
            dropout=config.lora_dropout or 0.0,
            rslora=bool(config.use_rslora),
            dora=bool(config.use_dora),
        )
        new_adapter(
            model,
            adapter,
            targets=config.lora_target_modules or (),
            modules_to_save=config.modules_to_save or (),
            seed=config.seed,
        )
    return config


def default_learning_rate(method: str, width: int) -> tuple[float, str]:
    """The peak learning rate for ``method`` on a model of this hidden width, and in one line where it comes from.

    Both are lines through what was measured (docs/settings.md, "The default learning rate"), on logarithmic scales; a
    model narrower than the narrowest that was measured gets that one's rate.
    """
    at_2048, power = ADAPTER_RATE if method in ADAPTED else FULL_RATE
    rate = float(f"{at_2048 * (2048 / max(width, 192)) ** power:.1e}")
    return rate, f"default for method {method} and width {width}: {at_2048:g} * (2048 / max(width, 192))^{power:g}"


def refuse_adapter(source: str, base: str | None) -> None:
    raise ConfigError(
        f"model {source} is an adapter of {base}: merge it first (afina export {source} --to hf --output DIR) to train "
        "on from there, or train another on its base"
    )


def choose_patterns(model: GPT, patterns: Sequence[str]) -> tuple[str, ...]:
    """Our parameters that ``trainable`` stands for: patterns of the checkpoint's tensor names, with * and ?.

    A pattern stands for whole words between dots: ``layers.2`` is ``model.layers.2.*``, not ``model.layers.20.*``.
    Raises ConfigError for a pattern that stands for nothing, or for part of a matrix that we hold as one.
    """
    table = model.config.tensors(model.hf_config)
    chosen: set[str] = set()
    for pattern in patterns:
        words = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "[^.]")
        hits = {t.name for t in table if re.search(rf"(^|\.){words}(\.|$)", t.name)}
        if not hits:
            names = [t.name for t in table]
            raise ConfigError(
                f"trainable: {pattern!r} is no tensor of this model{nearest(pattern, names)}; expected names or "
                f"patterns such as {names[-1]}, layers.{model.config.num_layers - 1} or layers.*.mlp"
            )
        chosen |= hits
    return whole_parameters(table, chosen, "trainable")


def default_trainable(model: GPT) -> tuple[str, ...]:
    """The patterns of method freeze when none are given: the last quarter of the layers, the last norm and the head."""
    table, count = model.config.tensors(model.hf_config), model.config.num_layers
    first = count - max(1, count // 4)
    layer = next(t.name for t in table if t.ours.startswith("layers.0."))
    prefix = layer[: layer.index(".0.") + 1]
    rest = [t.name for t in table if t.ours.startswith(("norm.", "head."))]
    return (*(f"{prefix}{i}" for i in range(first, count)), *rest)
