"""The bytes of a data file as UTF-8: byte-order marks are obeyed and .gz files unpacked while they are read.

What is neither UTF-8 nor marked is refused, with a guess at the encoding and the command that converts it: an encoding
that is only guessed would turn wrong letters into training data without a word.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import shlex
import zlib
from pathlib import Path
from typing import Any

from afina.errors import DataError

CHUNK = 1 << 16  # bytes read from a file at once
MAX_EXPANSION = 100  # a .gz of more than FREE_BYTES may unpack to so many times its size; text stays below 50 times
FREE_BYTES = 8 << 20
_MARKS = ((codecs.BOM_UTF8, ""), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_UTF32 = {codecs.BOM_UTF32_LE: "UTF-32LE", codecs.BOM_UTF32_BE: "UTF-32BE"}
_GZIP = b"\x1f\x8b"
# First bytes of files that are no text, whatever their name says.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, which a renamed .xlsx is too", "unpack it, or save the sheet as CSV UTF-8"),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet or JSONL"),
    (b"SQLite format 3", "an SQLite database", "write its rows as CSV or JSONL"),
    (b"\x00\x05\x16\x07", "a Mac resource fork, the shadow of another file", "name the file without the ._"),
    (b"%PDF", "a PDF", "write its text as .txt or JSONL"),
    (b"BZh", "a bzip2 archive", "unpack it with bunzip2, or pack it with gzip"),
    (b"\xfd7zXZ", "an xz archive", "unpack it with unxz, or pack it with gzip"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it with unzstd, or pack it with gzip"),
)
# Encodings of other times by iconv's names (Python knows them too), and what their texts are full of: the first whose
# share of such characters among all beyond ASCII reaches the number is the guess. Single accented letters are Western
# European, whole words of letters beyond ASCII are not.
_OLD = (
    ("EUC-KR", 0.8, r"[가-힣]"),
    ("SHIFT_JIS", 0.3, r"[\u3041-\u30ff]"),
    ("EUC-JP", 0.3, r"[\u3041-\u30ff]"),
    ("WINDOWS-1252", 0.8, r"(?<![À-ÿ])[À-ÿ]{1,2}(?![À-ÿ])|[‘-”–—…•€£°«»©®§ŠšŽžŒœ]"),
    ("WINDOWS-1251", 0.7, r"[А-ЯЁ]?[а-яё]{2,}"),
    ("KOI8-R", 0.7, r"[А-ЯЁ]?[а-яё]{2,}"),
    ("GB18030", 0.8, r"[\u4e00-\u9fff，。、：；？！（）“”]"),
    ("BIG5", 0.8, r"[\u4e00-\u9fff，。、：；？！（）「」]"),
    ("WINDOWS-1252", 0.0, r"[À-ÿ]"),
)


class Utf8Source(io.RawIOBase):
    """The content of a file as UTF-8 without a byte-order mark; wrap it in `io.BufferedReader`.

    ``taken``: what had to be done to the bytes, in words. ``mark``: bytes of a UTF-8 mark before the content.
    ``consumed``: bytes of the file on the disk that were read so far, for progress bars.
    ``whole``: what byte positions in the content count from, in words. Raises DataError for what is no text at all,
    for UTF-16 and UTF-32 without a mark that says so, and for damaged archives; OSError as `open` does.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.taken, self.mark, self.whole = path, list[str](), 0, "the file"
        self.consumed = self._unpacked = 0
        self._decoder: codecs.IncrementalDecoder | None = None
        self._file = path.open("rb", buffering=0)
        self._stream: Any = self._file
        try:
            start = self._read()
            if start.startswith(_GZIP):
                self._file.seek(0)
                self._unpacked = 0
                self._stream = gzip.GzipFile(fileobj=self._file)
                self.taken.append("unpacked with gzip")
                self.whole = "the unpacked file"
                start = self._read()
            for foreign, kind, mend in _FOREIGN:
                if start.startswith(foreign):
                    raise DataError(f"{path}: is {kind}, where text was expected: {mend}")
            self._pending = self._unmarked(start)
        except BaseException:
            self._file.close()
            raise

    def _unmarked(self, start: bytes) -> bytes:
        """Look at the first bytes for a byte-order mark; return what comes after it, as UTF-8."""
        guessed = _UTF32.get(start[:4]) or _utf16_without_mark(start)
        if guessed:
            raise DataError(f"{self.path}: looks like {guessed}, expected UTF-8: {convert(self.path, guessed)}")
        mark, codec = next((each for each in _MARKS if start.startswith(each[0])), (b"", ""))
        start = start[len(mark) :]
        if not codec:
            self.mark = len(mark)
            return start
        self.taken.append("read as UTF-16")
        self._decoder = codecs.getincrementaldecoder(codec)()
        return self._recoded(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            chunk = self._read()
            self._pending = self._recoded(chunk)
            if not chunk:
                break
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def _read(self) -> bytes:
        try:
            chunk: bytes = self._stream.read(CHUNK) or b""
        except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
            mend = "copy or download it again (gzip -t says whether it is whole)"
            raise DataError(f"{self.path}: a damaged gzip archive ({problem}): {mend}") from problem
        self.consumed = self._file.tell()
        self._unpacked += len(chunk)
        if self._unpacked > max(FREE_BYTES, MAX_EXPANSION * self.consumed):
            mend = "if it is meant, unpack it with gunzip first"
            raise DataError(f"{self.path}: unpacks to more than {MAX_EXPANSION} times its size: {mend}")
        return chunk

    def _recoded(self, chunk: bytes) -> bytes:
        if self._decoder is None:
            return chunk
        try:
            return self._decoder.decode(chunk, final=not chunk).encode()
        except UnicodeDecodeError as problem:
            place = self._unpacked - len(problem.object) + problem.start + 1
            raise DataError(f"{self.path}: byte {place} of {self.whole} is not UTF-16: save it as UTF-8") from problem

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def open_utf8(path: Path) -> tuple[Utf8Source, io.BufferedReader]:
    """Open a file of text. Closing the reader closes the source. Raises what `Utf8Source` raises."""
    source = Utf8Source(path)
    return source, io.BufferedReader(source, CHUNK)


def convert(path: Path, encoding: str) -> str:
    """The command that writes a file in UTF-8 beside it."""
    new = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"


def _utf16_without_mark(start: bytes) -> str:
    """The byte order of UTF-16, every second byte of which is 0 where the text is ASCII; "" if it is not that."""
    high, low = start[::2].count(0), start[1::2].count(0)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or max(high, low) < max(2, len(start) // 20):
        return ""
    if min(high, low) > max(high, low) // 10:
        return ""
    return "UTF-16LE" if low > high else "UTF-16BE"


def guess_encoding(data: bytes) -> str:
    """Return iconv's name of the encoding that ``data`` probably has, "" if it is UTF-8 with a few damaged places."""
    text = data.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    if sum(char > "\x7f" for char in text) - damaged > 2 * damaged:
        return ""
    for name, least, pattern in _OLD:
        try:
            # The end may be cut within a character.
            text = codecs.getincrementaldecoder(name)().decode(data)
        except UnicodeDecodeError:
            continue
        beyond = sum(char > "\x7f" for char in text)
        if beyond and sum(map(len, re.findall(pattern, text))) >= least * beyond:
            return name
    return "LATIN1"


def first_fault(path: Path) -> tuple[str, str]:
    """Where a file stops being UTF-8, and how to mend it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    source, file = open_utf8(path)
    line, before = 1, source.mark
    with file:
        while True:
            chunk = file.read(1 << 20)
            held = decoder.getstate()[0]
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as problem:
                line += problem.object.count(b"\n", 0, problem.start)
                place = f"line {line}: byte {before - len(held) + problem.start + 1} of {source.whole} is not UTF-8"
                return place, _mend(path, problem.object, problem.start)
            before += len(chunk)
            if not chunk:
                return "not UTF-8", "save the file as UTF-8"


def _mend(path: Path, data: bytes, fault: int) -> str:
    sample = data[data.rfind(b"\n", 0, fault) + 1 :][:CHUNK]
    guess = guess_encoding(sample) if len(sample) > 1 else ""
    if not guess:
        return "the text around it is UTF-8: mend or remove these bytes"
    packed = "unpack it with gunzip, and convert it as in " if path.suffix.lower() == ".gz" else ""
    return f"perhaps {guess}: {packed}{convert(path, guess)}"
