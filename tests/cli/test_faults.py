"""Faults through the command line: kills, signals, full disks, damaged checkpoints, NaN, folders that must not be used.

A run that was interrupted, however and however often, must end as the one that never was: bit for bit, at one thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_server import Cli, Finished
from disk import flip_bit, tree
from tiny_model import saved, tiny_model, tiny_tokenizer

from afina.engine.checkpoint import checkpoints
from afina.engine.run_folder import RunFolder
from afina.engine.run_lock import LOCK
from afina.engine.weights import save_model
from afina.loaders.weights.safetensors import read_safetensors

TIMES = ("seconds", "tokens_per_second", "trained_tokens_per_second", "processed_tokens_per_second")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "open", "settings", "page", "card"]
STEPS = 12
SETTINGS = {
    "model": "tiny",
    "data": "rows.jsonl",
    "threads": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "eval_steps": 5,
    "save_steps": 2,
    "learning_rate": 1e-3,
}


def train(output_dir: str, *more: str, **settings: Any) -> list[str]:
    """The command line of a run with these settings."""
    flags = [f"--{name}={value}" for name, value in {**SETTINGS, **settings, "output_dir": output_dir}.items()]
    return ["train", *flags, "--json", *more]


def write_rows(path: Path, count: int, **special: Any) -> None:
    rng = random.Random(count)
    with path.open("w") as file:
        for n in range(count):
            prompt, completion = (" ".join(rng.choices(WORDS, k=rng.randint(2, 8))) for _ in range(2))
            completion += special.get("tail", {}).get(n, "")
            file.write(json.dumps({"prompt": f"{prompt} {n}\n", "completion": completion}) + "\n")


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    folder = tmp_path_factory.mktemp("faults")
    saved(folder / "tiny")
    write_rows(folder / "rows.jsonl", 70)
    server = Cli(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(cli: Cli) -> dict[str, Any]:
    """What the run that nothing disturbs leaves."""
    ended = cli.run(*train("whole"))
    assert ended.status == 0, ended.stderr
    left = outcome(cli.folder / "whole")
    assert [line["step"] for line in left["metrics"] if "loss" in line] == list(range(1, STEPS + 1))
    assert any("dev_loss" in line for line in left["metrics"])
    return left


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in TIMES}


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, but the clock's part: metrics, every file of the last checkpoint and of the best model."""
    last = run_dir / f"checkpoint-{STEPS}"
    state = json.loads((last / "state.json").read_text())
    state["meta"]["progress"] = without_times(state["meta"]["progress"])
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "metrics": [without_times(json.loads(line)) for line in lines],
        "state": state,
        "checkpoint": {p.name: p.read_bytes() for p in last.glob("*.safetensors")},
        "best": tree(run_dir / "best"),
    }


def steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(run_dir: Path) -> bool:
    return run_dir.exists() and any(".tmp-" in name or ".old-" in name for name in os.listdir(run_dir))


def assert_equal(run_dir: Path, whole: dict[str, Any]) -> None:
    assert not saving(run_dir)
    left = outcome(run_dir)
    for part, expected in whole.items():
        assert left[part] == expected, part


def test_one_run_is_like_another(cli: Cli, whole: dict[str, Any]) -> None:
    """What the comparisons below rest on."""
    assert cli.run(*train("again")).status == 0
    assert_equal(cli.folder / "again", whole)


def kill(cli: Cli, run_dir: Path, kind: str, rng: random.Random) -> None:
    """Kill the run that was begun: while it starts, a few steps later, or as soon as it is saving."""
    seen, more = steps_logged(run_dir), rng.randint(1, 4)
    if kind == "start":
        time.sleep(rng.uniform(0, 0.3))
    elif kind == "step":
        cli.when(lambda: steps_logged(run_dir) >= seen + more)
        time.sleep(rng.uniform(0, 0.05))
    else:
        cli.when(lambda: saving(run_dir))
        time.sleep(rng.uniform(0, 0.004))
    cli.signal(signal.SIGKILL)


