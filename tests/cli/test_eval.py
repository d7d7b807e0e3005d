"""``afina eval`` from its command line: what it prints, writes and compares, and every wrong input in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import saved

from afina.cli.eval_table import short
from afina.cli.main import run
from afina.engine import scores
from afina.engine.generate import generate_batch
from afina.engine.weights import load_model
from afina.loaders.text.source import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(saved(tmp_path_factory.mktemp("base") / "base", rope_theta=500.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every kind."""
    folder = tmp_path_factory.mktemp("rows")
    turn = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    files: dict[str, list[dict[str, Any]]] = {
        "rows": [{"prompt": f"number {i}: one two", "completion": f" three {i}"} for i in range(12)],
        "labels": [{"text": f"the quick {i}", "label": ("fox", "dog", "card")[i % 3]} for i in range(12)],
        "shots": [{"text": f"lazy {i}", "label": ("fox", "dog", "card")[i % 3]} for i in range(5)],
        "ranked": [
            {"prompt": f"one {i}", "completion": " two", "candidates": ["two", "three", f"fox {i}"]} for i in range(5)
        ],
        "unranked": [{"prompt": "one", "completion": " two", "candidates": ["three"]}],
        "text": [{"text": "one two three"}, {"text": "the quick brown fox"}],
        "chat": [{"messages": [*turn, *turn]}, {"messages": [*turn[:1], {"role": "assistant", "content": "four"}]}],
        "empty": [],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        "task: mine\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_target: '{{completion.strip()}}'\n"
        "doc_to_choice: candidates\n"
    )
    (folder / "bad.yaml").write_text("doc_to_txt: prompt\n")
    (folder / "options.txt").write_text("fox\ndog\ncard\nbrown\n")
    return folder


