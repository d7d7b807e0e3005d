"""What the family files share: a careful reader of config.json, RoPE settings, and the key table.

A family is one file named after its HF ``model_type``. It turns config.json into the fields of ``ModelConfig`` (plain
data: no torch here) and lists its tensors: for every tensor in the file, the rows of ours that it is made of. The same
list loads, saves and maps gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from afina.errors import ConfigError, nearest
from afina.loaders.jsonfile import show
from afina.loaders.weights.bitsandbytes import unsupported

if TYPE_CHECKING:  # families are read without torch
    from torch import Tensor

T = TypeVar("T")
Fields = dict[str, Any]

# Keys that HF writes and that do not change the maths of a causal language model's forward pass: bookkeeping, dropout
# (fine-tuning here uses none), initialisation, generation defaults and classification heads.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
    initializer_range use_cache bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    unk_token_id cls_token_id mask_token_id tokenizer_class prefix finetuning_task task_specific_params
    attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout resid_pdrop
    embd_pdrop attn_pdrop summary_first_dropout summary_type summary_use_proj summary_activation
    summary_proj_to_labels id2label label2id num_labels _num_labels problem_type return_dict return_dict_in_generate
    output_hidden_states output_attentions output_scores output_past torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward is_decoder cross_attention_hidden_size tie_encoder_decoder gradient_checkpointing
    _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation experts_implementation cache_implementation max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens pretraining_tp is_llama_config transformers.js_config unsloth_fixed unsloth_version
    max_sequence_length model_max_length custom_pipelines _flash_attn_2_enabled
    """.split()  # noqa: SIM905
)
# Present in configs of every kind; any value but the listed one changes the maths or the layout.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "is_causal": (True,),
}
MAX_LAYERS = 10_000


class HFTensor(NamedTuple):
    """A tensor of the file, and the rows ``start:stop`` of our parameter ``ours`` that it holds.

    ``transpose``: the file stores the transpose. ``heads``: our rows are three blocks (q, k, v) of so many heads, the
    file's go head by head, each with its q, k and v.
    """

    name: str
    ours: str
    start: int
    stop: int
    transpose: bool = False
    heads: int | None = None

    def to_ours(self, values: Tensor) -> Tensor:
        """The file's tensor -> our rows: a copy where ``heads`` changes their order, else a view."""
        if self.heads is not None:
            return values.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return values.t() if self.transpose else values

    def to_file(self, rows: Tensor) -> Tensor:
        """Our rows -> the file's tensor: a copy where ``heads`` changes their order, else a view."""
        if self.heads is not None:
            return self.in_file_order(rows).flatten(0, 2)
        return rows.t() if self.transpose else rows

    def in_file_order(self, rows: Tensor) -> Tensor:
        """Our rows in the order of the file's: always as a view, which may be written to: with ``heads`` it is
        (heads, 3, rows of a head, ...)."""
        return rows if self.heads is None else rows.unflatten(0, (3, self.heads, -1)).transpose(0, 1)


@dataclass(frozen=True)
class Family:
    """One model family.

    ``prefix`` is what the HF class puts before the names of its body (left out in files saved from the bare body);
    ``head`` is its name for the output matrix; ``ignorable`` are patterns (``re.search``) of tensors that old files
    hold and that carry no weights.
    """

    model_type: str
    architecture: str
    config_fields: Callable[[Mapping[str, Any]], Fields]
    tensors: Callable[[Fields], Iterator[HFTensor]]
    prefix: str = "model."
    head: str = "lm_head.weight"
    ignorable: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)


