"""The memory table: what it predicts against what torch holds."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afina.engine import optim_offload
from afina.engine.linear import Linear
from afina.engine.lora import choose_targets, new_adapter
from afina.engine.memory import LEAN_BYTES, MemoryPlan, kept, plan
from afina.engine.model import GPT, IGNORE
from afina.engine.model_config import ModelConfig
from afina.engine.optim import AdamW, bytes_held
from afina.engine.optim_in_backward import UpdatesInBackward
from afina.engine.optim_offload import offloaded
from afina.engine.training_step import accumulate
from afina.engine.weight_offload import HostWeights
from afina.engine.weights import load_model
from afina.errors import ConfigError
from afina.loaders.data.batches import MicroBatch
from afina.loaders.weights.peft import AdapterConfig

LENGTHS = (96, 60, 128, 100, 128)  # of a micro-batch's rows
TOKENS = sum(LENGTHS)
LORA = ["lora", "attention", "down", "dropout", "dora"]
METHODS = ["full", "freeze", "embedding", *LORA]
PARTS = {
    "attention": ("q_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value"),
    "down": ("down_proj", "mlp.c_proj", "dense_4h_to_h"),
}


class Storages(TorchDispatchMode):
    """Notes all memory that operations make, by autograd, closures or caches kept alive or not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        gc.freeze()  # what is there already need not be looked through: a third of a second each time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.set_:
            return out  # Triton's interpreter has tensors of its own on memory that was there before.
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if storage._cdata not in given:
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes of what still exists."""
        gc.collect()  # Triton's interpreter leaves cycles behind.
        gc.unfreeze()
        return sum(size for ref, size in self.seen.values() if not ref.expired())


def prepared(name: str, method: str, dtype: str = "float32") -> GPT:
    model = load_model(str(hf_models.saved(name).folder), device="cpu", dtype=dtype).train()
    if method == "freeze":
        top = (f"layers.{len(model.layers) - 1}.", "norm.")
        model.train_only([n for n, _ in model.named_parameters() if n.startswith(top)])
    elif method == "embedding":
        model.train_only(["embed.weight"])
    elif method in LORA:
        config = AdapterConfig(
            base=None, r=4, alpha=8, dropout=0.1 if method == "dropout" else 0.0, dora=method == "dora"
        )
        new_adapter(model, config, targets=chosen(model, method), seed=0)
    return model


def chosen(model: GPT, method: str) -> tuple[str, ...]:
    found = []
    for name in PARTS.get(method, ()):
        try:
            choose_targets(model, [name])
        except ConfigError:
            continue  # another family's name for it
        found.append(name)
    return tuple(found) or ("all-linear",)


def batch(share: float, packed: bool = True, lengths: Sequence[int] = LENGTHS) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids, labels and cu_seqlens; the last ``share`` of each row's tokens train."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(61, (length,), generator=generator) for length in lengths]
    labels = [row.clone() for row in rows]
    for row in labels:
        row[: max(1, round(len(row) * (1 - share)))] = IGNORE
    if packed:
        return torch.cat(rows)[None], torch.cat(labels)[None], torch.tensor([0, *lengths]).cumsum(0).int()
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE), None


def error(model: GPT, ids: Tensor, labels: Tensor, cu: Tensor | None) -> float:
    """By what share of what is kept for the backward pass the prediction is too high."""
    model.loss(ids, labels, cu_seqlens=cu)  # makes what is made once and kept: masks, documents
    with Storages() as storages:
        loss = model.loss(ids, labels, cu_seqlens=cu)
    found = storages.alive() - loss.nbytes
    if model.head_weight.requires_grad:
        found -= model.head_weight.nbytes  # its gradient
    tokens, loss_tokens = ids.numel(), int((labels != IGNORE).sum())
    longest = ids.shape[1] if cu is None else int(cu.diff().max())
    host = plan(model, AdamW(model, decay=set()), tokens=tokens, loss_tokens=loss_tokens).host  # the same memory here
    return (kept(model, tokens=tokens, loss_tokens=loss_tokens, longest=longest) + host) / found - 1


# Every family trained whole and with adapters; the other methods on one of each kind of norm, position and residual.
TRAINED = [(name, method) for name in hf_models.BY_NAME for method in ("full", "lora")]
TRAINED += [
    (name, method)
    for name in ("gpt2", "llama", "gemma2", "gpt_neox")
    for method in METHODS
    if method not in ("full", "lora")
]


@pytest.mark.parametrize(("name", "method"), TRAINED)
def test_activations_are_predicted_to_the_byte(name: str, method: str) -> None:
    model = prepared(name, method)
    assert error(model, *batch(1.0)) == 0  # all tokens but each row's first
    assert error(model, *batch(0.4)) == 0
    # RoPE's tables are counted for every token, and the rows of a padded batch share them: nothing beside real widths.
    assert 0 <= error(model, *batch(1.0, packed=False)) < 0.05


def test_a_window_that_hides_nothing_is_none() -> None:
    """Longer than every row, and shorter than all of them together."""
    model = prepared("llama", "full")
    for layer in model.layers:
        layer.attn.options["window"] = max(LENGTHS) + 1
    assert error(model, *batch(0.4)) == 0


@pytest.mark.parametrize("method", ["full", "freeze", "embedding"])
@hf_models.parametrize("gpt2", "llama", "gemma2", "gpt_neox", "olmo2")
def test_activations_under_each_policy(name: str, method: str) -> None:
    model = prepared(name, method)
    for policy in {"full": ("selective", "full", "offload"), "freeze": ("full", "offload")}.get(method, ("full",)):
        model.set_activation_policy(policy)
        assert error(model, *batch(0.4)) == 0


@pytest.mark.parametrize("method", LORA)
def test_activations_of_adapters_under_each_policy(method: str) -> None:
    model = prepared("llama", method)
    for policy in ("keep", "offload"):
        model.set_activation_policy(policy)
        assert error(model, *batch(0.4)) == 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_policy_holds_less_than_the_one_before(method: str) -> None:
    model = prepared("llama", method)
    optimizer, found = AdamW(model, decay=set()), {}
    for policy in ("keep", "selective", "full", "offload"):
        model.set_activation_policy(policy)
        found[policy] = plan(model, optimizer, tokens=TOKENS, loss_tokens=TOKENS // 4)
    keep, selective, full, offload = (plan.activations for plan in found.values())
    assert keep > selective > full >= offload
    # Three layers: the inputs of the first two wait on the host.
    hosts = [plan.host for plan in found.values()]
    assert hosts == [0, 0, 0, 2 * TOKENS * model.config.hidden_size * 4]
    assert f"and {hosts[3] / 1e9:.3f} GB of the host's" in found["offload"].line()


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # of each norm one
def test_activations_in_bf16(name: str, method: str) -> None:
    assert error(prepared(name, method, "bfloat16"), *batch(0.4)) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activations_with_torchs_own_attention(name: str) -> None:
    """With heads that share keys and values, and without; nearly, since what torch keeps depends on its kernel."""
    model = prepared(name, "full")
    model.set_attention_backend("sdpa", longest=max(LENGTHS), device=torch.device("cpu"))
    assert abs(error(model, *batch(1.0, packed=False))) < 0.05


def test_a_lean_loss_takes_little_room_for_the_head() -> None:
    """In a model with a large vocabulary; in a small one no more than the chunk of logits that it does without."""
    model = prepared("llama", "full")
    optimizer = AdamW(model, decay=set())
    large = GPT(dataclasses.replace(model.config, vocab_size=200_000), device="meta").train()
    read = 4096 * model.config.hidden_size * 4
    for tested, most in ((large, LEAN_BYTES + read), (model, 4_000_000)):
        chunks, lean = (
            plan(tested, optimizer, tokens=4096, loss_tokens=4096, lean_loss=flag).activations for flag in (False, True)
        )
        held = kept(tested, tokens=4096, loss_tokens=4096)
        assert lean - held <= most
        assert lean < chunks if tested is large else lean == chunks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [("gpt2", "full"), ("llama", "full"), ("qwen3", "full"), ("gemma3_text", "lora")]
)
def test_activations_of_the_triton_kernels(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, which makes the same tensors as a GPU does."""
    monkeypatch.setenv("AFINA_BACKEND", "triton")
    assert error(prepared(name, method), *batch(0.4, lengths=(7, 12, 5))) == 0


