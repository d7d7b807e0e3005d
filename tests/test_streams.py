"""Standard streams that are closed, full or gone: what is printed is lost, and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from afina.streams import Shown, Unfailing, is_terminal, safe_streams, say


def test_text_arrives_whole_and_in_order(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        stream = Unfailing(file)
        print("é", "b" * 100_000, file=stream)
        assert not stream.isatty()
        assert stream.fileno() == file.fileno()
    assert (tmp_path / "out").read_text() == "\\xe9 " + "b" * 100_000 + "\n"


def test_what_cannot_be_written_is_lost() -> None:
    read, write = os.pipe()
    os.close(read)
    for number in (write, os.open("/dev/full", os.O_WRONLY)):
        with os.fdopen(number, "w") as stream:
            unfailing = Unfailing(stream)
            for _ in range(3):
                assert unfailing.write("text") == 4
            print("text", file=unfailing, flush=True)


def test_say_and_is_terminal_take_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    full = io.StringIO()
    monkeypatch.setattr(full, "write", lambda text: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    for stream in (None, closed, full):
        monkeypatch.setattr(sys, "stderr", stream)
        say("lost")
        assert not is_terminal(stream)
    monkeypatch.setattr(sys, "stderr", told := io.StringIO())
    with safe_streams():
        say("told")
    assert sys.stderr is told
    assert told.getvalue() == "told\n"


def test_what_is_printed_gives_no_orders(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        for stream in (Shown(file), Unfailing(file)):
            print("\x1b]0;owned\x07", "\x1b[1mbold\x1b[0m \u202eabc", file=stream, flush=True)
    assert (tmp_path / "out").read_text() == "\\x1b]0;owned\\x07 \x1b[1mbold\x1b[0m \\u202eabc\n" * 2


CLOSED = """
import os, sys
from afina.streams import open_missing
open_missing()
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
print("lost")
print("lost", file=sys.stderr)
os.write(1, b"lost")
os.write(2, b"lost")
sys.exit(0 if file > 2 else 1)
"""


def test_a_file_never_takes_the_place_of_a_missing_stream(tmp_path: Path) -> None:
    for closed in ("0<&- 1>&- 2>&-", "2>&-", "1>&-"):
        path = tmp_path / "file"
        command = f'exec "{sys.executable}" -c "$0" "{path}" {closed}'
        done = subprocess.run(["sh", "-c", command, CLOSED], capture_output=True, cwd=REPO, check=False)
        assert done.returncode == 0
        assert path.read_bytes() == b""
