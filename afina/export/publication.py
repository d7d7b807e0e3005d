"""How an export gets its name: all of it at once, with what lies beside the weights, or nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from afina.durable import WORKING_NAME, put, remove, working_folder
from afina.errors import RunError
from afina.manifest import write_manifest
from afina.streams import say

CARD, MODELFILE = "README.md", "Modelfile"


class Card(Protocol):
    """What writes a model card, as ``model_card`` of ``afina/report/card.py`` does."""

    def __call__(
        self,
        folder: Path,
        *,
        name: str,
        format: str,
        base: str | None,
        base_folder: Path | None,
        files: Sequence[str],
        modelfile: str | None,
        check: Mapping[str, Any],
    ) -> str: ...


@dataclass
class Publication:
    """An export on its way to ``place``: a folder, or of the format gguf one file NAME.gguf, which NAME.README.md and
    NAME.Modelfile lie beside then. ``card``: who writes the model card, if anybody does."""

    place: Path
    to: str
    card: Card | None = None
    beside: dict[str, str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether the weights are one file in a folder of others."""
        return self.to == "gguf" and self.place.suffix == ".gguf"

    def name_of(self, companion: str) -> str:
        return f"{self.place.stem}.{companion}" if self.alone else companion

    def add(self, companion: str, text: str) -> None:
        """A text that is published with the weights."""
        self.beside[self.name_of(companion)] = text

    def write_card(self, folder: Path, files: Sequence[str], check: Mapping[str, Any], **base: Any) -> None:
        """``base`` and ``base_folder``: of an adapter."""
        if self.card is not None:
            name = self.place.stem if self.alone else self.place.name
            modelfile = self.name_of(MODELFILE) if self.name_of(MODELFILE) in self.beside else None
            card = self.card(folder, name=name, format=self.to, files=files, modelfile=modelfile, check=check, **base)
            self.add(CARD, card)

    def refuse_existing(self) -> None:
        """Raise RunError where something is there already."""
        names = [self.name_of(companion) for companion in (CARD, MODELFILE)] if self.alone else []
        for path in (self.place, *map(self.place.with_name, names)):
            if path.exists() or path.is_symlink():
                raise RunError(f"{path} already exists and is left as it is: choose another --output")

    @contextlib.contextmanager
    def working(self) -> Iterator[Path]:
        """A path for a folder or file, which gets its name when the block ends well and else is gone.

        It lies in a folder of its own beside the place, that is locked as long as this process lives. People change
        cards and Modelfiles: the manifest of the folder does not hold them.
        """
        missing = [folder for folder in self.place.parents if not folder.exists()]
        self.place.parent.mkdir(parents=True, exist_ok=True)
        made: list[Path] = []
        try:
            sweep(self.place)
            with _locked(working_folder(self.place)) as folder:
                working = folder / self.place.name
                yield working
                if working.is_dir() and not any(working.glob("*.gguf")):  # one file alone is checked by its reader
                    write_manifest(working, {})
                self.refuse_existing()  # again: it may have come meanwhile
                for name, text in self.beside.items():
                    file = folder / name if self.alone else working / name
                    with file.open("xb") as opened:
                        opened.write(text.encode("utf-8", "backslashreplace"))
                    if self.alone:
                        put(file, self.place.with_name(name), replace=False)
                        made.append(self.place.with_name(name))
                put(working, self.place, replace=False)
            made.clear()
            missing.clear()
        finally:
            for path in made:
                path.unlink(missing_ok=True)
            for folder in missing:
                with contextlib.suppress(OSError):  # someone else put something there: it stays
                    folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Hold a working folder, so that nobody takes it for a stale one; it is gone afterwards."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            remove(folder)
        os.close(handle)


def sweep(place: Path) -> None:
    """Remove what killed exports to the same place have left beside it, and say so. The kernel lets go of the lock of a
    process that dies, so what can be locked is nobody's."""
    for path in sorted(place.parent.iterdir()):
        match = WORKING_NAME.fullmatch(path.name)
        if match is None or (match[1], match[2]) != (place.name, "tmp") or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # somebody's, or not ours to remove
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(handle)
            say(f"{path} removed: an export to {place} that was killed had left it")
