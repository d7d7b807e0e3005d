"""What a run is opened from: its rows, its model, and the settings that wait for these to be known."""

from __future__ import annotations

from dataclasses import replace

import torch

from afina.engine.cuda_graph import decide
from afina.engine.fp8 import use_fp8
from afina.engine.methods import choose_trained, default_learning_rate
from afina.engine.model import GPT
from afina.engine.run_folder import RunFolder
from afina.engine.train_config import TrainConfig
from afina.engine.training_dtype import training_dtype
from afina.engine.weights import choose_device, load_model, new_model
from afina.loaders.data.dataset import Data, prepare
from afina.loaders.jsonfile import show
from afina.loaders.text.tokenizer import Tokenizer, check_vocab


def read_data(config: TrainConfig, tokenizer: Tokenizer, *, progress: bool) -> Data:
    """The run's training and dev rows: the same for the same config and files."""
    return prepare(
        str(config.data),
        tokenizer,
        max_length=config.max_length,
        on_long=config.on_long,
        train_on_prompt=config.train_on_prompt,
        val_file=config.val_file,
        val_size=config.val_size,
        seed=config.seed,
        columns=config.columns,
        skip_bad_lines=config.skip_bad_lines,
        roles=config.roles_to_train,
        progress=progress,
    )


def read_model(
    config: TrainConfig, tokenizer: Tokenizer, folder: RunFolder, *, weights: bool
) -> tuple[GPT, TrainConfig, dict[str, str]]:
    """The run's model, ready to train; the config, in which nothing is left open any more; and notes: a setting that
    was left open -> in one line, why it is what it is.

    Without ``weights`` the model has shapes only. A run that goes on in ``folder`` computes in the dtype it began in,
    whatever this machine would choose.
    """
    notes = {}
    if config.dtype == "auto":
        dtype = folder.recorded("dtype")
        if dtype is None:
            dtype, notes["dtype"] = training_dtype(choose_device(config.device))
        config = replace(config, dtype=dtype)
    model = _load(config, tokenizer, weights=weights)
    config = choose_trained(config, model)
    rate = folder.recorded("learning_rate")
    if config.learning_rate is None:  # a run that goes on has a rate, which may have been lowered
        if rate is None:
            rate, notes["learning_rate"] = default_learning_rate(config.method, model.config.hidden_size)
        config = replace(config, learning_rate=rate)
    elif rate not in (None, config.learning_rate):
        notes["learning_rate"] = f"it was {show(rate)} before the run went on here"
    if config.linear_dtype == "fp8":
        notes["linear_dtype"] = use_fp8(model, choose_device(config.device))
    if (reason := decide(config, device_of(model, config))[1]) is not None:
        notes["cuda_graph"] = reason
    return model, config, notes


def _load(config: TrainConfig, tokenizer: Tokenizer, *, weights: bool) -> GPT:
    if config.init == "random":
        assert config.config is not None  # TrainConfig checks it
        model = new_model(
            config.config,
            vocab_size=tokenizer.vocab_size,
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
            weights=weights,
            offload_params=config.offload_params,
        )
    else:
        model = load_model(
            str(config.model),
            dtype=config.dtype,
            device=config.device,
            allow_nonfinite=config.allow_nonfinite,
            quantize="nf4" if config.method == "qlora" else None,
            weights=weights,
            offload_params=config.offload_params,
        )
    check_vocab(tokenizer, model.config.vocab_size)
    model.set_activation_policy(activation_policy(model, config))
    return model.train()


def activation_policy(model: GPT, config: TrainConfig) -> str:
    """The policy that the run's settings come to.

    On a CPU what norms and activations compute again costs a dense step 0 to 3 % of its time, and what need not be kept
    for them is an eighth of its memory.
    """
    if config.activation_policy != "auto":
        return config.activation_policy
    if config.gradient_checkpointing or config.offload_params:
        return "full"
    return "selective" if device_of(model, config).type == "cpu" else "auto"


def device_of(model: GPT, config: TrainConfig) -> torch.device:
    """Where the run computes: where its model is, or, of a model that has shapes only, where it would be."""
    device = model.device
    return choose_device(config.device) if device.type == "meta" else device
