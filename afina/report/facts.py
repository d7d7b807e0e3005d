"""What a run folder says about its run: everything on the report that needs no model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from afina.durable import read_json, standing
from afina.engine.dev_rows import DevRows, read_dev_rows
from afina.engine.run_folder import FORMAT, METRICS, RUN
from afina.engine.train_config import TrainConfig
from afina.errors import AfinaError, RunError
from afina.inside import open_own

Line = dict[str, Any]


MAX_FIGURE = 1e38  # about the largest number of float32; no axis can be drawn for much larger ones


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder tells it. ``record``: run.json. ``steps`` and ``evaluations``: the lines of metrics.jsonl."""

    folder: Path
    record: dict[str, Any]
    config: TrainConfig
    steps: list[Line]
    evaluations: list[Line]
    dev_rows: DevRows | None

    @property
    def best(self) -> Path:
        return standing(self.folder / "best")

    @property
    def finished(self) -> dict[str, Any]:
        """The figures of a run that came to its end, else nothing."""
        return _object(self.record.get("finished"))

    @property
    def data(self) -> dict[str, Any]:
        """What became of the rows; nothing where the run is of a version that did not say so."""
        return _object(self.record.get("data"))

    @property
    def started(self) -> dict[str, Any]:
        """When, where and with which versions the run began."""
        return _object(self.record.get("started"))

    @property
    def versions(self) -> dict[str, Any]:
        return _object(self.started.get("versions"))

    @property
    def resumed(self) -> list[dict[str, Any]]:
        """The times that it was gone on with: at which step, and which settings it had lower from there on."""
        found = self.record.get("resumed")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    @property
    def contents(self) -> dict[str, Any]:
        """What the run depends on beyond its settings, such as hashes."""
        return _object(self.record.get("facts"))

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in [*self.steps, *self.evaluations]), default=0)

    @property
    def state(self) -> str:
        """How far the run came, in words."""
        if self.finished:
            early = ", early: the dev loss fell no further" if self.finished.get("stopped_early") else ""
            return f"finished after {self.last_step:,} steps{early}"
        total = self.record.get("total_steps")
        of = f" of {total:,}" if isinstance(total, int) else ""
        return f"not finished: step {self.last_step:,}{of}"

    @cached_property
    def seconds(self) -> float:
        """Spent in training steps."""
        return self.total("seconds")

    def total(self, name: str) -> float:
        """The sum of a figure of the steps."""
        return math.fsum(line[name] for line in self.steps if _is_number(line.get(name)))

    def series(self, lines: list[Line], name: str) -> list[tuple[int, float]]:
        """(step, value) of each line that has a number there."""
        return [(line["step"], float(line[name])) for line in lines if _is_number(line.get(name))]

    @property
    def dev_losses(self) -> list[tuple[int, float]]:
        return self.series(self.evaluations, "dev_loss")

    @property
    def best_step(self) -> int | None:
        """The step that the best model was saved at."""
        return next((line["step"] for line in reversed(self.evaluations) if line.get("best") is True), None)

    def dev_loss(self, step: int | None) -> float | None:
        return dict(self.dev_losses).get(-1 if step is None else step)


def read_run(folder: str | Path) -> RunFacts:
    """The facts of a run folder, finished, stopped or still running. Raises RunError where it is none, or damaged."""
    path = Path(folder)
    if path.name == "best" and not (path / RUN).exists() and (path.parent / RUN).is_file():
        path = path.parent
    if not path.is_dir() or not standing(path / RUN).is_file():
        found = "is no run folder" if path.exists() else "does not exist"
        raise RunError(f"{path} {found} (no {RUN} there): give the --output_dir of afina train")
    record = read_json(standing(path / RUN))
    if record.get("format") != FORMAT or not isinstance(record.get("config"), dict):
        raise RunError(f"{path / RUN}: expected a run of format {FORMAT} with its config: is it of another version?")
    try:
        config = TrainConfig(**record["config"])
    except (AfinaError, TypeError) as problem:
        raise RunError(f"{path / RUN}: its config is not one of this version ({problem})") from problem
    lines = _metrics(standing(path / METRICS))
    steps = [line for line in lines if "lr" in line]
    evaluations = [line for line in lines if "lr" not in line]
    return RunFacts(path, record, config, steps, evaluations, read_dev_rows(path))


def _metrics(path: Path) -> list[Line]:
    """The whole lines of ``metrics.jsonl``. A run that was killed, or still runs, may have half a line at the end."""
    if not path.is_file():
        return []
    found = []
    with open_own(path) as file:
        lines = file.read().decode(errors="replace").splitlines()
    for text in lines:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append(line)
    return found


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FIGURE
