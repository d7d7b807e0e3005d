"""Adapters on a model: which matrices have one, from and to disk, one or several on the same base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afina.engine.linear import Linear, Lora, Part, frozen_format
from afina.errors import ConfigError, WeightsError, nearest
from afina.loaders.families.common import HFTensor
from afina.loaders.families.registry import load_family
from afina.loaders.jsonfile import show
from afina.loaders.weights.peft import BASE_FORMAT, BASE_HASH, BASE_SAMPLE, AdapterConfig, AdapterFile, write_adapter
from afina.manifest import check_manifest

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

ALL_LINEAR = "all-linear"
HEAD = "lm_head.weight"
LISTED = 5  # names in one message


@dataclass
class Adapter:
    """A trained or trainable adapter of one model.

    ``loras``: our module -> its LoRA. ``saved``: our parameters that train whole. ``inactive``: the values of these
    parameters that the model does not use now: the base's while the adapter is active, the adapter's otherwise.
    """

    config: AdapterConfig
    targets: list[HFTensor]
    loras: dict[str, Lora]
    saved: tuple[str, ...] = ()
    inactive: dict[str, Tensor] = field(default_factory=dict)


def linears(model: GPT) -> dict[str, HFTensor]:
    """Every linear layer that can have an adapter, which is all but the head, by the checkpoint's name.

    Each is the checkpoint's tensor with the names of the modules, its own and ours, and never transposed: the rows of
    an adapter's B and magnitude are the layer's outputs, however the file stores the weight.
    """
    found = {}
    for tensor in model.config.tensors(model.hf_config):
        module, _, kind = tensor.ours.rpartition(".")
        if kind == "weight" and isinstance(model.get_submodule(module), Linear):
            name = tensor.name.removesuffix(".weight")
            found[name] = tensor._replace(name=name, ours=module, transpose=False)
    return found


def choose_targets(model: GPT, names: Sequence[str]) -> list[HFTensor]:
    """The linear layers that ``names`` stand for: whole names, ends of names (``q_proj``), or ``all-linear``.

    Raises ConfigError for a name that stands for none.
    """
    known = linears(model)
    if list(names) == [ALL_LINEAR]:
        return list(known.values())
    for name in names:
        if not any(_is_end(name, module) for module in known):
            leaves = list(dict.fromkeys(module.rpartition(".")[2] for module in known))
            head, others = _head(model)
            whole = "embed" in name or any(_is_end(name, t.removesuffix(".weight")) for t in (head, *others))
            mend = "embeddings and head go into modules_to_save" if whole else ""
            raise ConfigError(
                f"lora_target_modules: {name!r} is no linear layer of this model{nearest(name, [*leaves, *known])}; "
                f"it has {', '.join(leaves)}, or {ALL_LINEAR}{'; ' * bool(mend)}{mend}"
            )
    return [target for module, target in known.items() if any(_is_end(name, module) for name in names)]


def choose_whole(model: GPT, names: Sequence[str]) -> tuple[str, ...]:
    """Our parameters that ``modules_to_save`` stands for: modules by name or end of name, such as ``embed_tokens``.

    Raises ConfigError for a name that stands for none, or for part of a matrix that we hold as one.
    """
    table = model.config.tensors(model.hf_config)
    head, others = _head(model)
    modules = {t.name.rpartition(".")[0] for t in table}
    chosen: set[str] = set()
    for name in names:
        if any(_is_end(name, other.removesuffix(".weight")) for other in others):
            chosen.add(head)
            continue
        hits = {t.name for t in table if _is_end(name, t.name.rpartition(".")[0])}
        if not hits:
            leaves = sorted({module.rpartition(".")[2] for module in modules})
            raise ConfigError(
                f"modules_to_save: {name!r} is no module of this model{nearest(name, leaves)}; it has "
                f"{', '.join(leaves)}"
            )
        chosen |= hits
    return whole_parameters(table, chosen, "modules_to_save")


def new_adapter(
    model: GPT, config: AdapterConfig, *, targets: Sequence[str], seed: int, modules_to_save: Sequence[str] = ()
) -> Adapter:
    """Put a fresh adapter, which changes nothing yet, on ``model``, and let nothing else train.

    ``targets`` and ``modules_to_save``: see ``choose_targets`` and ``choose_whole``. A is drawn on the CPU.
    Raises ConfigError, also for a rank above a matrix's smaller side.
    """
    chosen, saved = choose_targets(model, targets), choose_whole(model, modules_to_save)
    _check_whole(model, chosen, saved, "modules_to_save")
    config = _described(model, config, chosen, saved)
    loras = _loras(model, config, chosen)
    set_adapter(model, None)  # what trains whole starts from a copy of the base's weights
    inactive = {name: model.get_parameter(name).detach().clone() for name in saved}
    adapter = Adapter(config, chosen, loras, saved, inactive)
    generator = torch.Generator().manual_seed(seed)
    for module, lora in adapter.loras.items():
        lora.init(partial(_layer(model, module).dense, lora.A.dtype), generator)
    set_adapter(model, adapter)
    trained = {id(p) for lora in adapter.loras.values() for p in lora.parameters()}
    model.train_only((*saved, *(name for name, p in model.named_parameters() if id(p) in trained)))
    return adapter


def load_adapter(model: GPT, folder: str | Path) -> Adapter:
    """An adapter folder in PEFT's layout, ready for ``set_adapter``.

    Raises WeightsError where its tensors do not fit the model, hold NaN or infinity, or where it says that it was
    trained on another base; ConfigError for kinds of adapters that are not supported.
    """
    check_manifest(Path(folder))
    file = AdapterFile(Path(folder))
    base = show(file.config.base)
    recorded = file.metadata.get(BASE_SAMPLE)
    if recorded is not None and recorded != model.sample:
        raise WeightsError(f"{folder}: this adapter was trained on another base ({base}): load it on that one")
    known = linears(model)
    for module in file.lora:
        if module not in known:
            raise WeightsError(
                f"{folder}: adapts {show(module)}, which this model does not have{_nearest(module, known)}: load it on "
                f"the base it was trained on ({base})"
            )
    chosen = [target for name, target in known.items() if name in file.lora]
    for target in chosen:
        layer, rank, names = _layer(model, target.ours), file.config.rank(target.name), file.lora[target.name]
        rows = target.stop - target.start
        shapes: dict[str, tuple[int, ...]] = {"A": (rank, layer.in_features), "B": (rows, rank), "magnitude": (rows,)}
        for kind, name in names.items():
            if file.shape(name) != shapes[kind]:
                raise WeightsError(
                    f"{folder}: {name} has shape {file.shape(name)}, expected {shapes[kind]}: the adapter was trained "
                    f"on another base ({base}), or its config names another rank"
                )
    loras = _loras(model, file.config, chosen)
    for target in chosen:
        lora, names = loras[target.ours], file.lora[target.name]
        a, b = _place(lora, target)
        with torch.no_grad():
            lora.A[a].copy_(file.read(names["A"]))
            lora.B[b, : file.config.rank(target.name)].copy_(target.to_ours(file.read(names["B"])))
            if lora.magnitude is not None:
                lora.magnitude[b].copy_(target.to_ours(file.read(names["magnitude"])))
    inactive = _read_saved(model, file, chosen)
    return Adapter(_described(model, file.config, chosen, inactive), chosen, loras, tuple(inactive), inactive)


def set_adapter(model: GPT, adapter: Adapter | None) -> None:
    """Make ``adapter`` the active one; None: the base alone. The one before stays as it is, for another time."""
    for each in (model.adapter, adapter):
        if each is not None:  # the values that it trained whole change places with the base's
            for name, other in each.inactive.items():
                parameter = model.get_parameter(name)
                each.inactive[name], parameter.data = parameter.data, other
    for module in {**(model.adapter.loras if model.adapter else {}), **(adapter.loras if adapter else {})}:
        _layer(model, module).lora = None if adapter is None else adapter.loras.get(module)
    model.adapter = adapter
    model.train(model.training)


def save_adapter(model: GPT, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write the active adapter to ``folder`` as PEFT would, with the base's hash, and the tokenizer's files.

    Raises WeightsError when it cannot be written, and for NaN or infinity.
    """
    assert model.adapter is not None
    metadata = {BASE_HASH: model.fingerprint, BASE_SAMPLE: model.sample}
    if (held := frozen_format(model)) is not None:
        metadata[BASE_FORMAT] = held
    write_adapter(Path(folder), model.adapter.config, adapter_tensors(model), metadata)
    if tokenizer is not None:
        tokenizer.save(Path(folder))


