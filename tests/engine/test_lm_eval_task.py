"""Task files of lm-evaluation-harness: the texts and sums that it makes of the same file, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import saved

from afina.engine.lm_eval_file import LmEvalTask, read_task
from afina.engine.lm_eval_task import run_lm_eval_task
from afina.engine.task_results import TaskResult
from afina.engine.weights import load_model
from afina.errors import ConfigError, DataError
from afina.loaders.text.source import load_tokenizer

ROWS = [
    {"question": "how do I reset", "choices": [" card", "page open", "dög"], "label": 1, "answer": "page open"},
    {"question": "one two three", "choices": ["four five", "lazy dog", "dög"], "label": 2, "answer": "dög"},
    {"question": "a card payment", "choices": ["was declined", "fox", "dög jumps over"], "label": 0, "answer": "yes"},
    {"question": "the quick", "choices": ["brown fox", "x", "settings page"], "label": 1, "answer": "x"},
]
SHOTS = [{"question": f"three {i}", "choices": ["a", "b"], "label": i % 2, "answer": f"shot {i}"} for i in range(5)]
DATA = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rows.jsonl
    shots: {folder}/shots.jsonl
test_split: test
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """output_type: generate_until
description: "Be short.\\n\\n"
fewshot_split: shots
num_fewshot: 2
doc_to_text: "{% if question %}{{question|upper}}{% endif %}\\n"
doc_to_target: "{{answer}}"
target_delimiter: "=> "
generation_kwargs: {until: ["o", "z"], max_gen_toks: 6, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true}]
"""
LIKELY = """output_type: loglikelihood
doc_to_text: question
doc_to_target: "{{' ' + answer}}"
"""
SAME = """output_type: multiple_choice
fewshot_split: test
num_fewshot: 1
doc_to_text: question
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices[label]}}"
target_delimiter: " / "
fewshot_delimiter: "\\n"
"""
FILES = {"choice": CHOICE, "written": WRITTEN, "likely": LIKELY, "same": SAME}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("rows", ROWS), ("shots", SHOTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(f"task: afina_{name}\n{DATA.format(folder=folder)}{text}")
    saved(folder / "model", max_position_embeddings=512)
    return folder


def measured(folder: Path, name: str) -> TaskResult:
    task = read_task(folder / f"{name}.yaml")
    docs, pool, same = task.docs(None, None)
    model, tokenizer = load_model(str(folder / "model"), dtype="float32"), load_tokenizer(str(folder / "model"))
    return run_lm_eval_task(model, tokenizer, task, docs, pool, same=same, batch_size=2)


def test_contexts_by_hand(folder: Path) -> None:
    choice, written, likely, same = (measured(folder, name) for name in FILES)
    assert choice.rows[0]["prompt"] == "Question: how do I reset\nAnswer:"
    assert likely.rows[0]["prompt"] == "how do I reset"
    draw = random.Random(1234)  # which goes on from row to row
    for row, found in zip(ROWS, written.rows, strict=True):
        shots = "".join(f"THREE {i}\n=> shot {i}\n\n" for i in draw.sample(range(5), 2))
        assert found["prompt"] == f"Be short.\n\n{shots}{row['question'].upper()}\n"  # type: ignore[attr-defined]
    for row, found in zip(ROWS, same.rows, strict=True):  # never the row itself
        shot, _, question = found["prompt"].rpartition("\n")
        assert question == row["question"]
        assert shot.split(" / ")[0] != question
        assert shot in [f"{r['question']} / {r['choices'][r['label']]}" for r in ROWS]  # type: ignore[index,call-overload]


def test_figures_follow_from_the_sums(folder: Path) -> None:
    done = measured(folder, "choice")
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for row, found in zip(ROWS, done.rows, strict=True):
        sums, texts = found["log_likelihoods"], row["choices"]
        for name, size in (("acc", lambda t: 1), ("acc_norm", len), ("acc_bytes", lambda t: len(t.encode()))):
            shares = [total / size(text) for total, text in zip(sums, texts)]
            right[name] += max(range(3), key=shares.__getitem__) == row["label"]
        assert found["reference"] == texts[row["label"]]
    assert done.metrics == {name: count / 4 for name, count in right.items()}
    assert done.metric == "acc"
    likely = measured(folder, "likely")
    mean = sum(row["log_likelihoods"][0] for row in likely.rows) / 4
    assert likely.metrics["perplexity"] == pytest.approx(torch.tensor(-mean, dtype=torch.float64).exp().item())
    written = measured(folder, "written")
    assert all("o" not in row["prediction"] and "z" not in row["prediction"] for row in written.rows)


def test_lm_evaluation_harness_itself_gives_the_same(folder: Path, tmp_path: Path) -> None:
    """Contexts and texts equal, sums to 1e-4: where the package is installed."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = simple_evaluate(
        model=HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=2),
        tasks=[f"afina_{name}" for name in FILES],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    for name in FILES:
        ours = measured(folder, name)
        samples = sorted(theirs["samples"][f"afina_{name}"], key=lambda sample: sample["doc_id"])
        for row, sample in zip(ours.rows, samples, strict=True):
            assert row["prompt"] == sample["arguments"][0][0]
            if name == "written":
                # Of a character that was cut off in the middle nothing is left here, and a mark there.
                assert row["prediction"] == sample["resps"][0][0].rstrip("\ufffd")
            else:
                assert row["log_likelihoods"] == pytest.approx([float(r[0][0]) for r in sample["resps"]], abs=1e-4)
        for metric, value in ours.metrics.items():
            found = theirs["results"][f"afina_{name}"][f"{metric},none"]
            assert value == pytest.approx(found, rel=1e-4), (name, metric)


