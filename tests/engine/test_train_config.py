"""TrainConfig: names, values, recipes; one line of error for everything that cannot be honoured."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from afina.engine.settings import fields
from afina.engine.train_config import TrainConfig, aliases
from afina.errors import ConfigError

BASE = {"model": "m", "data": "d.jsonl", "output_dir": "out"}


def made(**given: Any) -> TrainConfig:
    return TrainConfig.resolve(None, BASE | given)


def bomb() -> str:
    """A few hundred bytes of YAML whose repr would be 10 ** 12 characters long."""
    inner = "&a [" + "x," * 9 + "x]"
    for a, b in pairwise("abcdefghijkl"):
        inner = f"&{b} [{inner}" + f",*{a}" * 9 + "]"
    return inner


def recipe(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as error:
        TrainConfig.resolve(recipe(folder, text), BASE)
    assert "\n" not in str(error.value)
    return str(error.value)


# The table of names that newcomers bring, in the words of other trainers; the first is ours.
NAMES = {
    "model": ["model_name_or_path", "base_model"],
    "max_length": ["max_seq_length", "sequence_len", "cutoff_len"],
    "batch_size": ["micro_batch_size", "per_device_train_batch_size"],
    "epochs": ["num_train_epochs", "num_epochs"],
    "learning_rate": ["lr"],
    "method": ["finetuning_type", "adapter"],
    "train_on_prompt": ["train_on_inputs", "completion_only_loss"],
}


def test_every_known_name_is_accepted() -> None:
    for ours, others in NAMES.items():
        for other in others:
            assert aliases()[other] == ours
    own = """
        gradient_accumulation_steps max_steps lr_scheduler_type warmup_ratio warmup_steps val_size eval_steps save_steps
        logging_steps save_total_limit early_stopping_patience output_dir report_to seed packing gradient_checkpointing
    """
    assert set(own.split()) <= set(fields(TrainConfig))
    assert made(per_device_train_batch_size=3, lr="1e-4", sequence_len=64).batch_size == 3


def test_completion_only_loss_is_the_opposite_of_train_on_prompt() -> None:
    assert made(completion_only_loss=False).train_on_prompt is True
    assert made(completion_only_loss=True).train_on_prompt is False
    assert made(train_on_inputs=True).train_on_prompt is True
    assert made(completion_only_loss=False, train_on_prompt=True).train_on_prompt is True
    with pytest.raises(ConfigError, match="two different values"):
        made(completion_only_loss=True, train_on_prompt=True)


def test_two_names_of_one_setting_must_agree(tmp_path: Path) -> None:
    assert made(lr=1e-4, learning_rate="1e-4").learning_rate == 1e-4
    message = refused(tmp_path, "lr: 1e-4\nepochs: 1\nlearning_rate: 2e-4\n")
    assert "line 1: lr and" in message
    assert "line 3: learning_rate give learning_rate two different values" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("epochs", 2, 2.0),
        ("batch_size", 8.0, 8),
        ("batch_size", "16", 16),
        ("packing", "false", False),
        ("packing", "on", True),
        ("dtype", "bf16", "bfloat16"),
        ("device", "cuda:1", "cuda:1"),
        ("warmup_steps", 0, 0),
        ("max_grad_norm", 0, 0.0),
        ("label_smoothing", 0, 0.0),
        ("z_loss", "1e-4", 1e-4),
        ("data", Path("a/b"), "a/b"),
        ("columns", "prompt=question, completion=answer", {"prompt": "question", "completion": "answer"}),
        ("columns", {"prompt": "q"}, {"prompt": "q"}),
    ],
)
def test_values_take_the_settings_type(name: str, value: Any, expected: Any) -> None:
    found = getattr(made(**{name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("learning_rate", -1, "above 0 and at most 1"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", 2e5, "at most 1"),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", "inf", "a number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", True, "a number"),
        ("learning_rate", [1], "a number"),
        ("batch_size", 0, "above 0"),
        ("batch_size", 1.5, "a whole number"),
        ("batch_size", True, "a whole number"),
        ("batch_size", "9" * 5000, "a whole number"),
        ("gradient_accumulation_steps", 0, "above 0"),
        ("epochs", 0, "above 0"),
        ("max_steps", 0, "above 0"),
        ("max_length", 1, "2 or more"),
        ("val_size", 0, "above 0 and below 1"),
        ("val_size", 1, "above 0 and below 1"),
        ("warmup_ratio", 1.5, "from 0 to 1"),
        ("warmup_steps", -1, "0 or more"),
        ("min_lr_ratio", -0.1, "from 0 to 1"),
        ("weight_decay", -0.1, "0 or more"),
        ("weight_decay", "inf", "expected a number"),
        ("max_grad_norm", float("inf"), "expected a number"),
        ("adam_beta2", 1, "below 1"),
        ("adam_epsilon", 0, "above 0"),
        ("max_grad_norm", -1, "0 or more"),
        ("seed", -1, "from 0"),
        ("seed", 2**63, "from 0"),
        ("save_total_limit", 0, "above 0"),
        ("early_stopping_patience", 0, "above 0"),
        ("threads", 0, "above 0"),
        ("label_smoothing", 1, "from 0 to below 1"),
        ("label_smoothing", -0.1, "from 0 to below 1"),
        ("z_loss", -1e-4, "0 or more"),
        ("z_loss", "inf", "a number"),
        ("optim", "adam_8bit", "did you mean 'adamw_8bit'"),
        ("attention_backend", "flash", "auto, triton, sdpa, torch"),
        ("attention_backend", "sdpa", "cannot keep packed rows apart, but packing is true"),
        ("lean_loss", "maybe", "true or false"),
        ("packing", "maybe", "true or false"),
        ("packing", 1, "true or false"),
        ("lr_scheduler_type", "cosin", "did you mean 'cosine'"),
        ("dtype", "float16", "auto, float32, bfloat16"),
        ("on_long", "cut", "drop, truncate, error"),
        ("report_to", "wandb", "none, tensorboard"),
        ("device", "gpu", "auto, cpu, cuda or cuda:N"),
        ("method", "lra", "did you mean 'lora'"),
        ("data", "", "text"),
        ("data", 3, "text"),
        ("columns", "prompt", "pairs like"),
        ("columns", "prompt=a,prompt=b", "pairs like"),
        ("columns", {"prompt": 3}, "pairs like"),
        ("lora_r", 8, "lora_r is for method lora and qlora, but method is full: leave it out, or use method lora"),
        ("lora_alpha", 1e300, "above 0 and at most 1e6"),
        ("trainable", "lm_head", "trainable is for method freeze"),
        ("learning_rte", 1e-4, "did you mean 'learning_rate'"),
        ("resume_from_checkpoint", True, "--resume"),
    ],
)
def test_wrong_values_are_refused_in_one_line(name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        made(**{name: value})
    message = str(error.value)
    assert name in message
    assert words in message
    assert "\n" not in message
    assert len(message) < 250


def test_the_dataclass_itself_checks() -> None:
    assert TrainConfig(**BASE, batch_size="4").batch_size == 4  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size is 0"):
        TrainConfig(**BASE, batch_size=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": None}, "data is missing"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"model": None}, "model is missing"),
        ({"config": "c.json"}, "init random"),
        ({"init": "random"}, "leave out model"),
        ({"init": "random", "model": None, "tokenizer": "t"}, "config is missing"),
        ({"init": "random", "model": None, "config": "c.json"}, "tokenizer is missing"),
        (
            {"gradient_checkpointing": True, "activation_policy": "selective"},
            "gradient_checkpointing is true, which is activation_policy full, but activation_policy is selective",
        ),
        ({"optim_in_backward": True}, "but max_grad_norm is 1, .*: set max_grad_norm to 0"),
        (
            {"optim_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2},
            "but gradient_accumulation_steps is 2, .*: set gradient_accumulation_steps to 1",
        ),
        ({"activation_policy": "ofload"}, "expected auto, keep, selective, full, offload .did you mean 'offload'"),
    ],
)
def test_settings_that_contradict_each_other(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(**given)


def test_a_recipe_and_flags_over_it(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        b"\xef\xbb\xbf# a comment\r\nbase_model: x\r\nlr: 1e-4\r\nmax_steps:\r\nadapter: null\r\n"
        b"resume_from_checkpoint: false\r\ncolumns:\r\n  prompt: q\r\n",
    )
    config = TrainConfig.resolve(path, [("learning_rate", "3e-4"), ("data", "d"), ("output_dir", "o")])
    assert (config.model, config.learning_rate, config.max_steps) == ("x", 3e-4, None)
    assert config.columns == {"prompt": "q"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nbatch_sise: 4\n", "line 2: batch_sise is not a setting (did you mean 'batch_size'?)"),
        ("seed: 1\n\nseed: 2\n", "line 3: seed is given a second time"),
        ("seed: 1\nseed: 1\n", "line 2: seed is given a second time"),
        ("epochs: 1\nseed: -4\n", "line 2: seed is -4; expected a whole number from 0 to 2**63 - 1"),
        ("- a\n- b\n", "found no settings"),
        ("just words", "found no settings"),
        ("seed: [1, 2\n", "not valid YAML"),
        ("seed: 1\n\tepochs: 2\n", "line 2: not valid YAML"),
        ("seed: !!python/object/apply:os.system ['true']\n", "line 1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("{" * 5000, "not valid YAML"),
        ("1: 2\n", "line 1: 1 is not a setting"),
        (b"seed: \xff\n", "not UTF-8 (byte 6)"),
        (b"seed: \x00\n", "not valid YAML"),
        ("#" * (1 << 20) + "\n", "is no recipe"),
        ("seed: 2026-13-45\n", "month must be in 1..12"),
        ("seed: 2026-11-12\n", "line 1: seed is datetime.date(2026, 11, 12); expected a whole number"),
        ("columns:\n  prompt: a\n  prompt: b\n", "line 3: prompt is given a second time, after line 2"),
        ("? [seed]\n: 1\n", "line 1: a list or a mapping stands where a name was expected"),
        ("seed: *nothing\n", "line 1: not valid YAML"),
        ("seed: !!int ''\n", "line 1: seed: no int: mend it"),
        ("model: m\npacking: !!bool x\n", "line 2: packing: no bool: mend it"),
        ("seed: !!timestamp x\n", "line 1: seed: no timestamp: mend it"),
        ("seed: !!float .\n", "line 1: seed: no float (could not convert"),
        (f"seed: {bomb()}\n", "line 1: seed is [[[...], [...],"),
    ],
)
def test_wrong_recipes(tmp_path: Path, text: str | bytes, words: str) -> None:
    message = refused(tmp_path, text)
    assert words in message
    assert "recipe.yaml" in message


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        TrainConfig.resolve(tmp_path / "no.yaml", BASE)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        TrainConfig.resolve(tmp_path, BASE)


def test_an_empty_recipe_says_nothing(tmp_path: Path) -> None:
    assert TrainConfig.resolve(recipe(tmp_path, "# nothing yet\n"), BASE) == made()


def test_saved_and_read_again_is_equal(tmp_path: Path) -> None:
    config = made(lr=3e-5, epochs=0.5, columns={"prompt": "frage ü"}, adam_epsilon=1e-8, warmup_steps=0, data="a: b #c")
    config.save(tmp_path / "r.yaml")
    assert TrainConfig.resolve(tmp_path / "r.yaml") == config
    assert list(yaml.safe_load(config.to_yaml())) == list(fields(TrainConfig))


def test_every_setting_is_documented() -> None:
    for name, f in fields(TrainConfig).items():
        assert f.metadata["help"], name
        default = f.default
        if f.metadata["choices"]:
            assert default in f.metadata["choices"], name
        if f.metadata["limit"] and default is not None:
            assert f.metadata["limit"][1](default), name


def test_each_method_has_its_defaults_and_writes_them_into_the_recipe(tmp_path: Path) -> None:
    full, lora = made(), made(method="lora")
    assert (full.learning_rate, full.weight_decay, full.lora_r) == (None, 0.01, None)
    assert (lora.learning_rate, lora.weight_decay, lora.lora_r, lora.lora_alpha) == (None, 0.0, 16, 32.0)
    assert lora.lora_target_modules == ("all-linear",)
    assert made(method="qlora", lora_rank=4).lora_alpha == 8.0
    assert made(method="lora", lora_r=16, use_rslora=True).lora_alpha == 8.0
    assert made(method="freeze", lr=1e-3).learning_rate == 1e-3
    again = TrainConfig.resolve(recipe(tmp_path, lora.to_yaml()))
    assert again == lora
    assert "lora_alpha: 32.0" in lora.to_yaml()


def test_lists_of_modules_may_be_one_text(tmp_path: Path) -> None:
    config = made(method="lora", lora_target="q_proj, v_proj", modules_to_save=["embed_tokens", "lm_head"])
    assert config.lora_target_modules == ("q_proj", "v_proj")
    assert config.modules_to_save == ("embed_tokens", "lm_head")
    assert made(method="freeze", trainable="layers.1,lm_head").trainable == ("layers.1", "lm_head")


def test_adapters_need_pretrained_weights() -> None:
    with pytest.raises(ConfigError, match="method lora needs pretrained weights"):
        TrainConfig.resolve(
            None, {**BASE, "model": None, "method": "lora", "init": "random", "config": "c", "tokenizer": "t"}
        )
