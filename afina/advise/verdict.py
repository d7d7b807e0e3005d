"""From evidence to a verdict and its reasons: a pure decision, whose thresholds docs/advice.md explains."""

from __future__ import annotations

import math
from typing import NamedTuple

from afina.advise.evidence import Evidence, Score
from afina.engine.intervals import Paired, verdict

PROMPT = "don't: a prompt does it"
SIMPLER = "don't: a simpler method does it"
ROWS = "don't: too few or contradictory rows"
COLLECT = "collect more"
LORA = "LoRA"
FULL = "full"
VERDICTS = (PROMPT, SIMPLER, ROWS, COLLECT, LORA, FULL)

SMALLEST_GAIN = 0.02  # of a perfect score: a smaller gain is not worth a model of one's own
UNSURE = 0.06  # of a perfect score: how far below it a score may in truth lie that leaves nothing to gain
MIN_TRAIN, MIN_JUDGE = 16, 8  # rows
MAX_CONTRADICTORY = 0.3  # share of the rows


class Decision(NamedTuple):
    """One of VERDICTS, and the sentences that led to it."""

    verdict: str
    reasons: tuple[str, ...]


def before_training(e: Evidence) -> Decision | None:
    """The decision that needs no training run, or None where training has to show.

    Too few rows to learn from or to judge on; too many that contradict each other; or a score, without training, that
    leaves training less to gain than ``SMALLEST_GAIN``.
    """
    if e.train_rows < MIN_TRAIN or e.judge_rows < MIN_JUDGE:
        return Decision(
            ROWS,
            (
                f"{e.rows} usable rows leave {e.train_rows} to learn from and {e.judge_rows} to judge on; "
                f"{MIN_TRAIN} and {MIN_JUDGE} are the least with which a run can be told from chance",
            ),
        )
    if e.contradictory > MAX_CONTRADICTORY * e.rows:
        return Decision(
            ROWS,
            (
                f"{e.contradictory} of {e.rows} rows have an input that stands elsewhere with another answer: no "
                "method can give both",
            ),
        )
    for found, score in ((PROMPT, e.prompt), (SIMPLER, e.simple[0] if e.simple else None)):
        if score is None or not _signal(e, found):
            continue
        if score.value > (1 - SMALLEST_GAIN) * e.unit and score.low > (1 - UNSURE) * e.unit:
            return Decision(
                found,
                (f"{_told(e, score)}: that leaves less than {_points(e, SMALLEST_GAIN * e.unit)} to gain by training",),
            )
    return None


def decide(e: Evidence) -> Decision:
    """The verdict on a user's rows and base model."""
    early = before_training(e)
    if early is not None:
        return early
    if not e.curve:
        return Decision(ROWS, ("no training run ended with a finite loss, at any rate that was tried",))
    return _by_loss(e) if e.tuned is not None and e.tuned.score is None else _by_score(e)


def better(gain: Paired) -> bool:
    """Whether a difference is above 0 beyond chance."""
    return verdict(gain) == "better"


def _by_loss(e: Evidence) -> Decision:
    """Rows without answers: training is worth it when it makes unseen rows more probable."""
    gain = e.gains["loss"]
    told = f"training lowers the loss on rows it has not seen by {gain.difference:.3f} nats a token ({_range(gain)})"
    if better(gain):
        return _train(e, [told])
    if _beats(e, "all - third"):
        return Decision(COLLECT, (f"{told}, which may be nothing; but more rows help: {_rise(e)}",))
    return Decision(ROWS, (f"{told}: no gain that can be told from chance",))


