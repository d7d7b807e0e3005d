"""Bytes of data files: what is marked is decoded, what is packed unpacked, what is neither named with its mend."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import random
from pathlib import Path

import pytest

from afina.errors import DataError
from afina.loaders.data import encodings
from afina.loaders.data.encodings import Utf8Source, first_fault, guess_encoding, open_utf8
from afina.loaders.data.files import Reader
from afina.loaders.data.rows import read_rows

ROWS = [{"prompt": f"Größe {i} 😀", "completion": "é" * (i % 50)} for i in range(3000)]
FILES = {
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
    "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    "a.csv": "prompt,completion\r\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\r\n' for r in ROWS),
    "a.tsv": "prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in ROWS),
}


def encoded(text: str, encoding: str) -> bytes:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-8": codecs.BOM_UTF8}[encoding]
    return mark + text.encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_marked_and_packed_files_hold_the_same_rows(tmp_path: Path, name: str, packed: bool, encoding: str) -> None:
    data = encoded(FILES[name], encoding)
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(data) if packed else data)
    reader = Reader(path, {"prompt", "completion"})
    assert [record.value for record in reader] == ROWS
    assert reader.taken == ["unpacked with gzip"] * packed + ["read as UTF-16"] * (encoding != "utf-8")
    assert reader.done == path.stat().st_size


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_plain_text_too(tmp_path: Path, encoding: str) -> None:
    text = "".join(f"Zeile {i}: Größe 😀\n" for i in range(9000)).rstrip()
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(encoded(text, encoding)))
    assert "".join(record.value["text"] for record in Reader(path, set())) == text


def test_files_are_streamed_whatever_their_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(encoded(FILES["a.jsonl"], "utf-16-le")))
    source, file = open_utf8(path)
    with file:
        assert json.loads(file.readline()) == ROWS[0]
        assert source.consumed <= 2 * encodings.CHUNK
        assert len(source._pending) <= 3 * encodings.CHUNK
    assert source.closed
    assert source._file.closed


def test_zero_bytes_alone_are_no_utf16(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in (b"ab\0\0" * 100, b"\0", b"a" * 1000 + b"\0b\0c"):
        path.write_bytes(content)
        list(Reader(path, set()))


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
    assert [row.example.text for row in read_rows(tmp_path)] == ["packed", "plain"]


def packed_gzip(data: bytes) -> bytes:
    """An archive without the time, so that the tests have the same names in every process."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"text": "a"}\n'.encode("utf-16-le"), "looks like UTF-16LE, expected UTF-8: iconv -f UTF-16LE -t UTF-8 "),
        ('{"text": "a"}\n'.encode("utf-16-be"), "looks like UTF-16BE, expected UTF-8: iconv -f UTF-16BE"),
        (codecs.BOM_UTF32_LE + '{"text": "a"}'.encode("utf-32-le"), "looks like UTF-32LE"),
        (codecs.BOM_UTF32_BE + '{"text": "a"}'.encode("utf-32-be"), "looks like UTF-32BE"),
        (codecs.BOM_UTF16_LE + b'{\0"\0\0\xd8"\0', "byte 7 of the file is not UTF-16: save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b'{\0"', "byte 5 of the file is not UTF-16"),
        (codecs.BOM_UTF16_BE + b"\0\n" * 40_000 + b"\xdc\0", "byte 80003 of the file is not UTF-16"),
        (b"PK\x03\x04...", "is a zip archive, which a renamed .xlsx is too"),
        (b"PAR1...", "is a Parquet file, where text was expected: name it .parquet"),
        (b"\x00\x05\x16\x07\x00\x02", "is a Mac resource fork"),
        (packed_gzip(b'{"text": "a"}' * 100)[:-12], "a damaged gzip archive (Compressed file ended before"),
        (packed_gzip(b'{"text": "a"}' * 100)[:-8] + b"\0" * 8, "a damaged gzip archive (CRC check failed"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\0\xff\xff\xff", "a damaged gzip archive (Error -3"),
        (packed_gzip('{"text": "a"}'.encode("utf-16-le")), "looks like UTF-16LE"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a b.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError) as refused:
        list(Reader(path, set()))
    assert str(refused.value).startswith(f"{path}: {words}")
    if "iconv" in words:
        assert str(refused.value).endswith(f"'{path}' > '{tmp_path / 'a b.utf8.jsonl'}'")


def test_archives_that_unpack_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "FREE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed_gzip((b'{"text": "' + b"a" * 1000 + b'"}\n') * 10_000))
    with pytest.raises(DataError, match="unpacks to more than 100 times its size: if it is meant, unpack it"):
        list(Reader(path, set()))
    noise = random.Random(0)
    text = "".join(json.dumps({"text": "".join(noise.choices("abcdefgh ", k=400))}) + "\n" for _ in range(4000))
    path.write_bytes(packed_gzip(text.encode()))
    assert len(list(Reader(path, set()))) == 4000


TEXTS = {
    "WINDOWS-1252": "L'été dernier, nous avons mangé « à la française » près de la forêt – c'était très agréable…",
    "WINDOWS-1251": "Прошлым летом мы ездили на море, и это было очень хорошо.",
    "KOI8-R": "Прошлым летом мы ездили на море, и это было очень хорошо.",
    "SHIFT_JIS": "去年の夏、私たちは海へ行きました。とても楽しかったです。",
    "EUC-JP": "去年の夏、私たちは海へ行きました。とても楽しかったです。",
    "EUC-KR": "지난 여름 우리는 바다에 갔습니다. 아주 좋았습니다.",
    "GB18030": "去年夏天我们去了海边，天气很好，大家都非常高兴。",
}


@pytest.mark.parametrize("name", TEXTS)
def test_encodings_are_guessed(name: str) -> None:
    line = '{"text": "' + TEXTS[name] + '"}\n'
    assert guess_encoding(line.encode(name) * 3) == name
    assert guess_encoding(line.encode(name)[:41]) == name  # cut within a character
    assert guess_encoding((line * 9).encode() + b"\xff\n") == ""  # UTF-8 with one wrong byte


def test_german_and_names_are_western_european() -> None:
    for text in ("Grüße aus Köln, schöne Größe", "é", "Ünïcödé façade", "señor Muñoz"):
        assert guess_encoding(text.encode("cp1252")) == "WINDOWS-1252"


def test_where_a_file_stops_being_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\nq,a\nq,\xe9t\xe9\n")
    mend = f"perhaps WINDOWS-1252: iconv -f WINDOWS-1252 -t UTF-8 {path} > {tmp_path / 'a.utf8.csv'}"
    assert first_fault(path) == ("line 3: byte 28 of the file is not UTF-8", mend)
    path.write_bytes("größe,grün,schön,größer\n".encode() * 3 + b"\xff\n")
    assert first_fault(path)[1] == "perhaps WINDOWS-1252: " + mend[22:]  # the line alone decides
    path.write_bytes(b"\xff" + "größe,grün,schön,größer\n".encode() * 3)
    assert first_fault(path) == (
        "line 1: byte 1 of the file is not UTF-8",
        "the text around it is UTF-8: mend or remove these bytes",
    )
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(packed_gzip(b"q,\xe9t\xe9\n"))
    place, mend = first_fault(packed)
    assert place == "line 1: byte 3 of the unpacked file is not UTF-8"
    assert mend.startswith("perhaps WINDOWS-1252: unpack it with gunzip, and convert it as in iconv")
    (tmp_path / "c.csv").write_text("fine")
    assert first_fault(tmp_path / "c.csv") == ("not UTF-8", "save the file as UTF-8")


def test_a_source_is_a_stream_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(encoded("añb" * 100_000, "utf-16-le"))
    with io.BufferedReader(Utf8Source(path), 7) as file:
        assert file.read().decode() == "añb" * 100_000
