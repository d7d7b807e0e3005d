"""How long a report may measure: the end of a run must not wait for it."""

from __future__ import annotations

import math
import time
from pathlib import Path

# Of the training's time. A report that takes longer would be switched off; what it leaves out, `afina report` measures.
SHARE = 0.05
BYTES_PER_SECOND = 2e8  # of reading weights: a slow disk


class OutOfTime(Exception):
    """What is being measured takes longer than there is time."""


class Budget:
    """Seconds from now on; None: as long as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def limited(self) -> bool:
        return not math.isinf(self.end)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def reserve(self, seconds: float) -> None:
        """Keep so much of the time for what comes after."""
        self.end -= seconds

    def poll(self) -> None:
        """Raise OutOfTime when the time is over."""
        if self.left < 0:
            raise OutOfTime

    def need(self, seconds: float) -> None:
        """Raise OutOfTime where less is left than something will take."""
        if self.left < seconds:
            raise OutOfTime


def reading_seconds(*paths: Path) -> float:
    """How long it may take to read the weights in files and folders."""
    files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
    weights = (file for file in files if file.suffix in (".safetensors", ".gguf") and file.is_file())
    return sum(file.stat().st_size for file in weights) / BYTES_PER_SECOND