def _by_score(e: Evidence) -> Decision:
    smallest = SMALLEST_GAIN * e.unit
    known = {
        name
        for name in ("prompt", "simple", "tuned")
        if _beats(e, f"{name} - trivial") and e.gains[f"{name} - trivial"].difference >= smallest
    }
    rises = _beats(e, "all - third")
    tuned = e.tuned.score if e.tuned is not None else None
    assert tuned is not None
    if not known:
        told = (
            f"nothing, neither the base model nor a simple method nor training, does better than "
            f"{_told(e, e.trivial) if e.trivial else 'chance'}, which looks at no input"
        )
        if rises:
            return Decision(COLLECT, (f"{told}; but the score still rises with the rows: {_rise(e)}",))
        return Decision(
            ROWS,
            (
                f"{told}: the rows are too few for this model, or their answers do not follow from their inputs",
                *_loss_fell(e),
            ),
        )
    # The cheapest way that does it now: the prompt, unless a simple method is better by more than the smallest gain.
    ways = [
        ("trivial", SIMPLER, e.trivial),
        ("prompt", PROMPT, e.prompt),
        ("simple", SIMPLER, next(iter(e.simple), None)),
    ]
    name, found, rival = ways[0]
    for way in ways[1:]:
        if way[0] in known and (name == "trivial" or _value(way[2]) - _value(rival) >= smallest):
            name, found, rival = way
    assert rival is not None
    gain = e.gains[f"tuned - {name}"]
    compared = (
        f"{_told(e, tuned)} against {_told(e, rival)}: a difference of "
        f"{_points(e, gain.difference)} ({_range(gain, e)})"
    )
    if better(gain) and gain.difference >= smallest:
        return _train(e, [compared])
    unfinished = _unfinished(e)
    if gain.difference >= smallest:
        return Decision(
            COLLECT,
            (f"{compared}: promising, but {e.scored_rows} rows to judge on cannot tell it from chance", *unfinished),
        )
    if rises and gain.difference + e.gains["all - third"].difference >= smallest:
        return Decision(
            COLLECT,
            (f"{compared}; but {_rise(e)}, and as much again from three times the rows would pass it", *unfinished),
        )
    return Decision(found, (f"{compared}: no gain that is worth training", *unfinished))


def _train(e: Evidence, reasons: list[str]) -> Decision:
    """Training is worth it: with which method, and whether more rows would help besides."""
    difference = e.gains.get("lora - full")
    if difference is not None:
        loss = f"LoRA's loss less full's at each one's best rate: {difference.difference:+.3f} nats a token"
        better = "full is better" if e.method == "full" else "full is no better, and LoRA is cheaper to keep"
        reasons.append(f"{loss} ({_range(difference)}): {better}")
    else:
        reasons.append("LoRA, as full fine-tuning is only tried on small models here")
    if _beats(e, "all - third"):
        reasons.append(f"more rows would help further: {_rise(e)}")
    return Decision(FULL if e.method == "full" else LORA, tuple(reasons))


def _signal(e: Evidence, found: str) -> bool:
    return _beats(e, ("prompt" if found == PROMPT else "simple") + " - trivial")


def _beats(e: Evidence, name: str) -> bool:
    return name in e.gains and better(e.gains[name])


def _value(score: Score | None) -> float:
    return score.value if score is not None else -math.inf


def _unfinished(e: Evidence) -> tuple[str, ...]:
    if e.tuned is None or not e.tuned.falling:
        return ()
    if e.minutes_needed is not None:
        return (
            f"training had time for {e.tuned.steps} of {e.tuned.wanted} steps, and its loss was still falling: this is "
            f"no last word on it; --minutes {e.minutes_needed} would give it all of them",
        )
    return ("the loss was still falling when the run on all rows was over: a longer one may come out better",)


def _loss_fell(e: Evidence) -> tuple[str, ...]:
    gain = e.gains.get("loss")
    if gain is None or not better(gain):
        return ()
    return (
        f"its loss does fall, by {gain.difference:.3f} nats a token ({_range(gain)}): it learns how answers look, not "
        "which one is right; a larger model may do better",
    )


def _told(e: Evidence, score: Score) -> str:
    return f"{score.name} scores {score.value:.3g} ({score.low:.3g} to {score.high:.3g})"


def _rise(e: Evidence) -> str:
    few, many = e.curve[-2:]
    gain = e.gains["all - third"]
    how = f"{_points(e, gain.difference)}" if many.score is not None else f"{gain.difference:.3f} nats a token"
    return f"from {few.rows} to {many.rows} rows it gained {how} ({_range(gain, e if many.score else None)})"


def _points(e: Evidence, value: float) -> str:
    return f"{100 * value / e.unit:.1f} points"


def _range(gain: Paired, e: Evidence | None = None) -> str:
    low, high = gain.low, gain.high
    if e is None:
        return f"95 % interval {low:.3f} to {high:.3f}"
    return f"95 % interval {100 * low / e.unit:.1f} to {100 * high / e.unit:.1f}"