class Reader:
    """Reads the keys of one config.json and remembers them, so that ``finish`` can refuse what nobody understood."""

    def __init__(self, hf: Mapping[str, Any], architecture: str) -> None:
        self.hf = hf
        self.seen: set[str] = set(HARMLESS)
        self.model_type = hf["model_type"]
        quantization = hf.get("quantization_config")
        if quantization is not None and (problem := unsupported(quantization)) is not None:
            raise self.error("quantization_config", problem)
        if hf.get("auto_map") is not None and not self._is_native(hf["auto_map"], architecture):
            problem = "code of the model's own is never run; remove the key if the model follows the plain layout"
            raise self.error("auto_map", problem)
        self.seen |= {"quantization_config", "auto_map"}
        names = hf.get("architectures")
        if not isinstance(names, list | None) or (names and architecture not in names):
            raise self.error("architectures", f"expected [{architecture!r}], the causal language model")
        for key, values in FIXED.items():
            self.fixed(key, *values)

    def _is_native(self, auto_map: Any, architecture: str) -> bool:
        """Whether the code that a config names is the family's own file of before transformers had the family, as Phi-3
        still ships it: transformers too takes its own class for these names."""
        kind = self.model_type
        own = rf"(.+--)?(configuration_{kind}\.\w+Config|modeling_{kind}\.{architecture})"
        return isinstance(auto_map, dict) and all(
            isinstance(code, str) and re.fullmatch(own, code) for code in auto_map.values()
        )

    def error(self, key: str, expected: str) -> ConfigError:
        value = show(self.hf[key]) if key in self.hf else "missing"
        return ConfigError(f"config.json ({self.model_type}): {key} = {value}: {expected}")

    def get(self, key: str, default: Any) -> Any:
        """The value, or ``default`` where the key is absent or null."""
        self.seen.add(key)
        value = self.hf.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, *, limit: int = 2**31 - 1) -> int:
        """A whole number from 1 to ``limit``; required where there is no default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.error(key, f"expected a whole number from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, "expected a number above 0")
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """Null switches it off; ``default`` is the HF class's, for an absent key."""
        absent = default is None or key in self.hf
        return None if self.get(key, None) is None and absent else self.number(key, default)

    def window(self, default: int | None) -> int | None:
        """``sliding_window``: null is none; ``default`` is the HF class's, for an absent key."""
        absent = default is None or "sliding_window" in self.hf
        return None if self.get("sliding_window", None) is None and absent else self.size("sliding_window", default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false")
        return value

    def choice(self, key: str, default: str, options: Mapping[str, T]) -> T:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in options:
            raise self.error(key, f"supported here: {', '.join(options)}")
        return options[value]

    def fixed(self, key: str, *values: Any) -> None:
        """A key that may be absent, null or one of ``values``: anything else changes the maths and is refused."""
        value = self.get(key, values[0])
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            raise self.error(key, f"not supported (it changes the maths); supported: {', '.join(map(repr, values))}")

    def head_dim(self, hidden_size: int, heads: int, default: int | None = None) -> int:
        if self.get("head_dim", default) is not None:
            return self.size("head_dim", default)
        if hidden_size % heads:
            raise self.error("hidden_size", f"not divisible by the {heads} attention heads, and there is no head_dim")
        return hidden_size // heads

    def kv_heads(self, heads: int, default: int | None = None) -> int:
        """``default`` is the HF class's, for an absent key; null means as many as query heads."""
        absent = "num_key_value_heads" not in self.hf
        return self.size("num_key_value_heads", (default if absent else None) or heads)

    def layer_types(self, layers: int, pattern: Callable[[int], bool]) -> list[str]:
        """``layer_types`` as given, else sliding where ``pattern(layer)``."""
        types = self.get("layer_types", None)
        if types is None:
            return ["sliding_attention" if pattern(i) else "full_attention" for i in range(layers)]
        known = {"sliding_attention", "full_attention"}
        if (
            not isinstance(types, list)
            or len(types) != layers
            or any(type(t) is not str or t not in known for t in types)
        ):
            raise self.error("layer_types", f"expected {layers} entries (num_hidden_layers) from {sorted(known)}")
        return types

    def windows(self, types: Iterable[str], window: int | None) -> tuple[int | None, ...]:
        types = list(types)
        if window is None and "sliding_attention" in types:
            raise self.error("layer_types", "sliding_attention asked for, but no sliding_window is set or in use")
        return tuple(window if t == "sliding_attention" else None for t in types)

    def finish(self) -> None:
        unknown = sorted(set(self.hf) - self.seen)
        if unknown:
            hint = nearest(unknown[0], self.seen - HARMLESS)
            raise self.error(unknown[0], f"unknown key, refused because it may change the maths{hint}")


# --- RoPE -------------------------------------------------------------------------------------------------------------

_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}


def rope_settings(reader: Reader) -> dict[str, Any]:
    """The RoPE dict of a config in either style: ``rope_scaling`` (which wins, as in HF), or ``rope_parameters``."""
    key = "rope_scaling" if reader.get("rope_scaling", None) else "rope_parameters"
    settings = reader.get(key, {})
    reader.seen.add("rope_parameters")
    if not isinstance(settings, dict):
        raise reader.error(key, "expected an object")
    return {key: value for key, value in settings.items() if value is not None}


