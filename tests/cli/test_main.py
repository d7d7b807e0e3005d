"""The command line: help without torch, every wrong request one line and status 2, and the verbs' results."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO
from tiny_model import saved

from afina.cli.main import VERBS, run
from afina.cli.options import Verb
from afina.errors import ConfigError
from afina.loaders.weights.safetensors import SafetensorsFile, read_safetensors, write_safetensors

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    lines = [{"prompt": f"one two {i}", "completion": f" three {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "rows.jsonl")


def afina(*argv: str, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command, as a user runs it."""
    command = [sys.executable, "-m", "afina", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=REPO, env=env, timeout=120, **options
    )


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a request that must be refused: status 2, one line, nothing changed on disk; returns the line."""

    def check(*argv: str) -> str:
        before = snapshot(tmp_path)
        assert run(list(argv)) == 2
        out, err = capsys.readouterr()
        *told, line = err.splitlines()  # a run may have told what it read before it came upon what is wrong
        assert out == ""
        assert line.startswith("afina: error: ")
        assert not told or ("train" in argv and told[0].startswith(argv[argv.index("--data") + 1]))
        assert "Traceback" not in err
        assert snapshot(tmp_path) == before
        return line

    return check


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# ---------------------------------------------------------------- the frame


def test_help_is_quick_because_torch_stays_out() -> None:
    code = (
        "import sys; from afina.cli.main import run; status = run(['--help']);"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(status or ', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for verb in VERBS:
        assert f"  {verb} " in done.stdout


@pytest.mark.parametrize("verb", list(VERBS))
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--debug" in out


def test_train_help_names_every_setting_with_its_default_and_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    run(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "--learning_rate X peak learning rate (default: by the method and the model's width); also lr",
        "--gradient_accumulation_steps N micro-batches in an optimizer step [1]",
        "--min_lr_ratio X last learning rate as a share of the peak [0.0]",
        "--lr_scheduler_type cosine|linear|constant|wsd",
        "[true]",
        "also max_seq_length, sequence_len, cutoff_len",
    ):
        assert expected in text


def test_the_real_command_end_to_end() -> None:
    done = afina("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "afina")
    done = afina("trian")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "afina: error: 'trian' is not a verb of afina (did you mean 'train'?); see afina --help\n"
    done = afina("train", "--debug", "--data", "x")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("afina: error: output_dir is missing")
    assert afina().returncode == 2


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m afina --help | true"  # true is gone before Python has started
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 1, "out of memory"),
        (type("PanicException", (BaseException,), {})("called `unwrap`"), 1, "a library failed"),
        (KeyError("x"), 1, "internal error, KeyError: 'x' (add --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            type("NonFiniteError", (RuntimeError,), {"__module__": "afina.engine.nonfinite"})("3\nsteps"),
            1,
            "error: 3 steps",
        ),
    ],
)
def test_failures_while_running(
    raised: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> dict[str, Any]:
        raise raised

    monkeypatch.setitem(VERBS, "fail", Verb("fails", lambda parser: None, fail))
    assert run(["fail"]) == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("afina: error: ")
    assert words in err
    assert run(["fail", "--debug"]) == status
    assert "Traceback" in capsys.readouterr().err


def test_json_is_the_last_line_and_valid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"loss": float("nan"), "list": [float("inf"), 1.5], "path": Path("a"), "text": "ü\n"}

    def say(args: Any) -> dict[str, Any]:
        print("words for people")
        return result

    monkeypatch.setitem(VERBS, "say", Verb("says", lambda parser: None, say))
    assert run(["say", "--json"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    expected = {"loss": None, "list": [None, 1.5], "path": "a", "text": "ü\n"}
    assert json.loads(last, parse_constant=pytest.fail) == expected


def test_text_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    out, stdin = io.BytesIO(), io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    said: list[str] = []

    def say(args: Any) -> dict[str, Any]:
        said.append(input())
        print("Grüße")
        return {}

    monkeypatch.setitem(VERBS, "say", Verb("says", lambda parser: None, say))
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert run(["say"]) == 0
    assert (said, out.getvalue()) == (["caf\\xe9"], b"Gr\\xfc\\xdfe\n")


# ---------------------------------------------------------------- train: options, recipe, model source


def dry(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run(["train", *argv, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_flags_in_every_spelling(model: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--data", rows, "--output-dir", "out", "--base-model", model]
    assert dry(capsys, *base)["packing"] is True
    for flags in (["--packing", "false"], ["--packing=False"], ["--no-packing"], ["--no_packing"]):
        assert dry(capsys, *base, *flags)["packing"] is False
    assert dry(capsys, *base, "--gradient-checkpointing")["gradient_checkpointing"] is True
    for flag in ("--lr", "--learning_rate", "--learning-rate"):
        assert dry(capsys, *base, flag, "2e-5")["learning_rate"] == 2e-5
    assert dry(capsys, *base, "--lr", "1e-4", "--learning_rate", "0.0001")["learning_rate"] == 1e-4
    assert dry(capsys, *base, "--columns", "prompt=prompt")["columns"] == {"prompt": "prompt"}
    assert dry(capsys, *base, "--completion-only-loss", "false")["train_on_prompt"] is True
    assert dry(capsys, *base, "--no-completion-only-loss")["train_on_prompt"] is True


def test_a_boolean_flag_does_not_swallow_the_recipe(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {model}\ndata: {rows}\noutput_dir: out\nlr: 3e-4\n")
    found = dry(capsys, "--no-packing", "--gradient_checkpointing", str(tmp_path / "r.yaml"), "--epochs", "1")
    assert (found["learning_rate"], found["epochs"], found["gradient_checkpointing"]) == (3e-4, 1.0, True)


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    argv = ["train", "--model", model, "--data", rows, "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert run(argv) == 0
    printed = capsys.readouterr().out
    assert snapshot(tmp_path) == before
    (tmp_path / "again.yaml").write_text(printed)
    assert run(["train", str(tmp_path / "again.yaml"), "--dry-run"]) == 0
    reasons = [line for line in printed.splitlines() if line.startswith("#")]
    assert [reason.split()[1:3] for reason in reasons] == [["default", "for"], ["AFINA_CPU_DTYPE", "asks"]]
    resolved = yaml.safe_load(printed)
    assert resolved["learning_rate"] > 0
    assert resolved["dtype"] == "float32"
    assert capsys.readouterr().out.splitlines() == [line for line in printed.splitlines() if line not in reasons]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning-rat", "1"], "--learning-rat is not an option of afina train (did you mean '--learning_rate'?)"),
        (["--bathc_size=4"], "(did you mean '--batch_size'?)"),
        (["--no-seed"], "--no-seed is not an option"),
        (["-x"], "unrecognized arguments: -x"),
        (["--seed"], "expected one argument"),
        (["--no-packing=true"], "takes no value"),
        (["--packing", "--no-packing"], "give packing two different values"),
        (["--lr", "1e-4", "--learning-rate", "2e-4"], "give learning_rate two different values"),
        (["--lr", "1e-4", "--lr", "2e-4"], "give learning_rate two different values"),
        (["--batch_size", "0"], "--batch_size is 0; expected a whole number above 0"),
        (["--per-device-train-batch-size", "x"], "--per_device_train_batch_size is 'x'; expected a whole number"),
        (["--lr_scheduler_type", "cosin"], "(did you mean 'cosine'?)"),
        (["--learning_rate", "-1"], "above 0"),
        (["--learning_rate", "nan"], "expected a number"),
        (["--method", "lora", "--lora_target_modules", "q_pro"], "'q_pro' is no linear layer of this model (did you"),
        (["--adapter", "qlora", "--lora_r", "4096"], "lora_r is 4096, but model.layers.0.self_attn.q_proj is a matrix"),
        (["--method", "lora", "--modules_to_save", "lm_hed"], "'lm_hed' is no module of this model"),
        (["--method", "freeze", "--trainable", "layers.99"], "'layers.99' is no tensor of this model"),
        (["--lora_r", "8"], "lora_r is for method lora and qlora, but method is full"),
        (
            ["--optim", "adamw_bf16", "--dtype", "float32"],
            "optim: adamw_bf16 rounds bfloat16 weights stochastically, but",
        ),
        (["--optim", "adam"], "(did you mean 'adamw'?)"),
        (["--label_smoothing", "1"], "--label_smoothing is 1.0; expected a number from 0 to below 1"),
        (["--attention_backend", "sdpa"], "sdpa, which cannot keep packed rows apart, but packing is true"),
        (["--columns", "prompt"], "pairs like prompt=question"),
        (["--init", "random"], "leave out model"),
        (["--config", "c.json"], "config is for init random"),
        (["--resume", "--overwrite"], "contradict"),
        (["--resume_from_checkpoint", "runs/a/checkpoint-3"], "use --resume"),
        (["no-such-recipe.yaml"], "no-such-recipe.yaml: the recipe cannot be read: No such file or directory"),
        (["no-such-recipe"], "expected a YAML file; a model is named with --model no-such-recipe"),
        (["one.yaml", "two.yaml"], "unrecognized arguments: two.yaml"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "tests"], "no config.json"),
        (["--model", "README.md"], "pass the folder"),
        (["--device", "tpu"], "expected auto, cpu, cuda"),
        (["--device", "cuda:99"], "cuda"),
        (["--tokenizer", "tests"], "tests"),
        (["--data", "no-such.jsonl"], "no-such.jsonl"),
        (["--val_file", "no-such.jsonl"], "no-such.jsonl"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_wrong_train_requests(
    flags: list[str],
    words: str,
    dry_run: bool,
    model: str,
    rows: str,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPO)
    base = {"--model": model, "--data": rows, "--output_dir": str(tmp_path / "out")}
    argv = [part for pair in base.items() if pair[0] not in flags for part in pair]
    assert words in refused("train", *argv, *flags, *(["--dry-run"] if dry_run else []))


Spoil = Callable[[Path, pytest.MonkeyPatch], None]


def a_run_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--output_dir", str(folder / "out")]
    assert run(["train", *argv, "--quiet", "--threads", "1", "--max_steps", "2", "--save_steps", "1"]) == 0


def its_checkpoints_are_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run_is_there(folder, monkeypatch)
    for path in folder.glob("out/checkpoint-*/state.json"):
        path.write_text("{")


def the_disk_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


def a_tensor_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = read_safetensors(folder / "model" / "model.safetensors")
    weights["model.norm.weights"] = weights.pop("model.norm.weight")
    write_safetensors(folder / "model" / "model.safetensors", weights)


def the_config_is_of_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 20}))


@pytest.mark.parametrize(
    ("flags", "spoil", "words"),
    [
        (["--val_file", "rows.jsonl"], None, "are also in"),
        (["--max_length", "8"], None, "no row is left to learn from"),
        (["--method", "qlora", "--lora_target_modules", "q_proj", "--modules_to_save", "down_proj"], None, "in 4 bits"),
        (["--method", "lora", "--modules_to_save", "down_proj"], None, "has an adapter too"),
        (["--optim", "adamw_bf16"], None, "adamw_bf16 rounds bfloat16 weights"),
        (["--report_to", "tensorboard"], None, "which is not installed"),
        ([], a_tensor_is_missing, "model.norm.weight"),
        ([], the_config_is_of_another_model, "the weights differ from config.json"),
        ([], the_disk_is_full, "too little space for the checkpoints"),
        ([], a_run_is_there, "already holds a run"),
        (["--resume", "--max_steps", "2", "--lr", "0.5"], a_run_is_there, "learning_rate"),
        (["--resume", "--max_steps", "2", "--max_length", "20"], a_run_is_there, "max_length"),
        (["--resume", "--max_steps", "2"], its_checkpoints_are_damaged, "no checkpoint is whole"),
        (["--resume"], None, "there is no run to resume"),
    ],
)
def test_a_dry_run_refuses_what_training_refuses(
    flags: list[str],
    spoil: Spoil | None,
    words: str,
    model: str,
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the same words, though it reads no weights, and with nothing changed on the disk."""
    shutil.copytree(model, tmp_path / "model")
    if "tensorboard" in flags:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    if spoil is not None:
        spoil(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--model", "model", "--data", "rows.jsonl", "--output_dir", "out", "--threads", "1", *flags]
    before, said = snapshot(tmp_path), []
    capsys.readouterr()
    for each in (["--dry-run"], ["--quiet"]):
        assert run([*argv, *each]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
        assert snapshot(tmp_path) == before
    assert said[0] == said[1]
    assert words in said[0]


def test_a_dry_run_of_every_method_reads_no_weights(
    model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafetensorsFile, "read_into", lambda *a, **k: pytest.fail("a weight was read"))
    for flags in (
        ["--method", "full"],
        ["--method", "freeze"],
        ["--method", "lora", "--use_dora", "true", "--modules_to_save", "embed_tokens"],
        ["--method", "qlora", "--use_dora", "true"],
        ["--method", "qlora", "--dtype", "bfloat16"],
        ["--optim", "adamw_8bit"],
        ["--optim", "adamw_bf16", "--dtype", "bfloat16"],
        ["--attention_backend", "sdpa", "--packing", "false"],
    ):
        found = dry(capsys, "--model", model, "--data", rows, "--output_dir", str(tmp_path / "out"), *flags)
        assert found["output_dir"] == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_recipes_on_the_command_line(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "r.yaml"
    for text, words in (
        ("epochs: 1\nlearning_rat: 1e-4\n", f"{path}, line 2: learning_rat is not a setting (did you mean"),
        ("lr: 1e-4\nlr: 1e-4\n", "line 2: lr is given a second time"),
        ("lr: 1e-4\nlearning_rate: 2e-4\n", "two different values"),
        ("data: x\n", "output_dir is missing"),
        ("[", "not valid YAML"),
    ):
        path.write_text(text)
        assert words in refused("train", str(path))


def test_train_then_use_the_run(model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"base_model: {model}\ndata: {rows}\nmicro_batch_size: 4\nlr: 1e-3\n")
    argv = ["train", str(recipe), "--output_dir", str(out), "--max-steps", "3", "--cutoff-len", "64", "--json"]
    assert run(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = "output_dir best steps train_loss dev_loss_before dev_loss trained_tokens tokens_per_second peak_memory_gb"
    assert set(result) >= set(keys.split())
    assert (result["output_dir"], result["steps"]) == (str(out), 3)
    assert result["dev_loss"] < result["dev_loss_before"]
    saved_recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (saved_recipe["batch_size"], saved_recipe["learning_rate"], saved_recipe["max_length"]) == (4, 1e-3, 64)
    assert run(argv) == 2  # already there
    assert "--overwrite" in capsys.readouterr().err
    argv[argv.index("3")] = "4"
    assert run([*argv, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 4
    assert run(["generate", str(out), "--prompt", "one two", "--max-new-tokens", "3"]) == 0
    assert run(["eval", str(out), "--data", rows]) == 0
    assert run(["export", str(out), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0


def test_python_takes_the_same_names_and_checks(model: str, rows: str, tmp_path: Path) -> None:
    from afina import finetune

    given = {"base_model": model, "data": rows, "output_dir": tmp_path / "run"}
    for wrong, words in (({"lr": "fast"}, "lr is 'fast'"), ({"epoch": 1}, "did you mean 'epochs'")):
        with pytest.raises(ConfigError, match=words):
            finetune(**given | wrong)
    assert not (tmp_path / "run").exists()


def test_train_from_a_random_start(model: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--init", "random", "--config", f"{model}/config.json", "--tokenizer", model, "--data", rows]
    argv += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--max_length", "64", "--quiet", "--json"]
    assert run([*argv, "--dry-run"]) == 0
    capsys.readouterr()
    assert run(argv) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["steps"], err) == (2, "")


# ---------------------------------------------------------------- generate, chat


def test_generate_one(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", model, "--prompt", "one two", "--max-new-tokens", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= {"text", "tokens", "tokens_per_second"}
    assert result["tokens"] == 5
    assert run(["generate", model, "--prompt", "one two", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == result["text"] + "\n"
    assert run(["generate", model, "--prompt", "one two", "--chat", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out != result["text"] + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "one of --prompt TEXT and --data FILE"),
        (["--prompt", "a", "--data", "b", "--output", "c"], "one of --prompt TEXT and --data FILE"),
        (["--data", "b"], "go together"),
        (["--prompt", "a", "--output", "b"], "go together"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "a b c " * 99], "tokens and the model reads 96 at most"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0; expected a number 0 or more"),
        (["--prompt", "a", "--top_p", "1.5"], "--top_p"),
        (["--prompt", "a", "--max_new_tokens", "many"], "a whole number"),
        (["--prompt", "a", "--temprature", "1"], "(did you mean '--temperature'?)"),
        (["--prompt", "a", "--stop", ""], "not empty"),
        (["--prompt", "a", "--threads", "0"], "--threads"),
    ],
)
def test_wrong_generate_requests(flags: list[str], words: str, model: str, refused: Refused) -> None:
    assert words in refused("generate", model, *flags)


def test_a_model_is_needed(refused: Refused) -> None:
    for verb in ("generate", "chat", "export", "eval"):
        assert "arguments are required" in refused(verb)


def test_chat_with_piped_input(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talk = "hello\n\n/what\n/reset\nhello\n" + "again " * 200 + "\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(talk))
    assert run(["chat", model, "--max-new-tokens", "4", "--system", "short", "--json"]) == 0
    out, err = capsys.readouterr()
    *answers, last = out.splitlines()
    assert json.loads(last) == {"turns": 2}
    assert len(answers) >= 2
    unknown, long = err.splitlines()
    assert unknown.startswith("unknown command /what")
    assert "tokens and the model reads 96 at most" in long
    assert long.endswith("or /reset")


def test_chat_remembers_until_reset(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from afina.engine import generate

    asked: list[list[dict[str, str]]] = []

    def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], **sampling: Any) -> list[str]:
        asked.append(messages)
        return ["A", "B"]

    monkeypatch.setattr(generate, "stream", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n/reset\n3\n"))
    assert run(["chat", model, "--system", "S"]) == 0
    contents = [[message["content"] for message in messages] for messages in asked]
    assert contents == [["S", "1"], ["S", "1", "AB", "2"], ["S", "3"]]
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]


def test_tools_reach_generation_and_chat(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from afina.engine import generate

    given: list[Any] = []
    monkeypatch.setattr(generate, "render_prompt", lambda *_, tools: given.append(tools) or "one two")
    schema = {"name": "look", "parameters": {"type": "object"}}
    (tmp_path / "tools.json").write_text(json.dumps([schema]))
    flags = ["--max_new_tokens", "2", "--tools", str(tmp_path / "tools.json")]
    assert run(["generate", model, "--prompt", "x", "--chat", *flags]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/tool sunny\n"))
    assert run(["chat", model, *flags, "--json"]) == 0
    assert given == [({"type": "function", "function": schema},)] * 3
    assert capsys.readouterr().out.splitlines()[-1] == '{"turns": 2}'


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "tools: '{' is no JSON"),
        ("[]", "holds no tool: expected a list of {type, function}"),
        ('["look"]', "tools: 1 is a text: expected an object {type, function}"),
        (None, "cannot be read (No such file or directory): check the path"),
    ],
)
def test_bad_tools(
    model: str, tmp_path: Path, content: str | None, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_text(content)
    assert run(["generate", model, "--prompt", "x", "--chat", "--tools", str(path)]) == 2
    assert f"--tools {path}: {found}" in capsys.readouterr().err
    assert run(["generate", model, "--prompt", "x", "--tools", str(path)]) == 2
    assert "--tools is for --chat" in capsys.readouterr().err


# ---------------------------------------------------------------- rows: generate --data


def test_log_probabilities_are_written(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the line of JSON and in each row's; a bias shows in the text and not in them."""
    sampling = ["--max_new_tokens", "3", "--logprobs", "2", "--logit_bias", "9=100"]
    assert run(["generate", model, "--prompt", "one two", *sampling, "--json"]) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])["logprobs"]
    assert [each["id"] for each in one] == [9] * 3
    for each in one:
        assert each["logprob"] < each["top"][1]["logprob"] <= each["top"][0]["logprob"] < 0
    (tmp_path / "in.jsonl").write_text('{"prompt": "one two"}\n')
    files = ["--data", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert run(["generate", model, *files, *sampling]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["logprobs"] == one
    capsys.readouterr()
    assert run(["generate", model, "--prompt", "one", "--logit_bias", "9=1,9=2"]) == 2
    assert "--logit_bias is '9=1,9=2'; expected token ids and numbers like 42=-100,7=2.5" in capsys.readouterr().err


def test_generate_rows(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from afina.engine.generate import generate
    from afina.engine.weights import load_model
    from afina.loaders.text.source import load_tokenizer

    rows = [
        {"id": 7, "prompt": "one two", "completion": " three"},
        {"prompt": "how do I reset", "note": [1, None], "id": "ü"},
        {"prompt": "one", "completion": "", "id": 9},
        *({"prompt": "five " * i, "id": i} for i in range(1, 8)),
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    argv = ["generate", model, "--data", str(tmp_path / "in.jsonl"), "--output", str(out), "--max_new_tokens", "6"]
    assert run([*argv, "--batch_size", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row.get("reference") for row in found] == [" three", *[None] * 9]
    assert found[1]["note"] == [1, None]
    gpt, tokenizer = load_model(model), load_tokenizer(model)
    for row in found:
        assert row["completion"] == generate(gpt, tokenizer, row["prompt"], max_new_tokens=6)
    assert (result["output"], result["rows"]) == (str(out), 10)
    assert result["tokens"] > 20
    assert result["tokens_per_second"] > 0
    # Never over an existing file, unless asked to.
    before = out.read_bytes()
    assert run(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run([*argv, "--overwrite", "--max_new_tokens", "2"]) == 0
    assert out.read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, "yo"),
        ({"messages": [{"role": "user", "content": "hi"}]}, None),
        ({"instruction": "say hi", "input": "", "output": "hi"}, "hi"),
        ({"text": "my card", "label": "card_lost"}, "card_lost"),
        ({"text": "my card"}, None),
    ],
)
def test_generate_rows_of_every_schema(model: str, tmp_path: Path, row: dict[str, Any], reference: str | None) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out.jsonl"
    argv = ["generate", model, "--data", str(tmp_path / "in.jsonl"), "--output", str(out), "--max_new_tokens", "3"]
    assert run(argv) == 0
    found = json.loads(out.read_text())
    assert isinstance(found.pop("completion"), str)
    assert found.pop("reference", None) == reference
    assert found == row


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ('{"prompt": "a"}\nnot json\n', [], "line 2"),
        ('{"prompt": "a"}\n{"prompt": "' + "long " * 200 + '"}\n', [], "line 2 has"),
        ('{"question": "a"}\n', [], "question"),
        ("", [], "no usable row"),
        ('{"prompt": "a"}\n', ["--batch_size", "0"], "--batch_size is 0"),
        ('{"prompt": "a"}\n', ["--chat"], "--chat is for --prompt"),
        ('{"prompt": "a"}\n', ["--output", "TMP/no/folder.jsonl"], "there is no folder"),
        ('{"prompt": "a"}\n', ["--output", "TMP", "--overwrite"], "already exists"),
    ],
)
def test_wrong_rows_to_generate(
    text: str, flags: list[str], words: str, model: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    flags = [flag.replace("TMP", str(tmp_path)) for flag in flags]
    output = [] if "--output" in flags else ["--output", str(tmp_path / "out.jsonl")]
    assert words in refused("generate", model, "--data", str(tmp_path / "in.jsonl"), *output, *flags)


def test_a_failure_in_the_middle_leaves_no_output(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from afina.engine.batcher import Batcher

    calls = []

    def fail(self: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return real(self)

    real = Batcher.step
    monkeypatch.setattr(Batcher, "step", fail)
    out = tmp_path / "out.jsonl"
    argv = ["generate", model, "--data", rows, "--output", str(out), "--max_new_tokens", "2", "--batch_size", "4"]
    before = snapshot(tmp_path)
    assert run(argv) == 1  # no fault of the request
    assert snapshot(tmp_path) == before
    assert "No space left" in capsys.readouterr().err
