"""engine/gradient_offload.py on a CPU: gradients that wait on the host, with weights there or not, give the bits of
gradients that stay: added up over micro-batches, clipped, and skipped as a whole where one is not finite."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_host_memory import LateLink
from test_optim_in_backward import batch, state
from test_weight_offload import made
from torch import Tensor, nn

import afina
from afina.engine import gradient_offload, optim_offload, train, weight_offload
from afina.engine.checkpoint import load_checkpoint
from afina.engine.gradient_offload import ROOMS
from afina.engine.model import GPT
from afina.engine.optim import AdamW
from afina.engine.train import Interrupted
from afina.engine.training_step import accumulate
from afina.loaders.data.batches import MicroBatch


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_offload, "CHUNK", 1024)


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies over the link in their order, or as early and as late as they may be."""
    for module in (gradient_offload, optim_offload, weight_offload) if request.param else ():
        monkeypatch.setattr(module, "HostLink", LateLink)


def batches() -> list[MicroBatch]:
    first = batch()
    ids = first.input_ids.flip(1)
    return [first, MicroBatch(ids, ids, first.cu_seqlens, [2, 3], 38, 40)]


def step(model: GPT, optimizer: AdamW, micro_batches: list[MicroBatch], norm: float = 0.5) -> Tensor:
    away = optimizer.host_gradients
    if away is None:
        loss = accumulate(model, micro_batches)
    else:
        with away.leaving():
            loss = accumulate(model, micro_batches)
        assert all(p.grad is None for name, p in optimizer.params.items() if name in optimizer.on_host)
    figures = torch.stack([loss, optimizer.clip_(norm)])
    optimizer.step(1e-3, skip=~figures.isfinite().all())
    optimizer.zero_grad()
    return figures


