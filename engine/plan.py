"""Which settings let a run fit into a GPU's memory, from the model's config alone: ``afina plan``.

The model is built on device "meta", without a byte of weights, and `engine/memory.py` predicts each combination of what
costs work or precision and saves memory: what of the activations is kept, the lean loss, the optimizer in the backward
pass, what AdamW holds, and whether that and the layers' matrices lie in the host's memory. They are ordered by the work
of a step, counted in products: a layer that is computed again costs its forward pass once more, a lean loss half of the
head's products, and what comes over the link as many as the device makes in that time, by ``LINK`` and ``RATE``, as if
none of it were hidden behind the computation. Of equal work the one that leaves the optimizer as it is comes first. All
rows of the micro-batch count as ``max_length`` long with a loss everywhere, so no batch of a run takes more;
``RESERVE`` is kept aside for what is no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch

from afina.engine.cuda_graph import ruled_out
from afina.engine.known_models import KNOWN
from afina.engine.linear import Linear
from afina.engine.memory import MemoryPlan, plan
from afina.engine.methods import choose_trained
from afina.engine.model import GPT
from afina.engine.model_config import ModelConfig
from afina.engine.nf4_weight import shapes_of_nf4
from afina.engine.optim import AdamW
from afina.engine.optim_offload import offloaded
from afina.engine.train_config import ADAPTED, TrainConfig
from afina.engine.weight_offload import layer_bytes
from afina.errors import ConfigError, nearest

RESERVE = 600_000_000  # CUDA's context and cuBLAS's workspace, and what the allocator cannot use
POLICIES = ("keep", "selective", "full", "offload")
WORTH = 0.005  # share of the memory that an option must save to be shown
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LONGEST = 1 << 20  # the longest row that is looked for
LINK = 25e9  # bytes a second from the host to the device: PCIe 4.0 with 16 lanes
RATE = 50e12  # multiply-adds a second of a device that needs this: 100 TFLOP/s
Place = tuple[bool, bool]  # offload_optimizer, offload_params
OFFLOADS = ("offload_optimizer", "offload_params")
PLACES: dict[str, tuple[Place, ...]] = {
    "full": ((False, False), (True, False), (True, True)),
    "freeze": ((False, False), (True, False), (True, True)),
    "lora": ((False, False), (False, True)),
    "qlora": ((False, False),),
}


class Combination(NamedTuple):
    """The settings that a plan chooses."""

    optim: str
    optim_in_backward: bool
    place: Place
    activation_policy: str
    lean_loss: bool

    @property
    def settings(self) -> dict[str, Any]:
        found = self._asdict()
        optimizer, params = found.pop("place")
        return found | {"offload_optimizer": optimizer, "offload_params": params}


def parse_memory(text: str) -> int:
    """Bytes: "24GB" is 24e9, "24 GiB" 24 * 2**30, "24000000000" itself. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?i?)b?\s*", text.lower())
    size = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if size < 1 << 20:
        raise ConfigError(
            f"--memory is {text[:40]!r}; expected the device's memory, such as 24GB, 24 GiB or 24000000000"
        )
    return size


@dataclass(frozen=True)
class Option:
    """A combination of settings: the work of its step over that of the fastest, and its memory."""

    settings: dict[str, Any]
    work: float
    memory: MemoryPlan

    @property
    def needed(self) -> int:
        """Bytes of the device, with what is kept aside."""
        return self.memory.total + RESERVE

    def to_dict(self) -> dict[str, Any]:
        memory = {**self.memory.to_dict(), "reserve": RESERVE, "needed": self.needed}
        return {"settings": self.settings, "work": round(self.work, 3), "memory": memory}


