"""A CUDA graph on a CPU, for tests: what is captured is a list of operations on the memory they ran on.

``replay`` runs them again, on the same memory and with the same numbers: a rate that was a Python number, a tensor that
was made on the way, a branch that was taken stays as it was at the capture, exactly as on a GPU. What a stream that is
capturing refuses (a value read on the host, a shape that depends on values) raises here too. Launches of Triton's
interpreter are recorded like operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from afina.kernels import launch

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if name in READS or (name in ("index", "index_put", "index_put_") and masks):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        if not (func._schema.is_mutable or name.startswith("empty")):
            outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            if any(x.untyped_storage().data_ptr() in inputs for x in outputs):
                return result  # a view: its memory is what it was

            def again() -> None:
                for mine, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                    mine.copy_(new)

            self.calls.append(again)
        elif func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
        return result


class FakeGraph:
    """Stands for ``captured.CudaGraph``. ``made`` are all that a test has made, with how often each was replayed."""

    made: list[FakeGraph]

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.replays = 0
        self.made.append(self)

    def capture(self, program: Callable[[], None]) -> None:
        program()
        recorder = _Recorder()
        with pytest.MonkeyPatch.context() as patch:
            _record_launches(patch, recorder)
            with recorder:
                program()
        self.calls = recorder.calls

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for call in self.calls:
                call()


def count_launches(program: Callable[[], None]) -> int:
    """What a GPU would be asked to do in the program: operations that compute, and launches of our kernels, which do
    not run here. Raises where a capture would."""
    recorder = _Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "recorder", lambda *_: recorder.calls.append(lambda: None))
        with recorder:
            program()
    return len(recorder.calls)


def _record_launches(patch: pytest.MonkeyPatch, recorder: _Recorder) -> None:
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def recorded(executor: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(executor, *args, **kwargs)
        recorder.calls.append(lambda: run(executor, *args, **kwargs))

    patch.setattr(GridExecutor, "__call__", recorded)


@pytest.fixture
def fake_graphs() -> type[FakeGraph]:
    FakeGraph.made = []
    return FakeGraph
