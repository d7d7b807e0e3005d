"""LoRA adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT (https://huggingface.co/docs/peft) names the tensors of module NAME, a linear layer of the checkpoint,
    base_model.model.NAME.lora_A.weight (r, in), .lora_B.weight (out, r), .lora_magnitude_vector (out,) with DoRA
and weights that are trained whole (``modules_to_save``) base_model.model.NAME.weight. Which base an adapter belongs to
stands in the metadata of the safetensors file, which PEFT does not read: see ``BASE_HASH``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.durable import open_file
from afina.errors import ConfigError, WeightsError
from afina.loaders.jsonfile import read_json, show
from afina.loaders.weights.hub import resolve
from afina.loaders.weights.safetensors import SafetensorsFile, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of the file's metadata: SHA-256 of all the base's weights; of a sample of them; how they were held in training.
BASE_HASH, BASE_SAMPLE, BASE_FORMAT = "afina_base_sha256", "afina_base_sample", "afina_base_format"
MAX_RANK = 65_536
SUFFIXES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
SUFFIXES["lora_magnitude_vector.weight"] = "magnitude"  # how the layer itself calls it
MAX_ALPHA, MAX_PATTERNS = 1e6, 10_000  # patterns: modules with another rank or alpha
# How PEFT may have drawn the first weights. Other ways change the base too, so the adapter does not fit the base alone.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Keys that change nothing about what a trained adapter computes.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform loftq_config lora_ga_config megatron_core peft_type peft_version
    qalora_group_size revision runtime_config target_modules task_type ensure_weight_tying
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says.

    ``base``: the model it was trained on. ``rank_pattern`` and ``alpha_pattern``: modules, or ends of their names, with
    another rank or alpha than ``r`` and ``alpha``.
    """

    r: int
    alpha: float
    base: str | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    target_modules: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        return _pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the adapter's product is multiplied by."""
        rank = self.rank(module)
        return _pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def to_peft(self) -> dict[str, Any]:
        """The contents of adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.r,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "modules_to_save": list(self.modules_to_save) or None,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "fan_in_fan_out": self.fan_in_fan_out,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }


class AdapterFile:
    """An adapter folder: its config, and its tensors by module. Raises ConfigError and WeightsError.

    ``lora``: module -> {"A", "B", "magnitude"} -> name in the file; ``saved``: parameter -> name in the file.
    ``metadata``: see ``BASE_HASH`` and ``BASE_SAMPLE``; empty where PEFT wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _config(folder / CONFIG)
        if not (folder / WEIGHTS).is_file():
            pickle = (folder / "adapter_model.bin").is_file()
            mend = "convert it to safetensors with PEFT (save_pretrained)" if pickle else "save it again"
            found = "its weights are a pickle, which can run code and is never opened" if pickle else f"no {WEIGHTS}"
            raise WeightsError(f"{folder}: {found}: {mend}")
        self._file = SafetensorsFile(folder / WEIGHTS)
        self.metadata = self._file.metadata
        self.lora: dict[str, dict[str, str]] = {}
        self.saved: dict[str, str] = {}
        for name in self._file.entries:
            module, kind = _split(name.removeprefix(PREFIX).replace(".modules_to_save.", "."))
            if kind in self.lora.get(module, {}) or module in self.saved:
                raise WeightsError(f"{folder / WEIGHTS}: tensor {show(name)} comes twice, by two names: keep one")
            if kind:
                self.lora.setdefault(module, {})[kind] = name
            elif "lora_" in name:
                raise WeightsError(
                    f"{folder / WEIGHTS}: tensor {show(name)} is not supported: expected lora_A and lora_B of linear "
                    "layers (embeddings train whole, by modules_to_save)"
                )
            else:
                self.saved[module] = name
        wanted = {"A", "B"} | ({"magnitude"} if self.config.dora else set())
        for module, names in self.lora.items():
            if names.keys() != wanted:
                raise WeightsError(
                    f"{folder / WEIGHTS}: module {show(module)} has {', '.join(sorted(names))}, expected "
                    f"{', '.join(sorted(wanted))} (use_dora: {self.config.dora}): save the adapter again"
                )
        if not self.lora and not self.saved:
            raise WeightsError(f"{folder / WEIGHTS}: holds no weights at all: save the adapter again")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.entries[name].shape

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU. NaN and infinity are refused: they would spoil every answer."""
        if (dtype := self._file.entries[name].dtype) not in _DTYPES:
            found = f"tensor {show(name)} is {str(dtype).removeprefix('torch.')}"
            raise WeightsError(
                f"{self.folder / WEIGHTS}: {found}, expected float32, bfloat16 or float16: save it again"
            )
        out = torch.empty(self.shape(name), dtype=self._file.entries[name].dtype)
        self._file.read_into(name, out, finite=False)
        if not out.isfinite().all():
            raise WeightsError(
                f"{self.folder / WEIGHTS}: tensor {show(name)} holds NaN or Inf: use an earlier adapter, or train it "
                "again with a lower learning rate"
            )
        return out


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def find_base(folder: Path, name: str | None = None) -> tuple[str, Path]:
    """The name and the folder of an adapter's base: ``name``, or what the adapter itself names.

    Raises ConfigError where it names none, WeightsError where the base is not there or is no whole model.
    """
    named = name or _config(folder / CONFIG).base
    mend = f"name the base: --base BASE for afina export, else BASE --adapter {folder}"
    if not named:
        raise ConfigError(f"{folder / CONFIG}: base_model_name_or_path is missing, so its base is not known: {mend}")
    try:
        found = resolve(named)
    except WeightsError as problem:
        if name is not None:
            raise
        raise WeightsError(
            f"{folder} is an adapter, and its base cannot be found ({problem}); if it has moved, {mend}"
        ) from problem
    if is_adapter(found):
        raise WeightsError(f"{found} is an adapter too, and no base for {folder}: merge it first, with afina export")
    return named, found


def base_format(folder: Path) -> str | None:
    """How the base was held in training, such as "nf4-bfloat16": as NF4 codes of its weights in bfloat16. None where it
    was dense, or nobody recorded it."""
    found = AdapterFile(folder).metadata.get(BASE_FORMAT)
    if found is not None and not re.fullmatch("nf4-(float32|bfloat16|float16)", found):
        raise WeightsError(
            f"{folder / WEIGHTS}: {BASE_FORMAT} is {show(found)}, expected nf4-bfloat16 or such: save the adapter again"
        )
    return found


def write_adapter(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write both files; ``tensors`` by their names without ``PREFIX``. Raises WeightsError for NaN and infinity too."""
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise WeightsError(f"{folder}: the adapter's tensor {show(name)} holds NaN or infinity: nothing is written")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise WeightsError(f"{folder}: cannot be made ({problem.strerror}): choose another folder") from problem
    write_safetensors(folder / WEIGHTS, {PREFIX + n: x for n, x in tensors.items()}, {"format": "pt", **metadata})
    with open_file(folder / CONFIG, error=WeightsError) as file:
        file.write(json.dumps(config.to_peft(), indent=2, ensure_ascii=False).encode() + b"\n")


