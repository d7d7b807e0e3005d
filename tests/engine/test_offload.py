"""engine/offload.py on a CPU: what comes back, in what order, and what is held. Equal gradients and bytes under the
policy are tests of test_model.py and test_memory.py."""

from __future__ import annotations

import torch
from torch import Tensor

from afina.engine.offload import HostCopies

CPU = torch.device("cpu")


def chain(host: HostCopies, x: Tensor, depth: int) -> Tensor:
    """exp of exp of ...: each keeps its output for the backward pass."""
    for index in range(depth):
        with host.keep(last=index == depth - 1):
            x = (0.1 * x).exp()
    return x


def test_all_but_the_last_wait_outside_and_come_back_one_ahead() -> None:
    host = HostCopies(CPU)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    y = chain(host, x, 4)
    copies = [copy() for copy in host.copies]
    assert [copy.came for copy in copies] == [False, False, False, True]
    assert len({copy.tensor.data_ptr() for copy in copies}) == 4
    del copies

    order = []
    fetch = host._fetch

    def noted(copy: object) -> None:
        order.append(copy.index)
        fetch(copy)

    host._fetch = noted
    y.sum().backward()
    assert order == [3, 2, 2, 1, 1, 0, 0]  # while one is used, the one below it comes
    assert all(copy() is None for copy in host.copies)  # nothing is held afterwards

    plain = x.detach().clone().requires_grad_()
    z = plain
    for _ in range(4):
        z = (0.1 * z).exp()
    z.sum().backward()
    assert torch.equal(x.grad, plain.grad)
