"""How an export gets its name: all of it at once, with what lies beside the weights, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from afina.durable import publish
from afina.errors import RunError
from afina.manifest import write_manifest

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
        """A path beside the place for a folder or file, which gets the name when the block ends well and else is gone.

        People change cards and Modelfiles: the manifest of the folder does not hold them.
        """
        missing = [folder for folder in self.place.parents if not folder.exists()]
        self.place.parent.mkdir(parents=True, exist_ok=True)
        made: list[Path] = []
        try:
            with publish(self.place, replace=False) as working:
                yield working
                if working.is_dir() and not any(working.glob("*.gguf")):  # one file alone is checked by its reader
                    write_manifest(working, {})
                self.refuse_existing()  # again: it may have come meanwhile
                for name, text in self.beside.items():
                    path = self.place.with_name(name) if self.alone else working / name
                    with publish(path, replace=False) as file:
                        file.write_bytes(text.encode("utf-8", "backslashreplace"))
                    made.append(path)
            made.clear()
            missing.clear()
        finally:
            for path in made:
                path.unlink(missing_ok=True)
            for folder in missing:
                with contextlib.suppress(OSError):  # someone else put something there: it stays
                    folder.rmdir()
