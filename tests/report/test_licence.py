"""A licence is what a model's files say it is; what they do not say, or say in a strange way, is unknown."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from afina.loaders.weights.hub import resolve
from afina.report.licence import MAX_READ, Licence, licence_of, place_of


def card(folder: Path, matter: str) -> Licence:
    (folder / "README.md").write_text(f"---\n{matter}\n---\n# Model\n")
    return licence_of(folder)


def test_of_a_card(tmp_path: Path) -> None:
    assert licence_of(None) == licence_of(tmp_path) == licence_of(tmp_path / "gone") == Licence()
    assert card(tmp_path, "license: apache-2.0\nlanguage: en") == Licence("apache-2.0", {}, "README.md", ("en",))
    found = card(tmp_path, "license: other\nlicense_name: my-1.0\nlicense_link: LICENSE\nlanguage: [en, es, 'x y']")
    assert found == Licence("other", {"license_name": "my-1.0", "license_link": "LICENSE"}, "README.md", ("en", "es"))
    assert licence_of(resolve("afina-tiny")) == Licence("mit", {}, "README.md", ("en",))


@pytest.mark.parametrize(
    "matter",
    [
        "license: unknown",
        "license: 'a\"\\n[x](http://y)'",
        "license: [mit]",
        "license: " + "a" * 100,
        "license: !!int ''",
        "license: &a [*a]",
        "a: !!timestamp x\n- b",
        "- license: mit",
        "license: mit\n\t- {",
        "license:\n  mit: 1",
        "[" * 5000,
    ],
)
def test_what_is_no_licence_is_unknown(matter: str, tmp_path: Path) -> None:
    assert card(tmp_path, matter).name is None


def test_odd_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\x00\n---\n")
    assert licence_of(tmp_path).name is None
    (tmp_path / "README.md").write_text("#" * MAX_READ + "\n---\nlicense: mit\n---\n")
    assert licence_of(tmp_path).name is None
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) == Licence()


def test_only_files_of_the_folder_are_read(tmp_path: Path) -> None:
    """A pipe is not waited for, and a link out of the folder not followed."""
    (tmp_path / "m").mkdir()
    (tmp_path / "elsewhere").write_text("MIT License")
    (tmp_path / "m" / "LICENSE").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "m" / "README.md")
    found: list[Licence] = []
    reader = threading.Thread(target=lambda: found.append(licence_of(tmp_path / "m")), daemon=True)
    reader.start()
    reader.join(10)
    assert found == [Licence()]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("\n   Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright", "mit"),
        ("Do what I say.", "other"),
        ("Not the MIT License", "other"),
        ("", None),
    ],
)
def test_of_a_text(text: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(text)
    assert licence_of(tmp_path)[:3:2] == (name, "LICENSE" if name else "")


def test_where_a_model_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched for a licence."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert place_of(str(tmp_path / "m")) == tmp_path / "m"
    assert place_of("afina-tiny") == resolve("afina-tiny")
    for gone in (str(tmp_path / "gone"), "nobody/nothing-such", "nobody/nothing-such@main", "a b", "~nobody/x", ""):
        assert place_of(gone) is None
