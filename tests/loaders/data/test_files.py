"""Files of rows: every type read with its lines, and everything that can be wrong with a file named in one line."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.errors import DataError
from afina.loaders.data import files
from afina.loaders.data.files import Reader, Record, as_text, clean_text, cut_text, data_files

NAMES = {"text", "label", "prompt", "completion"}


def records(path: Path, content: bytes | str = b"") -> list[Record]:
    if content:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(Reader(path, NAMES))


def pairs(found: list[Record]) -> list[tuple[int, Any]]:
    return [(record.line, record.problem or record.value) for record in found]


def test_json_lines_with_a_byte_order_mark_carriage_returns_and_blank_lines(tmp_path: Path) -> None:
    found = records(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n  \n{"text": "c"}')
    assert pairs(found) == [(1, {"text": "a"}), (3, {"text": "b"}), (5, {"text": "c"})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "not valid JSON: Expecting ',' delimiter (column 13)"),
        (b"{'text': 'a'}", "not valid JSON: Expecting property name enclosed in double quotes (column 2)"),
        (b'{"text": "a", "text": "b"}', "key 'text' is given twice in one object"),
        (b'{"text": NaN}', "'NaN' is not a finite number"),
        (b'{"text": -Infinity}', "'-Infinity' is not a finite number"),
        (b'{"text": 1e999}', "'1e999' is not a finite number"),
        (b'{"text": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"text": "\\ud83d"}', "half a character"),
        (b'{"text": "a", "other": ["\\uDC00"]}', "half a character"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'["text"]', "holds ['text'] where an object {...} was expected"),
        (b"3", "holds 3 where an object {...} was expected"),
        (b'{"text": "\xff"}', "byte 11 of the line (byte 26 of the file) is not UTF-8"),
        (b'{"text": "' + b"a" * (16 << 20) + b'"}', "longer than 16 MiB"),
    ],
)
def test_bad_json_lines_are_told_and_the_next_line_is_read(tmp_path: Path, line: bytes, problem: str) -> None:
    first, bad, last = records(tmp_path / "a.jsonl", b'{"text": "a"}\r\n' + line + b'\n{"text": "\\ud83d\\ude00"}\n')
    assert pairs([first, last]) == [(1, {"text": "a"}), (3, {"text": "😀"})]
    assert bad.line == 2
    assert problem in bad.problem


def test_json_arrays_stream_with_the_line_of_each_element(tmp_path: Path) -> None:
    big = {"text": "b" * 3_000_000}  # larger than what is read at once
    text = '\ufeff [\n {"text": "a"},\n\n ' + json.dumps(big) + ',\n {"n":\n 1}, 5]\n '
    found = pairs(records(tmp_path / "a.json", text))
    assert found == [(2, {"text": "a"}), (4, big), (5, {"n": 1}), (6, "holds 5 where an object {...} was expected")]
    assert records(tmp_path / "b.json", "[]") == []
    rows = [{"text": "é" * (i % 7), "n": i} for i in range(9_000)]
    assert [r.value for r in records(tmp_path / "c.json", json.dumps(rows, ensure_ascii=False, indent=1))] == rows
    assert pairs(records(tmp_path / "d.json", '{"text": "lines"}\n{"text": "b"}\n')) == [
        (1, {"text": "lines"}),
        (2, {"text": "b"}),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "a"},\n{"text": }]', "line 2: Expecting value"),
        ('[{"text": "a"}', "line 1: the file ends in the array"),
        ('[{"text": "a"},', "line 1: Expecting value"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: found '{', no comma or ]"),
        ('[{"text": "a"}] []', "line 1: text after the closing bracket"),
        ('[{"text": "a", "text": "b"}]', "line 1: key 'text' is given twice"),
        ('[{"a": ' + "[" * 100_000 + "]}", "line 1: nested too deeply"),
        (
            '{"data": [\n{"text": "a"}]}',
            "is an object that holds its rows under 'data': write them alone, jq -c '.data[]'",
        ),
        ('{"text":\n"a"}', "line 1: not valid JSON: Expecting value (column 9): expected an array"),
        ('[{"text": "\udcff"}]', "line 1: byte 12 of the file is not UTF-8"),
    ],
)
def test_bad_json_arrays(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError) as refused:
        records(tmp_path / "a.json", text.encode("utf-8", "surrogateescape"))
    assert str(refused.value).startswith(f"{tmp_path / 'a.json'}: {words}")


def test_an_endless_element_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 1 << 20)
    with pytest.raises(DataError, match="Unterminated string"):
        records(tmp_path / "a.json", '[{"text": "' + "a" * (8 << 20) + '"}]')


def test_csv(tmp_path: Path) -> None:
    text = '\ufefftext, label \r\n"two\nlines, ""quoted""",a\r\n\r\n,\r\nplain,b\r\nshort\r\nlong,c,d\r\n"open'
    found = records(tmp_path / "a.csv", text)
    assert pairs(found[:2]) == [
        (2, {"text": 'two\nlines, "quoted"', "label": "a"}),
        (6, {"text": "plain", "label": "b"}),
    ]
    problems = ["1 fields where the header has 2", "3 fields where", "not valid CSV: unexpected end of data"]
    for record, line, problem in zip(found[2:], (7, 8, 9), problems, strict=True):
        assert record.line == line
        assert record.problem.startswith(problem)
    bad = records(tmp_path / "b.csv", b"text,label\na,b\n\xff,c\nd,e\n")
    assert [record.problem for record in bad] == [
        "",
        "byte 1 of the line (byte 16 of the file) is not UTF-8 (line 3)",
        "",
    ]
    for header, words in ((b"text,text\na,b\n", "two columns have the same name"), (b"te\xffxt,label\na,b\n", "UTF-8")):
        with pytest.raises(DataError, match=words):
            records(tmp_path / "c.csv", header)