def _split(name: str) -> tuple[str, str | None]:
    for suffix, kind in SUFFIXES.items():
        if name.endswith("." + suffix):
            return name.removesuffix("." + suffix), kind
    return name, None


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or the end of it, as PEFT reads them."""
    for pattern, value in patterns.items():
        if _compiled(pattern).fullmatch(module):
            return value
    return default


@lru_cache(MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})")


def _config(path: Path) -> AdapterConfig:
    hf = read_json(path)

    def fail(key: str, expected: str) -> ConfigError:
        name = key if key.isidentifier() and len(key) < 100 else show(key)  # a key of the file's own may be anything
        return ConfigError(f"{path}: {name} = {show(hf.get(key))}: {expected}")

    def names(key: str) -> tuple[str, ...]:
        value = hf.get(key) or ()
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise fail(key, "expected a list of module names")
        return tuple(sorted(value))

    def flag(key: str) -> bool:
        if not isinstance(hf.get(key), bool | None):
            raise fail(key, "expected true or false")
        return bool(hf.get(key))

    def is_rank(value: Any) -> bool:
        return type(value) is int and 1 <= value <= MAX_RANK

    def is_number(value: Any) -> bool:
        return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= MAX_ALPHA

    def pattern(key: str, good: Any) -> dict[str, Any]:
        value = hf.get(key) or {}
        if not isinstance(value, dict) or not all(good(v) for v in value.values()):
            raise fail(key, "expected an object of module names and numbers")
        if len(value) > MAX_PATTERNS:
            raise ConfigError(f"{path}: {key} has {len(value):,} entries: expected at most {MAX_PATTERNS:,}")
        for name in value:
            # Names and the few signs that PEFT's users write, not any expression: a hostile one can run for ever.
            if not re.fullmatch(r"([\w.^$]|\\[.d]){1,200}", name):
                raise fail(key, f"the pattern {show(name)} is not supported: expected names of modules")
        return value

    if hf.get("peft_type") != "LORA":
        raise fail("peft_type", "supported here: LORA")
    if hf.get("bias", "none") != "none":
        raise fail("bias", "trained biases are not supported: train with bias none")
    if hf.get("init_lora_weights", True) not in INITS:
        mend = "save it with PEFT's path_initial_model_for_weight_conversion"
        raise fail("init_lora_weights", f"changes the base too, which the adapter does not fit as it is: {mend}")
    r, alpha, dropout = hf.get("r", 8), hf.get("lora_alpha", 8), hf.get("lora_dropout", 0.0)
    if not is_rank(r):
        raise fail("r", f"expected a whole number from 1 to {MAX_RANK}")
    if not is_number(alpha):
        raise fail("lora_alpha", f"expected a number of at most {MAX_ALPHA:,.0f}")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise fail("lora_dropout", "expected a number from 0 to below 1")
    base = hf.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise fail("base_model_name_or_path", "expected a text")
    config = AdapterConfig(
        r=r,
        alpha=alpha,
        base=base,
        dropout=float(dropout),
        rslora=flag("use_rslora"),
        dora=flag("use_dora"),
        target_modules=names("target_modules"),
        modules_to_save=names("modules_to_save"),
        fan_in_fan_out=flag("fan_in_fan_out"),
        rank_pattern=pattern("rank_pattern", is_rank),
        alpha_pattern=pattern("alpha_pattern", is_number),
    )
    known = HARMLESS | config.to_peft().keys()
    for key, value in hf.items():
        if key not in known and value not in (None, False, {}, []):
            raise fail(key, "not supported (it changes what the adapter computes)")
    return config
