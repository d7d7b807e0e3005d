"""What a file of rows is, and what is wrong with it: the facts that `afina check`, advice and reports are made of.

`check_data` reads the rows with the reader, the renderer and the split of training, so what it says is what training
would do. Everything is plain data; printing it is the caller's.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from afina.durable import cache_folder
from afina.errors import DataError
from afina.loaders.data.check_findings import (
    Problem,
    answer_problems,
    duplicate_problems,
    labels_of,
    leak_problems,
    letter_problems,
    near_problems,
    reading_problems,
    sorted_problems,
    split_problems,
)
from afina.loaders.data.check_rows import RowFacts
from afina.loaders.data.check_tokens import length_problems, loss_tokens, token_problems
from afina.loaders.data.dataset import split_rows
from afina.loaders.data.files import Source, data_files, kind_of_file, source_name
from afina.loaders.data.near_duplicates import SIMILARITY, NearDuplicates, Pairs, Texts, kept_rows
from afina.loaders.data.rows import Row, read_rows
from afina.loaders.data.token_cache import TokenCache
from afina.loaders.data.token_pass import ON_LONG, DataSource, NothingLeftError, Tokenise
from afina.loaders.text.tokenizer import Tokenizer

BINS = 10  # of the histogram of lengths, about


@dataclass
class Findings:
    """What `check_data` found.

    ``rows`` counts every row of the file, ``usable`` those that training uses. ``lengths``, ``loss_tokens``: {"mean",
    "p50", "p95", "max"} of the rows' tokens (characters without a tokenizer) and of those of them that are learnt;
    ``histogram``: (from, to, rows). ``labels``: answer -> rows, the most frequent first, where the answers are few and
    short, else {}. ``split``: rows that training learns from and measures on. ``problems``: the worst first. ``shown``:
    two rows to look at. ``dropped``: the numbers of the rows, in the order of `read_rows`, that a clean file would not
    have, each with the reason.
    """

    data: str
    schema: str
    rows: int
    usable: int
    characters: int
    unit: str
    tokens: int | None = None
    trained_tokens: int | None = None
    lengths: dict[str, float] = field(default_factory=dict)
    loss_tokens: dict[str, float] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    shown: list[Row] = field(default_factory=list, repr=False)
    dropped: dict[int, str] = field(default_factory=dict, repr=False)

    def worst(self) -> str:
        """The severity of the worst problem, "" where there is none."""
        return self.problems[0].severity if self.problems else ""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows themselves, as JSON has it."""
        plain = {name: value for name, value in vars(self).items() if name not in ("shown", "dropped", "problems")}
        return plain | {"problems": [problem.to_dict() for problem in self.problems]}


@dataclass
class _Rows:
    """The rows of one source: their facts, what the reader counted, and their tokens where there is a tokenizer.

    ``refusal``: why training would not start with them.
    """

    facts: RowFacts
    counts: Counter[str]
    cache: TokenCache | None = None
    refusal: str = ""

    @property
    def is_text(self) -> bool:
        """Whether they are long texts, whose pieces are no rows: those are the windows that tokens are split into."""
        return kind_of_file(self.facts.paths[0]) == ".txt"

    @property
    def usable(self) -> NDArray[np.int64]:
        """The numbers of the rows that training uses."""
        fates = ("kept", "truncated", "split") if self.cache or self.refusal else ("",)
        return self.facts.with_fate(*fates)

    @property
    def used(self) -> int:
        """How many rows training uses, of texts those that they are split into."""
        if self.is_text:
            return len(self.cache.length) if self.cache is not None else self.counts["rows"]
        return len(self.usable)

    @property
    def compared(self) -> NDArray[np.int64]:
        """The numbers of the rows whose texts are compared: not exact duplicates, nor what cannot be used at all."""
        numbers = self.facts.with_fate("", "kept", "truncated", "split", "dropped", "untrained")
        return numbers[np.asarray(self.facts.text)[numbers] >= 0]

    def named(self, prefix: str) -> list[str]:
        """What the reader counted by name."""
        return [key[len(prefix) :] for key in self.counts if key.startswith(prefix)]

    @property
    def schema(self) -> str:
        return next(iter(self.named("schema:")), "")


