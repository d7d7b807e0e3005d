"""Fine-tuning as a user calls it: the engine's run, and its report."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from afina.engine import train
from afina.engine.train import RunResult
from afina.engine.train_config import TrainConfig
from afina.streams import say


def finetune(
    train_config: TrainConfig | None = None,
    /,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> RunResult:
    """Fine-tune a model on rows of data, return the best one, and write ``report.html`` in the run folder.

    The settings are a ``TrainConfig``, or its fields as keywords. ``resume`` goes on from the newest whole checkpoint
    in ``output_dir``; ``overwrite`` replaces an earlier run there; ``quiet`` prints nothing. The result's metrics have
    the report's verdict: ``report``, ``verdict`` ("better", "worse", "no difference", "unknown"), ``verdict_line``,
    ``forgot`` ("yes", "no", "unclear"; None where it was not measured) and ``report_seconds``.

    Raises AfinaError for anything wrong with the request or its files (before anything is written), NonFiniteError when
    three steps in a row have no finite gradient, Interrupted after a signal, a resumable checkpoint being on disk then.
    """
    result = train.finetune(train_config, resume=resume, overwrite=overwrite, quiet=quiet, **settings)
    return with_report(result, quiet=quiet)


def with_report(result: RunResult, *, quiet: bool) -> RunResult:
    """Write the report of a run that is done. Whatever goes wrong with it, the run is not lost: a line says it."""
    begun = time.perf_counter()
    try:
        from afina.report.report import report_of_training

        report = report_of_training(result.output_dir)
    except (Exception, KeyboardInterrupt) as problem:  # the run is whole on the disk, whatever its report comes upon
        told = " ".join(str(problem).split()) or type(problem).__name__
        if not quiet:
            say(f"no report ({told}); write it with afina report {result.output_dir}")
        found: dict[str, Any] = {"report": None, "verdict": None, "verdict_line": None, "forgot": None}
    else:
        found = {"report": str(report.path), "verdict": report.judged.word, "verdict_line": report.line}
        found["forgot"] = report.found.forgetting and report.found.forgetting.word
    found["report_seconds"] = round(time.perf_counter() - begun, 2)
    return replace(result, metrics={**result.metrics, **found})
