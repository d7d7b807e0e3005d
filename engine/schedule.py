"""Learning-rate schedules: the multiplier of the peak rate at each optimizer step.

Steps are counted in weight updates (never micro-batches), from 0. Warm-up is linear and never wastes a step at zero:
update ``s`` of ``warmup`` runs at ``(s + 1) / (warmup + 1)``, so the peak is reached at update ``warmup``. After it:

- ``constant``: 1;
- ``linear``: straight down, 0 would be reached at update ``total``;
- ``cosine``: half a cosine from 1 to 0 (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983);
- ``wsd``: warm-up, stable, decay: 1, then straight down over the last fifth (Hu et al. 2024, https://arxiv.org/abs/2404.06395).

``min_ratio`` lifts the end: the decaying part runs from 1 to ``min_ratio`` instead of 0.
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")
WSD_DECAY_SHARE = 0.2


def lr_factor(kind: str, step: int, total: int, warmup: int, min_ratio: float = 0.0) -> float:
    """Return the multiplier of the peak learning rate for update ``step`` (0-based) of ``total``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = 1.0 - min(1.0, (step - warmup) / max(1, total - warmup))  # 1 at the peak, 0 past the end
    if kind == "constant":
        shape = 1.0
    elif kind == "linear":
        shape = left
    elif kind == "cosine":
        shape = 0.5 * (1.0 - math.cos(math.pi * left))
    elif kind == "wsd":
        decay = max(1, round(WSD_DECAY_SHARE * total))
        shape = min(1.0, (total - step) / decay) if step < total else 0.0
    else:
        raise ValueError(f"lr_scheduler_type is {kind!r}, not one of {', '.join(SCHEDULES)}")
    return min_ratio + (1.0 - min_ratio) * shape
