"""One streaming pass from files of rows to a token cache: read, clean, drop duplicates, render, tokenise, make fit.

While `tokenizers` encodes a batch (in native threads, without Python's lock), a thread reads, cleans and renders the
next. Ids and masks go straight to the memory-mapped cache: memory does not grow with the file.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from afina.errors import DataError
from afina.loaders.data.files import Source, cut_text, data_files, kind_of_file, source_name, unreadable
from afina.loaders.data.hints import by_kind
from afina.loaders.data.rows import Row, read_rows
from afina.loaders.data.token_cache import CacheError, TokenCache, Writer, open_cache, sweep
from afina.loaders.text.encode import Encoded, encode_rows
from afina.loaders.text.render import Example, Rendered, render_example
from afina.loaders.text.tokenizer import Tokenizer
from afina.streams import say

VERSION = 4  # of what the cache holds: raise it when the same rows would give other tokens
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 19  # what is tokenised at once; more is slower, as it leaves the CPU's caches
COLLECTED = 100_000  # new objects after which Python looks for garbage; a batch of conversations makes 30,000
ON_LONG = ("drop", "truncate", "error")
FATES = {  # what can become of rows besides being used, and how the summary says it
    "bad_lines": "{:,} bad lines skipped ({bad_kinds})",
    "empty": "{:,} empty",
    "duplicates": "{:,} exact duplicates removed",
    "untrained": "{:,} without a token to learn dropped",
    "dropped": "{:,} of more than {max_length:,} tokens dropped (the longest has {longest:,})",
    "truncated": "{:,} cut at the start to {max_length:,} tokens",
    "split": "{:,} split into pieces of {max_length:,} tokens",
}
_SLOT = "\ue000"  # a private-use character: stands for the text to see what is put around it


class NothingLeftError(DataError):
    """There are rows, but none that a model could learn from."""


@dataclass(frozen=True)
class DataSource:
    """Files of rows and how they are read (keywords of `read_rows`)."""

    source: Source
    reading: dict[str, Any]

    @property
    def name(self) -> str:
        return source_name(self.source)

    @property
    def files(self) -> list[Path]:
        return data_files(self.source)


class Watcher(Protocol):
    """Who is told what becomes of each row; the first two in the thread that reads, the others in the one that encodes.

    ``fate``: "duplicates", "bad_lines" (with the reason), "dropped", "truncated", "split" or "untrained".
    """

    def left_out(self, path: Path, line: int, problem: str) -> None:
        """A line that is no row, or, with the problem "", an empty row."""

    def read(self, row: Row) -> None:
        """A row, before anything is done with it."""

    def became(self, row: Row, fate: str, reason: str = "") -> None: ...

    def encoded(self, row: Row, tokens: int) -> None:
        """The length of a row, or of a piece of it, before it is made fit."""

    def kept(self, rows: list[Row]) -> None:
        """Rows that go to the cache, in its order; one that was split comes several times."""


class Digests:
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


@contextmanager
def _few_collections() -> Iterator[None]:
    """Rows are many objects and none refers to itself, but Python looks for such after every 700: a sixth of the time
    that conversations take. In this context it looks once in some batches."""
    before = gc.get_threshold()
    if before[0]:  # else it never looks
        gc.set_threshold(max(before[0], COLLECTED), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass
class Tokenise:
    """How rows become a token cache."""

    source: DataSource
    tokenizer: Tokenizer
    max_length: int
    on_long: str
    train_on_prompt: bool
    progress: bool
    watcher: Watcher | None = None

    def cache(self, parent: Path) -> TokenCache:
        """Return the cache of these rows with these settings in a folder below ``parent``, from disk or built now.

        Where that cannot be, because of who owns it or because nothing can be written, one line says so, and the cache
        is one of this process alone.
        """
        tokenizer = self.tokenizer
        key = sha256(
            VERSION,
            list(self.contents.values()),
            (tokenizer.fingerprint(), tokenizer.bos_token, tokenizer.eos_token, tokenizer.adds_bos),
            (self.max_length, self.on_long, self.train_on_prompt),
            self.source.reading,
        )
        try:
            sweep(parent)
            cache = open_cache(parent / key, tokenizer.vocab_size)
            if cache is None:
                cache = self.build(parent / key)
            else:
                cache.report["cached"] = True
        except CacheError as problem:
            say(f"afina: warning: {problem}; this run's tokens go to a temporary one")
            cache = self.build(None)
        cache.key = key
        return cache

    @cached_property
    def contents(self) -> dict[Path, tuple[str, str]]:
        """Each file's kind and digest."""
        self.stamps = {path: file_stamp(path) for path in self.source.files}
        return {path: (kind_of_file(path), file_digest(path)) for path in self.source.files}

    @cached_property
    def files(self) -> list[Path]:
        """The files that are read: long texts are not compared row by row, so a text file goes in only once."""
        first = {content: path for path, content in reversed(self.contents.items())}
        return [path for path, content in self.contents.items() if content[0] != ".txt" or first[content] == path]

    def build(self, folder: Path | None) -> TokenCache:
        """Read and tokenise the rows, though there may be a cache of them, and return the cache put in ``folder``, or
        one of this process alone. Raises CacheError for what the disk refuses, DataError for what is wrong with the
        rows and for files that changed while they were read."""
        self.read: Counter[str] = Counter()  # counted by the reading thread
        self.fitted: Counter[str] = Counter()  # counted by this one
        self.units = self.position = self.windows = self.longest = 0
        self.carried = np.empty(0, np.int32)
        size, shown = sum(file_stamp(path)[2] for path in self.files), None if self.progress else True
        with (
            Writer(folder, self.tokenizer.vocab_size) as self.writer,
            ThreadPoolExecutor(1) as ahead,
            _few_collections(),
            tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", delay=1, disable=shown) as bar,
        ):
            batches = self._batches(bar.update)
            coming = ahead.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = ahead.submit(next, batches, None)
                self._encode(batch)
            self._refuse_changes()
            counts = self.read + self.fitted
            report: dict[str, Any] = {key: counts[key] for key in ("rows", "usable", *FATES)}
            report |= {"longest": self.longest, "max_length": self.max_length, "cached": False}
            report["schema"] = next(key[7:] for key in counts if key.startswith("schema:"))
            report["unused"] = [key[7:] for key in counts if key.startswith("unused:")]
            report["taken"] = [key[6:] for key in counts if key.startswith("taken:")]
            report["numbers"] = counts["numbers"]
            report["bad_kinds"] = by_kind({key[4:]: counts[key] for key in counts if key.startswith("bad:")})
            if not self.units:
                mend = "raise max_length" if report["dropped"] else "add rows with an answer to learn"
                raise NothingLeftError(f"{self.source.name}: no row is left to learn from ({summary(report)}): {mend}")
            return self.writer.commit(report)

    def _refuse_changes(self) -> None:
        """Raise DataError unless the files are what their digests, and so the cache's name, were taken of."""
        for path in self.files:
            if (file_stamp(path), file_digest(path)) != (self.stamps[path], self.contents[path][1]):
                raise DataError(f"{path}: changed while it was being read: run it again when nothing writes to it")

    def _batches(self, progress: Callable[[int], object]) -> Iterator[list[tuple[Rendered, Row, bool]]]:
        """Read, drop duplicates, render; in a thread of its own. True: the text goes on in the next item."""
        self.digests, self.inside, self.so_far = Digests(), False, b""
        self.head, _, self.tail = render_example(self.tokenizer, Example(text=_SLOT)).text.partition(_SLOT)
        rows: list[Row] = []
        size = 0
        watcher = self.watcher
        left_out = watcher.left_out if watcher is not None else None
        reading = self.source.reading
        for row in read_rows(self.files, **reading, counts=self.read, progress=progress, left_out=left_out):
            if watcher is not None:
                watcher.read(row)
            rows.append(row)
            size += row.size
            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                items = self._rendered(rows)
                # One text can be many times a batch: its pieces are handled in several.
                step = max(1, len(items) * 2 * BATCH_BYTES // max(size, BATCH_BYTES))
                yield from (items[start : start + step] for start in range(0, len(items), step))
                rows, size = [], 0
        yield self._rendered(rows)

    def _rendered(self, rows: list[Row]) -> list[tuple[Rendered, Row, bool]]:
        items = []
        for row, new in zip(rows, self.digests.add([row.digest for row in rows])):
            first, self.inside = not self.inside, row.more
            if not first:  # what is compared of a long document is all of it up to here, not a piece
                row.digest = hashlib.blake2b(self.so_far + row.digest, digest_size=16).digest()
            self.so_far = row.digest
            if not new and first and not row.more:
                self.read["duplicates"] += 1
                self._became(row, "duplicates")
            elif (text := row.example.text) is None:
                try:
                    items.append((row.rendered(self.tokenizer), row, False))
                except DataError as problem:  # a chat template may refuse roles that do not alternate, say
                    if not self.source.reading["skip_bad_lines"]:
                        raise
                    self.read.update({"bad_lines": 1, "bad:refused by the chat template": 1})
                    self._became(row, "bad_lines", str(problem))
            else:
                pieces = cut_text(text)
                for number, piece in enumerate(pieces, 1):
                    last = number == len(pieces) and not row.more
                    piece = self.head * (first and number == 1) + piece + self.tail * last
                    items.append((Rendered(piece, ((0, len(piece)),)), row, not last))
        return items

    def _encode(self, batch: list[tuple[Rendered, Row, bool]]) -> None:
        """Tokenise a batch, make its rows fit, write them."""
        try:
            encoded = encode_rows(self.tokenizer, [rendered for rendered, _, _ in batch])
        except DataError:  # a row holds what no token spells: find it
            batch = [item for item in batch if self._spellable(item)]
            encoded = encode_rows(self.tokenizer, [rendered for rendered, _, _ in batch])
        if not batch:
            return
        rows, first = [row for _, row, _ in batch], np.ones(len(batch), np.bool_)
        if self.watcher is not None:
            for row, tokens in zip(rows, encoded.lengths.tolist()):
                self.watcher.encoded(row, tokens)
        longest = int(encoded.lengths.max())
        if longest > self.max_length or not encoded.lengths.all() or len(self.carried) or any(x[2] for x in batch):
            encoded, rows, first = self._fitted(batch, encoded)
            if not rows:
                return
        else:
            self.longest = max(self.longest, longest)
        lengths, loss_mask = encoded.lengths, encoded.trained
        if self.train_on_prompt:
            loss_mask[:] = True
        starts = np.cumsum(lengths) - lengths
        loss_mask[starts] = False  # nothing predicts the first token of a row
        loss_tokens = np.add.reduceat(loss_mask, starts, dtype=np.int32)
        keep = loss_tokens > 0
        kept, lengths = np.repeat(keep, lengths), lengths[keep]
        number = {path: i for i, path in enumerate(self.source.files)}
        # The rows that a plain text file is split into go to train or dev one by one, else a book would go as a whole.
        apart = np.array([new or kind_of_file(row.path) == ".txt" for new, row in zip(first.tolist(), rows)])[keep]
        self.writer.append(
            {
                "ids": encoded.ids[kept],
                "loss_mask": loss_mask[kept],
                "start": self.position + np.cumsum(lengths) - lengths,
                "length": lengths,
                "loss_tokens": loss_tokens[keep],
                "file": np.array([number[row.path] for row in rows])[keep],
                "line": np.array([row.line for row in rows])[keep],
                "unit": self.units + np.cumsum(apart) - 1,
                "digest": np.array([row.digest for row in rows], "S16")[keep],
            }
        )
        if self.watcher is not None:
            self.watcher.kept([row for row, used in zip(rows, keep) if used])
            for row, used in zip(rows, keep):
                if not used:
                    self._became(row, "untrained")
        self.position += int(lengths.sum())
        self.units += int(apart.sum())
        self.fitted["usable"] += int(first[keep].sum())
        self.fitted["untrained"] += int((~keep).sum())

    def _fitted(
        self, batch: list[tuple[Rendered, Row, bool]], encoded: Encoded
    ) -> tuple[Encoded, list[Row], NDArray[np.bool_]]:
        """What is written of a batch that is not written as it is: its pieces, the row of each, which begin a row."""
        fitted: list[tuple[NDArray[np.int32], NDArray[np.bool_], Row, bool]] = []
        for (_, row, more), ids, loss_mask in zip(batch, *encoded.rows()):
            if row.example.text is not None and (more or len(self.carried) or len(ids) > self.max_length):
                fitted += self._windows(row, more, ids)
                continue
            self.longest = max(self.longest, len(ids))
            if len(ids) > self.max_length:
                ids, loss_mask = self._shorten(row, ids, loss_mask)
            if len(ids):
                fitted.append((ids, loss_mask, row, True))
        if not fitted:
            return encoded, [], np.zeros(0, np.bool_)
        all_ids, masks, rows, first = zip(*fitted)
        lengths = np.fromiter(map(len, all_ids), np.int64, len(fitted))
        return Encoded(np.concatenate(all_ids), np.concatenate(masks), lengths), list(rows), np.array(first)

    def _spellable(self, item: tuple[Rendered, Row, bool]) -> bool:
        """Whether the tokenizer has tokens for all of a row; the row's error, or a bad line to count, where not."""
        rendered, row, _ = item
        try:
            encode_rows(self.tokenizer, [rendered])
        except DataError as problem:
            if not self.source.reading["skip_bad_lines"]:
                raise DataError(f"{row.where}: {problem}") from problem
            self.fitted.update({"bad_lines": 1, "bad:a character without a token": 1})
            self._became(row, "bad_lines", str(problem))
            return False
        return True

    def _became(self, row: Row, fate: str, reason: str = "") -> None:
        if self.watcher is not None:
            self.watcher.became(row, fate, reason)

    def _shorten(self, row: Row, ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> tuple[Any, Any]:
        """Apply the policy for rows that are too long; a dropped row comes back empty."""
        cut = len(ids) - self.max_length
        if self.on_long == "error":
            raise DataError(
                f"{row.where}: {len(ids):,} tokens, more than max_length {self.max_length:,}: raise max_length, or set "
                "on_long to drop or truncate"
            )
        # Nothing that is learnt may go, nor become the first token, which is never predicted.
        if self.on_long == "drop" or loss_mask[: cut + 1].any():
            self.fitted["dropped"] += 1
            self._became(row, "dropped")
            return ids[:0], loss_mask[:0]
        self.fitted["truncated"] += 1
        self._became(row, "truncated")
        keep = np.arange(len(ids)) >= cut
        if ids[0] == self.tokenizer.bos_id:
            keep[0], keep[cut] = True, False
        return ids[keep], loss_mask[keep]

    def _windows(
        self, row: Row, more: bool, ids: NDArray[np.int32]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], Row, bool]]:
        """Cut a text that comes in pieces into rows of max_length tokens; what is left waits for the next piece.

        Each row starts with the last token of the one before, so that every token is predicted once.
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
            if self.windows > 1:
                self.fitted["split"] += 1
                self._became(row, "split")
            self.windows = 0


def summary(report: Mapping[str, Any]) -> str:
    """What became of the rows, in one line."""
    parts = [f"{report['rows']:,} rows of {report['schema']}, {report['usable']:,} usable"]
    parts += [text.format(report[key], **report) for key, text in FATES.items() if report[key]]
    parts += [f"{report['numbers']:,} numbers or true/false taken as their text"] if report["numbers"] else []
    parts += report["taken"]
    parts += [f"not used: {', '.join(report['unused'])}"] if report["unused"] else []
    return "; ".join(parts + ["tokens taken from the cache"] * report["cached"])


def sha256(*facts: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise unreadable(path, problem) from problem


def file_stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from another one of the same name, and from itself at another time."""
    try:
        facts = os.stat(path)
    except OSError as problem:
        raise unreadable(path, problem) from problem
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
