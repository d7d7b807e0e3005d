"""CUDA graphs: launches that are captured once, and repeated by one call.

A graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) repeats the kernels that were launched while
it was captured, with the same numbers, on the same addresses; what it reads and writes lies where it lay then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

WARM_UPS = 2  # runs before a capture: kernels compile, workspaces and tables are made


class Graph(Protocol):
    """What can repeat a program: on a GPU a ``CudaGraph``."""

    def capture(self, program: Callable[[], None]) -> None:
        """Run the program ``WARM_UPS`` times, and record it once more, perhaps without running it."""

    def replay(self) -> None:
        """Repeat what was recorded, behind the work that is on its way."""


class Shared(NamedTuple):
    """What graphs have in common: memory, where none may keep a result if there are several, and the stream that
    captures."""

    pool: Any
    stream: torch.cuda.Stream

    @classmethod
    def on(cls, device: torch.device) -> Shared:
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))


class CudaGraph:
    """A graph of a GPU."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.graph = shared, torch.cuda.CUDAGraph()

    def capture(self, program: Callable[[], None]) -> None:
        pool, stream = self.shared
        here = torch.cuda.current_stream(stream.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                program()
        here.wait_stream(stream)
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            program()

    def replay(self) -> None:
        self.graph.replay()