def kill_and_resume(cli: Cli, whole: dict[str, Any], name: str, kinds: Iterator[str], wanted: int) -> int:
    """Kill and resume runs until so many kills struck; each must end as the undisturbed one. How many fell in saves."""
    rng = random.Random(0)
    kills = inside = starting = runs = 0
    while kills < wanted:
        run_dir = cli.folder / f"{name}{runs}"
        while True:
            seen = steps_logged(run_dir)
            cli.start(*train(run_dir.name, *(["--resume"] if run_dir.exists() else [])))
            if kills < wanted:
                kill(cli, run_dir, next(kinds), rng)
            ended = cli.wait()
            if ended.status == 0:
                break
            assert ended.status == -signal.SIGKILL, ended.stderr
            kills += 1
            inside += saving(run_dir)
            starting += steps_logged(run_dir) == seen
        assert_equal(run_dir, whole)
        runs += 1
    print(f"{kills} kills in {runs} runs, {inside} of them inside a save, {starting} before a step")
    return inside


@pytest.mark.slow
def test_kill_9_at_random_moments(cli: Cli, whole: dict[str, Any]) -> None:
    """20 kills (or AFINA_TEST_KILLS) at moments that seed 0 draws: while starting, after any step, inside saves."""
    wanted, rng = int(os.environ.get("AFINA_TEST_KILLS", "20")), random.Random(0)
    kinds = (rng.choice(["start", "step", "step", "save"]) for _ in count())
    assert kill_and_resume(cli, whole, "killed", kinds, wanted) >= wanted // 10


def test_kill_9_in_each_phase(cli: Cli, whole: dict[str, Any]) -> None:
    """The short form: the phases in turn."""
    kill_and_resume(cli, whole, "struck", cycle(["save", "step", "start"]), 5)


# Signals that come in while step 7, which is not saved, is logged.
SIGNALLED = """
import os, signal
from afina.engine.run_folder import RunFolder

log = RunFolder.log

def signalled(self, values):
    log(self, values)
    if values["step"] == 7:
        for name in {signals}:
            os.kill(os.getpid(), signal.Signals[name])

RunFolder.log = signalled
"""


