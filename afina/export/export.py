"""Deployable weights: a model in the layout that other programs load, proven before it is published.

hf      config.json, safetensors and tokenizer files, as transformers has them. An adapter is merged into its base.
peft    the adapter alone, for programs that put it on the base themselves.
gguf    one file, for llama.cpp and what is built on it. An adapter is merged into its base.

What is written goes to a working folder beside its place, is read from the disk again and compared with what it was
made of, and only then gets its name. A failure leaves nothing; a kill, a folder ``NAME.tmp-N``, which the next export
to the same place removes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.durable import open_file
from afina.engine.linear import frozen_format
from afina.engine.model import GPT
from afina.engine.settings import SYNONYMS
from afina.engine.weights import DTYPES, hf_tensors, load_model, read_config, save_model
from afina.errors import ConfigError, RunError, WeightsError, nearest
from afina.export.compare import Rows, compare, held_out, logits, without_adapter
from afina.export.merge import Base, base_of, check_base, merge
from afina.export.ollama import different_ids, modelfile, template_for
from afina.export.publication import CARD, MODELFILE, Card, Publication
from afina.loaders.jsonfile import read_json
from afina.loaders.text.gguf_vocab import compare_vocabulary, read_vocabulary
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer, check_vocab
from afina.loaders.weights.gguf import check_architecture, differences, write_gguf
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.peft import BASE_HASH, CONFIG, WEIGHTS, AdapterFile, is_adapter
from afina.loaders.weights.safetensors import SafetensorsFolder, write_safetensors
from afina.loaders.weights.source import open_weights
from afina.manifest import check_manifest

FORMATS: dict[str, tuple[str, ...]] = {  # and the dtypes of each
    "hf": ("auto", *DTYPES),
    "peft": ("auto",),
    "gguf": ("auto", "float16", "bfloat16", "q8_0", "float32"),
}
# How far logits may move, as a share of the largest one.
# The same weights give the same logits; only the order of sums may differ between two loads.
SAME = 1e-5
# W + s B A as one matrix or as two products is the same but for fp32's rounding, which layers add up to 1e-6 or so. The
# adapter itself may move logits by little: the error must also be small beside that, or half of it could be missing.
MERGED, MERGED_NOISE, OF_EFFECT = 1e-3, 1e-4, 0.1
# Rounding moves each weight by up to 2^-9 of itself in bfloat16, an eighth of that in float16. Random weights, where
# nothing is redundant, then give logits that are off by 0.01 to 0.04 in bfloat16 and 0.001 to 0.006 in float16, with 2
# layers or 64. More is no longer rounding.
ROUNDED = {torch.float32: SAME, torch.float16: 0.02, torch.bfloat16: 0.1}
# Of one tensor's largest value: half a unit in the last place, with room; q8_0 has 127 steps a block and a scale.
READ_BACK = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 5e-3}
LARGE = 500_000_000  # bytes of weights from which on the steps take more than a moment, and are told
MAX_FLOAT16 = 65504.0


class ExportFailedError(RuntimeError):
    """What was written does not compute what the model computes; it has been removed."""


def export(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "hf",
    dtype: str = "auto",
    base: str | None = None,
    base_name: str | None = None,
    data: str | None = None,
    card: Card | None = None,
) -> dict[str, Any]:
    """Write ``source`` (a model, a run, an adapter) to ``output``; returns ``output``, ``format`` and ``check``.

    ``output``: a folder to create; for gguf also the name of a file, ending in .gguf. ``dtype`` of the weights: "auto"
    is what is stored (of an adapter: what its base is stored in), for gguf float16. ``base``: where an adapter's base
    is now; ``base_name``: what the peft layout names as such. ``data``: rows to compare on instead of the run's own.
    ``card``: writes README.md. A file NAME.gguf has NAME.README.md and NAME.Modelfile beside it.

    Raises RunError when ``output`` exists, ConfigError for an option that does not go with the format, WeightsError for
    another base than the adapter was trained on, ExportFailedError when what was written computes something else.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to is {to!r}; expected {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    dtype = SYNONYMS.get(dtype, dtype)
    if dtype not in FORMATS[to]:
        choices = ", ".join(FORMATS[to])
        raise ConfigError(f"--dtype is {dtype!r}; with --to {to} expected {choices}{nearest(dtype, FORMATS[to])}")
    if to == "peft" and data is not None:
        raise ConfigError("--data is not for --to peft, which compares every bit of the adapter: leave it out")
    if to != "peft" and base_name is not None:
        raise ConfigError(f"--base_name is what --to peft names as the base, but --to is {to}: leave it out")
    place = Path(os.path.abspath(output))
    publication = Publication(place, to, card)
    publication.refuse_existing()
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"{above} is no folder that can be written to: choose another --output")
    folder = resolve(source)
    if not is_adapter(folder):
        if to == "peft":
            raise ConfigError(f"{folder} is a whole model and has no adapter: use --to hf")
        if base is not None:
            raise ConfigError(f"--base is for adapters, but {folder} is a whole model: leave it out")
    if to == "peft":
        check = _export_adapter(folder, publication, base, base_name)
    else:
        check = _export_model(folder, publication, dtype, base, data)
    result = {"output": str(place), "format": to, "check": check}
    if card is not None and folder.is_dir() and (folder / CARD).is_file():
        result["replaced_card"] = str(folder / CARD)
    return result


