"""What a training step will hold in memory, from the model as it stands and the size of its largest micro-batch.

Weights, adapters, gradients and optimizer state are counted; the activations, what the forward pass keeps for the
backward pass, follow from what each operation saves. Bytes a token and layer, for values of s bytes (4 in fp32, 2 in
bf16) and statistics of w (4); q = Hq D, kv = Hkv D, I the MLP's width, r the rows of a LoRA's A:

    norm before attention, MLP     the residual sum, once where both read one         s C
                                   rstd; LayerNorm also the mean                      w, 2 w
    qkv, gate_up (up), dense       its input, the norm's output                       s C
    qkv, gate_up (up), LoRA        nothing: the norm is computed again from its sum
    q and k norms                  the buffer of q, k and v, whose views they read    s (q + 2 kv)
                                   rstd of each head (one of q, one of k if "full");  w (Hq + Hkv)
                                   none where RoPE's kernel computes it again
    RoPE                           torch: cos as wide as a head, of each layer        w D
    attention                      rotated or normed q and k, and a copy of v         s (q + 2 kv)
                                   without either: the buffer itself                  s (q + 2 kv)
                                   Triton: its output and the rows' log-sum-exp       s q + w Hq
    o                              its input (Triton's attention keeps that anyway)   s q
    norms after attention, MLP     their input and statistics                         s C + w or 2 w
    GLU                            gate_up                                            s 2 I
    GELU                           up                                                 s I
    down, dense                    its input; LoRA computes it again                  s I
    any LoRA                       h = x A^T, unless W and B A are summed             s r
        with dropout               the mask of its input                              1 C, 1 q or 1 I
        with DoRA                  its output before the gain, so twice that output   s O

What has no gradient is not kept: nothing below the lowest trained parameter is, and the input of a frozen matrix is
not. From the last layer's o on only the loss positions count (all positions, where nearly all have a loss), there and
in the head:

    last norm                      the last sum and its statistics                    s C + w or 2 w
    cross-entropy                  the gradient of its input                          s C
    RoPE tables                    of each RoPE; Triton keeps cos too                 w D_rot / 2 or w D_rot

The gradient of the head's weight, made with the loss, is a gradient, not an activation. Beside all this stands what the
head works in, a chunk of logits, or the largest NF4 matrix, dequantised; they are never there together.

With gradient checkpointing a layer keeps its input, s C, until its turn in the backward pass comes: then it keeps what
the table says, while the layers below it still wait. Not counted: what operations hold while they run, the batch
itself, and what allocators keep for later (on a CPU, in a heap that gives no pages back, that may be as much as the
activations).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor

from afina.engine.linear import Linear, sums
from afina.engine.model import DENSE, GPT, MLP, Attention, Layer, Norm
from afina.engine.optim import AdamW
from afina.kernels import cross_entropy_chunks
from afina.kernels.backend import choose, wide_dtype

LEAN_BYTES = 100_000_000  # the most that the lean mode of linear_cross_entropy holds


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``weights``: the base as it is held, dense and NF4; ``adapters``: the LoRA parameters; ``gradients``: of
    all that trains; ``optimizer``: moments, and fp32 weights where the model has others; ``activations``: what one
    micro-batch keeps for its backward pass, and the head's room."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it at once, which is the peak from a step's second micro-batch on; with one micro-batch the last
        gradients come when the first activations have gone, so it is an upper bound."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations

    def line(self) -> str:
        """For a person to read, in GB (1e9 bytes)."""
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(self).items() if size)
        return f"memory: {parts} = {_gb(self.total)} GB predicted"

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}" if size >= 1e8 else f"{size / 1e9:.3f}"


def plan(model: GPT, optimizer: AdamW, *, tokens: int, loss_tokens: int, lean_loss: bool = False) -> MemoryPlan:
    """The memory of a training step whose largest micro-batch has ``tokens`` tokens (padding included), of which
    ``loss_tokens`` have a loss, which ``lean_loss`` computes in little room."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    lora = {p for linear in linears if linear.lora is not None for p in linear.lora.parameters()}
    base = {p for p in model.parameters() if p not in lora}
    aside = model.adapter.inactive.values() if model.adapter else ()  # the base's, of what an adapter trained whole
    quantized = sum(linear.nbytes for linear in linears if linear.frozen_format is not None)
    return MemoryPlan(
        weights=_nbytes(base) + sum(tensor.nbytes for tensor in aside) + quantized,
        adapters=_nbytes(lora),
        gradients=_nbytes(optimizer.params.values()),
        optimizer=optimizer.nbytes,
        activations=_Walk(model, tokens, loss_tokens, lean_loss).peak(),
    )


def kept(model: GPT, *, tokens: int, loss_tokens: int) -> int:
    """Bytes that ``model.loss`` leaves behind for the backward pass, without the gradient of the head's weight."""
    return _Walk(model, tokens, loss_tokens).kept()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(eq=False)
