"""A check says what training would do: planted problems with their counts and lines, and none in clean rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import tiny_tokenizer

from afina.errors import DataError
from afina.loaders.data.check import Findings, check_data
from afina.loaders.data.check_findings import Problem
from afina.loaders.data.dataset import prepare
from afina.loaders.text.source import load_tokenizer
from afina.loaders.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
DATA = Path(__file__).resolve().parents[3] / "afina" / "data"
THINGS = ["lamp", "table", "chair", "bowl", "mirror", "carpet", "curtain", "shelf", "clock", "vase", "basket"]
THINGS += ["pillow", "blanket", "stool", "drawer"]
VERBS = ["repair", "return", "exchange", "insure", "wrap", "polish", "assemble", "deliver", "collect", "measure"]
Row = dict[str, Any]


def clean(number: int) -> Row:
    """A row that is like no other."""
    thing, verb = THINGS[number % len(THINGS)], VERBS[number // len(THINGS) % len(VERBS)]
    return {"prompt": f"How do I {verb} the {thing}?", "completion": f" Ask for {verb} {number} at the {thing} desk."}


def write(path: Path, *rows: Row | str) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def named(found: Findings) -> dict[str, Problem]:
    assert len({problem.name for problem in found.problems}) == len(found.problems)
    return {problem.name: problem for problem in found.problems}


def told(found: Findings) -> dict[str, tuple[str, int, list[int]]]:
    """Severity, count and lines of each problem."""
    return {p.name: (p.severity, p.count, [place.line for place in p.places]) for p in found.problems}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("afina-tiny")


def changed(tokenizer: Tokenizer, *, template: str | None = None, **names: str) -> Tokenizer:
    """The tokenizer with another chat template or other special tokens."""
    files = tokenizer.files()
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = json.dumps(json.loads(files["tokenizer_config.json"]) | names).encode()
    return Tokenizer(files, "changed")


@pytest.mark.parametrize("with_model", [False, True])
def test_clean_rows_have_no_problem(tmp_path: Path, tokenizer: Tokenizer, with_model: bool) -> None:
    path = write(tmp_path / "rows.jsonl", *map(clean, range(150)))
    found = check_data(path, tokenizer if with_model else None)
    assert told(found) == {}
    assert (found.rows, found.usable, found.schema) == (150, 150, "prompt/completion")
    assert found.split == {"train": 135, "dev": 15}
    assert found.characters == sum(len(r["prompt"]) + len(r["completion"]) for r in map(clean, range(150)))
    assert sum(count for *_, count in found.histogram) == 150
    assert found.worst() == ""


@pytest.mark.parametrize("with_model", [False, True])
def test_planted_problems_of_rows(tmp_path: Path, tokenizer: Tokenizer, with_model: bool) -> None:
    rows: list[Row | str] = [clean(number) for number in range(60)]
    rows += [
        clean(5),  # 61 repeats 6
        "{broken",  # 62
        {"prompt": "Is it empty?", "completion": " "},  # 63
        {"prompt": "Ist das schÃ¶n \u00e2\x80\x93 ja?", "completion": "ja, sehr schÃ¶n"},  # 64
        {"prompt": "What was it\ufffd?", "completion": "nobody knows that"},  # 65
        {"prompt": "Any bell\u0007 here?", "completion": "not one, I think"},  # 66
        {"prompt": "A zero\u200bwidth space?", "completion": "there it hides"},  # 67
        {"prompt": clean(9)["prompt"].upper(), "completion": "Nobody does that any more."},  # 68 contradicts 10
        clean(5),  # 69
        {"prompt": clean(7)["prompt"] + "?", "completion": clean(7)["completion"]},  # 70 is near 8
        {"other": 1},  # 71
    ]
    model = tokenizer if with_model else None
    found = check_data(write(tmp_path / "rows.jsonl", *rows), model)
    assert told(found) == {
        "unreadable_rows": ("error", 2, [62, 71]),
        "mojibake": ("warning", 1, [64]),
        "replacement_characters": ("warning", 1, [65]),
        "near_duplicates": ("warning", 1, [70]),
        "empty_rows": ("note", 1, [63]),
        "duplicates": ("note", 2, [61, 69]),
        "control_characters": ("note", 1, [66]),
        "invisible_characters": ("note", 1, [67]),
        "conflicting_answers": ("note", 2, [10, 68]),
    }
    problems = named(found)
    assert problems["duplicates"].notes == ("line 61 repeats line 6", "line 69 repeats line 6")
    assert problems["near_duplicates"].notes[0].startswith("line 70 is near line 8 (")
    assert "not valid JSON" in problems["unreadable_rows"].notes[0]
    assert found.worst() == "error"
    assert (found.rows, found.usable) == (71, 66)
    assert set(found.dropped.values()) == {"duplicates", "near_duplicates"}
    lenient = check_data(tmp_path / "rows.jsonl", model, skip_bad_lines=True)
    assert told(lenient)["unreadable_rows"][0] == "warning"
    assert "near_duplicates" not in told(check_data(tmp_path / "rows.jsonl", similarity=0))


def test_rows_that_ask_nothing_contradict_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": clean(number)["completion"]} for number in range(30)]
    assert told(check_data(write(tmp_path / "rows.jsonl", *rows))) == {}
    texts = [{"text": clean(number)["completion"]} for number in range(30)]
    assert told(check_data(write(tmp_path / "texts.jsonl", *texts))) == {}


def test_labels(tmp_path: Path) -> None:
    rows: list[Row] = [{"text": f"{clean(n)['prompt']} {n}", "label": "common"} for n in range(120)]
    rows += [{"text": f"the rare {n} {clean(n)['completion']}", "label": "rare"} for n in range(9)]
    rows += [{"text": f"The {n} loud {clean(n)['completion']}", "label": "Common "} for n in range(11)]
    rows += [{"text": rows[3]["text"], "label": "rare"}]  # line 141
    found = check_data(write(tmp_path / "rows.jsonl", *rows))
    assert found.labels == {"common": 120, "Common": 11, "rare": 10}
    assert told(found) == {
        "conflicting_answers": ("warning", 2, [4, 141]),
        "label_spellings": ("warning", 1, []),
        "label_imbalance": ("note", 3, []),
    }
    assert named(found)["conflicting_answers"].more["inputs"] == 1
    assert named(found)["label_spellings"].notes == ("'common' (120), 'Common' (11)",)
    few = check_data(write(tmp_path / "few.jsonl", *rows[:140]))
    assert named(few)["rare_labels"].notes == ("'rare' (9)",)
    assert named(few)["rare_labels"].count == 1
    one = check_data(write(tmp_path / "one.jsonl", *rows[:120]))
    assert told(one) == {"one_answer": ("warning", 120, [])}


def test_long_rows_and_what_is_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long_prompt = {"prompt": "word " * 80, "completion": "short"}
    long_answer = {"prompt": "short", "completion": "answer " * 80}
    path = write(tmp_path / "rows.jsonl", *map(clean, range(20)), long_prompt, long_answer)

    def settings(on_long: str) -> Findings:
        return check_data(path, tokenizer, max_length=64, on_long=on_long)

    assert told(settings("drop")) == {"too_long": ("warning", 2, [21, 22])}
    assert told(settings("truncate")) == {"too_long": ("warning", 1, [22]), "truncated": ("warning", 1, [21])}
    assert told(settings("error")) == {"too_long": ("error", 2, [21, 22])}
    found = settings("drop")
    assert named(found)["too_long"].more["longest"] == found.lengths["max"] > 80
    assert (found.rows, found.usable) == (22, 20)
    nothing = check_data(path, tokenizer, max_length=2)
    assert nothing.usable == 0
    assert told(nothing) == {"refused": ("error", 1, []), "too_long": ("warning", 22, list(range(1, 11)))}


def test_it_counts_what_training_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [clean(number) for number in range(40)] + [clean(3), {"prompt": "w " * 200, "completion": "x"}]
    path = write(tmp_path / "rows.jsonl", *rows)
    data = prepare(path, tokenizer, max_length=100, seed=7, progress=False)
    found = check_data(path, tokenizer, max_length=100, seed=7)
    assert found.split == {"train": len(data.train), "dev": len(data.dev)}
    assert found.usable == data.report["usable"] == 40
    assert found.tokens == data.report["train_tokens"] + data.report["dev_tokens"]
    assert found.trained_tokens == data.report["train_trained_tokens"] + data.report["dev_trained_tokens"]
    assert found.loss_tokens["max"] == max(*data.train.loss_tokens, *data.dev.loss_tokens)


def test_ends_that_are_not_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The first answer of a conversation has no end here; a single one has the end of the text."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    path = write(tmp_path / "rows.jsonl", {"messages": turns}, {"messages": turns * 2})
    assert told(check_data(path, changed(tokenizer, template=template), similarity=0)) == {
        "end_of_turn_not_trained": ("warning", 1, [2])
    }
    assert told(check_data(path, tokenizer, similarity=0)) == {}


def test_two_beginnings(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [clean(0), {"prompt": "<|system|><|system|>Who is it?", "completion": "me"}, clean(1)]
    rows.append({"prompt": "<|system|>Who <|system|>is that?", "completion": "somebody else"})
    path = write(tmp_path / "rows.jsonl", *rows)
    assert told(check_data(path, changed(tokenizer, bos_token="<|system|>"))) == {"double_bos": ("warning", 1, [2])}


def test_tokens_that_the_model_has_not_met(tmp_path: Path, tokenizer: Tokenizer) -> None:
    unmet = np.zeros(tokenizer.vocab_size, np.bool_)
    unmet[[tokenizer.token_id("%"), tokenizer.token_id("#")]] = True
    path = write(tmp_path / "rows.jsonl", clean(0), {"prompt": "5 % and 6 %?", "completion": "11 %"}, clean(1))
    found = check_data(path, tokenizer, unmet=unmet)
    assert told(found) == {"unmet_tokens": ("warning", 1, [2])}
    assert [(t["token"], t["times"]) for t in named(found)["unmet_tokens"].more["tokens"]] == [("%", 3)]


def test_rows_that_the_template_or_the_tokenizer_refuses(tmp_path: Path) -> None:
    tokenizer = changed(tiny_tokenizer(), template="{% if messages|length > 2 %}{{ raise_exception('too long') }}"
                        "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                        "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    others = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    path = write(tmp_path / "rows.jsonl", {"messages": turns}, {"messages": [*turns, *others]}, {"messages": others})
    found = check_data(path, tokenizer)
    assert told(found) == {"refused_rows": ("error", 1, [2])}
    assert found.usable == 2


def test_rows_that_a_dev_file_has_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", *map(clean, range(30)))
    near = {"prompt": clean(7)["prompt"] + "?", "completion": clean(7)["completion"]}
    dev = write(tmp_path / "dev.jsonl", clean(100), clean(4), near, "bad")
    for model in (None, tokenizer):
        found = check_data(path, model, val_file=dev)
        assert told(found) == {
            "dev_unreadable_rows": ("error", 1, [4]),
            "dev_rows_in_train": ("error", 1, [5]),
            "near_dev_rows_in_train": ("warning", 1, [8]),
        }
        assert named(found)["near_dev_rows_in_train"].notes == ("line 8 is near line 3 of dev.jsonl",)
        assert found.split == {"train": 30, "dev": 3}
        assert found.dropped == {4: "dev_rows_in_train", 7: "near_dev_rows_in_train"}


def test_near_rows_on_both_sides_of_the_split(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [clean(number) for number in range(60)]
    rows += [row | {"prompt": row["prompt"] + "?"} for row in rows]
    path = write(tmp_path / "rows.jsonl", *rows)
    data = prepare(path, tokenizer, max_length=100, val_size=0.5, seed=42, progress=False)
    held = {int(data.dev.where(number).rpartition(" ")[2]) for number in range(len(data.dev))}
    leaks = sorted(line for line in held if (line + 59) % 120 + 1 not in held)
    found = told(check_data(path, tokenizer, val_size=0.5))
    assert 10 < len(leaks) < 60 == found["near_duplicates"][1]
    assert found["near_dev_rows_in_train"] == ("warning", len(leaks), leaks[:10])


def test_plain_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(clean(n)["prompt"] for n in range(300)))
    found = check_data(tmp_path / "book.txt", tokenizer, max_length=64)
    data = prepare(tmp_path / "book.txt", tokenizer, max_length=64, seed=42, progress=False)
    assert told(found) == {}
    assert found.split == {"train": len(data.train), "dev": len(data.dev)}
    assert found.lengths["max"] == 64
    plain = check_data(tmp_path / "book.txt")
    assert (told(plain), plain.rows, plain.usable, plain.split) == ({}, 1, 1, {})


def test_several_rows_in_a_line_and_several_files(tmp_path: Path) -> None:
    """Rows are known by their order, since a JSON array may have all of them in one line."""
    (tmp_path / "rows.json").write_text(json.dumps([clean(0), clean(1), clean(0)]))
    found = check_data(tmp_path / "rows.json")
    assert told(found)["duplicates"] == ("note", 1, [1])
    assert found.dropped == {2: "duplicates"}
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", clean(0), clean(1))
    write(folder / "b.jsonl", clean(2), clean(1))
    problem = named(check_data(folder))["duplicates"]
    assert problem.notes == ("line 2 repeats line 2 of a.jsonl",)
    assert [str(place.path.name) for place in problem.places] == ["b.jsonl"]


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row"):
        check_data(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no usable row"):
        check_data(write(tmp_path / "keys.jsonl", {"a": 1}))
    with pytest.raises(DataError, match="no such file"):
        check_data(tmp_path / "none.jsonl")
    single = check_data(write(tmp_path / "one.jsonl", clean(0)))
    assert told(single) == {"refused": ("error", 1, [])}
    assert "only one usable row" in single.problems[0].notes[0]


def test_findings_are_plain_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", *map(clean, range(30)), clean(1))
    plain = check_data(path, tokenizer).to_dict()
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(plain, default=str))
    problem = plain["problems"][0]
    assert {"name", "severity", "count", "lines", "what", "mend"} <= problem.keys()
    assert (problem["name"], problem["count"], problem["lines"]) == ("duplicates", 1, [31])


@pytest.mark.parametrize("name", ["support", "sentiment"])
def test_the_packaged_data(name: str, tokenizer: Tokenizer) -> None:
    found = check_data(DATA / name / "train.jsonl", tokenizer, val_file=DATA / name / "dev.jsonl")
    counts = {problem: count for problem, (_, count, _) in told(found).items()}
    assert counts == ({"near_duplicates": 10} if name == "support" else {})


def test_real_data(shared_data: Path) -> None:
    """SST-2's training sentences: nine lines are there twice, as ``sort | uniq -d`` says, and none nearly."""
    path = shared_data / "sentiment" / "sst2_train.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    found = check_data(path, val_file=shared_data / "sentiment" / "sst2_dev.tsv")
    assert told(found)["duplicates"][:2] == ("note", len(lines) - len(set(lines)))
    assert set(told(found)) == {"duplicates"}
    assert found.labels == {"1": 3610, "0": 3310}