def test_tsv_with_and_without_a_header(tmp_path: Path) -> None:
    first = {"text": 'he said "no" and', "label": "0"}
    quoted = {"text": 'say "hi"', "label": "1"}
    lines = 'he said "no" and\t0\n"say ""hi"""\t1\n'
    assert pairs(records(tmp_path / "a.tsv", lines)) == [(1, first), (2, quoted)]
    assert pairs(records(tmp_path / "b.tsv", "text\tlabel\n" + lines)) == [(2, first), (3, quoted)]
    assert pairs(records(tmp_path / "c.tsv", "a\tb\tc\n1\t2\t3\n")) == [(2, {"a": "1", "b": "2", "c": "3"})]
    assert pairs(records(tmp_path / "d.tsv", '"a" or "b"\t0\n')) == [(1, {"text": '"a" or "b"', "label": "0"})]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    rows = [{"messages": turns, "label": i % 2} for i in range(2500)]
    table = pa.Table.from_pylist(rows)
    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "messages": []}}}
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    assert [r.value for r in records(path)] == rows
    features["info"]["features"].pop("messages")
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    assert pairs(records(path))[:2] == [
        (1, {"messages": turns, "label": "no"}),
        (2, {"messages": turns, "label": "yes"}),
    ]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        records(path)

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'afina\[parquet\]'"):
        records(path)


def test_plain_text_comes_in_pieces_that_join_to_the_whole(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {i} of the book,\r\nin two lines.\r\n\r\n" for i in range(3000))
    found = records(tmp_path / "a.txt", "\ufeff" + text + "\n" * 50_000)
    assert len(found) > 5
    assert "".join(r.value["text"] for r in found).rstrip() == text.replace("\r\n", "\n").rstrip()
    assert all(r.value["text"].endswith("\n\n") for r in found[:-1])
    assert [r.more for r in found] == [True] * (len(found) - 1) + [False]
    whole = text.replace("\r\n", "\n")
    for record in found:
        assert record.line == whole[: whole.index(record.value["text"][:60])].count("\n") + 1
    with pytest.raises(DataError, match=r"line 3: byte 15 of the file is not UTF-8: perhaps WINDOWS-1252: iconv -f"):
        records(tmp_path / "b.txt", b"one\r\nstill one\xff\n".replace(b"\r\n", b"\n\n"))


def test_utf8_faults_are_found_in_large_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * (1 << 19) + b"\n" + "aé".encode() * 400_000 + b"\n\xc3")
    with pytest.raises(DataError, match=rf"line 3: byte {(1 << 20) + 1 + 1_200_000 + 2} of the file"):
        records(path)


@pytest.mark.parametrize(
    "text", ["word " * 20_000, "line\n" * 20_000, "x" * 100_000, "a b\n\nc\n" * 9_000, "", "short"]
)
def test_cut_text_loses_nothing_and_cuts_at_words(text: str) -> None:
    pieces = cut_text(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= files.PIECE for piece in pieces)
    if "x" not in text:
        assert all(one.endswith("\n") or two.startswith(" ") for one, two in pairwise(pieces))


def test_clean_text() -> None:
    assert clean_text("\ufeffcafe\u0301 \t\r\n  indented\x00\x1b[0m  \r\n\tx\ry \n\n") == "café\n  indented[0m\n\tx\ny"
    assert clean_text("Answer: ", end=False) == "Answer: "
    assert clean_text("a \nAnswer:\t", end=False) == "a\nAnswer:\t"
    assert clean_text("👩\u200d👩 नमस्ते\u00a0") == "👩\u200d👩 नमस्ते\u00a0"
    long = " " * 2_000_000 + "a \n"  # quadratic time would take hours
    assert clean_text(long, end=False) == " " * 2_000_000 + "a\n"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60), st.booleans())
@settings(max_examples=150)
def test_cleaning_twice_changes_nothing_more(text: str, end: bool) -> None:
    once = clean_text(text, end=end)
    assert clean_text(once, end=end) == once
    assert "\r" not in once
    assert " \n" not in once


