"""How a Triton kernel is launched: the compiler or its stand-in, the launch table, and one door that all launches pass.

A kernel's tile sizes, warps and stages come from `launch_table.json`, beside this file: for each kernel its rows, as
    {"capability": 90, "bits": 16, "size": 128, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
capability is the lowest GPU compute capability (major and minor digit) that the row is for, 0 for Triton's interpreter
on a CPU; bits is the width of the element type it is for (absent: any); size is the largest head dimension or row
length it serves (absent: any). Rows are written by `benchmarks/tune.py` and never picked by timing at run time: what
runs, and so every bit of the result, must not depend on a race.

A kernel takes few arguments: what belongs together is one NamedTuple, such as a View of a tensor (its pointer and how
far apart its rows lie), whose fields the kernel reads by name. Triton specialises what stands in a tuple as it does any
other argument (None, integers that are 1 or that 16 divides, values wrapped in ``tl.constexpr``), but
`do_not_specialize` does not reach into it: a length that changes from call to call stays an argument of its own and is
named there, so that it costs no compilation.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

TABLE = Path(__file__).with_name("launch_table.json")
KEYS = ("capability", "bits", "size")

# Where nothing could run a kernel, nobody pays a third of a second for importing the compiler.
if "triton" in sys.modules or (
    find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
):
    import triton
    import triton.language

    jit: Any = triton.jit
    tl: Any = triton.language
    VERSION: str | None = triton.__version__
    INTERPRETED = bool(triton.knobs.runtime.interpret)
else:
    tl = SimpleNamespace(constexpr=lambda value: value)
    VERSION, INTERPRETED = None, False

    def jit(fn: Any = None, **options: Any) -> Any:
        """Leave the kernel a name that nobody can launch."""
        return fn if fn is not None else lambda fn: fn


# When set, launches are handed to it, as (kernel, arguments by name), instead of being run: the compile gate's eyes.
recorder: Callable[[Any, dict[str, Any]], None] | None = None


def runnable(device: torch.device) -> bool:
    """Whether a Triton kernel can run on tensors of this device: a GPU, or a CPU under TRITON_INTERPRET=1."""
    return VERSION is not None and (device.type == "cuda" or INTERPRETED or recorder is not None)


def capability(device: torch.device) -> int:
    """The compute capability as two digits (90: Hopper), or 0 where the interpreter runs the kernel."""
    return 0 if device.type != "cuda" or INTERPRETED else _capability(device.index)


@lru_cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def config(kernel: str, device: torch.device, *, dtype: torch.dtype | None = None, size: int = 0) -> dict[str, Any]:
    """The row of the launch table for this kernel, device, element type and size, as keyword arguments of `launch`.

    Of the rows that fit, the one of the highest capability not above the device's, then of the smallest size. Raises
    ValueError where none fits.
    """
    return _config(kernel, capability(device), 0 if dtype is None else 8 * dtype.itemsize, size)


@lru_cache(maxsize=1024)
def _config(kernel: str, capability: int, bits: int, size: int) -> dict[str, Any]:
    fits = [
        row
        for row in table()[kernel]
        if (row["capability"] <= capability and (row["capability"] == 0) == (capability == 0))
        and row.get("bits", bits) == bits
        and row.get("size", size) >= size
    ]
    if not fits:
        raise ValueError(f"{kernel}: no launch configuration for {bits}-bit elements and a size of {size}")
    best = min(fits, key=lambda row: (-row["capability"], row.get("size", math.inf)))
    return {key: value for key, value in best.items() if key not in KEYS}


@lru_cache(maxsize=1)
def table() -> dict[str, list[dict[str, Any]]]:
    return json.loads(TABLE.read_text())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` once for each point of `grid` (not at all for an empty one) on the device of its first tensor."""
    if 0 in grid:
        return
    if recorder is not None:
        recorder(kernel, dict(zip(kernel.arg_names, args)) | options)
        return
    flat = (field for x in args for field in (x if isinstance(x, tuple) else (x,)))
    device = next(x.device for x in flat if isinstance(x, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is not below n (nor below `least`): a tile's size."""
    return max(least, 1 << (n - 1).bit_length() if n > 0 else 1)
