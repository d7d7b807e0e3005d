"""AdamW over a model's parameters: decay on matrices only, fp32 master weights where the model computes in bf16.

Decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) shrinks matrices; norms, biases
and embeddings are left alone. A bf16 weight has 8 bits of mantissa, so an update under 1/512 of it is rounded away:
1,000 updates of -1e-3 from 1.0 leave exactly 1.0. Hence the fp32 copy that takes the updates; the bf16 weight is its
rounding, written in the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from afina.kernels.adamw import adamw_


class AdamW:
    """Optimizer state and update for the trainable parameters of ``model``.

    Attributes: ``params`` (name -> model parameter), ``masters`` (name -> fp32 weights; the parameter's own memory when
    it is fp32), ``exp_avgs`` and ``exp_avg_sqs`` (name -> fp32 moments), ``num_updates`` (weight updates applied
    so far). ``decay``: names of the parameters that decay. ``lr_scales``: what multiplies the learning rate of a
    parameter, by its name (else 1).
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
    ) -> None:
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p.detach() if p.dtype == torch.float32 else p.detach().float() for name, p in self.params.items()
        }
        self.exp_avgs = {name: torch.zeros_like(w) for name, w in self.masters.items()}
        self.exp_avg_sqs = {name: torch.zeros_like(w) for name, w in self.masters.items()}
        self.betas, self.eps = betas, eps
        groups: dict[tuple[float, float], list[str]] = {}
        for name in self.params:
            key = (weight_decay if name in decay else 0.0, (lr_scales or {}).get(name, 1.0))
            groups.setdefault(key, []).append(name)
        self.groups = [(names, *key) for key, names in groups.items()]
        self.num_updates = 0

    def clip_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their global 2-norm is at most ``max_norm`` (0: never).

        Returns the norm before, fp32 (); call it once, after the last micro-batch of a step.
        """
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]))
        if max_norm > 0:
            # Same formula as torch's clip_grad_norm_, so that losses can be compared with its users'.
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update at learning rate ``lr`` from the parameters' ``.grad``; those without one stay."""
        self.num_updates += 1
        for names, weight_decay, lr_scale in self.groups:
            grads = {n: g for n in names if (g := self.params[n].grad) is not None}
            live = list(grads)
            adamw_(
                [self.masters[n] for n in live],
                list(grads.values()),
                [self.exp_avgs[n] for n in live],
                [self.exp_avg_sqs[n] for n in live],
                step=self.num_updates,
                lr=lr * lr_scale,
                betas=self.betas,
                eps=self.eps,
                weight_decay=weight_decay,
                copies=[None if self.params[n].dtype == torch.float32 else self.params[n] for n in live],
            )

    def _round_masters(self) -> None:
        rounded = [n for n, p in self.params.items() if p.dtype != torch.float32]
        if rounded:
            torch._foreach_copy_([self.params[n].data for n in rounded], [self.masters[n] for n in rounded])

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds: the fp32 weights and both moments, by parameter name."""
        return {"weights": self.masters, "exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs}

    @torch.no_grad()
    def load_state(self, state: dict[str, dict[str, Tensor]], num_updates: int) -> None:
        """Take back what ``state()`` returned; names and shapes must be this model's (ValueError otherwise)."""
        for group, ours in self.state().items():
            theirs = state.get(group, {})
            if theirs.keys() != ours.keys() or any(theirs[n].shape != ours[n].shape for n in ours):
                raise ValueError(
                    f"optimizer state {group!r} belongs to another model or another set of trained weights"
                )
            for name, tensor in ours.items():
                tensor.copy_(theirs[name])
        self.num_updates = num_updates
        self._round_masters()
