"""Fixtures shared by all tests, and the interpreter that runs Triton kernels where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    # Triton's own library is made for the interpreter or the compiler when it is imported, a kernel when it is defined.
    # The variable itself must not reach the processes that tests start.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language

    triton.knobs.runtime.interpret = True  # which also sets the variable
    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that read it are skipped where it is absent."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
