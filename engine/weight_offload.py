"""The layers' matrices in the host's memory, each brought to the device for its forward and its backward pass
(ZeRO-Infinity, Rajbhandari et al. 2021, https://arxiv.org/abs/2104.07857).

The device has room for the matrices of two layers: layer i takes place i mod 2. When a layer's turn comes, its
parameters become views of that place, the layer whose place it was goes back to its views of the host, and the copy of
the next one begins, beside the computation: the one above in the forward pass, the one below in the backward pass. So
each step brings a layer twice, but for two of them at either turn. Only layers that run again in the backward pass
(`activation_policy` full, offload) can come and go: nothing of them is held in between.

Where a matrix is trained, it moves on the device, in the backward pass or after it (`optim.py`), and ``write_back``
sends it to the host, where it is whole whenever no step is under way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afina.engine.host_memory import Event, HostLink, HostMemory
from afina.engine.linear import Linear
from afina.errors import ConfigError

PLACES = 2


@dataclass(eq=False)
class _Layer:
    """The matrices of one layer, one after another in ``host``, and where each lies in it and on the device."""

    parameters: list[nn.Parameter]
    host: list[Tensor]
    device: list[Tensor]
    memory: HostMemory
    left: Event = None  # when all that was trained has come back


@dataclass(eq=False)
class _Place:
    layer: int | None = None
    arrival: Event = None


def matrices(layer: nn.Module) -> list[Linear]:
    """The linear layers whose dense weight can wait on the host; adapters, biases and norms are too small."""
    return [module for module in layer.modules() if isinstance(module, Linear) and module.weight is not None]


def layer_bytes(layers: nn.ModuleList) -> list[int]:
    """Bytes of the matrices of each layer."""
    return [sum(matrix.nbytes for matrix in matrices(layer)) for layer in layers]


def device_bytes(layers: nn.ModuleList) -> int:
    """Bytes of the places on the device."""
    return min(PLACES, len(layers)) * max(layer_bytes(layers), default=0)


class HostWeights:
    """Moves the matrices of ``layers`` to the host, as new parameters, for a model that computes on ``device``.

    A weight on meta becomes zeros of the host, to be read into.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.link = HostLink(device)
        largest = max(sum(m.out_features * m.in_features for m in matrices(layer)) for layer in layers)
        if not largest:
            raise ConfigError(
                "offload_params is true, but the matrices of this model are held in 4 bits, which stay on the device: "
                "set offload_params to false"
            )
        dtype = next(weight.dtype for layer in layers for m in matrices(layer) if (weight := m.weight) is not None)
        self._memory = [torch.empty(largest, dtype=dtype, device=device) for _ in range(min(PLACES, len(layers)))]
        self.places = [_Place() for _ in self._memory]
        self.layers = [self._move(layer, index) for index, layer in enumerate(layers)]
        self._home = {id(p): (i, k) for i, layer in enumerate(self.layers) for k, p in enumerate(layer.parameters)}
        self._last = -1

    def _move(self, layer: nn.Module, index: int) -> _Layer:
        count = sum(m.out_features * m.in_features for m in matrices(layer))
        place = self._memory[index % PLACES]
        memory = HostMemory((count,), place.dtype, place.device)
        found, start = _Layer([], [], [], memory), 0
        for matrix in matrices(layer):
            weight = matrix.weight
            assert weight is not None
            end = start + weight.numel()
            host = memory.tensor[start:end].view(weight.shape)
            if not weight.is_meta:
                host.copy_(weight.detach())
            parameter = nn.Parameter(host, requires_grad=weight.requires_grad)
            matrix.hold(parameter)
            found.parameters.append(parameter)
            found.host.append(host)
            found.device.append(place[start:end].view(weight.shape))
            start = end
        return found

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._home

    def enter(self, index: int) -> None:
        """What the current stream computes next is layer ``index``."""
        self._fetch(index)
        self.link.wait(self.places[index % PLACES].arrival)
        beside = index + (1 if index > self._last else -1)
        self._last = index
        if 0 <= beside < len(self.layers):
            self._fetch(beside)

    def _fetch(self, index: int) -> None:
        place, layer = self.places[index % PLACES], self.layers[index]
        if place.layer == index:
            return
        after: list[Event] = [self.link.mark()]  # Until here, the layer that is there may be in use.
        if place.layer is not None:
            # What it has learnt leaves before its place is taken, so also before it is brought again itself.
            before = self.layers[place.layer]
            after.append(before.left)
            _point(before.parameters, before.host)
        place.arrival = self.link.to_device(zip(layer.device, layer.host), after=after)
        place.layer = index
        _point(layer.parameters, layer.device)

    def bring(self, parameter: Tensor) -> None:
        """What the current stream computes next works on this parameter, on the device."""
        index, _ = self._home[id(parameter)]
        if self.places[index % PLACES].layer != index or self._last != index:
            self.enter(index)

    def write_back(self, parameter: Tensor) -> None:
        """Send a parameter that has moved on the device to the host."""
        index, k = self._home[id(parameter)]
        layer = self.layers[index]
        assert self.places[index % PLACES].layer == index
        layer.left = self.link.to_host([(layer.host[k], layer.device[k])])

    def drain(self) -> None:
        """The host waits until all weights have come back."""
        self.link.drain()


def _point(parameters: list[nn.Parameter], views: list[Tensor]) -> None:
    for parameter, view in zip(parameters, views):
        parameter.data = view
