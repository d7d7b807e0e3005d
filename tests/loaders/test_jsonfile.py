"""Strict, bounded JSON: what is accepted, and the line of what is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.errors import ConfigError, WeightsError
from afina.loaders.jsonfile import MAX_DEPTH, parse_json, read_json, show


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(options.get("error", ConfigError)) as caught:
        read_json(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\r\n \t"])
def test_accepted(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(
        start + '{"a": [1, 2.5, null], "é": "\\u00e9\\ud83d\\ude00",\r\n "big": 10000000000000000000}'.encode()
    )
    assert read_json(str(path)) == {"a": [1, 2.5, None], "é": "é😀", "big": 10**19}


CASES = {
    "duplicate": (b'{\n"a": 1,\n"b": {"c": 1},\n"a": 2}', "line 2, 4: key 'a' is given twice in one object"),
    "duplicate inside": (b'{"a": {"x": 1},\n"b": [{"y": 1,\n"y": 1}]}', "line 2, 3: key 'y' is given twice"),
    "duplicate escaped": (b'{"\\u0061": 1, "a": 2}', "key 'a' is given twice"),
    "NaN": (b'{"a": 1,\n"rms_norm_eps": NaN}', "line 2: 'NaN' is not a finite number"),
    "Infinity": (b'{"a":\n\n-Infinity}', "line 3: '-Infinity' is not a finite number"),
    "overflow": (b'{"Infinity": "1e99",\n"a": 1e999}', "line 2: '1e999' is not a finite number"),
    "long integer": (b'{"a": ' + b"1" * 5000 + b"}", "an integer too long"),
    "syntax": (b'{"a": 1,\n "b": 2,\n}', "line 3: not valid JSON: "),
    "comment": (b'{\n// hidden size\n"a": 1}', "line 2: not valid JSON: "),
    "cut off": (b'{"a": 1,\n "b": [', "line 2: not valid JSON: "),
    "two values": (b"{}\n{}", "line 2: not valid JSON: Extra data"),
    "empty": (b"", "line 1: not valid JSON: the file is empty"),
    "blank": (b"\n\n", "the file is empty"),
    "list": (b"[1, 2]", "holds [1, 2] where a JSON object {...} was expected"),
    "Latin-1": ('{"a": 1,\n"b": "é"}'.encode("latin-1"), "line 2: byte 15 is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "line 1: byte 0 is not UTF-8"),
    "lone surrogate": (b'{"a": 1,\n"b": "\\ud83d"}', "line 2: a \\u escape is half a character"),
    "deep": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64 levels"),
    "very deep": (b'{"a":' + b"[" * 200_000, "nested deeper than 64 levels"),
    "long key": (b'{"' + b"k" * 9999 + b'": 1, "' + b"k" * 9999 + b'": 1}', "line 1: key 'kkk"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_its_line(tmp_path: Path, case: str) -> None:
    content, expected = CASES[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert expected in refused(path)
    assert expected in refused(path, error=WeightsError)


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}")
    read_json(path)
    path.write_bytes(b'{"a": 12345}')
    assert read_json(path, max_bytes=12) == {"a": 12345}
    assert "larger than 11 bytes" in refused(path, max_bytes=11)


def test_no_regular_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.json")
    assert "no such file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert "no such file" in refused(tmp_path / "pipe")


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert "cannot be read (Permission denied): check its permissions" in refused(path)


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.json").write_text('{"private": 1}')
    (tmp_path / "model" / "config.json").symlink_to("../secret.json")
    assert "config.json: is a link out of its folder" in refused(tmp_path / "model" / "config.json")


@settings(max_examples=500)
@given(
    st.binary(max_size=40)
    | st.text(alphabet='{}[]",:\\u0123dDeE+-.aNIfinty \n\ufeff', max_size=60).map(lambda text: text.encode())
)
def test_fuzzed(data: bytes) -> None:
    try:
        value = parse_json(data, "x.json")
    except ConfigError as problem:
        message = str(problem)
    else:
        message = "x.json"
        assert value == json.loads(data.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    assert "\n" not in message
    assert message.startswith("x.json")


def test_show_is_one_bounded_line() -> None:
    assert show("a\nb\ud800") == r"'a\nb\ud800'"
    assert len(show("x" * 10**6)) <= 100
    assert len(show([["y" * 1000] * 1000] * 1000)) < 100
    assert len(show({"k" * 500 + str(i): "y" * 1000 for i in range(1000)})) < 1000
    assert show([2, 3]) == "[2, 3]"
