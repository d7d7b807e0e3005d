"""engine/optim_in_backward.py: the bits of the ordinary update, what is held of gradients, and steps that are not
finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import saved
from torch import Tensor

import afina
from afina.engine import optim, train
from afina.engine.checkpoint import load_checkpoint
from afina.engine.model import GPT
from afina.engine.nonfinite import NonFiniteError
from afina.engine.optim import AdamW
from afina.engine.optim_in_backward import UpdatesInBackward
from afina.engine.training_step import accumulate
from afina.kernels.adamw import adamw_
from afina.loaders.data.batches import MicroBatch


def batch() -> MicroBatch:
    ids = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    return MicroBatch(ids, ids, torch.tensor([0, 25, 40], dtype=torch.int32), [0, 1], 38, 40)


def made(name: str, variant: str, dtype: str) -> tuple[GPT, AdamW]:
    model = afina.load_model(str(saved(name).folder), device="cpu", dtype=dtype).train()
    scales = dict.fromkeys([n for n, _ in model.named_parameters() if "qkv" in n], 2.0)
    return model, AdamW(model, decay=model.decay_parameters(), lr_scales=scales, variant=variant)


def step(model: GPT, optimizer: AdamW, *, inside: bool, change: Any = None) -> tuple[Tensor, Tensor]:
    """One step, the loss and the norm; ``change`` is done to the loss before the backward pass."""
    updates = UpdatesInBackward(optimizer, 1e-3)
    if not inside:
        loss = accumulate(model, [batch()])
        norm = optimizer.clip_(0.0)
        optimizer.step(1e-3, skip=~(loss.isfinite() & norm.isfinite()))
        optimizer.zero_grad()
        return loss, norm
    with updates.attached():
        loss = accumulate(model, [batch()], before_backward=lambda x: updates.begin(change(x) if change else x))
    return loss, updates.norm()


def state(optimizer: AdamW) -> dict[str, Tensor]:
    tensors = {f"{g} {n}": x.clone() for g, group in optimizer.state().items() for n, x in group.items()}
    return tensors | {n: p.detach().clone() for n, p in optimizer.params.items()}


@pytest.mark.parametrize(
    ("name", "variant", "dtype"),
    [
        ("llama", "adamw", "float32"),
        ("gemma3_text", "adamw_8bit", "bfloat16"),  # a tied head
    ],
)
def test_the_bits_of_the_ordinary_update(name: str, variant: str, dtype: str) -> None:
    found = []
    for inside in (False, True):
        model, optimizer = made(name, variant, dtype)
        model.set_activation_policy("full" if inside else "keep" if dtype == "float32" else "full")
        figures = [step(model, optimizer, inside=inside) for _ in range(3)]
        assert all(p.grad is None for p in model.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        found.append((torch.tensor(figures), state(optimizer), optimizer.num_updates))
    (figures, before, count), (ours, after, ours_count) = found
    assert torch.equal(figures, ours)
    assert count == ours_count == 3
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_one_gradient_at_a_time() -> None:
    model, optimizer = made("gpt_neox", "adamw", "float32")
    held: list[int] = []
    update = AdamW.update

    def noted(self: AdamW, *args: Any, **kwargs: Any) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))
        update(self, *args, **kwargs)

    optimizer.update = noted.__get__(optimizer)
    step(model, optimizer, inside=True)
    assert held == [1] * len(optimizer.params)


def test_stochastic_roundings_repeat_and_differ_between_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, seeds = [], list[int]()
    for _ in range(2):
        model, optimizer = made("llama", "adamw_bf16", "bfloat16")
        monkeypatch.setattr(optim, "adamw_", lambda *a, seed, **k: (seeds.append(seed), adamw_(*a, seed=seed, **k)))
        step(model, optimizer, inside=True)
        assert len(set(seeds)) == len(seeds) == len(optimizer.params)
        seeds.clear()
        ends.append(state(optimizer))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_step_that_is_not_finite() -> None:
    model, optimizer = made("llama", "adamw", "float32")
    before = state(optimizer)
    step(model, optimizer, inside=True, change=lambda loss: loss * torch.nan)
    assert all(torch.equal(value, before[key]) for key, value in state(optimizer).items())
    # A gradient alone: the weights above have moved, this one and those below stay.
    model.layers[1].mlp.down.weight.register_hook(lambda grad: grad * torch.inf)
    _, norm = step(model, optimizer, inside=True)
    assert not norm.isfinite()
    after = state(optimizer)
    moved = {name for name in optimizer.params if not torch.equal(before[name], after[name])}
    assert moved == {n for n in optimizer.params if n.startswith(("layers.2.", "norm.", "head."))}


def test_a_run_stops_at_a_step_that_is_half_done_and_skips_it_as_a_whole_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the third step is finite, and a gradient of its first layer is not, at every try."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} the", "completion": f" word {i % 7}"}) + "\n" for i in range(20))
    )
    real, third = train.Run._step, list[dict[str, torch.Tensor]]()

    def step(self: train.Run) -> None:
        weight = self.model.layers[0].mlp.down.weight
        hook = weight.register_hook(lambda grad: grad * torch.inf if self.progress.step == 2 else grad)
        real(self)
        hook.remove()
        if self.progress.step == 3:
            third.append({name: value.clone() for name, value in self.optimizer.state()["weights"].items()})

    monkeypatch.setattr(train.Run, "_step", step)
    out = tmp_path / "run"
    settings: dict[str, Any] = {
        "model": "afina-tiny", "data": str(rows), "output_dir": str(out), "max_steps": 4, "batch_size": 4,
        "save_steps": 1, "max_grad_norm": 0.0, "threads": 1,
    }  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"step 3: a gradient is not finite, .*rows\.jsonl: line \d+.*--resume"):
        afina.finetune(**settings, optim_in_backward=True)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    before = load_checkpoint(out / "checkpoint-2").tensors("weights")
    result = afina.finetune(**settings, resume=True)
    assert result.metrics["skipped_steps"] == 1
    (weights,) = third
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert load_checkpoint(out / "checkpoint-4").meta["updates"] == 3


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} the", "completion": f" word {i % 7}"}) + "\n" for i in range(20))
    )
    ends, logs = [], []
    for inside in (False, True):
        result = afina.finetune(
            model="afina-tiny", data=str(rows), output_dir=str(tmp_path / str(inside)), max_steps=2, batch_size=4,
            max_grad_norm=0.0, threads=1, optim_in_backward=inside,
        )  # fmt: skip
        ends.append(load_checkpoint(result.output_dir / "checkpoint-2").tensors("weights"))
        read = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
        logs.append([(line["loss"], line["grad_norm"]) for line in read if "loss" in line])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
