"""What the process itself needs before a run: threads, seeds, and an allocator that keeps its pages."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def prepare_process(*, threads: int | None = None, seed: int | None = None) -> None:
    """Set torch's thread count and global seed, and make a CPU step cheap in page faults.

    glibc gives large blocks back to the kernel when they are freed, so each large activation of each step is mapped and
    zeroed page by page again; keeping them in the heap more than halves the time of large element-wise ops.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if seed is not None:
        torch.manual_seed(seed)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 1 << 30)
            mallopt(M_TRIM_THRESHOLD, 1 << 30)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero on the CPU: in AdamW's moments one costs a hundred ordinary multiplications."""
    flushed_before = float(torch.tensor(1e-39) * torch.tensor(0.5)) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GB (1e9 bytes): allocated on the GPU, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
