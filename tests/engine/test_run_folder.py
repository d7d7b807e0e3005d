"""The run folder: refusals that change nothing, the lock, resuming, metrics, and stopping by a signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from disk import files_limited_to, flip_bit, json_values, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.engine import run_folder
from afina.engine.checkpoint import publish_best, save_checkpoint
from afina.engine.run_folder import FORMAT, METRICS, RECIPE, RUN, RunFolder
from afina.engine.run_lock import LOCK, FolderLock
from afina.errors import RunError

CONFIG: dict[str, Any] = {
    "model": "base",
    "data": "rows.jsonl",
    "output_dir": "out",
    "learning_rate": 1e-3,
    "epochs": 3.0,
    "max_steps": None,
    "seed": 42,
    "columns": {"prompt": "q"},
}
FACTS: dict[str, Any] = {"model_sha256": "aa", "data_sha256": "bb", "train_rows": 100}


def make_run(path: Path, *steps: int) -> None:
    """A finished run with a line and a checkpoint a step."""
    with RunFolder(path) as folder:
        folder.begin(CONFIG, FACTS)
        for step in range(1, max(steps, default=0) + 1):
            folder.log({"step": step, "loss": 1 / step})
            if step in steps:
                save_checkpoint(path, step, {"model": {"w": torch.full((3,), float(step))}}, {}, keep=None)


def refused(path: Path, expected: str, *, begin: dict[str, Any] | None = None, **options: Any) -> str:
    """Open (and begin) a run that must be refused in one line, with nothing on disk changed."""
    root = next(p for p in (path, *path.parents) if os.path.isdir(p))
    before = tree(root)
    with pytest.raises(RunError) as error, RunFolder(path, **options) as folder:
        folder.begin(**{"config": CONFIG, "facts": FACTS, **(begin or {})})
    message = str(error.value)
    assert expected in message
    assert "\n" not in message
    assert tree(root) == before
    return message


def test_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way"
    with RunFolder(path) as folder:
        assert [p.name for p in path.iterdir()] == [LOCK]
        folder.begin(CONFIG, FACTS, bytes_needed=1000)
        assert folder.checkpoint is None
        folder.log({"step": 1, "loss": 0.5, "grad_norm": float("nan"), "lines": [1, 2]})
        # Written through at once: nothing waits in a buffer for a kill to lose.
        assert (path / METRICS).read_text() == '{"step": 1, "loss": 0.5, "grad_norm": null, "lines": [1, 2]}\n'
        with pytest.raises(ValueError, match="integer 'step'"):
            folder.log({"loss": 0.5})
    assert sorted(p.name for p in path.iterdir()) == [METRICS, RECIPE, RUN]
    assert yaml.safe_load((path / RECIPE).read_text()) == CONFIG
    record = json.loads((path / RUN).read_text())
    assert record["format"] == FORMAT
    assert record["config"] == CONFIG
    assert record["facts"] == FACTS
    assert record["started"]["versions"]["torch"] == torch.__version__
    assert record["started"].keys() == {"time", "argv", "versions", "platform", "host", "git_commit"}


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert (tmp_path / RUN).exists()


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_that_never_begins_leaves_no_trace(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "a" / "b"
    if existing:
        path.mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(KeyError), RunFolder(path):
        raise KeyError("the data were wrong")
    assert tree(tmp_path) == before


def test_already_there(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1)
    message = refused(tmp_path / "run", "already holds a run")
    assert "--resume" in message
    assert "--overwrite" in message
    refused(tmp_path / "run", "contradict each other", resume=True, overwrite=True)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_what_is_not_a_run_folder(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    refused(tmp_path / "home", "not empty and not a run folder (it has 'thesis.txt' but no run.json)", **options)
    (tmp_path / "home" / RUN).write_text('{"name": "of another program"}')
    refused(tmp_path / "home", "was not written by this version of afina", **options)
    (tmp_path / "home" / RUN).write_text('{"format": ')
    refused(tmp_path / "home", "is damaged: not JSON", **options)
    refused(tmp_path / "home" / "thesis.txt", "is not a folder", **options)
    refused(tmp_path / "home" / "thesis.txt" / "run", "thesis.txt is not a folder", **options)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling", "is not a folder", **options)
    refused(tmp_path / ("x" * 300), "cannot be used: File name too long", **options)
    with pytest.raises(RunError):
        RunFolder(tmp_path / "nul\0", **options)


def test_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere; the system says so for a read-only mount alone
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        tmp_path.chmod(0o555)
    refused(tmp_path, "is read-only for this user")
    refused(tmp_path / "run", "is read-only for this user")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where not even root may write")
def test_a_file_system_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    with pytest.raises(RunError, match=r"/proc/self/run cannot be used: .*; choose another --output_dir"):
        RunFolder("/proc/self/run")


def test_nothing_to_resume(tmp_path: Path) -> None:
    refused(tmp_path / "typo", "there is no run to resume", resume=True)


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, "run.json.tmp-1234"]])
def test_resuming_a_run_killed_before_it_wrote_anything(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("half")
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(CONFIG, FACTS)
        assert folder.checkpoint is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS, RECIPE, RUN]


def test_too_little_space(tmp_path: Path) -> None:
    message = refused(tmp_path / "run", "too little space", begin={"bytes_needed": 10**18})
    assert "GB free, 1000000000.00 GB needed" in message


def test_space_of_what_is_replaced_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, 1)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(bytes(1_000_000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    refused(tmp_path, "too little space", begin={"bytes_needed": 1_700_000}, overwrite=True)
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.begin(CONFIG, FACTS, bytes_needed=1_400_000)


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    choices: list[dict[str, Any]] = [{"resume": True}, {"overwrite": True}]
    with RunFolder(tmp_path / "run") as first:
        refused(tmp_path / "run", f"in use by another run (PID {os.getpid()} on ")
        first.begin(CONFIG, FACTS)
        for options in choices:
            refused(tmp_path / "run", f"in use by another run (PID {os.getpid()} on ", **options)
    with RunFolder(tmp_path / "run", resume=True) as second:
        second.begin(CONFIG, FACTS)


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    ready, done = os.pipe()
    if (pid := os.fork()) == 0:
        RunFolder(tmp_path).begin(CONFIG, FACTS)
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    refused(tmp_path, f"in use by another run (PID {pid} on ", resume=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK).read_text().startswith(f"PID {pid} on ")
    with RunFolder(tmp_path, resume=True) as folder:
        assert (tmp_path / LOCK).read_text().startswith(f"PID {os.getpid()} on ")
        folder.begin(CONFIG, FACTS)
    assert not (tmp_path / LOCK).exists()


def test_another_run_that_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is empty when first looked at, and another process has used it by the time the lock is taken."""

    def late(path: Path) -> FolderLock:
        monkeypatch.undo()
        make_run(path, 1)
        return FolderLock(path)

    monkeypatch.setattr(run_folder, "FolderLock", late)
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder(tmp_path)


