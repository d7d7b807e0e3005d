"""engine/nonfinite.py: steps that are skipped, runs that end, and weights that are not saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_run import fit, lines, poison

from afina.engine import train
from afina.engine.checkpoint import load_checkpoint
from afina.engine.nonfinite import NonFiniteError, go_on, report_skipped
from afina.engine.train import finetune

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.usefixtures("result_read")
def test_a_non_finite_step_moves_nothing_and_names_its_rows(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 3, 5})
    result = fit(small_model, small_rows, tmp_path / "run", save_steps=1, eval_steps=1, save_total_limit=9)
    assert result.metrics["skipped_steps"] == 3
    losses = lines(result, "dev_loss")
    assert losses[2] == losses[3] == losses[4] != losses[5] == losses[6]
    # No checkpoint is made of a skipped step.
    assert sorted(path.name for path in result.output_dir.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (1, 2, 5, 7, 8)
    ]
    two, five = (load_checkpoint(result.output_dir / f"checkpoint-{n}") for n in (2, 5))
    assert any(not torch.equal(two.tensors("weights")[n], t) for n, t in five.tensors("weights").items())
    assert (two.meta["updates"], five.meta["updates"]) == (2, 3)
    (first, *_) = lines(result, "rows")
    assert len(first) == 4
    assert all(row.startswith(f"{small_rows}: line ") for row in first)


@pytest.mark.usefixtures("result_read")
def test_three_non_finite_steps_in_a_row_stop_the_run(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, 3, 4, 5})
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* step 6 with .*rows\.jsonl: line \d+") as raised:
        fit(small_model, small_rows, tmp_path / "run", save_steps=1)
    assert str(raised.value).endswith(
        "go on from the checkpoint of step 3 at a lower rate than 0.001: --resume --learning_rate 0.00033"
    )
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-3"]
    assert all(
        torch.isfinite(t).all() for t in load_checkpoint(tmp_path / "run/checkpoint-3").tensors("weights").values()
    )


@pytest.mark.parametrize("step", [4, 6])
def test_a_poisoned_weight_pushes_out_no_good_checkpoint(
    step: int, small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the step that made it was fine by its own figures: at a step that is saved, and between two."""
    settle = train.Run._settle

    def spoils(self: train.Run) -> None:
        settle(self)
        if self.progress.step == step:
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).view(-1)[0] = math.nan

    monkeypatch.setattr(train.Run, "_settle", spoils)
    with pytest.raises(NonFiniteError, match=r"not finite.*go on from the checkpoint of step 3 at a lower rate than"):
        fit(small_model, small_rows, tmp_path / "run", save_steps=1 if step == 4 else 3, max_steps=12, eval_steps=20)
    kept = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert "checkpoint-3" in kept
    for name in kept:
        weights = load_checkpoint(tmp_path / "run" / name).tensors("weights")
        assert all(torch.isfinite(t).all() for t in weights.values())
    monkeypatch.setattr(train.Run, "_settle", settle)
    assert fit(
        small_model,
        small_rows,
        tmp_path / "run",
        save_steps=1 if step == 4 else 3,
        max_steps=12,
        eval_steps=20,
        resume=True,
    )


@pytest.mark.parametrize(("steps", "told"), [({1, 3, 5}, True), ({1, 3}, False), ({1}, False)])
def test_a_run_that_skipped_much_says_so(
    steps: set[int],
    told: bool,
    small_model: str,
    small_rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, steps)
    finetune(
        model=small_model, data=small_rows, output_dir=str(tmp_path / "run"), max_length=64, max_steps=8, batch_size=4
    )
    said = capsys.readouterr().err
    assert ("WARNING: 3 of 8 steps were skipped, their loss or gradient not finite" in said) == told
    assert ("WARNING" in said) == told


def test_when_a_result_is_looked_at_changes_nothing(
    small_model: str, small_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same lines in the same order, and the same checkpoints, skipped steps included."""
    left = []
    for deferred in (False, True):
        monkeypatch.setattr(train.Run, "deferred", deferred)
        with monkeypatch.context() as patch:
            poison(patch, {2, 3, 5})
            result = fit(
                small_model, small_rows, tmp_path / str(deferred), eval_steps=3, save_steps=2, save_total_limit=9
            )
        text = (result.output_dir / "metrics.jsonl").read_text()
        written = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in text.splitlines()]
        ends = [load_checkpoint(path) for path in sorted(result.output_dir.glob("checkpoint-*"))]
        left.append((written, [end.meta["updates"] for end in ends], [end.tensors("weights") for end in ends]))
    assert left[0][:2] == left[1][:2]
    assert left[0][1] == [2, 3, 4, 5]  # of steps 2 and 8, and of 5 and 7: 4 and 6 are skipped
    for before, after in zip(left[0][2], left[1][2], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_that_moved_some_weights_ends_the_run_at_once() -> None:
    told: list[str] = []
    rows = [f"line {n}" for n in range(12)]

    def report(**changes: bool | int) -> None:
        options = {"whole": True, "in_a_row": 1, "go_on": "GO ON", "log": told.append} | changes
        report_skipped(7, rows, **options)

    report()
    assert told == [f"step 7: loss or gradient not finite, weights left as they were; its rows: {named(rows)}"]
    with pytest.raises(
        NonFiniteError, match=r"^3 steps in a row .* step 7 with line 0, .*; look at those rows, or GO ON$"
    ):
        report(in_a_row=3)
    with pytest.raises(NonFiniteError, match=r"optim_in_backward has moved the weights above it.* or GO ON; with"):
        report(whole=False)


def named(rows: list[str]) -> str:
    return f"{', '.join(rows[:10])} ..."


def test_what_to_do_depends_on_what_there_is() -> None:
    assert go_on(saved_step=0, lr=3e-4, replaces=False) == (
        "begin again at a lower rate than 0.0003 (there is no checkpoint yet): --overwrite --learning_rate 0.0001"
    )
    assert "no checkpoint yet, the run that was to be overwritten is as it was" in go_on(
        saved_step=0, lr=1.0, replaces=True
    )
    assert go_on(saved_step=1200, lr=3e-4, replaces=True) == (
        "go on from the checkpoint of step 1,200 at a lower rate than 0.0003: --resume --learning_rate 0.0001"
    )
