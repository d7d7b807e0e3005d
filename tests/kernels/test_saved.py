"""What ops declare that they save for the backward pass, beside what autograd holds after a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import DEVICE, draw
from torch import Tensor

from afina.kernels import activation, attention, cross_entropy, norm, rope
from afina.kernels.saved import Saved

ROWS = 7


class Call(NamedTuple):
    """A call of an op and what it declares to save; `given` are weights and angles, which have no gradient here."""

    op: Callable[..., Any]
    declared: Saved
    inputs: dict[str, Tensor]
    given: dict[str, Tensor]


def calls(dtype: torch.dtype, backend: str) -> Iterator[Call]:
    x, gate_up, weight = draw(ROWS, 12, dtype=dtype), draw(ROWS, 24, dtype=dtype), draw(12, dtype=dtype)
    for glu in (activation.swiglu, activation.geglu):
        yield Call(glu, activation.saved(), {"gate_up": gate_up}, {})
    for op in (norm.rms_norm, norm.layer_norm):
        yield Call(op, norm.saved(dtype, backend, layer=op is norm.layer_norm), {"x": x}, {"weight": weight})
    q, k, v = (draw(ROWS, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    packed = partial(attention.attention, cu_seqlens=torch.tensor([0, 3, ROWS], dtype=torch.int32))
    yield Call(packed, attention.saved(dtype, 4, backend, device=DEVICE), {"q": q, "k": k, "v": v}, {})
    angles = {name: draw(ROWS, 4, dtype=torch.float32) for name in ("cos", "sin")}
    weights = {name: draw(8, dtype=dtype) for name in ("q_weight", "k_weight")}
    for normed in (False, True):
        declared = rope.saved(dtype, 8, 6, backend, normed=normed)
        yield Call(rope.rope, declared, {"q": q, "k": k}, angles | (weights if normed else {}))
    loss = partial(cross_entropy.linear_cross_entropy, targets=torch.arange(ROWS, device=DEVICE))
    yield Call(loss, cross_entropy.saved(dtype, 12), {"hidden": x}, {"weight": draw(19, 12, dtype=dtype)})


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory that the tensors lie in, by its address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ops_save_what_they_declare(backend: str, dtype: torch.dtype) -> None:
    """Those tensors, without copies, and so many bytes a row beside them; no more and no less."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    for op, declared, inputs, given in calls(dtype, backend):
        given = {name: x.to(DEVICE) for name, x in given.items()}
        named = given | {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            named["out"] = op(**named, backend=backend)
        found = storages(saved)
        expected = storages(named[name] for name in declared.tensors)
        assert expected.items() <= found.items(), op
        beside = found.keys() - expected.keys() - storages(given.values()).keys()
        assert sum(found[address] for address in beside) == ROWS * declared.row_bytes + declared.bytes, op