@pytest.fixture
def evaluate(model: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the verb on MODEL with names of files resolved; the JSON result and what was printed above it."""

    def call(*flags: str) -> tuple[dict[str, Any], list[str]]:
        assert run(["eval", model, *(named(flag, folder) for flag in flags), "--json"]) == 0
        *printed, last = capsys.readouterr().out.splitlines()
        return json.loads(last), printed

    return call


def named(flag: str, folder: Path) -> str:
    return str(folder / flag) if (folder / flag).is_file() else flag


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_token_counts_once(evaluate: Any) -> None:
    results = [
        evaluate("--data", "rows.jsonl", "--task", "loss", *flags)[0]
        for flags in ([], ["--batch_size", "1"], ["--batch_size", "7", "--no-packing"])
    ]
    first = results[0]
    assert set(first) >= {"loss", "perplexity", "tokens", "metrics", "bits_per_byte", "intervals"}
    assert (first["task"], first["metrics"], first["rows"]) == ("loss", {}, 12)
    low, high = first["intervals"]["loss"]
    assert low < first["loss"] < high
    for other in results[1:]:
        assert other["tokens"] == first["tokens"]
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-6)


def test_the_task_is_guessed_and_said(evaluate: Any, model: str, folder: Path, capsys: Any) -> None:
    for name, task in (("labels", "classify"), ("ranked", "retrieve"), ("text", "loss"), ("chat", "chat")):
        assert run(["eval", model, "--data", str(folder / f"{name}.jsonl"), "--max_new_tokens", "3", "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out.splitlines()[-1])["task"] == task
        assert f"task: {task} (" in err


def test_a_table_with_intervals_and_a_verdict(evaluate: Any, base: str, tmp_path: Path) -> None:
    out = tmp_path / "predictions.jsonl"
    found, printed = evaluate("--data", "labels.jsonl", "--base", base, "--output", str(out))
    heads = [line.split() for line in printed]
    assert heads[0] == ["model", "base", "difference"]
    assert [line[0] for line in heads[1:9]] == [
        "rows", "tokens", "loss", "perplexity", "bits_per_byte", "accuracy", "macro_f1", "ece"
    ]  # fmt: skip
    assert sum(line.startswith(("card", "dog", "fox")) for line in printed) == 3  # the confusion matrix
    comparison = found["comparison"]
    assert comparison["metric"] == found["metric"] == "accuracy"
    change = comparison["differences"]["accuracy"]
    assert change["difference"] == pytest.approx(found["metrics"]["accuracy"] - found["base"]["metrics"]["accuracy"])
    assert f"accuracy: {comparison['verdict']} (p = " in "\n".join(printed)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["where"].rsplit(" ", 1)[1] for row in rows] == [str(i) for i in range(1, 13)]
    assert set(rows[0]) >= {"prompt", "prediction", "reference", "score", "base_prediction", "base_score"}
    assert sum(row["score"] for row in rows) / 12 == pytest.approx(found["metrics"]["accuracy"])
    assert sum(row["base_score"] for row in rows) / 12 == pytest.approx(found["base"]["metrics"]["accuracy"])
    won = sum(row["score"] > row["base_score"] for row in rows)
    assert (change["won"], change["won"] + change["lost"] + change["tied"]) == (won, 12)
    assert found["base"]["tokens"] == found["tokens"]
    assert found["base"]["loss"] != found["loss"]


def test_a_model_beside_itself_is_no_different(evaluate: Any, model: str) -> None:
    for task in ("loss", "generate"):
        found, printed = evaluate("--data", "rows.jsonl", "--base", model, "--task", task, "--max_new_tokens", "3")
        assert found["comparison"]["verdict"] == "no difference"
        assert found["comparison"]["differences"]["loss"]["difference"] == 0.0
        assert any(line.endswith("0 rows rose, 0 fell, 12 stayed") for line in printed)


def test_the_old_tasks_give_the_old_figures(evaluate: Any, model: str, base: str, tmp_path: Path) -> None:
    prompts = [f"one two {i}\n" for i in range(6)]
    said = generate_batch(load_model(model), load_tokenizer(model), prompts, max_new_tokens=30)
    rows = [
        {"text": p.strip(), "label": a.strip() if i % 3 else "wrong"} for i, (p, a) in enumerate(zip(prompts, said))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(path), "--max_new_tokens", "30"]
    found, _ = evaluate(*flags, "--task", "classification", "--base", base)
    assert found["metrics"]["accuracy"] == pytest.approx(4 / 6)
    assert set(found["metrics"]) == {"accuracy", "macro_f1", "labels", "unknown", "answered"}
    found, _ = evaluate(*flags, "--task", "exact_match")
    assert found["metrics"] == {"exact_match": pytest.approx(4 / 6), "answered": 6}


def test_options_few_shots_and_candidates(evaluate: Any) -> None:
    found, _ = evaluate("--data", "shots.jsonl", "--options", "options.txt")
    assert (found["task"], found["details"]["options"]) == ("classify", 4)
    found, _ = evaluate("--data", "shots.jsonl", "--options", "dog,fox, card")
    assert found["details"]["options"] == 3
    plain, _ = evaluate("--data", "shots.jsonl")
    taught, _ = evaluate("--data", "shots.jsonl", "--few_shot", "3", "--train_file", "labels.jsonl")
    assert taught["loss"] == plain["loss"]
    assert taught["metrics"]["ece"] != plain["metrics"]["ece"]
    found, _ = evaluate("--data", "ranked.jsonl")
    assert found["metrics"]["chance@1"] == pytest.approx(1 / 3)


def test_a_task_file(evaluate: Any, base: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    flags = ["--task", "task.yaml", "--data", "ranked.jsonl", "--base", base, "--output", str(out)]
    found, _ = evaluate(*flags)
    assert (found["task"], found["rows"], found["loss"]) == ("mine", 5, None)
    assert set(found["metrics"]) == {"acc", "acc_norm"}
    assert found["comparison"]["metric"] == "acc"
    assert len(out.read_text().splitlines()) == 5
    shots, _ = evaluate(
        "--task", "task.yaml", "--data", "ranked.jsonl", "--few_shot", "1", "--train_file", "ranked.jsonl"
    )
    assert shots["rows"] == 5


WRONG: list[tuple[list[str], str]] = [
    ([], "--data FILE is missing"),
    (["--data", "rows.jsonl", "--task", "clasify"], "(did you mean 'classify'?)"),
    (["--data", "no-such.jsonl"], "no-such.jsonl"),
    (["--data", "empty.jsonl"], "no usable row (the file is empty)"),
    (["--data", "text.jsonl", "--task", "exact_match"], "text.jsonl: line 1: has no answer to compare with"),
    (["--data", "text.jsonl", "--task", "classify"], "line 1: has no answer to compare with; task classify"),
    (["--data", "rows.jsonl", "--task", "chat"], "rows.jsonl: line 1: is no conversation, which task chat needs"),
    (["--data", "rows.jsonl", "--task", "retrieve"], "rows.jsonl: line 1: has no candidates; task retrieve needs"),
    (["--data", "unranked.jsonl"], "unranked.jsonl: line 1: its answer 'two' is not among the options (three)"),
    (["--data", "shots.jsonl", "--options", "foxy,dog"], "line 1: its answer 'fox' is not among the options (foxy"),
    (["--data", "shots.jsonl", "--options", "fox"], "--options fox: 1 options"),
    (["--data", "rows.jsonl", "--options", "a,b", "--task", "generate"], "--options is for --task classify"),
    (["--data", "rows.jsonl", "--few_shot", "2"], "--few_shot N and --train_file FILE go together"),
    (["--data", "rows.jsonl", "--few_shot", "two", "--train_file", "labels.jsonl"], "--few_shot is 'two'"),
    (["--data", "rows.jsonl", "--few_shot", "2", "--train_file", "labels.jsonl"], "its rows are text/label, those of"),
    (["--data", "labels.jsonl", "--few_shot", "6", "--train_file", "shots.jsonl"], "5 rows that are not measured"),
    (["--data", "labels.jsonl", "--few_shot", "2", "--train_file", "labels.jsonl"], "0 rows that are not measured"),
    (["--data", "rows.jsonl", "--max_length", "1"], "--max_length is 1"),
    (["--data", "rows.jsonl", "--max_length", "2"], "long"),
    (["--data", "rows.jsonl", "--base", "no-such-model"], "no such model"),
    (["--data", "rows.jsonl", "--bse", "x"], "(did you mean '--base'?)"),
    (["--data", "rows.jsonl", "--output", "rows.jsonl"], "already exists: choose another, or give --overwrite"),
    (["--data", "rows.jsonl", "--output", "no/such/place.jsonl"], "there is no folder no/such"),
    (["--task", "no-such.yaml"], "no-such.yaml: the task cannot be read"),
    (["--task", "bad.yaml"], "bad.yaml, line 1: doc_to_txt is not a key that afina understands (did"),
    (["--task", "task.yaml"], "task.yaml: names no rows: give --data FILE"),
    (["--task", "task.yaml", "--data", "rows.jsonl"], "line 1: doc_to_choice"),
    (["--task", "task.yaml", "--options", "a,b"], "--options and a task file contradict each other"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_requests(
    flags: list[str], words: str, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(folder)
    assert run(["eval", model, *(named(flag, folder) for flag in flags)]) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert (out, line[:14]) == ("", "afina: error: ")
    assert words in line
    assert snapshot(folder) == before


def test_a_missing_package_is_one_line(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    scores._sacrebleu.cache_clear()
    argv = ["eval", model, "--data", str(folder / "rows.jsonl"), "--max_new_tokens", "2"]
    assert run([*argv, "--task", "translate"]) == 2
    assert "pip install 'afina[eval]'" in capsys.readouterr().err.splitlines()[-1]
    assert run([*argv, "--task", "generate"]) == 0
    assert "chrF and BLEU need sacrebleu" in capsys.readouterr().out


def test_a_model_without_chat_template_has_no_conversations(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = saved(tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert run(["eval", str(bare), "--data", str(folder / "chat.jsonl")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "chat.jsonl: line 1: is a conversation, and" in line
    assert "has no chat template: give a model that has one" in line


def test_models_that_read_other_rows_are_not_compared(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = saved(tmp_path / "short", max_position_embeddings=24)
    rows = [{"prompt": "one two " * n, "completion": " x"} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["eval", model, "--data", str(tmp_path / "rows.jsonl"), "--task", "loss", "--base", str(short)]
    assert run(argv) == 2
    assert "not the same ones: give a --max_length" in capsys.readouterr().err.splitlines()[-1]
    assert run([*argv, "--max_length", "20"]) == 0


def test_control_characters_are_shown() -> None:
    assert short("a\x1b[2J\nb\u2028é") == "a\\x1b[2J\\nb\\u2028é"
    assert short("x" * 50) == "x" * 37 + "..."