def adapter_tensors(model: GPT) -> dict[str, Tensor]:
    """The active adapter's tensors by PEFT's names, without its prefix."""
    adapter = model.adapter
    assert adapter is not None
    found: dict[str, Tensor] = {}
    for target in adapter.targets:
        lora = adapter.loras[target.ours]
        a, b = _place(lora, target)
        rank = a.stop - a.start
        found[f"{target.name}.lora_A.weight"] = lora.A.detach()[a]
        found[f"{target.name}.lora_B.weight"] = target.to_file(lora.B.detach()[b, :rank])
        if lora.magnitude is not None:
            found[f"{target.name}.lora_magnitude_vector"] = target.to_file(lora.magnitude.detach()[b])
    head, others = _head(model)
    for tensor in model.config.tensors(model.hf_config):
        if tensor.ours in adapter.saved:
            rows = model.get_parameter(tensor.ours).detach()[tensor.start : tensor.stop]
            found[tensor.name] = tensor.to_file(rows)
            if tensor.name == head:
                found |= dict.fromkeys(others, rows)
    return found


def _loras(model: GPT, config: AdapterConfig, targets: Sequence[HFTensor]) -> dict[str, Lora]:
    """An empty Lora for each of our modules that has one of the targets."""
    dtype, device = model.dtype, model.device
    parts: dict[str, list[Part]] = {}
    for target in targets:
        layer, rank = _layer(model, target.ours), config.rank(target.name)
        if rank > (most := min(layer.in_features, target.stop - target.start)):
            raise ConfigError(
                f"lora_r is {rank}, but {target.name} is a matrix of {target.stop - target.start} x "
                f"{layer.in_features}: expected at most {most}"
            )
        parts.setdefault(target.ours, []).append(Part(target.start, target.stop, rank, config.scale(target.name)))
    return {
        module: Lora(
            sorted(found), _layer(model, module).in_features, dropout=config.dropout, dora=config.dora,
            device=device, dtype=dtype,
        ).train(model.training)
        for module, found in parts.items()
    }  # fmt: skip


