"""Fixtures shared by all tests, and the interpreter that runs Triton kernels where there is no GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import afina  # noqa: F401  # isort: skip  (before torch, whose OpenMP threads it keeps from spinning for long)
import pytest
import torch
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parent.parent
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a run that was started with nohup passes on that it is ignored
os.environ["AFINA_CPU_DTYPE"] = "float32"  # so that every CPU computes what the tests compare with
# How long an example takes to draw or to run says nothing where other tests run beside it.
settings.register_profile("afina", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("afina")

if not torch.cuda.is_available():
    # Triton's own library is made for the interpreter or the compiler when it is imported, a kernel when it is defined.
    # The variable itself must not reach the processes that tests start.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language

    triton.knobs.runtime.interpret = True  # which also sets the variable
    del os.environ["TRITON_INTERPRET"]

    import quick_interpreter

    quick_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty AFINA_CACHE for the tests of a file; it asks for it with pytestmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFINA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that read it are skipped where it is absent."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the model of tiny_model.py; read only."""
    from tiny_model import saved

    return str(saved(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def small_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of the rows of small_run.py; read only."""
    from small_run import write_rows

    return str(write_rows(tmp_path_factory.mktemp("rows")))


@pytest.fixture(params=["at once", "one step later"])
def result_read(request: pytest.FixtureRequest) -> Iterator[str]:
    """When a training step's result is looked at: as on a CPU, and as on a GPU."""
    from afina.engine import train

    with pytest.MonkeyPatch.context() as patch:
        if request.param != "at once":
            patch.setattr(train.Run, "deferred", True)
        yield request.param
