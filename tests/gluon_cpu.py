"""A stand-in for the part of Gluon that the attention kernels use, on numpy: the kernels' own source runs on it.

The partitions of a program are threads of which one runs at a time. Wherever it touches a barrier, a seeded draw says
who goes on: a partition that need not wait, a copy that lands, or a product that is computed. So a run can be repeated,
a deadlock is noticed when nobody can go on, and what may happen in any order does. Shared memory is NaN until a copy
lands and again from the moment that the next one is ordered, so whoever reads too early, or gives a slot back before it
has read, computes NaN. The result of a product cannot be touched before it has been waited for. Reading or writing
outside of a tensor raises.

It knows nothing of layouts, swizzles and registers: what the compiler makes of them has to be shown otherwise.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from conftest import REPO

FILES = ("attention_gluon", "attention_gluon_backward")
TYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int64")}
EARLY = 0.1  # how often a copy lands, or a product is computed, though a partition could go on
INITIAL = "initial"  # the state of a barrier that nobody has initialised


class Deadlock(Exception):
    """No partition can go on, and no copy or product is under way."""


# ---------------------------------------------------------------- Who goes on


class Program:
    """The partitions of one program, its copies in flight, and the draw."""

    def __init__(self, index: int, count: int, draw: random.Random) -> None:
        self.index, self.count, self.draw = index, count, draw
        self.waits: dict[int, Callable[[], bool]] = {}  # partition -> whether it can go on
        self.batons: dict[int, threading.Semaphore] = {}
        self.copies: list[Callable[[], None]] = []
        self.products: dict[int, list[Product]] = {}  # not computed yet, in their order
        self.unfinished: dict[int, list[Product]] = {}  # and those that no wait has named done
        self.failure: BaseException | None = None

    def pause(self, partition: int, ready: Callable[[], bool]) -> None:
        """Let others go on, and come back when `ready`."""
        self.waits[partition] = ready
        if self.next() != partition:
            self.batons[partition].acquire()
        if self.failure is not None:
            raise self.failure

    def next(self) -> int | None:
        """Have things happen until it is a partition's turn, and pass it the baton unless it is the caller's own."""
        while True:
            able = [p for p, ready in self.waits.items() if ready()]
            under_way = self.copies + [queue[0] for queue in self.products.values() if queue]
            if self.failure is None and not able and not under_way and self.waits:
                self.failure = Deadlock(f"partitions {sorted(self.waits)} wait for what never comes")
            if self.failure is not None or not self.waits:
                for baton in self.batons.values():
                    baton.release()
                return None
            if able and (not under_way or self.draw.random() > EARLY):
                partition = self.draw.choice(able)
                del self.waits[partition]
                if partition != current.partition:
                    self.batons[partition].release()
                return partition
            event = self.draw.choice(under_way)
            if isinstance(event, Product):
                event.compute()
                self.products[event.partition].remove(event)
            else:
                self.copies.remove(event)
                event()

    def run(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        def work(partition: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            current.program, current.partition = self, partition
            self.batons[partition].acquire()
            try:
                if self.failure is None:
                    with np.errstate(all="ignore"):
                        function(*arguments)
                    assert not self.unfinished[partition], "a product was never waited for"
            except BaseException as failure:
                self.failure = self.failure or failure
            current.partition = None
            self.next()

        threads = []
        for i, (function, arguments) in enumerate(partitions):
            self.waits[i], self.batons[i] = (lambda: True), threading.Semaphore(0)
            self.products[i], self.unfinished[i] = [], []
            threads.append(threading.Thread(target=work, args=(i, function, arguments), daemon=True))
        for thread in threads:
            thread.start()
        current.partition = None
        self.next()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        assert not self.copies, "a copy was never waited for"


class Current(threading.local):
    program: Program
    partition: int | None


current = Current()


def pause(ready: Callable[[], bool] = lambda: True) -> None:
    assert current.partition is not None
    current.program.pause(current.partition, ready)


# ---------------------------------------------------------------- What they work with


class Registers(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: str) -> Registers:
        rounded = torch.from_numpy(np.ascontiguousarray(self)).to(TYPES[dtype])
        return registers(rounded.float().numpy() if rounded.is_floating_point() else rounded.numpy())


def registers(array: Any) -> Registers:
    return np.asarray(array).view(Registers)


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def index(self, i: int) -> Shared:
        return Shared(self.array[i], self.dtype)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.array.reshape(shape), self.dtype)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.array.transpose(order), self.dtype)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert dim == 0
        return Shared(self.array[start : start + length], self.dtype)

    def load(self, layout: Any) -> Registers:
        return registers(self.array.copy())

    def store(self, x: Registers) -> None:
        self.array[...] = x


class Barrier:
    """An mbarrier: a phase is complete when all have arrived and all expected bytes have landed."""

    def __init__(self) -> None:
        self.count: Any = INITIAL
        self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def change(self, arrivals: int, landed: int) -> None:
        assert self.count != INITIAL, "a barrier that nobody has initialised"
        self.pending -= arrivals
        self.bytes -= landed
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def wait(self, parity: int) -> None:
        assert parity in (0, 1)
        pause(lambda: self.phase != parity)


class Descriptor:
    """A tensor that the copy engine reads by blocks; what lies outside of it is 0."""

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any):
        assert list(base.shape if len(shape) > 1 else [base.numel()]) == shape
        self.tensor = base if len(shape) > 1 else base.flatten()
        self.block, self.layout = block_shape, layout
        assert all(step * base.itemsize % 16 == 0 for step in strides[:-1])
        assert strides[-1] == 1
        self.dtype = str(base.dtype).removeprefix("torch.")
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block_shape)) * base.itemsize)

    def read(self, coordinates: list[int]) -> np.ndarray:
        block = torch.zeros(self.block)
        ends = [min(n, c + b) for n, c, b in zip(self.tensor.shape, coordinates, self.block)]
        assert all(c >= 0 for c in coordinates)
        if all(end > c for end, c in zip(ends, coordinates)):
            found = self.tensor[tuple(slice(c, end) for c, end in zip(coordinates, ends))].float()
            block[tuple(slice(0, n) for n in found.shape)] = found
        return block.numpy()


class Pointer:
    """Into the numbers of a contiguous tensor."""

    def __init__(self, numbers: torch.Tensor, offset: Any = 0) -> None:
        self.numbers, self.offset = numbers, offset
        self.dtype = SimpleNamespace(element_ty=str(numbers.dtype).removeprefix("torch."))

    def __add__(self, elements: Any) -> Pointer:
        return Pointer(self.numbers, self.offset + elements)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        at = np.asarray(self.offset)
        inside = np.broadcast_to(True if mask is None else np.asarray(mask), at.shape)
        assert ((at >= 0) & (at < self.numbers.numel()))[inside].all(), "outside of a tensor"
        return at, inside


def load(pointer: Pointer, mask: Any = None, other: float = 0) -> Any:
    at, inside = pointer.places(mask)
    found = pointer.numbers[torch.from_numpy(np.where(inside, at, 0))].numpy()
    return int(found) if at.ndim == 0 else registers(np.where(inside, found, found.dtype.type(other)))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, inside = pointer.places(mask)
    values = torch.from_numpy(np.ascontiguousarray(np.broadcast_to(value, at.shape)[inside]))
    pointer.numbers[torch.from_numpy(at[inside])] = values.to(pointer.numbers.dtype)


# ---------------------------------------------------------------- What they do


class Product:
    """A product under way: its operands in shared memory are read, and its result is there, some time before its end
    has been waited for."""

    def __init__(self, a: Any, b: Shared, base: Any, use_acc: bool) -> None:
        assert not any(isinstance(x, Product) for x in (a, base)), "an operand that has not been waited for"
        assert current.partition is not None
        self.partition, self.value = current.partition, None
        self.a, self.b, self.base = a, b, base if use_acc else 0

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("the result of a product that has not been waited for")

    def compute(self) -> None:
        a = self.a.array if isinstance(self.a, Shared) else self.a
        self.value = registers(a @ self.b.array + self.base)


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
    assert is_async
    product = Product(a, b, acc, use_acc)
    current.program.products[product.partition].append(product)
    current.program.unfinished[product.partition].append(product)
    return product


def warpgroup_mma_wait(num_outstanding: int, deps: list[Any]) -> Any:
    assert current.partition is not None
    queue, unfinished = current.program.products[current.partition], current.program.unfinished[current.partition]
    pause(lambda: len(queue) <= num_outstanding)
    del unfinished[: max(0, len(unfinished) - num_outstanding)]
    results = [x.value if isinstance(x, Product) and x not in unfinished else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def copy(desc: Descriptor, coordinates: list[int], barrier: Barrier, target: Shared) -> None:
    def land() -> None:
        target.array[...] = desc.read([int(c) for c in coordinates]).reshape(target.array.shape)
        barrier.change(0, desc.block_type.nbytes)

    target.array[...] = np.nan
    current.program.copies.append(land)
    pause()


def arrive(barrier: Barrier, *, count: int) -> None:
    barrier.change(count, 0)
    pause()


def allocate(dtype: str, shape: list[int], layout: Any) -> Any:
    if dtype == "int64":
        return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
    return Shared(np.full(shape, np.nan, np.float32), dtype)


class Jitted:
    """A function of a kernel; called with a grid, a kernel."""

    seed = 0

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int) -> None:
            assert num_warps == 4
            passed = [Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for x in arguments]
            draw = random.Random(Jitted.seed)
            for index in range(grid[0]):
                current.program = Program(index, grid[0], draw)
                self.function(*passed)

        return launch


def language() -> ModuleType:
    gl: Any = ModuleType("triton.experimental.gluon.language")
    for name in TYPES:
        setattr(gl, name, name)
    gl.constexpr, gl.static_range = object, range
    gl.program_id, gl.num_programs = (lambda axis: current.program.index), (lambda axis: current.program.count)
    gl.minimum, gl.maximum, gl.where = np.minimum, np.maximum, lambda c, a, b: registers(np.where(c, a, b))
    gl.exp2, gl.log2, gl.zeros_like = np.exp2, np.log2, np.zeros_like
    gl.max, gl.sum = np.max, np.sum
    gl.full = lambda shape, value, dtype, layout: registers(np.full(shape, value, dtype))
    gl.arange = lambda start, end, layout: registers(np.arange(start, end))
    gl.cast = lambda x, dtype: np.dtype(dtype).type(x)
    gl.convert_layout = lambda x, layout: x
    gl.load, gl.store, gl.allocate_shared_memory = load, store, allocate
    gl.warp_specialize = lambda partitions, warps, registers: current.program.run(partitions)
    for name in ("NVMMADistributed", "DotOperand", "Slice", "Blocked", "NVMMAShared", "SwizzledShared"):
        setattr(gl, f"{name}Layout", lambda *a, **k: None)
    gl.NVMMASharedLayout.get_default_for = lambda *a, **k: None
    return gl


def modules() -> dict[str, ModuleType]:
    """What stands in for Triton's own modules while the kernels' files are loaded."""
    gluon: Any = ModuleType("triton.experimental.gluon")
    gluon.jit = lambda function=None, **options: Jitted if function is None else Jitted(function)
    gluon.language = language()
    hopper: Any = ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.fence_async_shared = lambda: None
    hopper.mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, parity: barrier.wait(parity),
        expect=lambda barrier, count: barrier.change(1, -count),
        arrive=arrive,
    )
    hopper.tma = SimpleNamespace(async_copy_global_to_shared=copy)
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = warpgroup_mma, warpgroup_mma_wait
    host: Any = ModuleType("triton.experimental.gluon.nvidia.hopper")
    host.TensorDescriptor = Descriptor
    experimental: Any = ModuleType("triton.experimental")
    experimental.gluon = gluon
    return {module.__name__: module for module in (experimental, gluon, gluon.language, hopper, host)}


def delta(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """What the Triton kernel of this name gives; the interpreter would take most of the time for it."""
    return (out.float() * dout.float()).sum(-1).transpose(-1, -2).reshape(lse.shape).contiguous()


def kernels(fault: tuple[str, str] | None = None, *, processors: int = 3, seed: int = 0) -> SimpleNamespace:
    """`forward` and `backward` of the Gluon files, whose kernels then run on numpy.

    fault: a piece of their source that occurs there, and what to put in its place (all over, so that both consumers,
    or both kernels, have it). processors: how many programs there are. seed: of the draw.
    """
    loaded: dict[str, Any] = {}
    occurs = 0
    with mock.patch.dict(sys.modules, modules()):
        for name in FILES:
            path = Path(REPO / "kernels" / f"{name}.py")
            source = path.read_text()
            if fault is not None:
                occurs += source.count(fault[0])
                source = source.replace(*fault)
            module: Any = ModuleType(f"afina.kernels.{name}")
            loaded[name] = module
            sys.modules[module.__name__] = module
            exec(compile(source, str(path), "exec"), module.__dict__)
    if fault is not None and not occurs:
        raise ValueError(f"nothing to break: {fault[0]}")
    Jitted.seed = seed
    loaded["attention_gluon"].RECORDED_PROCESSORS = processors
    loaded["attention_gluon_backward"].attention_delta = delta
    return SimpleNamespace(
        forward=loaded["attention_gluon"].forward, backward=loaded["attention_gluon_backward"].backward
    )
