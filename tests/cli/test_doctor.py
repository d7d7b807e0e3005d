"""``afina doctor`` on this machine, with and without kernels to run; and an AFINA_BACKEND that cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO

from afina.cli.doctor_checks import environment, examine
from afina.cli.main import run
from afina.kernels import activation, launch, selftest
from afina.kernels.cases import CASES
from afina.kernels.selftest import DTYPES, Result

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AFINA_BACKEND", raising=False)


def afina(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The real command; TRITON_INTERPRET only where it is given."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "afina", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPO, env=environment | variables, timeout=280, check=False
    )


@NO_GPU
def test_without_a_gpu_torch_alone_is_checked() -> None:
    done = afina("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    assert set(result) >= {"python", "afina", "torch", "triton", "platform", "cpu_threads", "gpu", "cache", "kernels"}
    assert result["gpu"] is None
    assert result["cache"] == os.environ["AFINA_CACHE"]
    assert list(dict.fromkeys(row["op"] for row in result["kernels"])) == list(CASES)
    assert {row["backend"] for row in result["kernels"]} == {"torch"}
    for row in result["kernels"]:
        assert set(row) == set(Result._fields)
        assert row["error"] <= row["allowed"]
        assert row["ok"] is True
    told = [line for line in lines if line.split()[:2] == ["glu", "torch"]]
    assert [line.split()[2] for line in told] == [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert all("  ok: " in line for line in told)
    assert "TRITON_INTERPRET=1 afina doctor runs them in Triton's interpreter" in done.stdout
    assert lines[-1] == f"all {len(result['kernels'])} checks passed"


@NO_GPU
def test_with_the_interpreter_triton_is_checked_too() -> None:
    done = afina("doctor", "glu", "nf4", "--json", TRITON_INTERPRET="1", AFINA_BACKEND="triton")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    found = {(row["op"], row["backend"], row["dtype"]) for row in result["kernels"]}
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert found == {(op, b, dtype) for op in ("glu", "nf4") for b in ("torch", "triton") for dtype in dtypes}
    assert result["AFINA_BACKEND"] == "triton"
    assert "TRITON_INTERPRET" not in done.stdout


def broken(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    launch.launch(kernel, grid, *args, **options)
    next(x for x in args if isinstance(x, torch.Tensor)).mul_(1.5)  # what it writes


def unavailable(kernel: Any, *args: Any, **options: Any) -> None:
    raise RuntimeError("PassManager::run\nfailed")


@pytest.mark.parametrize(("fault", "told"), [(broken, "FAILED: output"), (unavailable, "PassManager::run failed")])
def test_a_broken_kernel_is_status_1(
    fault: Any, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(activation, "launch", fault)
    assert run(["doctor", "glu", "nf4", "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    bad = [row for row in result["kernels"] if not row["ok"]]
    assert {(row["op"], row["backend"]) for row in bad} == {("glu", "triton")}
    assert result["ok"] is False
    assert told in out
    (line,) = err.splitlines()
    total = len(result["kernels"])
    assert line == (f"afina: error: {len(bad)} of {total} checks failed: glu (triton, float32), glu (triton, bfloat16)")
    monkeypatch.undo()
    assert run(["doctor", "glu"]) == 0


def test_a_doctor_leaves_the_cache_alone_and_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def counted(op: str, device: torch.device, backend: str, dtype: torch.dtype) -> list[Result]:
        calls.append(op)
        return selftest.check(op, device, backend, dtype)

    monkeypatch.setattr("afina.cli.doctor_checks.check", counted)
    for count in (1, 2):
        examine(["nf4"])
        assert len(calls) == count * 2 * len(DTYPES)
    assert not (tmp_path / "cache").exists()


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert (found["gpu"] is not None) == torch.cuda.is_available()
    assert found["AFINA_BACKEND"] is None


def test_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "atention"]) == 2
    assert "'atention' is not a kernel (did you mean 'attention'?); expected some of glu" in capsys.readouterr().err
    assert run(["doctor", "--device", "gpu"]) == 2
    assert "--device is 'gpu'; expected auto, cpu" in capsys.readouterr().err


TOLD = {
    "cuda": "afina: error: AFINA_BACKEND: expected one of triton, torch, found 'cuda'",
    "triton": "afina: error: AFINA_BACKEND: 'triton' needs a GPU, found a tensor on cpu; use 'torch', or set",
}
NAMES = pytest.mark.parametrize("name", TOLD)


@NO_GPU
@NAMES
def test_a_backend_that_cannot_be_had_is_one_line(name: str) -> None:
    done = afina("generate", "afina-tiny", "--prompt", "hi", AFINA_BACKEND=name)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(TOLD[name])


@NO_GPU
@NAMES
@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "afina-tiny", "--data", "DATA"],
        ["chat", "afina-tiny"],
        ["export", "afina-tiny", "--output", "OUT"],
        ["train", "--model", "afina-tiny", "--data", "DATA", "--output_dir", "OUT", "--dry_run"],
        ["train", "--model", "afina-tiny", "--data", "DATA", "--output_dir", "OUT", "--quiet"],
        ["demo", "--output_dir", "OUT"],
        ["doctor", "glu"],
    ],
    ids=lambda argv: f"{argv[0]}{argv[-1]}",
)
def test_in_every_verb_that_computes(
    argv: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setenv("AFINA_BACKEND", name)
    rows = [json.dumps({"prompt": f"one {i}", "completion": f" two {i}"}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    named = {"DATA": str(tmp_path / "rows.jsonl"), "OUT": str(tmp_path / "out")}
    assert run([named.get(word, word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(TOLD[name])
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
