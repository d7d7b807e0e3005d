"""The problems of a file of rows, each with its name, how bad it is, where it is and how to mend it.

error: training would refuse the file, or the result would be wrong. warning: the result will suffer. note: training
deals with it by itself, or it may be meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afina.loaders.data.check_rows import LISTED, Place, RowFacts, Tally
from afina.loaders.data.near_duplicates import Pairs

SEVERITIES = ("error", "warning", "note")
ENOUGH_ROWS = 20  # below, shares of rows say nothing
ROWS_A_LABEL = 5  # answers are labels when there are so many rows to each of them, on average
RARE = 10  # rows of a label: of fewer, the usual tenth that is held out has none at all on average
IMBALANCE = 10  # times as many rows of one label as of another


@dataclass(frozen=True)
class Problem:
    """One kind of problem. ``places``: the first of them. ``notes``: a few words on some of them. ``more``: figures."""

    name: str
    severity: str
    count: int
    what: str
    mend: str
    places: tuple[Place, ...] = ()
    notes: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``files`` only where the places lie in several."""
        files = [str(place.path) for place in self.places]
        plain = {"name": self.name, "severity": self.severity, "count": self.count}
        plain |= {"lines": [place.line for place in self.places], "what": self.what, "mend": self.mend}
        plain |= {"files": files} if len(set(files)) > 1 else {}
        return plain | ({"notes": list(self.notes)} if self.notes else {}) | dict(self.more)


def at_rows(
    facts: RowFacts, numbers: NDArray[np.int64] | list[int], name: str, severity: str, what: str, mend: str, **more: Any
) -> Iterator[Problem]:
    """The problem of the rows with these numbers, if there are any. ``notes`` among ``more`` are its notes."""
    if len(numbers):
        places = tuple(facts.place(int(number)) for number in numbers[:LISTED])
        notes = tuple(more.pop("notes", ()))[:LISTED]
        yield Problem(name, severity, len(numbers), what, mend, places, notes, more)


def _told(tally: Tally, name: str, severity: str, what: str, mend: str, **more: Any) -> Iterator[Problem]:
    if tally.count:
        yield Problem(name, severity, tally.count, what, mend, tuple(tally.places), tuple(tally.notes), more)


def reading_problems(facts: RowFacts, *, skip_bad_lines: bool, prefix: str = "") -> Iterator[Problem]:
    """Lines that are no rows, rows with nothing in them, rows that the tokenizer or its template refuses."""
    severity = "warning" if skip_bad_lines else "error"
    mend = "mend these lines, or leave them out with --fix or --skip_bad_lines"
    yield from _told(facts.unreadable, f"{prefix}unreadable_rows", severity, "lines that are no row", mend)
    what = "rows that the tokenizer or its chat template refuses"
    yield from _told(facts.refused, f"{prefix}refused_rows", severity, what, "mend or remove them")
    if not prefix:
        what = "rows without anything to learn, which training skips"
        yield from _told(facts.empty, "empty_rows", "note", what, "remove them (--fix does)")


def letter_problems(facts: RowFacts) -> Iterator[Problem]:
    """Characters that are wrong, or that nobody sees."""
    found = facts.texts_with
    what = "rows with letters of a wrong decoder (UTF-8 read as Windows-1252 or Latin-1, as in CafÃ©)"
    mend = f"--fix reads {facts.mendable:,} of them back; write the file in UTF-8 where it was made"
    yield from _told(found["mojibake"], "mojibake", "warning", what, mend, mendable=facts.mendable)
    what = "rows with U+FFFD, which stands for a letter that a decoder lost"
    mend = "take the text from where it was whole; the letter cannot be told any more"
    yield from _told(found["replacement"], "replacement_characters", "warning", what, mend)
    what = "rows with control characters, which training leaves out"
    yield from _told(found["control"], "control_characters", "note", what, "remove them (--fix does)")
    what = "rows with zero-width or direction characters, which are learnt as they are"
    yield from _told(found["invisible"], "invisible_characters", "note", what, "remove them unless they are meant")


def duplicate_problems(facts: RowFacts) -> Iterator[Problem]:
    """Rows that are there twice; training uses the first."""
    numbers = facts.with_fate("duplicates")
    if not len(numbers):
        return
    first: dict[bytes, int] = {}
    wanted = {facts.digest[number] for number in numbers[:LISTED]}
    for number in np.flatnonzero(np.isin(facts.digest, list(wanted))).tolist():
        first.setdefault(facts.digest[number], number)
    notes = [_pair(facts, number, "repeats", first[facts.digest[number]]) for number in numbers[:LISTED]]
    what = "rows that an earlier one has already, which training leaves out"
    yield from at_rows(facts, numbers, "duplicates", "note", what, "remove them (--fix does)", notes=notes)


def _pair(facts: RowFacts, number: int, verb: str, other: int, others: RowFacts | None = None) -> str:
    place, theirs = facts.place(int(number)), (others or facts).place(int(other))
    file = f" of {theirs.path.name}" if theirs.path != place.path else ""
    return f"line {place.line} {verb} line {theirs.line}{file}"


def near_problems(facts: RowFacts, repeats: Mapping[int, int], similarity: Mapping[int, float]) -> Iterator[Problem]:
    """``repeats``: row -> the earlier one that it nearly repeats; ``similarity``: row -> how nearly."""
    numbers = sorted(repeats)
    notes = [f"{_pair(facts, n, 'is near', repeats[n])} ({similarity[n]:.2f})" for n in numbers[:LISTED]]
    what = "rows that nearly repeat an earlier one: the same question and answer but for a few characters"
    mend = "keep one of each (--fix keeps the first): the others weigh as if they were more data"
    yield from at_rows(facts, numbers, "near_duplicates", "warning", what, mend, notes=notes)


