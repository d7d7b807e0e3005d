"""Checkpoints and the best model on disk: whole or not there, whatever happens in between."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import files_limited_to, flip_bit, json_values, tree
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afina import durable
from afina.durable import MAX_JSON_BYTES, WORKING_NAME, recover
from afina.engine import checkpoint as saving
from afina.engine.checkpoint import (
    STATE,
    Checkpoint,
    SaveError,
    find_latest,
    load_checkpoint,
    publish_best,
    save_checkpoint,
)
from afina.engine.stop import StopRequest
from afina.errors import RunError
from afina.manifest import MANIFEST, check_manifest, describe


def groups(value: float, size: int = 64) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"embed.weight": torch.full((4, size), value), "norm.weight": torch.full((size,), value).bfloat16()},
        "optimizer": {"exp_avg.embed.weight": torch.full((4, size), value), "step": torch.tensor(int(value))},
    }


def save(run_dir: Path, step: int, **options: Any) -> Path:
    return save_checkpoint(run_dir, step, groups(step), {"step": step}, **options)


def assert_is_step(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.meta == {"step": step}
    for group, expected in groups(step).items():
        found = checkpoint.tensors(group)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected)


def write_best(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100)


def write_large_best(folder: Path) -> None:
    write_best(folder)
    (folder / "more").write_bytes(bytes(10_000))


def remake_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"files": describe(folder)}))


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "model": {"w": torch.randn(3, 5), "b16": torch.randn(7).bfloat16(), "not contiguous": torch.randn(4, 6).T},
        "optimizer": {"nan": torch.tensor([float("nan"), float("inf"), -0.0]), "rng": torch.get_rng_state()},
    }
    meta = {"loss": 0.1, "rows": [1, 2, 2**70], "nested": {"none": None, "best": float("inf"), "é": "\ud800"}}
    path = save_checkpoint(tmp_path, 7, tensors, meta)
    assert path == tmp_path / "checkpoint-7"
    assert sorted(p.name for p in path.iterdir()) == [MANIFEST, "model.safetensors", "optimizer.safetensors", STATE]
    checkpoint = load_checkpoint(path)
    assert (checkpoint.step, checkpoint.meta, checkpoint.groups) == (7, meta, ("model", "optimizer"))
    for group, members in tensors.items():
        found = checkpoint.tensors(group)
        assert found.keys() == members.keys()
        for name, tensor in members.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    with pytest.raises(RunError, match="no tensors 'lora', only model, optimizer"):
        checkpoint.tensors("lora")


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 20):
        save(tmp_path, step, keep=3)
    assert [step for step, _ in saving.checkpoints(tmp_path)] == [20, 10, 2]
    save(tmp_path, 21, keep=None)
    assert [step for step, _ in saving.checkpoints(tmp_path)] == [21, 20, 10, 2]
    save(tmp_path, 22, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-22"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 23, keep=0)


def test_the_one_just_saved_outlives_damaged_later_ones(tmp_path: Path) -> None:
    """A run that went on from step 20 because 30 and 40 were damaged must not count those among the newest."""
    for step in (20, 30, 40):
        save(tmp_path, step, keep=None)
    for step in (30, 40):
        (tmp_path / f"checkpoint-{step}" / STATE).unlink()
    save(tmp_path, 25, keep=2)
    assert [step for step, _ in saving.checkpoints(tmp_path)] == [25, 20]
    assert_is_step(find_latest(tmp_path)[0], 25)


def test_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, groups(1), {"step": 1})
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert_is_step(find_latest(tmp_path)[0], 5)


def file_to_folder(checkpoint: Path) -> None:
    (checkpoint / STATE).unlink()
    (checkpoint / STATE).mkdir()


def folder_to_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("x")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit of a weight": lambda c: flip_bit(c / "model.safetensors", -1),
    "bit of a header": lambda c: flip_bit(c / "optimizer.safetensors", 12),
    "bit of the state": lambda c: flip_bit(c / STATE, 30),
    "truncated": lambda c: os.truncate(c / "optimizer.safetensors", 100),
    "emptied": lambda c: os.truncate(c / "model.safetensors", 0),
    "bytes after the end": lambda c: (c / "model.safetensors").open("ab").write(b"\0"),
    "file missing": lambda c: (c / "optimizer.safetensors").unlink(),
    "file added": lambda c: (c / "other.safetensors").write_bytes(b"x"),
    "manifest missing": lambda c: (c / MANIFEST).unlink(),
    "manifest truncated": lambda c: os.truncate(c / MANIFEST, 50),
    "file is a folder": file_to_folder,
    "not a folder": folder_to_file,
    "renamed": lambda c: c.rename(c.with_name("checkpoint-9")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    DAMAGES[damage](tmp_path / "checkpoint-2")
    checkpoint, skipped = find_latest(tmp_path)
    assert_is_step(checkpoint, 1)
    (reason,) = skipped
    assert str(tmp_path / "checkpoint-") in reason
    assert damage != "truncated" or "100 bytes, its manifest says" in reason
    assert "\n" not in reason


def test_every_single_bit_counts(tmp_path: Path) -> None:
    """Any flipped bit is found, but in the manifest's own spelling, where one that still agrees does no harm."""
    path = save_checkpoint(tmp_path, 1, {"model": {"w": torch.arange(3.0)}}, {})
    whole = tree(path)
    for name, content in whole.items():
        assert content is not None
        for offset in range(len(content)):
            flip_bit(path / name, offset)
            try:
                checkpoint = load_checkpoint(path)
            except RunError:
                pass
            else:
                assert name == MANIFEST
                assert torch.equal(checkpoint.tensors("model")["w"], torch.arange(3.0))
            (path / name).write_bytes(content)
    assert tree(path) == whole


