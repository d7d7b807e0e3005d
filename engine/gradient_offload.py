"""Gradients that leave for the host's memory as soon as they are there, and come back for the update
(ZeRO-Offload, Ren et al. 2021, https://arxiv.org/abs/2101.06840).

So no more than a matrix's gradient is on the device, and still all of them are known before a weight moves: their norm
clips them, a step that is not finite is skipped as a whole, and several micro-batches add up. What a later one adds to
comes to the device in parts, is added to the new gradient there, and the sum leaves: the bits of gradients that stay.

The gradient before the last one may still be on its way: the computation waits for it when the next one leaves, so that
there are never more than two, whatever the link. (Left to the allocator, memory that is being copied would be free only
when the host learns of it, and the host is far ahead.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from afina.engine.host_memory import Event, HostLink, HostMemory

ROOMS = 4


@dataclass(eq=False)
class _Room:
    memory: Tensor
    free: Event = None


class HostGradients:
    """The gradients of ``params`` (name -> parameter), in parts of ``size`` elements on their way."""

    def __init__(self, params: Mapping[str, Tensor], size: int, device: torch.device) -> None:
        self.params = dict(params)
        self.link = HostLink(device)
        self.memory = {name: HostMemory(p.shape, p.dtype, device) for name, p in params.items()}
        dtype = next(iter(params.values())).dtype
        self.rooms = [_Room(torch.empty(size, dtype=dtype, device=device)) for _ in range(ROOMS)]
        self.size, self.next = size, 0
        self.last: _Room | None = None
        self.left: dict[str, Event] = {}
        self.flying: tuple[Event, Tensor] | None = None
        self.norms: dict[str, Tensor] = {}  # of those that are there in this step
        self.scale: Tensor | None = None  # what clips them

    @property
    def nbytes(self) -> int:
        """Bytes of the device."""
        return sum(room.memory.nbytes for room in self.rooms)

    @property
    def host_nbytes(self) -> int:
        return sum(memory.tensor.nbytes for memory in self.memory.values())

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """The gradients of backward passes in this context leave, and add up."""
        hooks = [p.register_post_accumulate_grad_hook(partial(self._take, name)) for name, p in self.params.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.land()

    def land(self) -> None:
        """What is computed next begins when no gradient is on its way any more, and no memory is held for one."""
        if self.flying is not None:
            self.link.wait(self.flying[0])
            self.flying = None

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        parameter.grad = None
        if name in self.norms:
            flat = grad.view(-1)
            for start in range(0, grad.numel(), self.size):
                stop = min(start + self.size, grad.numel())
                flat[start:stop] += self._bring(name, start, stop)
        self.norms[name] = torch.linalg.vector_norm(grad, dtype=torch.float32)
        self.land()
        self.left[name] = self.link.to_host([(self.memory[name].tensor, grad)])
        self.flying = self.left[name], grad

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """These elements of a gradient on the device, clipped, until the next but three is asked for."""
        found = self._bring(name, start, stop)
        return found if self.scale is None else found.mul_(self.scale)

    def _bring(self, name: str, start: int, stop: int) -> Tensor:
        if self.last is not None:
            self.last.free = self.link.mark()  # What used it has been asked for by now.
        room = self.last = self.rooms[self.next]
        self.next = (self.next + 1) % ROOMS
        found, host = room.memory[: stop - start], self.memory[name].tensor.view(-1)[start:stop]
        self.link.wait(self.link.to_device([(found, host)], after=(room.free, self.left.get(name))))
        return found

    def forget(self) -> None:
        """The step is over."""
        self.norms.clear()
        self.scale = None