def test_two_at_once(tmp_path: Path) -> None:
    """Processes that open the same folder over and over never hold it together, though the lock file comes and goes."""
    children = []
    for _ in range(3):
        if (pid := os.fork()) == 0:
            held = 0
            while held < 100:
                try:
                    folder = RunFolder(tmp_path / "run")
                except RunError:
                    continue
                os.close(os.open(tmp_path / "held", os.O_CREAT | os.O_EXCL))  # fails if another holds it too
                held += 1
                os.unlink(tmp_path / "held")
                folder.close()
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path, 1, 2)
    publish_best(tmp_path, lambda folder: (folder / "model.safetensors").touch())
    (tmp_path / "checkpoint-3.tmp-77").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-good").mkdir()
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.begin({**CONFIG, "seed": 7}, {"data_sha256": "other"})
        folder.log({"step": 1, "loss": 4.0})
        save_checkpoint(folder.path, 1, {"model": {"w": torch.ones(1)}}, {})
        folder.commit()
        assert folder.path == tmp_path
        folder.log({"step": 2, "loss": 3.0})
        folder.record(total_steps=9)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint-1", "checkpoint-good", METRICS, "notes.txt", RECIPE, RUN]
    assert [json.loads(line)["loss"] for line in (tmp_path / METRICS).read_text().splitlines()] == [4, 3]
    assert json.loads((tmp_path / RUN).read_text())["config"]["seed"] == 7


def test_overwrite_without_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, 1, 2)
    before = tree(tmp_path)
    with RunFolder(tmp_path, overwrite=True) as folder:
        folder.begin({**CONFIG, "seed": 7}, FACTS)
        folder.record(total_steps=9)
        folder.log({"step": 1, "loss": 4.0})
    assert tree(tmp_path) == before


def test_overwrite_needs_room_for_its_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, 1)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").write_bytes(bytes(1_000_000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    sizes = {"bytes_needed": 1_000_000, "first_bytes": 600_000}
    refused(tmp_path, "beside the run that is overwritten, which goes only then", begin=sizes, overwrite=True)
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(CONFIG, FACTS, **sizes)


