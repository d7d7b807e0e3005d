"""engine/weight_offload.py on a CPU: loss and updates of a model whose matrices wait on the host are those of one whose
do not, to the bit; where each matrix is at what time; and whole runs, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from test_optim_in_backward import batch, state
from torch import Tensor

import afina
from afina.engine import optim_offload, train
from afina.engine.checkpoint import load_checkpoint
from afina.engine.lora import new_adapter
from afina.engine.model import GPT
from afina.engine.optim import AdamW
from afina.engine.optim_in_backward import UpdatesInBackward
from afina.engine.optim_offload import offloaded
from afina.engine.train import Interrupted
from afina.engine.train_config import TrainConfig
from afina.engine.training_step import accumulate
from afina.engine.weights import load_model, new_model
from afina.errors import ConfigError
from afina.loaders.weights.peft import AdapterConfig


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_offload, "CHUNK", 1024)


def made(
    name: str, variant: str, dtype: str, *, away: bool, policy: str = "full", gradients: bool = False
) -> tuple[GPT, AdamW]:
    folder = str(hf_models.saved(name).folder)
    model = load_model(folder, device="cpu", dtype=dtype, offload_params=away).train()
    model.set_activation_policy(policy)
    names = offloaded(model) if away else ()
    decay, host = model.decay_parameters(), model.host_weights
    return model, AdamW(model, decay=decay, variant=variant, offload=names, gradients=gradients, host_weights=host)


def step(model: GPT, optimizer: AdamW) -> tuple[float, float]:
    updates = UpdatesInBackward(optimizer, 1e-3)
    with updates.attached():
        loss = accumulate(model, [batch()], before_backward=updates.begin)
    return float(loss), float(updates.norm())


@pytest.mark.parametrize(
    ("name", "variant", "dtype", "policy"),
    [
        ("llama", "adamw", "float32", "full"),
        ("gemma3_text", "adamw_8bit", "bfloat16", "offload"),  # a tied head
        ("gpt_neox", "adamw", "bfloat16", "full"),  # biases, and a parallel residual
    ],
)
def test_the_same_bits_as_on_the_device(name: str, variant: str, dtype: str, policy: str) -> None:
    figures, ends = [], []
    for away in (False, True):
        model, optimizer = made(name, variant, dtype, away=away, policy=policy)
        figures.append([step(model, optimizer) for _ in range(3)])
        with torch.no_grad():
            figures[-1].append(tuple(model.eval().loss(batch().input_ids, batch().labels)[None].tolist()))
        ends.append(state(optimizer))
    assert figures[0] == figures[1]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_each_layer_is_there_for_its_turn_alone() -> None:
    """Layers 0, 1, 2 forward, 2, 1, 0 backward, and the one that is next comes before it is asked for."""
    model, optimizer = made("llama", "adamw", "float32", away=True)
    host = model.host_weights
    assert host is not None
    count, seen = len(model.layers), list[tuple[int, tuple[int | None, ...]]]()
    enter = host.enter

    def noted(index: int) -> None:
        enter(index)
        seen.append((index, tuple(place.layer for place in host.places)))
        for i, layer in enumerate(host.layers):
            there = i in seen[-1][1]
            assert all(p.data_ptr() == (d if there else h).data_ptr() for p, h, d in zip(*parts(layer)))
            # What is on the device is what is on the host, as long as no update is under way.
            assert not there or all(torch.equal(d, h) for _, h, d in zip(*parts(layer)))

    host.enter = noted  # type: ignore[method-assign]
    step(model, optimizer)
    assert count == 3
    assert seen == [(0, (0, 1)), (1, (2, 1)), (2, (2, 1)), (2, (2, 1)), (1, (0, 1)), (0, (0, 1))]
    # A step later the first two need not come again; and what was trained there has come back.
    assert all(torch.equal(p, h) for layer in host.layers for p, h, _ in zip(*parts(layer)))
    seen.clear()
    step(model, optimizer)
    assert seen[:3] == [(0, (0, 1)), (1, (2, 1)), (2, (2, 1))]


def parts(layer: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return layer.parameters, layer.host, layer.device


def test_a_frozen_base_waits_there_and_adapters_do_not() -> None:
    found = []
    for away in (False, True):
        folder = str(hf_models.saved("llama").folder)
        model = load_model(folder, device="cpu", dtype="float32", offload_params=away).train()
        new_adapter(model, AdapterConfig(base=None, r=4, alpha=8), targets=["all-linear"], seed=0)
        model.set_activation_policy("full")
        optimizer = AdamW(model, decay=set())
        for _ in range(2):
            loss = accumulate(model, [batch()])
            optimizer.step(1e-2)
            optimizer.zero_grad()
        found.append((loss, state(optimizer)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


def test_a_random_start_is_the_same() -> None:
    config = json.loads((Path(hf_models.saved("llama").folder) / "config.json").read_text())
    here, there = (new_model(config, device="cpu", dtype="float32", offload_params=away) for away in (False, True))
    assert there.host_weights is not None
    assert all(torch.equal(p, q) for p, q in zip(here.parameters(), there.parameters(), strict=True))


def test_weights_in_four_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="held in 4 bits, which stay on the device: set offload_params to false"):
        load_model(str(hf_models.saved("llama").folder), device="cpu", quantize="nf4", offload_params=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation_policy": "keep"}, "activation_policy is keep: set activation_policy to full or offload"),
        ({"method": "qlora"}, "but method is qlora, .*: set offload_params to false"),
        ({}, "offload_optimizer is false: set offload_optimizer to true"),
        ({"offload_param": False}, "two different values"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    given = {"model": "m", "data": "d", "output_dir": "o", "offload_params": True, **settings}
    with pytest.raises(ConfigError, match=words):
        TrainConfig.resolve(overrides=given)


def test_state_that_no_memory_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 150 if name == "SC_PHYS_PAGES" else 1000)  # The weights take 0.1 MB.
    with pytest.raises(ConfigError, match=r"offload_optimizer keeps 0\.0 GB .* has 0\.0 GB: set optim to adamw_bf16"):
        made("llama", "adamw", "float32", away=True)


def test_a_run_is_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in one go on the device; on the host; there, stopped after a step and gone on with."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} the", "completion": f" word {i % 7}"}) + "\n" for i in range(20))
    )

    def fit(name: str, *, away: bool, resume: bool = False) -> Path:
        result = afina.finetune(
            model="afina-tiny", data=str(rows), output_dir=str(tmp_path / name), max_steps=3, batch_size=4,
            save_steps=1, max_grad_norm=0.0, threads=1, optim_in_backward=True, offload_optimizer=away,
            offload_params=away, activation_policy="full", resume=resume,
        )  # fmt: skip
        return result.output_dir

    ends = [fit("here", away=False), fit("there", away=True)]
    real = train.Run._step
    with monkeypatch.context() as patch:

        def stopped(self: train.Run) -> None:
            if self.progress.step == 1:
                raise Interrupted
            real(self)

        patch.setattr(train.Run, "_step", stopped)
        with pytest.raises(Interrupted):
            fit("stopped", away=True)
    ends.append(fit("stopped", away=True, resume=True))
    found = [load_checkpoint(folder / "checkpoint-3") for folder in ends]
    for other in found[1:]:
        assert found[0].groups == other.groups
        for group in other.groups:
            theirs = found[0].tensors(group)
            assert all(torch.equal(value, theirs[name]) for name, value in other.tensors(group).items())
    best = [afina.load_model(str(folder / "best"), device="cpu", dtype="float32") for folder in ends]
    assert all(torch.equal(p, q) for p, q in zip(best[0].parameters(), best[1].parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["adamw", "adamw_8bit"])
def test_on_a_gpu(variant: str) -> None:
    """The same bits as on the device, in bf16, over steps that nothing waits for."""
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "vocab_size": 1000,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    found = []
    for away in (False, True):
        model = new_model(config, device="cuda", dtype="bfloat16", offload_params=away)
        model.set_activation_policy("offload")
        optimizer = AdamW(
            model, decay=model.decay_parameters(), variant=variant, offload=offloaded(model) if away else (),
            device=torch.device("cuda", torch.cuda.current_device()), host_weights=model.host_weights,
        )  # fmt: skip
        losses = []
        for _ in range(5):
            updates = UpdatesInBackward(optimizer, 1e-3)
            ids = torch.randint(1000, (1, 200), generator=torch.Generator().manual_seed(0)).cuda()
            with updates.attached():
                loss = model.loss(ids, ids.cpu())
                updates.begin(loss)
                loss.backward()
            losses.append(loss.detach())
        if model.host_weights is not None:
            model.host_weights.drain()
        found.append((torch.stack(losses).cpu(), {n: p.detach().cpu() for n, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
