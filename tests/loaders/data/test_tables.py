"""Tables: the delimiter that a header shows, Excel's first line, and rows whatever stands in their fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from afina.errors import DataError
from afina.loaders.data.files import Reader
from afina.loaders.data.rows import read_rows
from afina.loaders.data.tables import find_delimiter

NAMES = {"prompt", "completion", "text", "label"}


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [
        ("prompt,completion", ","),
        ("prompt;completion", ";"),
        ("prompt\tcompletion", "\t"),
        ("prompt|completion|id", "|"),
        ('"prompt";"completion"', ";"),
        (" Prompt ; Completion ", ";"),
        ("text", ","),
        ("text,remarks; if any; or none", ","),  # semicolons in a column's name
        ("remarks, if any;prompt;completion", ";"),  # commas in one
        ('"one; two",text', ","),
        ("frage;antwort", ";"),  # no name that is known: several columns rather than one
        ("question,answer;remarks;more", ","),
        ("", ","),
        ('"text', ","),
    ],
)
def test_the_header_shows_the_delimiter(header: str, delimiter: str) -> None:
    assert find_delimiter(header, NAMES) == delimiter


def table(tmp_path: Path, text: str, name: str = "a.csv") -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    path = tmp_path / name
    path.write_bytes(text.encode())
    reader = Reader(path, NAMES)
    return [(record.line, record.value) for record in reader if not record.problem], reader.taken


def test_excel_files(tmp_path: Path) -> None:
    rows = 'q1;a1\r\n"q;2";"two\r\nlines ""quoted"""\r\nq3;a, 3\r\n'
    values = [("q1", "a1"), ("q;2", 'two\r\nlines "quoted"'), ("q3", "a, 3")]
    for before, first in (
        ("\ufeff", 2),
        ("sep=;\r\n", 3),
        ('"sep=;"\r\n', 3),
        ("\r\n\r\n", 4),
        ("\ufeff\r\nSEP=;\r\n", 4),
    ):
        found, taken = table(tmp_path, f"{before}prompt;completion\r\n{rows}")
        assert [line for line, _ in found] == [first, first + 1, first + 3]
        assert [(row["prompt"], row["completion"]) for _, row in found] == values
        assert taken == ["fields separated by semicolons"]


def test_a_first_line_that_names_the_delimiter_is_obeyed(tmp_path: Path) -> None:
    assert table(tmp_path, "sep=#\nprompt#completion\nq,1#a;1\n") == (
        [(3, {"prompt": "q,1", "completion": "a;1"})],
        ["fields separated by '#'"],
    )
    found, taken = table(tmp_path, "sep=,\nprompt,text;label\nq,a\n")
    assert (found, taken) == ([(3, {"prompt": "q", "text;label": "a"})], [])


def test_prose_decides_nothing(tmp_path: Path) -> None:
    text = "text\n" + "".join(f"one; two; three | four\tfive {i}\n" for i in range(20))
    found, taken = table(tmp_path, text)
    assert found[0] == (2, {"text": "one; two; three | four\tfive 0"})
    assert (len(found), taken) == (20, [])


def test_the_users_columns_show_the_delimiter_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a, b;Frage;Antwort\nx;q;a\n")
    (row,) = read_rows(tmp_path / "a.csv", columns={"prompt": "Frage", "completion": "Antwort"})
    assert (row.example.prompt, row.example.completion) == ("q", "a")


def test_headers_with_blanks_empty_names_and_empty_lines_before_them(tmp_path: Path) -> None:
    found, _ = table(tmp_path, "\n ,\n text , label ,,\na,b,,\n")
    assert found == [(4, {"text": "a", "label": "b", "": ""})]
    found, _ = table(tmp_path, "\n\ntext\tlabel\na\tb\n", "a.tsv")
    assert found == [(4, {"text": "a", "label": "b"})]
    found, _ = table(tmp_path, "Text\tLabel\na\tb\n", "b.tsv")
    assert found == [(2, {"Text": "a", "Label": "b"})]
    with pytest.raises(DataError, match=r"a\.csv: line 2: two columns have the same name: \['text', 'text'\]"):
        table(tmp_path, "\ntext,text\n")


def test_tabs_stay_what_they_are_in_a_tsv(tmp_path: Path) -> None:
    found, taken = table(tmp_path, "prompt;completion\tlabel\tx\na;b\tc\td\n", "a.tsv")
    assert (found, taken) == ([(2, {"prompt;completion": "a;b", "label": "c", "x": "d"})], [])