def check_data(
    source: Source,
    tokenizer: Tokenizer | None = None,
    *,
    val_file: Source | None = None,
    max_length: int = 1024,
    on_long: str = "drop",
    train_on_prompt: bool = False,
    val_size: float = 0.1,
    seed: int = 42,
    columns: Mapping[str, str] | None = None,
    skip_bad_lines: bool = False,
    roles: Collection[str] = ("assistant",),
    similarity: float = SIMILARITY,
    unmet: NDArray[np.bool_] | None = None,
    progress: bool = False,
) -> Findings:
    """Return what the rows of ``source`` are and what is wrong with them.

    The settings are those of `afina.loaders.data.dataset.prepare`, and mean the same. Without a ``tokenizer`` lengths
    are in characters, and what needs tokens is left out. ``similarity``: the Jaccard index from which rows are
    near-duplicates (0: they are not looked for). ``unmet``: which token ids the model has not learnt, (vocabulary,)
    bool.

    Memory: some 400 bytes a row, whatever its length; texts and tokens lie in the cache folder meanwhile. Raises
    DataError where nothing can be read: no such file, no row of a known schema.
    """
    if on_long not in ON_LONG:
        raise DataError(f"on_long is {on_long!r}: expected one of {', '.join(ON_LONG)}")
    reading: dict[str, Any] = {"columns": dict(columns or {}), "skip_bad_lines": True, "roles": sorted(roles)}
    reading["chat"] = tokenizer is None or tokenizer.chat_template is not None
    with _working_folder() as folder, Texts(folder) as texts:

        def read(source: Source, name: str) -> _Rows:
            facts = RowFacts(texts if similarity else None, reading["columns"].values(), seed=seed)
            if tokenizer is None:
                return _Rows(facts, _read(source, reading, facts, progress))
            policy = "drop" if on_long == "error" else on_long
            work = Tokenise(
                DataSource(source, reading), tokenizer, max_length, policy, train_on_prompt, progress, facts
            )
            try:
                cache = work.build(folder / name)
            except NothingLeftError as problem:
                return _Rows(facts, work.read, refusal=str(problem))
            return _Rows(facts, work.read, cache)

        rows = read(source, "rows")
        dev = read(val_file, "dev") if val_file is not None else None
        found = _facts(source_name(source), rows, tokenizer)
        problems = [*reading_problems(rows.facts, skip_bad_lines=skip_bad_lines)]
        in_dev = np.zeros(len(rows.facts), np.bool_)
        if rows.refusal:
            problems.append(_refused(rows.refusal))
        elif dev is None and (rows.cache is not None or not rows.is_text):
            try:
                in_dev = _held_out(rows, val_size, seed, found.data)
            except DataError as problem:
                problems.append(_refused(str(problem)))
        elif dev is not None:
            problems += reading_problems(dev.facts, skip_bad_lines=skip_bad_lines, prefix="dev_")
            problems += [_refused(dev.refusal)] if dev.refusal else []
        if tokenizer is not None or not rows.is_text:
            held = int(in_dev.sum())
            found.split = {"train": found.usable - held, "dev": dev.used if dev is not None else held}
        problems += duplicate_problems(rows.facts)
        problems += letter_problems(rows.facts)
        problems += answer_problems(rows.facts, rows.usable, found.labels)
        problems += _similar(rows, dev, texts, similarity, seed, in_dev, found)
        if tokenizer is not None:
            problems += length_problems(rows.facts, max_length=max_length, on_long=on_long)
        if tokenizer is not None and rows.cache is not None:
            problems += token_problems(rows.facts, rows.cache, tokenizer, unmet)
        found.problems = sorted_problems(problems)
    return found


