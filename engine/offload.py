"""Layer inputs that wait in the host's memory between the forward and the backward pass.

A layer that is computed again in the backward pass keeps its input, C values a token. Here the input of every layer but
the last goes to the host as soon as the layer has it, and comes back while the layer above it is computed again. On a
GPU both ways run on a stream of their own, beside the computation, through pinned memory. At most ``IN_FLIGHT`` inputs
are on their way out, so the device never holds more than those, and two on the way back. On a CPU device the copies are
plain ones: they save nothing there, and the bits are the same.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

IN_FLIGHT = 2


class HostCopies:
    """The inputs of one forward pass, on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _stream(device) if device.type == "cuda" else None
        self.copies: list[weakref.ref[_Copy]] = []  # the graph holds them, as long as it needs them
        self.leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @contextmanager
    def keep(self, *, last: bool) -> Iterator[None]:
        """What autograd keeps in this context goes to the host; with ``last`` it stays, as it is needed first."""
        with torch.autograd.graph.saved_tensors_hooks(lambda x: self._pack(x, last), self._unpack):
            yield

    def _pack(self, x: Tensor, stay: bool) -> _Copy:
        # The stream of the computation waits for older copies: what they read may be overwritten behind that point.
        while self.leaving and (stay or len(self.leaving) >= IN_FLIGHT):
            event, _ = self.leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)
        copy = _Copy(len(self.copies), x if stay else self._to_host(x), came=stay)
        self.copies.append(weakref.ref(copy))
        return copy

    def _unpack(self, copy: _Copy) -> Tensor:
        self._fetch(copy)
        x, copy.tensor = copy.tensor, None
        assert x is not None  # each is asked for once in a backward pass
        if copy.arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(copy.arrival)
            x.record_stream(torch.cuda.current_stream(self.device))
        if copy.index and (below := self.copies[copy.index - 1]()) is not None:
            self._fetch(below)
        return x

    def _to_host(self, x: Tensor) -> Tensor:
        if self.stream is None:
            return x.detach().clone()
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        self.leaving.append((self.stream.record_event(), x))
        return host

    def _fetch(self, copy: _Copy) -> None:
        """Bring a copy back to the device, unless it is there or on its way."""
        if copy.came or copy.tensor is None:
            return
        copy.came = True
        if self.stream is None:
            copy.tensor = copy.tensor.clone()
            return
        with torch.cuda.stream(self.stream):  # behind the way out, which took the same stream
            copy.tensor = copy.tensor.to(self.device, non_blocking=True)
        copy.arrival = self.stream.record_event()


class _Copy:
    """One input: where it is now, and whether it has come back."""

    def __init__(self, index: int, tensor: Tensor, *, came: bool) -> None:
        self.index, self.came = index, came
        self.tensor: Tensor | None = tensor
        self.arrival: torch.cuda.Event | None = None


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
