"""One decoding step over fixed buffers: on a GPU a captured CUDA graph for each size of a batch.

A step of a small model is hundreds of launches that take the host longer than the GPU. A graph (`captured.py`) launches
them all at once; what it reads lies where it lay at capture, so the inputs are copied into buffers. Nothing in a step
waits for the GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afina.engine.captured import CudaGraph, Shared
from afina.engine.kv_pool import KVPool, StepCache
from afina.engine.lean_layers import LeanStep
from afina.streams import say

if TYPE_CHECKING:
    from afina.engine.model import GPT

INPUTS = 4  # ids, starts, lengths, places: the rows of a step's table (see ``StepCache``)


class DecodeStep:
    """``step(table)`` gives the logits (B, V) behind the tokens of ``table``, int64 (4, B) on the CPU: each row's last
    token, where its span starts, its length with that token, and the token's place in the pool."""

    def __init__(self, model: GPT, pool: KVPool, longest: int) -> None:
        self.model, self.pool, self.longest = model, pool, longest
        self.device = model.device
        self.captures = self.device.type == "cuda"
        self.lean = None if self.captures else LeanStep(model, pool, longest)
        self.captured: dict[tuple[int, int], tuple[Tensor, Tensor, CudaGraph]] = {}

    @torch.no_grad()
    def __call__(self, table: Tensor) -> Tensor:
        if self.captures:
            # An adapter is another graph: it is part of the model that was captured.
            key = table.shape[1], id(self.model.adapter)
            if key in self.captured or self._capture(key, table):
                inputs, out, graph = self.captured[key]
                inputs.copy_(table, non_blocking=True)
                graph.replay()
                return out
        return self.compute(table.to(self.device)) if self.lean is None else self.lean(table)

    def compute(self, table: Tensor) -> Tensor:
        """What a graph captures: no value of a tensor is looked at on the host."""
        ids, starts, lengths, places = table.unbind()
        cache = StepCache(self.pool, starts, lengths, places, self.longest)
        return self.model(ids[:, None], cache=cache)[:, 0]

    def _capture(self, key: tuple[int, int], table: Tensor) -> bool:
        """Capture a graph for batches of this size; whether that went well."""
        inputs = torch.zeros_like(table, device=self.device)
        inputs[3] = self.pool.tokens  # the steps before the capture write where nobody reads
        made: list[Tensor] = []
        graph = CudaGraph(Shared.on(self.device))  # which keeps its result, and so has memory of its own
        try:
            graph.capture(lambda: made.append(self.compute(inputs)))
        except RuntimeError as problem:
            reason = (str(problem).splitlines() or ["no reason given"])[0]
            say(f"afina: decoding without CUDA graphs, since capturing one failed: {reason}")
            self.captures = False
            return False
        self.captured[key] = inputs, made[-1], graph
        return True
