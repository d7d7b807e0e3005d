"""The model: one decoder-only transformer, whose ``ModelConfig`` says which of the known variants it is.

Shapes: B rows, T tokens, C hidden, Hq query heads, Hkv key/value heads, D head dimension, I MLP width, V vocabulary.
The residual stream is carried as a pair (residual, branch): the branch is the output of the last sublayer, and the next
norm adds it to the residual on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afina.engine.kv_cache import Cache
from afina.engine.linear import Linear, Recompute
from afina.engine.model_config import ModelConfig
from afina.engine.offload import HostCopies
from afina.engine.rope_tables import RopeTables, packed_positions
from afina.engine.weight_offload import HostWeights
from afina.errors import ConfigError
from afina.kernels.activation import geglu, swiglu
from afina.kernels.attention import attention
from afina.kernels.backend import requested
from afina.kernels.cross_entropy import linear_cross_entropy
from afina.kernels.norm import layer_norm, rms_norm
from afina.kernels.rope import rope

if TYPE_CHECKING:
    from afina.engine.lora import Adapter

IGNORE = -100
DENSE = 0.9  # share of loss positions above which the last layer computes all positions


@dataclass
class ForwardContext:
    """What the layers of one forward pass share."""

    tables: list[tuple[Tensor, Tensor]]  # cos, sin of each RoPE: fp32 (T, dim / 2) or (B, T, dim / 2)
    cu_seqlens: Tensor | None
    cache: Cache | None
    slots: Any  # those of the cache
    attention_backend: str | None  # as attention() takes it
    spans: Tensor | None = None  # in place of cu_seqlens


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; with a branch, of residual + branch, which is returned too."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.norm == "layer" else None
        self.eps, self.offset, self.layer = config.norm_eps, config.norm_offset, config.norm == "layer"

    def forward(self, x: Tensor) -> Tensor:
        if self.layer:
            return layer_norm(x, self.weight, self.bias, eps=self.eps)
        return rms_norm(x, self.weight, eps=self.eps, weight_offset=self.offset)

    def add(self, residual: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(residual + branch), residual + branch)."""
        if branch is None:
            return self(residual), residual
        if self.layer:
            return layer_norm(branch, self.weight, self.bias, eps=self.eps, residual=residual)
        return rms_norm(branch, self.weight, eps=self.eps, weight_offset=self.offset, residual=residual)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245); q, k and v come from one matrix."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.rope = index, config.layer_ropes[index]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.options: dict[str, Any] = {
            "window": config.layer_windows[index],
            "softcap": config.attention_softcap,
            "scale": config.attention_scale,
        }
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = Linear(config.hidden_size, q + 2 * kv, bias=config.qkv_bias)
        self.o = Linear(q, config.hidden_size, bias=config.o_bias)
        self.norm_heads = config.qk_norm == "head"
        self.q_norm, self.k_norm = None, None
        if config.qk_norm is not None:
            self.q_norm = Norm(config, self.head_dim if self.norm_heads else q)
            self.k_norm = Norm(config, self.head_dim if self.norm_heads else kv)

    def forward(
        self, x: Tensor, context: ForwardContext, positions: Tensor | None, recompute: Recompute | None = None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (n, C) for the flat ``positions``; ``recompute`` computes x a second time."""
        b, t, _ = x.shape
        heads = self.qkv(x, recompute).view(b, t, -1, self.head_dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        # RMSNorm of heads and rotation are one op.
        fused: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            if not self.norm_heads:
                q, k = self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)
            elif self.q_norm.layer or self.rope is None:
                q, k = self.q_norm(q), self.k_norm(k)
            else:
                norm = self.q_norm
                fused = {"q_weight": norm.weight, "k_weight": self.k_norm.weight}
                fused |= {"eps": norm.eps, "weight_offset": norm.offset}
        if self.rope is not None:
            q, k = rope(q, k, *context.tables[self.rope], **fused)
        if context.cache is not None and context.slots is not None:
            out = context.cache.attend(self.index, q, k, v, context.slots, **self.options)
        elif context.cu_seqlens is not None or context.spans is not None:
            options: dict[str, Any] = self.options | {"cu_seqlens": context.cu_seqlens, "spans": context.spans}
            out = attention(q[0], k[0], v[0], backend=context.attention_backend, **options)[None]
        else:
            out = attention(q, k, v, backend=context.attention_backend, **self.options)
        out = out.flatten(2)
        return self.o(out if positions is None else out.flatten(0, 1).index_select(0, positions))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.act: Callable[[Tensor], Tensor]
        if config.gated:
            self.act = {"silu": swiglu, "gelu_tanh": geglu}[config.activation]
            self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        else:
            approximate = {"gelu": "none", "gelu_tanh": "tanh"}[config.activation]
            self.act = lambda x: F.gelu(x, approximate=approximate)
            self.up = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.gated = config.gated
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, recompute: Recompute | None = None) -> Tensor:
        """x (..., C) -> (..., C); ``recompute`` computes x a second time."""
        wide = (self.gate_up if self.gated else self.up)(x, recompute)
        return self.down(self.act(wide), Recompute(self.act, wide))


class Layer(nn.Module):
    """Attention and MLP, with norms before them (pre), after them (post) or both (sandwich)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.attn = Attention(config, index)
        self.mlp = MLP(config)
        size = config.hidden_size
        self.attn_norm, self.mlp_norm = (Norm(config, size) if config.pre_norm else None for _ in range(2))
        self.attn_post_norm, self.mlp_post_norm = (Norm(config, size) if config.post_norm else None for _ in range(2))

    def forward(
        self, residual: Tensor, branch: Tensor | None, context: ForwardContext, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(residual, branch) -> (residual, branch), each (B, T, C), or (n, C) for the flat ``positions``: what follows
        the attention works on each position alone, so a last layer need not do it for positions that nobody reads."""
        y, residual = _add(self.attn_norm, residual, branch)
        attended = self.attn(y, context, positions, _recompute(self.attn_norm, residual))
        if positions is not None:
            residual = residual.flatten(0, 1).index_select(0, positions)
        if self.attn_post_norm is not None:
            attended = self.attn_post_norm(attended)
        if self.parallel:
            y = residual if self.mlp_norm is None else self.mlp_norm(residual)
        else:
            y, residual = _add(self.mlp_norm, residual, attended)
        branch = self.mlp(y, _recompute(self.mlp_norm, residual))
        if self.mlp_post_norm is not None:
            branch = self.mlp_post_norm(branch)
        return residual, attended + branch if self.parallel else branch


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


def next_tokens(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """labels (B, T), aligned with their tokens -> what each position is to predict, flat (B T,): -100 at the end of a
    row or, with ``cu_seqlens``, of a packed document."""
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    if cu_seqlens is not None:
        # An empty document ends where another does; one at the very start would end at -1, the last token anyway.
        targets[0, cu_seqlens[1:].to(targets.device).long() - 1] = IGNORE
    return targets.flatten()


def _add(norm: Norm | None, residual: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    if norm is not None:
        return norm.add(residual, branch)
    total = residual if branch is None else residual + branch
    return total, total


def _recompute(norm: Norm | None, total: Tensor) -> Recompute | None:
    """Computes the output of ``_add`` a second time, from the sum that the norm keeps anyway."""
    return None if norm is None else Recompute(norm, total)


class GPT(nn.Module):
    """A decoder-only language model (see ``ModelConfig``).

    ``GPT(config)`` is randomly initialised; on device "meta" it has shapes only. ``activation_policy`` is what training
    keeps for its backward pass (see ``set_activation_policy``), ``attention_backend`` what ``attention`` takes, None
    for its own choice (see ``set_attention_backend``). ``host_weights`` brings the layers' matrices from the host's
    memory where they lie there. ``hf_config`` is the config.json it came from, for export; ``adapter`` is the active
    one (see ``set_adapter``).
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.hf_config: dict[str, Any] = {}
        self.hash_source: Callable[[], str] = str
        self.sample_source: Callable[[], str] = str
        self.adapter: Adapter | None = None
        self.activation_policy = "auto"
        self.attention_backend: str | None = None
        self.host_weights: HostWeights | None = None
        self.packed_head: Callable[[Tensor], Tensor] | None = None  # the head's product, without gradient
        device = torch.device("cpu" if device is None else device)
        # On meta first: the layers' own initialisation would cost time and draw from the global random state.
        with torch.device("meta"):
            # nn.Embedding(V, C) would call normal_, which on meta imports torch's whole compiler: seconds and 100 MB.
            self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
            if config.learned_positions:
                positions = torch.empty(config.max_positions, config.hidden_size)
                self.pos_embed = nn.Embedding.from_pretrained(positions, freeze=False)
            self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
            self.norm = Norm(config, config.hidden_size)
            if not config.tie_embeddings:
                self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.ropes = [RopeTables(rope_config) for rope_config in config.ropes]
        self.to(dtype)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(0)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> GPT:
        """As ``nn.Module.to_empty``, which asks for ``empty_like`` of tensors on meta: that imports torch's symbolic
        shapes and sympy, a third of a second to a second of every start. What has memory on the host keeps it."""

        def made(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype, device=device) if t.is_meta else t

        return self._apply(made, recurse=recurse)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights' files, or of what the weights were drawn from; files are read when first asked."""
        return self.hash_source()

    @cached_property
    def sample(self) -> str:
        """As ``fingerprint``, of the first bytes of each tensor: quick to know, when an adapter asks for its base."""
        return self.sample_source()

    @property
    def device(self) -> torch.device:
        """Where the model computes; "meta" where it has shapes only."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; matrices may be held in less."""
        return self.norm.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output matrix, which is the embedding itself where the config ties them."""
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    def forward(self, input_ids: Tensor, *, cu_seqlens: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """input_ids (B, T) int64 -> logits (B, T, V); arguments as for ``hidden``."""
        return self.logits(self.hidden(input_ids, cu_seqlens=cu_seqlens, cache=cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C), after the final norm -> logits (..., V)."""
        packed, cap = self.packed_head, self.config.logit_softcap
        if packed is None or torch.is_grad_enabled():
            logits = F.linear(hidden, self.head_weight)
        else:
            logits = packed(hidden)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def hidden(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """input_ids (B, T) -> the hidden states after the final norm (B, T, C), or (n, C) for the flat
        ``positions`` (n,) int64.

        ``cu_seqlens`` int32 (n + 1,): input_ids is (1, T), n documents one after the other that do not see each other.
        On the CPU, whatever the model's device, it is checked without waiting for the GPU.
        ``spans`` int32 (2, T) on the model's device, in place of ``cu_seqlens``: where each token's document starts and
        ends. Nothing of it is read on the host, or checked.
        ``cache``: the tokens continue what the cache holds, and are added to it (see ``kv_cache.Cache``); no gradient.
        Raises ``ConfigError`` where learned positions do not reach, ``ValueError`` for shapes that do not fit.
        """
        packed = cu_seqlens is not None or spans is not None
        if input_ids.dim() != 2 or (packed and input_ids.shape[0] != 1):
            expected = f"(1, T) with {'cu_seqlens' if spans is None else 'spans'}" if packed else "(B, T)"
            raise ValueError(f"input_ids: expected {expected}, found {tuple(input_ids.shape)}")
        if cache is None:
            return self._run(input_ids, cu_seqlens, None, None, positions, spans)
        with torch.no_grad():
            slots = cache.slots(input_ids, cu_seqlens)
            if (again := cache.restart(input_ids, slots)) is not None:
                every, starts, new = again
                wanted = new.flatten() if positions is None else new.flatten()[positions]
                hidden = self.hidden(every, cu_seqlens=starts, cache=cache, positions=wanted)
                return hidden.view(*new.shape, -1) if positions is None else hidden
            hidden = self._run(input_ids, cu_seqlens, cache, slots, positions)
            cache.advance(input_ids, slots)
            return hidden

    def _run(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
        slots: Any,
        wanted: Tensor | None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """``wanted`` is what ``hidden`` calls positions; here they are where each token stands in its document."""
        tokens = input_ids.shape[1]
        if slots is not None:
            positions, lengths, longest = slots.positions, slots.totals, slots.longest
        elif cu_seqlens is not None:
            _, positions, lengths = packed_positions(cu_seqlens.to(input_ids.device, non_blocking=True), tokens)
            longest = tokens
        elif spans is not None:
            positions, lengths = torch.arange(tokens, device=input_ids.device) - spans[0], spans[1] - spans[0]
            longest = 0  # whoever makes spans knows that learned positions reach
        else:
            positions = torch.arange(tokens, device=input_ids.device)
            lengths, longest = torch.full_like(positions, tokens), tokens

        residual = self.embedded(input_ids, positions, lengths, longest)
        if slots is None:
            tables = [table(positions, lengths) for table in self.ropes]
        else:
            tables = [table.looked_up(positions, lengths, longest) for table in self.ropes]
        context = ForwardContext(tables, cu_seqlens, cache, slots, self.attention_backend, spans)
        branch: Tensor | None = None
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        host = HostCopies(residual.device) if recompute and self.activation_policy == "offload" else None
        dropout = self.adapter is not None and self.adapter.config.dropout > 0
        for index in range(len(self.layers)):
            only = wanted if index == len(self.layers) - 1 else None
            if recompute:
                residual = residual if branch is None else residual + branch  # one tensor to keep, not two
                with nullcontext() if host is None else host.keep(last=index == len(self.layers) - 1):
                    residual, branch = checkpoint(
                        self._layer, index, residual, None, context, only,
                        use_reentrant=False, preserve_rng_state=dropout,
                    )  # fmt: skip
            else:
                residual, branch = self._layer(index, residual, branch, context, only)
        return self.norm.add(residual, branch)[0]

    def embedded(self, input_ids: Tensor, positions: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """input_ids (...) at ``positions`` of sequences of ``lengths``, of which none is longer than ``longest`` -> the
        residual stream (..., C) that enters the first layer."""
        residual = self.embed(input_ids)
        if self.config.embed_scale is not None:
            # Rounded to the weights' dtype first, as the models were trained.
            residual = residual * _rounded(self.config.embed_scale, residual.dtype)
        if self.config.learned_positions:
            if longest > self.config.max_positions and (found := int(lengths.max())) > self.config.max_positions:
                raise ConfigError(
                    f"a sequence of {found} tokens is longer than the model's {self.config.max_positions} learned "
                    "positions: lower max_length"
                )
            residual = residual + self.pos_embed(positions)
        return residual

    def _layer(
        self, index: int, residual: Tensor, branch: Tensor | None, context: ForwardContext, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A layer, whose matrices are on the device by then."""
        if self.host_weights is not None:
            self.host_weights.enter(index)
        residual, branch = self.layers[index](residual, branch, context, positions)
        return residual, branch

    def set_activation_policy(self, policy: str) -> None:
        """Choose what training keeps of a forward pass for its backward pass. Gradients do not depend on it; in 16 bits
        "full" and "offload" round them once more between layers.

        "keep": all that its operations ask for. "selective": not the inputs of matrices that norms and activations
        compute again. "full": of each layer its input, from which the layer runs again. "offload": the same, and the
        inputs wait in the host's memory. "auto": "selective" for matrices with adapters, "keep" for the others.
        """
        self.activation_policy = policy
        for module in self.modules():
            if isinstance(module, Linear):
                module.recompute = {"keep": False, "selective": True}.get(policy)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass runs each layer again. Setting it chooses the policy "full", or "auto"."""
        return self.activation_policy in ("full", "offload")

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.set_activation_policy("full" if on else "auto")

    def set_attention_backend(self, backend: str, *, longest: int, device: torch.device) -> None:
        """Choose what computes attention to sequences of at most ``longest`` tokens on ``device``: "triton", "sdpa",
        "torch", or "auto", which leaves it to ``kernels/attention.py``. Decoding with a cache has kernels of its own.

        Raises ``ConfigError`` where the backend cannot compute this model's attention, or not on that device.
        """
        if backend == "sdpa":
            windows = [w for w in self.config.layer_windows if w is not None and w < longest]
            if windows or self.config.attention_softcap is not None:
                found = f"a window of {min(windows)} tokens" if windows else "capped scores"
                raise ConfigError(
                    f"attention_backend is sdpa, but the attention of this model has {found}, which torch's own cannot "
                    "compute: use auto"
                )
        elif backend != "auto":
            try:
                requested(backend, device)
            except ValueError as error:
                raise ConfigError(f"attention_{error}") from None
        self.attention_backend = None if backend == "auto" else backend

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        lean: bool = False,
    ) -> Tensor:
        """Cross-entropy (nats, fp32) of predicting labels (B, T) from the tokens before them; logits are never built.

        Labels are aligned with input_ids and shifted here, as in HF; -100 is ignored, and so is each document's first
        token, which nothing predicts. ``reduction``: "mean" over the loss tokens, "sum", or "none": (B, T), at each
        label its own loss, 0 where ignored. Labels and ``cu_seqlens`` may be on the CPU, whatever the model's device:
        the positions that have a loss are then found there, and nothing waits for the GPU. ``label_smoothing``,
        ``z_loss`` and ``lean`` are those of ``linear_cross_entropy``.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels: expected input_ids' shape {tuple(input_ids.shape)}, found {tuple(labels.shape)}")
        targets = next_tokens(labels, cu_seqlens)
        loss_positions = (targets != IGNORE).nonzero().squeeze(1)
        if reduction != "none" and loss_positions.numel() > DENSE * targets.numel():
            # The head skips the few ignored tokens itself.
            hidden = self.hidden(input_ids, cu_seqlens=cu_seqlens).flatten(0, 1)
        else:
            targets = targets[loss_positions]
            loss_positions = loss_positions.to(input_ids.device, non_blocking=True)
            hidden = self.hidden(input_ids, cu_seqlens=cu_seqlens, positions=loss_positions)
        losses = linear_cross_entropy(
            hidden,
            self.head_weight,
            targets,
            reduction=reduction,
            softcap=self.config.logit_softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            lean=lean,
        )
        if reduction != "none":
            return losses
        return losses.new_zeros(labels.numel()).index_put((loss_positions + 1,), losses).view(labels.shape)

    def weighted_loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        weights: Tensor,
        *,
        spans: Tensor,
        positions: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        lean: bool = False,
    ) -> Tensor:
        """The sum of the cross-entropies (nats, fp32) of packed tokens, each times its weight, as a fixed sequence of
        launches: nothing is read on the host, so that a CUDA graph can repeat it on other contents of its arguments.

        All of them lie on the model's device. input_ids int64 (1, T) with the ``spans`` of `hidden`; targets int64 (n,)
        at the flat ``positions`` int64 (n,) (all T without them), already shifted, -100 to ignore; weights fp32 (n,).
        """
        return linear_cross_entropy(
            self.hidden(input_ids, positions=positions, spans=spans).flatten(0, -2),
            self.head_weight,
            targets,
            reduction="sum",
            softcap=self.config.logit_softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            lean=lean,
            row_weights=weights,
        )

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Weights to train from scratch: normal with deviation 0.02, the projections back into the residual stream
        smaller by sqrt(2 layers) (GPT-2), biases 0, norms 1. Drawn on the CPU, so a seed means the same everywhere."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual if name.endswith((".o.weight", ".down.weight")) else 0.02
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0 - self.config.norm_offset)

    def num_parameters(self) -> int:
        """How many numbers the model learns; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train_only(self, names: Iterable[str]) -> None:
        """Let the parameters of these names, and no others, have gradients."""
        wanted = set(names)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in wanted)

    def decay_parameters(self) -> set[str]:
        """Names of the parameters that weight decay applies to: matrices, without the embeddings."""
        return {name for name, p in self.named_parameters() if p.dim() == 2 and "embed." not in name}
