"""``report.html`` of a run: written at the end of training within a budget, and again by ``afina report``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.durable import open_file
from afina.engine.run_folder import REPORT
from afina.errors import RunError
from afina.report.budget import SHARE, Budget
from afina.report.facts import read_run
from afina.report.measure import Measured, measure
from afina.report.page import report_page
from afina.report.sections import training
from afina.report.verdict import Judged, judge


@dataclass(frozen=True)
class Report:
    """A written report: its file, the verdict and what was measured for it."""

    path: Path
    judged: Judged
    found: Measured

    @property
    def line(self) -> str:
        """The verdict in one line."""
        forgot = f"; {self.found.forgetting.line}" if self.found.forgetting else ""
        return f"{self.judged.line}{forgot[:2]}{forgot[2:3].lower()}{forgot[3:]}"

    def to_dict(self) -> dict[str, Any]:
        """What ``afina report --json`` prints."""
        forgotten = self.found.forgetting
        return {
            "report": str(self.path),
            "verdict": self.judged.word,
            "line": self.line,
            "dev": self.judged.to_dict(),
            "forgot": forgotten and forgotten.word,
            "forgetting": forgotten and forgotten.to_dict(),
            "missing": self.found.missing,
        }


def write_report(
    folder: str | Path, *, seconds: float | None = None, device: str | None = None, reference: str | Path | None = None
) -> Report:
    """Write ``report.html`` in a run folder, finished, stopped or running, and return what it says.

    ``seconds``: how long to measure with models (None: all of it). ``device``: where, in place of the run's.
    ``reference``: a text file for the forgetting probe, passages divided by blank lines, in place of the package's.
    Raises RunError where the folder is no run or cannot be written, DataError for a reference that cannot be used.
    """
    facts = read_run(folder)
    judged = judge(facts.dev_rows)
    given = None if reference is None else Path(reference)
    budget, begun = Budget(seconds), time.monotonic()
    curves = training(facts)
    # The page has about as many figures again, so drawing them will take as long, however busy the machine is.
    budget.reserve(time.monotonic() - begun)
    found = measure(facts, budget, device=device, reference=given)
    page = report_page(facts, judged, found, curves)
    path = facts.folder / REPORT
    with open_file(path, error=RunError) as file:
        file.write(page.encode())
    return Report(path, judged, found)


def report_of_training(folder: Path) -> Report:
    """The report at the end of a run, for which no more than ``SHARE`` of the time that the steps took is spent, but
    for the page itself."""
    return write_report(folder, seconds=SHARE * read_run(folder).seconds)