def test_resume(tmp_path: Path) -> None:
    make_run(tmp_path, 2, 4)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "loss": 0.2}\n{"step": 4, "dev_loss": 0.1}\n[]\n{"step": null}\n{"step": 4, "lo')
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(CONFIG, FACTS)
        assert folder.checkpoint is not None
        assert folder.checkpoint.step == 4
        assert folder.skipped == []
        folder.log({"step": 5, "loss": 0.3})
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5]
    assert lines[-2:] == [{"step": 4, "dev_loss": 0.1}, {"step": 5, "loss": 0.3}]
    record = json.loads((tmp_path / RUN).read_text())
    assert [r["step"] for r in record["resumed"]] == [4]


def test_resume_from_the_one_before_a_damaged_one(tmp_path: Path) -> None:
    make_run(tmp_path, 2, 4)
    flip_bit(tmp_path / "checkpoint-4" / "model.safetensors", -1)
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(CONFIG, FACTS)
        assert folder.checkpoint is not None
        assert folder.checkpoint.step == 2
        assert "checkpoint-4/model.safetensors is damaged: its SHA-256" in folder.skipped[0]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2


def test_resume_finds_a_checkpoint_that_lies_aside(tmp_path: Path) -> None:
    """The crash fell between the two renames of a replacement."""
    make_run(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2.old-5")
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(CONFIG, FACTS)
        assert folder.checkpoint is not None
        assert folder.checkpoint.step == 2


def test_resume_with_no_checkpoint_yet_starts_over(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / METRICS).write_text('{"step": 0, "dev_loss": 3}\n{"step": 1, "loss": 3}\n')
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(CONFIG, FACTS)
        assert folder.checkpoint is None
    assert (tmp_path / METRICS).read_text() == ""


def test_resume_with_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, 2, 4)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "state.json").unlink()
    message = refused(tmp_path, "no checkpoint is whole; start again with --overwrite", resume=True)
    assert "checkpoint-4" in message


def test_resume_with_other_settings(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    changed = {**CONFIG, "learning_rate": 2e-3, "columns": {"prompt": "question"}, "packing": True, "epochs": 5.0}
    del changed["seed"]
    message = refused(tmp_path, "cannot be resumed", begin={"config": changed}, resume=True)
    for difference in (
        "learning_rate: 0.001 -> 0.002",
        "columns: {'prompt': 'q'} -> {'prompt': 'question'}",
        "seed: 42 -> (absent)",
        "packing: (absent) -> True",
    ):
        assert difference in message
    assert "epochs" not in message


def test_resume_with_other_contents(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    message = refused(
        tmp_path, "data_sha256: 'bb' -> 'cc'", begin={"facts": {**FACTS, "data_sha256": "cc"}}, resume=True
    )
    assert "model_sha256" not in message
    # A path whose contents are not in the facts must stay the same itself.
    facts = {k: v for k, v in FACTS.items() if k != "model_sha256"}
    message = refused(tmp_path, "", begin={"config": {**CONFIG, "model": "x"}, "facts": facts}, resume=True)
    assert "model: 'base' -> 'x'" in message
    assert "model_sha256: 'aa' -> (absent)" in message


def test_settings_that_may_change_on_resume(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    changed = {
        **CONFIG,
        "epochs": 5.0,
        "max_steps": 9,
        "output_dir": "moved",
        "model": "/elsewhere",
        "data": "moved.jsonl",
    }
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(changed, FACTS)
        assert folder.checkpoint is not None
    assert json.loads((tmp_path / RUN).read_text())["config"] == changed
    assert yaml.safe_load((tmp_path / RECIPE).read_text()) == changed


def test_a_full_disk_while_logging(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.begin(CONFIG, FACTS)
        folder.log({"step": 1})
        with files_limited_to(20), pytest.raises(OSError, match=r"bytes could be written|File too large"):
            folder.log({"step": 2, "loss": 0.25})
    with RunFolder(tmp_path, resume=True) as folder:
        folder.begin(CONFIG, FACTS)


def test_a_full_disk_at_the_start(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    before = tree(tmp_path)
    with files_limited_to(20), RunFolder(tmp_path, resume=True) as folder, pytest.raises(OSError):
        folder.begin(CONFIG, FACTS)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    make_run(path, 1)
    return path


near_records = st.fixed_dictionaries(
    {"format": st.just(FORMAT)},
    optional={"config": st.just(CONFIG) | json_values, "facts": st.just(FACTS) | json_values, "resumed": json_values},
)


@settings(max_examples=200)
@given(content=st.binary(max_size=60) | (json_values | near_records).map(lambda v: json.dumps(v).encode()))
def test_fuzzed_run_json(fuzzed: Path, content: bytes) -> None:
    (fuzzed / RUN).write_bytes(content)
    try:
        with RunFolder(fuzzed, resume=True) as folder:
            folder.begin(CONFIG, FACTS)
    except RunError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert (fuzzed / RUN).read_bytes() == content