def rope_fields(
    reader: Reader,
    settings: Mapping[str, Any],
    *,
    head_dim: int,
    max_positions: int,
    original_max: int | None = None,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
    kinds: Iterable[str] = _ROPE_KEYS,
) -> Fields:
    """Check one RoPE dict and give the fields of ``RopeConfig``.

    ``original_max`` overrides the dict's own original_max_position_embeddings (HF: a top-level key wins);
    ``partial``: the family rotates only ``partial_rotary_factor`` of each head.
    Linear: Chen et al. 2023 (arXiv 2306.15595); llama3: Llama 3.1; yarn: arXiv 2309.00071; longrope: arXiv 2402.13753.
    """

    def fail(key: str, expected: str) -> ConfigError:
        found = f"{key} = {show(settings.get(key))}"
        return ConfigError(f"config.json ({reader.model_type}): RoPE settings: {found}: {expected}")

    def number(key: str, default: float | None = None) -> float:
        value = settings.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise fail(key, "expected a number above 0")
        return float(value)

    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else None
    if kind is None or kind not in kinds:
        raise fail("rope_type" if "rope_type" in settings else "type", f"supported: {', '.join(kinds)}")
    allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    unknown = sorted(set(settings) - allowed)
    if "attn_factor" in unknown:
        raise fail(
            "attn_factor",
            "transformers leaves it out and vLLM multiplies by it: remove it, or write what is meant as "
            "attention_factor (what transformers takes by itself is 0.1 * ln(factor) + 1)",
        )
    if unknown:
        raise fail(unknown[0], f"unknown for rope type {kind!r}{nearest(unknown[0], allowed)}")

    fraction = number("partial_rotary_factor", 1.0)
    if fraction > 1.0 or (fraction != 1.0 and not partial):
        raise fail("partial_rotary_factor", "expected at most 1.0" if partial else "this family rotates whole heads")
    dim = int(head_dim * fraction)
    if dim % 2 or dim == 0:
        raise fail("partial_rotary_factor", f"rotary dimensions come in pairs, got {dim} of head_dim {head_dim}")
    fields: Fields = {"kind": kind, "theta": number("rope_theta"), "dim": dim}
    if kind == "default":
        return fields

    original = original_max or int(number("original_max_position_embeddings", max_positions))
    if original < 1:
        raise fail("original_max_position_embeddings", "expected 1 or more")
    if kind in ("yarn", "longrope"):
        factor = number("factor", max_positions / original)
    else:
        factor = number("factor")
    fields |= {"factor": factor, "original_max_positions": original}
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise fail("high_freq_factor", f"expected above low_freq_factor ({low})")
        fields |= {"low_freq_factor": low, "high_freq_factor": high}
    elif kind == "yarn":
        truncate = settings.get("truncate", True)
        if not isinstance(truncate, bool):
            raise fail("truncate", "expected true or false")
        fields |= {
            "beta_fast": number("beta_fast", 32.0),
            "beta_slow": number("beta_slow", 1.0),
            "truncate": truncate,
            "attention_factor": number(
                "attention_factor",
                _yarn_attention_factor(factor, lambda key: number(key) if settings.get(key) else None),
            ),
        }
    elif kind == "longrope":
        for key in ("short_factor", "long_factor"):
            values = settings.get(key)
            if (
                not isinstance(values, list)
                or len(values) != dim // 2
                or not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
            ):
                raise fail(key, f"expected a list of {dim // 2} numbers above 0 (half of the rotary dimensions)")
            fields[key] = tuple(float(v) for v in values)
        computed = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        fields["attention_factor"] = number("attention_factor", computed)
    return fields


def _yarn_attention_factor(factor: float, read: Callable[[str], float | None]) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all = read("mscale"), read("mscale_all_dim")
    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)


# --- The Llama layout, which most families share ---------------------------------------------------------------------

# HF's names of the activations -> ours; three of HF's are the same tanh approximation.
GATED: Mapping[str, str] = {"silu": "silu", "swish": "silu"}
GATED_GELU: Mapping[str, str] = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")
PLAIN: Mapping[str, str] = {"gelu": "gelu", **GATED_GELU}