class _Value:
    """Memory that an operation writes: ``rows`` of ``width`` bytes, and whether it has a gradient. Views are the value
    that they look into."""

    rows: int
    width: int
    grad: bool = False


class _Walk:
    """The forward pass of ``GPT.loss``, of sizes alone: the functions from ``_layer`` on stand for the model's own."""

    def __init__(self, model: GPT, tokens: int, loss_tokens: int, lean_loss: bool = False) -> None:
        weight, config = model.embed.weight, model.config
        self.model, self.tokens, self.lean_loss = model, tokens, lean_loss
        self.size, self.wide = weight.element_size(), wide_dtype(weight.dtype).itemsize
        self.triton = {op: choose(op, None, weight) == "triton" for op in ("attention", "rope", "linear_cross_entropy")}
        if model.attention_backend is not None:  # torch's own attention ("sdpa") keeps what Triton's does
            self.triton["attention"] = model.attention_backend != "torch"
        # Whether the last layer's o and MLP, and the head, take the loss positions alone.
        self.only_loss_positions = loss_tokens <= DENSE * tokens
        self.rows = loss_tokens if self.only_loss_positions else tokens
        self.recompute = model.gradient_checkpointing and model.training
        self.held: set[_Value] = set()
        self.layers: list[int] = []  # what each layer keeps
        self.inputs: list[int] = []  # and what it keeps until it is computed again

        positions = model.pos_embed.weight if config.learned_positions else None
        residual, branch = self._new(tokens, config.hidden_size, _trained(weight, positions)), None
        ropes, given = set(), set[_Value]()
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            if self.recompute and branch is not None:
                residual, branch = _sum(residual, branch), None
            new = ({residual} if branch is None else {residual, branch}) - given
            self.held = set()
            cut = self.only_loss_positions and index == config.num_layers - 1
            residual, branch = self._layer(layer, residual, branch, cut)
            self.layers.append(_size(self.held))
            self.inputs.append(_size(new) if self.held else 0)
            given |= new if self.held else set()
            if self.held and layer.attn.rope is not None:
                ropes.add(config.ropes[layer.attn.rope])
        self.held = set()
        hidden, _ = self._add(model.norm, residual, branch)
        if hidden.grad:
            self._keep(self._new(hidden.rows, config.hidden_size))  # its gradient, made with the loss
        self.ends = _size(self.held)
        if positions is not None and positions.requires_grad:
            self.ends += 8 * tokens
        if self.only_loss_positions and self.layers[-1]:
            self.ends += 8 * self.rows  # which tokens they are
        if self.recompute and any(self.layers):
            ropes = set(config.ropes)
        # cos and sin; on torch cos is widened in each layer.
        tables = 2 if self.recompute or self.triton["rope"] else 1
        self.ends += sum(tokens * rope.dim // 2 * tables * self.wide for rope in ropes)

    def kept(self) -> int:
        """What is there after the forward pass."""
        return sum(self.inputs if self.recompute else self.layers) + self.ends

    def peak(self) -> int:
        """The most at any time: at the loss, or where a layer is computed again."""
        dense = max((m.in_features * m.out_features for m in self.model.modules()
                     if isinstance(m, Linear) and m.frozen_format is not None), default=0) * self.size  # fmt: skip
        head = min(self._logits(), LEAN_BYTES) if self.lean_loss else self._logits()
        peaks = [self.kept() + max(dense, head)]
        if self.recompute:
            peaks += [sum(self.inputs[: i + 1]) + layer + self.ends + dense for i, layer in enumerate(self.layers)]
        return max(peaks)

    def _logits(self) -> int:
        """The head's room: a chunk of logits, and where it computes in fp32, its weight and that one's gradient so."""
        weight, triton = self.model.head_weight, self.triton["linear_cross_entropy"]
        vocab = weight.shape[0]
        compute = self.wide if weight.device.type == "cpu" and not triton else self.size
        if triton:
            few, many = cross_entropy_chunks.GPU_CHUNK_ROWS
            fits = many * vocab * compute <= cross_entropy_chunks.GPU_CHUNK_BYTES
            most = many if weight.requires_grad and fits else few
            copies = 1
        else:
            few, many = cross_entropy_chunks.CHUNK_ROWS
            most = max(few, min(many, cross_entropy_chunks.CHUNK_BYTES // (4 * vocab)))
            copies = 1 if self.model.config.logit_softcap is None else 3  # the slope of the cap, made in two steps
        room = min(most, self.rows) * vocab * copies * (compute if triton else self.wide)
        if compute != self.size:
            room += weight.numel() * compute
        if weight.requires_grad and self.size < self.wide and (self.rows > most or compute != self.size):
            room += weight.numel() * self.wide
        return room

    def _new(self, rows: int, width: int, grad: bool = False, *, itemsize: int | None = None) -> _Value:
        return _Value(rows, width * (itemsize or self.size), grad)

    def _keep(self, *values: _Value) -> None:
        self.held.update(values)

    def _layer(self, layer: Layer, residual: _Value, branch: _Value | None, cut: bool) -> tuple[_Value, _Value]:
        y, residual = self._add(layer.attn_norm, residual, branch)
        attended = self._attention(layer.attn, y, cut, residual if layer.attn_norm is not None else None)
        if cut:
            residual = _Value(self.rows, residual.width, residual.grad)
        if layer.attn_post_norm is not None:
            attended = self._norm(layer.attn_post_norm, attended)
        if layer.parallel:
            y = residual if layer.mlp_norm is None else self._norm(layer.mlp_norm, residual)
        else:
            y, residual = self._add(layer.mlp_norm, residual, attended)
        branch = self._mlp(layer.mlp, y, residual if layer.mlp_norm is not None else None)
        if layer.mlp_post_norm is not None:
            branch = self._norm(layer.mlp_post_norm, branch)
        return residual, _sum(attended, branch) if layer.parallel else branch

    def _attention(self, attn: Attention, x: _Value, cut: bool, recompute_from: _Value | None) -> _Value:
        heads, dim = attn.heads + attn.kv_heads, attn.head_dim
        qkv = self._linear(attn.qkv, x, recompute_from)
        moved, v = qkv, qkv  # q and k lie in one memory here: they are kept or not together
        if attn.q_norm is not None and attn.k_norm is not None:
            fused = self.triton["rope"] and attn.norm_heads and not attn.q_norm.layer and attn.rope is not None
            moved = self._new(x.rows, heads * dim, qkv.grad or _learns(attn.q_norm) or _learns(attn.k_norm))
            if moved.grad:
                self._keep(qkv)
            if moved.grad and not fused:
                self._keep(self._statistics(attn.q_norm, x.rows, heads if attn.norm_heads else 2))
        if attn.rope is not None:
            moved = self._new(x.rows, heads * dim, moved.grad)
            if moved.grad and not self.triton["rope"]:
                self._keep(self._new(x.rows, dim, itemsize=self.wide))
        out = self._new(x.rows, attn.heads * dim, moved.grad)
        if out.grad:
            if moved is not qkv:  # a view of the buffer would keep it whole
                v = self._new(x.rows, attn.kv_heads * dim)
            self._keep(moved, v)
        if out.grad and self.triton["attention"]:
            self._keep(out, self._new(x.rows, attn.heads, itemsize=self.wide))
        if out.grad and self.model.attention_backend == "sdpa":
            # torch may copy k and v to as many heads as q has.
            self._keep(self._new(x.rows, 2 * (attn.heads - attn.kv_heads) * dim))
        return self._linear(attn.o, _Value(self.rows, out.width, out.grad) if cut else out)

    def _mlp(self, mlp: MLP, x: _Value, recompute_from: _Value | None) -> _Value:
        wide = self._linear(mlp.gate_up if mlp.gated else mlp.up, x, recompute_from)
        if wide.grad:
            self._keep(wide)
        return self._linear(mlp.down, self._new(x.rows, mlp.down.in_features, wide.grad), wide)

    def _linear(self, linear: Linear, x: _Value, recompute_from: _Value | None = None) -> _Value:
        """``recompute_from``: what its input can be computed from."""
        lora = linear.lora
        grad = x.grad or lora is not None or _trained(linear.weight, linear.bias)
        out = self._new(x.rows, linear.out_features, grad)
        if lora is None:
            if _trained(linear.weight):
                self._keep(x)
            return out
        self._keep(x if recompute_from is None else recompute_from)
        dropped = lora.dropout > 0 and self.model.training
        if dropped or not sums(linear, x.rows, self.model.embed.weight.dtype):
            self._keep(self._new(x.rows, lora.A.shape[0]))
        if dropped:
            self._keep(self._new(x.rows, linear.in_features, itemsize=1))
        if lora.magnitude is None:
            return out
        # The product before the gain, the gain, and the norms in it.
        self._keep(out, self._new(1, linear.out_features), _Value(1, lora.magnitude.nbytes))
        return self._new(x.rows, linear.out_features, grad)

    def _add(self, norm: Norm | None, residual: _Value, branch: _Value | None) -> tuple[_Value, _Value]:
        total = residual if branch is None else _sum(residual, branch)
        return (total if norm is None else self._norm(norm, total)), total

    def _norm(self, norm: Norm, x: _Value) -> _Value:
        y = _Value(x.rows, x.width, x.grad or _learns(norm))
        if y.grad:
            self._keep(x, self._statistics(norm, x.rows))
        return y

    def _statistics(self, norm: Norm, rows: int, each: int = 1) -> _Value:
        return self._new(rows, each * (2 if norm.layer else 1), itemsize=self.wide)


def _size(values: set[_Value]) -> int:
    return sum(value.rows * value.width for value in values)


def _sum(a: _Value, b: _Value) -> _Value:
    return _Value(a.rows, a.width, a.grad or b.grad)


def _trained(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _learns(norm: Norm) -> bool:
    return _trained(norm.weight, norm.bias)