def _layer(model: GPT, name: str) -> Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, Linear)
    return layer


def _place(lora: Lora, target: HFTensor) -> tuple[slice, slice]:
    """The target's rows of A and of B."""
    return next((a, b) for part, a, b in lora.blocks() if part.start == target.start)


def _described(model: GPT, config: AdapterConfig, targets: Sequence[HFTensor], saved: Iterable[str]) -> AdapterConfig:
    """``config`` with names that stand for exactly what has an adapter and what trains whole, in PEFT too."""
    leaves = tuple(dict.fromkeys(target.name.rpartition(".")[2] for target in targets))
    exact = len(choose_targets(model, leaves)) == len(targets)
    return replace(
        config,
        target_modules=leaves if exact else tuple(target.name for target in targets),
        modules_to_save=tuple(sorted(_module_names(model, saved))),
        fan_in_fan_out=any(tensor.transpose for tensor in model.config.tensors(model.hf_config)),
    )


def _check_whole(model: GPT, targets: Sequence[HFTensor], saved: Iterable[str], where: str) -> None:
    """Refuse to train whole what has an adapter, or is frozen in a quantised format."""
    adapted = {target.ours for target in targets}
    for name in saved:
        module = name.rpartition(".")[0]
        if module in adapted:
            theirs = next(target.name for target in targets if target.ours == module)
            raise ConfigError(f"{where}: {theirs} has an adapter too: leave it out of one of the two")
        layer = model.get_submodule(module)
        if isinstance(layer, Linear) and layer.frozen_format is not None:
            theirs = next(tensor.name for tensor in model.config.tensors(model.hf_config) if tensor.ours == name)
            raise ConfigError(
                f"{where}: {theirs} is held in 4 bits and cannot train: leave it out, or load the base unquantised"
            )