def planned(model: GPT, optimizer: AdamW) -> MemoryPlan:
    return plan(model, optimizer, tokens=TOKENS, loss_tokens=TOKENS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "freeze", "lora", "dora"])
def test_the_rest_is_what_is_there_after_a_step(method: str, dtype: str) -> None:
    model = prepared("llama-llama3", method, dtype)
    with Storages() as storages:
        optimizer = AdamW(model, decay=model.decay_parameters())
    found = planned(model, optimizer)
    ids, labels, cu = batch(1.0)
    model.loss(ids, labels, cu_seqlens=cu).backward()
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step(1e-3)
    assert found.optimizer == storages.alive()
    assert found == planned(model, optimizer)
    adapted = {"full": 0, "freeze": 0}.get(method, found.gradients)
    assert found.adapters == adapted
    assert found.weights + found.adapters == sum(p.nbytes for p in model.parameters())


def test_what_an_adapter_trains_whole_is_held_twice() -> None:
    model = load_model(str(hf_models.saved("llama").folder), device="cpu", dtype="float32").train()
    config = AdapterConfig(base=None, r=4, alpha=8)
    alone = sum(p.nbytes for p in model.parameters())
    new_adapter(model, config, targets=["q_proj"], modules_to_save=["embed_tokens"], seed=0)
    found = planned(model, AdamW(model, decay=set()))
    assert model.adapter is not None
    inactive = sum(tensor.nbytes for tensor in model.adapter.inactive.values())
    assert found.weights == alone + inactive
    assert found.gradients == found.adapters + model.embed.weight.nbytes


