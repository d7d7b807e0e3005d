"""engine/runtime.py."""

from __future__ import annotations

import subprocess
import sys

import torch

from afina.engine.runtime import peak_memory_gb, prepare_process


def test_threads_seed_and_denormals() -> None:
    code = (
        "import torch; from afina.engine.runtime import prepare_process; prepare_process(threads=1, seed=3);"
        "assert torch.get_num_threads() == 1;"
        "a = torch.rand(2); torch.manual_seed(3); assert torch.equal(a, torch.rand(2));"
        "assert float(torch.tensor(1e-39) * torch.tensor(0.5)) == 0.0, 'a denormal survived'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_peak_memory_sees_a_large_block() -> None:
    prepare_process()
    before = peak_memory_gb(torch.device("cpu"))
    block = torch.ones(int((before + 0.2) * 1e9) // 4)
    assert block.numel() * 4 / 1e9 <= peak_memory_gb(torch.device("cpu")) < before + 1.0 + block.numel() * 4 / 1e9
