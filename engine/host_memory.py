"""What of a run lies in the host's memory, and the way between there and the device.

Page-locked memory is what a GPU can copy from and to while it computes. It is registered here page by page, because
torch's own allocator of such memory rounds every size up to a power of two: of 30 GB that may be 20 GB too much. Copies
to the device take one stream and copies from it another, as the link carries both ways at once. On a CPU device the
copies are plain ones: they save nothing there, and the bits are the same.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from afina.errors import ConfigError

PAGE = 4096
Event = torch.cuda.Event | None  # None on a CPU, where a copy is over when the call is


class HostMemory:
    """Zeros of the host for a model on ``device``, page-locked where that is a GPU, for as long as this object lives;
    for a model on meta, which has shapes alone, on meta."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cuda":
            place = "meta" if device.type == "meta" else "cpu"
            self.tensor = torch.zeros(tuple(shape), dtype=dtype, device=place)
            return
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.zeros(size + 2 * PAGE, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % PAGE  # No page is shared with what is not registered.
        self.tensor = memory[start : start + size].view(dtype).view(tuple(shape))
        address, whole = memory.data_ptr() + start, -(-size // PAGE) * PAGE
        status = torch.cuda.cudart().cudaHostRegister(address, whole, 0)
        if int(status) != 0:
            raise ConfigError(
                f"the host does not page-lock {size / 1e9:.1f} GB for what is offloaded (CUDA error {int(status)}): "
                "set offload_optimizer or offload_params to false, or free memory of the host"
            )
        weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address)


class HostLink:
    """Copies between the host's memory and that of ``device``, in the order in which each way is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.into = self.out = None
        if device.type == "cuda":
            self.into, self.out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], *, after: Iterable[Event]) -> Event:
        """Copy each (device, host) pair to the device, once the events ``after`` have come; return when it is there.

        What computes next need not have come to an end: a copy may overtake it.
        """
        if self.into is None:
            _copy(pairs)
            return None
        for event in after:
            if event is not None:
                self.into.wait_event(event)
        with torch.cuda.stream(self.into):
            _copy(pairs)
        return self.into.record_event()

    def to_host(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Event:
        """Copy each (host, device) pair to the host behind what the current stream computes; return its end."""
        if self.out is None:
            _copy(pairs)
            return None
        self.out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.out):
            _copy(pairs)
        return self.out.record_event()

    def mark(self) -> Event:
        """When the current stream has come as far as it is asked to now."""
        return None if self.into is None else torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        """The current stream goes on when the event has come; the host does not wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def drain(self) -> None:
        """The host waits until all that is on its way to it is there."""
        if self.out is not None:
            self.out.synchronize()


def check_room(size: int, what: str) -> None:
    """Raise ConfigError where the host's whole memory is smaller than ``size`` bytes of ``what``."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ConfigError(
            f"{what} keeps {size / 1e9:,.1f} GB in the host's memory, which has {memory / 1e9:,.1f} GB: set optim to "
            "adamw_bf16, use method lora, or take a machine with more memory"
        )


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for to, source in pairs:
        to.copy_(source, non_blocking=True)
