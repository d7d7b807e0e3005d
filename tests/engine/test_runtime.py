"""engine/runtime.py."""

from __future__ import annotations

import subprocess
import sys

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
