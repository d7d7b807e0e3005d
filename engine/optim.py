"""AdamW over a model's parameters: decay on matrices only, and what the optimizer holds for each of them.

Decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) shrinks matrices; norms, biases
and embeddings are left alone. A bf16 weight has 8 bits of mantissa, so an update under 1/512 of it is rounded away:
1,000 updates of -1e-3 from 1.0 leave exactly 1.0. The variants answer that in two ways, and hold for a bf16 parameter:
    adamw         fp32 weights (masters) that take the updates, and fp32 moments                      4 + 4 + 4 bytes
    adamw_8bit    masters, and moments of 8 bits with an fp32 absmax for each 256 values        4 + 2 (1 + 4 / 256)
    adamw_bf16    bf16 moments alone: the parameter takes the updates, rounded stochastically                   2 + 2
The bf16 weight is the rounded master, written in the same pass. An fp32 parameter is its own master, and `adamw_bf16`
is not for it. The roundings and the 8-bit codes are explained in kernels/adamw.py.

All this may lie in the host's memory instead (`optim_offload.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil

import torch
from torch import Tensor, nn

from afina.engine.gradient_offload import HostGradients
from afina.engine.host_memory import HostMemory, check_room
from afina.engine.optim_offload import Chunk, StagedState
from afina.engine.weight_offload import HostWeights
from afina.errors import ConfigError
from afina.kernels.adamw import Moment, adamw_
from afina.kernels.blockwise import BLOCK8, State8

VARIANTS = ("adamw", "adamw_8bit", "adamw_bf16")


def bytes_held(variant: str, dtype: torch.dtype, numel: int) -> int:
    """Return the bytes that the optimizer holds for a parameter of this dtype and size, beside the parameter itself.

    They are those of its master and of both moments, absmax included. Raises ConfigError for an unknown variant, and
    for a dtype that `adamw_bf16` is not for.
    """
    _check(variant, dtype, "the model")
    if variant == "adamw_bf16":
        return 2 * 2 * numel
    master = 0 if dtype == torch.float32 else 4 * numel
    moment = numel + 4 * ceil(numel / BLOCK8) if variant == "adamw_8bit" else 4 * numel
    return master + 2 * moment


def bytes_per_parameter(variant: str, dtype: torch.dtype) -> float:
    """Return `bytes_held` for one of the many parameters of a tensor, whose last block of 256 is full."""
    return bytes_held(variant, dtype, BLOCK8) / BLOCK8


def _check(variant: str, dtype: torch.dtype, what: str) -> None:
    if variant not in VARIANTS:
        raise ConfigError(f"optim: expected one of {', '.join(VARIANTS)}, found {variant!r}")
    if variant == "adamw_bf16" and dtype != torch.bfloat16:
        found = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"optim: adamw_bf16 rounds bfloat16 weights stochastically, but {what} is {found}; train in bfloat16, or "
            "choose adamw or adamw_8bit"
        )


def gradient_norm(grad: Tensor) -> Tensor:
    """The 2-norm of one gradient, fp32 ()."""
    return torch.linalg.vector_norm(grad, dtype=torch.float32)


def global_norm(norms: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients of these norms together, fp32 ()."""
    return torch.linalg.vector_norm(torch.stack(list(norms)))