@contextlib.contextmanager
def _working_folder() -> Iterator[Path]:
    """A folder for what lies on the disk meanwhile. Raises DataError."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="check-", dir=cache) as folder:
            yield Path(folder)
    except OSError as problem:
        mend = "free some space, or set AFINA_CACHE to another folder"
        raise DataError(f"{cache}: what the check holds meanwhile cannot be written ({problem}): {mend}") from problem


def _read(source: Source, reading: Mapping[str, Any], facts: RowFacts, progress: bool) -> Counter[str]:
    """Read the rows without a tokenizer, and tell which of them are exact duplicates."""
    counts: Counter[str] = Counter()
    size = sum(path.stat().st_size for path in data_files(source))
    with tqdm(
        total=size, unit="B", unit_scale=True, desc="reading", delay=1, disable=None if progress else True
    ) as bar:
        for row in read_rows(source, **reading, counts=counts, progress=bar.update, left_out=facts.left_out):
            facts.read(row)
    if kind_of_file(facts.paths[0]) != ".txt":  # long texts are not compared piece by piece, nor are they in training
        new = np.zeros(len(facts), np.bool_)
        new[np.unique(facts.digest, return_index=True)[1]] = True
        facts.mark(np.flatnonzero(~new), "duplicates")
    return counts


def _facts(name: str, rows: _Rows, tokenizer: Tokenizer | None) -> Findings:
    """What the rows are."""
    facts, usable = rows.facts, rows.usable
    lengths = np.asarray(facts.tokens if tokenizer is not None else facts.size, np.int64)
    used = lengths[facts.with_fate("", "kept", "truncated", "split", "dropped", "untrained")]
    if rows.is_text:  # the rows of a text are as long as they are cut
        used = np.asarray(rows.cache.length, np.int64) if rows.cache else used[:0]
    found = Findings(
        data=name,
        schema=rows.schema,
        rows=rows.counts["rows"],
        usable=rows.used,
        characters=int(np.asarray(facts.size, np.int64)[usable].sum()),
        unit="characters" if tokenizer is None else "tokens",
        lengths=_spread(used),
        histogram=_histogram(used),
        labels=labels_of(facts, len(usable)),
        taken=rows.named("taken:"),
        unused=rows.named("unused:"),
        shown=facts.shown,
    )
    if rows.cache is not None:
        learnt = np.asarray(rows.cache.loss_tokens, np.int64)
        learnt = learnt if rows.is_text else loss_tokens(facts, rows.cache)[usable]
        found.tokens, found.trained_tokens = int(rows.cache.length.sum(dtype=np.int64)), int(learnt.sum())
        found.loss_tokens = _spread(learnt)
    return found


def _spread(values: NDArray[np.int64]) -> dict[str, float]:
    if not len(values):
        return {}
    p50, p95 = np.percentile(values, (50, 95), method="inverted_cdf")
    return {"mean": round(float(values.mean()), 1), "p50": int(p50), "p95": int(p95), "max": int(values.max())}


def _histogram(values: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(shortest, longest, rows) in at most BINS + 1 steps of one size, which is 1, 2 or 5 times a power of ten."""
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max())
    step = next(s for power in range(12) for digit in (1, 2, 5) if (s := digit * 10**power) * BINS > high - low)
    first = max(0, low - 1) // step
    counts = np.bincount(np.maximum(values - 1, 0) // step - first)
    return [((first + i) * step + 1, (first + i + 1) * step, int(count)) for i, count in enumerate(counts)]


def _held_out(rows: _Rows, val_size: float, seed: int, name: str) -> NDArray[np.bool_]:
    """Which rows training would hold out, by their numbers; of texts, of the rows that they are split into. Raises
    DataError where it would not start."""
    numbers, unit = rows.usable, np.arange(len(rows.usable))
    if rows.cache is not None:
        numbers, unit = np.asarray(rows.facts.cached, np.int64), rows.cache.unit
    dev = split_rows(unit, val_size, seed, name)[1] if len(unit) else np.empty(0, np.int64)
    result = np.zeros(len(unit) if rows.is_text else len(rows.facts), np.bool_)
    result[dev if rows.is_text else numbers[dev]] = True
    return result


def _refused(reason: str) -> Problem:
    return Problem("refused", "error", 1, "reason why training would not start", "as it says", notes=(reason,))


def _similar(
    rows: _Rows,
    dev: _Rows | None,
    texts: Texts,
    similarity: float,
    seed: int,
    in_dev: NDArray[np.bool_],
    found: Findings,
) -> Iterator[Problem]:
    """What is there twice, or nearly so: within the rows, and among the dev rows. Fills ``found.dropped``."""
    facts = rows.facts
    found.dropped |= dict.fromkeys(facts.with_fate("duplicates").tolist(), "duplicates")
    exact = np.empty(0, np.int64)
    if dev is not None:
        exact = rows.usable[np.isin(facts.digest[rows.usable], dev.facts.digest[dev.usable])]
        found.dropped |= dict.fromkeys(exact.tolist(), "dev_rows_in_train")
    pairs, numbers = Pairs.none(), rows.compared if similarity else np.empty(0, np.int64)
    ours = len(numbers)
    if similarity:
        compared = np.asarray(facts.text, np.int64)[numbers]
        if dev is not None:
            numbers = np.concatenate([numbers, dev.compared])
            compared = np.concatenate([compared, np.asarray(dev.facts.text, np.int64)[dev.compared]])
        pairs = NearDuplicates(texts.select(compared), similarity=similarity, seed=seed).pairs()
    inside = pairs.where(pairs.later < ours)
    repeats = kept_rows(ours, inside)
    near = {int(numbers[place]): int(numbers[repeats[place]]) for place in np.flatnonzero(repeats >= 0)}
    degree = {int(numbers[a]): float(s) for a, b, s in zip(*inside) if repeats[a] == b}
    found.dropped |= dict.fromkeys(near, "near_duplicates")
    yield from near_problems(facts, near, degree)
    if dev is None:
        yield from split_problems(facts, in_dev, inside, numbers)
        return
    across = (pairs.later >= ours) & (pairs.earlier < ours)
    leaks = dict(zip(numbers[pairs.earlier[across]].tolist(), numbers[pairs.later[across]].tolist()))
    known = set(exact.tolist())
    leaks = {number: other for number, other in leaks.items() if number not in known}
    found.dropped |= dict.fromkeys(leaks, "near_dev_rows_in_train")
    yield from leak_problems(facts, dev.facts, exact, leaks)
