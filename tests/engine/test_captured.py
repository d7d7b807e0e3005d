"""engine/captured.py: what is asked of CUDA, in what order; that graphs give what launches give, a GPU has to show."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from afina.engine.captured import WARM_UPS, CudaGraph, Shared


class FakeStream:
    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.device = name, said, torch.device("cuda")

    def wait_stream(self, other: FakeStream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")


def test_a_program_runs_warm_on_a_stream_of_its_own_and_is_captured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream waits for the other, so that neither warm-ups nor what comes after them meet unfinished work."""
    said: list[str] = []
    side, here = FakeStream("side", said), FakeStream("here", said)

    class Made:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def on(stream: FakeStream) -> Any:
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    @contextmanager
    def graph(made: Any, *, pool: object, stream: FakeStream) -> Any:
        assert isinstance(made, Made)
        said.append(f"capture on {stream.name} in {pool}")
        yield
        said.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Made)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    made = CudaGraph(Shared.on(torch.device("cuda")))
    made.capture(lambda: said.append("program"))
    made.replay()
    assert said == [
        "side waits for here",
        *("on side", *["program"] * WARM_UPS, "off side"),
        "here waits for side",
        *("capture on side in pool", "program", "captured"),
        "replay",
    ]