def written_task(folder: Path, text: str) -> Path:
    path = folder / "wrong.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("doc_to_txt: a\n", r"wrong\.yaml, line 1: doc_to_txt is not a key .*did you mean 'doc_to_text'"),
        ("process_docs: a\n", "process_docs is not a key that afina understands"),
        ("doc_to_text: a\n", "doc_to_target is missing"),
        ("doc_to_text: !function utils.f\n", "not valid YAML: could not determine a constructor"),
        ("doc_to_text: a\ndoc_to_target: b\noutput_type: multiple_choise\n", "did you mean 'multiple_choice'"),
        ("doc_to_text: a\ndoc_to_target: b\noutput_type: multiple_choice\n", "doc_to_choice is missing"),
        ("doc_to_text: a\ndoc_to_target: b\ndataset_path: EleutherAI/lambada\n", "only local files are read"),
        ("dataset_kwargs: {data_file: a}\n", "data_file is not understood.*did you mean 'data_files'"),
        ("doc_to_text: a\ndoc_to_target: b\ndataset_kwargs: {data_files: 'https://x.org/a.json'}\n", "is remote"),
        ("doc_to_text: a\ndoc_to_target: b\nmetric_list: [{metric: exact_mach}]\n", "did you mean 'exact_match'"),
        ("doc_to_text: a\ndoc_to_target: b\nmetric_list: [{metric: exact_match, aggregation: f1}]\n", "only 'mean' is"),
        ("doc_to_text: a\ndoc_to_target: b\nmetric_list: [{metric: exact_match, regexes_to_ignore: [a]}]\n",
         "regexes_to_ignore is not understood"),
        ("doc_to_text: a\ndoc_to_target: b\nmetric_list: []\n", "holds no metric"),
        ("doc_to_text: a\ndoc_to_target: b\nmetric_list: [{metric: bleu, ignore_case: true, aggregation: bleu}]\n",
         "is for exact_match"),
        ("doc_to_text: a\ndoc_to_target: b\ngeneration_kwargs: {temperature: 0.7}\n", "answers are greedy"),
        ("doc_to_text: a\ndoc_to_target: b\ngeneration_kwargs: {max_gen_toks: 0}\n", "max_gen_toks is 0"),
        ("doc_to_text: a\ndoc_to_target: b\ngeneration_kwargs: {until: 3}\n", "until is a number"),
        ("doc_to_text: a\ndoc_to_target: b\nfewshot_config: {sampler: balanced}\n", "sampler is 'balanced'"),
        ("doc_to_text: a\ndoc_to_target: b\nnum_fewshot: -1\n", "num_fewshot is -1"),
        ("doc_to_text: [a]\n", "is a list, which is not what it takes"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        read_task(written_task(tmp_path, text))
    assert "\n" not in str(refused.value)


def task(folder: Path, text: str, rows: list[dict[str, Any]]) -> LmEvalTask:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_task(written_task(folder, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("doc_to_text: '{{qestion}}'\ndoc_to_target: answer\n", r"line 1: doc_to_text of .*: 'qestion' is undefined"),
        ("doc_to_text: label\ndoc_to_target: answer\n", "doc_to_text gives a number"),
        ("doc_to_text: question\ndoc_to_target: '{{choices}}'\n", "gives a list"),
        ("doc_to_text: question\ndoc_to_target: label\ndoc_to_choice: [a]\noutput_type: multiple_choice\n",
         r"line 1: doc_to_target is choice 1, but there are 1"),
        ("doc_to_text: question\ndoc_to_target: answer\ndoc_to_choice: [page opens]\noutput_type: multiple_choice\n",
         r"'page open' is none of its choices \(did you mean 'page opens'\?\)"),
        ("doc_to_text: question\ndoc_to_target: answer\ndoc_to_choice: question\noutput_type: multiple_choice\n",
         "doc_to_choice gives a text: expected a list"),
        ("doc_to_text: '{% for i in range(9**9) %}x{% endfor %}'\ndoc_to_target: answer\n", "fails on it: "),
    ],
)  # fmt: skip
def test_rows_that_a_task_does_not_fit_are_named(tmp_path: Path, text: str, words: str) -> None:
    wrong = task(tmp_path, text, ROWS)
    docs, pool, same = wrong.docs(str(tmp_path / "rows.jsonl"), None)
    with pytest.raises(DataError, match=words):
        _ = wrong.contexts(docs, pool, same=same), wrong.target(docs[0])


def test_where_rows_come_from(folder: Path, tmp_path: Path) -> None:
    plain = task(tmp_path, "doc_to_text: question\ndoc_to_target: answer\n", ROWS)
    with pytest.raises(ConfigError, match="give --data FILE"):
        plain.docs(None, None)
    assert len(plain.docs(str(tmp_path / "rows.jsonl"), None)[0]) == 4
    shots = read_task(tmp_path / "wrong.yaml", num_fewshot=2)
    with pytest.raises(ConfigError, match="give --train_file FILE"):
        shots.docs(str(tmp_path / "rows.jsonl"), None)
    docs, pool, same = shots.docs(str(tmp_path / "rows.jsonl"), str(folder / "shots.jsonl"))
    assert (len(docs), len(pool), same) == (4, 5, False)
    many = read_task(tmp_path / "wrong.yaml", num_fewshot=6)
    with pytest.raises(DataError, match="num_fewshot is 6, but there are 5 rows"):
        many.contexts(docs, pool, same=False)
    plainly = "doc_to_text: question\ndoc_to_target: answer\n"
    first = task(tmp_path, plainly + "num_fewshot: 1\nfewshot_config: {sampler: first_n}\n", ROWS)
    docs, pool, same = first.docs(str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl"))
    assert same
    assert first.contexts(docs, pool, same=same)[:2] == [
        "one two three dög\n\nhow do I reset",
        "how do I reset page open\n\none two three",
    ]
    files = "dataset_kwargs: {data_files: {tset: rows.jsonl}}\ntest_split: test\n"
    wrong = task(tmp_path, plainly + files, ROWS)
    with pytest.raises(ConfigError, match=r"no split 'test' in data_files \(did you mean 'tset'"):
        wrong.docs(None, None)
