"""Durable checkpoints and the best model: a crash at any moment leaves the newest complete one whole.

A checkpoint is a folder ``checkpoint-N`` (N: optimizer steps done): one safetensors file a group of tensors,
``state.json`` for what is not a tensor, and ``manifest.json`` with the size and SHA-256 of each. `afina/durable.py`
puts it in place in one piece, so a folder of that name is complete; the manifest finds what changed afterwards. Older
checkpoints go last. There is no pickle anywhere. Only the holder of the run folder's lock may write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from afina.durable import publish, read_json, remove, sync
from afina.errors import AfinaError, RunError
from afina.loaders.weights.safetensors import read_safetensors, write_safetensors
from afina.manifest import MANIFEST, damage, write_manifest

FORMAT = "afina-checkpoint-1"
STATE = "state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


class SaveError(OSError):
    """Something could not be written (disk full, I/O error). Nothing that was there before has changed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all match its manifest. ``meta`` is what ``save_checkpoint`` was given."""

    path: Path
    step: int
    groups: tuple[str, ...]
    meta: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read one group's tensors (CPU, saved dtypes). One group at a time, so that memory holds no second copy."""
        if group not in self.groups:
            raise RunError(f"{self.path} has no tensors {group!r}, only {', '.join(self.groups) or 'none'}")
        try:
            return read_safetensors(self.path / f"{group}.safetensors")
        except (AfinaError, OSError) as error:
            raise RunError(f"{self.path}: {group}.safetensors cannot be read: {error}") from error


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    *,
    keep: int | None = 2,
) -> Path:
    """Write ``checkpoint-{step}`` durably, then remove all but the newest ``keep`` (None: all stay). Return its path.

    ``tensors``: group name -> tensor name -> tensor, any dtype safetensors knows; a group becomes one file.
    ``meta``: JSON values. A checkpoint of the same step is replaced. Those of later steps are removed: the run went on
    from an earlier one, because they were damaged.
    Raises SaveError, with every earlier checkpoint as it was and no working file left.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    final = run_dir / f"checkpoint-{step}"

    def write(folder: Path) -> None:
        for path in run_dir.iterdir():  # the logs first: a checkpoint must not outlive the lines of its steps
            if path.is_file():
                sync(path)
        for group, members in tensors.items():
            write_safetensors(folder / f"{group}.safetensors", members)
        state = {"format": FORMAT, "step": step, "groups": sorted(tensors), "meta": meta}
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        write_manifest(folder, {}, format=FORMAT)

    _publish(final, write)
    others = [(n, path) for n, path in checkpoints(run_dir) if n != step]
    earlier = [path for n, path in others if n < step]
    surplus = [] if keep is None else earlier[keep - 1 :]
    for path in [p for n, p in others if n > step] + surplus:
        remove(path)
    return final


def publish_best(
    run_dir: Path, writer: Callable[[Path], None], facts: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """Let ``writer`` fill an empty folder, then put it at ``best/`` in one piece, replacing the best before it. Its
    manifest has the files' SHA-256, and ``facts``.

    Raises SaveError, with the earlier ``best/`` as it was.
    """

    def write(folder: Path) -> None:
        writer(folder)
        write_manifest(folder, facts)

    return _publish(run_dir / "best", write)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of every folder named as a checkpoint, newest first; they may be damaged."""
    found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in run_dir.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def find_latest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole (or None), and one line on each newer one that was skipped."""
    skipped: list[str] = []
    for _, path in checkpoints(run_dir):
        try:
            return load_checkpoint(path), skipped
        except RunError as error:
            skipped.append(str(error))
    return None, skipped


def load_checkpoint(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest and open it. Raises RunError naming what is wrong."""
    manifest, state = path / MANIFEST, path / STATE
    recorded = read_json(manifest).get("files")
    if not isinstance(recorded, dict) or not all(isinstance(facts, dict) for facts in recorded.values()):
        raise RunError(f'{manifest} is damaged: expected {{"files": {{name: {{"size", "sha256"}}}}}}')
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if different := sorted(present ^ set(recorded)):
        raise RunError(f"{path} is damaged: its manifest and its files differ in {', '.join(different)[:200]!r}")
    if (problem := damage(path, recorded)) is not None:
        raise RunError(problem)
    content = read_json(state)
    step, groups, meta = content.get("step"), content.get("groups"), content.get("meta")
    if content.get("format") != FORMAT:
        raise RunError(f"{state}: format {content.get('format')!r:.80}, this version reads {FORMAT!r}")
    if type(step) is not int or path.name != f"checkpoint-{step}":
        raise RunError(f"{state}: step {step!r:.80} does not agree with the folder's name")
    if not isinstance(groups, list) or sorted(f"{group}.safetensors" for group in groups) != sorted(present - {STATE}):
        raise RunError(f"{state}: groups {groups!r:.80} do not agree with the files beside it")
    if not isinstance(meta, dict):
        raise RunError(f"{state}: meta must be an object, found {type(meta).__name__}")
    return Checkpoint(path, step, tuple(groups), meta)


def _publish(final: Path, writer: Callable[[Path], None]) -> Path:
    """Let ``writer`` fill a folder and put it at ``final``; what the disk refuses becomes a SaveError."""
    try:
        with publish(final) as working:
            working.mkdir()
            writer(working)
    except (OSError, AfinaError) as error:
        cause = error.__cause__ if isinstance(error, AfinaError) else error  # how writers report a full disk
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or cause
        failure = SaveError(f"{final} could not be written: {reason}; what was there before is unchanged")
        failure.errno = cause.errno
        raise failure from error
    return final
