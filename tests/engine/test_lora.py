"""Adapters on models: the start, the exchange with PEFT both ways, training beside PEFT, dropout, several."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tiny_model
import torch
from hf_models import parametrize
from one_step import changed_by_a_step
from safetensors.torch import load_file, save_file
from torch import Tensor

from afina.engine import train
from afina.engine.linear import Linear
from afina.engine.lora import (
    Adapter,
    choose_targets,
    choose_whole,
    linears,
    load_adapter,
    new_adapter,
    save_adapter,
    set_adapter,
)
from afina.engine.model import GPT
from afina.engine.optim import AdamW
from afina.engine.weights import load_model
from afina.errors import ConfigError, WeightsError
from afina.kernels import cross_entropy
from afina.loaders.weights.peft import BASE_SAMPLE, CONFIG, WEIGHTS, AdapterConfig

# Relative to the largest logit: two orders of adding fp32 numbers differ by a share of what is added, and logits of
# these models reach 40.
CLOSE = 1e-5
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "rslora-dora": {"rslora": True, "dora": True}}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's
        yield


def load(name: str, dtype: str = "float32") -> GPT:
    model = load_model(hf_models.saved(name).folder, dtype=dtype)
    model.sample = "base"
    return model


def fresh(
    model: GPT, targets: Sequence[str] = ("all-linear",), whole: Sequence[str] = (), *, seed: int = 1, **options: Any
) -> Adapter:
    config = AdapterConfig(**{"r": 4, "alpha": 8, "base": "the base"} | options)
    return new_adapter(model, config, targets=targets, modules_to_save=whole, seed=seed)


def move(model: GPT, seed: int = 3) -> GPT:
    """Change all that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    assert model.adapter is not None
    with torch.no_grad():
        for lora in model.adapter.loras.values():
            for part, _, b in lora.blocks():
                lora.B[b, : part.rank] = 0.3 * torch.randn(b.stop - b.start, part.rank, generator=generator)
            if lora.magnitude is not None:
                lora.magnitude.mul_(1 + 0.3 * torch.rand(lora.magnitude.shape, generator=generator))
        for name in model.adapter.saved:
            parameter = model.get_parameter(name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train(model.training)


def tokens(rows: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out = model(tokens())
    return out if isinstance(out, Tensor) else out.logits


def agree(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < CLOSE, f"{error:.1e} of the largest logit"


def in_peft(name: str, folder: Path) -> Any:
    """The adapter in ``folder`` on transformers' model, in eval mode."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(hf_models.saved(name).model), str(folder))


def of_peft(name: str, **options: Any) -> Any:
    """A PEFT model that is no longer at its start, in eval mode."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(copy.deepcopy(hf_models.saved(name).model), peft.LoraConfig(**options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif "magnitude" in key:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape))
    return model.eval()


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


# The start


@parametrize()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_no_bit(name: str, dtype: str) -> None:
    model = load(name, dtype)
    ids, packed = tokens(), torch.tensor([0, 5, 12, 34], dtype=torch.int32)
    with torch.no_grad():
        before = model(ids), model(ids.view(1, -1), cu_seqlens=packed)
        some = ["q_proj", "v_proj"] if "llama" in name or "qwen" in name else [list(linears(model))[1]]
        for targets in ["all-linear"], some:
            for options in {}, {"rslora": True, "dropout": 0.3}, {"dora": True}:
                fresh(model, targets, **options)
                for mode in True, False:
                    model.train(mode)
                    after = model(ids), model(ids.view(1, -1), cu_seqlens=packed)
                    assert all(torch.equal(a, b) for a, b in zip(before, after)), (targets, options, mode)
                move(model)
                assert not torch.equal(model(ids), before[0])
                set_adapter(model, None)
        assert torch.equal(model(ids), before[0])


def test_targets_are_the_linear_layers_of_the_checkpoint_and_the_seed_decides_a() -> None:
    model = load("llama")
    adapter = fresh(model)
    layer = [
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
    ]
    assert {t.name for t in adapter.targets} == {f"model.layers.{i}.{name}" for i in range(3) for name in layer}
    assert adapter.config.target_modules == tuple(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
    first = {name: lora.A.detach().clone() for name, lora in adapter.loras.items()}
    for seed, same in (1, True), (2, False):
        again = fresh(load("llama"), seed=seed)
        assert all(torch.equal(lora.A, first[name]) == same for name, lora in again.loras.items())


def test_targets_by_name_end_of_name_or_all() -> None:
    model = load("llama")
    chosen = choose_targets(model, ["layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"])
    assert {t.name for t in chosen} == {"model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    assert len(choose_targets(model, ["q_proj", "v_proj"])) == 6
    adapter = fresh(model, ["layers.1.self_attn.q_proj"])
    assert adapter.config.target_modules == ("model.layers.1.self_attn.q_proj",)  # q_proj would be in every layer
    assert list(adapter.loras) == ["layers.1.attn.qkv"]
    assert [(p.start, p.stop) for p in adapter.loras["layers.1.attn.qkv"].parts] == [(0, 32)]


# The exchange with PEFT


@parametrize()
@pytest.mark.parametrize("method", METHODS)
def test_peft_computes_what_we_do_and_back(name: str, method: str, tmp_path: Path) -> None:
    model = load(name)
    base = logits(model)
    fresh(model, **METHODS[method])
    ours = logits(move(model))
    assert (ours - base).abs().max() > 0.1 * base.abs().max()  # an adapter that matters
    save_adapter(model, None, tmp_path / "ours")
    theirs = in_peft(name, tmp_path / "ours")
    agree(ours, logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in "ours", "theirs":
        other = load(name)
        set_adapter(other, load_adapter(other, tmp_path / folder))
        assert torch.equal(logits(other), ours)
        save_adapter(other, None, tmp_path / f"{folder} again")
    assert files(tmp_path / "ours again") == files(tmp_path / "ours")
    assert load_file(tmp_path / "theirs again" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()


MADE_BY_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "its default": ("qwen2", {}),
    "default gpt2": ("gpt2", {"fan_in_fan_out": True}),
    "a regex": ("qwen3", {"target_modules": r"model\.layers\.[02]\..*(q|up)_proj"}),
    "whole names": ("llama", {"target_modules": ["model.layers.1.mlp.down_proj", "layers.0.self_attn.k_proj"]}),
    "excluded": ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "some layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7, r"^model\.layers\.0\.mlp\.up_proj": 1},
            "alpha_pattern": {"layers.1.mlp.down_proj": 5, "k_proj": 3, "layers.0.mlp.up_proj": 0.5},
        },
    ),
    "patterns rslora": (
        "gpt_neox",
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"query_key_value": 9}},
    ),
    "patterns dora": (
        "gemma3_text",
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"k_proj": 2, "gate_proj": 6}},
    ),
    "dropout": ("llama", {"target_modules": ["v_proj"], "lora_dropout": 0.25, "lora_alpha": 0.3}),
    "embeddings and head": (
        "llama",
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    # The file has q, k and v of each head together.
    "q, k and v whole": ("gpt_neox", {"target_modules": ["dense"], "modules_to_save": ["query_key_value"]}),
    "a head of another name": ("gpt_neox", {"target_modules": ["dense"], "modules_to_save": ["lm_head"]}),
    "head alone": ("mistral", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "norms": ("gemma2", {"target_modules": ["v_proj"], "modules_to_save": ["post_attention_layernorm"]}),
    "tied": (
        "qwen2-yarn",
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_we_compute_what_peft_does_for_adapters_that_peft_made(case: str, tmp_path: Path) -> None:
    name, options = MADE_BY_PEFT[case]
    theirs = of_peft(name, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(name)
    base = logits(model)
    set_adapter(model, load_adapter(model, tmp_path / "theirs"))
    ours = logits(model)
    assert (ours - base).abs().max() > 0.01 * base.abs().max()
    agree(ours, logits(theirs))
    # What we save of it is an adapter that PEFT reads as it was.
    save_adapter(model, None, tmp_path / "ours")
    agree(ours, logits(in_peft(name, tmp_path / "ours")))
    set_adapter(model, None)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("name", "whole", "saved"),
    [
        ("llama", ["embed_tokens"], {"model.embed_tokens"}),
        ("llama", ["lm_head"], {"lm_head"}),
        ("llama", ["embed_tokens", "lm_head"], {"model.embed_tokens", "lm_head"}),
        ("llama", ["layers.1.input_layernorm", "model.norm"], {"model.layers.1.input_layernorm", "model.norm"}),
        # A tied matrix has both names: PEFT would otherwise change one of its two uses.
        ("qwen2-yarn", ["embed_tokens"], {"model.embed_tokens", "lm_head"}),
        ("qwen2-yarn", ["lm_head"], {"model.embed_tokens", "lm_head"}),
        ("gemma3_text", ["embed_tokens"], {"model.embed_tokens", "lm_head"}),
        ("gpt2", ["wte"], {"transformer.wte", "lm_head"}),
        ("gpt2", ["wpe", "ln_f"], {"transformer.wpe", "transformer.ln_f"}),
        ("gpt2-untied", ["lm_head"], {"lm_head"}),
        # transformers has another name for the head than the file.
        ("gpt_neox", ["embed_in", "embed_out"], {"gpt_neox.embed_in", "embed_out", "lm_head"}),
        ("gpt_neox", ["lm_head"], {"embed_out", "lm_head"}),
        ("gpt_neox-serial", ["lm_head"], {"gpt_neox.embed_in", "embed_out", "lm_head"}),
    ],
)
def test_what_trains_whole_is_the_same_in_peft(
    name: str, whole: Sequence[str], saved: set[str], tmp_path: Path
) -> None:
    model = load(name)
    adapter = fresh(model, [next(iter(linears(model))).rpartition(".")[2]], whole)
    ours = logits(move(model))
    assert set(adapter.config.modules_to_save) == saved
    save_adapter(model, None, tmp_path / "ours")
    agree(ours, logits(in_peft(name, tmp_path / "ours")))
    other = load(name)
    set_adapter(other, load_adapter(other, tmp_path / "ours"))
    assert torch.equal(logits(other), ours)
    save_adapter(other, None, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "ours")


def test_a_matrix_that_peft_trained_in_one_of_its_two_uses_is_refused(tmp_path: Path) -> None:
    of_peft("qwen2-yarn", target_modules=["v_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    wrong(WeightsError, r"model\.embed_tokens\.weight and lm_head\.weight apart, but they are one matrix in the base",
          lambda: load_adapter(load("qwen2-yarn"), tmp_path))  # fmt: skip


def five_steps(model: Any, loss: Callable[[Tensor], Tensor], optimizer: Any, step: Callable[[], None]) -> list[float]:
    losses = []
    model.train()
    for i in range(5):
        value = loss(tokens(4, 12, seed=i))
        value.backward()
        step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_five_steps_are_those_of_peft(name: str, dora: bool, checkpointing: bool, tmp_path: Path) -> None:
    whole = ["lm_head"] if name == "llama" else []
    model = load(name)
    fresh(model, whole=whole, dora=dora)
    save_adapter(model, None, tmp_path / "start")
    base = logits(model)

    theirs = in_peft(name, tmp_path / "start")
    for key, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in key or "modules_to_save" in key)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2's own
    decayed = [p for p in theirs.parameters() if p.requires_grad and p.dim() == 2]
    rest = [p for p in theirs.parameters() if p.requires_grad and p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=1e-2)
    expected = five_steps(theirs, lambda ids: theirs(ids, labels=ids).loss, peer, peer.step)

    model.gradient_checkpointing = checkpointing
    optimizer = AdamW(model, decay=model.decay_parameters(), weight_decay=0.1)
    found = five_steps(model, lambda ids: model.loss(ids, ids), optimizer, lambda: optimizer.step(1e-2))
    assert found == pytest.approx(expected, rel=1e-5)
    after = logits(model.eval())
    assert (after - base).abs().max() > 0.01 * base.abs().max()
    # And what PEFT trained is an adapter that we read.
    theirs.eval().save_pretrained(tmp_path / "theirs")
    other = load(name)
    set_adapter(other, load_adapter(other, tmp_path / "theirs"))
    agree(logits(other), logits(theirs.double()))


# What trains


@parametrize()
def test_a_step_moves_the_adapters_and_nothing_else(name: str) -> None:
    model = load(name)
    fresh(model, dora=True)
    move(model)
    loras = {n for n, _ in model.named_parameters() if ".lora." in n}
    # For each matrix A, B and magnitude.
    assert len(loras) == 3 * len({t.ours for t in linears(model).values()})
    assert changed_by_a_step(model, tokens()) == loras


def test_a_step_moves_what_is_listed_whole_too() -> None:
    model = load("llama")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = fresh(model, ["q_proj", "v_proj"], ["embed_tokens", "lm_head", "norm"])
    move(model)
    expected = {f"layers.{i}.attn.qkv.lora.{m}" for i in range(3) for m in "AB"}
    assert changed_by_a_step(model, tokens()) == expected | {"embed.weight", "head.weight", "norm.weight"}
    # The base is what it was, and so comes back.
    set_adapter(model, None)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, base[name])} == set()
    assert model.adapter is None
    assert set(adapter.inactive) == {"embed.weight", "head.weight", "norm.weight"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_nothing_below_the_lowest_adapter_has_a_backward_pass(checkpointing: bool) -> None:
    model = load("llama")
    fresh(model, ["layers.2.mlp.up_proj"])
    move(model).train()
    model.gradient_checkpointing = checkpointing
    entered: list[bool] = []
    model.layers[2].register_forward_pre_hook(
        lambda _, args: entered.extend(x is not None and x.requires_grad for x in args[:2])
    )
    attended: list[bool] = []
    model.layers[2].attn.register_forward_hook(lambda *args: attended.append(args[2].requires_grad))
    model.loss(tokens(), tokens()).backward()
    assert entered[:2] == [False, False]
    assert attended[:1] == [False]
    lora = model.get_submodule("layers.2.mlp.gate_up.lora")
    assert all(p.grad is not None and p.grad.any() for p in lora.parameters())


@pytest.mark.parametrize("trains", [False, True])
def test_the_gradient_of_a_frozen_head_is_never_computed(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, ...]] = []
    head_loss = cross_entropy.head_loss

    def spy(hidden: Any, weight: Any, bias: Any, targets: Any, options: Any, wanted: Any, *rest: Any) -> Any:
        seen.append(tuple(wanted))
        return head_loss(hidden, weight, bias, targets, options, wanted, *rest)

    monkeypatch.setattr(cross_entropy, "head_loss", spy)
    model = load("llama")
    fresh(model, whole=["lm_head"] if trains else [])
    model.train().loss(tokens(), tokens()).backward()
    assert seen == [(True, trains, False)]


def test_part_of_a_fused_matrix_cannot_train_whole() -> None:
    model = load("llama")
    wrong(ConfigError, r"modules_to_save: \S*up_proj.weight is one matrix with \S*gate_proj.weight",
          lambda: choose_whole(model, ["up_proj"]))  # fmt: skip
    assert choose_whole(model, ["layers.0.mlp.up_proj", "layers.0.mlp.gate_proj"]) == ("layers.0.mlp.gate_up.weight",)


def test_loraplus_moves_b_so_much_faster() -> None:
    model = load("llama")
    fresh(model)
    move(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora." in n}
    lr_scales = {n: 16.0 for n in before if n.endswith(".lora.B")}
    optimizer = AdamW(model, decay=set(), lr_scales=lr_scales)
    model.train().loss(tokens(), tokens()).backward()
    optimizer.step(1e-5)
    # The first update of Adam is the learning rate itself, with the gradient's sign.
    for name, parameter in optimizer.params.items():
        moved = (parameter - before[name]).abs().max().item()
        assert moved == pytest.approx(16e-5 if name.endswith("B") else 1e-5, rel=0.02), name


def test_a_run_trains_what_its_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "{i} one", "completion": " two {i}"}}\n' for i in range(8))
    )
    made: list[AdamW] = []
    monkeypatch.setattr(train, "AdamW", lambda *args, **options: made.append(AdamW(*args, **options)) or made[-1])
    source = tiny_model.saved(tmp_path / "model")
    result = train.finetune(
        quiet=True, model=str(source), data=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run"), max_steps=1,
        max_length=64, threads=1, method="lora", lora_r=3, lora_alpha=5, lora_target_modules="q_proj,v_proj",
        use_rslora=True, loraplus_lr_ratio=16.0, modules_to_save="norm",
    )  # fmt: skip
    lr_scales = {name: lr_scale for names, _, lr_scale in made[0].groups for name in names}
    adapted = {f"layers.{i}.attn.qkv.lora.{m}": 16.0 if m == "B" else 1.0 for i in range(2) for m in "AB"}
    assert lr_scales == adapted | {"norm.weight": 1.0}
    config = json.loads((result.best / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (3, 5, True, False)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["modules_to_save"] == ["model.norm"]
    assert config["base_model_name_or_path"] == str(source.resolve())
    model = load_model(source)
    set_adapter(model, load_adapter(model, result.best))


# Dropout


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_gives_the_same_gradients_with_and_without_checkpointing(name: str, dora: bool) -> None:
    model = load(name)
    fresh(model, dropout=0.4, dora=dora)
    move(model).train()
    found: list[dict[str, Tensor]] = []
    for checkpointing, seed in (False, 5), (True, 5), (False, 6):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(seed)
        model.loss(tokens(), tokens()).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed, other = found
    assert plain.keys() == recomputed.keys()
    for key, grad in plain.items():
        assert torch.equal(grad, recomputed[key]), key
        assert not torch.equal(grad, other[key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_keeps_no_activation_of_a_layer(name: str) -> None:
    model = load(name)
    fresh(model, dora=True)
    move(model).train()
    model.gradient_checkpointing = True
    inside: list[weakref.ref[Tensor]] = []
    for module_name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda _, args, out: inside.append(weakref.ref(args[0])))
            if not module_name.endswith("down"):  # what it gives is the next layer's input, which is kept
                module.register_forward_hook(lambda _, args, out: inside.append(weakref.ref(out)))
    loss = model.loss(tokens(), tokens())
    gc.collect()
    assert len(inside) == 7 * model.config.num_layers
    assert not any(ref() is not None for ref in inside)
    loss.backward()


def test_evaluation_has_no_dropout() -> None:
    model = load("llama")
    fresh(model, dropout=0.4)
    move(model).eval()
    assert torch.equal(logits(model), logits(model))
    state = torch.get_rng_state()
    evaluated = logits(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(logits(model.train()), evaluated)


# Several adapters


def test_adapters_change_places_with_the_same_bits_each_time(tmp_path: Path) -> None:
    model = load("llama")
    base = logits(model)
    made: dict[str, Tensor] = {}
    for i, (name, options) in enumerate(
        {
            "lora": {},
            "dora": {"dora": True, "targets": ["q_proj", "down_proj"]},
            "whole": {"whole": ["embed_tokens", "norm"], "targets": ["v_proj"]},
            "head": {"whole": ["lm_head", "embed_tokens"], "targets": ["v_proj"]},
        }.items()
    ):
        fresh(model, **{"targets": ["all-linear"]} | options)
        made[name] = logits(move(model, seed=i).eval())
        save_adapter(model, None, tmp_path / name)
    set_adapter(model, None)
    assert torch.equal(logits(model), base)
    adapters: dict[str, Adapter | None] = {name: load_adapter(model, tmp_path / name) for name in made}
    adapters["none"], made["none"] = None, base
    names = list(adapters)
    for name in [*names, *reversed(names), "whole", "whole", "head", "dora", "none", "none", "lora", "none"]:
        set_adapter(model, adapters[name])
        assert torch.equal(logits(model), made[name]), name
    assert len({tuple(out.flatten()[:5].tolist()) for out in made.values()}) == len(made)


def test_an_adapter_begun_on_another_starts_from_the_base() -> None:
    model = load("llama")
    base = logits(model)
    first = fresh(model, ["v_proj"], ["embed_tokens"])
    trained = logits(move(model))
    fresh(model, ["v_proj"], ["embed_tokens"])
    assert torch.equal(logits(model), base)
    set_adapter(model, first)
    assert torch.equal(logits(model), trained)


def test_doras_norms_follow_its_weights() -> None:
    model = load("llama")
    fresh(model, dora=True)
    move(model).eval()
    before = logits(model)
    optimizer = AdamW(model, decay=set())
    model.train().loss(tokens(), tokens()).backward()
    optimizer.step(1e-2)
    after = logits(model.eval())
    assert not torch.equal(after, before)
    # The same weights on a model that has no past.
    assert model.adapter is not None
    state = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora." in name}
    other = load("llama")
    fresh(other, dora=True)
    with torch.no_grad():
        for name, value in state.items():
            other.get_parameter(name).copy_(value)
    assert torch.equal(logits(other.train().eval()), after)


@parametrize("llama", "gpt2", "gpt_neox", "phi3")
@pytest.mark.parametrize("method", METHODS)
def test_merged_matrices_do_what_the_adapter_does(name: str, method: str) -> None:
    model = load(name)
    fresh(model, **METHODS[method])
    ours = logits(move(model).eval())
    assert model.adapter is not None
    loras = model.adapter.loras
    set_adapter(model, None)
    for module, lora in loras.items():
        layer = model.get_submodule(module)
        assert isinstance(layer, Linear)
        assert layer.weight is not None
        layer.weight.data = lora.merge(layer.weight.detach())
    agree(logits(model), ours)


def test_an_adapter_works_in_the_dtype_of_its_model(tmp_path: Path) -> None:
    model = load("llama")
    fresh(model, ["q_proj"], ["lm_head"], dora=True)
    exact = logits(move(model))
    save_adapter(model, None, tmp_path / "fp32")
    rounded = load("llama", "bfloat16")
    adapter = load_adapter(rounded, tmp_path / "fp32")
    set_adapter(rounded, adapter)
    lora = adapter.loras["layers.0.attn.qkv"]
    assert lora.A.dtype == lora.B.dtype == rounded.head.weight.dtype == torch.bfloat16
    assert lora.magnitude is not None
    assert lora.magnitude.dtype == torch.float32
    assert (logits(rounded).float() - exact).abs().max() < 0.1 * exact.abs().max()
    save_adapter(rounded, None, tmp_path / "bf16")
    again = load("llama", "bfloat16")
    set_adapter(again, load_adapter(again, tmp_path / "bf16"))
    assert torch.equal(logits(again), logits(rounded))


# Wrong input


def wrong(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_names_that_stand_for_nothing_are_answered_with_the_nearest() -> None:
    model = load("llama")
    wrong(ConfigError, r"'q_prj' is no linear layer .*did you mean 'q_proj'.*it has q_proj.*all-linear$",
          lambda: choose_targets(model, ["v_proj", "q_prj"]))  # fmt: skip
    for name in "embed_tokens", "lm_head":
        wrong(ConfigError, "embeddings and head go into modules_to_save", lambda n=name: choose_targets(model, [n]))
    wrong(ConfigError, "'c_attn' is no linear layer", lambda: choose_targets(model, ["c_attn"]))
    wrong(ConfigError, "'all-linear' is no linear layer", lambda: choose_targets(model, ["all-linear", "q_proj"]))
    wrong(ConfigError, "'' is no linear layer", lambda: choose_targets(model, [""]))
    wrong(ConfigError, "'proj' is no linear layer", lambda: choose_targets(model, ["proj"]))
    wrong(ConfigError, r"modules_to_save: 'embed_token' is no module .*did you mean 'embed_tokens'",
          lambda: choose_whole(model, ["embed_token"]))  # fmt: skip


def test_a_rank_above_the_matrix_is_refused() -> None:
    model = load("llama")
    fresh(model, ["k_proj"], r=16)
    wrong(ConfigError, r"lora_r is 17, but .*k_proj is a matrix of 16 x 32: expected at most 16",
          lambda: fresh(model, ["k_proj"], r=17))  # fmt: skip
    wrong(ConfigError, "lora_r is 20", lambda: fresh(model, ["q_proj", "k_proj"], rank_pattern={"k_proj": 20}))


def test_what_has_an_adapter_cannot_train_whole_too(tmp_path: Path) -> None:
    model = load("llama")
    message = r"modules_to_save: model\.layers\.0\.mlp\.down_proj has an adapter too"
    wrong(ConfigError, message, lambda: fresh(model, ["down_proj"], ["down_proj"]))
    assert model.adapter is None
    fresh(model, ["down_proj"])
    save_adapter(model, None, tmp_path)
    content = load_file(tmp_path / WEIGHTS)
    for i in range(3):
        content[f"base_model.model.model.layers.{i}.mlp.down_proj.weight"] = torch.zeros(32, 40)
    save_file(content, tmp_path / WEIGHTS)
    wrong(ConfigError, message, lambda: load_adapter(load("llama"), tmp_path))


def test_what_is_held_in_4_bits_cannot_train_whole() -> None:
    model = load_model(hf_models.saved("gpt_neox").folder, quantize="nf4")
    wrong(ConfigError, "modules_to_save: .*dense_4h_to_h.weight is held in 4 bits",
          lambda: fresh(model, ["query_key_value"], ["dense_4h_to_h"]))  # fmt: skip
    fresh(model, ["query_key_value"], ["embed_in", "embed_out"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = load("llama")
    fresh(model, ["q_proj", "down_proj"], ["lm_head"])
    save_adapter(move(model), None, folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


Q = "base_model.model.model.layers.1.self_attn.q_proj"
HEAD = "base_model.model.lm_head.weight"


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, {BASE_SAMPLE: "base"})

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(content))

    return damage


def put(name: str, value: Tensor) -> Callable[[Path], None]:
    return tensors(lambda content: content.update({name: value}))


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Another name, or a part of it, for whatever has it."""
    return tensors(lambda content: [content.update({k.replace(old, new): content.pop(k)}) for k in list(content)])


NAN, INF = float("nan"), float("inf")
MISFITS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "A": (put(f"{Q}.lora_A.weight", torch.zeros(4, 31)), WeightsError, r"has shape \(4, 31\), expected \(4, 32\)"),
    "B": (put(f"{Q}.lora_B.weight", torch.zeros(16, 4)), WeightsError, r"has shape \(16, 4\), expected \(32, 4\)"),
    "rank": (config(r=5), WeightsError, r"has shape \(4, 32\), expected \(5, 32\).*another rank"),
    "pattern": (config(rank_pattern={"q_proj": 3}), WeightsError, r"has shape \(4, 32\), expected \(3, 32\)"),
    "nan": (put(f"{Q}.lora_B.weight", torch.full((32, 4), NAN)), WeightsError, r"lora_B.weight' holds NaN"),
    "inf": (put(HEAD, torch.full((61, 32), INF)), WeightsError, "lm_head.weight' holds NaN or Inf"),
    "head": (put(HEAD, torch.zeros(61, 31)), WeightsError, r"weight has shape \(61, 31\), expected \(61, 32\)"),
    "no head": (tensors(lambda t: t.pop(HEAD)), WeightsError, "names 'lm_head', but lm_head.weight is not in the file"),
    "more": (put("base_model.model.x.weight", torch.zeros(1)), WeightsError, "holds 'x.weight', which this model does"),
    "layer": (rename("layers.1", "layers.9"), WeightsError, r"adapts 'model.layers.9.\S+', .* \(did you mean 'model"),
    "lines": (rename("q_proj", "k\n" * 999), WeightsError, r"adapts 'model.layers.0.self_attn.k\\nk\\n.*, which this"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "match"), MISFITS.values(), ids=MISFITS)
def test_an_adapter_that_does_not_fit_is_refused(
    folder: Path, damage: Callable[[Path], None], error: type[Exception], match: str
) -> None:
    model = load("llama")
    base = logits(model)
    load_adapter(model, folder)
    damage(folder)
    wrong(error, match, lambda: load_adapter(model, folder))
    assert model.adapter is None
    assert torch.equal(logits(model), base)


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    model = load("llama")
    model.sample = "another"
    config(base_model_name_or_path="the\nbase")(folder)
    wrong(WeightsError, r"trained on another base \('the\\nbase'\)", lambda: load_adapter(model, folder))
    # PEFT does not say which base it was.
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    load_adapter(model, folder)
    wrong(WeightsError, "does not have|expected", lambda: load_adapter(load("gpt2"), folder))
    wrong(WeightsError, "has shape", lambda: load_adapter(load("qwen3"), folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_written_of_an_adapter_that_holds_nan(bad: float, tmp_path: Path) -> None:
    model = load("llama")
    adapter = fresh(model, ["q_proj"], ["lm_head"])
    adapter.loras["layers.1.attn.qkv"].B.data[5, 2] = bad
    wrong(WeightsError, "layers.1.self_attn.q_proj.lora_B.weight' holds NaN or infinity: nothing is written",
          lambda: save_adapter(model, None, tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()
    adapter.loras["layers.1.attn.qkv"].B.data[5, 2] = 0
    model.head.weight.data[0, 0] = bad
    wrong(WeightsError, "lm_head.weight' holds NaN", lambda: save_adapter(model, None, tmp_path / "out"))