class Planner:
    """The combinations for one run, a ``TrainConfig``, on a model of this config.json (its contents)."""

    def __init__(self, config: TrainConfig, hf: Mapping[str, Any], *, fixed: set[str]) -> None:
        """``fixed``: settings that somebody has chosen, and that are left as they are."""
        self.config, self.fixed = config, fixed
        dtype = {"float32": torch.float32}.get(config.dtype, torch.bfloat16)
        self.model = GPT(ModelConfig.from_hf(hf), device="meta", dtype=dtype)
        self.model.hf_config = dict(hf)
        if config.method == "qlora":
            for layer in self.model.layers.modules():
                if isinstance(layer, Linear):
                    layer.hold(None)
                    layer.hold(shapes_of_nf4(layer.out_features, layer.in_features, dtype))
        choose_trained(config, self.model.train())
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.places = [
            place for place in PLACES[config.method]
            if all(place[i] == getattr(config, name) for i, name in enumerate(OFFLOADS) if name in fixed)
        ] or [(config.offload_optimizer, config.offload_params)]  # fmt: skip
        self.optimizers: dict[tuple[str, bool, bool], AdamW] = {}
        for name in self._choices("optim", self._optims(dtype)):
            for there, inside in product({place[0] for place in self.places}, (False, True)):
                names = offloaded(self.model) if there else ()
                made = AdamW(self.model, decay=set(), variant=name, offload=names, gradients=not inside)
                self.optimizers[name, there, inside] = made

    def _optims(self, dtype: torch.dtype) -> tuple[str, ...]:
        """What AdamW may hold, the most precise first. For adapters it is too little to matter."""
        if self.config.method in ADAPTED:
            return ("adamw",)
        return ("adamw", "adamw_8bit", "adamw_bf16") if dtype == torch.bfloat16 else ("adamw", "adamw_8bit")

    def _choices(self, name: str, all_of_them: tuple[Any, ...]) -> tuple[Any, ...]:
        return (getattr(self.config, name),) if name in self.fixed else all_of_them

    def _combinations(self) -> Iterator[Combination]:
        policies = self._choices("activation_policy", POLICIES)
        if "gradient_checkpointing" in self.fixed and self.config.gradient_checkpointing:
            policies = ("full", "offload")
        alone = self.config.gradient_accumulation_steps == 1 and not (
            "max_grad_norm" in self.fixed and self.config.max_grad_norm
        )
        inside = self._choices("optim_in_backward", (False, True) if alone else (False,))
        optims = dict.fromkeys(name for name, *_ in self.optimizers)
        every = product(optims, inside, self.places, policies, self._choices("lean_loss", (False, True)))
        for combination in map(Combination._make, every):
            if not combination.place[1] or combination.activation_policy in ("full", "offload"):
                yield combination

    def options(self, *, batch_size: int, max_length: int) -> list[Option]:
        """From the fastest to the leanest. Each needs less memory than all that are faster, by ``WORTH`` at least but
        for the leanest of all."""
        combinations = enumerate(self._combinations())
        found = [
            (self._work(c, batch_size, max_length), rank, self._option(c, batch_size * max_length))
            for rank, c in combinations
        ]
        found.sort(key=lambda x: x[:2])
        leaner, least = list[Option](), min(option.needed for *_, option in found)
        for work, _, option in found:
            if not leaner or option.needed < (1 - WORTH) * leaner[-1].needed or option.needed == least:
                leaner.append(replace(option, work=work / found[0][0]))
            if option.needed == least:
                return leaner
        return leaner

    def leanest(self, *, batch_size: int, max_length: int) -> int:
        """Bytes that the leanest of the options needs."""
        combinations = list(self._combinations())
        inside = max(c.optim_in_backward for c in combinations)
        leanest = {  # of each place, as what the host holds may take more room on its way than it saves
            there: min((self.optimizers[c.optim, there, inside].nbytes, c.optim) for c in combinations)[1]
            for there in {c.place[0] for c in combinations}
        }
        leaner = [c for c in combinations if c.optim == leanest[c.place[0]] and c.optim_in_backward == inside]
        return min(self._option(c, batch_size * max_length).needed for c in leaner)

    def _option(self, combination: Combination, tokens: int) -> Option:
        self.model.set_activation_policy(combination.activation_policy)
        memory = plan(
            self.model,
            self.optimizers[combination.optim, combination.place[0], combination.optim_in_backward],
            tokens=tokens,
            loss_tokens=tokens,
            lean_loss=combination.lean_loss,
            in_backward=combination.optim_in_backward,
            offload_params=combination.place[1],
            accumulates=self.config.gradient_accumulation_steps > 1,
            graphs=self.config.cuda_graph == "true"
            and ruled_out(self.config, torch.device("cuda"), combination.settings) is None,
            backend="triton",
        )
        return Option(combination.settings, 1.0, memory)

    def _work(self, combination: Combination, batch_size: int, length: int) -> float:
        """Products of a step, in multiply-adds a token."""
        c = self.model.config
        attention = c.num_heads * c.head_dim * length  # scores and values of a causal row, on average
        layer = self.model.layers[0]
        matrices = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, Linear))
        forward = c.num_layers * (matrices + attention)
        head = c.vocab_size * c.hidden_size
        # Forward, gradients of the inputs, and of the weights where all are trained.
        work = (3.0 if self.config.method == "full" else 2.0) * (forward + head)
        # What is cheap to compute again, and the way to the host and back, are no products: they only decide ties.
        work += {"keep": 0.0, "selective": 0.01, "full": 1.0, "offload": 1.01}[combination.activation_policy] * forward
        # To the device come what the host holds for the update, once a step, and the layers, twice a micro-batch; and
        # gradients that are there already, in each micro-batch but the first.
        (there, params), inside = combination.place, combination.optim_in_backward
        optimizer, steps = self.optimizers[combination.optim, there, inside], self.config.gradient_accumulation_steps
        link = optimizer.host_nbytes / steps
        link += 2.0 * sum(layer_bytes(self.model.layers)) if params else 0.0
        if optimizer.host_gradients is not None:
            link += optimizer.host_gradients.host_nbytes * (steps - 1) / steps
        return work + 1.5 * combination.lean_loss * head + link / (batch_size * length) * RATE / LINK

    def longest(self, memory: int, *, batch_size: int) -> int:
        """The most tokens in a row, a multiple of 64, that fit with the leanest settings; 0 where 64 do not."""
        low, high = 0, LONGEST // 64 + 1
        if self.leanest(batch_size=batch_size, max_length=64) > memory:
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.leanest(batch_size=batch_size, max_length=64 * middle) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return 64 * low

    def largest(self, memory: int, *, max_length: int) -> int:
        """The most rows in a micro-batch that fit with the leanest settings; 0 where one does not."""
        low, high = 0, self.config.batch_size
        if self.leanest(batch_size=1, max_length=max_length) > memory:
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.leanest(batch_size=middle, max_length=max_length) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return low


