"""What may differ when a run goes on, and what would make it another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from afina.errors import RunError

# Settings that may differ when a run is resumed: how long it goes on, how often it reports, evaluates and saves, and
# how (not what) it computes. Another number of threads or another attention backend rounds otherwise, but may be all
# that another machine has. All other settings would make it another run. A longer run follows its own, stretched
# schedule from there on.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "epochs",
        "max_steps",
        "eval_steps",
        "save_steps",
        "logging_steps",
        "save_total_limit",
        "early_stopping_patience",
        "activation_policy",
        "gradient_checkpointing",
        "lean_loss",
        "optim_in_backward",
        "offload_optimizer",
        "offload_params",
        "attention_backend",
        "cuda_graph",
        "threads",
        "report_to",
    }
)
# These may become lower, and only that: a run that diverged goes on from its last good checkpoint at a lower rate.
LOWER_ON_RESUME = frozenset({"learning_rate"})


def refuse_differences(
    file: Path, record: Mapping[str, Any], config: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Raise RunError with every setting and content that is not what the run began with, and may not differ.

    ``record`` is what ``file``, the run's record, holds; ``config`` and ``facts`` are those of the run that goes on.
    A fact ``NAME_sha256`` stands for the setting NAME.
    """
    before, known = record.get("config"), record.get("facts")
    if not isinstance(before, dict) or not isinstance(known, dict) or not isinstance(record.get("resumed", []), list):
        raise RunError(f"{file} is damaged: 'config' and 'facts' must be objects; start again with --overwrite")
    free = FREE_ON_RESUME | {name.removesuffix("_sha256") for name in facts} | lowered(before, config).keys()
    pairs = [(k, before, config) for k in _differing(before, config) if k not in free]
    pairs += [(k, known, facts) for k in _differing(known, facts)]
    changes = [
        f"{k if k.isidentifier() else repr(k)}: {_show(a, k)} -> {_show(b, k)}"
        f"{' (it may only become lower)' if k in LOWER_ON_RESUME else ''}"
        for k, a, b in pairs
    ]
    if changes:
        raise RunError(
            f"{file.parent} cannot be resumed, this changed since it began: {'; '.join(changes)}. Put it back, or "
            "start a new run with another --output_dir or with --overwrite"
        )


def lowered(before: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[float]]:
    """The settings that are lower than before and may be, each with what it was and what it is."""
    found: dict[str, list[float]] = {}
    for name in sorted(LOWER_ON_RESUME):
        was, now = before.get(name), config.get(name)
        if _is_number(was) and _is_number(now) and now < was:
            found[name] = [was, now]
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*a, *b]) if key not in a or key not in b or a[key] != b[key]]


def _show(config: Mapping[str, Any], key: str) -> str:
    return f"{config[key]!r:.100}" if key in config else "(absent)"
