"""The model card of an export, ``README.md``: what the hub and whoever gets the model need to know, from the run.

All of it comes from files that are there: the run's own, and the base's. What nobody recorded is said to be unknown.
Texts of rows are not in it, nor paths of this machine; names and settings are escaped, so that none becomes markup.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afina import __version__
from afina.engine.intervals import bootstrap, ratio
from afina.engine.run_folder import RUN
from afina.engine.settings import fields, to_yaml
from afina.engine.train_config import TrainConfig
from afina.errors import AfinaError
from afina.loaders.weights.hub import BUILT_IN
from afina.loaders.weights.package_index import MODELS
from afina.printable import printable
from afina.report.facts import RunFacts, read_run
from afina.report.licence import Licence, licence_of, place_of
from afina.report.markdown import block, code, front_matter, prose, table
from afina.report.verdict import FEW_ROWS, Judged, judge, judge_dev_loss

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LIBRARIES = {"hf": "transformers", "peft": "peft", "gguf": "gguf"}
_ROWS = {  # keys of a run's facts on its data -> what the card calls them
    "rows": "rows read",
    "train_rows": "rows trained on",
    "dev_rows": "rows held out",
    "train_tokens": "tokens trained on",
    "train_trained_tokens": "of them learnt",
    "empty": "empty rows, left out",
    "duplicates": "duplicates, left out",
    "bad_lines": "lines that could not be read, left out",
    "dropped": "rows longer than max_length, left out",
    "truncated": "rows longer than max_length, cut",
    "untrained": "rows without a token to learn, left out",
}
_ALWAYS = ("rows", "train_rows", "dev_rows", "train_tokens", "train_trained_tokens")
_PATHS = ("data", "val_file", "output_dir", "model", "tokenizer", "config")


@dataclass(frozen=True)
class _Export:
    """What a card is about. ``run``: where the model came out of one whose files can be read, else ``unread`` may say
    why not."""

    name: str
    format: str
    base: str | None
    licence: Licence
    files: Sequence[str]
    check: Mapping[str, Any]
    modelfile: str | None
    run: RunFacts | None
    unread: str | None = None

    @property
    def chats(self) -> bool:
        """Whether it was trained on conversations, as far as is known."""
        kind = str(self.run.data.get("schema")) if self.run else ""
        return not kind.startswith(("prompt", "text", "instruction"))


def model_card(
    folder: Path,
    *,
    name: str,
    format: str,
    base: str | None,
    base_folder: Path | None,
    files: Sequence[str],
    modelfile: str | None,
    check: Mapping[str, Any],
) -> str:
    """The card of what was made of ``folder``, a model's or an adapter's, or the best one of a run.

    ``name``: of the export; ``base`` and ``base_folder``: of an adapter; ``files``: names of the export's weights;
    ``modelfile``: of Ollama's beside them; ``check``: what the exporter found.
    """
    run, unread = None, None
    if folder.name == "best" and (folder.parent / RUN).is_file():
        try:
            run = read_run(folder.parent)
        except AfinaError as problem:
            unread = str(problem)
    if run is not None and base is None and run.config.init == "pretrained":
        base = str(run.config.model)
    licence = licence_of(folder if base is None else base_folder or place_of(base))
    export = _Export(name, format, base, licence, files, check, modelfile, run, unread)
    parts = [front_matter(_metadata(export)), f"# {prose(name)}\n", *_about(export)]
    if run is not None:
        parts += ["## Data\n", *_data(run), "## Figures\n", *_figures(run), "## Recipe\n", *_recipe(run)]
    parts += ["## Use\n", *_use(export), "## Limits\n", *_limits(export)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _public(name: str) -> str | None:
    """A model's name on the hub, without its revision; None for a folder or a file of this machine."""
    found = name.partition("@")[0]
    return found if _HUB_ID.fullmatch(found) and not Path(name).expanduser().exists() else None


def _shown(name: str) -> str:
    """A model's name as others may read it: of a path its last part."""
    return name if _public(name) or name in (BUILT_IN, *MODELS) else Path(name).name