def what_would_fit(planner: Planner, hf: Mapping[str, Any], memory: int) -> list[str]:
    """For a run that does not fit: the changes that each alone make it fit, computed; as settings, or in words."""
    config, found = planner.config, []
    rows = planner.largest(memory, max_length=config.max_length)
    if rows:
        found.append(f"batch_size {rows}")
    elif length := planner.longest(memory, batch_size=1):
        found.append(f"batch_size 1 with max_length {length}")
    if length := config.batch_size > 1 and planner.longest(memory, batch_size=config.batch_size):
        found.append(f"max_length {length}")
    methods = ("full", "freeze", "lora", "qlora")
    kept = {name for name in planner.fixed if name in KEPT_CHOICES or (name in OFFLOADS and not getattr(config, name))}
    if config.trainable is None and config.init == "pretrained":
        for method in methods[methods.index(config.method) + 1 :]:
            other = Planner(_with_method(config, method), hf, fixed=kept)
            if other.leanest(batch_size=config.batch_size, max_length=config.max_length) <= memory:
                found.append(f"method {method}")
            elif length := other.longest(memory, batch_size=1):
                found.append(f"method {method} with batch_size 1 and max_length {min(length, config.max_length)}")
    size = {"batch_size": config.batch_size, "max_length": config.max_length}
    names = {*Combination._fields, *OFFLOADS, "max_grad_norm"} & planner.fixed
    opened = {name: Planner(config, hf, fixed=planner.fixed - {name}) for name in sorted(names)}
    found += [f"{name} left open" for name, other in opened.items() if other.leanest(**size) <= memory]
    if config.gradient_accumulation_steps > 1:
        one = replace(config, gradient_accumulation_steps=1)
        if Planner(one, hf, fixed=planner.fixed).leanest(**size) <= memory:
            found.append("gradient_accumulation_steps 1")
    needed = planner.leanest(**size)
    return [*found, f"{needed / 1e9:.1f} GB of memory"]


# Choices that hold for another method, too.
KEPT_CHOICES = ("activation_policy", "lean_loss")


def _with_method(config: TrainConfig, method: str) -> TrainConfig:
    """The run by another method, with that method's own defaults."""
    kept = ["model", "config", "init", "tokenizer", "data", "output_dir", "dtype", "max_length", "batch_size"]
    kept += KEPT_CHOICES
    return TrainConfig(**{name: getattr(config, name) for name in kept}, method=method)


def known_config(name: str) -> dict[str, Any] | None:
    """The config.json of a well-known model, of which nothing need be on this machine."""
    return KNOWN.get(name.rpartition("/")[2].lower().removesuffix("-instruct"))


def unknown_model(name: str) -> ConfigError:
    return ConfigError(
        f"model {name[:80]!r} is not on this machine{nearest(name.rpartition('/')[2].lower(), KNOWN)}: give a folder "
        f"with its config.json (the weights are not needed), a GGUF file, or one of {', '.join(KNOWN)}"
    )
