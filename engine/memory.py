"""What a training step will hold in memory, from the model as it stands and the size of its largest micro-batch.

Weights, adapters, gradients and optimizer state are counted. The activations are what the forward pass keeps for the
backward pass. Each operation declares what it keeps beside itself, in a function ``saved`` (`kernels/saved.py`): some
of its inputs and outputs, and bytes of its own. Here the forward pass is walked through in sizes alone, to see which
operations run, on how many rows, and which of them keep the same memory, which then counts once. Torch's own operations
declare nothing: GELU keeps its input.

What has no gradient is not kept: nothing below the lowest trained parameter is, and the input of a frozen matrix is
not. LoRA on the norm's output or the activation keeps neither, but what computes them again. From the last layer's o on
only the loss positions count (all positions, where nearly all have a loss), there and in the head. RoPE's tables are
the same for all layers.

The gradient of the head's weight, made with the loss, is a gradient, not an activation. Beside all this stands what the
head works in, a chunk of logits, or the largest quantised matrix, dequantised; they are never there together.

Where layers are computed again a layer keeps its input until its turn in the backward pass comes: then it keeps what
it would have kept, while the layers below it still wait. The backward pass itself is followed through each layer's MLP,
where it is widest: gradients of the product and of what it is made from. Not counted: what other operations hold while
they run (torch's attention on a CPU makes masks and scores), the batch itself, and what allocators keep for later (on a
CPU, in a heap that gives no pages back, that may be as much as the activations).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from afina.engine import linear, weight_offload
from afina.engine.buckets import Bucket, bucket_size, static_bytes
from afina.engine.linear import Linear
from afina.engine.model import DENSE, GPT, MLP, Attention, Layer, Norm
from afina.engine.optim import AdamW
from afina.kernels import activation, attention, cross_entropy, norm, rope
from afina.kernels.backend import choose, wide_dtype
from afina.kernels.cross_entropy_chunks import GPU_CHUNK_ROWS, workspace_bytes
from afina.kernels.saved import Saved

LEAN_BYTES = 100_000_000  # the most that the lean mode of linear_cross_entropy holds


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``weights``: the base as it is held, dense and quantised; ``adapters``: the LoRA parameters;
    ``gradients``: those that are there when most is held; ``optimizer``: moments, and fp32 weights where the model has
    others; ``activations``: what one micro-batch keeps for its backward pass, and what the head or the backward pass
    works in; ``host``: what waits in the host's memory, be it activations, the optimizer's state or weights. That is no
    part of the total."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it, when it is most."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations

    def line(self) -> str:
        """For a person to read, in GB (1e9 bytes)."""
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(self).items() if size and name != "host")
        beside = f", and {_gb(self.host)} GB of the host's" if self.host else ""
        return f"memory: {parts} = {_gb(self.total)} GB predicted{beside}"

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}" if size >= 1e8 else f"{size / 1e9:.3f}"


def plan(
    model: GPT,
    optimizer: AdamW,
    *,
    tokens: int,
    loss_tokens: int,
    lean_loss: bool = False,
    in_backward: bool = False,
    accumulates: bool = True,
    offload_params: bool = False,
    graphs: bool = False,
    backend: str | None = None,
    longest: int | None = None,
) -> MemoryPlan:
    """The memory of a training step whose largest micro-batch has ``tokens`` tokens (padding included), of which
    ``loss_tokens`` have a loss, which ``lean_loss`` computes in little room, in rows of at most ``longest`` tokens.
    ``in_backward``: the weights move in the backward pass; ``accumulates``: a step has several micro-batches;
    ``offload_params``: the layers' matrices are in the host's memory; ``graphs``: steps are CUDA graphs, whose batches
    are padded, whose gradients stay, and whose activations have a place of their own beside those of the ordinary step
    that they are checked against; ``backend``: of all operations, None for those
    of the model's device."""
    bucket = Bucket(bucket_size(tokens), bucket_size(loss_tokens)) if graphs else None
    if bucket is not None:
        tokens, loss_tokens = bucket.tokens, min(bucket)
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    lora = {p for layer in layers if layer.lora is not None for p in layer.lora.parameters()}
    base = {p for p in model.parameters() if p not in lora}
    aside = model.adapter.inactive.values() if model.adapter else ()  # the base's, of what an adapter trained whole
    quantized = sum(layer.nbytes for layer in layers if layer.frozen_format is not None)
    walk = _Walk(model, tokens, loss_tokens, lean_loss, backend, longest)
    leave = optimizer.host_gradients is not None and not in_backward
    activations, gradients = walk.peak(
        set(optimizer.params.values()),
        in_backward=in_backward,
        accumulates=(accumulates or graphs) and not in_backward,
        leave=leave,
    )
    if bucket is not None:
        activations = 2 * activations + static_bytes(Bucket(tokens, loss_tokens))
    if leave:  # those of norms and biases stay
        gradients += _nbytes(p for name, p in optimizer.params.items() if name not in optimizer.on_host)
    away = sum(weight_offload.layer_bytes(model.layers)) if offload_params else 0
    places = weight_offload.device_bytes(model.layers) if offload_params else 0
    return MemoryPlan(
        weights=_nbytes(base) + sum(tensor.nbytes for tensor in aside) + quantized - away + places,
        adapters=_nbytes(lora),
        gradients=gradients,
        optimizer=optimizer.nbytes,
        activations=activations,
        host=walk.host() + optimizer.host_nbytes + away,
    )