class AdamW:
    """Optimizer state and update for the trainable parameters of ``model``.

    Attributes:
        params: name -> parameter of the model.
        masters: name -> the weights that take the updates, in fp32; the parameter's own memory when it is fp32, and in
            the variant ``adamw_bf16``.
        exp_avgs, exp_avg_sqs: name -> moment, fp32, bf16 or `State8`, as the variant says.
        num_updates: How many updates have been applied.
        on_host: The names of those whose state lies in the host's memory.

    Args:
        model: Those of its parameters that require a gradient are updated.
        decay: The names of the parameters that decay.
        lr_scales: What multiplies the learning rate of a parameter, by its name; 1 for the others.
        variant: One of ``VARIANTS``.
        seed: From 0 to 2**32 - 1. With ``adamw_bf16``, seed and number of an update give the bits of its roundings, so
            a resumed run repeats them. The other variants draw nothing.
        offload: The names of those whose state lies in the host's memory. They move on ``device``; in between they may
            wait on the host themselves, which is what ``host_weights`` is for.
        gradients: Whether the gradients of those go to the host, too, when it is not known yet that they may be used.

    Raises ConfigError for an unknown variant, and for parameters that are not bf16 with ``adamw_bf16``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: set[str],
        lr_scales: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        variant: str = "adamw",
        seed: int = 0,
        offload: Collection[str] = (),
        gradients: bool = False,
        host_weights: HostWeights | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in self.params.items():
            _check(variant, p.dtype, name)
        self.variant, self.seed = variant, seed
        self.device = device or next((p.device for p in self.params.values()), torch.device("cpu"))
        self.on_host = set(offload) & self.params.keys()
        self.host_weights = host_weights
        self.host_gradients: HostGradients | None = None
        if self.on_host and self.device.type != "meta":
            check_room(self.host_nbytes, "offload_optimizer")
        self._host: list[HostMemory] = []  # page-locked as long as this lives
        own = torch.bfloat16 if variant == "adamw_bf16" else torch.float32
        self.masters = {n: p.detach() if p.dtype == own else self._master(n, p) for n, p in self.params.items()}
        self.exp_avgs = {name: self._zero_moment(name, signed=True) for name in self.params}
        self.exp_avg_sqs = {name: self._zero_moment(name, signed=False) for name in self.params}
        self._staged: StagedState | None = None
        self._chunks: dict[str, list[Chunk]] = {}
        self._views: dict[tuple[str, int], Tensor] = {}
        if self.on_host:
            held = {n: (self._own_master(n), (self.exp_avgs[n], self.exp_avg_sqs[n])) for n in self.on_host}
            largest = max(self.params[n].numel() for n in self.on_host)
            self._staged = StagedState(next(iter(held.values())), largest, self.device)
            if gradients:
                away = {n: p for n, p in self.params.items() if n in self.on_host}
                self.host_gradients = HostGradients(away, self._staged.size, self.device)
            if self.device.type != "meta":
                self._chunks = {n: self._staged.chunks(*of, self.params[n].numel()) for n, of in held.items()}
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        # Weight decay and the factor of the learning rate of each parameter; those of equal ones are updated together.
        self.factors = {n: (weight_decay if n in decay else 0.0, (lr_scales or {}).get(n, 1.0)) for n in self.params}
        groups: dict[tuple[float, float], list[str]] = {}
        for name, factors in self.factors.items():
            groups.setdefault(factors, []).append(name)
        self.groups = [(names, *factors) for factors, names in groups.items()]
        self.num_updates = 0

    def like(self, model: nn.Module) -> AdamW:
        """A new optimizer under the same settings for another model: all of its matrices decay."""
        decay = {name for name, p in model.named_parameters() if p.dim() == 2}
        return AdamW(
            model,
            decay=decay,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            variant=self.variant,
            seed=self.seed,
        )

    def _master(self, name: str, parameter: Tensor) -> Tensor:
        """The fp32 weight that stands behind a parameter of another dtype."""
        if name not in self.on_host:
            return parameter.detach().float()
        master = self._on_host(parameter.shape, torch.float32)
        return master if master.is_meta else master.copy_(parameter.detach())

    def _zero_moment(self, name: str, *, signed: bool) -> Moment:
        weight = self.masters[name]
        eight = self.variant == "adamw_8bit"
        if name in self.on_host and eight:
            codes = self._on_host(weight.shape, torch.uint8)
            return State8(codes, self._on_host((ceil(weight.numel() / BLOCK8),), torch.float32), signed)
        if name in self.on_host:
            return self._on_host(weight.shape, weight.dtype)
        if eight:
            return State8.zeros_like(weight, signed=signed)
        # zeros_like of a tensor on meta, which a run that is only checked has, would import sympy: most of a second.
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)

    def _on_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._host.append(HostMemory(shape, dtype, self.device))
        return self._host[-1].tensor

    @property
    def nbytes(self) -> int:
        """The bytes of the device that are held beside the parameters: masters, moments, absmax, and room for those of
        the host on their way."""
        rooms = sum(x.nbytes for x in (self._staged, self.host_gradients) if x is not None)
        return self._held(self.params.keys() - self.on_host) + rooms

    @property
    def host_nbytes(self) -> int:
        """The bytes that are held in the host's memory."""
        return self._held(self.on_host) + (self.host_gradients.host_nbytes if self.host_gradients else 0)

    def _held(self, names: Collection[str]) -> int:
        return sum(bytes_held(self.variant, p.dtype, p.numel()) for n, p in self.params.items() if n in names)

    def clip_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their global 2-norm is at most ``max_norm``; 0 leaves them as they are.

        Returns the norm before that, fp32 (). It is called once, after the last micro-batch of a step.
        """
        away = self.host_gradients
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        norms = {} if away is None else away.norms
        own = {n: gradient_norm(p.grad) for n, p in self.params.items() if p.grad is not None}
        norm = global_norm([found for n in self.params if (found := own.get(n, norms.get(n))) is not None])
        if max_norm > 0:
            # The formula is that of torch's clip_grad_norm_, so that losses can be compared with its users'.
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            if grads:  # of adapters all may be away
                torch._foreach_mul_(grads, scale)
            if away is not None:
                away.scale = scale
        return norm

    @torch.no_grad()
    def step(self, lr: float | Tensor, *, skip: Tensor | None = None, count: Tensor | None = None) -> None:
        """Apply one update at learning rate ``lr`` from the parameters' ``.grad``; those without one stay.

        Where ``skip``, bool () on the parameters' device, is true, weights and moments stay as they are, which on a GPU
        is decided there. The update is counted nevertheless: whoever learns that it was skipped takes 1 from
        ``num_updates`` before the next one.

        With ``count``, int64 (), which update this is (from 1), and ``lr``, float64 (), on the parameters' device, the
        update is a fixed sequence of launches, for a CUDA graph: the host has no part in it, nor is it counted. State
        on the host's memory cannot take part.
        """
        if count is None:
            self.num_updates += 1
        # Groups draw from seeds of their own, so that the roundings of one do not repeat those of another.
        for i, (names, *_) in enumerate(self.groups):
            given = [n for n in names if self.params[n].grad is not None]
            self.update([n for n in given if n not in self.on_host], lr, skip=skip, draw=i, count=count)
        waiting = self.host_gradients.norms if self.host_gradients else {}
        for i, name in enumerate(self.params, len(self.groups)):
            if name in self.on_host and (self.params[name].grad is not None or name in waiting):
                self.update([name], lr, skip=skip, draw=i)

    @torch.no_grad()
    def update(
        self, names: Sequence[str], lr: float | Tensor, *, skip: Tensor | None, draw: int, count: Tensor | None = None
    ) -> None:
        """Apply an update, the ``num_updates``-th, to parameters with gradients that share their factors, or to one
        whose state is on the host; with ``adamw_bf16`` calls of one update need a ``draw`` each, below 2**18. ``count``
        is that of ``step``."""
        if not names:
            return
        if names[0] in self.on_host:
            (name,) = names
            assert isinstance(lr, float), "what is on the host is no part of a fixed sequence of launches"
            self._update_from_host(name, lr, skip, draw)
            return
        self._apply(
            names,
            [self.masters[n] for n in names],
            [g for n in names if (g := self.params[n].grad) is not None],
            [(self.exp_avgs[n], self.exp_avg_sqs[n]) for n in names],
            [self.params[n] if self._has_copy(n) else None for n in names],
            lr, skip, draw, count,
        )  # fmt: skip

    def _update_from_host(self, name: str, lr: float, skip: Tensor | None, draw: int) -> None:
        """As ``update``, of a parameter whose state comes from the host, chunk by chunk, and perhaps its gradient."""
        parameter, staged, away = self.params[name], self._staged, self.host_gradients
        assert staged is not None
        grad = None if parameter.grad is None else parameter.grad.reshape(-1)
        weights = self.host_weights if self.host_weights and parameter in self.host_weights else None
        if weights is not None:
            weights.bring(parameter)
        for i, chunk in enumerate(self._chunks[name]):
            part = self._part(name, i, chunk)
            master, moments = staged.bring(chunk)
            copy = None if master is None else part
            weight = part if master is None else master
            if grad is not None:
                own = grad[chunk.start : chunk.stop]
            else:
                assert away is not None
                own = away.part(name, chunk.start, chunk.stop)
            self._apply([name], [weight], [own], [moments], [copy], lr, skip, draw + (i << 18))
            staged.take_back(chunk)
        if weights is not None:
            weights.write_back(parameter)

    def _part(self, name: str, index: int, chunk: Chunk) -> Tensor:
        """These elements of the parameter, where it is now; the same view as last time if that is the same place."""
        parameter = self.params[name].detach()
        place = parameter.data_ptr() + chunk.start * parameter.itemsize
        view = self._views.get((name, index))
        if view is None or view.data_ptr() != place:
            view = self._views[name, index] = parameter.view(-1)[chunk.start : chunk.stop]
        return view

    def _apply(
        self, names: Sequence[str], weights: Sequence[Tensor], grads: Sequence[Tensor],
        moments: Sequence[tuple[Moment, Moment]], copies: Sequence[Tensor | None], lr: float | Tensor,
        skip: Tensor | None, draw: int, count: Tensor | None = None,
    ) -> None:  # fmt: skip
        weight_decay, lr_scale = self.factors[names[0]]
        adamw_(
            weights,
            grads,
            [first for first, _ in moments],
            [second for _, second in moments],
            step=self.num_updates if count is None else count,
            lr=lr * lr_scale,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
            skip=skip,
            copies=copies,
            seed=(self.seed + draw) % 2**32 if self.variant == "adamw_bf16" else None,
        )

    def _has_copy(self, name: str) -> bool:
        """Return whether the parameter is the rounded copy of a master."""
        return self.params[name].dtype != self.masters[name].dtype

    def _own_master(self, name: str) -> Tensor | None:
        return self.masters[name] if self._has_copy(name) else None

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None
        if self.host_gradients is not None:
            self.host_gradients.forget()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds, by parameter name: the masters and both moments.

        Moments of 8 bits are two groups each, the codes and their absmax.
        """
        if self._staged is not None:
            self._staged.link.drain()
        groups: dict[str, dict[str, Tensor]] = {"weights": self.masters}
        for group, moments in (("exp_avg", self.exp_avgs), ("exp_avg_sq", self.exp_avg_sqs)):
            groups[group] = {n: m.codes if isinstance(m, State8) else m for n, m in moments.items()}
            if absmax := {n: m.absmax for n, m in moments.items() if isinstance(m, State8)}:
                groups[f"{group}_absmax"] = absmax
        return groups

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, Tensor]], num_updates: int) -> None:
        """Take back what ``state()`` returned.

        Raises ValueError, before anything is changed, where names and shapes are not this model's, or where the groups
        and dtypes are not this variant's.
        """
        ours = self.state()
        for group, members in ours.items():
            theirs = state.get(group, {})
            if group in state and any(theirs[n].dtype != members[n].dtype for n in members.keys() & theirs.keys()):
                raise ValueError(f"optimizer state {group!r} is not of {self.variant}: resume with the optim it is of")
            if theirs.keys() != members.keys() or any(theirs[n].shape != members[n].shape for n in members):
                raise ValueError(
                    f"optimizer state {group!r} belongs to another model or another set of trained weights"
                )
        if more := state.keys() - ours.keys():
            raise ValueError(f"optimizer state {min(more)!r} is not of {self.variant}: resume with the optim it is of")
        for group, members in ours.items():
            for name, tensor in members.items():
                tensor.copy_(state[group][name])
        self.num_updates = num_updates
        if rounded := [n for n in self.params if self._has_copy(n)]:
            torch._foreach_copy_([self.params[n].data for n in rounded], [self.masters[n] for n in rounded])