def test_nothing_there(tmp_path: Path) -> None:
    assert find_latest(tmp_path) == (None, [])
    for name in ("checkpoint-x", "checkpoint-01", "checkpoint-", "my-checkpoint-3", "checkpoint-3.tmp-17"):
        (tmp_path / name).mkdir()
    assert find_latest(tmp_path) == (None, [])


@pytest.mark.parametrize("limit", [0, 100, 1500, 5000])
def test_full_disk_leaves_everything_as_it_was(tmp_path: Path, limit: int) -> None:
    """The limits cut off the first file, a later one, and one of another size."""
    save_checkpoint(tmp_path, 1, groups(1, size=200), {"step": 1})
    publish_best(tmp_path, write_best)
    before = tree(tmp_path)
    large = groups(2, size=200)
    large["optimizer"]["exp_avg.embed.weight"] = torch.zeros(3000)
    with (
        files_limited_to(limit),
        pytest.raises(SaveError, match="checkpoint-2 could not be written: File too large") as e,
    ):
        save_checkpoint(tmp_path, 2, large, {"step": 2})
    assert isinstance(e.value, OSError)
    assert "\n" not in str(e.value)
    assert tree(tmp_path) == before
    with files_limited_to(limit), pytest.raises(SaveError, match="best could not be written"):
        publish_best(tmp_path, write_large_best)
    assert tree(tmp_path) == before


def test_replacing_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = tree(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name and self.is_dir():
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(durable, "_renameat2", lambda one, other, flags: False)  # a file system that cannot exchange
    with pytest.raises(SaveError, match="Input/output error"):
        save(tmp_path, 1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("writer's own")])
def test_other_errors_pass_and_leave_nothing(tmp_path: Path, error: Any) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        publish_best(tmp_path, write)
    assert tree(tmp_path) == {}


def test_recover(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    wanted = tree(tmp_path)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2.old-7")  # the crash fell between the two renames
    (tmp_path / "checkpoint-2.tmp-7").mkdir()
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1.old-8")  # and here just after them
    (tmp_path / "run.json.tmp-9").write_text("half")
    recover(tmp_path)
    assert tree(tmp_path) == wanted


def save_twice(run_dir: Path) -> None:
    """Each way of publishing: a new checkpoint that prunes another, one replaced, a best model replaced."""
    save(run_dir, 3)
    save(run_dir, 3)
    publish_best(run_dir, write_best)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_crash_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, every: int) -> None:
    """Die before the n-th call that opens or changes a file, for every n: what is left must be whole, best/ too.

    The short form takes every fifth, from the first on.
    """
    seen_steps = set()
    for n in itertools.count(0, every):
        run_dir = tmp_path / str(n)
        run_dir.mkdir()
        save(run_dir, 1)
        save(run_dir, 2)
        publish_best(run_dir, write_best)
        best = tree(run_dir / "best")
        if (pid := os.fork()) == 0:
            calls = itertools.count()

            def die(event: str, arguments: tuple[Any, ...], calls: Iterator[int] = calls, n: int = n) -> None:
                if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(calls) == n:
                    os._exit(9)

            sys.addaudithook(die)
            save_twice(run_dir)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found_before_recovery, skipped = find_latest(run_dir)
        assert found_before_recovery is not None
        assert not skipped
        recover(run_dir)
        checkpoint, skipped = find_latest(run_dir)
        assert checkpoint is not None
        seen_steps.add(checkpoint.step)
        assert_is_step(checkpoint, checkpoint.step)
        assert not skipped
        for _, path in saving.checkpoints(run_dir):
            load_checkpoint(path)  # none is half removed
        assert tree(run_dir / "best") == best
        assert not any(WORKING_NAME.fullmatch(p.name) for p in run_dir.iterdir())
        shutil.rmtree(run_dir)
        if status == 0:
            break
        assert status == 9
    assert n > 40
    assert seen_steps == {2, 3}


