"""The launch table, the sizes of tiles, and what happens where no kernel can run."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPO

from afina.kernels import launch
from afina.kernels.activation import View, swiglu

CPU = torch.device("cpu")
TABLE = {
    "op": [
        {"capability": 0, "BLOCK": 16},
        {"capability": 80, "size": 64, "bits": 16, "BLOCK": 1},
        {"capability": 80, "size": 128, "bits": 16, "BLOCK": 2},
        {"capability": 90, "size": 128, "bits": 16, "BLOCK": 3, "num_warps": 8},
        {"capability": 80, "size": 128, "bits": 32, "BLOCK": 4},
        {"capability": 80, "bits": 32, "BLOCK": 5},
    ]
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(launch, "table", lambda: TABLE)
    launch._config.cache_clear()
    yield TABLE
    launch._config.cache_clear()


@pytest.mark.parametrize(
    ("capability", "size", "bits", "block"),
    [
        (0, 4096, 16, 16),
        (80, 64, 16, 1),
        (89, 65, 16, 2),
        (90, 128, 16, 3),
        (120, 80, 16, 3),
        (90, 128, 32, 4),
        (90, 129, 32, 5),
    ],
)
def test_the_nearest_row_counts(table: Any, capability: int, size: int, bits: int, block: int) -> None:
    """Of the highest capability not above the GPU's, the smallest size that reaches; the interpreter's is its own."""
    found = launch._config("op", capability, bits, size)
    assert found["BLOCK"] == block
    assert not set(found) & set(launch.KEYS)


@pytest.mark.parametrize(("capability", "size", "bits"), [(75, 64, 16), (90, 129, 16), (90, 64, 8)])
def test_no_row_is_an_error(table: Any, capability: int, size: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"^op: no launch configuration for {bits}-bit elements and a size of {size}"):
        launch._config("op", capability, bits, size)


def test_the_table_itself() -> None:
    """Every kernel can run in the interpreter and on an A100; blocks are powers of two."""
    for kernel, rows in launch.table().items():
        capabilities = [row["capability"] for row in rows]
        assert 0 in capabilities, kernel
        assert 80 in capabilities, kernel
        places = [tuple(row.get(key) for key in launch.KEYS) for row in rows]
        assert len(set(places)) == len(places), f"{kernel}: two rows for one place"
        for row in rows:
            for name, value in row.items():
                if name.startswith("BLOCK"):
                    assert value & (value - 1) == 0, f"{kernel}: {row}"


def test_sizes() -> None:
    assert [launch.cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [launch.power_of_two(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert launch.power_of_two(3, 16) == 16


def test_an_empty_grid_runs_nothing() -> None:
    launch.launch(None, (0, 3))


def test_without_a_gpu_the_compiler_stays_out_of_the_process() -> None:
    """It takes a third of a second to import; the kernels' names exist all the same."""
    code = """
import sys, torch
torch.cuda.is_available = lambda: False
import afina.engine.model, afina.kernels.decode, afina.kernels.adamw
from afina.kernels.activation import View, swiglu
assert "triton" not in sys.modules
swiglu(torch.ones(2, 4))
try:
    swiglu(torch.ones(2, 4), backend="triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("backend: 'triton' needs a GPU, found a tensor on cpu; use 'torch', or set")


@pytest.mark.parametrize("first", [(), (3,)])
def test_the_device_is_found_inside_tuples(first: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first tensor, wherever it stands: there the kernel runs, whatever GPU is the current one."""
    on_second = SimpleNamespace(device=torch.device("cuda", 1))
    current: list[Any] = []
    ran: list[Any] = []
    monkeypatch.setattr(launch.torch, "Tensor", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device)))
    kernel = {(2,): lambda *args, **options: ran.append((args, options))}
    args = (*first, View(on_second, 8), SimpleNamespace(device=torch.device("cpu")), 5)
    launch.launch(kernel, (2,), *args, BLOCK=16)
    assert (current, ran) == ([on_second.device], [(args, {"BLOCK": 16})])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used where there is a GPU")
def test_launches_can_be_recorded_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "recorder", lambda kernel, arguments: seen.append(arguments))
    swiglu(torch.ones(3, 8), backend="triton")
    assert [(x["width"], x["BLOCK"]) for x in seen] == [(4, 32)]