def llama_fields(
    reader: Reader,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    tie: bool = False,
    theta: float = 10_000.0,
    partial_rotary: bool = False,
    rope_aliases: Mapping[str, str] | None = None,
    rope_kinds: Iterable[str] = _ROPE_KEYS,
    original_max: int | None = None,
    activation: tuple[str, str, Mapping[str, str]] = ("hidden_act", "silu", GATED),
    rope: bool = True,
) -> Fields:
    """The fields that every RMSNorm + gated-MLP family reads alike; the arguments are the HF class's own defaults.

    Every layer attends to everything and uses the one RoPE; a family changes what differs. ``rope=False`` leaves
    ``ropes`` and ``layer_ropes`` to the family.
    """
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    layers, positions = reader.size("num_hidden_layers", limit=MAX_LAYERS), reader.size("max_position_embeddings")
    fields: Fields = {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": reader.kv_heads(heads, kv_heads),
        "head_dim": reader.head_dim(hidden, heads, head_dim),
        "intermediate_size": reader.size("intermediate_size"),
        "max_positions": positions,
        "norm_eps": reader.number("rms_norm_eps", norm_eps),
        "activation": reader.choice(*activation),
        "tie_embeddings": reader.flag("tie_word_embeddings", tie),
        "layer_windows": (None,) * layers,
    }
    if rope:
        settings = {"rope_theta": reader.number("rope_theta", theta)}
        if partial_rotary:
            settings["partial_rotary_factor"] = reader.number("partial_rotary_factor", 1.0)
        settings |= rope_settings(reader)
        original = reader.get("original_max_position_embeddings", original_max)
        if original is not None:
            original = reader.size("original_max_position_embeddings", original_max)
        one = rope_fields(
            reader,
            settings,
            head_dim=fields["head_dim"],
            max_positions=positions,
            original_max=original,
            partial=partial_rotary,
            aliases=rope_aliases,
            kinds=rope_kinds,
        )
        fields |= {"ropes": (one,), "layer_ropes": (0,) * layers}
    return fields


PRE_NORMS: Mapping[str, str] = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def stacked(theirs: Iterable[tuple[str, int]], ours: str) -> Iterator[HFTensor]:
    """Several tensors of the file that lie one below the other in one of ours (q, k, v; gate, up)."""
    start = 0
    for name, rows in theirs:
        yield HFTensor(name, ours, start, start + rows)
        start += rows


def llama_tensors(fields: Fields, *, norms: Mapping[str, str] = PRE_NORMS, fused: bool = False) -> Iterator[HFTensor]:
    """The key table of the Llama layout. ``norms``: ours -> theirs; ``fused``: the file fuses QKV and gate/up too."""
    hidden, inner, vocab = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    q, kv = (fields[n] * fields["head_dim"] for n in ("num_heads", "num_kv_heads"))
    qk_norm = {"head": (fields["head_dim"],) * 2, "full": (q, kv)}.get(fields.get("qk_norm", ""))

    def kinds(bias: str) -> tuple[str, ...]:
        return ("weight", "bias") if fields.get(bias) else ("weight",)

    yield HFTensor("model.embed_tokens.weight", "embed.weight", 0, vocab)
    for i in range(fields["num_layers"]):
        ours, attn, mlp = f"layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for kind in kinds("qkv_bias"):
            names = [("qkv", q + 2 * kv)] if fused else [("q", q), ("k", kv), ("v", kv)]
            yield from stacked(((f"{attn}{n}_proj.{kind}", rows) for n, rows in names), f"{ours}attn.qkv.{kind}")
        for kind in kinds("o_bias"):
            yield HFTensor(f"{attn}o_proj.{kind}", f"{ours}attn.o.{kind}", 0, hidden)
        if qk_norm:
            yield HFTensor(f"{attn}q_norm.weight", f"{ours}attn.q_norm.weight", 0, qk_norm[0])
            yield HFTensor(f"{attn}k_norm.weight", f"{ours}attn.k_norm.weight", 0, qk_norm[1])
        for kind in kinds("mlp_bias"):
            names = [("gate_up", 2 * inner)] if fused else [("gate", inner), ("up", inner)]
            yield from stacked(((f"{mlp}{n}_proj.{kind}", rows) for n, rows in names), f"{ours}mlp.gate_up.{kind}")
            yield HFTensor(f"{mlp}down_proj.{kind}", f"{ours}mlp.down.{kind}", 0, hidden)
        for mine, theirs in norms.items():
            yield HFTensor(f"model.layers.{i}.{theirs}.weight", f"{ours}{mine}.weight", 0, hidden)
    yield HFTensor("model.norm.weight", "norm.weight", 0, hidden)
    if not fields["tie_embeddings"]:
        yield HFTensor("lm_head.weight", "head.weight", 0, vocab)