def summary(result: dict[str, Any]) -> str:
    """What ``export`` returned, in a few lines for people."""
    check, lines = result["check"], []
    if result["format"] == "peft":
        lines.append(
            f"{result['output']}: the adapter's {check['tensors']} tensors, bit for bit; its base is {check['base']}, "
            "which whoever loads it needs too"
        )
        return "\n".join([*lines, *_beside(result)])
    lines.append(f"{result['output']}: {check['dtype']} weights")
    if "merged_into" in check:
        lines[0] += f", the adapter merged into {check['merged_into']}"
        if check["base_sha256"] is None:
            lines.append("the adapter does not say which weights it was trained on, so the base could not be checked")
    if "merge_error" in check:
        told = f"before rounding, logits differ by {check['merge_error']:.2g} of the largest"
        if "adapter_effect" in check:
            told += f"; the adapter moves them by {check['adapter_effect']:.2g}"
        lines.append(told)
    if result["format"] == "gguf":
        lines.append(
            f"read back, its {check['tensors']} tensors differ by at most {check['tensor_relative_error']:.2g} of "
            f"their largest value, and {check['texts_with_same_ids']} texts have the same ids"
        )
        return "\n".join([*lines, *_beside(result)])
    lines.append(
        f"loaded again, the logits differ by {check['logits_relative_error']:.2g} of the largest (limit "
        f"{check['limit']:g}), {check['rounding_share']:.0%} of it from rounding; the likeliest next token is the same "
        f"after {check['greedy_unchanged']:.2%} of {check['tokens']:,} tokens ({check['compared_on']})"
    )
    if check["rounding_error"] > check.get("adapter_effect", float("inf")):
        lines.append("rounding moves the logits more than the adapter does: use --dtype float32, or --to peft")
    return "\n".join([*lines, *_beside(result)])


def _beside(result: dict[str, Any]) -> list[str]:
    """What is said of the Modelfile and the card."""
    check, lines = result["check"], []
    if "ollama_template" in check:
        proven = f", as {check['ollama_rows_same']} of {check['ollama_rows']} rows show" if check["ollama_rows"] else ""
        template = (
            f"its template writes what training saw{proven}" if check["ollama_template"] else "without a template"
        )
        lines.append(
            f"{check['modelfile']}: for ollama create -f; {template}" if check["modelfile"] else "no Modelfile"
        )
        lines += [f"Ollama: {line}" for line in check["ollama_limits"]]
    if "replaced_card" in result:
        lines.append(f"README.md is a new model card; {result['replaced_card']} was read, and is not carried over")
    return lines


