"""The kernels' self-test: it passes, it sees what is wrong, and what it finds is remembered and acted upon."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPO
from kernel_checks import DEVICE

from afina.kernels import activation, launch, selftest
from afina.kernels.activation import swiglu
from afina.kernels.backend import choose, verified
from afina.kernels.cases import CASES, Case, Draw
from afina.kernels.selftest import DTYPES, Result, check, verify

CPU = torch.device("cpu")
OPS = pytest.mark.parametrize("op", CASES)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of its own, with its own cache."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AFINA_BACKEND", raising=False)
    verified.clear()
    yield
    verified.clear()


def only(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Let these be all the ops that there are."""
    monkeypatch.setattr(selftest, "CASES", {op: CASES[op] for op in ops})
    monkeypatch.setattr(selftest, "SPECIAL_CASES", {})


def test_every_op_that_asks_for_a_backend_has_cases() -> None:
    text = "".join(path.read_text() for path in (REPO / "kernels").glob("*.py"))
    assert set(re.findall(r'choose\("(\w+)"', text)) == set(CASES)


# ---------------------------------------------------------------- the checks


@OPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_passes_without_a_trace(op: str, dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        results = check(op, DEVICE, "torch", dtype)
    assert [r for r in results if not r.ok] == []
    assert torch.equal(torch.get_rng_state(), before)


@OPS
def test_triton_passes_and_never_asks_again(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_BACKEND", "none")  # an error for whoever leaves the backend open
    dtypes = [torch.bfloat16] if DEVICE.type == "cpu" else DTYPES
    assert [r for dtype in dtypes for r in check(op, DEVICE, "triton", dtype) if not r.ok] == []


@OPS
def test_a_tenth_of_a_percent_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every output and every gradient; but for 8-bit moments, which are hardly better themselves."""

    def off(case: Case) -> Case:
        def call(*inputs: Any, **options: Any) -> Any:
            made = case.call(*inputs, **options)
            return tuple(1.001 * x for x in made) if isinstance(made, tuple) else 1.001 * made

        return case._replace(call=call)

    cases = CASES[op]
    monkeypatch.setitem(CASES, op, lambda draw: [off(case) for case in cases(draw)])
    results = check(op, CPU, "torch", torch.float32)
    assert [r for r in results if r.ok and "8-bit" not in r.quantity] == []


def test_a_wrong_gradient_a_wrong_shape_and_nan_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"a": Draw(CPU)(3, 4), "b": Draw(CPU)(3, 4)}

    def product(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        return a * b

    def found(call: Callable[..., Any]) -> dict[str, bool]:
        monkeypatch.setitem(CASES, "glu", lambda draw: [Case(inputs, call, product)])
        return {r.quantity: r.ok for r in check("glu", CPU, "triton", torch.float32)}

    names = ["output", "gradient of a", "gradient of b"]
    assert found(product) == dict.fromkeys(names, True)
    assert found(lambda a, b, backend: a * (b.detach() * 0.9 + b * 0.1)) == dict(zip(names, (True, True, False)))
    assert found(lambda a, b, backend: (a * b)[:2]) == dict(
        zip(["output: shape (2, 4)", *names[1:]], (False, False, False))
    )
    assert found(lambda a, b, backend: a * b + torch.nan)["output"] is False
    assert found(lambda a, b, backend: NoUpstream.apply(a, b)) == dict(zip(names, (True, False, False)))


class NoUpstream(torch.autograd.Function):
    """A product whose gradients forget what they are to be multiplied by."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        return b.detach(), a.detach()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the error of plain torch, which here is of one rounding, and eight roundings in fp32 or one in bf16."""
    x, eps = torch.tensor([2.0], dtype=torch.float64), torch.finfo(dtype).eps

    def off(roundings: float) -> Callable[..., Any]:
        return lambda x, **options: x.double() * (1 + roundings * eps)

    edge = 10 if dtype == torch.float32 else 3
    for roundings, ok in ((edge - 0.1, True), (edge + 0.1, False), (-edge - 0.1, False)):
        case = Case({"x": x}, off(roundings), off(0), off(1), gradients=False)
        monkeypatch.setitem(CASES, "glu", lambda draw, case=case: [case])
        (result,) = check("glu", CPU, "triton", dtype)
        assert result.ok is ok
        assert result.error == pytest.approx(2 * abs(roundings) * eps)
        assert result.allowed == pytest.approx(2 * edge * eps)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PassManager::run failed"),
        ValueError("glu: no launch configuration for 16-bit elements and a size of 0"),
        subprocess.CalledProcessError(1, ["gcc"]),
        AssertionError("libcuda.so cannot found!"),
        OSError("no such library"),
        "triton",
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_cannot_be_had_has_failed(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def fail(*args: Any, **options: Any) -> None:
        raise error

    error = triton.runtime.errors.PTXASError("too\nmuch") if error == "triton" else error
    monkeypatch.setattr(activation, "launch", fail)
    for result in check("glu", CPU, "triton", torch.float32):
        assert not result.ok
        assert result.quantity.startswith(f"{type(error).__name__}: ")
        assert "\n" not in result.quantity


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("x"), KeyboardInterrupt()])
def test_other_errors_are_not_the_kernels(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(activation, "launch", fail)
    only(monkeypatch, "glu")
    with pytest.raises(type(error)):
        verify(CPU)
    assert verified == {}


# ---------------------------------------------------------------- what is remembered


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The ops that are checked, each with the dtype; all pass."""
    seen: list[tuple[str, str]] = []

    def fine(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> list[Result]:
        assert backend == "triton"
        seen.append((op, str(dtype)))
        return [Result(op, backend, str(dtype), "output", 0.0, 1.0, True)]

    monkeypatch.setattr(selftest, "check", fine)
    only(monkeypatch, "glu", "rope")
    return seen


ALL = 2 * len(DTYPES)  # checks of two ops


def again() -> None:
    """As the next process would ask."""
    verified.clear()
    verify(CPU)
    assert verified == {("glu", None): True, ("rope", None): True}


def cached(tmp_path: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "cache").iterdir())]


def test_an_op_is_checked_once(checks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(CPU)
    assert checks == [(op, str(dtype)) for op in ("glu", "rope") for dtype in DTYPES]
    verify(CPU)
    again()
    assert len(checks) == ALL
    (file,) = cached(tmp_path)  # and nothing else is left in the folder
    assert file["value"] == ["glu", "rope"]
    assert file["key"]["torch"] == torch.__version__
    only(monkeypatch, "glu", "rope", "nf4")  # a new op is checked alone
    verify(CPU)
    assert checks[ALL:] == [("nf4", str(dtype)) for dtype in DTYPES]
    assert cached(tmp_path)[0]["value"] == ["glu", "rope", "nf4"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_is_checked_where_nothing_is_chosen(
    backend: str, checks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFINA_BACKEND", backend)
    verify(CPU)
    assert (checks, verified) == ([], {})
    monkeypatch.delenv("AFINA_BACKEND")
    monkeypatch.setattr(launch, "INTERPRETED", False)  # no kernel can run on a CPU then
    verify(CPU)
    assert (checks, verified) == ([], {})


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (launch, "VERSION", "3.99"),
        (torch, "__version__", "2.99"),
        (selftest, "_source", lambda: "edited"),
        (launch, "capability", lambda device: 90),
    ],
    ids=["triton", "torch", "kernels", "gpu"],
)
def test_what_passed_elsewhere_counts_for_nothing(
    where: Any, name: str, value: Any, checks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value)
        again()
    assert len(checks) == 2 * ALL
    assert len(cached(tmp_path)) == 2


def test_the_source_is_all_kernels_and_the_launch_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ""
    for name in ("launch_table.json", "activation.py", "selftest.py"):
        copy = tmp_path / name.replace(".", "_")
        copy.mkdir()
        for path in [*(REPO / "kernels").glob("*.py"), REPO / "kernels" / "launch_table.json"]:
            (copy / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(selftest, "__file__", str(copy / "selftest.py"))
        monkeypatch.setattr(launch, "TABLE", copy / "launch_table.json")
        selftest._source.cache_clear()
        plain = plain or selftest._source()
        assert selftest._source() == plain
        with open(copy / name, "a") as file:
            file.write(" ")
        selftest._source.cache_clear()
        assert selftest._source() != plain
    monkeypatch.undo()
    selftest._source.cache_clear()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"value": ["glu"]}', "\x00"])
def test_a_damaged_cache_is_replaced(text: str, checks: list[Any], tmp_path: Path) -> None:
    verify(CPU)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_text(text)
    for _ in range(2):
        again()
    assert len(checks) == 2 * ALL
    assert cached(tmp_path)[0]["value"] == ["glu", "rope"]


def test_a_cache_that_cannot_be_written_is_done_without(
    checks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        again()
    assert len(checks) == 2 * ALL
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    again()
    assert list((tmp_path / "cache").iterdir()) == []


def test_threads_wait_for_one_check(checks: list[Any]) -> None:
    start = threading.Barrier(4)
    found: list[bool] = []

    def ask() -> None:
        start.wait()
        verify(CPU)
        found.append(verified["rope", None])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert len(checks) == ALL


# ---------------------------------------------------------------- what follows from it


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors that say they are on a GPU, so that Triton (here its interpreter) is the default."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    yield
    monkeypatch.undo()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter is not used where there is a GPU")
@pytest.mark.parametrize("checked", [True, False])
def test_a_sound_kernel_is_the_default(checked: bool, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that nobody has verified; a forward pass never runs a self-test."""
    only(monkeypatch, "glu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if checked:
            verify(CPU)
        monkeypatch.setattr(selftest, "check", lambda *args: pytest.fail("a self-test in a forward pass"))
        x = torch.linspace(-2, 2, 20).view(2, 10)
        assert torch.equal(swiglu(x), swiglu(x, backend="triton"))
    assert verified == ({("glu", None): True} if checked else {})
    assert choose("glu", None, x) == "triton"
    assert choose("glu", None, x.double()) == "torch"


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter is not used where there is a GPU")
@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_broken_kernel_gives_way_to_torch_with_one_warning(
    how: str, on_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if how == "raises":
            raise RuntimeError("PassManager::run failed")
        launch.launch(kernel, grid, *args, **options)
        next(x for x in args if isinstance(x, torch.Tensor)).mul_(1.5)  # what it writes

    only(monkeypatch, "glu")
    with monkeypatch.context() as patch:
        patch.setattr(activation, "launch", broken)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                verify(CPU)
    x = torch.linspace(-2, 2, 20).view(2, 10)
    assert choose("glu", None, x) == "torch"
    assert torch.equal(swiglu(x), swiglu(x, backend="torch"))
    (warning,) = [str(w.message) for w in caught]
    assert warning.startswith("glu: the Triton kernels fail their self-test on Triton's interpreter (float32: ")
    assert ("PassManager::run failed" if how == "raises" else "output is off by ") in warning
    assert warning.endswith("Run: afina doctor")
    # Mended, the next process takes it up.
    assert not (tmp_path / "cache").exists()
    verified.clear()
    verify(CPU)
    assert verified == {("glu", None): True}


@pytest.mark.gpu
def test_on_this_gpu() -> None:
    verify(torch.device("cuda"))
    assert all(verified.values())
    assert {op for op, index in verified} == set(CASES)
    x = torch.linspace(-2, 2, 20, device="cuda").view(2, 10)
    assert torch.equal(swiglu(x), swiglu(x, backend="triton"))
    assert choose("glu", None, SimpleNamespace(device=x.device, is_cuda=True, dtype=x.dtype)) == "triton"  # type: ignore[arg-type]


# ---------------------------------------------------------------- kernels that might wait for ever


@pytest.mark.slow
def test_a_process_of_its_own_tells_what_it_found() -> None:
    """On a CPU each case fails, for there is no Hopper GPU; and the process says so."""
    results = selftest.check_apart("attention_gluon", CPU)
    assert {(r.op, r.backend, r.dtype, r.ok) for r in results} == {
        ("attention_gluon", "triton", dtype, False) for dtype in ("float16", "bfloat16")
    }
    assert all("backend: 'gluon' needs a GPU of compute capability 9" in r.quantity for r in results)


@pytest.mark.parametrize("dtype", selftest.APART["attention_gluon"])
def test_torch_passes_the_special_cases(dtype: torch.dtype) -> None:
    assert [r for r in check("attention_gluon", CPU, "torch", dtype) if not r.ok] == []


@pytest.mark.parametrize(
    ("seconds", "executable", "said"),
    [(0.01, None, "no end within 0 seconds"), (60, "/nowhere/python", "No such file"), (60, "false", "status 1")],
)
def test_a_process_that_hangs_or_dies_has_failed(
    seconds: float, executable: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "APART_SECONDS", seconds)
    if executable is not None:
        monkeypatch.setattr("sys.executable", executable)
    results = selftest.check_apart("attention_gluon", CPU)
    assert [r.dtype for r in results] == ["float16", "bfloat16"]
    assert not any(r.ok for r in results)
    assert all(said in r.quantity for r in results)


def test_special_kernels_are_checked_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    asked: list[str] = []
    good = Result("attention_gluon", "triton", "bfloat16", "output", 0.0, 1.0, True)
    found = [good]
    monkeypatch.setattr(selftest, "check_apart", lambda op, device: asked.append(op) or found)
    verify(CPU)
    assert asked == []
    assert verified == {}
    monkeypatch.setattr(selftest, "SPECIAL_CASES", {"attention_gluon": (None, lambda device: True)})
    for _ in range(2):  # The second time it is known.
        verify(CPU)
        assert asked == ["attention_gluon"]
        assert verified == {("attention_gluon", None): True}
    verified.clear()
    verify(CPU)  # another process
    assert asked == ["attention_gluon"]
    found[:] = [good, good._replace(ok=False, error=2.0)]
    monkeypatch.setenv("AFINA_CACHE", "/nowhere")
    verified.clear()
    with pytest.warns(RuntimeWarning, match="attention_gluon: .* attention's other kernels compute it instead"):
        verify(CPU)
    assert verified == {("attention_gluon", None): False}
