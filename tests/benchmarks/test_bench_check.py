"""The benchmark of `afina check`: its rows are the same each time, its oracle is right, and its figures come out."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

import bench_check


def test_rows_are_the_same_each_time() -> None:
    rows, planted = bench_check.generate(400, 0)
    assert bench_check.generate(400, 0) == (rows, planted)
    assert bench_check.generate(400, 1)[0] != rows
    assert all(later > earlier for later, earlier in planted)
    assert 10 < len(planted) < 40


def test_the_oracle_by_hand() -> None:
    one, other = {"prompt": "abcdefgh", "completion": "12345"}, {"prompt": "abcdefgx", "completion": "12345"}
    common: dict[str, set[str]] = {"prompt": set(), "completion": set()}
    assert bench_check.exact(one, other, common) == pytest.approx(3 / 5)
    assert bench_check.exact(one, other, common | {"prompt": {"abcde"}}) == pytest.approx(2 / 4)


def test_figures() -> None:
    command = [sys.executable, "benchmarks/bench_check.py", "--rows", "1500", "--no-model"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["command"] == "python benchmarks/bench_check.py --rows 1500 --no-model"
    assert line["recall"] > 0.9
    assert line["precision"] > 0.9
    assert line["near"] > 10
