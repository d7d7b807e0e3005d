"""Rows: each schema becomes its example, and what fits none is refused by line through the real command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import saved, tiny_tokenizer

from afina.cli.main import run
from afina.errors import DataError
from afina.loaders.data.conversations import ROLES
from afina.loaders.data.rows import Row, _spelt, read_rows
from afina.loaders.data.token_cache import COLUMNS
from afina.loaders.text.render import Example

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(row: Row) -> dict[str, Any]:
    names = ("text", "prompt", "completion", "messages")
    return {name: value for name in names if (value := getattr(row.example, name)) is not None}


@pytest.mark.parametrize(
    ("row", "expected", "schema"),
    [
        ({"text": " a \nb ", "id": 1}, {"text": " a\nb"}, "text"),
        ({"prompt": "Q: ", "completion": " a \n"}, {"prompt": "Q: ", "completion": " a"}, "prompt/completion"),
        ({"text": "good film ", "label": 1}, {"prompt": "good film\n", "completion": "1"}, "text/label"),
        ({"text": "bad film", "label": " no "}, {"prompt": "bad film\n", "completion": "no"}, "text/label"),
        ({"messages": [ASK, ANSWER]}, {"messages": (ASK, ANSWER)}, "messages"),
        (
            {"messages": [ASK, ANSWER | {"name": None, "tools": [1]}]},
            {"messages": (ASK, ANSWER | {"tools": [1]})},
            "messages",
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q "}, {"from": "gpt", "value": "a"}]},
            {"messages": ({"role": "system", "content": "s"}, ASK, ANSWER)},
            "conversations",
        ),
        ({"prompt": [ASK], "completion": [ANSWER]}, {"messages": (ASK, ANSWER)}, "prompt/completion"),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {
                "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
                "### Input:\n1 2\n\n### Response:\n",
                "completion": "3",
            },
            "instruction/output",
        ),
        (
            {"instruction": "Go {0}.", "input": "", "output": "a"},
            {
                "prompt": "Below is an instruction that describes a task. Write a response that appropriately "
                "completes the request.\n\n### Instruction:\nGo {0}.\n\n### Response:\n",
                "completion": "a",
            },
            "instruction/output",
        ),
    ],
)
def test_schemas(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any], schema: str) -> None:
    counts: Counter[str] = Counter()
    (found,) = read_rows(write(tmp_path / "a.jsonl", row), counts=counts)
    assert plain(found) == expected
    assert found.raw == row
    assert found.where == f"{tmp_path / 'a.jsonl'}: line 1"
    assert counts["rows"] == counts[f"schema:{schema}"] == 1
    assert counts["unused:id"] == ("id" in row)


def test_instructions_become_messages_for_a_model_with_a_chat_template(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "q", "output": "a"},
    )
    one, two = read_rows(path, chat=True)
    assert plain(one)["messages"][0]["content"] == "Add.\n\n1 2"
    assert plain(two) == {"messages": (ASK, ANSWER)}


def test_only_the_completion_of_two_message_lists_is_learnt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    old = [ASK, {"role": "assistant", "content": "old"}, ASK]
    path = write(tmp_path / "a.jsonl", {"prompt": old, "completion": [ANSWER]}, {"messages": [*old, ANSWER]})
    row = next(read_rows(path))
    rendered = row.rendered(tokenizer)
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["a<|end|>"]
    path.write_text(path.read_text().splitlines()[1])
    (other,) = read_rows(path)
    assert [rendered.text[a:b] for a, b in other.rendered(tokenizer).spans] == ["old<|end|>", "a<|end|>"]
    assert row.digest != other.digest  # the same conversation, but not the same lesson


def test_rows_to_be_completed_need_no_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "q"}, {"prompt": "q", "completion": None}, {"prompt": "q", "completion": "a"}]
    found = [plain(r) for r in read_rows(write(tmp_path / "a.jsonl", *rows), targets=False)]
    assert found == [{"prompt": "q", "completion": ""}] * 2 + [{"prompt": "q", "completion": "a"}]
    (row,) = read_rows(write(tmp_path / "b.jsonl", {"messages": [ASK]}), targets=False)
    assert plain(row) == {"messages": (ASK,)}
    (row,) = read_rows(write(tmp_path / "c.jsonl", {"instruction": "q"}), targets=False, chat=True)
    assert plain(row) == {"messages": (ASK,)}


def test_columns_are_renamed_and_raw_rows_keep_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "text": "other"})
    (row,) = read_rows(path, columns={"prompt": "question", "completion": "answer"})
    assert plain(row) == {"prompt": "q", "completion": "a"}
    assert row.raw == {"question": "q", "answer": "a", "text": "other"}
    for columns, words in (
        ({"promt": "question"}, "columns: 'promt' is no key of a schema (did you mean 'prompt'?)"),
        ({"prompt": "questoin", "completion": "answer"}, "no column 'questoin' (did you mean 'question'?)"),
    ):
        with pytest.raises(DataError) as refused:
            list(read_rows(write(tmp_path / "b.jsonl", {"question": "q", "answer": "a"}), columns=columns))
        assert words in str(refused.value)


def test_a_column_named_by_the_user_is_taken_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "x": "q", "completion": "c"})
    (row,) = read_rows(path, columns={"prompt": "x"})
    assert plain(row) == {"prompt": "q", "completion": "c"}
    (row,) = read_rows(path, columns={"prompt": "completion", "completion": "prompt"})
    assert plain(row) == {"prompt": "c", "completion": "p"}
    with pytest.raises(DataError, match=r"found the keys .* no column 'y'"):
        list(read_rows(path, columns={"prompt": "y"}))
    mixed = write(tmp_path / "b.jsonl", {"x": "q", "completion": "c"}, {"prompt": "p", "completion": "c"})
    with pytest.raises(DataError, match="line 2: has the keys 'prompt', 'completion'"):
        list(read_rows(mixed, columns={"prompt": "x"}))


def test_rows_with_nothing_to_learn_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": c} for c in ("a", " \n", "", "\x00")]
    counts: Counter[str] = Counter()
    assert len(list(read_rows(write(tmp_path / "a.jsonl", *rows), counts=counts))) == 1
    assert (counts["rows"], counts["empty"]) == (4, 3)


def test_skipped_lines_are_counted_and_the_rest_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"meta": 1}\n{"text": "a"}\n{"text": \n{"text": [3]}\n{"prompt": "q", "completion": "a"}\n{"text": "b"}\n'
        '{"text": {}}\n{"text": "c", "score": NaN}\n{"text": [4]}\n{"texd": "t"}\n'
    )
    counts: Counter[str] = Counter()
    found = list(read_rows(path, skip_bad_lines=True, counts=counts))
    assert [(row.line, row.example.text) for row in found] == [(2, "a"), (6, "b")]
    assert (counts["rows"], counts["bad_lines"]) == (10, 8)
    assert {key: number for key, number in counts.items() if key.startswith("bad:")} == {
        "bad:found the keys ...": 1,
        "bad:has the keys ...": 2,
        "bad:not valid JSON: Expecting value": 1,
        "bad:text is a list": 2,
        "bad:text is an object": 1,
        "bad:is not a finite number": 1,
    }


def test_numbers_and_booleans_are_taken_as_their_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"instruction": "add", "input": 0, "output": 19.90}\n{"instruction": "is it", "input": "", "output": false}\n'
        '{"instruction": 7, "output": "1.0"}\n'
    )
    counts: Counter[str] = Counter()
    rows = [plain(row)["messages"] for row in read_rows(path, chat=True, counts=counts)]
    assert [[turn["content"] for turn in turns] for turns in rows] == [
        ["add\n\n0", "19.90"],
        ["is it", "false"],
        ["7", "1.0"],
    ]
    assert counts["numbers"] == 4
    (row,) = read_rows(write(tmp_path / "b.jsonl", {"prompt": 1, "completion": True}))
    assert plain(row) == {"prompt": "1", "completion": "true"}
    (row,) = read_rows(write(tmp_path / "c.jsonl", {"text": "t", "label": False}))
    assert plain(row) == {"prompt": "t\n", "completion": "false"}


def test_keys_may_differ_in_case_and_blanks(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    rows = [{" Prompt": "q", "COMPLETION": "a", "Id": 1}, {" Prompt": "r", "COMPLETION": "b", "Id": 2}]
    found = list(read_rows(write(tmp_path / "a.jsonl", *rows), counts=counts))
    assert [plain(row) for row in found] == [
        {"prompt": "q", "completion": "a"},
        {"prompt": "r", "completion": "b"},
    ]
    assert {key for key in counts if key.startswith(("taken:", "unused:"))} == {
        "taken:' Prompt' read as 'prompt'",
        "taken:'COMPLETION' read as 'completion'",
        "unused:Id",
    }
    # A key that is ours stays what it is; so does one that the user has named.
    (row,) = read_rows(write(tmp_path / "b.jsonl", {"text": "t", "Text": "T"}))
    assert plain(row) == {"text": "t"}
    (row,) = read_rows(write(tmp_path / "c.jsonl", {"prompt": "q", "Prompt": "other", "Completion": "a"}))
    assert plain(row) == {"prompt": "q", "completion": "a"}
    counts.clear()
    path = write(tmp_path / "d.jsonl", {"Prompt": "q", "Text": "a"})
    (row,) = read_rows(path, columns={"completion": "Text"}, counts=counts)
    assert plain(row) == {"prompt": "q", "completion": "a"}
    assert [key for key in counts if key.startswith("taken:")] == ["taken:'Prompt' read as 'prompt'"]


def test_unused_keys_are_named(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for rows, unused in (
        ({"messages": [ASK, ANSWER], "system": "s", "id": 1}, ["id", "system"]),
        ({"conversations": turns, "system": "s", "source": "x"}, ["source"]),
        ({"instruction": "q", "input": "", "output": "a", "history": []}, ["history"]),
    ):
        counts: Counter[str] = Counter()
        list(read_rows(write(tmp_path / "a.jsonl", rows), counts=counts))
        assert [key[7:] for key in counts if key.startswith("unused:")] == unused


def test_digests_tell_examples_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "bc"},
        {"prompt": "ab", "completion": "c"},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": [ASK | {"role": "system"}], "completion": [ANSWER]},
        {"prompt": "a", "completion": "bc ", "id": 7},
        {"prompt": [ASK], "completion": [ANSWER | {"tool_calls": [{"name": "look"}]}]},
    ]
    digests = [row.digest for row in read_rows(write(tmp_path / "a.jsonl", *rows))]
    assert len(set(digests)) == 5
    assert digests[0] == digests[4]
    assert {len(digest) for digest in digests} == {16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "tiny")


GOOD = '{"prompt": "q%d", "completion": "a"}\n'
CHAT = '{"messages": [{"role": "user", "content": "q"}, %s]}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "no usable row (the file is empty): expected one of {messages}"),
        ("a.jsonl", "\n \n", "no usable row (the file is empty)"),
        ("a.txt", "\n \n", "no usable row (the file is empty)"),
        ("a.csv", "text,label\n", "no usable row (the file is empty)"),
        ("a.json", "[]", "no usable row (the file is empty)"),
        ("a.jsonl", '{"text": "  "}\n', "no usable row (every row is empty)"),
        ("a.jsonl", GOOD + '{"prompt": \n', "line 2: not valid JSON: Expecting value (column 11): mend the file"),
        ("a.jsonl", GOOD + '{"prompt": "q"}\n', "line 2: has the keys 'prompt', but "),
        ("a.jsonl", GOOD + '{"text": "t"}\n', "a.jsonl: line 1 is prompt/completion: use one schema in a file"),
        ("a.jsonl", '{"text": "t", "label": 1}\n{"text": "t"}\n', "line 2: the label is missing"),
        ("a.jsonl", '{"text": "t", "label": null}\n', "line 1: the label is missing"),
        ("a.csv", "text,label\nt,\n", "line 2: the label is missing"),
        ("a.jsonl", '{"text": "t", "label": ["x"]}\n', "line 1: label is a list: expected a text or a number"),
        (
            "a.jsonl",
            '{"promt": "q", "completion": "a"}\n',
            "found the keys 'promt', 'completion', 'promt' (did you mean 'prompt'?)",
        ),
        ("a.jsonl", '{"completion": "a", "quest": "q"}\n', "found the keys 'completion', 'quest'; expected one of"),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n', "rename them with columns, as in {'prompt': 'question'}"),
        ("a.jsonl", '{"prompt": "q", "completion": {"a": 3}}\n', "line 1: completion is an object: expected a text"),
        ("a.jsonl", '{"prompt": "q", "completion": ["a"]}\n', "line 1: completion is a list: expected a text"),
        ("a.jsonl", '{"prompt": null, "completion": "a"}\n', "line 1: prompt is missing or null: expected a text"),
        ("a.jsonl", '{"prompt": [], "completion": "a"}\n', "completion is a text: expected a list too"),
        ("a.jsonl", '{"text": {"a": 1}}\n', "line 1: text is an object: expected a text"),
        ("a.jsonl", '{"instruction": "q", "input": [3], "output": "a"}\n', "line 1: input is a list: expected a text"),
        ("a.jsonl", CHAT % '{"role": "asistant", "content": "a"}', "role 'asistant' (did you mean 'assistant'?)"),
        ("a.jsonl", CHAT % '{"content": "a"}', "message 2: role None: expected system, user, assistant, tool"),
        ("a.jsonl", CHAT % '"a"', "message 2: role None"),
        (
            "a.jsonl",
            CHAT % '{"role": "assistant", "content": null}',
            "message 2 (assistant): content is missing or null",
        ),
        ("a.jsonl", CHAT % '{"role": "user", "content": "a"}', "line 1: no assistant turn to learn from"),
        ("a.jsonl", '{"messages": []}\n', "the conversation is empty: expected a list of {role, content}"),
        ("a.jsonl", '{"conversations": "q"}\n', "the conversation is a text: expected a list"),
        (
            "a.jsonl",
            GOOD + '{"prompt": "q", "prompt": "r", "completion": "a"}\n',
            "line 2: key 'prompt' is given twice",
        ),
        ("a.jsonl", GOOD + '{"prompt": "q", "completion": NaN}\n', "line 2: 'NaN' is not a finite number"),
        ("a.jsonl", GOOD + '{"prompt": "q", "completion": "\\ud800"}\n', "line 2: a \\u escape is half a character"),
        ("a.jsonl", GOOD + '{"prompt": "q", "n": ' + "8" * 30 + "}\n", "line 2: an integer of 30 digits"),
        ("a.jsonl", GOOD + "[" * 50_000 + "\n", "line 2: nested too deeply"),
        ("a.jsonl", GOOD + '{"prompt": "' + "q" * (16 << 20) + '"}\n', "line 2: longer than 16 MiB"),
        (
            "a.jsonl",
            GOOD.encode() + b'{"prompt": "\xe9"}\n',
            "line 2: byte 13 of the line (byte 50 of the file) is not UTF-8",
        ),
        ("a.csv", "text,label\na,b,c\n", "line 2: 3 fields where the header has 2"),
        ("a.xlsx", "PK", "an Excel workbook is not read: save the sheet as CSV UTF-8 (expected .jsonl"),
        ("a.arrow", "x", "an Arrow file is not read: datasets.Dataset.from_file(path).to_json('rows.jsonl')"),
        ("a.csv", "PK\3\4", "is a zip archive, which a renamed .xlsx is too, where text was expected: unpack it"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "a damaged gzip archive"),
        ("a.jsonl", GOOD.encode("utf-16-le"), "looks like UTF-16LE, expected UTF-8: iconv -f UTF-16LE -t UTF-8 "),
        (
            "a.csv",
            b"prompt,completion\nq1,\xe9t\xe9\nq2,b\n",
            "line 2: byte 4 of the line (byte 22 of the file) is not UTF-8 (line 2): perhaps WINDOWS-1252: iconv -f",
        ),
        ("a.csv", "frage;antwort\nq;a\n", "found the keys 'frage', 'antwort'; expected one of"),
        (
            "a.jsonl",
            GOOD + '{"prompt": "q", "completion": null}\n' * 3 + '{"prompt": "q", "completion": []}\n',
            "4 bad lines (completion is missing or null: 3; completion is empty: 1): line 2: completion is missing",
        ),
        (
            "a.jsonl",
            '{"prompt":"q","completion":"a","score":NaN}\n',
            'JSON has no other: write null instead, as pandas\' df.to_json(path, orient="records", lines=True) does',
        ),
        ("a.jsonl", (GOOD.strip() + ",\n") * 2, "an array's lines? a comma ends the line: remove it"),
        ("a.jsonl", GOOD.strip() * 2 + "\n", "several objects on a line? give each a line of its own: jq -c ."),
        ("a.jsonl", "{'prompt': 'q', 'completion': 'a'}\n", "Python's notation? write the rows with json.dumps"),
        ("a.jsonl", '{"prompt": "q", "completion": None}\n', "Python's notation? write the rows with json.dumps"),
        ("a.jsonl", '{\n "prompt": "q",\n "completion": "a"\n}\n', "an object over several lines? give each a line"),
        ("a.json", '{\n "prompt": "q",\n "completion": "a"\n}\n', "an object over several lines? give each a line"),
        ("a.json", '{"prompt": {"0": "q"}, "completion": {"0": "a"}}', "is a table by columns, as pandas' to_json"),
        ("a.jsonl", '{"prompt": {"0": "q"}, "completion": {"0": "a"}}', "is a table by columns, as pandas' to_json"),
        (
            "a.jsonl",
            '[{"role": "user", "content": "q"}]\n' * 2,
            'a bare conversation? write {"messages": [...]}, or leave',
        ),
        ("a.json", '{"rows": [{"prompt": "q", "completion": "a"}]}', "jq -c '.rows[]' FILE > rows.jsonl"),
        (
            "a.jsonl",
            '{"prompt": "q", "chosen": "a", "rejected": "b"}\n',
            "line 1: preference data (chosen and rejected), which is not trained on as such; to learn the better",
        ),
        (
            "a.jsonl",
            '{"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}\n',
            "jq -c '{messages: (.input.messages + .preferred_output)}' FILE > rows.jsonl",
        ),
        ("a.jsonl", '{"prompt": "q", "completions": [], "labels": []}\n', "ranking data (completions and labels)"),
        ("a.jsonl", '{"prompt": "q", "completion": "a", "label": true}\n', "rated answers, good and bad (label is"),
        ("a.parquet", "PAR1", "not a Parquet file that can be read"),
        ("a.jsonl", GOOD, "only one usable row, and a dev set needs one too"),
        ("a.jsonl", GOOD * 2, "only one usable row, and a dev set needs one too"),
        ("a.jsonl", '{"prompt": "q", "completion": "' + "a b " * 200 + '"}\n', "no row is left to learn from"),
    ],
)
def test_bad_data_on_the_command_line(
    model: Path,
    tmp_path: Path,
    name: str,
    content: str | bytes,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("AFINA_CACHE", str(cache))
    data = tmp_path / name
    data.write_bytes(content.encode() if isinstance(content, str) else content)
    argv = ["train", "--model", str(model), "--data", str(data), "--max_length", "64"]
    assert run([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"afina: error: {data}: ")
    assert err.count("\n") == 1
    assert len(err.replace(str(tmp_path), "")) < 600
    assert words in err
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {name}
    assert not left or left == {
        "manifest.json",
        *(f"{column}.bin" for column in COLUMNS),
    }


def test_at_most_twenty_bad_lines_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "{\n" * 3 + '{"text": []}\n{"text": "b"}\n')
    with pytest.raises(DataError) as refused:
        list(read_rows(path))
    assert [f"line {n}: " in str(refused.value) for n in range(1, 7)] == [False, True, True, True, True, False]
    rows = read_rows(path)
    assert next(rows).line == 1
    with pytest.raises(DataError):  # nothing more is made of a file that will be refused
        next(rows)
    path.write_text('{"text": "a"}\n' + "{\n" * 1000)
    counts: Counter[str] = Counter()
    with pytest.raises(DataError) as refused:
        list(read_rows(path, counts=counts))
    assert counts["bad_lines"] == 1000  # all are counted
    assert "1,000 bad lines (not valid JSON: Expecting property name" in str(refused.value)
    assert "line 21: " in str(refused.value)
    assert "line 22: " not in str(refused.value)
    assert "; and more" in str(refused.value)
    path.write_text('{"text": "a"}\n' + "{\n" * 30_000)
    with pytest.raises(DataError, match="10,000 or more bad lines"):  # it is not read any further
        list(read_rows(path, counts=counts))
    assert counts["bad_lines"] == 11_000


def test_real_files(shared_data: Path) -> None:
    rows = list(read_rows(shared_data / "support" / "banking77.csv", columns={"label": "category"}))
    assert len(rows) == 10_003
    assert plain(rows[4]) == {
        "prompt": "How do I know if I will get my card, or if it is lost?\n",
        "completion": "card_arrival",
    }
    rows = list(read_rows(shared_data / "sentiment" / "sst2_train.tsv"))
    assert len(rows) == 6920
    assert plain(rows[1])["completion"] == "0"
    columns = {"prompt": "question", "completion": "answer"}
    assert sum(1 for _ in read_rows(shared_data / "math" / "gsm8k_train.jsonl", columns=columns)) == 7473


TOKENIZER = tiny_tokenizer()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.just(0.5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["text", "label", "prompt", "completion", "messages", "conversations", "instruction", "output", "input", "system"]
)


@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=4), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=100)
def test_any_rows_give_examples_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], skip: bool, chat: bool, targets: bool
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz.jsonl", *rows)
    message = ""
    try:
        for row in read_rows(path, skip_bad_lines=skip, chat=chat, targets=targets):
            assert isinstance(row.example, Example)
            if targets:
                row.rendered(TOKENIZER)
    except DataError as problem:
        message = str(problem)
    assert "\n" not in message
    assert len(message) < 5000


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(ROLES), st.text() | st.none(), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([None, ({"function": {"name": "f"}},)]),
)
def test_a_conversation_is_spelt_for_its_digest_as_json_spells_it(said: list[Any], tools: Any) -> None:
    """Digests say which rows are equal and which are held out: they are the same from version to version."""
    messages = tuple({"role": role, "content": text} | ({"name": "n"} if more else {}) for role, text, more in said)
    trained = list(range(0, len(messages), 2))
    assert _spelt(messages, tools, trained) == json.dumps([messages, tools, trained])
