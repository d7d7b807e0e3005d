"""Every launch that the benchmarks, training and the self-test would make on a GPU, recorded on a machine without one.

Nothing here is a list of shapes: the benchmarks' own cases, the training benchmark's own step and the self-test's own
calls run, with the kernels' launches handed to a recorder. `Idle` makes that affordable: tensors of more than a few
thousand elements have a shape, strides and an address, and no numbers, for what torch would do with them is left out,
and memory that nobody touches is never there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton  # noqa: F401  # before the kernels: they take the compiler only where something will use it
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from afina.kernels import launch, selftest
from afina.kernels.cases import CASES, SPECIAL_CASES, Draw

SMALL = 1 << 16  # elements: what is not larger is computed, so that targets and offsets have values
LAYERS, MICRO_BATCHES = 2, 2  # of a model, and of its step: the others launch the same
NOT_KERNELS = ("bench_fp8_linear",)  # benchmarks of ours whose products are torch's own


class Idle(TorchDispatchMode):
    """Leaves out all arithmetic of large tensors on the CPU: a result has its shape, dtype and strides, and no more."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        small = bool(tensors) and all(x.numel() <= SMALL for x in tensors)
        if is_view or small or any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        if any(argument.alias_info is not None for argument in func._schema.arguments):  # it writes in place
            return kwargs.get("out", args[0]) if aliases else None
        if func.overloadpacket is torch.ops.aten.all:
            return torch.ones((), dtype=torch.bool)  # Numbers that are not there pass for finite ones.
        meta = {"device": torch.device("meta")} if any(a.name == "device" for a in func._schema.arguments) else {}
        shapes = func(*tree_map_only(Tensor, _meta, args), **(tree_map_only(Tensor, _meta, kwargs) | meta))
        if not tensors and shapes.numel() <= SMALL:
            return func(*args, **kwargs)
        return tree_map_only(Tensor, _untouched, shapes)


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _untouched(x: Tensor) -> Tensor:
    """Memory that is not there until someone reads it. Who reads what is small finds 0."""
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    return made.zero_() if x.numel() <= SMALL else made


def benchmarks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(case, what runs ours on it) of every benchmark of a kernel of ours that has cases for a GPU."""
    harness = import_module("harness")
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if path.stem in NOT_KERNELS:
            continue
        module = import_module(path.stem)
        if not isinstance(getattr(module, "Case", None), type) or module.Case is not harness.Case:
            continue
        for case in module.cases("gpu"):
            for name in case.providers:
                if name.startswith("afina") and name not in ("afina-torch", "afina-sdpa"):
                    yield f"{case.op} {case.name} {name}", partial(_both_passes, harness, case, name)


def _both_passes(harness: Any, case: Any, name: str) -> None:
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    function = case.providers[name](*inputs)
    if isinstance(function, harness.Peer):
        function = function.function
    outs = harness.listed(function())
    harness.gradients(outs, [x for x in inputs if x.requires_grad], upstream)


def training() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(model, what runs one of its steps) of the training benchmark, with all its methods."""
    module = import_module("bench_train_gpu")
    for name, shape in module.SHAPES["gpu"].items():
        micro_batches = min(MICRO_BATCHES, shape.micro_batches)
        small = shape._replace(config=shape.config | {"num_hidden_layers": LAYERS}, micro_batches=micro_batches)
        yield f"train {name}", partial(_step, module, small)


def _step(module: Any, shape: Any) -> None:
    with mock.patch.object(module, "dtype", return_value=torch.bfloat16):
        module.afina(shape).step(torch.zeros(shape.rows, shape.length, dtype=torch.int64))


def selftests() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(op and dtype, what runs its kernels) of the self-test on a GPU."""
    special = {op: cases for op, (cases, _) in SPECIAL_CASES.items()}
    for op, cases in (CASES | special).items():
        for dtype in selftest.APART.get(op, selftest.DTYPES):
            yield f"selftest {op} {dtype}", partial(_self_test, cases, dtype)


def _self_test(cases: Callable[[Draw], list[Any]], dtype: torch.dtype) -> None:
    for case in cases(Draw(torch.device("cpu"))):
        low = [x.to(dtype) for x in case.inputs.values()]
        selftest._evaluate(case, partial(case.call, backend="triton"), low)


SOURCES = {"benchmarks": benchmarks, "training": training, "selftest": selftests}


def record(source: str, recorder: Callable[[Any, dict[str, Any]], None]) -> list[str]:
    """Hand every launch of a source to `recorder`, as (kernel, arguments by name); the cases that launched nothing."""
    launches = 0

    def counted(kernel: Any, arguments: dict[str, Any]) -> None:
        nonlocal launches
        launches += 1
        recorder(kernel, arguments)

    silent = []
    harness: Any = import_module("harness")
    with (
        mock.patch.object(launch, "recorder", counted),
        mock.patch.object(harness, "DTYPE", torch.bfloat16),
        mock.patch.dict(os.environ, {"AFINA_BACKEND": "triton"}),
    ):
        for name, call in SOURCES[source]():
            before = launches
            # The self-test's tensors are small, and what it makes of them is not all arithmetic.
            with nullcontext() if source == "selftest" else Idle():
                call()
            if launches == before:
                silent.append(name)
    return silent