# One signal gives status 130. More change nothing, but the last may arrive when all is saved and the handlers are gone.
@pytest.mark.parametrize(
    ("phase", "signals"),
    [
        ("step", ["SIGTERM"]),
        pytest.param("step", ["SIGHUP"], marks=pytest.mark.slow),
        pytest.param("step", ["SIGUSR1"], marks=pytest.mark.slow),
        pytest.param("step", ["SIGUSR2"], marks=pytest.mark.slow),
        ("step", ["SIGXCPU", "SIGXCPU"]),
        ("step", ["SIGINT", "SIGINT", "SIGTERM", "SIGINT"]),
        ("evaluation", ["SIGINT"]),
        pytest.param("save", ["SIGTERM"], marks=pytest.mark.slow),
        ("save", ["SIGINT", "SIGTERM", "SIGINT"]),
        ("first evaluation", ["SIGINT"]),
    ],
)
def test_a_signal_leaves_a_resumable_checkpoint(
    cli: Cli, whole: dict[str, Any], phase: str, signals: list[str]
) -> None:
    run_dir = cli.folder / "-".join([*signals, phase.split()[0]])
    moments = {
        "evaluation": lambda: steps_logged(run_dir) >= 6,  # the first evaluation and 5 steps
        "save": lambda: saving(run_dir) and steps_logged(run_dir) > 1,
        "first evaluation": lambda: (run_dir / "metrics.jsonl").exists(),
    }
    inside = phase == "step"
    cli.start(*train(run_dir.name), prelude=SIGNALLED.replace("{signals}", str(signals)) if inside else "")
    assert inside or cli.when(moments[phase])
    sent = time.monotonic()
    for name in [] if inside else signals:
        cli.signal(signal.Signals[name])
        time.sleep(0.002)
    ended = cli.wait()
    assert inside or time.monotonic() - sent < 5
    assert ended.status == 130 or (len(signals) > 1 and ended.status == -signal.SIGTERM), ended.stderr
    assert "Traceback" not in ended.stderr
    assert not saving(run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    done = max((line["step"] for line in lines if "loss" in line), default=0)
    assert done == 7 if inside else done < STEPS
    if done:
        assert (run_dir / f"checkpoint-{done}").is_dir()
    resumed = cli.run(*train(run_dir.name, "--resume"))
    assert resumed.status == 0, resumed.stderr
    assert not done or f"resumed from checkpoint-{done}" in resumed.stderr
    assert_equal(run_dir, whole)


SENT_WHILE = """
import os, signal
from afina.engine import run_inputs, train

def sent(*arguments, **options):
    os.kill(os.getpid(), signal.{name})
    raise AssertionError("the signal did nothing")

{place} = sent
"""


@pytest.mark.parametrize(
    ("name", "place"), [("SIGTERM", "train.read_data"), ("SIGHUP", "run_inputs._load"), ("SIGINT", "run_inputs._load")]
)
def test_a_signal_before_the_first_step_says_what_it_did(cli: Cli, name: str, place: str) -> None:
    prelude = SENT_WHILE.replace("{name}", name).replace("{place}", place)
    prelude = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + prelude
    ended = cli.run(*train(f"early-{name}"), prelude=prelude)
    assert ended.status == 130
    told = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert ended.error.startswith(f"afina: error: {told} while rows and model were read, before the first step")
    assert f"early-{name} was changed; start it again" in ended.error
    assert not (cli.folder / f"early-{name}").exists()


def test_nohup_stays_nohup(cli: Cli, whole: dict[str, Any]) -> None:
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    ended = cli.run(*train("nohup"), prelude=ignored + SIGNALLED.replace("{signals}", "['SIGHUP']"))
    assert ended.status == 0, ended.stderr
    assert_equal(cli.folder / "nohup", whole)


# What becomes of standard error, and of all streams.
LOST = {
    "a closed pipe": "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 2)",
    "a full disk": "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    "no streams": "import os, sys; [os.close(n) for n in range(3)]; sys.stdin = sys.stdout = sys.stderr = None",
}


def test_an_error_that_nobody_can_read_is_an_error(cli: Cli) -> None:
    for lost in ("a closed pipe", "a full disk"):
        assert cli.run("generate", "nothing-here", "--prompt", "x", prelude=LOST[lost]).status == 2


@pytest.mark.parametrize("lost", LOST)
def test_messages_that_cannot_be_written_stop_no_run(lost: str, cli: Cli, whole: dict[str, Any]) -> None:
    name = f"lost-{lost.split()[-1]}"
    ended = cli.run(*train(name), prelude=LOST[lost])
    assert ended.status == 0, ended.stderr
    assert_equal(cli.folder / name, whole)


@pytest.mark.slow
def test_the_process_itself(cli: Cli, whole: dict[str, Any]) -> None:
    """As above with ``python -m afina`` as it is installed, not a forked child: SIGTERM, then resume."""
    run_dir = cli.folder / "process"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AFINA_CACHE": str(cli.folder / "cache")}
    command = [sys.executable, "-m", "afina"]
    first = subprocess.Popen(
        [*command, *train("process")], cwd=cli.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while steps_logged(run_dir) < 4 and first.poll() is None:
        time.sleep(0.001)
    first.terminate()
    assert b"go on with --resume" in first.communicate()[1]
    assert first.returncode == 130
    second = [*command, *train("process", "--resume")]
    done = subprocess.run(second, cwd=cli.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == STEPS
    assert_equal(run_dir, whole)


# Somebody moves the folder away while step 7 is logged, and puts another one in its place.
MOVED = """
import os
from afina.engine.run_folder import RunFolder

log = RunFolder.log

def moved(self, values):
    log(self, values)
    if values["step"] == 7:
        os.rename(self.root, str(self.root) + "-moved")
        os.mkdir(self.root)

RunFolder.log = moved
"""


def test_a_folder_that_is_moved_away_is_not_written_under_its_old_name(cli: Cli, whole: dict[str, Any]) -> None:
    ended = cli.run(*train("away"), prelude=MOVED)
    assert ended.status == 1, ended.stderr
    assert "away is not the folder any more that this run began in" in ended.error
    assert list((cli.folder / "away").iterdir()) == []
    (cli.folder / "away").rmdir()
    (cli.folder / "away-moved").rename(cli.folder / "away")
    assert cli.run(*train("away", "--resume")).status == 0
    assert_equal(cli.folder / "away", whole)


# From the moment step {step} is logged no file above 30,000 bytes can be written; "snapshot" is what lay there then.
FILL = """
import resource, shutil
from afina.engine.run_folder import RunFolder

log = RunFolder.log

def fill(self, values):
    log(self, values)
    if values["step"] == {step} and "loss" in values:
        shutil.copytree(self.path, str(self.path) + "-snapshot")
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

RunFolder.log = fill
"""


@pytest.mark.parametrize(("step", "struck"), [pytest.param(8, "checkpoint-8", marks=pytest.mark.slow), (10, "best")])
def test_full_disk(cli: Cli, whole: dict[str, Any], step: int, struck: str) -> None:
    name = f"full-{step}"
    ended = cli.run(*train(name), prelude=FILL.replace("{step}", str(step)))
    assert ended.status == 1, ended.stderr
    assert f"{name}/{struck} could not be written: File too large; what was there before is unchanged" in ended.error

    def kept(folder: Path) -> dict[str, bytes | None]:
        return {k: v for k, v in tree(folder).items() if k.startswith(("checkpoint", "best"))}

    left = kept(cli.folder / name)
    assert left == kept(cli.folder / f"{name}-snapshot")
    assert {"best", "checkpoint-6"} <= left.keys()
    assert not saving(cli.folder / name)
    assert cli.run(*train(name, "--resume")).status == 0
    assert_equal(cli.folder / name, whole)


@pytest.mark.parametrize("damage", ["flipped", pytest.param("truncated", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(cli: Cli, whole: dict[str, Any], damage: str) -> None:
    run_dir = cli.folder / damage
    cli.start(*train(damage))
    cli.when(lambda: (run_dir / "checkpoint-8").exists())
    cli.signal(signal.SIGKILL)
    assert cli.wait().status == -signal.SIGKILL
    newest, earlier = [step for step, _ in checkpoints(run_dir)][:2]
    file = run_dir / f"checkpoint-{newest}" / "exp_avg.safetensors"
    if damage == "flipped":
        flip_bit(file, -100)
    else:
        os.truncate(file, file.stat().st_size // 2)
    ended = cli.run(*train(damage, "--resume"))
    assert ended.status == 0, ended.stderr
    assert f"checkpoint-{newest}/exp_avg.safetensors is damaged" in ended.stderr
    assert f"resumed from checkpoint-{earlier}" in ended.stderr
    assert_equal(run_dir, whole)


def test_no_whole_checkpoint(cli: Cli) -> None:
    run_dir = cli.folder / "none-whole"
    assert cli.run(*train("none-whole", max_steps=4)).status == 0
    for path in run_dir.glob("checkpoint-*"):
        os.truncate(path / "weights.safetensors", 10)
    before = tree(run_dir)
    ended = cli.run(*train("none-whole", "--resume", max_steps=4))
    assert ended.status == 2
    assert "no checkpoint is whole; start again with --overwrite" in ended.error
    assert tree(run_dir) == before


# The loss of one micro-batch of step 4 comes back NaN, or finite with a gradient that is not.
INJECT = """
import itertools
import torch
from afina.engine.model import GPT

class Spoil(torch.autograd.Function):
    @staticmethod
    def forward(context, loss):
        return loss.clone()
    @staticmethod
    def backward(context, gradient):
        return gradient * float("inf")

loss, calls = GPT.loss, itertools.count()

def spoilt(self, *arguments, **options):
    value = loss(self, *arguments, **options)
    if torch.is_grad_enabled() and next(calls) in {calls_to_spoil}:
        value = {spoiler}
    return value

GPT.loss = spoilt
"""


@pytest.mark.parametrize(
    "spoiler", [pytest.param("value * float('nan')", marks=pytest.mark.slow), "Spoil.apply(value)"]
)
def test_a_step_that_is_not_finite_changes_nothing(cli: Cli, spoiler: str) -> None:
    """Two micro-batches a step: calls 6 and 7 are step 4's."""
    name = "nan-loss" if "nan" in spoiler else "inf-gradient"
    prelude = INJECT.replace("{calls_to_spoil}", "{7}").replace("{spoiler}", spoiler)
    arguments = train(name, max_steps=6, save_steps=1, eval_steps=1, save_total_limit=9)
    ended = cli.run(*arguments, prelude=prelude)
    assert ended.status == 0, ended.stderr
    run_dir = cli.folder / name
    for file in ("weights", "exp_avg", "exp_avg_sq"):
        steps = [(run_dir / f"checkpoint-{n}" / f"{file}.safetensors").read_bytes() for n in (2, 3, 5)]
        assert len(set(steps)) == 3
    assert not (run_dir / "checkpoint-4").exists()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["dev_loss"] for line in lines if "dev_loss" in line]
    assert losses[3] == losses[4] != losses[5]
    (bad,) = (line for line in lines if line.get("skipped"))
    assert bad["step"] == 4
    assert len(bad["rows"]) == 4
    assert all(str(row).startswith("rows.jsonl: line ") for row in bad["rows"])
    assert bad["rows"][0] in ended.stderr
    assert ended.result["skipped_steps"] == 1


def test_three_in_a_row_stop_the_run(cli: Cli) -> None:
    """Steps 3 and 4 fail, 5 does not; 6, 7 and 8 do. No checkpoint holds a number that is not finite."""
    prelude = INJECT.replace("{calls_to_spoil}", "{4, 6, 10, 13, 14}").replace("{spoiler}", "value * float('nan')")
    ended = cli.run(*train("three", save_steps=1, save_total_limit=99), prelude=prelude)
    assert ended.status == 1, ended.stderr
    assert "3 steps in a row without a finite loss and gradient" in ended.error
    assert "step 8" in ended.error
    assert "rows.jsonl: line " in ended.error
    run_dir = cli.folder / "three"
    assert sorted(p.name for p in run_dir.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 5)]
    assert "go on from the checkpoint of step 5 at a lower rate than 0.001: --resume --learning" in ended.error
    for path in run_dir.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in read_safetensors(path).values()), path
    assert cli.run(*train("three", "--resume", save_steps=1, save_total_limit=99)).status == 0


# Weights that a rate above 5e-4 blows up from step {step} on.
DIVERGE = """
import torch
from afina.engine.train import Run

step = Run._step

def diverging(self):
    step(self)
    if self.progress.step >= {step} and self.peak_lr > 5e-4:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("inf"))

Run._step = diverging
"""


@pytest.mark.parametrize(
    ("first_bad", "flag"), [(6, "--resume"), pytest.param(1, "--overwrite", marks=pytest.mark.slow)]
)
def test_the_error_of_a_run_that_diverged_says_what_to_do(
    cli: Cli, whole: dict[str, Any], first_bad: int, flag: str
) -> None:
    """What it says is done, word for word, and the run ends well."""

    def without_rate(arguments: list[str]) -> list[str]:
        return [argument for argument in arguments if not argument.startswith("--learning_rate=")]

    name = f"diverged-{first_bad}"
    prelude = DIVERGE.replace("{step}", str(first_bad))
    ended = cli.run(*train(name), prelude=prelude)
    assert ended.status == 1, ended.stderr
    assert "finite" in ended.error
    advice = ended.error[ended.error.rindex(flag) :].split()
    assert advice == [flag, "--learning_rate", "0.00033"]
    again = cli.run(*without_rate(train(name, *advice)), prelude=prelude)
    assert again.status == 0, again.stderr
    run_dir, start = cli.folder / name, 4 if flag == "--resume" else 0
    rates = {line["step"]: line["lr"] for line in map(json.loads, (run_dir / "metrics.jsonl").open()) if "lr" in line}
    usual = {line["step"]: line["lr"] for line in whole["metrics"] if "lr" in line}
    expected = {step: lr * (0.33 if step > start else 1) for step, lr in usual.items()}
    assert rates == pytest.approx(expected)
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config"]["learning_rate"] == 0.00033
    if flag == "--overwrite":
        return
    assert [one["lowered"] for one in record["resumed"]] == [{"learning_rate": [0.001, 0.00033]}]
    assert "0.00033: it was 0.001 before the run went on here" in again.stderr
    recipe = (run_dir / "recipe.yaml").read_text()
    assert "# it was 0.001 before the run went on here\nlearning_rate: 0.00033\n" in recipe
    # From now on this is the run's rate: it need not be said again, and may not be raised.
    longer = cli.run(*without_rate(train(name, "--resume", max_steps=13)), prelude=prelude)
    assert longer.status == 0, longer.stderr
    assert longer.result["steps"] == 13
    ended = refused(cli, *train(name, "--resume", max_steps=14), expected="cannot be resumed")
    assert "learning_rate: 0.00033 -> 0.001 (it may only become lower)" in ended.error


def test_rows_that_break_the_model_are_the_ones_named(cli: Cli) -> None:
    """A model whose embedding of "%" is NaN, and three rows that hold it: no hook, only weights and data."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, tie_word_embeddings=False)
    (percent,) = tokenizer.encode("%", add_special=False)
    with torch.no_grad():
        model.get_parameter("embed.weight")[percent] = float("nan")
    save_model(model, tokenizer, cli.folder / "nan-model")
    write_rows(cli.folder / "percent.jsonl", 60, tail={10: "%", 40: "%"})
    write_rows(cli.folder / "dev.jsonl", 5)
    settings = {"model": "nan-model", "data": "percent.jsonl", "val_file": "dev.jsonl", "max_steps": 10}
    ended = cli.run(*train("percent", "--allow_nonfinite", **settings))
    assert ended.status == 0, ended.stderr
    lines = [json.loads(line) for line in (cli.folder / "percent" / "metrics.jsonl").read_text().splitlines()]
    named = {row for line in lines if line.get("skipped") for row in line["rows"]}
    assert {"percent.jsonl: line 11", "percent.jsonl: line 41"} <= named
    assert all(line["loss"] is not None for line in lines if "loss" in line and not line.get("skipped"))
    write_rows(cli.folder / "all-percent.jsonl", 60, tail=dict.fromkeys(range(60), "%"))
    ended = cli.run(*train("all-percent", "--allow_nonfinite", **{**settings, "data": "all-percent.jsonl"}))
    assert ended.status == 1
    assert "3 steps in a row" in ended.error


def refused(cli: Cli, *arguments: str, expected: str, prelude: str = "") -> Finished:
    """The run must end with status 2 and one line, and change nothing on disk (the token cache aside)."""

    def on_disk() -> dict[str, bytes | None]:
        return {k: v for k, v in tree(cli.folder).items() if not k.startswith(("cache", ".std"))}

    before = on_disk()
    ended = cli.run(*arguments, "--quiet", prelude=prelude)
    assert ended.status == 2, ended.stderr
    assert expected in ended.error
    assert ended.stderr == ended.error + "\n"
    assert ended.stdout == ""
    assert on_disk() == before
    return ended


@pytest.fixture(scope="module")
def short(cli: Cli) -> str:
    assert cli.run(*train("short", max_steps=2)).status == 0
    return "short"


def test_refuses_folders_that_hold_something(cli: Cli, short: str) -> None:
    (cli.folder / "mine").mkdir()
    (cli.folder / "mine" / "thesis.txt").write_text("years of work")
    refused(cli, *train(short), expected="already holds a run: continue it with --resume, replace it with --overwrite")
    for flag in ([], ["--resume"], ["--overwrite"]):
        refused(cli, *train("mine", *flag), expected="not empty and not a run folder")
        refused(cli, *train("rows.jsonl", *flag), expected="rows.jsonl is not a folder")
        refused(cli, *train("rows.jsonl/out", *flag), expected="rows.jsonl is not a folder")
    refused(cli, *train(short, "--resume", "--overwrite"), expected="contradict each other")


def test_refuses_folders_that_cannot_be_written(cli: Cli) -> None:
    # /proc takes no folders, not even root's; a folder's own permissions do not stop root, who may run these tests.
    refused(cli, *train("/proc/out"), expected="/proc")
    prelude = "import os; os.access = lambda path, mode: False"
    refused(cli, *train("read-only"), expected="is read-only for this user", prelude=prelude)


def test_refuses_too_little_space(cli: Cli) -> None:
    prelude = "import shutil; u = shutil.disk_usage('/'); shutil.disk_usage = lambda p: u._replace(free=1_000_000)"
    ended = refused(cli, *train("new/run"), expected="too little space", prelude=prelude)
    assert "0.00 GB free" in ended.error
    assert not (cli.folder / "new").exists()


def test_refuses_a_folder_in_use(cli: Cli, short: str) -> None:
    with RunFolder(cli.folder / short, resume=True):
        refused(cli, *train(short, "--resume"), expected=f"in use by another run (PID {os.getpid()} on ")
        refused(cli, *train(short, "--overwrite"), expected=f"in use by another run (PID {os.getpid()} on ")
    assert not (cli.folder / short / LOCK).exists()


def test_refuses_to_resume_another_run(cli: Cli, short: str) -> None:
    resume = ["--resume"]
    refused(cli, *train("nowhere", *resume), expected="there is no run to resume")
    ended = refused(cli, *train(short, *resume, learning_rate=2e-3, seed=1), expected="cannot be resumed")
    assert "learning_rate: 0.001 -> 0.002 (it may only become lower)" in ended.error
    assert "seed: 42 -> 1" in ended.error
    write_rows(cli.folder / "other.jsonl", 71)
    refused(cli, *train(short, *resume, data="other.jsonl"), expected="data_sha256: ")
    saved(cli.folder / "wider", intermediate_size=64)
    refused(cli, *train(short, *resume, model="wider"), expected="model_sha256: ")


def test_a_run_may_move_and_go_on_for_longer(cli: Cli, short: str) -> None:
    (cli.folder / short).rename(cli.folder / "moved")
    (cli.folder / "tiny").rename(cli.folder / "tiny-moved")
    try:
        ended = cli.run(*train("moved", "--resume", model="tiny-moved", max_steps=4))
    finally:
        (cli.folder / "tiny-moved").rename(cli.folder / "tiny")
        (cli.folder / "moved").rename(cli.folder / short)
    assert ended.status == 0, ended.stderr
    assert ended.result["steps"] == 4


def test_overwrite_that_is_stopped_before_its_first_step(cli: Cli, short: str) -> None:
    before = tree(cli.folder / short)
    prelude = SIGNALLED.replace("{signals}", "['SIGINT']").replace('["step"] == 7', '["step"] == 0')
    ended = cli.run(*train(short, "--overwrite"), prelude=prelude)
    assert ended.status == 130, ended.stderr
    assert "stopped at step 0 of 12; the run that was to be overwritten is as it was" in ended.stderr
    assert tree(cli.folder / short) == before


def test_overwrite(cli: Cli, whole: dict[str, Any]) -> None:
    assert cli.run(*train("overwritten", max_steps=3, seed=5)).status == 0
    (cli.folder / "overwritten" / "notes.txt").write_text("mine")
    assert cli.run(*train("overwritten", "--overwrite")).status == 0
    (cli.folder / "overwritten" / "notes.txt").unlink()
    assert_equal(cli.folder / "overwritten", whole)