def _read_saved(model: GPT, file: AdapterFile, targets: Sequence[HFTensor]) -> dict[str, Tensor]:
    """What the adapter trained whole, by our names, on the model's device and in its dtype."""
    table = model.config.tensors(model.hf_config)
    names, base = dict(file.saved), show(file.config.base)
    head, others = _head(model)
    given = [name for name in (head, *others) if name in names]
    if given:
        first, *copies = (names.pop(name) for name in given)
        same = all(file.shape(copy) == file.shape(first) for copy in copies)
        same = same and all(torch.equal(file.read(first), file.read(copy)) for copy in copies)
        if not same or (model.config.tie_embeddings and (given[0] != head or len(given) == 1)):
            raise WeightsError(
                f"{file.folder}: it trains {head} and {others[0]} apart, but they are one matrix in the base: train "
                "both alike, or neither"
            )
        names[head] = first
    for wanted in file.config.modules_to_save:
        left = [t.name for t in table if _is_end(wanted, t.name.rpartition(".")[0]) and t.name not in names]
        if left:
            raise WeightsError(
                f"{file.folder}: modules_to_save names {show(wanted)}, but {left[0]} is not in the file: save the "
                "adapter again"
            )
    known = {t.name: t for t in table}
    for name in names:
        if name not in known:
            raise WeightsError(
                f"{file.folder}: holds {show(name)}, which this model does not have{_nearest(name, known)}: load it on "
                f"the base it was trained on ({base})"
            )
    found: dict[str, Tensor] = {}
    where = f"{file.folder}: modules_to_save"
    whole = whole_parameters(table, set(names), where)
    _check_whole(model, targets, whole, where)
    for ours in whole:
        parameter = model.get_parameter(ours)
        own = found[ours] = torch.empty_like(parameter.data)
        for tensor in (t for t in table if t.ours == ours):
            rows, value = own[tensor.start : tensor.stop], tensor.to_ours(file.read(names[tensor.name]))
            if value.shape != rows.shape:
                raise WeightsError(
                    f"{file.folder}: {tensor.name} has shape {tuple(value.shape)}, expected {tuple(rows.shape)}: load "
                    f"it on the base it was trained on ({base})"
                )
            rows.copy_(value)
    return found


def whole_parameters(table: Sequence[HFTensor], chosen: set[str], where: str) -> tuple[str, ...]:
    """Our parameters made of the chosen tensors; ConfigError where only some of a parameter's are chosen."""
    found = dict.fromkeys(t.ours for t in table if t.name in chosen)
    for ours in found:
        left = [t.name for t in table if t.ours == ours and t.name not in chosen]
        if left:
            part = next(t.name for t in table if t.ours == ours and t.name in chosen)
            raise ConfigError(
                f"{where}: {part} is one matrix with {', '.join(left[:LISTED])} here: choose all of them, or none"
            )
    return tuple(found)


def _module_names(model: GPT, saved: Iterable[str]) -> set[str]:
    """The names of modules_to_save for our parameters, so that PEFT finds these and no others."""
    wanted, table = set(saved), model.config.tensors(model.hf_config)
    names = {t.name.rpartition(".")[0] for t in table if t.ours in wanted}
    head, others = _head(model)
    if head.removesuffix(".weight") in names:
        names |= {other.removesuffix(".weight") for other in others}
    return names


def _head(model: GPT) -> tuple[str, list[str]]:
    """The checkpoint's name of the output matrix, and the others that it goes by in PEFT.

    Where it is the embedding, both of its uses have a name: PEFT trains and loads a copy of one, and would leave the
    other as it was. And transformers calls every model's head lm_head, whatever its file does.
    """
    ours = "embed.weight" if model.config.tie_embeddings else "head.weight"
    head = next(tensor.name for tensor in model.config.tensors(model.hf_config) if tensor.ours == ours)
    return head, [name for name in dict.fromkeys((load_family(model.hf_config).head, HEAD)) if name != head]


def _nearest(name: str, options: Iterable[str]) -> str:
    return nearest(name[:200], options)  # a name from a file may have any length, and comparing takes its square


def _is_end(name: str, module: str) -> bool:
    return module == name or module.endswith("." + name)
