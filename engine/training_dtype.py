"""What ``dtype: auto`` means in training: bfloat16 where the hardware is made for it, with float32 masters.

A GPU is. A CPU is where it has instructions for bfloat16 products (AVX512_BF16, AMX) *and* torch turns them into speed:
some builds, virtual machines and limits (``ATEN_CPU_CAPABILITY``, ``ONEDNN_MAX_CPU_ISA``) do not let it. So the three
products of a linear layer's step are timed in both dtypes, some milliseconds, and the result is kept in the cache:
the same machine chooses the same dtype every time, however busy it is.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from afina.durable import remember, remembered
from afina.errors import ConfigError, nearest
from afina.kernels.backend import bfloat16_instructions

WORTH = 1.5  # times as fast as float32 that bfloat16 products have to be: the rest of a step gains nothing from them
TOKENS, WIDTH = 512, 768  # of the layer that is timed
ROUNDS = 5
DTYPES = ("float32", "bfloat16")
NOTE = "cpu-bfloat16"  # under which the cache keeps the result


def training_dtype(device: torch.device) -> tuple[str, str]:
    """The dtype that a run on ``device`` computes in where it does not say so, and in one line why.

    AFINA_CPU_DTYPE says it for CPUs. Raises ConfigError where that is neither float32 nor bfloat16.
    """
    if device.type != "cpu":
        return "bfloat16", "what a GPU is made for; the weights' masters are float32"
    asked = os.environ.get("AFINA_CPU_DTYPE")
    if asked:
        if asked not in DTYPES:
            raise ConfigError(f"AFINA_CPU_DTYPE={asked}: expected {' or '.join(DTYPES)}{nearest(asked, DTYPES)}")
        return asked, "AFINA_CPU_DTYPE asks for it"
    instructions = bfloat16_instructions()
    if instructions is None:
        return "float32", "this CPU has no bfloat16 instructions (AVX512_BF16, AMX)"
    speed = _remembered() or _measure()
    told = f"with {instructions} this CPU multiplies bfloat16 {speed:.1f} times as fast as float32"
    return ("bfloat16", f"{told}; the weights' masters are float32") if speed >= WORTH else ("float32", told)


@torch.no_grad()
def products_seconds(dtype: torch.dtype) -> float:
    """The least seconds that y = x W^T, dx = dy W and dW = dy^T x took together, x (512, 768), W (768, 768)."""
    x, dy, weight = (torch.ones(size, WIDTH, dtype=dtype, device="cpu") for size in (TOKENS, TOKENS, WIDTH))

    def once() -> list[Tensor]:
        return [x @ weight.t(), dy @ weight, dy.t() @ x]

    once()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        once()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _measure() -> float:
    """How many times as fast as float32 bfloat16 is; kept for the next run, where the cache can be written."""
    speed = round(products_seconds(torch.float32) / products_seconds(torch.bfloat16), 2)
    remember(NOTE, _machine(), speed)
    return speed


def _remembered() -> float | None:
    speed = remembered(NOTE, _machine())
    return speed if isinstance(speed, float) else None


def _machine() -> list[str]:
    """What decides how fast the products are."""
    name = platform.processor()
    with contextlib.suppress(OSError):  # Linux alone has it, and platform knows no name there
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    limits = [os.environ.get(variable, "") for variable in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")]
    return [name, str(bfloat16_instructions()), torch.__version__, str(torch.get_num_threads()), *limits]
