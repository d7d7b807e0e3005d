"""engine/host_memory.py: memory of the host, and what moves over the link. There is no second stream on a CPU, so the
order of copies is tested with a stand-in: copies to the device come as early as what they wait for allows, and copies
to the host as late as anybody asks for them. Whoever forgets to wait reads what is old."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_optim import set_gradients, small_model
from test_optim_in_backward import batch, state
from test_weight_offload import made
from torch import Tensor

from afina.engine import gradient_offload, optim_offload, weight_offload
from afina.engine.host_memory import HostLink, HostMemory, check_room
from afina.engine.optim import AdamW
from afina.engine.optim_in_backward import UpdatesInBackward
from afina.engine.optim_offload import offloaded
from afina.engine.training_step import accumulate
from afina.errors import ConfigError

CPU = torch.device("cpu")


class LateLink(HostLink):
    """The stand-in. An event is the place of its copy among those to the host; None has come already."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.waiting: list[list[tuple[Tensor, Tensor]]] = []
        self.done = 0

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]], *, after: Iterable[Any]) -> Any:
        self._finish(max((event for event in after if event is not None), default=0))
        return super().to_device(pairs, after=())

    def to_host(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        self.waiting.append(list(pairs))
        return len(self.waiting)

    def _finish(self, event: int) -> None:
        for pairs in self.waiting[self.done : event]:
            super().to_host(pairs)
        self.done = max(self.done, event)

    def wait(self, event: Any) -> None:
        self._finish(event or 0)

    def drain(self) -> None:
        self._finish(len(self.waiting))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_offload, "HostLink", LateLink)
    monkeypatch.setattr(weight_offload, "HostLink", LateLink)
    monkeypatch.setattr(gradient_offload, "HostLink", LateLink)


@pytest.mark.parametrize("few", [True, False])
def test_no_copy_of_state_overtakes_one_that_it_needs(late: None, monkeypatch: pytest.MonkeyPatch, few: bool) -> None:
    """With fewer chunks than slots the same chunk comes again before its slot does; with more, the slot does."""
    monkeypatch.setattr(optim_offload, "CHUNK", 1 << 20 if few else 256)
    found = []
    for away in (False, True):
        torch.manual_seed(0)
        model = small_model()
        if few:
            model.train_only(["layers.0.attn.o.weight", "layers.1.attn.o.weight"])
        optimizer = AdamW(model, decay=set(), offload=offloaded(model) if away else ())
        for i in range(4):
            set_gradients(optimizer, i)
            optimizer.step(1e-2)
        found.append(state(optimizer))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_no_copy_of_weights_overtakes_one_that_it_needs(late: None) -> None:
    found = []
    for away in (False, True):
        model, optimizer = made("llama", "adamw", "float32", away=away)
        for _ in range(3):
            updates = UpdatesInBackward(optimizer, 1e-3)
            with updates.attached():
                accumulate(model, [batch()], before_backward=updates.begin)
        if model.host_weights is not None:
            model.host_weights.drain()
        found.append(state(optimizer))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_layer_comes_no_sooner_than_its_place_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy to the device waits for what the computation has been asked for until then."""
    model, _ = made("llama", "adamw", "float32", away=True)
    host, marks, waited = model.host_weights, list[object](), list[list[object]]()
    assert host is not None
    monkeypatch.setattr(host.link, "mark", lambda: marks.append(object()) or marks[-1])
    monkeypatch.setattr(host.link, "to_device", lambda pairs, *, after: waited.append(list(after)))
    for index in (0, 1, 2, 2, 1, 0):
        host.enter(index)
    assert len(waited) == len(marks) == 4
    assert all(mark in after for mark, after in zip(marks, waited))


def test_memory_of_the_host() -> None:
    memory = HostMemory((3, 5), torch.bfloat16, CPU).tensor
    assert memory.shape == (3, 5)
    assert not memory.any()
    assert HostMemory((3, 5), torch.bfloat16, torch.device("meta")).tensor.is_meta
    check_room(1 << 20, "offload_optimizer")
    with pytest.raises(ConfigError, match=r"^offload_optimizer keeps 1,152,921,504.6 GB in the host"):
        check_room(1 << 60, "offload_optimizer")


@pytest.mark.gpu
def test_page_locked_memory() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = HostMemory((1000, 1001), torch.float32, device)
    assert memory.tensor.is_pinned()
    assert memory.tensor.data_ptr() % 4096 == 0
    link, there = HostLink(device), torch.ones(1000, 1001, device=device)
    link.to_host([(memory.tensor, there)])
    link.drain()
    assert memory.tensor.eq(1).all()
    link.wait(link.to_device([(there, memory.tensor.zero_())], after=[link.mark(), None]))
    assert not there.any()
    tensor = memory.tensor
    del memory
    assert not tensor.is_pinned()
