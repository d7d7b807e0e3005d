"""engine/run_record.py: the facts of a run, its rows, and the disk space and memory that it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_run import fit

import afina
from afina.engine import run_record
from afina.engine.memory import plan
from afina.engine.run_folder import RunFolder
from afina.engine.train import open_run

pytestmark = pytest.mark.usefixtures("own_cache")


def test_disk_space_is_what_the_optimizer_holds(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = []
    begin = RunFolder.begin

    def watched(*args: Any, bytes_needed: int, **kwargs: Any) -> None:
        needed.append(bytes_needed)
        begin(*args, bytes_needed=bytes_needed, **kwargs)

    monkeypatch.setattr(RunFolder, "begin", watched)
    count = afina.load_model(small_model).num_parameters()
    for variant, held in (("adamw", 12), ("adamw_8bit", 6), ("adamw_bf16", 6)):
        out = tmp_path / variant
        fit(small_model, small_rows, out, optim=variant, dtype="bfloat16", max_steps=1, save_total_limit=2)
        expected = 3 * held * count + 4 * count  # three checkpoints, and the best model in fp32
        assert expected <= needed[-1] <= 1.02 * expected  # one absmax in 256 values, and in each small tensor


def test_the_record_says_how_long_the_rows_are_and_predicts_the_longest_ones_together(
    small_model: str, small_rows: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_length": 64, "batch_size": 4, "learning_rate": 1e-3, "val_size": 0.1}
    for packing in (True, False):
        config = afina.TrainConfig(
            model=small_model, data=small_rows, output_dir=str(tmp_path / "run"), packing=packing, **options
        )
        with open_run(config, quiet=True) as run:
            lengths = sorted(run.data.train.lengths.tolist())
            told = run_record.data_facts(run.data)
            assert told["train_lengths"] == {"p50": lengths[18], "p95": lengths[34], "max": lengths[-1]}
            assert told["rows"] == 40
            together = sum(lengths[-4:]) if packing else 4 * lengths[-1]
            most = sum(sorted(run.data.train.loss_tokens.tolist())[-4:])
            sizes = {"tokens": together, "loss_tokens": most, "longest": lengths[-1]}
            assert run.memory == plan(run.model, run.optimizer, **sizes, accumulates=False)
            assert run_record.facts(run.data, run.model) == {
                "data_sha256": run.data.fingerprint,
                "model_sha256": run.model.fingerprint,
                "parameters": run.model.num_parameters(),
            }