@pytest.mark.parametrize(
    ("name", "variant", "dtype"),
    [("llama", "adamw", "float32"), ("gemma3_text", "adamw_8bit", "bfloat16")],  # the second one's head is tied
)
@pytest.mark.parametrize("several", [False, True])
def test_the_bits_of_gradients_that_stay(link: None, name: str, variant: str, dtype: str, several: bool) -> None:
    figures, ends = [], []
    for away in (False, True):
        model, optimizer = made(name, variant, dtype, away=away, gradients=True)
        assert (optimizer.host_gradients is not None) == away
        figures.append([step(model, optimizer, batches()[: 1 + several]) for _ in range(3)])
        if model.host_weights is not None:
            model.host_weights.drain()
        ends.append(state(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*figures))
    assert all(norm > 0.5 for _, norm in figures[0])  # so each was clipped
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_no_part_comes_before_its_gradient_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of the copies is ahead of the computation, so it must wait itself."""
    monkeypatch.setattr(gradient_offload, "HostLink", LateLink)
    model, optimizer = made("llama", "adamw", "float32", away=True, gradients=True)
    away, waited = optimizer.host_gradients, list[list[Any]]()
    assert away is not None
    real = away.link.to_device
    monkeypatch.setattr(
        away.link, "to_device", lambda pairs, *, after: waited.append([*after]) or real(pairs, after=after)
    )
    step(model, optimizer, batches())
    assert len(waited) > len(away.params)
    assert all(isinstance(left, int) for _, left in waited)


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    """Of the first layer, below all others, whose gradients have left by then."""
    model, optimizer = made("llama", "adamw", "float32", away=True, gradients=True)
    before = state(optimizer)
    hook = model.layers[0].mlp.down.weight.register_hook(lambda grad: grad * torch.inf)  # type: ignore[union-attr]
    _, norm = step(model, optimizer, batches())
    assert not norm.isfinite()
    assert all(torch.equal(value, before[key]) for key, value in state(optimizer).items())
    hook.remove()
    assert step(model, optimizer, batches())[1].isfinite()  # Nothing of that step is left.
    assert not all(torch.equal(value, before[key]) for key, value in state(optimizer).items())


def test_a_step_that_is_dropped_leaves_nothing_behind() -> None:
    """As a signal between micro-batches drops it."""
    found = []
    for drop in (False, True):
        model, optimizer = made("llama", "adamw", "float32", away=True, gradients=True)
        away = optimizer.host_gradients
        assert away is not None
        if drop:
            with away.leaving():
                accumulate(model, batches()[1:])
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
            optimizer.zero_grad()
        step(model, optimizer, batches()[:1])
        found.append(state(optimizer))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_one_gradient_at_a_time_and_what_is_held() -> None:
    model, optimizer = made("llama", "adamw", "float32", away=True, gradients=True)
    away, held = optimizer.host_gradients, list[int]()
    assert away is not None
    matrices = {n: p for n, p in optimizer.params.items() if p.dim() == 2}
    assert away.host_nbytes == sum(p.nbytes for p in matrices.values())
    assert away.nbytes == ROOMS * 4 * 1024
    take = away._take

    def noted(name: str, parameter: Tensor) -> None:
        held.append(sum(p.grad is not None for p in matrices.values()))
        take(name, parameter)

    away._take = noted  # type: ignore[method-assign]
    step(model, optimizer, batches())
    assert held == [1] * 2 * len(matrices)


def test_all_gradients_of_a_step_may_wait_on_the_host() -> None:
    """As those of adapters do, which are matrices alone."""
    figures = []
    for there in (False, True):
        torch.manual_seed(0)
        matrix = nn.Linear(8, 8, bias=False)
        optimizer = AdamW(matrix, decay=set(), offload=["weight"] * there, gradients=there)
        loss = matrix(torch.ones(1, 8)).square().sum()
        away = optimizer.host_gradients
        assert (away is not None) == there
        with away.leaving() if away is not None else contextlib.nullcontext():
            loss.backward()
        figures.append([float(optimizer.clip_(0.5))])
        optimizer.step(1e-3)
        figures[-1] += matrix.weight.flatten().tolist()
    assert figures[0] == figures[1]


def test_a_run_in_two_micro_batches_is_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clipping and accumulation, which the optimizer in the backward pass does not have."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} the", "completion": f" word {i % 7}"}) + "\n" for i in range(20))
    )

    def fit(name: str, *, away: bool, **options: Any) -> Path:
        return afina.finetune(
            model="afina-tiny", data=str(rows), output_dir=str(tmp_path / name), max_steps=2, batch_size=4,
            gradient_accumulation_steps=2, save_steps=1, threads=1, offload_optimizer=away, offload_params=away,
            activation_policy="full", **options,
        ).output_dir  # fmt: skip

    here, real = fit("here", away=False), train.Run._step
    with monkeypatch.context() as patch:

        def stopped(self: train.Run) -> None:
            if self.progress.step == 1:
                raise Interrupted
            real(self)

        patch.setattr(train.Run, "_step", stopped)
        with pytest.raises(Interrupted):
            fit("there", away=True)
    there = fit("there", away=True, resume=True)
    ours, theirs = (load_checkpoint(folder / "checkpoint-2") for folder in (here, there))
    assert ours.groups == theirs.groups
    for group in ours.groups:
        other = theirs.tensors(group)
        assert all(torch.equal(value, other[name]) for name, value in ours.tensors(group).items())


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The bits of gradients that stay, over steps that nothing waits for, with memory that is used anew at once."""
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    for away in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(6))).to(device)
        names = {n for n, p in model.named_parameters() if p.dim() == 2} if away else ()
        optimizer = AdamW(model, decay=set(), offload=names, gradients=True)
        for i in range(4):
            x = torch.randn(256, 1024, device=device, generator=torch.Generator("cuda").manual_seed(i))
            if optimizer.host_gradients is None:
                for part in x.split(128):
                    model(part).square().sum().backward()
            else:
                with optimizer.host_gradients.leaving():
                    for part in x.split(128):
                        model(part).square().sum().backward()
            optimizer.clip_(1.0)
            optimizer.step(1e-3)
            optimizer.zero_grad()
        found.append({n: p.detach().cpu() for n, p in model.named_parameters()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
