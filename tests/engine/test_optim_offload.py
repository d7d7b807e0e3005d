"""engine/optim_offload.py on a CPU: the bits of the update of state that stays, what is held where, and what comes back
from a checkpoint. tests/engine/test_optim_in_backward.py has both together."""

from __future__ import annotations

import pytest
import torch
from test_optim import HELD, set_gradients, small_model
from torch import Tensor

from afina.engine import optim, optim_offload
from afina.engine.optim import AdamW, bytes_held
from afina.engine.optim_offload import SLOTS, offloaded


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small model's matrices (384 to 800 elements) are one chunk, or several and a rest."""
    monkeypatch.setattr(optim_offload, "CHUNK", 512)


def made(variant: str, dtype: torch.dtype, *, offload: bool) -> AdamW:
    torch.manual_seed(0)
    model = small_model().to(dtype)
    scales = {n: 2.0 for n, _ in model.named_parameters() if "qkv" in n}
    names = offloaded(model) if offload else ()
    return AdamW(model, decay=model.decay_parameters(), lr_scales=scales, variant=variant, offload=names)


def run(optimizer: AdamW, steps: range, skip: Tensor | None = None) -> None:
    for i in steps:
        set_gradients(optimizer, i)
        optimizer.step(1e-2, skip=skip)


def bits(optimizer: AdamW) -> dict[str, Tensor]:
    found = {f"{group} {n}": x.clone() for group, members in optimizer.state().items() for n, x in members.items()}
    return found | {n: p.detach().clone() for n, p in optimizer.params.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize(("variant", "dtype"), HELD)
def test_state_on_the_host_moves_the_weights_as_state_on_the_device(variant: str, dtype: torch.dtype) -> None:
    there, here = (made(variant, dtype, offload=offload) for offload in (True, False))
    assert there.on_host == {n for n, p in there.params.items() if p.dim() == 2}
    start = bits(there)
    run(there, range(3), skip=torch.tensor(True))
    assert same(bits(there), start)
    there.num_updates = 0
    for optimizer in (there, here):
        run(optimizer, range(3))
    if variant != "adamw_bf16":  # whose roundings draw other bits
        assert same(bits(there), bits(here))
    again = made(variant, dtype, offload=True)
    run(again, range(3))
    assert same(bits(there), bits(again))


def test_parts_of_a_weight_do_not_repeat_each_others_roundings() -> None:
    """All elements of a matrix are equal, and so are their gradients: their roundings alone differ."""
    optimizer = made("adamw_bf16", torch.bfloat16, offload=True)
    name = "embed.weight"  # 800 elements, so a chunk of 512 and one of 288
    weight = optimizer.params[name]
    weight.data.fill_(1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step(1e-3)
    first, second = weight.detach().view(-1)[:288], weight.detach().view(-1)[512:]
    assert len(first.unique()) == 2
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("variant", "dtype"), HELD)
def test_what_is_held_where(variant: str, dtype: torch.dtype) -> None:
    optimizer = made(variant, dtype, offload=True)
    sizes = {n: bytes_held(variant, p.dtype, p.numel()) for n, p in optimizer.params.items()}
    assert optimizer.host_nbytes == sum(sizes[n] for n in optimizer.on_host)
    assert optimizer.host_nbytes == sum(memory.tensor.nbytes for memory in optimizer._host)
    room = SLOTS * bytes_held(variant, dtype, 512)
    assert optimizer.nbytes == sum(size for n, size in sizes.items() if n not in optimizer.on_host) + room
    # A slot is no larger than what is largest.
    few = {n: p for n, p in optimizer.params.items() if "o.weight" in n}  # 256 elements
    model = small_model().to(dtype)
    model.train_only(few)
    alone = AdamW(model, decay=set(), variant=variant, offload=offloaded(model))
    assert alone.nbytes == SLOTS * bytes_held(variant, dtype, 256)


@pytest.mark.parametrize(("variant", "dtype"), HELD)
def test_state_comes_back_from_either_place_to_either(variant: str, dtype: torch.dtype) -> None:
    straight = made(variant, dtype, offload=True)
    run(straight, range(4))
    for before in (True, False):
        first = made(variant, dtype, offload=before)
        run(first, range(2))
        saved = {group: {n: t.clone() for n, t in members.items()} for group, members in first.state().items()}
        second = made(variant, dtype, offload=True)
        run(second, range(7, 9))
        second.load_state(saved, first.num_updates)
        run(second, range(2, 4))
        if before or variant != "adamw_bf16":
            assert same(bits(second), bits(straight))


def test_a_chunk_takes_the_next_slot_and_goes_back_to_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two updates in a row write to the same memory of the device, and the same chunk finds the same views."""
    optimizer = made("adamw", torch.float32, offload=True)
    places: list[list[tuple[int, int]]] = []
    real = optim.adamw_

    def noted(params: list[Tensor], grads: list[Tensor], first: list[Tensor], *args: object, **options: object) -> None:
        if params[0].dim() == 1 and first[0].data_ptr() in slots:
            places[-1].append((id(params[0]), first[0].data_ptr()))
        real(params, grads, first, *args, **options)  # type: ignore[arg-type]

    assert optimizer._staged is not None
    slots = [slot.moments[0].data_ptr() for slot in optimizer._staged.slots]  # type: ignore[union-attr]
    monkeypatch.setattr(optim, "adamw_", noted)
    for i in range(SLOTS + 1):
        places.append([])
        run(optimizer, range(i, i + 1))
    count = len(places[0])
    found = [place for step in places for _, place in step]
    assert found == [slots[i % SLOTS] for i in range(count * (SLOTS + 1))]
    assert all([view for view, _ in step] == [view for view, _ in places[0]] for step in places)


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "dtype"), HELD)
def test_on_a_gpu(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that overtake computation: many chunks, steps without a wait, and page-locked memory."""
    monkeypatch.setattr(optim_offload, "CHUNK", 1 << 16)

    def at(offload: bool) -> AdamW:
        torch.manual_seed(0)
        model = small_model(hidden_size=512, intermediate_size=1024).to("cuda", dtype)
        names = offloaded(model) if offload else ()
        return AdamW(model, decay=model.decay_parameters(), variant=variant, offload=names)

    found = []
    for offload in (True, True, False):
        optimizer = at(offload)
        for i in range(10):
            for k, p in enumerate(optimizer.params.values()):
                generator = torch.Generator("cuda").manual_seed(100 * i + k)
                p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)
            optimizer.step(1e-2)
        if offload:
            assert all(memory.tensor.is_pinned() for memory in optimizer._host)
        found.append({name: x.cpu() for name, x in bits(optimizer).items()})
    assert same(found[0], found[1])
    if variant != "adamw_bf16":
        assert same(found[0], found[2])
