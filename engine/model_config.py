"""The one description of a model that the engine reads. Families differ only in these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from afina.errors import ConfigError
from afina.loaders.families.common import HFTensor
from afina.loaders.families.registry import load_family


@dataclass(frozen=True)
class RopeConfig:
    """One rotary position embedding (Su et al. 2021, arXiv 2104.09864) and how it is stretched.

    ``dim`` is the number of rotated dimensions of each head; ``attention_factor`` multiplies cos and sin (YaRN and
    LongRoPE). ``short_factor`` and ``long_factor`` hold dim / 2 numbers each.
    """

    kind: str  # "default", "linear", "llama3", "yarn", "longrope"
    theta: float
    dim: int
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Per-layer fields (``layer_*``) are tuples with one entry a layer.

    Raises ``ConfigError`` where the fields contradict each other.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    layer_windows: tuple[int | None, ...]  # sliding window w: a query sees itself and the w - 1 tokens before it
    layer_ropes: tuple[int | None, ...]  # index into ropes; None: no rotary positions in this layer
    ropes: tuple[RopeConfig, ...] = ()
    learned_positions: bool = False
    norm: str = "rms"  # "rms" or "layer" (with bias)
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the norms' weights: Gemma stores weight - 1
    pre_norm: bool = True  # norm before attention and MLP
    post_norm: bool = False  # norm after them, before the residual is added; both: "sandwich"
    parallel_residual: bool = False  # attention and MLP read the same residual
    activation: str = "silu"  # "silu", "gelu_tanh", "gelu"
    gated: bool = True  # activation(gate) * up instead of activation(up)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": per head; "full": over the whole projection
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None  # cap * tanh(score / cap)
    logit_softcap: float | None = None
    embed_scale: float | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config: {self.num_heads} attention heads do not divide into {self.num_kv_heads} key/value heads; "
                "num_key_value_heads must divide num_attention_heads"
            )
        for name in ("layer_windows", "layer_ropes"):
            if len(getattr(self, name)) != self.num_layers:
                raise ConfigError(f"config: {name} has {len(getattr(self, name))} entries for {self.num_layers} layers")
        activations = ("silu", "gelu_tanh") if self.gated else ("gelu", "gelu_tanh")
        if self.activation not in activations:
            raise ConfigError(f"config: activation {self.activation!r} is not one of {', '.join(activations)}")
        if not self.pre_norm and not self.post_norm:
            raise ConfigError("config: a layer needs pre_norm, post_norm or both")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """From the contents of an HF config.json. Raises ``ConfigError`` naming the key that cannot be honoured."""
        values = load_family(hf).config_fields(hf)
        return cls(**{**values, "ropes": tuple(RopeConfig(**rope) for rope in values.get("ropes", ()))})

    def tensors(self, hf: Mapping[str, Any]) -> list[HFTensor]:
        """The key table: what the checkpoint of a model with this config.json holds, and where it goes in ours."""
        return list(load_family(hf).tensors(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, nested RoPE settings kept as objects."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def num_parameters(self) -> int:
        """How many numbers the weights hold, from the sizes alone (nothing is allocated); a tied head counts once."""
        c, inner, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * d, self.num_kv_heads * d
        norm = c * (2 if self.norm == "layer" else 1)
        layer = c * (q + 2 * kv) + q * c + (3 if self.gated else 2) * c * inner
        layer += self.qkv_bias * (q + 2 * kv) + self.o_bias * c
        layer += self.mlp_bias * ((2 if self.gated else 1) * inner + c)
        layer += 2 * norm * (self.pre_norm + self.post_norm)
        layer += {None: 0, "head": 2 * d, "full": q + kv}[self.qk_norm]
        embed = self.vocab_size * c * (1 if self.tie_embeddings else 2)
        return embed + self.learned_positions * self.max_positions * c + self.num_layers * layer + norm