def kept(model: GPT, *, tokens: int, loss_tokens: int, longest: int | None = None) -> int:
    """Bytes that ``model.loss`` leaves behind for the backward pass, without the gradient of the head's weight."""
    return _Walk(model, tokens, loss_tokens, longest=longest).kept()


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

    def __init__(
        self,
        model: GPT,
        tokens: int,
        loss_tokens: int,
        lean_loss: bool = False,
        backend: str | None = None,
        longest: int | None = None,
    ) -> None:
        weight, config = model.embed.weight, model.config
        self.model, self.dtype, self.lean_loss, self.tokens = model, weight.dtype, lean_loss, tokens
        self.longest = tokens if longest is None else longest
        ops = ("attention", "rope", "rms_norm", "layer_norm", "linear_cross_entropy", "glu")
        self.backends = {op: backend or choose(op, None, weight) for op in ops}
        if model.attention_backend is not None:
            self.backends["attention"] = model.attention_backend
        # Whether the last layer's o and MLP, and the head, take the loss positions alone.
        self.only_loss_positions = loss_tokens <= DENSE * tokens
        self.rows = loss_tokens if self.only_loss_positions else tokens
        self.recompute = model.gradient_checkpointing and model.training
        self.offload = self.recompute and model.activation_policy == "offload"
        self.held: set[_Value] = set()
        self.layers: list[int] = []  # what each layer keeps
        self.inputs: list[int] = []  # what it keeps until it is computed again
        self.again: list[int] = []  # and what it keeps then, with its input
        wide = wide_dtype(self.dtype).itemsize
        self.tables = [{name: _Value(tokens, r.dim // 2 * wide) for name in ("cos", "sin")} for r in config.ropes]
        self.tables_held: set[_Value] = set()

        positions = model.pos_embed.weight if config.learned_positions else None
        residual, branch = self._new(tokens, config.hidden_size, _trained(weight, positions)), None
        given = set[_Value]()
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
            self.again.append(_size(self.held | new) if self.held else 0)
            given |= new if self.held else set()
        self.held = set()
        hidden, _ = self._add(model.norm, residual, branch)
        if hidden.grad:
            self._keep(cross_entropy.saved(self.dtype, config.hidden_size), hidden.rows)
        self.ends = _size(self.held)
        if positions is not None and positions.requires_grad:
            self.ends += 8 * tokens
        if self.only_loss_positions and self.layers[-1]:
            self.ends += 8 * self.rows  # which tokens they are
        if self.recompute and any(self.layers):
            self.tables_held = {table for tables in self.tables for table in tables.values()}
        self.ends += _size(self.tables_held)

    def kept(self) -> int:
        """What is there after the forward pass, on the device."""
        return sum(self.inputs if self.recompute else self.layers) + self.ends - self.host()

    def host(self) -> int:
        """What waits in the host's memory then: the inputs of all layers but the last."""
        return sum(self.inputs[:-1]) if self.offload else 0

    def peak(
        self, learns: set[nn.Parameter], *, in_backward: bool, accumulates: bool, leave: bool = False
    ) -> tuple[int, int]:
        """Activations and gradients when they take most together, where ``learns`` is trained.

        Gradients stay until the step ends, and where micro-batches add to them, all are there from the second one on,
        with the new ones. With ``in_backward`` there is one matrix's at a time, and that of a tied head, made with the
        loss, which waits for the embedding's. Where gradients ``leave`` for the host it is the same, and the one
        before is still on its way.
        """
        model = self.model
        head = model.head_weight
        logits = workspace_bytes(
            head,
            self.rows,
            learns=head.requires_grad,
            softcap=model.config.logit_softcap,
            backend=self.backends["linear_cross_entropy"],
        )
        # Beside the logits, the rows of the gradient that a chunk of them has given; and what the head reads.
        width = model.config.hidden_size * self.dtype.itemsize
        logits += min(self.rows, GPU_CHUNK_ROWS[1]) * width
        logits = (min(logits, LEAN_BYTES) if self.lean_loss else logits) + self.rows * width
        dense = max((m.workspace_bytes(self.dtype) for m in model.modules() if isinstance(m, Linear)), default=0)
        # Activations; gradients that are new then, or of the head that waits; those of what the pass has been through.
        moments = [(self.kept() + max(dense, logits), _nbytes({head} & learns), 0)]
        waiting = _nbytes({head} & learns) if model.config.tie_embeddings else 0
        flying = _nbytes({head} & learns) - waiting if leave else 0
        done = _nbytes(({head} | set(model.norm.parameters())) & learns) - waiting
        for i in reversed(range(len(model.layers))):
            layer = model.layers[i]
            assert isinstance(layer, Layer)
            below = self.inputs[max(0, i - 1) if self.offload else 0 : i] if self.recompute else self.layers[:i]
            held = sum(below) + (self.again if self.recompute else self.layers)[i] + _size(self.tables_held)
            if self.layers[i]:
                down = _nbytes(learns & set(layer.mlp.down.parameters())) if leave else 0
                moments += [
                    (held + own, waiting + new + away, done + before)
                    for (own, new, before), away in zip(self._backward(layer, i, learns), (flying, down, down))
                ]
                flying = _nbytes(learns & set(layer.attn.qkv.parameters())) if leave else 0
            done += _nbytes(set(layer.parameters()) & learns)
        embeddings = {model.embed.weight, *([model.pos_embed.weight] if model.config.learned_positions else [])}
        moments.append((0, waiting + flying + max(_nbytes({p} & learns) for p in embeddings), done))
        in_backward = in_backward or leave
        if accumulates and not leave:
            return max(kept + new for kept, new, _ in moments), _nbytes(learns)
        kept, new, stay = max(moments, key=lambda moment: sum(moment[: 2 if in_backward else 3]))
        return kept, new if in_backward else new + stay

    def _backward(self, layer: Layer, index: int, learns: set[nn.Parameter]) -> list[tuple[int, int, int]]:
        """What the backward pass of the layer's MLP, the widest of its parts, takes beside all that the layer keeps,
        and the gradients of weights that are new then, and of its weights before: in the last matrix, in the
        activation, in the first matrix."""
        mlp = layer.mlp
        first = mlp.gate_up if mlp.gated else mlp.up
        rows = self.rows if self.only_loss_positions and index == len(self.layers) - 1 else self.tokens
        size = rows * self.dtype.itemsize
        width, inner, wide = (size * n for n in (mlp.down.out_features, mlp.down.in_features, first.out_features))
        grads = [_nbytes(learns & set(matrix.parameters())) for matrix in (mlp.down, first)]
        # The matrices' inputs lie among what the layer keeps, or are computed again. What was used goes.
        learnt = [_trained(matrix.weight) or matrix.lora is not None for matrix in (mlp.down, first)]
        again = inner if learnt[0] and mlp.down.recomputes() else 0
        kept = inner if learnt[0] and not again else 0
        norm = width if learnt[1] and first.recomputes() else 0
        product = inner if mlp.gated and self.backends["glu"] == "torch" else 0  # torch's path makes one on the way
        return [
            (width + inner + again + mlp.down.workspace_bytes(self.dtype), grads[0], 0),
            (width + inner + wide + product - kept, 0, grads[0]),
            (2 * width + norm + first.workspace_bytes(self.dtype) - kept, grads[1], grads[0]),
        ]

    def _new(self, rows: int, width: int, grad: bool = False) -> _Value:
        return _Value(rows, width * self.dtype.itemsize, grad)

    def _keep(self, saved: Saved, rows: int, **tensors: _Value) -> None:
        """Keep what a call of an operation saves on so many rows; ``tensors`` are its inputs and outputs."""
        self.held.update(tensors[name] for name in saved.tensors)
        own = (_Value(rows, saved.row_bytes), _Value(1, saved.bytes))
        self.held.update(value for value in own if value.width)

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
        moved = qkv  # q and k, which lie in one memory here: they are kept or not together
        grad, fused = qkv.grad, False
        if attn.q_norm is not None and attn.k_norm is not None:
            grad = grad or _learns(attn.q_norm) or _learns(attn.k_norm)
            fused = attn.norm_heads and not attn.q_norm.layer and attn.rope is not None  # into RoPE
            if not fused:
                moved = self._new(x.rows, heads * dim, grad)
                if grad:
                    each = heads if attn.norm_heads else 2
                    self._keep(self._norm_saved(attn.q_norm), each * x.rows, x=qkv)
        if attn.rope is not None:
            tables, turned = self.tables[attn.rope], self._new(x.rows, heads * dim, grad)
            if grad:
                saved = rope.saved(self.dtype, dim, heads, self.backends["rope"], normed=fused)
                self.tables_held.update(tables[name] for name in saved.tensors if name in tables)
                own = tuple(name for name in saved.tensors if name not in tables)
                self._keep(saved._replace(tensors=own), x.rows, q=moved, k=moved)
            moved = turned
        out = self._new(x.rows, attn.heads * dim, grad)
        if grad:
            v = qkv if moved is qkv else self._new(x.rows, attn.kv_heads * dim)
            window, device = attn.options["window"], self.model.device
            saved = attention.saved(
                self.dtype,
                attn.heads,
                self.backends["attention"],
                device=torch.device("cpu") if device.type == "meta" else device,
                window=None if window is not None and window >= self.longest else window,
                softcap=attn.options["softcap"],
            )
            self._keep(saved, x.rows, q=moved, k=moved, v=v, out=out)
            if self.backends["attention"] == "sdpa":
                # torch may copy k and v to as many heads as q has.
                self.held.add(self._new(x.rows, 2 * (attn.heads - attn.kv_heads) * dim))
        return self._linear(attn.o, _Value(self.rows, out.width, out.grad) if cut else out)

    def _mlp(self, mlp: MLP, x: _Value, recompute_from: _Value | None) -> _Value:
        wide = self._linear(mlp.gate_up if mlp.gated else mlp.up, x, recompute_from)
        if wide.grad:
            saved = activation.saved() if mlp.gated else Saved(("gate_up",))  # torch's GELU keeps its input
            self._keep(saved, x.rows, gate_up=wide)
        return self._linear(mlp.down, self._new(x.rows, mlp.down.in_features, wide.grad), wide)

    def _linear(self, layer: Linear, x: _Value, recompute_from: _Value | None = None) -> _Value:
        """``recompute_from``: what its input can be computed from."""
        source = recompute_from if layer.recomputes() and recompute_from is not None else x
        self._keep(linear.saved(layer, x.rows, self.dtype), x.rows, x=source)
        grad = x.grad or layer.lora is not None or _trained(layer.weight, layer.bias)
        return self._new(x.rows, layer.out_features, grad)

    def _add(self, module: Norm | None, residual: _Value, branch: _Value | None) -> tuple[_Value, _Value]:
        total = residual if branch is None else _sum(residual, branch)
        return (total if module is None else self._norm(module, total)), total

    def _norm(self, module: Norm, x: _Value) -> _Value:
        y = _Value(x.rows, x.width, x.grad or _learns(module))
        if y.grad:
            self._keep(self._norm_saved(module), x.rows, x=x)
        return y

    def _norm_saved(self, module: Norm) -> Saved:
        backend = self.backends["layer_norm" if module.layer else "rms_norm"]
        return norm.saved(self.dtype, backend, layer=module.layer)


def _size(values: set[_Value]) -> int:
    return sum(value.rows * value.width for value in values)


def _sum(a: _Value, b: _Value) -> _Value:
    return _Value(a.rows, a.width, a.grad or b.grad)


def _trained(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _learns(norm: Norm) -> bool:
    return _trained(norm.weight, norm.bias)