def test_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut loses what was not synced: logs, files and folder must be before the rename, the parent after it."""
    (tmp_path / "metrics.jsonl").write_text("{}")
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def record_rename(self: Path, target: Path) -> Path:
        synced.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    path = save(tmp_path, 1)
    (named,) = (n for n, what in enumerate(synced) if what.startswith("rename checkpoint-1.tmp-"))
    working = f"{tmp_path}/{synced[named].removeprefix('rename ')}"
    assert {f"{working}/{p.name}" for p in path.iterdir()} | {f"{tmp_path}/metrics.jsonl"} <= set(synced[:named])
    assert synced[named - 1] == working
    assert synced[named + 1] == str(tmp_path)


KILL_LOOP = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from afina.durable import recover
from afina.engine.checkpoint import find_latest, publish_best, save_checkpoint

torch.set_num_threads(1)
run_dir, kills = Path(sys.argv[1]), int(sys.argv[2])
inside = saved = killed = 0
random.seed(0)
for _ in range(kills):
    checkpoint, _ = find_latest(run_dir)
    step = checkpoint.step if checkpoint else 0
    ready, done = os.pipe()
    if (pid := os.fork()) == 0:
        while True:
            step += 1
            tensors = {g: {"w": torch.full((50_000,), float(step))} for g in ("model", "optimizer")}
            publish_best(run_dir, lambda folder: [(folder / n).write_text(str(step)) for n in "ab"] and None)
            save_checkpoint(run_dir, step, tensors, {"step": step})
            os.write(done, b"x")
    os.read(ready, 1)
    time.sleep(random.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    inside += any(".tmp-" in p.name or ".old-" in p.name for p in run_dir.iterdir())
    recover(run_dir)
    checkpoint, skipped = find_latest(run_dir)
    assert checkpoint and not skipped, skipped
    assert checkpoint.step == checkpoint.meta["step"] > saved
    saved = checkpoint.step
    for group in checkpoint.groups:
        assert (checkpoint.tensors(group)["w"] == saved).all()
    a, b = ((run_dir / "best" / n).read_text() for n in "ab")
    assert a == b and int(a) in (saved, saved + 1), (a, b, saved)
    assert not any(".tmp-" in p.name or ".old-" in p.name for p in run_dir.iterdir())
print(killed, inside, saved)
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """A process that does nothing but save is killed 20 times; each time the newest checkpoint and best/ are whole."""
    kills = int(os.environ.get("AFINA_TEST_KILLS", "20"))
    command = [sys.executable, "-c", KILL_LOOP, str(tmp_path), str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr
    killed, inside, saved = map(int, result.stdout.split())
    print(f"{killed} kills, {inside} of them inside a save, {saved} checkpoints")
    assert killed == kills
    assert inside >= kills // 4
    assert saved >= kills


# Near misses get further than noise: an object with the right keys and some wrong values.
near_manifests = st.dictionaries(
    st.sampled_from(["model.safetensors", STATE, "../x", "", "x"]),
    st.dictionaries(st.sampled_from(["size", "sha256"]), json_values, max_size=2) | json_values,
).map(lambda files: {"files": files})
near_states = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just(saving.FORMAT) | json_values,
        "step": st.just(1) | json_values,
        "groups": st.just(["model"]) | st.lists(st.sampled_from(["model", "x", "../x"])) | json_values,
        "meta": json_values,
    },
)


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("fuzz"), 1, {"model": {"w": torch.zeros(2)}}, {})


@settings(max_examples=300)
@given(content=st.binary(max_size=80) | (json_values | near_manifests).map(as_bytes))
def test_fuzzed_manifest(fuzzed: Path, content: bytes) -> None:
    (fuzzed / MANIFEST).write_bytes(content)
    with pytest.raises(RunError) as error:
        load_checkpoint(fuzzed)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@settings(max_examples=300)
@given(content=st.binary(max_size=80) | (json_values | near_states).map(as_bytes))
@example(content=b'{"format": "afina-checkpoint-1", "meta": {}, "step": 1, "groups": ["model", "model"]}')
def test_fuzzed_state(fuzzed: Path, content: bytes) -> None:
    (fuzzed / STATE).write_bytes(content)
    remake_manifest(fuzzed)
    try:
        checkpoint = load_checkpoint(fuzzed)
    except RunError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        assert (checkpoint.step, checkpoint.groups) == (1, ("model",))
        assert isinstance(checkpoint.meta, dict)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"step": ' + b"1" * 5000 + b"}", b"\xff\xfe", b"{}{}"])
def test_json_that_breaks_parsers(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    for name in (STATE, MANIFEST):
        (tmp_path / "checkpoint-1" / name).write_bytes(content)
        if name == STATE:
            remake_manifest(tmp_path / "checkpoint-1")
        with pytest.raises(RunError, match="is damaged: not JSON"):
            load_checkpoint(tmp_path / "checkpoint-1")


def test_json_too_large(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.truncate(tmp_path / "checkpoint-1" / MANIFEST, MAX_JSON_BYTES + 1)  # sparse: no bytes are written
    with pytest.raises(RunError, match="expected at most"):
        load_checkpoint(tmp_path / "checkpoint-1")


def test_signals_do_not_cut_a_save_short(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "a").write_text("1")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        (folder / "b").write_text("1")

    with StopRequest() as stop:
        publish_best(tmp_path, write)
    assert stop.requested == signal.SIGINT
    check_manifest(tmp_path / "best")
    assert tree(tmp_path / "best").items() >= {"a": b"1", "b": b"1"}.items()