def test_the_base_in_nf4() -> None:
    folder = str(hf_models.saved("llama").folder)
    model = load_model(folder, device="cpu", dtype="float32", quantize="nf4").train()
    new_adapter(model, AdapterConfig(base=None, r=4, alpha=8), targets=["q_proj"], seed=0)
    found = planned(model, AdamW(model, decay=set()))
    dense = sum(p.nbytes for n, p in model.named_parameters() if ".lora." not in n)
    assert found.weights == dense + sum(m.nbytes for m in model.modules() if type(m).__name__ == "NF4Weight")
    assert error(model, *batch(0.4)) == 0


class Peak(Storages):
    """Notes the most that was alive at any time, too."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.seen = {key: found for key, found in self.seen.items() if not found[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.seen.values()))
        return out


WIDE_MLP = {"intermediate_size": 1024, "vocab_size": 300, "tie_word_embeddings": True}
WIDE_HEAD = {"intermediate_size": 64, "vocab_size": 4000, "tie_word_embeddings": False}


@pytest.mark.parametrize("gradients", ["add up", "once", "in backward", "offloaded", "leave"])
@pytest.mark.parametrize("policy", ["keep", "selective", "full", "offload"])
@pytest.mark.parametrize(("sizes", "method"), [(WIDE_MLP, "full"), (WIDE_MLP, "lora"), (WIDE_HEAD, "full")])
def test_the_peak_of_a_step(sizes: dict[str, Any], method: str, policy: str, gradients: str) -> None:
    """Activations and gradients together, where the MLP or the head is widest, to a hundredth."""
    hf = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 256, **sizes,
    }  # fmt: skip
    model = GPT(ModelConfig.from_hf(hf)).train()
    model.hf_config = hf
    model.set_activation_policy(policy)
    if method == "lora":
        new_adapter(model, AdapterConfig(base=None, r=4, alpha=8), targets=["all-linear"], seed=0)
    away = gradients in ("offloaded", "leave")
    if away and policy in ("full", "offload"):
        model.host_weights = HostWeights(model.layers, torch.device("cpu"))
    inside, several = gradients in ("in backward", "offloaded"), gradients in ("add up", "leave")
    optimizer = AdamW(
        model, decay=set(), offload=offloaded(model) if away else (), gradients=not inside,
        host_weights=model.host_weights,
    )  # fmt: skip
    ids = torch.randint(hf["vocab_size"], (1, 96), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids, ids, torch.tensor([0, 50, 96], dtype=torch.int32), [0, 1], 94, 96)

    def step() -> None:
        updates, leave = UpdatesInBackward(optimizer, 1e-3), optimizer.host_gradients
        if not inside:
            with nullcontext() if leave is None else leave.leaving():
                accumulate(model, [batch] * (2 if several else 1), poll=leave and leave.land)
        else:
            with updates.attached():
                accumulate(model, [batch], before_backward=updates.begin)
        optimizer.zero_grad()

    step()  # makes what is made once
    with Peak() as measured:
        step()
    found = plan(
        model, optimizer, tokens=96, loss_tokens=94, in_backward=inside, accumulates=several,
    )  # fmt: skip
    most = found.activations + found.gradients
    # What waits on the host is in the same memory here; some of it may have come back.
    waits = found.host - optimizer.host_nbytes
    assert 0.99 * most <= measured.most <= 1.01 * (most + waits)
    if sizes is WIDE_HEAD:
        assert measured.most == pytest.approx(most + waits, rel=0.01)


@pytest.mark.parametrize("variant", ["adamw", "adamw_8bit", "adamw_bf16"])
def test_what_lies_on_the_host(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and state are counted where they are: what is made for the run, less what is made for its host."""
    monkeypatch.setattr(optim_offload, "CHUNK", 1024)
    model = prepared("llama", "full", "bfloat16")
    model.set_activation_policy("full")
    before = plan(model, AdamW(model, decay=set(), variant=variant), tokens=64, loss_tokens=64, in_backward=True)
    with Storages() as storages:
        model.host_weights = HostWeights(model.layers, torch.device("cpu"))
        optimizer = AdamW(model, decay=set(), variant=variant, offload=offloaded(model), gradients=True)
    found = plan(model, optimizer, tokens=64, loss_tokens=64, in_backward=True, offload_params=True)
    matrices = sum(m.nbytes for layer in model.layers for m in layer.modules() if isinstance(m, Linear))
    places = found.weights - (before.weights - matrices)
    trained = sum(p.nbytes for p in optimizer.params.values() if p.dim() == 2)
    assert found.host == before.host + matrices + optimizer.host_nbytes
    assert optimizer.host_nbytes == trained + sum(
        bytes_held(variant, p.dtype, p.numel()) for p in optimizer.params.values() if p.dim() == 2
    )
    assert storages.alive() == found.host + found.optimizer + places
    assert (found.activations, found.gradients) == (before.activations, before.gradients)
    assert places == 2 * matrices // len(model.layers)


