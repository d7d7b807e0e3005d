"""The benchmark of the use cases: its simple methods, its figures, and a whole run that is one step long."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

import bench_cases
from bench_cases import CASES, copied, majority, nearest, number_at_end, sample, shots_of, tfidf_lr, tfidf_ranking

from afina.loaders.text.render import Example

pytestmark = pytest.mark.usefixtures("own_cache")
TRAIN = [
    Example(prompt="the soup was lovely\n", completion="good"),
    Example(prompt="lovely bread, lovely people\n", completion="good"),
    Example(prompt="a cold dirty room\n", completion="bad"),
    Example(prompt="what a lovely view\n", completion="good"),
    Example(prompt="dirty towels and a cold bath\n", completion="bad"),
]
DEV = [
    Example(prompt="cold soup, dirty plate, cold bath\n", completion="bad"),
    Example(prompt="lovely\n", completion="good"),
]


def test_simple_methods() -> None:
    found = {method: [row["prediction"] for row in method(TRAIN, DEV)] for method in (majority, tfidf_lr, nearest)}
    assert found == {majority: ["good", "good"], tfidf_lr: ["bad", "good"], nearest: ["bad", "good"]}
    assert [row["prediction"] for row in copied(TRAIN, DEV)] == [row.prompt for row in DEV]
    values, statistic = sample("accuracy", majority(TRAIN, DEV))
    assert values.tolist() == [0.0, 1.0]
    assert statistic(values) == 0.5


def test_search_ranks_by_parts_of_words_and_leaves_ties_in_their_order() -> None:
    candidates = ("Nothing here.", "Swimmers may use lane two.", "Cars park at the quay.")
    rows = [
        Example(prompt=f"- ...\n\nQuestion: {question}", completion=answer, candidates=candidates)
        for question, answer in (("Where do I swim?", candidates[1]), ("xyz", candidates[2]))
    ]
    assert [row["rank"] for row in tfidf_ranking([], rows)] == [1, 3]
    values, statistic = sample("mrr@10", tfidf_ranking([], rows))
    assert statistic(values) == pytest.approx((1 + 1 / 3) / 2)


def test_examples_for_the_prompt_take_the_labels_in_turn() -> None:
    shots = shots_of(CASES["sentiment"], TRAIN, 4)
    assert sorted(shot.completion or "" for shot in shots) == ["bad", "bad", "good", "good"]
    assert {shot.completion for shot in shots[:2]} == {"bad", "good"}
    assert len(shots_of(CASES["content"], TRAIN, 2)) == 2


@pytest.mark.parametrize(
    ("text", "number"), [("so 3+4 = 7\n#### 7", "7"), ("#### $1,250.", "1250"), ("it is 7", ""), ("#### -2", "-2")]
)
def test_number_at_end(text: str, number: str) -> None:
    assert number_at_end(text) == number


def test_an_answer_without_a_number_is_wrong_and_praise_is_no_house_style() -> None:
    rows = [{"prediction": "it is 7", "reference": "#### 7"}, {"prediction": "#### 7", "reference": "4+3\n#### 7"}]
    assert sample("number_right", rows)[0].tolist() == [0.0, 1.0]
    assert sample("in_style", [{"prediction": "A perfect kettle!"}])[0].tolist() == [0.0]


def test_real_rows_are_split_without_repeats(tmp_path: Path, shared_data: Path) -> None:
    for name, case in CASES.items():
        if case.real:
            case.real(tmp_path)
            train, dev = ((tmp_path / f"{part}.jsonl").read_text("utf-8").splitlines() for part in ("train", "dev"))
            assert len(train) >= 400, name
            assert len(dev) >= 100, name
            assert not set(train) & set(dev), name


def test_a_case_from_end_to_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    bench_cases.main(["sentiment", "max_steps=1", "--dev_rows", "6", "--shots", "3"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["steps"] == 1
    assert line["dev_rows"] == 6
    assert set(line["figures"]) == {"zero_shot", "few_shot", "fine_tuned", "majority", "tfidf_lr"}
    for value, low, high in (figures["accuracy"] for figures in line["figures"].values()):
        assert 0 <= low <= value <= high <= 1
    assert set(line["fine_tuned_against"]) == set(line["figures"]) - {"fine_tuned"}
