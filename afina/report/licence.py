"""What the files of a model say about its licence and language, as far as the hub has a name for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from afina.errors import AfinaError
from afina.inside import open_own
from afina.loaders.weights.gguf_file import GGUFFile
from afina.loaders.weights.hub import BUILT_IN, resolve
from afina.loaders.weights.package_index import MODELS

MAX_READ = 1 << 16  # bytes of a card or a licence
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_LINK = re.compile(r"(https://[\w./%~#?=&+-]{1,200}|[\w.-]{1,100})", re.ASCII)
# The first words of the texts of licences, and what the hub calls them.
_TEXTS = (("apache license version 2.0", "apache-2.0"), ("mit license", "mit"))


class Licence(NamedTuple):
    """``name``: the hub's, None where nothing is known; ``more``: the keys that go with the name "other"; ``where``:
    the file that says so; ``languages``: codes."""

    name: str | None = None
    more: dict[str, str] = {}  # noqa: RUF012
    where: str = ""
    languages: tuple[str, ...] = ()


def licence_of(place: Path | None) -> Licence:
    """What the folder (or the GGUF file) of a model says: its README.md, a text of a licence beside it, the file's own
    field. Nothing is fetched, and what is not there or cannot be read is not known."""
    if place is None:
        return Licence()
    if place.is_file():
        return _of_gguf(place)
    found = _of_card(place / "README.md")
    if found.name is None:
        for path in (place / name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")):
            if (name := _of_text(path)) is not None:
                return found._replace(name=name, where=path.name)
    return found


def place_of(name: str) -> Path | None:
    """Where a model that a run names lies on this machine; None where it does not, or no longer."""
    try:
        if Path(name).expanduser().exists() or name == BUILT_IN or name in MODELS:
            return resolve(name)
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = name.partition("@")
        found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except (AfinaError, ImportError, OSError, RuntimeError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _of_card(path: Path) -> Licence:
    text = _read(path)
    matter = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if matter is None:
        return Licence()
    import yaml

    try:
        values: Any = yaml.load(matter[1], Loader=yaml.BaseLoader)  # every scalar as text: no type can fail
    except (yaml.YAMLError, RecursionError):
        return Licence()
    if not isinstance(values, dict):
        return Licence()
    languages = values.get("language")
    languages = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    spoken = tuple(code for code in languages[:50] if isinstance(code, str) and _LANGUAGE.fullmatch(code))
    name = values.get("license")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "unknown":
        return Licence(languages=spoken)
    more = {
        key: value
        for key, form in (("license_name", _NAME), ("license_link", _LINK))
        if isinstance(value := values.get(key), str) and form.fullmatch(value)
    }
    return Licence(name, more, path.name, spoken)


def _of_text(path: Path) -> str | None:
    words = " ".join(re.findall(r"[a-z0-9.]+", _read(path)[:2000].lower()))
    return next((name for start, name in _TEXTS if words.startswith(start)), "other" if words else None)


def _of_gguf(path: Path) -> Licence:
    try:
        fields = GGUFFile(path).fields
    except AfinaError:
        return Licence()
    name, languages = fields.get("general.license"), fields.get("general.languages")
    known = isinstance(name, str) and _NAME.fullmatch(name) is not None
    spoken = tuple(code for code in languages if _LANGUAGE.fullmatch(str(code))) if isinstance(languages, list) else ()
    return Licence(name if known else None, {}, path.name if known else "", spoken)


def _read(path: Path) -> str:
    try:
        with open_own(path) as file:
            return file.read(MAX_READ).decode("utf-8", "replace")
    except (AfinaError, OSError):  # a link out of the folder and what is no file, such as a pipe, say nothing
        return ""