def test_the_line_for_people() -> None:
    found = MemoryPlan(
        weights=2_470_000_000, adapters=22_600_000, gradients=22_600_000, optimizer=135_000_000, activations=0
    )
    assert found.line() == (
        "memory: weights 2.47, adapters 0.023, gradients 0.023, optimizer 0.135 = 2.65 GB predicted"
    )
    assert found.to_dict()["total"] == found.total == 2_650_200_000


PEAK = """
import sys
import torch
from afina.engine.lora import new_adapter
from afina.engine.model_config import ModelConfig
from afina.engine.memory import plan
from afina.engine.model import GPT
from afina.engine.optim import AdamW, bytes_held
from afina.engine.training_step import accumulate
from afina.loaders.weights.peft import AdapterConfig
from afina.loaders.data.batches import MicroBatch

torch.set_num_threads(1)
SIZES = {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048, "vocab_size": 16000,
         "tie_word_embeddings": True}

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(hf, tokens):
    model = GPT(ModelConfig.from_hf(hf)).train()
    model.hf_config = hf
    if sys.argv[1] == "lora":
        new_adapter(model, AdapterConfig(base=None, r=16, alpha=32), targets=("all-linear",), seed=0)
    optimizer = AdamW(model, decay=set())
    ids = torch.randint(hf["vocab_size"], (1, tokens))
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    cu_seqlens = torch.arange(0, tokens + 1, tokens // 8, dtype=torch.int32)
    batch = MicroBatch(ids, labels, cu_seqlens, list(range(8)), tokens // 2, tokens)
    found = plan(model, optimizer, tokens=tokens, loss_tokens=tokens // 2).total
    accumulate(model, [batch, batch])
    optimizer.clip_(1.0)
    optimizer.step(1e-4)
    return found

step(SIZES | {"hidden_size": 48, "vocab_size": 100, "num_hidden_layers": 1}, 64)  # loads what torch loads late
before = peak()
found = step(SIZES, 2048)
print(found / (peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_process_takes_what_was_predicted(method: str) -> None:
    # Freed memory goes back at once, so that the process holds what torch holds.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, method], env=environment, capture_output=True, text=True, check=True, timeout=250
    )
    assert 0.8 < float(run.stdout) < 1.1  # measured 0.94 and 0.97: what operations hold while they run is not counted
