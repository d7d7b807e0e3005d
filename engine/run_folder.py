"""The folder a run leaves: who may write in it, what it says about the run, and its metrics.

    with RunFolder(output_dir, resume=..., overwrite=...) as folder:
        ...                                   # load and check everything else
        folder.begin(config.to_dict(), facts, bytes_needed=...)
        if folder.checkpoint: ...             # resuming: where to go on from
        folder.log({"step": 1, "loss": 2.0})

Everything is refused before anything is changed: opening takes the lock and writes nothing else, ``begin`` checks
before it writes, and a folder that was opened but not begun is left as it was found. A run that overwrites another one
grows beside it until ``commit`` (`engine/replacement.py`). Nothing in the folder may be a link.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from afina.durable import REPLACING, WORKING_NAME, read_json, recover, remove, standing, write_text
from afina.engine.checkpoint import CHECKPOINT_NAME, Checkpoint, find_latest
from afina.engine.dev_rows import DEV_ROWS
from afina.engine.replacement import finish, grow_beside, replace_run
from afina.engine.resume_rules import lowered, refuse_differences
from afina.engine.run_lock import LOCK, FolderLock
from afina.engine.settings import to_yaml
from afina.errors import RunError
from afina.inside import open_own

FORMAT = "afina-run-1"
RUN, RECIPE, METRICS, REPORT = "run.json", "recipe.yaml", "metrics.jsonl", "report.html"
OWN_NAMES = {RUN, RECIPE, METRICS, DEV_ROWS, REPORT, "best", "tensorboard"}

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class RunFolder:
    """A run folder that this process holds until ``close``.

    ``root`` is the folder itself, ``path`` where the run is now: there, or in a folder inside while it has not yet
    replaced the one that it overwrites. ``checkpoint`` is where a resumed run goes on (None: from the first step);
    ``skipped`` says in one line each which newer checkpoints were damaged.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Check that a run may go to ``path`` and hold it. Missing folders on the way are made.

        Raises RunError: the path is a file or cannot be written, it holds a run (and neither ``resume`` nor
        ``overwrite``), it holds something else, there is nothing to resume, or another process holds it (named).
        """
        if resume and overwrite:
            raise RunError("--resume and --overwrite contradict each other: continue the run, or replace it")
        self.root = self.path = Path(os.path.abspath(path))
        self.checkpoint: Checkpoint | None = None
        self.skipped: list[str] = []
        self._resume = resume
        self._overwrite = overwrite
        self._begun = False
        self._created: list[Path] = []
        self._lock: FolderLock | None = None
        self._metrics = -1
        try:
            self._check()
            self._make_folders()
            self._lock = FolderLock(self.root)
            self._check()  # again: another process may have come first
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | ValueError):  # ValueError: a path with a null byte
                reason = getattr(error, "strerror", None) or error
                raise RunError(f"{self.path} cannot be used: {reason}; choose another --output_dir") from error
            raise

    def begin(
        self,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        notes: Mapping[str, str] = MappingProxyType({}),
        bytes_needed: int = 0,
        first_bytes: int = 0,
    ) -> None:
        """Write ``recipe.yaml`` and ``run.json``; resuming, find the checkpoint, cut ``metrics.jsonl`` to its step.

        ``config``: every setting, resolved; JSON values. ``facts``: what the run depends on beyond its settings, such
        as hashes of contents. A fact ``NAME_sha256`` stands for the setting NAME when resuming, so that files may move.
        ``notes``: comments on settings, for the recipe. ``bytes_needed``: what the checkpoints and the best model will
        take on disk; ``first_bytes``: the first of each, for which a run that is overwritten makes no room.
        Raises RunError, with nothing changed: too little space; or when resuming, settings or facts that differ, or no
        checkpoint that is whole.
        """
        config, facts = json.loads(json.dumps(config)), json.loads(json.dumps(facts))
        record = self._refuse(config, facts, bytes_needed, first_bytes)
        if record is not None:
            self._recover()  # a checkpoint may lie aside
            self._find_checkpoint()
        here = {"time": now(), "argv": sys.argv, **environment()}
        if record is None:
            record = {"format": FORMAT, "started": here}
        else:
            step = self.checkpoint.step if self.checkpoint else 0
            lower = lowered(record["config"], config)
            record.setdefault("resumed", []).append({"step": step, **here, **({"lowered": lower} if lower else {})})
            record.pop("finished", None)
        self._begun = True
        self._recover()
        if self._overwrite and (self.root / RUN).exists():
            self.path = grow_beside(self.root)
        write_text(self.path / RUN, json.dumps({**record, "config": config, "facts": facts}, indent=1) + "\n")
        write_text(self.path / RECIPE, to_yaml(config, notes))
        self._cut_metrics(self.checkpoint.step if self.checkpoint else -1)
        self._metrics = os.open(self.path / METRICS, APPEND, 0o644)

    def commit(self) -> None:
        """A run that overwrites another one takes its place, now that it has a checkpoint. Raises OSError."""
        if self.path != self.root:
            self.check_place()
            replace_run(self.root, self.path, _is_own)
            self.path = self.root

    def check_place(self) -> None:
        """Raise MovedError where the folder is not where it was any more: call it before each save."""
        if self._lock is not None:
            self._lock.check()

    def check(
        self, config: Mapping[str, Any], facts: Mapping[str, Any], *, bytes_needed: int = 0, first_bytes: int = 0
    ) -> None:
        """Raise what ``begin`` would raise, and change nothing. ``facts`` are looked at only by a run that resumes."""
        config, facts = json.loads(json.dumps(config)), json.loads(json.dumps(facts))
        record = self._refuse(config, facts, bytes_needed, first_bytes)
        names = [path.name for path in self.root.iterdir()]
        aside = any(match[2] == "old" for name in names if (match := WORKING_NAME.fullmatch(name)))
        aside = aside or REPLACING in names
        if record is not None and not aside:
            self._find_checkpoint()

    @property
    def resuming(self) -> bool:
        """Whether there is a run here that goes on: one that was killed before it had a record begins anew."""
        return self._resume and standing(self.root / RUN).exists()

    def recorded(self, setting: str) -> Any:
        """What ``setting`` is in the run that goes on here; None where none does."""
        config = (self._record() or {}).get("config") if self.resuming else None
        return config.get(setting) if isinstance(config, dict) else None

    def _refuse(self, config: Any, facts: Any, bytes_needed: int, first_bytes: int) -> dict[str, Any] | None:
        """Raise RunError for too little space, and for a run that cannot go on like this; return the run's record."""
        free = shutil.disk_usage(self.root).free
        if self._overwrite and first_bytes > free:
            raise RunError(
                f"{self.root}: too little space for the first checkpoint and best model beside the run that is "
                f"overwritten, which goes only then: {free / 1e9:.2f} GB free, {first_bytes / 1e9:.2f} GB needed; "
                "free some, remove that run, or choose another --output_dir"
            )
        free += sum(p.lstat().st_size for p in self.root.rglob("*"))  # what is replaced as the run goes on
        if bytes_needed > free:
            raise RunError(
                f"{self.root}: too little space for the checkpoints and the best model: {free / 1e9:.2f} GB "
                f"free, {bytes_needed / 1e9:.2f} GB needed; free some, lower --save_total_limit, or choose another "
                "--output_dir"
            )
        record = self._record() if self._resume else None
        if record is not None:
            refuse_differences(self.path / RUN, record, config, facts)
        return record

    def _find_checkpoint(self) -> None:
        self.checkpoint, self.skipped = find_latest(self.path)
        if self.checkpoint is None and self.skipped:
            raise RunError(f"{self.path}: no checkpoint is whole; start again with --overwrite ({self.skipped[0]})")

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; it survives a kill. ``step`` is required; NaN and infinity become null.

        Log all lines of step N before ``checkpoint-N`` is saved: resuming keeps the lines up to the checkpoint's step.
        """
        if type(values.get("step")) is not int:
            raise ValueError(f"values must have an integer 'step', got {values.get('step')!r}")
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = (json.dumps(plain) + "\n").encode()
        if (written := os.write(self._metrics, line)) != len(line):
            raise OSError(
                errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(self.path / METRICS)
            )

    def record(self, **values: Any) -> None:
        """Add to ``run.json`` what is known only once the run has begun; NaN and infinity become null."""
        self.check_place()
        known = self._record() or {}
        text = json.dumps({**known, **json.loads(json.dumps(values), parse_constant=lambda _: None)}, indent=1)
        write_text(self.path / RUN, text + "\n")

    def close(self) -> None:
        """Let go of the folder. One that was never started is left as it was found."""
        if self._metrics >= 0:
            os.close(self._metrics)
            self._metrics = -1
        if self._lock is not None:
            if self.path != self.root:  # it never had a checkpoint: the run that it would have replaced stays
                with contextlib.suppress(OSError):
                    remove(self.path)
                self.path = self.root
            self._lock.clear()
        if not self._begun:
            while self._created:
                with contextlib.suppress(OSError):  # someone else put something there: it stays
                    self._created.pop().rmdir()
        if self._lock is not None:
            self._lock.close()  # last, or another run could hold the folder that is removed
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        """Refuse what cannot become, or is not, this run's folder. Changes nothing."""
        path = self.root
        ancestor = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
        if not ancestor.is_dir():
            raise RunError(f"{ancestor} is not a folder; choose another --output_dir")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise RunError(f"{ancestor} is read-only for this user; choose another --output_dir")
        if ancestor != path:
            if self._resume:
                raise RunError(
                    f"there is no run to resume at {path}; check --output_dir, or start one without --resume"
                )
            return
        names = {p.name for p in path.iterdir()}
        links = sorted(name for name in names if (path / name).is_symlink() and (_is_own(name) or name == REPLACING))
        if links and not (self._overwrite and REPLACING not in links):
            raise RunError(
                f"{path / links[0]} is a link: a run writes and reads its own files alone; put what it leads to in its "
                "place, or choose another --output_dir"
            )
        if names & {RUN, REPLACING}:
            self._record()
            if not (self._resume or self._overwrite):
                raise RunError(f"{path} already holds a run: continue it with --resume, replace it with --overwrite")
        elif foreign := sorted(name for name in names if name != LOCK and not WORKING_NAME.fullmatch(name)):
            raise RunError(
                f"{path} is not empty and not a run folder (it has {foreign[0]!r} but no {RUN}); choose another "
                "--output_dir"
            )

    def _record(self) -> dict[str, Any] | None:
        """``run.json``, checked to be ours; None where a run was killed before it had one."""
        path = standing(self.path / RUN)
        if not path.exists():
            return None
        record = read_json(path)
        if record.get("format") != FORMAT:
            raise RunError(
                f"{path} was not written by this version of afina: format {record.get('format')!r:.80}, "
                f"expected {FORMAT!r}; choose another --output_dir"
            )
        return record

    def _make_folders(self) -> None:
        missing = [p for p in (self.root, *self.root.parents) if not p.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self._created.append(folder)

    def _recover(self) -> None:
        finish(self.root, _is_own)
        recover(self.root)

    def _cut_metrics(self, last_step: int) -> None:
        """Keep the whole lines of steps up to ``last_step``: the run repeats the later steps and logs them again."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = []
        with open_own(path) as file:
            lines = file.read().decode(errors="replace").splitlines()
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # half a line, or not ours
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))


def now() -> str:
    """The time in UTC, as ISO 8601 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def environment() -> dict[str, Any]:
    """Versions, machine and the git commit of the working folder, as far as they can be known."""
    versions = {"python": platform.python_version()}
    for name in ("afina", "torch", "triton", "numpy", "tokenizers", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    try:
        git = ["git", "rev-parse", "--verify", "-q", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, check=False).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"versions": versions, "platform": platform.platform(), "host": socket.gethostname(), "git_commit": commit}


def _is_own(name: str) -> bool:
    return name in OWN_NAMES or bool(CHECKPOINT_NAME.fullmatch(name))
