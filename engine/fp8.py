"""Training with FP8 products: which matrices, and what a run says of it.

The matrices of the layers that train multiply in FP8 (`kernels/fp8_linear.py`) while they are trained. The head, whose
logits decide the loss, does not, and evaluation and generation compute as the model will where it is used: in its own
dtype.
"""

from __future__ import annotations

import torch

from afina.engine.linear import Linear
from afina.engine.model import GPT
from afina.kernels.fp8_linear import fits, unavailable


def use_fp8(model: GPT, device: torch.device) -> str:
    """Let the trained matrices of the layers compute in FP8, where ``device`` can or is a CPU, which emulates it.
    Return what came of it, for people."""
    reason = unavailable(device)
    if reason is not None and device.type != "cpu":
        return f"{reason}; training without them"
    count = total = 0
    for module in model.layers.modules():
        if isinstance(module, Linear) and module.weight is not None and module.weight.requires_grad:
            module.fp8 = fits(module.weight)
            count, total = count + module.fp8, total + 1
    how = "emulated on a CPU: the same roundings, and slower" if reason else "scaled by rows"
    return f"{count} of {total} matrices that train in e4m3, their gradients in e5m2, {how}"
