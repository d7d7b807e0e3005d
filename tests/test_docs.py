"""The documents say what the code does: settings, flags, paths, commands."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from afina.cli.main import VERBS
from afina.engine.train_config import TrainConfig
from afina.loaders.data.rows import SCHEMAS

REPO = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    REPO / "CONTRIBUTING.md",
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "examples").rglob("*.md")),
]
PAGES = [*DOCUMENTS, REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "benchmarks").rglob("*.md"))]
SETTINGS = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")


def by_name(paths: list[Path]) -> dict[str, Path]:
    return {str(path.relative_to(REPO)): path for path in paths}


def shown(default: object) -> str:
    if default is None or default is dataclasses.MISSING:
        return ""
    if isinstance(default, tuple):
        return ",".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_settings_lists_every_field_with_its_default_and_other_names() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\| .*\| ?(.*?) ?\|$", SETTINGS.split("## Environment")[0], re.MULTILINE)
    listed = {name: (default, set(re.findall("`([a-z_]+)`", others))) for name, default, others in rows}
    assert len(listed) == len(rows)
    expected = {f.name: (shown(f.default), set(f.metadata["aliases"])) for f in dataclasses.fields(TrainConfig)}
    assert listed == expected


@pytest.mark.parametrize("name", by_name(PAGES))
def test_no_page_waits_for_its_numbers_or_a_merge(name: str) -> None:
    unfinished = r"\b[A-Z]+_NUMBERS\b|\bTODO\b|\bTBD\b|^(?:<{7}|={7}|>{7})(?: .*)?$"
    assert not re.findall(unfinished, by_name(PAGES)[name].read_text(encoding="utf-8"), re.MULTILINE)


def test_conversations_has_the_counts_that_are_tested() -> None:
    tree = ast.parse((REPO / "tests" / "loaders" / "text" / "test_turns.py").read_text(encoding="utf-8"))
    counts = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and "RIGHT" in ast.dump(node.targets[0])
    )
    text = (REPO / "docs" / "conversations.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (.*?) \| (\d+) \| (\d+) \| ", text, re.MULTILINE)
    assert [int(right) for _, right, _ in listed] == list(counts.values())
    assert {int(right) + int(refused) for _, right, refused in listed} == {70}


def test_settings_lists_every_schema_and_environment_variable() -> None:
    for keys in SCHEMAS.values():
        assert re.search("^.*".join(f"`{key}`.*" for key in keys).replace("^", ""), SETTINGS), keys
    code = [
        p.read_text(encoding="utf-8")
        for room in ("afina", "engine", "kernels", "loaders")
        for p in (REPO / room).rglob("*.py")
    ]
    used = set(re.findall(r"environ(?:\.get)?[\[(]\"(AFINA_\w+)\"", "\n".join(code)))
    assert used == set(re.findall(r"^\| `(AFINA_\w+)` \|", SETTINGS, re.MULTILINE))


@pytest.mark.parametrize("name", by_name(DOCUMENTS))
def test_paths_and_links_lead_somewhere(name: str) -> None:
    document = by_name(DOCUMENTS)[name]
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (document.parent / target).exists(), f"{name} links to {target}"
    rooms = "afina|engine|kernels|loaders|tests|docs|examples|benchmarks"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]+\.(?:py|md|yaml|jsonl|json|csv|tsv|txt))`", text):
        if "NAME" not in path:
            assert (REPO / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", by_name(DOCUMENTS))
def test_commands_use_verbs_and_flags_that_exist(name: str) -> None:
    from afina.cli.options import Parser

    text = by_name(DOCUMENTS)[name].read_text(encoding="utf-8")
    # A command in a block may go on after a backslash.
    blocks = [re.sub(r"\\\n\s*", " ", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(afina [^`\n]*)`", text)
    for line in lines:
        for verb, rest in re.findall(r"(?:^|\s)afina (\w+)([^#|]*)", line):
            assert verb in VERBS, line
            parser = Parser(prog=f"afina {verb}")
            VERBS[verb].add_options(parser)
            known = set(parser._option_string_actions) | {"--json", "--debug", "--help"}
            for flag in re.findall(r"(--[a-zA-Z][\w-]*)", rest):
                assert flag.replace("--", "").replace("-", "_") in {k.lstrip("-") for k in known}, line


@pytest.mark.parametrize("name", by_name(PAGES))
def test_markdown_is_wrapped_at_120_columns(name: str) -> None:
    """Prose, that is: tables, code and lines that nothing can break are as long as they are."""
    code = False
    for number, line in enumerate(by_name(PAGES)[name].read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.lstrip().startswith("```")
        prose = not code and not line.startswith("|") and " " in line.strip()
        assert not prose or len(line) <= 120, f"{name}, line {number}: {len(line)} columns"
