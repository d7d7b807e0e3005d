"""The guide's commands run, in its order and as written, on shortened copies of the package's rows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import REPO

from afina.cli.main import run

GUIDES = ("guide.md", "guia.md")
ROWS = {"train.jsonl": 24, "dev.jsonl": 12}  # of the package's customer support: so few that advice comes at once


def commands(name: str) -> list[str]:
    """The lines of a guide's bash blocks."""
    text = (REPO / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def test_both_guides_have_the_same_commands_and_steps() -> None:
    english, spanish = (commands(name) for name in GUIDES)
    assert len(english) > 10
    assert english == spanish
    texts = [(REPO / "docs" / name).read_text(encoding="utf-8") for name in GUIDES]
    headings = [re.findall(r"^(#+ \d*)", text, re.MULTILINE) for text in texts]
    assert headings[0] == headings[1]
    files = [set(re.findall(r"`(\w+/[\w./-]+\.py)`", text)) for text in texts]
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_guides_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    support = tmp_path / "afina" / "data" / "support"
    support.mkdir(parents=True)
    for name, count in ROWS.items():
        lines = (REPO / "afina" / "data" / "support" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (support / name).write_text("".join(lines[:count]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for line in commands("guide.md"):
        program, *argv = shlex.split(line, comments=True)
        assert program == "afina"
        status = run(argv)
        printed = capsys.readouterr()
        assert status == 0, f"{line}: {printed.err[-2000:]}"
        assert printed.out + printed.err, line
    for left in ("runs/support/report.html", "answers.jsonl", "my-model/config.json", "my-adapter/adapter_config.json"):
        assert (tmp_path / left).exists(), left
