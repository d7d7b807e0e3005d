"""The settings of a training run, and the YAML recipes that hold them.

A setting comes from a recipe, a flag or a Python keyword; all three take the same names (and the aliases that other
trainers use), the same values and the same checks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from afina.engine.recipe_file import read_yaml
from afina.engine.settings import (
    ALPHA,
    BETA,
    DEVICE,
    FRACTION,
    INNER_FRACTION,
    LENGTH,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SEED,
    Settings,
    checked,
    fields,
    setting,
    to_yaml,
)
from afina.errors import ConfigError, nearest
from afina.loaders.jsonfile import show

ADAPTED = ("lora", "qlora")
METHOD_ONLY = {
    **dict.fromkeys(
        (
            "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "modules_to_save", "use_rslora", "use_dora",
            "loraplus_lr_ratio",
        ),
        ADAPTED,
    ),
    "trainable": ("freeze",),
}  # fmt: skip
LISTS = ("lora_target_modules", "modules_to_save", "trainable", "roles_to_train")
# What picks the best model besides the dev loss -> the task that measures it.
EVAL_METRICS = {
    "loss": "loss",
    **dict.fromkeys(("exact_match", "token_f1", "rouge_l", "chrf", "bleu"), "generate"),
    **dict.fromkeys(("accuracy", "macro_f1"), "classify"),
    **dict.fromkeys(("mrr@10", "ndcg@10"), "retrieve"),
}
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Everything that decides a training run. Checked when it is made; saved with the run as ``recipe.yaml``."""

    model: str | None = setting(
        None,
        "pretrained model: a folder, a run folder (its best model), a GGUF file, a hub id, or afina-tiny",
        aliases=("model_name_or_path", "base_model"),
    )
    data: str | None = setting(None, "training rows: .jsonl, .json, .csv, .tsv, .parquet, .txt, or a folder of them")
    output_dir: str | None = setting(None, "run folder to create: checkpoints, metrics and the best model")
    val_file: str | None = setting(None, "held-out rows (default: val_size of the data)")
    method: str = setting(
        "full",
        "which weights train: all, adapters on frozen weights (qlora: on 4-bit ones), or those of trainable",
        aliases=("finetuning_type", "adapter"),
        choices=("full", "lora", "qlora", "freeze"),
    )
    lora_r: int | None = setting(None, "rank of the adapters (default: 16)", aliases=("lora_rank",), limit=POSITIVE)
    lora_alpha: float | None = setting(
        None,
        "scales the adapters, by alpha / r, with rsLoRA by alpha / sqrt(r) (default: a scale of 2)",
        limit=ALPHA,
    )
    lora_dropout: float | None = setting(
        None, "share of the adapters' inputs that is dropped in training (default: 0)", limit=BETA
    )
    lora_target_modules: tuple[str, ...] | None = setting(
        None,
        "linear layers with adapters, such as q_proj,v_proj (default: all-linear)",
        aliases=("lora_target", "target_modules"),
    )
    modules_to_save: tuple[str, ...] | None = setting(
        None,
        "modules that train whole beside the adapters, such as embed_tokens,lm_head",
        aliases=("additional_target", "lora_modules_to_save"),
    )
    use_rslora: bool | None = setting(None, "rank-stabilised scale (rsLoRA)", aliases=("peft_use_rslora",))
    use_dora: bool | None = setting(None, "learn magnitude and direction apart (DoRA)", aliases=("peft_use_dora",))
    loraplus_lr_ratio: float | None = setting(
        None, "learning rate of the adapters' B over that of their A (LoRA+; default: 1)", limit=POSITIVE
    )
    trainable: tuple[str, ...] | None = setting(
        None,
        "method freeze: tensors that train, by name or pattern (default: last quarter of the layers, norm and head)",
        aliases=("unfrozen_parameters",),
    )
    init: str = setting("pretrained", "start from trained weights or random ones", choices=("pretrained", "random"))
    config: str | None = setting(None, "config.json of the model to build (init random)")
    tokenizer: str | None = setting(None, "tokenizer folder (default: the model's own)")
    max_length: int = setting(
        1024, "tokens in a row at most", aliases=("max_seq_length", "sequence_len", "cutoff_len"), limit=LENGTH
    )
    batch_size: int = setting(
        8, "rows in a micro-batch", aliases=("micro_batch_size", "per_device_train_batch_size"), limit=POSITIVE
    )
    gradient_accumulation_steps: int = setting(1, "micro-batches in an optimizer step", limit=POSITIVE)
    epochs: float = setting(3.0, "passes over the data", aliases=("num_train_epochs", "num_epochs"), limit=POSITIVE)
    max_steps: int | None = setting(None, "optimizer steps (instead of epochs)", limit=POSITIVE)
    learning_rate: float | None = setting(
        None, "peak learning rate (default: by the method and the model's width)", aliases=("lr",), limit=RATE
    )
    lr_scheduler_type: str = setting(
        "cosine", "learning-rate schedule after the warm-up", choices=("cosine", "linear", "constant", "wsd")
    )
    warmup_ratio: float = setting(0.03, "share of the steps that warm up", limit=FRACTION)
    warmup_steps: int | None = setting(None, "steps that warm up (instead of warmup_ratio)", limit=NOT_NEGATIVE)
    min_lr_ratio: float = setting(0.0, "last learning rate as a share of the peak", limit=FRACTION)
    weight_decay: float = setting(
        None, "decoupled decay of the weight matrices (default: 0.01, with adapters 0)", limit=NOT_NEGATIVE
    )
    optim: str = setting(
        "adamw",
        "what AdamW holds: fp32 weights and moments, moments of 8 bits, or bf16 weights and moments alone",
        choices=("adamw", "adamw_8bit", "adamw_bf16"),
    )
    optim_in_backward: bool = setting(
        False,
        "move each weight as soon as its gradient is there, which is then freed: needs max_grad_norm 0 and one "
        "micro-batch a step",
        aliases=("optimizer_in_bwd",),
    )
    offload_optimizer: bool = setting(
        False,
        "keep what AdamW holds in the host's memory, gradients too; each weight moves on the device all the same",
    )
    adam_beta1: float = setting(0.9, "decay of AdamW's first moment", limit=BETA)
    adam_beta2: float = setting(0.999, "decay of AdamW's second moment", limit=BETA)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", limit=POSITIVE)
    max_grad_norm: float = setting(1.0, "clip the gradient's norm to this (0: no clipping)", limit=NOT_NEGATIVE)
    label_smoothing: float = setting(
        0.0, "share of a target's weight in the training loss that is spread over the vocabulary", limit=BETA
    )
    z_loss: float = setting(
        0.0, "adds this times logsumexp(logits)^2 to the training loss of a token", limit=NOT_NEGATIVE
    )
    val_size: float = setting(0.1, "share of the rows held out as dev rows (at least one)", limit=INNER_FRACTION)
    eval_steps: int | None = setting(None, "steps between evaluations (default: ten in the run)", limit=POSITIVE)
    eval_metric: str = setting(
        "loss",
        "what picks the best model and stops early: the dev loss, or a metric of answers to up to 100 dev rows",
        choices=tuple(EVAL_METRICS),
    )
    save_steps: int | None = setting(None, "steps between checkpoints (default: at each evaluation)", limit=POSITIVE)
    logging_steps: int = setting(10, "steps between lines of progress where there is no bar", limit=POSITIVE)
    save_total_limit: int = setting(2, "checkpoints kept", limit=POSITIVE)
    early_stopping_patience: int | None = setting(
        None, "stop after this many evaluations without a better dev loss (or eval_metric)", limit=POSITIVE
    )
    train_on_prompt: bool = setting(
        False, "learn the prompts too, not only the completions", aliases=("train_on_inputs", "completion_only_loss")
    )
    roles_to_train: tuple[str, ...] = setting(
        ("assistant",), "whose turns of a conversation are learnt: assistant, or several, such as user,assistant"
    )
    packing: bool = setting(True, "concatenate rows instead of padding them; rows stay isolated, the maths is the same")
    activation_policy: str = setting(
        "auto",
        "what the backward pass finds kept, from fast to lean: all, not what is cheap to recompute, the layers' "
        "inputs, or those in the host's memory; auto is selective on a CPU and with adapters, else keep",
        choices=("auto", "keep", "selective", "full", "offload"),
    )
    offload_params: bool = setting(
        False,
        "keep the layers' matrices in the host's memory, and bring each layer when its turn comes: with full and "
        "freeze it needs offload_optimizer",
        aliases=("offload_param",),
    )
    gradient_checkpointing: bool = setting(False, "the same as activation_policy full: less memory, more time")
    lean_loss: bool = setting(
        False, "compute the loss in tiles of the logits: 100 MB at most, a third to two thirds more work"
    )
    attention_backend: str = setting(
        "auto",
        "what computes attention in training: the fastest here, our Triton kernels, torch's own, or plain torch",
        choices=("auto", "triton", "sdpa", "torch"),
    )
    dtype: str = setting(
        "auto",
        "auto is bfloat16 on a GPU and on a CPU that is made for it",
        choices=("auto", "float32", "bfloat16"),
    )
    linear_dtype: str = setting(
        "auto",
        "what the layers' matrices multiply in while they train: auto is dtype, fp8 needs a GPU from Ada or Hopper on",
        choices=("auto", "fp8"),
    )
    cuda_graph: str = setting(
        "auto",
        "repeat a step's launches on a GPU as a CUDA graph, checked on the first rows: auto is true where that check "
        "has passed on this GPU before",
        choices=("auto", "true", "false"),
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", limit=DEVICE)
    seed: int = setting(42, "seed of the split, the order of the rows and a random start", limit=SEED)
    threads: int | None = setting(None, "CPU threads (default: torch's choice)", limit=POSITIVE)
    report_to: str = setting("none", "where else metrics go", choices=("none", "tensorboard"))
    on_long: str = setting(
        "drop",
        "rows above max_length: drop them, truncate the prompt's left, or stop with an error",
        choices=("drop", "truncate", "error"),
    )
    columns: dict[str, str] = setting(  # noqa: RUF009 (a new dict each time)
        dict, "rename the data's columns: prompt=question,completion=answer"
    )
    skip_bad_lines: bool = setting(False, "count malformed lines and go on")
    allow_nonfinite: bool = setting(False, "accept weights that hold NaN or Inf")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "output_dir"):
            if getattr(self, name) is None:
                raise ConfigError(f"{name} is missing: give --{name}, or {name}: in the recipe")
        for name in LISTS:
            value = getattr(self, name)
            if value is not None:  # as in q_proj,v_proj
                self._set(name, tuple(part.strip() for text in value for part in text.split(",") if part.strip()))
        for role in self.roles_to_train or ("",):
            if role not in ROLES:
                raise ConfigError(
                    f"roles_to_train holds {show(role)}; expected some of {', '.join(ROLES)}{nearest(role, ROLES)}"
                )
        for name, methods in METHOD_ONLY.items():
            if self.method not in methods and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is for method {' and '.join(methods)}, but method is {self.method}: leave it out, or use "
                    f"method {methods[0]}"
                )
        for name, value in self._method_defaults().items():
            if getattr(self, name) is None:
                self._set(name, value)
        if self.gradient_checkpointing and self.activation_policy in ("keep", "selective"):
            raise ConfigError(
                f"gradient_checkpointing is true, which is activation_policy full, but activation_policy is "
                f"{self.activation_policy}: keep one of them"
            )
        for name, needed in (("max_grad_norm", 0), ("gradient_accumulation_steps", 1)):
            if self.optim_in_backward and getattr(self, name) != needed:
                raise ConfigError(
                    f"optim_in_backward moves a weight as soon as its gradient is there, but {name} is "
                    f"{getattr(self, name):g}, for which all gradients must be there first: set {name} to {needed}"
                )
        if self.linear_dtype == "fp8" and self.method in ADAPTED:
            raise ConfigError(
                f"linear_dtype is fp8, which is for matrices that train, but method is {self.method}, which trains "
                "adapters beside frozen ones: set linear_dtype to auto"
            )
        self._check_offload_params()
        if self.attention_backend == "sdpa" and self.packing:
            raise ConfigError(
                "attention_backend is sdpa, which cannot keep packed rows apart, but packing is true: set packing to "
                "false, or use attention_backend auto"
            )
        if self.method != "full" and self.init == "random":
            raise ConfigError(f"method {self.method} needs pretrained weights, but init is random: use method full")
        if self.init == "pretrained":
            if self.model is None:
                raise ConfigError(
                    "model is missing: give --model (a folder, a GGUF file, a hub id or afina-tiny) or --init random"
                )
            if self.config is not None:
                raise ConfigError(
                    "config is for init random, but init is pretrained: leave config out, or use init random"
                )
        else:
            if self.model is not None:
                raise ConfigError("init random builds the model from config: leave out model, or use init pretrained")
            for name, what in (("config", "config.json of the model to build"), ("tokenizer", "folder of a tokenizer")):
                if getattr(self, name) is None:
                    raise ConfigError(f"{name} is missing: init random needs --{name}, the {what}")

    def _check_offload_params(self) -> None:
        if not self.offload_params:
            return
        if self.activation_policy in ("keep", "selective"):
            raise ConfigError(
                "offload_params brings a layer once for its forward pass and once more to run it again, but "
                f"activation_policy is {self.activation_policy}: set activation_policy to full or offload"
            )
        if self.method == "qlora":
            raise ConfigError(
                "offload_params is for dense matrices, but method is qlora, whose 4-bit ones stay on the device: set "
                "offload_params to false"
            )
        if self.method not in ADAPTED and not self.offload_optimizer:
            raise ConfigError(
                "offload_params has two layers' weights on the device at a time, and what AdamW holds must come with "
                "them, but offload_optimizer is false: set offload_optimizer to true"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _method_defaults(self) -> dict[str, Any]:
        """What the method makes of settings that are left open, so that the saved recipe says it all. (The learning
        rate depends on the model too: ``methods.default_learning_rate``.)"""
        if self.method not in ADAPTED:
            return {"weight_decay": 0.01}
        rank = 16 if self.lora_r is None else self.lora_r
        return {
            "weight_decay": 0.0,
            "lora_r": rank,
            "lora_alpha": 2.0 * (math.sqrt(rank) if self.use_rslora else rank),
            "lora_dropout": 0.0,
            "lora_target_modules": ("all-linear",),
            "modules_to_save": (),
            "use_rslora": False,
            "use_dora": False,
            "loraplus_lr_ratio": 1.0,
        }

    @classmethod
    def resolve(
        cls,
        recipe_path: str | Path | None = None,
        overrides: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        *,
        prefix: str = "",
    ) -> TrainConfig:
        """The recipe's settings with ``overrides`` over them.

        ``overrides`` are names (aliases too) and values; a None means not given. ``prefix`` is put before an
        override's name in messages ("--" for flags).
        """
        given = _canonical(read_yaml(Path(recipe_path))) if recipe_path is not None else {}
        pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
        given |= _canonical((prefix + name, name, value) for name, value in pairs)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, in the order of the fields."""
        return dataclasses.asdict(self)

    def to_yaml(self, notes: Mapping[str, str] = MappingProxyType({})) -> str:
        """The resolved recipe, with comments on some settings; reading it again gives an equal TrainConfig."""
        return to_yaml(self.to_dict(), notes)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


# Names that only mean something on the command line: answered, not guessed at.
_NOT_HERE = {"resume_from_checkpoint": "is a flag, not a setting of the run: use afina train --resume"}
_INVERTED = ("completion_only_loss",)


@cache
def aliases() -> dict[str, str]:
    """Every accepted name of a setting -> its own name."""
    return {alias: name for name, f in fields(TrainConfig).items() for alias in (name, *f.metadata["aliases"])}


def _canonical(items: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """(where, name or alias, value) triples -> checked values by setting; contradictions and unknown names refused."""
    given: dict[str, Any] = {}
    first: dict[str, str] = {}
    for where, key, value in items:
        if value is None or (key == "resume_from_checkpoint" and value is False):
            continue
        if key in _NOT_HERE:
            raise ConfigError(f"{where} {_NOT_HERE[key]}")
        name = aliases().get(key)
        if name is None:
            raise ConfigError(f"{where} is not a setting{nearest(key, aliases())}")
        value = checked(TrainConfig, name, value, where)
        if key in _INVERTED:
            value = not value
        if name in given and given[name] != value:
            both = where if first[name] == where else f"{first[name]} and {where}"
            raise ConfigError(f"{both} give {name} two different values: keep one of them")
        given[name] = value
        first[name] = where
    return given