def _metadata(export: _Export) -> dict[str, Any]:
    """The hub's keys (https://huggingface.co/docs/hub/model-cards)."""
    run = export.run
    found: dict[str, Any] = {"license": export.licence.name or "unknown", **export.licence.more}
    if export.licence.languages:
        found["language"] = list(export.licence.languages)
    found |= {"library_name": _LIBRARIES[export.format], "pipeline_tag": "text-generation"}
    if export.base is not None and (public := _public(export.base)):
        found["base_model"] = public
        found["base_model_relation"] = "adapter" if export.format == "peft" else "finetune"
    method = [run.config.method] if run else []
    found["tags"] = ["afina", *method, *(["conversational"] if run and export.chats else [])]
    judged = judge_dev_loss(run.dev_rows) if run else None
    if judged is not None and judged.after is not None:
        found["model-index"] = [{"name": export.name, "results": [_result(judged)]}]
    return found


def _result(judged: Judged) -> dict[str, Any]:
    assert judged.after is not None
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": "held-out rows of the training data", "type": "held-out-rows"},
        "metrics": [
            {
                "type": "loss",
                "name": "mean loss in nats a token, on the rows that picked the best model",
                "value": round(judged.after, 4),
                "verified": False,
            }
        ],
    }


def _about(export: _Export) -> Iterator[str]:
    run = export.run
    if run is None:
        yield "A language model, exported by Afina. How it was trained is not known to the exporter.\n"
        if export.base is not None:
            yield f"It is an adapter of {code(_shown(export.base))}.\n"
        if export.unread is not None:
            yield f"Its run's files cannot be read: {prose(export.unread)}.\n"
    elif export.base is None:
        yield "A language model trained from scratch with Afina.\n"
    else:
        yield f"{code(_shown(export.base))}, fine-tuned with Afina (method {code(run.config.method)}).\n"
    if run is not None:
        yield f"{prose(judge(run.dev_rows).line)}.\n"
    licence = export.licence
    holder = "the base" if export.base is not None else "where it came from"
    if licence.name is None:
        yield f"Licence: unknown: look at {holder}. It binds this model too.\n"
    else:
        yield f"Licence: {code(licence.name)}, as {code(licence.where)} of {holder} says.\n"
    if export.base is not None and (recorded := export.check.get("base_sha256")):
        yield f"SHA-256 of the base's weights: {code(recorded)}.\n"


def _data(run: RunFacts) -> Iterator[str]:
    found = run.data
    rows = [("file", code(Path(str(found.get("data", run.config.data))).name))]
    if "val_file" in found:
        rows.append(("file of the rows held out", code(Path(str(found["val_file"])).name)))
    rows += [("kind of row", code(found["schema"]))] if "schema" in found else []
    for key, told in _ROWS.items():
        value = found.get(key)
        if isinstance(value, int) and (value or key in _ALWAYS):
            rows.append((told, f"{value:,}"))
    if "data_sha256" in run.contents:
        rows.append(("SHA-256 of rows, order and split", code(run.contents["data_sha256"])))
    yield table(("", ""), rows)
    yield "The rows themselves are not part of this card.\n"


def _figures(run: RunFacts) -> Iterator[str]:
    loss, rows = judge_dev_loss(run.dev_rows), run.dev_rows
    if rows is None or rows.after is None or loss.found is None:
        yield "The held-out rows were not measured both before and after training.\n"
        return
    sides = [bootstrap(np.stack([sums, rows.tokens], axis=1), ratio) for sums in (rows.before, rows.after)]
    lines = [
        (
            "loss, nats a token (lower is better)",
            *(f"{side.value:.4f} ({side.low:.4f} to {side.high:.4f})" for side in sides),
            f"{loss.found.difference:+.4f} ({loss.found.low:+.4f} to {loss.found.high:+.4f})",
        )
    ]
    metric = judge(rows)
    if metric.found is not None and metric.higher_is_better:
        change = f"{metric.found.difference:+.4f} ({metric.found.low:+.4f} to {metric.found.high:+.4f})"
        lines.append(
            (f"{prose(metric.name)} (higher is better)", f"{metric.before:.4f}", f"{metric.after:.4f}", change)
        )
    yield table(("on held-out rows", "before", "after", "change, paired"), lines)
    yield f"95 % intervals over {len(rows.where):,} rows{': few, so take them with care' * (loss.rows < FEW_ROWS)}.\n"
    if (count := len(run.dev_losses) - 1) > 1:
        yield (
            f"The best of {count} evaluations on these rows was kept, so the figures are a little better than on rows "
            "that had no part in the choice.\n"
        )


