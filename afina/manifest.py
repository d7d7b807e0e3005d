"""What a folder held when it was published: ``manifest.json``, with the size and SHA-256 of each of its files.

Renames make what is published whole; what a disk, a copy or a person changes in it afterwards is found here, before a
model is loaded, exported or gone on from. Files that came later (a README, say) are nobody's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.durable import read_json
from afina.errors import WeightsError
from afina.inside import open_own

MANIFEST = "manifest.json"
FORMAT = "afina-manifest-1"

# Of each folder the files that were found as recorded: what they were then, and what was recorded of them.
_whole: dict[Path, dict[str, tuple[tuple[int, int, int], Mapping[str, Any]]]] = {}


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of each file in ``folder`` but the manifest, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}


def write_manifest(folder: Path, facts: Mapping[str, Any], *, format: str = FORMAT) -> None:
    """Write the manifest of all that is in ``folder``; ``facts``: JSON values that are kept beside it."""
    content = {"format": format, **facts, "files": describe(folder)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What ``write_manifest`` wrote; None where nothing of its kind is there. Raises WeightsError."""
    path = folder / MANIFEST
    mend = "take the folder from where it came, or remove the file if the model is known to be whole"
    if not path.is_file():
        return None
    try:
        content = read_json(path, error=WeightsError)
    except WeightsError as problem:
        raise WeightsError(f"{problem}: {mend}") from problem
    if content.get("format") != FORMAT:
        return None  # somebody else's
    files = content.get("files")
    if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
        raise WeightsError(f"{path} is damaged: it lists no files: {mend}")
    return content


def check_manifest(folder: Path, *, weights: bool = True) -> None:
    """Raise WeightsError where a file of ``folder`` is not what its manifest says. Without one nothing is known, and
    nothing is checked. ``weights``: also the weights, which takes as long as to read them. Files that have not been
    touched since they were found whole are not read again by this process."""
    content = read_manifest(folder)
    if content is None:
        return
    files = {name: facts for name, facts in content["files"].items() if weights or not name.endswith(".safetensors")}
    now = {name: _identity(folder / name) for name in files}
    known = _whole.setdefault(folder, {})
    changed = {name: facts for name, facts in files.items() if known.get(name) != (now[name], facts)}
    if (problem := damage(folder, changed)) is not None:
        raise WeightsError(
            f"{problem}: take it from a backup or train again, or remove {folder / MANIFEST} if the change was meant"
        )
    known.update({name: (now[name], facts) for name, facts in changed.items()})


def damage(folder: Path, recorded: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first file that is not as ``recorded``, and how, in one line; None where all are."""
    for name, facts in recorded.items():
        file = folder / name
        if name != file.name:
            return f"{folder / MANIFEST} is damaged: it lists {name!r:.80}, which is no name of a file beside it"
        try:
            size = file.stat().st_size
            if size != facts.get("size"):
                return f"{file} is damaged: {size} bytes, its manifest says {facts.get('size')!r:.80}"
            if sha256(file) != facts.get("sha256"):
                return f"{file} is damaged: its SHA-256 is not the one in its manifest"
        except WeightsError as problem:  # a link out of the folder
            return str(problem)
        except (OSError, ValueError) as problem:  # ValueError: a name with a null byte
            return f"{file} cannot be read: {getattr(problem, 'strerror', None) or problem}"
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file of its folder. Raises WeightsError for a link out of it, OSError."""
    with open_own(path, error=WeightsError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return (-1, -1, -1)
    return (facts.st_size, facts.st_mtime_ns, facts.st_ino)
