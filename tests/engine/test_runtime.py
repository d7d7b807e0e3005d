"""engine/runtime.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from afina.engine.runtime import flushed_denormals, peak_memory_gb, prepare_process


def test_threads_and_seed() -> None:
    code = (
        "import torch; from afina.engine.runtime import prepare_process; prepare_process(threads=1, seed=3);"
        "assert torch.get_num_threads() == 1;"
        "a = torch.rand(2); torch.manual_seed(3); assert torch.equal(a, torch.rand(2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_denormals_are_flushed_inside_only() -> None:
    def half_of_a_denormal() -> float:
        return float(torch.tensor(1e-39) * torch.tensor(0.5))

    with flushed_denormals():
        assert half_of_a_denormal() == 0.0
        with flushed_denormals():
            pass
        assert half_of_a_denormal() == 0.0
    assert half_of_a_denormal() > 0.0


def test_peak_memory_sees_a_large_block() -> None:
    prepare_process()
    before = peak_memory_gb(torch.device("cpu"))
    block = torch.ones(int((before + 0.2) * 1e9) // 4)
    assert block.numel() * 4 / 1e9 <= peak_memory_gb(torch.device("cpu")) < before + 1.0 + block.numel() * 4 / 1e9


@pytest.mark.parametrize(
    ("variables", "imports", "expected"),
    [
        ({}, "afina", "2000"),
        ({"GOMP_SPINCOUNT": "7"}, "afina", "7"),
        ({"OMP_WAIT_POLICY": "active"}, "afina", "None"),
        ({}, "torch, afina", "None"),  # too late: the library has read its environment
    ],
)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(
    variables: dict[str, str], imports: str, expected: str
) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import os, {imports}; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=plain | variables, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == expected


def test_the_openmp_library_reads_the_limit_that_afina_sets() -> None:
    """``OMP_DISPLAY_ENV`` makes the library tell what it has read."""
    code = "import afina, torch; torch.ones(8).sum()"
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = plain | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this build of torch does not use GNU's OpenMP library")
    assert "GOMP_SPINCOUNT = '2000'" in done.stderr
