"""Tasks: what a model is asked, what its answers are worth, and what is refused; with known answers by hand."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer

from afina.engine import scores
from afina.engine.generate import generate_batch
from afina.engine.model import GPT
from afina.engine.questions import answer_of, option_pairs, options_of, prompt_of, with_shots
from afina.engine.tasks import TASKS, compare, guess_task, run_task
from afina.errors import ConfigError, DataError
from afina.loaders.data.rows import read_rows
from afina.loaders.text.encode import encode_rendered
from afina.loaders.text.render import Example, render_example
from afina.loaders.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return tiny_model(tokenizer)


def talk(*turns: str, **more: Any) -> Example:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return Example(messages=tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)), **more)


def asked(count: int, **more: Any) -> list[Example]:
    texts = ["one two", "how do I", "a card", "the quick", "lazy dog", "payment was"]
    return [Example(prompt=f"{texts[i % 6]} {i}", completion=" x", where=f"row {i}", **more) for i in range(count)]


# ---------------------------------------------------------------- guessing


@pytest.mark.parametrize(
    ("schema", "examples", "task", "words"),
    [
        ("text", [Example(text="a text")], "loss", "without answers"),
        ("text/label", [Example(prompt="a\n", completion="b")], "classify", "labels"),
        ("prompt/completion", [Example(prompt="a", completion=f"{i}") for i in range(9)], "generate", "of its own"),
        ("prompt/completion", [Example(prompt="a", completion=["no", "yes"][i % 2]) for i in range(9)], "classify",
         "9 rows share 2 short answers"),
        ("prompt/completion", [Example(prompt="a", completion="b", candidates=("b", "c"))], "retrieve", "candidates"),
        ("messages", [talk("a", "b"), talk("a", "b", "c", "d")], "chat", "up to 2 answers"),
        ("messages", [talk("a", "b"), talk("a", "c")], "generate", "of its own"),
        ("messages", [talk("a", "b"), talk("a", where="row 2")], "loss", "row 2 has no answer"),
        ("", [], "loss", ""),
    ],
)  # fmt: skip
def test_a_task_is_guessed_and_says_why(schema: str, examples: list[Example], task: str, words: str) -> None:
    found, why = guess_task(schema, examples)
    assert found == task
    assert words in why
    assert task in TASKS


# ---------------------------------------------------------------- generated answers


def test_generated_answers_are_compared(model: GPT, tokenizer: Tokenizer) -> None:
    prompts = [example.prompt or "" for example in asked(7)]
    said = generate_batch(model, tokenizer, prompts, max_new_tokens=20)
    answers = [said[0], said[1], "something else", said[3].upper(), said[4], "no", said[6]]
    examples = [Example(prompt=p, completion=a, where=f"row {i}") for i, (p, a) in enumerate(zip(prompts, answers))]
    done = run_task(model, tokenizer, examples, "generate", batch_size=3, max_new_tokens=20)
    # Rows of like length were answered together; they come back in their own order.
    assert [row["prediction"] for row in done.rows] == said
    assert [row["reference"] for row in done.rows] == answers
    assert [row["where"] for row in done.rows] == [f"row {i}" for i in range(7)]
    assert done.metrics["exact_match"] == sum(map(scores.exact_match, said, answers)) / 7
    assert done.metrics["token_f1"] == pytest.approx(np.mean(list(map(scores.token_f1, said, answers))))
    assert done.metric == "rouge_l"
    assert done.scores == list(map(scores.rouge_l, said, answers)) == [row["score"] for row in done.rows]
    assert done.metrics["rouge_l"] == pytest.approx(np.mean(done.scores))
    for name, (low, high) in done.intervals.items():
        assert low <= done.metrics[name] <= high
    assert json.loads(json.dumps(done.rows)) == done.rows


def test_corpus_metrics_are_those_of_the_saved_predictions(model: GPT, tokenizer: Tokenizer) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    prompts = [example.prompt or "" for example in asked(5)]
    said = generate_batch(model, tokenizer, prompts, max_new_tokens=12)
    examples = [Example(prompt=p, completion=a + " and more") for p, a in zip(prompts, said)]
    done = run_task(model, tokenizer, examples, "translate", max_new_tokens=12)
    answers, wanted = ([row[key].strip() for row in done.rows] for key in ("prediction", "reference"))
    assert done.metric == "chrf"
    assert done.metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [wanted]).score)
    assert done.metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [wanted]).score)
    assert done.scores == [sacrebleu.sentence_chrf(p, [r]).score for p, r in zip(answers, wanted)]
    assert done.details["signatures"]["chrf"].startswith("nrefs:1|")


def test_without_sacrebleu(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    scores._sacrebleu.cache_clear()
    done = run_task(model, tokenizer, asked(2), "generate", max_new_tokens=2)
    assert "chrf" not in done.metrics
    assert "afina[eval]" in done.details["left_out"]
    with pytest.raises(ConfigError, match="sacrebleu, which is not installed"):
        run_task(model, tokenizer, asked(2), "translate")


def test_the_old_names_give_the_old_figures(model: GPT, tokenizer: Tokenizer) -> None:
    """Greedy answers taken as they are: equal to the reference or not, a label or not."""
    prompts = [example.prompt or "" for example in asked(4)]
    said = [text.strip() for text in generate_batch(model, tokenizer, prompts, max_new_tokens=20)]
    answers = [said[0], said[1], "something else", said[3].upper()]
    examples = [Example(prompt=p, completion=a) for p, a in zip(prompts, answers)]
    found = run_task(model, tokenizer, examples, "exact_match", max_new_tokens=20).metrics
    assert found == {"exact_match": sum(map(scores.exact_match, said, answers)) / 4, "answered": 4}
    assert 0.5 <= found["exact_match"] < 1
    found = run_task(model, tokenizer, examples, "exact_match", max_new_tokens=20, ignore_case=True).metrics
    assert found["exact_match"] == 0.75
    done = run_task(model, tokenizer, examples, "classification", max_new_tokens=20)
    expected = scores.classification(said, answers)
    assert done.details["confusion"] == expected.pop("confusion")
    assert done.metrics == expected | {"answered": 4}


def test_an_answer_that_goes_on_is_not_a_match(model: GPT, tokenizer: Tokenizer) -> None:
    """The limit leaves room to be wrong: a model that would write more than the reference must not match it."""
    (said,) = generate_batch(model, tokenizer, ["one two"], max_new_tokens=20)
    start = tokenizer.decode(tokenizer.encode(said)[:5])
    found = run_task(model, tokenizer, [Example(prompt="one two", completion=start)], "exact_match")
    assert found.metrics["exact_match"] == 0.0


# ---------------------------------------------------------------- options


def sums_alone(model: GPT, tokenizer: Tokenizer, example: Example, options: list[str]) -> list[float]:
    """Each option rendered and run as training would: the loss of its trained tokens, the end included."""
    found = []
    for option in options:
        if example.messages is None:
            row = Example(prompt=example.prompt, completion=option)
        else:
            row = talk(*(m["content"] for m in example.messages[:-1]), option)
        (ids,), (mask,) = encode_rendered(tokenizer, [render_example(tokenizer, row)])
        with torch.no_grad():
            logits = model(torch.as_tensor(ids).long()[None])[0].double().log_softmax(-1)
        found.append(sum(float(logits[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t]))
    return found


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_likeliest_option_is_the_prediction(model: GPT, tokenizer: Tokenizer, kind: str) -> None:
    labels = ["card", "card payment", "one two three", "lazy dog"]
    prompts = ["how do I reset", "a card payment was", "one two", "the quick brown", "open the settings"]
    examples = [
        Example(prompt=f"{p}:", completion=" " + labels[i % 4]) if kind == "text" else talk(p, labels[i % 4])
        for i, p in enumerate(prompts)
    ]
    done = run_task(model, tokenizer, examples, "classify", batch_size=2)
    for example, row in zip(examples, done.rows, strict=True):
        lead = " " if kind == "text" else ""
        expected = sums_alone(model, tokenizer, example, [lead + label for label in sorted(labels)])
        assert list(row["log_likelihoods"]) == sorted(labels)
        assert list(row["log_likelihoods"].values()) == pytest.approx(expected, rel=1e-5)
        best = int(np.argmax(expected))
        assert row["prediction"] == sorted(labels)[best]
        share = np.exp(expected[best]) / np.exp(expected).sum()
        assert row["probability"] == pytest.approx(share, rel=1e-4)
    predicted, wanted = ([row[key] for row in done.rows] for key in ("prediction", "reference"))
    expected_figures = scores.classification(predicted, wanted, labels)
    assert done.details["confusion"] == expected_figures["confusion"]
    assert done.metrics["macro_f1"] == pytest.approx(expected_figures["macro_f1"])
    assert done.metrics["accuracy"] == expected_figures["accuracy"] == np.mean(done.scores)
    sure = [row["probability"] for row in done.rows]
    assert done.metrics["ece"] == pytest.approx(scores.calibration(sure, done.scores)["ece"])


def test_a_label_that_begins_another_one_is_not_favoured(tokenizer: Tokenizer) -> None:
    """The end of the text, or of the turn, belongs to an option: without it the shorter could never lose."""
    for example in (Example(prompt="q", completion=" card"), talk("q", "card")):
        (_, short), (_, long) = option_pairs(tokenizer, example, answer_of(example) or "", ["card", "card payment"])
        assert short[-1] in tokenizer.eos_ids
        assert long[-1] in tokenizer.eos_ids
        assert long[: len(short)] != short


def test_options_come_from_what_is_given_the_row_or_the_rows() -> None:
    rows = [Example(prompt="p", completion=c, where=f"line {i}") for i, c in enumerate("bab")]
    assert options_of(rows, list("bab"), None) == [["a", "b"]] * 3
    assert options_of(rows, list("bab"), ["b", " a", "c"]) == [["b", "a", "c"]] * 3
    own = [Example(prompt="p", completion="a", candidates=("a", "z"))]
    assert options_of(own, ["a"], None) == [["a", "z"]]
    for answers, given, words in (
        ("bac", ["a", "b"], r"line 2: its answer 'c' is not among the options \(a, b\)"),
        ("aaa", None, "every row is answered 'a'"),
        ("aaa", ["a", "a"], "the options hold 'a' twice"),
        ("aaa", ["a", " "], "the options hold an empty text"),
    ):
        with pytest.raises(DataError, match=words):
            options_of(rows, list(answers), given)
    with pytest.raises(DataError, match=r"did you mean 'positive'"):
        options_of(rows[:1], ["postive"], ["positive", "negative"])


def test_candidates_are_ranked(model: GPT, tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    words = [" two", " card payment", " lazy", " reset my password", " five six", " café"]
    examples = [
        Example(
            prompt=f"one {i}", completion=words[i], where=f"row {i}",
            candidates=tuple(word.strip() for word in draw.sample(words, 6)),
        )
        for i in range(6)
    ]  # fmt: skip
    done = run_task(model, tokenizer, examples, "retrieve")
    ranks = []
    for example, row in zip(examples, done.rows, strict=True):
        assert row["candidates"] == list(example.candidates or ())
        own = [" " + text for text in row["candidates"]]  # as the row's own answer begins
        assert row["log_likelihoods"] == pytest.approx(sums_alone(model, tokenizer, example, own), rel=1e-5)
        order = np.argsort(-np.array(row["log_likelihoods"]))
        assert row["candidates"][order[row["rank"] - 1]] == row["reference"] == (example.completion or "").strip()
        ranks.append(row["rank"])
    assert len(set(ranks)) > 1
    assert done.metrics == pytest.approx(scores.ranking(ranks, [6] * 6))
    metrics = pytest.importorskip("sklearn.metrics")
    truth = [[float(text == row["reference"]) for text in row["candidates"]] for row in done.rows]
    shown = [row["log_likelihoods"] for row in done.rows]
    assert done.metrics["ndcg@10"] == pytest.approx(metrics.ndcg_score(truth, shown, k=10))
    assert done.metrics["mrr@10"] == pytest.approx(
        metrics.label_ranking_average_precision_score(np.array(truth, int), np.array(shown))
    )


def test_candidates_are_needed_and_hold_the_answer(model: GPT, tokenizer: Tokenizer) -> None:
    good = Example(prompt="p", completion="a", candidates=("a", "b"), where="line 1")
    for bad, words in (
        (Example(prompt="p", completion="a", where="line 2"), "line 2: has no candidates; task retrieve needs"),
        (Example(prompt="p", completion="a", where="line 2", candidates=("b", "c")), "line 2: its answer 'a' is not"),
        (
            Example(prompt="p", completion="a", where="line 2", candidates=("a", "a")),
            "line 2: candidates hold 'a' twice",
        ),
    ):
        with pytest.raises(DataError, match=words):
            run_task(model, tokenizer, [good, bad], "retrieve")


def test_rows_bring_their_candidates(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "a", "candidates": ["a", "b\x00 "]},
        {"prompt": "p", "completion": "b", "candidates": "none"},
        {"prompt": "q", "completion": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_rows(tmp_path / "rows.jsonl"))
    assert [row.example.candidates for row in found] == [("a", "b"), None, None]
    assert found[1].digest != found[2].digest
    (tmp_path / "bare.jsonl").write_text(json.dumps({"prompt": "p", "completion": "a"}) + "\n")
    assert next(read_rows(tmp_path / "bare.jsonl")).digest == found[0].digest  # training does not see candidates


# ---------------------------------------------------------------- conversations, losses


def test_each_turn_has_its_loss(model: GPT, tokenizer: Tokenizer) -> None:
    examples = [talk("one", "two three", "four", "five six seven"), talk("how", "do I reset")]
    done = run_task(model, tokenizer, examples, "chat", max_new_tokens=4)
    total, tokens, first = 0.0, 0, []
    for example, row in zip(examples, done.rows, strict=True):
        for turn, number in enumerate(range(1, len(example.messages or ()), 2)):
            alone = Example(messages=example.messages, trained=frozenset({number}))
            (ids,), (mask,) = encode_rendered(tokenizer, [render_example(tokenizer, alone)])
            with torch.no_grad():
                logits = model(torch.as_tensor(ids).long()[None])[0].double().log_softmax(-1)
            losses = [-float(logits[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t]]
            assert row["turn_losses"][turn] == pytest.approx(np.mean(losses), rel=1e-5)
            total, tokens = total + sum(losses), tokens + len(losses)
            first += [(sum(losses), len(losses))] if turn == 0 else []
    assert done.metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert [turn["rows"] for turn in done.details["turns"]] == [2, 1]
    assert done.details["turns"][0]["loss"] == pytest.approx(np.sum(first, 0)[0] / np.sum(first, 0)[1], rel=1e-5)
    assert [row["reference"] for row in done.rows] == ["five six seven", "do I reset"]
    with pytest.raises(DataError, match="row 0: is no conversation, which task chat needs"):
        run_task(model, tokenizer, asked(1), "chat")


def test_loss_as_a_task(model: GPT, tokenizer: Tokenizer) -> None:
    examples = [Example(text="one two three"), Example(prompt="how", completion=" do I reset")]
    done = run_task(model, tokenizer, examples, "loss")
    assert done.metric == "log_likelihood"
    assert done.metrics["log_likelihood"] == -done.metrics["loss"]
    assert done.metrics["perplexity"] == pytest.approx(np.exp(done.metrics["loss"]))
    assert done.metrics["bits_per_byte"] > 0
    assert done.scores == [-row["loss"] for row in done.rows]
    with pytest.raises(DataError, match=r"long: has .* tokens and the model reads 96"):
        run_task(model, tokenizer, [Example(text="one two " * 200, where="long")], "loss")


# ---------------------------------------------------------------- examples before prompts


def test_examples_stand_before_a_text() -> None:
    row, shots = Example(prompt="q:", completion=" a"), [Example(prompt="one:", completion=" 1")]
    assert with_shots(row, shots).prompt == "one: 1\n\nq:"
    assert with_shots(row, []) is row


def test_examples_stand_before_a_question_as_turns() -> None:
    row = Example(messages=({"role": "system", "content": "be short"}, *(talk("q", "a").messages or ())))
    shot = Example(messages=({"role": "system", "content": "other"}, *(talk("one", "1").messages or ())))
    found = with_shots(row, [shot])
    assert [m["content"] for m in found.messages or ()] == ["be short", "one", "1", "q", "a"]
    assert prompt_of(found) == "q"
    for bad, words in (([talk("one")], "has no answer"), ([Example(prompt="p", completion="c")], "same schema")):
        with pytest.raises(DataError, match=words):
            with_shots(row, bad)


def test_an_answer_ends_where_the_next_example_would_begin(model: GPT, tokenizer: Tokenizer) -> None:
    shots = [Example(prompt="how do I", completion=" reset")]
    (whole,) = generate_batch(model, tokenizer, ["how do I reset\n\none two"], max_new_tokens=30)
    done = run_task(model, tokenizer, [Example(prompt="one two", completion=" x")], "generate", few_shot=shots,
                    max_new_tokens=30)  # fmt: skip
    assert done.rows[0]["prediction"] == whole.split("\n\n")[0]
    assert done.rows[0]["prompt"] == "one two"


# ---------------------------------------------------------------- comparing, refusing


def test_two_models_are_compared_row_by_row(model: GPT, tokenizer: Tokenizer) -> None:
    prompts = [example.prompt or "" for example in asked(12)]
    other = tiny_model(tokenizer, rope_theta=500.0)
    said = generate_batch(model, tokenizer, prompts, max_new_tokens=6)
    theirs = generate_batch(other, tokenizer, prompts, max_new_tokens=6)
    references = [said[i] if i % 4 else theirs[i] for i in range(12)]
    examples = [Example(prompt=p, completion=r, where=str(i)) for i, (p, r) in enumerate(zip(prompts, references))]
    after, before = (run_task(m, tokenizer, examples, "exact_match", max_new_tokens=6) for m in (model, other))
    found = compare(before, after)
    changes = [b - a for a, b in zip(before.scores, after.scores)]
    assert found.won == [i for i, change in enumerate(changes) if change > 0]
    assert found.lost == [i for i, change in enumerate(changes) if change < 0]
    assert len(found.won) + len(found.lost) + len(found.unchanged) == 12
    difference = found.differences["exact_match"]
    assert difference.difference == pytest.approx(after.metrics["exact_match"] - before.metrics["exact_match"])
    assert (difference.won, difference.lost) == (len(found.won), len(found.lost))
    assert found.verdict in ("better", "worse", "no difference")
    assert compare(after, after).verdict == "no difference"
    # Two models make different mistakes: their answers, and so the labels there are, differ.
    labelled = [run_task(m, tokenizer, examples, "classification", max_new_tokens=6) for m in (other, model)]
    change = compare(*labelled).differences["macro_f1"].difference
    assert change == pytest.approx(labelled[1].metrics["macro_f1"] - labelled[0].metrics["macro_f1"])
    with pytest.raises(DataError, match="same task on the same rows"):
        compare(before, run_task(model, tokenizer, examples[:5], "exact_match", max_new_tokens=6))


def test_what_a_row_says_should_be_answered() -> None:
    assert answer_of(Example(prompt="p", completion="c")) == "c"
    assert answer_of(Example(prompt="p", completion="")) is None
    assert answer_of(Example(text="t")) is None
    assert answer_of(talk("q", "a")) == "a"
    assert answer_of(talk("q", "a", "q")) is None


def test_what_does_not_fit_is_named(model: GPT, tokenizer: Tokenizer) -> None:
    examples = [Example(prompt="p", completion="c"), Example(text="t", where="rows.jsonl: line 2")]
    for task in ("generate", "classify", "retrieve", "translate", "exact_match", "classification"):
        with pytest.raises(DataError, match=rf"rows\.jsonl: line 2: has no answer to compare with; task {task}"):
            run_task(model, tokenizer, examples, task)
    with pytest.raises(ConfigError, match=r"did you mean 'classify'"):
        run_task(model, tokenizer, examples, "clasify")
    with pytest.raises(DataError, match="no row"):
        run_task(model, tokenizer, [], "generate")
    long = Example(prompt="one two " * 200, completion=" a", where="line 7")
    for task in ("generate", "classify"):
        with pytest.raises(DataError, match=r"line 7.* tokens and the model reads 96"):
            run_task(model, tokenizer, [long, Example(prompt="p", completion=" b")], task)


@pytest.mark.parametrize("task", ["generate", "classify"])
def test_nothing_is_disturbed(model: GPT, tokenizer: Tokenizer, task: str) -> None:
    examples = [Example(prompt=p, completion=c) for p, c in (("one", " a"), ("two", " b"))]
    model.train()
    before = torch.get_rng_state(), random.getstate(), [p.clone() for p in model.parameters()]
    first, second = (run_task(model, tokenizer, examples, task) for _ in range(2))
    assert (first.rows, first.metrics, first.intervals) == (second.rows, second.metrics, second.intervals)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before[2], strict=True))
    model.eval()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(model, tokenizer, examples, task, poll=stop)
