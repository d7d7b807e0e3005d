"""``afina plan``: which settings let a run fit into a GPU's memory, from the model's config alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.cli.options import Parser, Verb
from afina.engine.recipe_file import read_yaml
from afina.engine.settings import fields
from afina.engine.train_config import TrainConfig, aliases
from afina.errors import ConfigError

if TYPE_CHECKING:
    from afina.engine.plan import Option

# Settings that a plan does not ask for, but a run must have.
_UNUSED = {"data": "-", "output_dir": "-"}


def add_options(parser: Parser) -> None:
    parser.usage = "afina plan [RECIPE.yaml] [--model M] --memory 24GB [--method ...] [--max_length N] [options]"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file of settings; flags override it")
    parser.add_argument("--memory", metavar="SIZE", help="the device's memory: 24GB, 24GiB or bytes [this GPU's]")
    for name in fields(TrainConfig):
        parser.add_setting(TrainConfig, name, action="append")


def run(args: argparse.Namespace) -> dict[str, Any]:
    flags = [(name, value) for name in aliases() for value in getattr(args, name) or ()]
    given = {aliases()[name] for name, _ in flags}
    if args.recipe is not None:
        given |= {aliases().get(key, key) for _, key, value in read_yaml(Path(args.recipe)) if value is not None}
    flags += [(name, value) for name, value in _UNUSED.items() if name not in given]
    config = TrainConfig.resolve(args.recipe, flags, prefix="--")
    from afina.engine.plan import Planner, parse_memory, what_would_fit

    memory = _this_gpu() if args.memory is None else parse_memory(args.memory)
    hf = _config_json(str(config.model or config.config))
    # What a saved recipe says of these may be a default: "auto" leaves the choice open.
    fixed = {name for name in given if name != "activation_policy" or config.activation_policy != "auto"}
    planner = Planner(config, hf, fixed=fixed)
    options = planner.options(batch_size=config.batch_size, max_length=config.max_length)
    fitting = [option for option in options if option.needed <= memory]
    count = planner.model.config.num_parameters()
    print(
        f"{config.model or config.config}: {count:,} parameters, {planner.trained:,} train ({config.method}), "
        f"{config.batch_size} x {config.max_length} tokens, {memory / 1e9:.1f} GB"
    )
    result: dict[str, Any] = {
        "ok": bool(fitting), "parameters": count, "trained": planner.trained, "memory": memory,
        "options": [option.to_dict() for option in options], "take": None, "would_fit": [],
    }  # fmt: skip
    for line in _table(fitting or options[-1:]):
        print(line)
    if fitting:
        result["take"] = take = _to_paste(config, fitting[0])
        print("take:", *(f"{name}: {str(value).lower()}" for name, value in take.items()), sep="\n  ")
        return result
    result["would_fit"] = what_would_fit(planner, hf, memory)
    print(
        f"afina: error: {options[-1].needed / 1e9:.1f} GB are needed with the leanest settings, and there are "
        f"{memory / 1e9:.1f}; what would fit: {'; or '.join(result['would_fit'])}",
        file=sys.stderr,
    )
    return result


def _config_json(source: str) -> dict[str, Any]:
    """The contents of the model's config.json, from the disk or from the shapes that are known."""
    from afina.engine.plan import known_config, unknown_model
    from afina.loaders.jsonfile import read_json
    from afina.loaders.weights.hub import BUILT_IN, MODELS, resolve
    from afina.loaders.weights.source import read_hf_config

    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        return read_json(path.resolve())
    if path.exists() or source == BUILT_IN or source in MODELS:
        return read_hf_config(resolve(source))
    if (known := known_config(source)) is None:
        raise unknown_model(source)
    return known


def _this_gpu() -> int:
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--memory is missing, and this machine has no GPU to ask: give it, as in --memory 24GB")
    return torch.cuda.get_device_properties(0).total_memory


def _to_paste(config: TrainConfig, option: Option) -> dict[str, Any]:
    """The settings of a recipe that make it this option."""
    clip = {"max_grad_norm": 0} if option.settings["optim_in_backward"] else {}
    sizes = {"method": config.method, "batch_size": config.batch_size, "max_length": config.max_length}
    return {**sizes, **option.settings, **clip}


def _table(options: list[Option]) -> list[str]:
    heads = ("work", "activations", "optim", "in backward", "lean loss", "on host", "weights", "optimizer", "gradients")
    rows = [(*heads, "kept", "needed GB", "host GB")]
    for option in options:
        s, m = option.settings, option.memory
        yes = ["yes" if s[name] else "no" for name in ("optim_in_backward", "lean_loss")]
        yes.append(" + ".join(name for name in ("optimizer", "params") if s[f"offload_{name}"]) or "-")
        sizes = (m.weights + m.adapters, m.optimizer, m.gradients, m.activations, option.needed, m.host)
        figures = [f"{size / 1e9:.2f}" for size in sizes]
        rows.append((f"{option.work:.2f} x", s["activation_policy"], s["optim"], *yes, *figures))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


VERB = Verb("which settings fit into a GPU's memory", add_options, run, failed=2)
