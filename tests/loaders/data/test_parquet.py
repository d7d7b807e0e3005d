"""Parquet: honest files of every kind of column are read, and small ones that stand for gigabytes are not."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from afina.errors import DataError
from afina.loaders.data import parquet
from afina.loaders.data.parquet import parquet_rows

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def rows(path: Path, max_row: int = 1 << 24) -> list[dict[str, Any] | None]:
    return [row for batch, _ in parquet_rows(path, max_row) for row in batch]


def test_columns_that_python_has_no_values_for_do_not_hide_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    nano = pa.array([1, 2], pa.timestamp("ns"))
    far = pa.array([10**15, -(10**15)], pa.timestamp("s"))
    days = pa.array([2**30, None], pa.date32())
    inside = pa.array([[{"at": 1, "n": 3}], []], pa.list_(pa.struct([("at", pa.timestamp("ns")), ("n", pa.int8())])))
    columns = {"text": ["a", "b"], "nano": nano, "far": far, "days": days, "inside": inside}
    metadata = {"huggingface": "[" * 100_000, "pandas": "[" * 100_000}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    found = rows(path)
    assert [row["text"] for row in found if row] == ["a", "b"]
    assert found[0] is not None
    assert found[0]["nano"] == "1970-01-01 00:00:00.000000001"
    assert found[0]["inside"] == [{"at": "1970-01-01 00:00:00.000000001", "n": 3}]
    pq.write_table(pa.table({"text": ["a"], "when": [datetime.datetime(2024, 2, 29)]}), path)
    assert rows(path) == [{"text": "a", "when": datetime.datetime(2024, 2, 29)}]


def test_values_are_those_of_pyarrow(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = [
        {
            "text": "x" * i,
            "n": i,
            "turns": [{"role": "user", "content": str(i)}] * (i % 3),
            "raw": b"a",
            "one": {"a": i},
        }
        for i in range(3000)
    ]
    table = pa.Table.from_pylist([*values, dict.fromkeys(values[0])])
    pq.write_table(table, path, row_group_size=700)
    assert rows(path) == table.to_pylist()


def test_memory_is_bounded_by_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    texts = ["a" * 100_000] * 50 + ["b" * 300_000, None]
    pq.write_table(pa.table({"text": texts}), path)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 250_000)
    batches = [batch for batch, _ in parquet_rows(path, 200_000)]
    assert max(map(len, batches)) <= 2
    assert [row for batch in batches for row in batch] == [
        *({"text": text} for text in texts[:50]),
        None,
        {"text": None},
    ]
    share = [share for _, share in parquet_rows(path, 200_000)]
    assert share == sorted(share)
    assert share[-1] == 1
    monkeypatch.setattr(parquet, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(parquet, "MAX_RATIO", 10)
    with pytest.raises(DataError, match=r"a.parquet: [\d,]+ bytes stand for [\d,]+ and more"):
        rows(path)
    many = pa.ListArray.from_arrays(pa.array([0, 10**6]), pa.array([0] * 10**6))
    pq.write_table(pa.table({"n": many}), path, compression="zstd")
    with pytest.raises(DataError, match=r"bytes of column 'n.list.element' stand for 8,000,\d+: write it again"):
        rows(path)