def _recipe(run: RunFacts) -> Iterator[str]:
    yield f"The run: {prose(run.state)}. Settings that are not the default ones:\n"
    yield block(to_yaml(_settings(run.config), {}).rstrip("\n"), "yaml")
    told = ", ".join(f"{prose(name)} {code(version)}" for name, version in run.versions.items())
    yield f"Versions: {told or 'unknown'}.\n"


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What a run was told, without the paths of its machine."""
    found = {}
    for name, setting in fields(TrainConfig).items():
        value, default = config.to_dict()[name], setting.default
        if setting.default_factory is not dataclasses.MISSING:
            default = setting.default_factory()
        default = list(default) if isinstance(default, tuple) else default
        if value != default and name not in ("output_dir", "report_to"):
            found[name] = _shown(value) if name in _PATHS and isinstance(value, str) else value
    return found


def _use(export: _Export) -> Iterator[str]:
    if export.format == "gguf":
        lines = [f"llama-server -m {shlex.quote(printable(export.files[0]))}"]
        if export.modelfile is not None:
            lines += [f"ollama create my-model -f {shlex.quote(printable(export.modelfile))}", "ollama run my-model"]
        yield block("\n".join(lines), "sh")
        return
    base, remark = "BASE", ""
    if export.base is not None:
        base = _public(export.base) or base
        remark = f"  # the folder of {printable(_shown(export.base))}" if base == "BASE" else ""
    loaded = f'"{base}"){remark}' if export.format == "peft" else "place)"
    lines = [
        "from peft import PeftModel" * (export.format == "peft"),
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        'place = "."  # this folder',
        "tokenizer = AutoTokenizer.from_pretrained(place)",
        f"model = AutoModelForCausalLM.from_pretrained({loaded}",
        "model = PeftModel.from_pretrained(model, place)" * (export.format == "peft"),
    ]
    if export.chats:
        lines.append('messages = [{"role": "user", "content": "Hello"}]')
        ask = 'messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        lines.append(f"inputs = tokenizer.apply_chat_template(\n    {ask}\n)")
    else:
        lines.append('inputs = tokenizer("Once", return_tensors="pt")')
    lines.append('output = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]')
    lines.append("print(tokenizer.decode(output, skip_special_tokens=True))")
    yield block("\n".join(line for line in lines if line), "python")
    served = "vllm serve ."
    if export.format == "peft":
        served = f"vllm serve {base} --enable-lora --lora-modules my-adapter=."
        if export.run is not None and (rank := export.run.config.lora_r or 0) > 16:  # vLLM's default
            served += f" --max-lora-rank {rank}"
    yield block(served, "sh")


def _limits(export: _Export) -> Iterator[str]:
    found = [f"written by Afina {__version__} from the files of the run and the base; nobody has looked at it yet"]
    if export.run is not None and (skipped := sum(1 for line in export.run.steps if line.get("skipped"))):
        found.append(f"{skipped:,} of {export.run.last_step:,} steps were skipped, their loss or gradient not finite")
    if export.run is not None and not export.run.finished:
        found.append("the run did not come to its end")
    found.append("what the base cannot do, and what it must not be used for, holds here too" if export.base else "")
    if export.run is not None:
        found.append("the figures are of rows like those that it was trained on, and say nothing about others")
    if (error := export.check.get("logits_relative_error")) is not None:
        found.append(f"loaded again, logits differ by {error:.2g} of the largest from those of the model")
    if (error := export.check.get("tensor_relative_error")) is not None:
        found.append(f"read back, tensors differ by at most {error:.2g} of their largest value (rounding)")
    found += [f"Ollama: {line}" for line in export.check.get("ollama_limits", ())]
    yield "\n".join(f"- {prose(line[:1].upper() + line[1:])}." for line in found if line) + "\n"