def leak_problems(
    facts: RowFacts, dev: RowFacts, exact: NDArray[np.int64], near: Mapping[int, int]
) -> Iterator[Problem]:
    """Rows of a dev file that are among the others. ``exact``: numbers of our rows; ``near``: ours -> the dev row."""
    mend = "remove them from one of the two files (--fix OUT leaves them out of OUT)"
    what = "rows that the dev file has too, so that its loss would not be of unseen rows: training refuses that"
    yield from at_rows(facts, exact, "dev_rows_in_train", "error", what, mend)
    numbers = sorted(near)
    notes = [_pair(facts, number, "is near", near[number], dev) for number in numbers[:LISTED]]
    what = "rows that nearly repeat one of the dev file: its loss will look better than it is"
    yield from at_rows(facts, numbers, "near_dev_rows_in_train", "warning", what, mend, notes=notes)


def split_problems(
    facts: RowFacts, in_dev: NDArray[np.bool_], pairs: Pairs, numbers: NDArray[np.int64]
) -> Iterator[Problem]:
    """Dev rows of the split that nearly repeat a training row. ``numbers``: row numbers of the pairs' places."""
    one, two = numbers[pairs.later], numbers[pairs.earlier]
    apart = in_dev[one] != in_dev[two]
    one, two = one[apart], two[apart]
    other = dict(zip(np.where(in_dev[one], one, two).tolist(), np.where(in_dev[one], two, one).tolist()))
    notes = [_pair(facts, number, "is near", other[number]) for number in sorted(other)[:LISTED]]
    what = "held-out rows that nearly repeat a training row: the dev loss will look better than it is"
    mend = "remove near-duplicates (--fix does), or hold out rows of other sources with --val_file"
    yield from at_rows(facts, sorted(other), "near_dev_rows_in_train", "warning", what, mend, notes=notes)


def answer_problems(facts: RowFacts, usable: NDArray[np.int64], labels: Mapping[str, int]) -> Iterator[Problem]:
    """Contradictions, and what the labels' counts say."""
    prompts, answers = np.asarray(facts.prompt)[usable], np.asarray(facts.answer)[usable]
    order = np.lexsort((usable, answers, prompts))
    prompt, answer = prompts[order], answers[order]
    opens = np.ones(len(order), np.bool_)
    opens[1:] = prompt[1:] != prompt[:-1]
    differs = ~opens
    differs[1:] &= answer[1:] != answer[:-1]
    group = np.cumsum(opens) - 1
    several = (np.bincount(group, differs) > 0)[group] & (prompt != 0)
    places = np.sort(usable[order[several]])
    inputs = int((several & opens).sum())
    what = f"rows of {inputs:,} inputs that are answered in different ways, case and white space aside"
    if labels:
        mend = "decide for one label each, or leave these rows out: no model can learn both"
        yield from at_rows(facts, places, "conflicting_answers", "warning", what, mend, inputs=inputs)
    else:
        mend = "look whether all of them are right: several good answers are fine, contradictions are not"
        yield from at_rows(facts, places, "conflicting_answers", "note", what, mend, inputs=inputs)
    yield from _label_problems(facts, usable, labels)


def labels_of(facts: RowFacts, usable: int) -> dict[str, int]:
    """The answers and their rows, the most frequent first, where they are few and short; else {}."""
    found = facts.labels
    if not found or usable < ENOUGH_ROWS or usable < ROWS_A_LABEL * len(found):
        return {}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _label_problems(facts: RowFacts, usable: NDArray[np.int64], labels: Mapping[str, int]) -> Iterator[Problem]:
    if len(labels) == 1:
        mend = "add rows with other answers: nothing can be learnt but to say this always"
        yield Problem("one_answer", "warning", len(usable), "rows, all with the same answer", mend)
    if len(labels) < 2:
        return
    spellings = defaultdict(list)
    for label in labels:
        spellings[" ".join(label.casefold().split())].append(label)
    several = [group for group in spellings.values() if len(group) > 1]
    if several:
        notes = tuple(", ".join(f"{label!r} ({labels[label]:,})" for label in group) for group in several[:LISTED])
        what, mend = "labels in several spellings, which are learnt as several labels", "write each label in one way"
        yield Problem("label_spellings", "warning", len(several), what, mend, notes=notes)
    most, least = max(labels.values()), min(labels.values())
    if most >= IMBALANCE * least:
        share = most / sum(labels.values())
        what = f"labels; the most frequent has {most:,} rows ({share:.0%}), the rarest {least:,}"
        mend = f"collect more rows of the rare ones; always saying the frequent one is right {share:.0%} of the time"
        yield Problem("label_imbalance", "note", len(labels), what, mend, more={"largest_share": share})
    rare = [label for label, count in labels.items() if count < RARE]
    if rare:
        notes = tuple(f"{label!r} ({labels[label]:,})" for label in rare[:LISTED])
        what = f"labels with fewer than {RARE} rows, too few to be learnt or measured"
        yield Problem(
            "rare_labels", "warning", len(rare), what, "collect more rows of them, or merge labels", notes=notes
        )


def sorted_problems(problems: Iterable[Problem]) -> list[Problem]:
    """The worst first, of equals those that were found first."""
    return sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity))