def _export_adapter(folder: Path, publication: Publication, base: str | None, base_name: str | None) -> dict[str, Any]:
    """The adapter as it is, with another name of its base at most."""
    holder, into = folder, None
    if base is not None:
        into = base_of(folder, base)
        check_base(folder, into)
        holder = into.folder
    tokenizer = load_tokenizer(folder if _has_tokenizer(folder) else holder)
    check_manifest(folder)
    adapter = AdapterFile(folder)
    names = [*adapter.saved.values(), *(name for parts in adapter.lora.values() for name in parts.values())]
    tensors = {name: adapter.read(name) for name in names}
    config = read_json(folder / CONFIG)  # as it is: it may say more than what we read of it
    name = config["base_model_name_or_path"] = base_name or adapter.config.base
    with publication.working() as working:
        working.mkdir()
        write_safetensors(working / WEIGHTS, tensors, adapter.metadata)
        with open_file(working / CONFIG, error=WeightsError) as file:
            file.write(json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
        tokenizer.save(working)
        found = AdapterFile(working)
        same = (found.lora, found.saved, found.metadata) == (adapter.lora, adapter.saved, adapter.metadata)
        same = same and found.config == replace(adapter.config, base=name)
        if not same or not all(_same_bits(found.read(name), tensor) for name, tensor in tensors.items()):
            raise ExportFailedError(
                f"the adapter read back from {working} is not the one in {folder}: nothing was kept"
            )
        check = {"same_bits": True, "tensors": len(tensors), "base": name}
        told = check | {"base_sha256": adapter.metadata.get(BASE_HASH)}
        publication.write_card(folder, [WEIGHTS], told, base=name, base_folder=into.folder if into else None)
    return check


def _export_model(
    folder: Path, publication: Publication, dtype: str, base: str | None, data: str | None
) -> dict[str, Any]:
    """One model, an adapter merged into its base."""
    into = base_of(folder, base) if is_adapter(folder) else None
    holder = into.folder if into else folder
    to, place = publication.to, publication.place
    config, hf = read_config(holder)
    if to == "gguf":
        check_architecture(hf)
    log = _progress(holder)
    if into:
        log("reading the base's files, to know that they are those the adapter was trained on")
        check_base(folder, into)
    tokenizer = load_tokenizer(folder if _has_tokenizer(folder) else holder)
    check_vocab(tokenizer, config.vocab_size)
    rows = held_out(folder, tokenizer, data, config.max_positions)
    log("loading the model in float32")
    model = load_model(holder, dtype="float32", device="cpu", adapter=folder if into else None)
    held = frozen_format(model)
    check: dict[str, Any] = {"compared_on": rows.where, "rows": len(rows.ids)}
    if into:
        merged_into = f"the dequantised {held.split('-')[0].upper()} weights of {into.name}" if held else into.name
        check |= {"merged_into": merged_into, "base_sha256": into.recorded}
    log(f"computing what it should: {rows.where}")
    expected = logits(model, rows)
    check["tokens"] = len(expected)
    merged = expected
    if into or held:
        merged, figures = _merge(model, rows, expected, log)
        check |= figures
    with publication.working() as working:
        log(f"writing {place.name}")
        if to == "gguf":
            dtype = "float16" if dtype == "auto" else dtype
            path = working if publication.alone else working / f"model-{dtype}.gguf"
            check |= _write_gguf(model, tokenizer, rows, path, dtype)
            name = place.name if publication.alone else path.name
            check |= _write_modelfile(publication, tokenizer, rows, path, name)
            publication.write_card(folder, [name], check, **_base_of_card(into))
            return check
        stored = _stored_dtypes(holder, hf)
        target = stored[0] if dtype == "auto" else DTYPES[dtype]
        _write_hf(model, tokenizer, working, target)
        del model
        log("loading what was written")
        found = logits(load_model(working, dtype="float32", device="cpu"), rows)
        likeness = compare(found, expected)
        as_they_were = stored == [target] and merged is expected
        limit = SAME if as_they_were else max(ROUNDED[target], check.get("merge_limit", SAME))
        if not likeness.error <= limit:
            raise ExportFailedError(
                f"the exported model's logits differ by {likeness.error:.2g} of the largest one (limit {limit:g}), so "
                "nothing was kept: try --dtype float32"
            )
        rounding = compare(found, merged).error
        check |= {
            "logits_relative_error": likeness.error,
            "limit": limit,
            "rounding_error": rounding,
            "rounding_share": rounding / (rounding + check.get("merge_error", 0.0)) if rounding else 0.0,
            "greedy_unchanged": likeness.same,
            "dtype": str(target).removeprefix("torch."),
        }
        publication.write_card(folder, ["model.safetensors"], check, **_base_of_card(into))
    return check


def _base_of_card(into: Base | None) -> dict[str, Any]:
    return {"base": into.name if into else None, "base_folder": into.folder if into else None}


def _write_modelfile(
    publication: Publication, tokenizer: Tokenizer, rows: Rows, path: Path, name: str
) -> dict[str, Any]:
    """The Modelfile for Ollama, whose template is proven on the rows and by the file's own vocabulary."""
    template = template_for(tokenizer, rows.examples)
    if template.source is not None and (
        told := different_ids(read_vocabulary(path), tokenizer, template, rows.examples)
    ):
        template.limits.append(told)
    found = {"ollama_template": template.source is not None, "ollama_limits": template.limits}
    found |= {"ollama_rows": template.rows, "ollama_rows_same": template.same}
    try:
        publication.add(MODELFILE, modelfile(template, name, tokenizer))
    except ValueError as problem:
        return found | {"modelfile": None, "ollama_limits": [*template.limits, str(problem)]}
    return found | {"modelfile": publication.name_of(MODELFILE)}


def _merge(model: GPT, rows: Rows, expected: Tensor, log: Callable[[str], None]) -> tuple[Tensor, dict[str, float]]:
    """Merge, and make sure of it before anything is rounded; the logits, and how they compare with the ``expected``."""
    figures = {}
    limit = MERGED
    if model.adapter is not None:
        figures["adapter_effect"] = effect = compare(without_adapter(model, rows), expected).error
        limit = max(MERGED_NOISE, min(MERGED, OF_EFFECT * effect))
    log("merging")
    merge(model)
    merged = logits(model, rows)
    error = compare(merged, expected).error
    if not error <= limit:
        raise ExportFailedError(
            f"merged in float32, the logits differ by {error:.2g} of the largest one from those of base and adapter "
            f"(limit {limit:.2g}), so nothing was written: please report it, and use --to peft meanwhile"
        )
    return merged, figures | {"merge_error": error, "merge_limit": limit}


def _write_hf(model: GPT, tokenizer: Tokenizer, working: Path, target: torch.dtype) -> None:
    """Round the model, in place, write it, and make sure that every bit is on the disk."""
    if target == torch.float16:
        for name, tensor in hf_tensors(model):
            if (largest := float(tensor.abs().max())) > MAX_FLOAT16:
                raise WeightsError(f"{name}: holds {largest:g}, too large for float16: use --dtype bfloat16")
    save_model(model.to(target), tokenizer, working)
    checkpoint = SafetensorsFolder(working)
    for name, tensor in hf_tensors(model):
        if not _same_bits(checkpoint.read(name), tensor):
            raise ExportFailedError(f"{name} read back from {working} is not what was written: nothing was kept")


def _write_gguf(model: GPT, tokenizer: Tokenizer, rows: Rows, path: Path, dtype: str) -> dict[str, Any]:
    """Write the one file, and compare its vocabulary and its tensors, read back, with ours."""
    path.parent.mkdir(exist_ok=True)
    try:
        write_gguf(path, model.hf_config, lambda: hf_tensors(model), tokenizer, dtype=dtype)
    except WeightsError as problem:
        if isinstance(cause := problem.__cause__, OSError) and cause.errno is None:  # numpy tells how much, not why
            raise ExportFailedError(f"{path} could not be written in full ({cause}): free space there") from problem
        raise
    try:
        texts = compare_vocabulary(path, tokenizer, rows.texts)
    except ValueError as problem:
        raise ExportFailedError(f"the file's vocabulary is not the tokenizer's ({problem}): nothing was kept") from None
    worst, count = 0.0, 0
    for name, kind, error in differences(path, model.hf_config, hf_tensors(model)):
        if not error <= READ_BACK[kind]:
            raise ExportFailedError(
                f"{name} read back as {kind} differs by {error:.2g} of its largest value (limit "
                f"{READ_BACK[kind]:.2g}), so nothing was kept: please report it, and use --to hf meanwhile"
            )
        worst, count = max(worst, error), count + 1
    return {"dtype": dtype, "tensors": count, "tensor_relative_error": worst, "texts_with_same_ids": texts}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _stored_dtypes(folder: Path, hf: dict[str, Any]) -> list[torch.dtype]:
    """What the weights are stored in, most of them first; of quantised ones, what they were before, by config.json, or
    float32, which holds what the blocks of a GGUF file stand for."""
    if hf.get("quantization_config") is not None:
        named = str(hf.get("dtype") or hf.get("torch_dtype"))
        return [DTYPES.get(named, torch.float32)]
    files = open_weights(folder)
    held: Counter[torch.dtype] = Counter()
    for name in files.names():
        held[files.dtype(name)] += math.prod(files.shape(name))
    found = [dtype for dtype, _ in held.most_common()]
    return found if found and found[0] in DTYPES.values() else [torch.float32]


def _progress(folder: Path) -> Callable[[str], None]:
    """Tells on standard error what is going on, where the weights are so large that it takes more than a moment."""
    files = [folder] if folder.is_file() else folder.glob("*.safetensors")
    if sum(path.stat().st_size for path in files) < LARGE:
        return lambda text: None
    return lambda text: print(f"{text} ...", file=sys.stderr, flush=True)
