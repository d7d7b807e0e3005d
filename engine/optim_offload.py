"""The optimizer's state in the host's memory (ZeRO-Offload, Ren et al. 2021, https://arxiv.org/abs/2101.06840), updated
on the device: a chunk comes, the kernel moves it, and it goes back.

ZeRO-Offload updates on the CPU. With fp32 master and moments (12 bytes a weight) and a bf16 gradient that is 28 bytes a
weight through the host's memory, and 4 over the link, of which the CPU waits for the first 2: 0.56 + 0.08 ns at 50 GB/s
(two channels of DDR5) and 25 GB/s (PCIe 4.0, 16 lanes). A chunk that comes and goes takes 12 bytes over the link each
way at the same time, and 24 through the host's memory: 0.48 ns. The CPU is ahead from 70 GB/s on. With two bf16 moments
and no master it needs 14 bytes of memory, 0.28 + 0.08 ns, and a chunk 4 bytes of the link, 0.16 ns. So all updates are
computed on the device, by the same kernel, which gives the same bits as state that stays there. Nothing of this is
measured.

``SLOTS`` chunks are on their way at a time. Nothing tells which weight is next: the host asks for a chunk long before
the device comes to its update, and it is brought as soon as a slot is free. The state of norms and biases stays on the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from afina.engine.host_memory import Event, HostLink
from afina.kernels.adamw import Moment
from afina.kernels.blockwise import BLOCK8, State8

CHUNK = 1 << 23  # elements, a multiple of BLOCK8: 34 MB of two bf16 moments, 101 MB with masters and moments in fp32
SLOTS = 4


def offloaded(model: nn.Module) -> set[str]:
    """The names of the trained parameters whose state may lie on the host: the matrices."""
    return {name for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2}


@dataclass(eq=False)
class Chunk:
    """The elements ``start:stop`` of a flattened parameter: what the optimizer holds for them, on the host."""

    start: int
    stop: int
    master: Tensor | None  # fp32 (n,), where the parameter is not its own
    moments: tuple[Moment, Moment]
    left: Event = None  # when the last update of it has come back

    def tensors(self) -> list[Tensor]:
        return _tensors(self.master, self.moments)


@dataclass(eq=False)
class _Slot:
    """Room for a chunk on the device; ``views`` are made once for each size, since the kernel's tables are, too."""

    master: Tensor | None
    moments: tuple[Moment, Moment]
    free: Event = None
    views: dict[int, tuple[Tensor | None, tuple[Moment, Moment]]] = field(default_factory=dict)

    def first(self, count: int) -> tuple[Tensor | None, tuple[Moment, Moment]]:
        if count not in self.views:
            self.views[count] = _part(self.master, self.moments, 0, count)
        return self.views[count]


class StagedState:
    """The way of the host's state through the device.

    Args:
        like: master and moments of a parameter, as they are held on the host: their types say what a slot holds.
        largest: the most elements of a parameter.
    """

    def __init__(self, like: tuple[Tensor | None, tuple[Moment, Moment]], largest: int, device: torch.device) -> None:
        self.link = HostLink(device)
        self.size = min(CHUNK, BLOCK8 * -(-largest // BLOCK8))
        self.slots = [_slot(like, self.size, device) for _ in range(SLOTS)]
        self.next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the device."""
        return sum(tensor.nbytes for slot in self.slots for tensor in _tensors(slot.master, slot.moments))

    def chunks(self, master: Tensor | None, moments: tuple[Moment, Moment], count: int) -> list[Chunk]:
        """Cut what is held on the host for a parameter of ``count`` elements."""
        ends = [(start, min(start + self.size, count)) for start in range(0, count, self.size)]
        return [Chunk(start, stop, *_part(master, moments, start, stop)) for start, stop in ends]

    def bring(self, chunk: Chunk) -> tuple[Tensor | None, tuple[Moment, Moment]]:
        """Master and moments of the chunk on the device, for what the current stream computes next."""
        slot = self.slots[self.next]
        master, moments = slot.first(chunk.stop - chunk.start)
        arrival = self.link.to_device(zip(_tensors(master, moments), chunk.tensors()), after=(slot.free, chunk.left))
        self.link.wait(arrival)
        return master, moments

    def take_back(self, chunk: Chunk) -> None:
        """Send what ``bring`` gave last back to the host, behind what the current stream has been asked for."""
        slot = self.slots[self.next]
        slot.free = chunk.left = self.link.to_host(
            zip(chunk.tensors(), _tensors(*slot.first(chunk.stop - chunk.start)))
        )
        self.next = (self.next + 1) % SLOTS


def _slot(like: tuple[Tensor | None, tuple[Moment, Moment]], size: int, device: torch.device) -> _Slot:
    master, moments = like

    def room(x: Moment) -> Moment:
        if isinstance(x, State8):
            codes = torch.empty(size, dtype=torch.uint8, device=device)
            return State8(codes, torch.empty(size // BLOCK8, device=device, dtype=torch.float32), x.signed)
        return torch.empty(size, dtype=x.dtype, device=device)

    own = None if master is None else torch.empty(size, dtype=master.dtype, device=device)
    return _Slot(own, (room(moments[0]), room(moments[1])))


def _part(
    master: Tensor | None, moments: Sequence[Moment], start: int, stop: int
) -> tuple[Tensor | None, tuple[Moment, Moment]]:
    def cut(x: Moment) -> Moment:
        if isinstance(x, State8):
            blocks = slice(start // BLOCK8, -(-stop // BLOCK8))
            return State8(x.codes.view(-1)[start:stop], x.absmax[blocks], x.signed)
        return x.view(-1)[start:stop]

    return None if master is None else master.view(-1)[start:stop], (cut(moments[0]), cut(moments[1]))


def _tensors(master: Tensor | None, moments: Sequence[Moment]) -> list[Tensor]:
    found = [] if master is None else [master]
    for moment in moments:
        found += [moment.codes, moment.absmax] if isinstance(moment, State8) else [moment]
    return found
