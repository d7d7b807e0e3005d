"""engine/plan.py: sizes, the options and their order, and what is offered where nothing fits. How near the predicted
peaks are to measured ones is in test_memory.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from afina.engine.known_models import KNOWN
from afina.engine.linear import Linear
from afina.engine.memory import plan
from afina.engine.methods import choose_trained
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.nf4_weight import NF4Weight, shapes_of_nf4
from afina.engine.optim import AdamW
from afina.engine.optim_offload import offloaded
from afina.engine.plan import (
    LINK,
    PLACES,
    RATE,
    RESERVE,
    Combination,
    Planner,
    known_config,
    parse_memory,
    what_would_fit,
)
from afina.engine.train_config import TrainConfig
from afina.errors import ConfigError
from afina.kernels.nf4 import quantize_nf4

HF = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1 << 20, "vocab_size": 3000,
    "tie_word_embeddings": False,
}  # fmt: skip


def run(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "data": "-", "output_dir": "-", "batch_size": 4, **settings})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24e9), ("24 GiB", 24 * 2**30), ("24g", 24e9), ("1.5 tb", 1.5e12), ("24000000000", 24e9),
        (" 512 MiB ", 2**29), ("80gib", 80 * 2**30),
    ],
)  # fmt: skip
def test_memory_as_people_write_it(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "much", "24XB", "-24GB", "0", "12", "24 GB GB", "1e9", "nanGB", "9" * 30 + "GB", "i"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected the device's memory, such as 24GB"):
        parse_memory(text)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_prediction_is_that_of_the_model_itself(method: str) -> None:
    """Built without memory here, and with weights there."""
    config = run(method=method)
    planner = Planner(config, HF, fixed=set())
    model = GPT(ModelConfig.from_hf(HF), dtype=torch.bfloat16).train()
    model.hf_config = dict(HF)
    choose_trained(config, model)
    for option in planner.options(batch_size=4, max_length=256):
        s = option.settings
        model.set_activation_policy(s["activation_policy"])
        names = offloaded(model) if s["offload_optimizer"] else ()
        found = plan(
            model, AdamW(model, decay=set(), variant=s["optim"], offload=names), tokens=1024, loss_tokens=1024,
            lean_loss=s["lean_loss"], in_backward=s["optim_in_backward"], accumulates=False, backend="triton",
            offload_params=s["offload_params"],
        )  # fmt: skip
        assert option.memory == found
        assert option.needed == found.total + RESERVE


def test_graphs_are_counted_where_there_can_be_some() -> None:
    fixed = {"optim", "lean_loss", "offload_optimizer", "optim_in_backward"}
    found = {}
    for graph in (True, False):
        options = Planner(run(cuda_graph=graph), HF, fixed=fixed).options(batch_size=4, max_length=256)
        found[graph] = {option.settings["activation_policy"]: option.memory for option in options}
    for policy in ("keep", "full"):
        more, plain = found[True][policy], found[False][policy]
        assert more.activations > 1.8 * plain.activations
        assert more.gradients >= plain.gradients
    assert found[True]["offload"] == found[False]["offload"]  # it rules graphs out


def test_from_fast_to_lean() -> None:
    planner = Planner(run(), HF, fixed=set())
    options = planner.options(batch_size=4, max_length=1024)
    works, sizes = [option.work for option in options], [option.needed for option in options]
    assert works == sorted(works)
    assert works[0] == 1
    assert sizes == sorted(sizes, reverse=True)
    assert options[0].settings == {
        "activation_policy": "keep", "optim": "adamw", "optim_in_backward": False, "lean_loss": False,
        "offload_optimizer": False, "offload_params": False,
    }  # fmt: skip
    assert options[-1].needed == planner.leanest(batch_size=4, max_length=1024)
    # Recomputed layers cost a third of a step's products, with adapters half, but for the head's share.
    for method, share in (("full", 1 / 3), ("lora", 1 / 2)):
        full = run(method=method, activation_policy="full", lean_loss=False)
        found = Planner(full, {**HF, "vocab_size": 100}, fixed={"lean_loss"}).options(batch_size=4, max_length=1024)
        extra = next(option.work for option in found if option.settings["activation_policy"] == "full") - 1
        assert 0.8 * share < extra < share


def test_what_somebody_chose_stays() -> None:
    config = run(activation_policy="full", optim="adamw_8bit", max_grad_norm=1.0)
    fixed = {"activation_policy", "optim", "max_grad_norm", "lean_loss", "offload_optimizer"}
    for option in Planner(config, HF, fixed=fixed).options(batch_size=4, max_length=512):
        assert option.settings == {
            "activation_policy": "full", "optim": "adamw_8bit", "optim_in_backward": False, "lean_loss": False,
            "offload_optimizer": False, "offload_params": False,
        }  # fmt: skip
    several = Planner(run(gradient_accumulation_steps=2), HF, fixed=set()).options(batch_size=4, max_length=512)
    assert not any(option.settings["optim_in_backward"] for option in several)


def test_limits_are_limits() -> None:
    planner = Planner(run(), HF, fixed=set())
    memory = planner.leanest(batch_size=3, max_length=1000)
    assert planner.largest(memory, max_length=1000) == 3
    length = planner.longest(memory, batch_size=1)
    assert length >= 2048
    assert planner.leanest(batch_size=1, max_length=length) <= memory
    assert planner.leanest(batch_size=1, max_length=length + 64) > memory
    assert planner.longest(RESERVE, batch_size=1) == planner.largest(RESERVE, max_length=8) == 0


def test_what_the_host_holds_comes_last_and_can_be_run() -> None:
    """Each option is a run that the settings allow; the link costs more than any recomputation on so few tokens."""
    big = {**HF, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
    for method, places in (("full", 3), ("lora", 2), ("qlora", 1)):
        config = run(method=method, batch_size=1, max_length=64)
        options = Planner(config, big, fixed=set()).options(batch_size=1, max_length=64)
        found = [(o.settings["offload_optimizer"], o.settings["offload_params"]) for o in options]
        assert found == sorted(found)
        assert len(set(found)) == places
        for option in options:
            clip = {"max_grad_norm": 0} if option.settings["optim_in_backward"] else {}
            run(method=method, **option.settings, **clip)
    # What comes over the link counts as the products that the device makes meanwhile: bf16 moments, each layer twice.
    full = run(batch_size=1, max_length=64, optim="adamw_bf16", activation_policy="full", lean_loss=False)
    planner = Planner(full, HF, fixed={"optim", "activation_policy", "lean_loss"})
    works = [planner._work(Combination("adamw_bf16", True, p, "full", False), 1, 64) for p in PLACES["full"]]
    matrices = sum(m.in_features * m.out_features for m in planner.model.layers.modules() if isinstance(m, Linear))
    moments = 4 * (matrices + 2 * 3000 * 64)
    assert works[1] - works[0] == pytest.approx(moments / 64 * RATE / LINK)
    assert works[2] - works[1] == pytest.approx(2 * 2 * matrices / 64 * RATE / LINK)


def test_7b_is_planned_in_24_and_in_16_gb() -> None:
    config = run(batch_size=1, max_length=2048)
    options = Planner(config, KNOWN["qwen2.5-7b"], fixed=set()).options(batch_size=1, max_length=2048)
    take = {gb: next(o for o in options if o.needed <= gb * 1e9) for gb in (24, 16)}
    assert take[24].settings["offload_optimizer"]
    assert not take[24].settings["offload_params"]
    assert take[16].settings["offload_params"]
    assert take[16].memory.host == pytest.approx(6 * 7.6e9, rel=0.06)  # bf16 weights of the layers and two moments


def test_what_would_fit_fits() -> None:
    config = run(max_length=8192, batch_size=8)
    planner = Planner(config, HF, fixed=set())
    memory = planner.leanest(batch_size=2, max_length=8192)
    found = what_would_fit(planner, HF, memory)
    assert found[0] == "batch_size 2"
    assert found[-1] == f"{planner.leanest(batch_size=8, max_length=8192) / 1e9:.1f} GB of memory"
    assert any(text.startswith("max_length ") for text in found)
    # Weights and moments alone take more than this: no batch helps, another method does.
    big = {**HF, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    fixed = {"offload_optimizer", "offload_params"}
    planner = Planner(run(batch_size=1, max_length=64), big, fixed=fixed)
    lora = Planner(run(batch_size=1, max_length=64, method="lora"), big, fixed=fixed).leanest(
        batch_size=1, max_length=64
    )
    assert lora < planner.leanest(batch_size=1, max_length=64)
    found = what_would_fit(planner, big, lora)
    assert "method lora" in found
    assert "method qlora" in found
    assert not any("batch" in text for text in found)
    # A choice that stands in the way is named.
    fixed = {"max_grad_norm", "lean_loss"}
    planner = Planner(run(batch_size=1, max_length=64), big, fixed=fixed)
    memory = Planner(run(batch_size=1, max_length=64), big, fixed={"lean_loss"}).leanest(batch_size=1, max_length=64)
    assert "max_grad_norm left open" in what_would_fit(planner, big, memory)
    planner = Planner(run(batch_size=1, max_length=64, gradient_accumulation_steps=4), big, fixed={"lean_loss"})
    assert "gradient_accumulation_steps 1" in what_would_fit(planner, big, memory)


def test_known_models() -> None:
    sizes = {name: ModelConfig.from_hf(hf).num_parameters() for name, hf in KNOWN.items()}
    # As their cards say.
    assert sizes == {
        "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
        "qwen2.5-7b": 7_615_616_512, "llama-3-8b": 8_030_261_248,
    }  # fmt: skip
    assert known_config("Qwen/Qwen2.5-7B-Instruct") is KNOWN["qwen2.5-7b"]
    assert known_config("Qwen2.5-70B") is None


def test_quantised_weights_count_as_they_are_held() -> None:
    found = Planner(run(method="qlora", batch_size=1), KNOWN["llama-3-8b"], fixed=set())
    memory = found.options(batch_size=1, max_length=512)[0].memory
    weight = torch.randn(100, 72)
    for real in (NF4Weight([(0, 100, *quantize_nf4(weight))]), NF4Weight([(0, 100, *quantize_nf4(weight.bfloat16()))])):
        assert shapes_of_nf4(100, 72, torch.float32).nbytes == real.nbytes
    matrices = 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096
    assert memory.weights == pytest.approx(matrices * 4.127 / 8 + 2 * (2 * 128_256 * 4096 + 65 * 4096), rel=1e-3)
