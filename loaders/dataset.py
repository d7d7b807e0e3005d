"""From files of rows to token sets: read, clean, drop duplicates, render, tokenise once, and split off a dev set.

One streaming pass: while `tokenizers` encodes a batch (in native threads, without Python's lock), a thread reads,
cleans and renders the next. Ids and masks go straight to the memory-mapped cache: memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from afina.errors import DataError
from afina.loaders.files import Source, cut_text, data_files, source_name, unreadable
from afina.loaders.render import Example, Rendered, encode_rendered, render_example
from afina.loaders.rows import Row, read_rows
from afina.loaders.token_cache import TokenCache, Writer, cache_folder, open_cache
from afina.loaders.tokenizer import Tokenizer

VERSION = 1  # of what the cache holds: raise it when the same rows would give other tokens
BATCH_ROWS, BATCH_CHARACTERS = 1024, 1 << 18  # what is tokenised at once
_SLOT = "\ue000"  # a private-use character: stands for the text to see what is put around it
ON_LONG = ("drop", "truncate", "error")


class TokenSet:
    """Rows of token ids, memory-mapped: all of a cache, or those that ``index`` numbers.

    ``lengths``, ``trained_counts`` (labels that are learnt) and ``lines`` (line of the source file): one value a row.
    ``fingerprint``: SHA-256 of everything that decides the rows and their order.
    """

    def __init__(self, cache: TokenCache, index: NDArray[Any], fingerprint: str, origin: _Origin) -> None:
        self._cache, self._index, self._origin = cache, index, origin
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        return self._cache.length[self._index]

    @cached_property
    def trained_counts(self) -> NDArray[np.int32]:
        return self._cache.learnt[self._index]

    @cached_property
    def lines(self) -> NDArray[np.int64]:
        return self._cache.line[self._index]

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the ids (T,) int32 of a row and which are learnt (T,) bool, never the first."""
        at = self._index[number]
        start = int(self._cache.start[at])
        tokens = slice(start, start + int(self._cache.length[at]))
        return np.asarray(self._cache.ids[tokens], np.int32), np.asarray(self._cache.trained[tokens])

    def where(self, number: int) -> str:
        """The file and line that a row was read from."""
        at = self._index[number]
        return f"{self._origin.files[int(self._cache.file[at])]}: line {int(self._cache.line[at])}"

    def source_rows(self) -> Iterator[Row]:
        """Read the rows of this set again from their files, in the files' order, a row that was split only once."""
        wanted = set(zip(self._cache.file[self._index].tolist(), self._cache.line[self._index].tolist()))
        number = {path: i for i, path in reversed(list(enumerate(self._origin.files)))}
        for row in self._origin.rows(Counter()):
            if (number[row.path], row.line) in wanted:
                yield row


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on, and what became of the rows (``report``)."""

    train: TokenSet
    dev: TokenSet
    report: dict[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with any row, their order, the split or the tokenizer."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.dev.fingerprint}".encode()).hexdigest()

    def summary(self) -> str:
        """A few lines on what was read, what was left out and why, and what remains."""
        report = self.report
        files = [_story(report["data"], report)]
        if "val_file" in report:
            files.append(_story(report["val_file"], report["val"]))
        for name in ("train", "dev"):
            numbers = (report[f"{name}_rows"], report[f"{name}_tokens"], report[f"{name}_trained_tokens"])
            files.append("{}: {:,} rows, {:,} tokens, {:,} of them learnt".format(name, *numbers))
        return "\n".join(files)


def _story(name: str, report: Mapping[str, Any]) -> str:
    told = {
        "bad_lines": "{:,} bad lines skipped",
        "empty": "{:,} empty",
        "duplicates": "{:,} exact duplicates removed",
        "untrained": "{:,} without a token to learn dropped",
        "dropped": "{:,} of more than {max_length} tokens dropped",
        "truncated": "{:,} cut at the start to {max_length} tokens",
        "split": "{:,} split into pieces of {max_length} tokens",
    }
    parts = [text.format(report[key], max_length=report["max_length"]) for key, text in told.items() if report[key]]
    parts += [f"not used: {', '.join(report['unused'])}"] if report["unused"] else []
    parts += ["tokens taken from the cache"] if report["cached"] else []
    return "; ".join([f"{name}: {report['rows']:,} rows of {report['schema']}, {report['usable']:,} usable", *parts])


def prepare(
    path: Source,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    on_long: str = "drop",
    train_on_prompt: bool = False,
    val_file: Source | None = None,
    val_size: float = 0.1,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    skip_bad_lines: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Data:
    """Return the train and dev rows of ``path`` (a file, a folder, several), tokenised.

    ``on_long`` says what becomes of rows of more than ``max_length`` tokens: "drop", "truncate" (a prompt loses its
    start; rows whose answer does not fit are dropped) or "error". Texts are split into rows of ``max_length`` tokens
    instead, each row starting with the last token of the one before, so that every token is predicted once.
    ``val_file``: dev rows of their own, none of which may be among the others; else ``val_size`` of the rows, at least
    one, chosen by ``seed`` (of plain text files: of the rows they were split into; 0: no dev rows).
    ``cache_dir``: in place of AFINA_CACHE. ``progress``: show a bar when it takes longer than a second.

    Raises DataError for everything that is wrong with the files or leaves nothing to learn from.
    """
    if on_long not in ON_LONG:
        raise DataError(f"on_long is {on_long!r}: expected one of {', '.join(ON_LONG)}")
    if max_length < 2 or not 0 <= val_size < 1:
        raise DataError(f"max_length {max_length} must be 2 or more, val_size {val_size} at least 0 and below 1")

    def origin(source: Source) -> _Origin:
        return _Origin(
            source, data_files(source), dict(columns or {}), skip_bad_lines, tokenizer.chat_template is not None
        )

    def tokens(origin: _Origin) -> TokenCache:
        folder = (cache_dir or cache_folder()) / "tokens"
        return _Build(origin, tokenizer, max_length, on_long, train_on_prompt, progress).cache(folder)

    first = origin(path)
    cache = tokens(first)
    report = dict(cache.report, data=first.name)
    if val_file is None:
        train_index, dev_index = _split(cache, val_size, seed, first.name)
        train, dev = (
            TokenSet(cache, index, _sha256(cache.folder.name, side, val_size, seed), first)
            for side, index in (("train", train_index), ("dev", dev_index))
        )
    else:
        second = origin(val_file)
        dev_cache = tokens(second)
        _refuse_overlap(cache, dev_cache, first, second)
        report |= {"val_file": second.name, "val": dev_cache.report}
        train, dev = (
            TokenSet(c, np.arange(len(c.length)), _sha256(c.folder.name, "all"), o)
            for c, o in ((cache, first), (dev_cache, second))
        )
    for name, token_set in (("train", train), ("dev", dev)):
        report[f"{name}_rows"] = len(token_set)
        report[f"{name}_tokens"] = int(token_set.lengths.sum(dtype=np.int64))
        report[f"{name}_trained_tokens"] = int(token_set.trained_counts.sum(dtype=np.int64))
    return Data(train, dev, report)


def permutation(size: int, *seed: int) -> NDArray[np.int64]:
    """A permutation of ``size`` numbers that is the same in every version of numpy.

    numpy promises that for the raw bits of a bit generator, not for `Generator.permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence([number % 2**64 for number in seed])).random_raw(size)
    return np.argsort(raw, kind="stable")


def _split(cache: TokenCache, val_size: float, seed: int, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Numbers of the train and the dev rows; what was one row in the file stays on one side."""
    units = int(cache.unit[-1]) + 1
    if units < 2 and val_size:
        raise DataError(f"{name}: only one usable row, and a dev set needs one too: add rows, or name a val_file")
    chosen = np.zeros(units, np.bool_)
    if val_size:
        chosen[permutation(units, seed)[: min(units - 1, max(1, round(units * val_size)))]] = True
    in_dev = chosen[cache.unit]
    return np.flatnonzero(~in_dev), np.flatnonzero(in_dev)


def _refuse_overlap(train: TokenCache, dev: TokenCache, one: _Origin, other: _Origin) -> None:
    both = np.flatnonzero(np.isin(dev.digest, train.digest))
    if len(both):
        count = len(np.unique(dev.unit[both]))
        lines = list(dict.fromkeys(dev.line[both[:1000]].tolist()))
        listed = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        raise DataError(
            f"{other.name}: {count:,} dev rows are also in {one.name} (lines {listed}): the dev loss would not be of "
            "unseen rows; remove them from one of the two files, or leave val_file out"
        )


@dataclass(frozen=True)
class _Origin:
    """Files, and how they are read."""

    source: Source
    files: list[Path]
    columns: dict[str, str]
    skip_bad_lines: bool
    chat: bool

    @property
    def name(self) -> str:
        return source_name(self.source)

    def rows(
        self, counts: Counter[str], *, files: list[Path] | None = None, progress: Callable[[int], object] | None = None
    ) -> Iterator[Row]:
        return read_rows(
            files or self.files,
            columns=self.columns,
            skip_bad_lines=self.skip_bad_lines,
            chat=self.chat,
            counts=counts,
            progress=progress,
        )


@dataclass
class _Batch:
    """Texts ready to be tokenised, for each the row it is (a piece of), and whether the next text continues it."""

    rendered: list[Rendered] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    more: list[bool] = field(default_factory=list)


class _Digests:
    """A set of digests as a few sorted arrays, 16 bytes each: a tenth of what a Python set takes."""

    def __init__(self) -> None:
        self.runs: list[NDArray[np.bytes_]] = []

    def add(self, digests: list[bytes]) -> list[bool]:
        """Add digests and return which of them are new."""
        unique, first = np.unique(np.array(digests, "S16"), return_index=True)
        fresh = np.ones(len(unique), np.bool_)
        for run in self.runs:
            at = np.searchsorted(run, unique)
            at[at == len(run)] = 0
            fresh &= run[at] != unique
        if fresh.any():
            self.runs.append(unique[fresh])
        while len(self.runs) > 1 and len(self.runs[-2]) < 4 * len(self.runs[-1]):
            self.runs[-2:] = [np.sort(np.concatenate(self.runs[-2:]), kind="stable")]
        result = np.zeros(len(digests), np.bool_)
        result[first[fresh]] = True
        return result.tolist()


@dataclass
class _Build:
    """How the rows of some files become a token cache."""

    origin: _Origin
    tokenizer: Tokenizer
    max_length: int
    on_long: str
    train_on_prompt: bool
    progress: bool

    def cache(self, parent: Path) -> TokenCache:
        """Return the cache of these rows with these settings, from disk or built now."""
        tokenizer, origin = self.tokenizer, self.origin
        files = {path: (path.suffix.lower(), _file_digest(path)) for path in origin.files}
        # Long texts are not compared row by row: a text file that is there twice is left out here.
        originals = {content: path for path, content in reversed(files.items())}
        self.files = [path for path, content in files.items() if path.suffix != ".txt" or originals[content] == path]
        key = _sha256(
            VERSION,
            list(files.values()),
            (tokenizer.fingerprint(), tokenizer.bos_token, tokenizer.eos_token, tokenizer.adds_bos),
            (self.max_length, self.on_long, self.train_on_prompt),
            (sorted(origin.columns.items()), origin.skip_bad_lines),
        )
        cache = open_cache(parent / key)
        if cache is not None:
            cache.report["cached"] = True
            return cache
        return self._build(parent / key)

    def _build(self, folder: Path) -> TokenCache:
        self.read: Counter[str] = Counter()
        self.fitted: Counter[str] = Counter()
        self.units = self.position = self.windows = 0
        self.carried = np.empty(0, np.int32)
        size = sum(path.stat().st_size for path in self.files)
        with (
            Writer(folder, self.tokenizer.vocab_size) as self.writer,
            ThreadPoolExecutor(1) as ahead,
            tqdm(
                total=size,
                unit="B",
                unit_scale=True,
                desc="tokenising",
                delay=1,
                disable=None if self.progress else True,
            ) as bar,
        ):
            batches = self._batches(bar.update)
            coming = ahead.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = ahead.submit(next, batches, None)
                self._encode(batch)
            counts = self.read + self.fitted
            report: dict[str, Any] = {
                key: counts[key]
                for key in (
                    "rows",
                    "bad_lines",
                    "empty",
                    "duplicates",
                    "untrained",
                    "dropped",
                    "truncated",
                    "split",
                    "usable",
                )
            }
            report |= {"max_length": self.max_length, "cached": False}
            report["schema"] = next(key[7:] for key in counts if key.startswith("schema:"))
            report["unused"] = [key[7:] for key in counts if key.startswith("unused:")]
            if not self.units:
                raise DataError(self._nothing_left(report))
            return self.writer.commit(report)

    def _batches(self, progress: Callable[[int], object]) -> Iterator[_Batch]:
        """Read, drop duplicates, render; in a thread of its own."""
        rows: list[Row] = []
        self.digests, self.inside, self.so_far = _Digests(), False, b""
        self.head, _, self.tail = render_example(self.tokenizer, Example(text=_SLOT)).text.partition(_SLOT)
        size = 0
        for row in self.origin.rows(self.read, progress=progress, files=self.files):
            rows.append(row)
            size += row.size
            if len(rows) == BATCH_ROWS or size >= BATCH_CHARACTERS:
                yield self._batch(rows)
                rows, size = [], 0
        yield self._batch(rows)

    def _batch(self, rows: list[Row]) -> _Batch:
        batch = _Batch()
        for row, new in zip(rows, self.digests.add([row.digest for row in rows])):
            first, self.inside = not self.inside, row.more
            if not first:  # what is compared of a long document is all of it up to here, not a piece
                row.digest = blake2b(self.so_far + row.digest, digest_size=16).digest()
            self.so_far = row.digest
            if not new and first and not row.more:
                self.read["duplicates"] += 1
            elif (text := row.example.text) is None:
                batch.rendered.append(row.rendered(self.tokenizer))
                batch.rows.append(row)
                batch.more.append(False)
            else:
                pieces = cut_text(text)
                for number, piece in enumerate(pieces, 1):
                    last = number == len(pieces) and not row.more
                    piece = self.head * (first and number == 1) + piece + self.tail * last
                    batch.rendered.append(Rendered(piece, ((0, len(piece)),)))
                    batch.rows.append(row)
                    batch.more.append(not last)
        return batch

    def _encode(self, batch: _Batch) -> None:
        """Tokenise a batch, make its rows fit, write them."""
        fitted: list[tuple[NDArray[np.int32], NDArray[np.bool_], Row, bool]] = []
        for row, more, ids, trained in zip(batch.rows, batch.more, *encode_rendered(self.tokenizer, batch.rendered)):
            if row.example.text is None and len(ids) > self.max_length:
                ids, trained = self._shorten(row, ids, trained)
            if self.train_on_prompt:
                trained[:] = True
            if more or len(self.carried) or len(ids) > self.max_length:
                fitted += self._windows(row, more, ids)
            elif len(ids):
                fitted.append((ids, trained, row, True))
        if not fitted:
            return
        all_ids, masks, rows, new = zip(*fitted)
        lengths = np.fromiter(map(len, all_ids), np.int32, len(fitted))
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        trained = np.concatenate(masks)
        trained[starts] = False  # nothing predicts the first token of a row
        learnt = np.add.reduceat(trained, starts, dtype=np.int32)
        keep = learnt > 0
        self.fitted["untrained"] += int((~keep).sum())
        tokens = np.repeat(keep, lengths)
        lengths = lengths[keep]
        number = {path: i for i, path in enumerate(self.origin.files)}
        self.fitted["usable"] += int(np.array(new)[keep].sum())
        # The rows that a plain text file is split into go to train or dev one by one, else a book would go as a whole.
        apart = np.array([own or row.path.suffix == ".txt" for own, row in zip(new, rows)])[keep]
        units = self.units + np.cumsum(apart, dtype=np.int64) - 1
        self.units += int(apart.sum())
        self.writer.append(
            {
                "ids": np.concatenate(all_ids)[tokens],
                "trained": trained[tokens],
                "start": self.position + np.cumsum(lengths, dtype=np.int64) - lengths,
                "length": lengths,
                "learnt": learnt[keep],
                "file": np.array([number[row.path] for row in rows], np.int32)[keep],
                "line": np.array([row.line for row in rows], np.int64)[keep],
                "unit": units,
                "digest": np.array([row.digest for row in rows], "S16")[keep],
            }
        )
        self.position += int(lengths.sum())

    def _shorten(self, row: Row, ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> tuple[Any, Any]:
        """Apply the policy for rows that are too long; a dropped row comes back empty."""
        cut = len(ids) - self.max_length
        if self.on_long == "error":
            raise DataError(
                f"{row.where}: {len(ids):,} tokens, more than max_length {self.max_length:,}: raise max_length, or set "
                "on_long to drop or truncate"
            )
        # Nothing that is learnt may go, nor become the first token, which is never predicted.
        if self.on_long == "drop" or trained[: cut + 1].any():
            self.fitted["dropped"] += 1
            return ids[:0], trained[:0]
        self.fitted["truncated"] += 1
        keep = np.arange(len(ids)) >= cut
        if ids[0] == self.tokenizer.bos_id:
            keep[0], keep[cut] = True, False
        return ids[keep], trained[keep]

    def _windows(
        self, row: Row, more: bool, ids: NDArray[np.int32]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], Row, bool]]:
        """Cut a text that comes in pieces into rows of max_length tokens; what is left waits for the next piece.

        Each row starts with the last token of the one before.
        """
        ids = np.concatenate([self.carried, ids])
        windows = []
        while len(ids) > self.max_length:
            windows.append(ids[: self.max_length])
            ids = ids[self.max_length - 1 :]
        if not more:
            windows.append(ids)
        self.carried = ids if more else ids[:0]
        for window in windows:
            yield window, np.ones(len(window), np.bool_), row, self.windows == 0
            self.windows += 1
        if not more:
            self.fitted["split"] += self.windows > 1
            self.windows = 0

    def _nothing_left(self, report: Mapping[str, Any]) -> str:
        told = {
            "duplicates": "duplicates",
            "dropped": f"longer than {self.max_length} tokens",
            "untrained": "unlearnable",
        }
        reasons = ", ".join(f"{report[key]:,} {what}" for key, what in told.items() if report[key])
        mend = "raise max_length" if report["dropped"] else "add rows with an answer to learn"
        return f"{self.origin.name}: no row is left to learn from ({report['rows']:,} rows: {reasons}): {mend}"


def _sha256(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise unreadable(path, problem) from problem