def test_data_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", ".hidden.txt", "c.TXT", "notes.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "sub").mkdir()
    assert [p.name for p in data_files(tmp_path)] == ["a.txt", "b.txt", "c.TXT"]
    assert data_files([str(tmp_path / "b.txt"), tmp_path / "a.txt"]) == [tmp_path / "b.txt", tmp_path / "a.txt"]
    cases = [
        (tmp_path / "a.text", "a.text: no such file (did you mean 'a.txt'?)"),
        (tmp_path / "notes.md", "notes.md: Markdown is not read: name it .txt to train on it as one text"),
        (tmp_path / "notes.odd", "unknown file type .odd: expected .jsonl"),
        (tmp_path / "sub", "no data file in this folder (found nothing)"),
        (
            tmp_path / "saved",
            "a folder that datasets.save_to_disk wrote: export its rows, datasets.load_from_disk(path)",
        ),
        (tmp_path / "splits", "datasets.load_from_disk(path)['train'].to_json('rows.jsonl')"),
        (tmp_path / "up", "no data file in this folder (found README.md, data/)"),
        (Path("/dev/null"), "neither a file nor a folder"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
        ([], "no file: name one file"),
    ]
    for name in (
        "saved/state.json",
        "saved/dataset_info.json",
        "splits/dataset_dict.json",
        "up/README.md",
        "up/data/a",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.odd").write_text("")
    (tmp_path / "e.jsonl").write_text("{}")
    cases.append((tmp_path, "files of several kinds (.jsonl, .txt)"))
    for source, words in cases:
        with pytest.raises(DataError) as refused:
            data_files(source)
        assert words in str(refused.value)


def test_what_stands_beside_the_rows_in_a_folder_is_no_data(tmp_path: Path) -> None:
    beside = ("README.txt", "LICENSE.txt", "licence", "requirements.txt", "dataset_info.json", "dataset_infos.json")
    for name in ("a.jsonl", "b.ndjson", "c.jsonl.gz", "._a.jsonl", ".DS_Store", "README.md", *beside):
        (tmp_path / name).write_text("x")
    assert [p.name for p in data_files(tmp_path)] == ["a.jsonl", "b.ndjson", "c.jsonl.gz"]
    assert data_files(tmp_path / "README.txt") == [tmp_path / "README.txt"]  # named, it is meant
    (tmp_path / "readme_qa.jsonl").write_text("x")
    assert tmp_path / "readme_qa.jsonl" in data_files(tmp_path)


def test_a_json_array_is_one_whatever_its_name(tmp_path: Path) -> None:
    for text in ('[{"a": 1},\n{"a": 2}]', '[{"a": 1}, {"a": 2}]\n', '\ufeff\n[\n{"a": 1},\n{"a": 2}\n]\n'):
        (tmp_path / "a.jsonl").write_text(text)
        reader = Reader(tmp_path / "a.jsonl", NAMES)
        assert [record.value for record in reader] == [{"a": 1}, {"a": 2}]
        assert reader.taken == ["read as a JSON array"]
    found = records(tmp_path / "b.jsonl", '[{"a": 1}]\n[{"a": 2}]\n')  # lists line by line are none
    assert pairs(found) == [(n, "holds [{...}] where an object {...} was expected") for n in (1, 2)]


def test_numbers_keep_their_spelling_as_texts(tmp_path: Path) -> None:
    literals = ["1", "-3", "1.0", "19.90", "1e5", "true", "false"]
    (record,) = records(tmp_path / "a.jsonl", f'{{"n": [{", ".join(literals)}]}}')
    assert [as_text(value) for value in record.value["n"]] == literals
    assert json.dumps(record.value["n"]) == "[1, -3, 1.0, 19.9, 100000.0, true, false]"  # and stay numbers
    assert as_text("a") == "a"
    assert as_text(0.5) == "0.5"  # a number of a Parquet file has no spelling of its own
    assert [as_text(value) for value in (None, [], {}, float("nan"), float("inf"))] == [None] * 5


def test_a_disk_that_fails_while_reading_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")  # a file that opens and cannot be read
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(Input/output error\)"):
        records(tmp_path / "a.jsonl")


@pytest.fixture(scope="module")
def fuzz_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"]),
    st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='{}[]",:\\u dtex1e9-NaN\n\t\r\ufeff', max_size=80).map(str.encode),
        st.lists(
            st.recursive(
                st.none() | st.text() | st.sampled_from([0.5, 1e300, float("nan"), float("inf")]) | st.integers(),
                st.lists,
                max_leaves=4,
            ),
            max_size=4,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
@settings(max_examples=300)
def test_any_bytes_give_records_or_a_data_error(fuzz_file: Path, suffix: str, content: bytes) -> None:
    path = fuzz_file / f"fuzz{suffix}"
    path.write_bytes(content)
    message = str(path)
    try:
        for record in Reader(path, NAMES):
            assert isinstance(record.value, dict)
            json.dumps(record.value, ensure_ascii=False).encode()
    except DataError as problem:
        message = str(problem)
    assert message.startswith(str(path))
    assert "\n" not in message
