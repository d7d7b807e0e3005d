"""From files of rows to the token sets that a run trains on and is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afina.durable import cache_folder
from afina.errors import DataError
from afina.loaders.data.files import Source
from afina.loaders.data.rows import Row, read_rows
from afina.loaders.data.token_cache import TokenCache
from afina.loaders.data.token_pass import ON_LONG, DataSource, Tokenise, sha256, summary
from afina.loaders.text.tokenizer import Tokenizer


class TokenSet:
    """Rows of token ids, memory-mapped: all of a cache, or those that ``index`` numbers.

    ``lengths`` (tokens) and ``loss_tokens`` (how many of them have a loss): int32 arrays, one value a row.
    ``fingerprint``: SHA-256 of everything that decides the rows and their order. ``source``: where they were read.
    """

    def __init__(self, cache: TokenCache, index: NDArray[Any], fingerprint: str, source: DataSource) -> None:
        self._cache, self._index, self.source = cache, index, source
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        return self._cache.length[self._index]

    @cached_property
    def loss_tokens(self) -> NDArray[np.int32]:
        return self._cache.loss_tokens[self._index]

    def select(self, rows: NDArray[np.integer]) -> TokenSet:
        """The rows of these numbers, in this order, as a set of their own."""
        index = self._index[rows]
        return TokenSet(self._cache, index, sha256(self.fingerprint, "rows", index.tolist()), self.source)

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the ids (T,) int32 of a row and which of them have a loss (T,) bool, never the first."""
        at = self._index[number]
        start = int(self._cache.start[at])
        tokens = slice(start, start + int(self._cache.length[at]))
        return np.asarray(self._cache.ids[tokens], np.int32), np.asarray(self._cache.loss_mask[tokens])

    def where(self, number: int) -> str:
        """The file and line that a row was read from."""
        at = self._index[number]
        return f"{self.source.files[int(self._cache.file[at])]}: line {int(self._cache.line[at])}"

    def made_of(self, records: Sequence[Row]) -> list[int]:
        """Return which rows were made of a row of the files, given as the records that it was read in (of a plain text
        file several, else one): none where it was left out, several where a text was cut into pieces."""
        file = self.source.files.index(records[0].path)
        found = self._cache.file[self._index] == file
        found &= np.isin(self._cache.line[self._index], [record.line for record in records])
        if len(records) == 1:  # the rows of a JSON array may share a line
            found &= self._cache.digest[self._index] == np.array(records[0].digest, "S16")
        return np.flatnonzero(found).tolist()

    def source_rows(self) -> Iterator[Row]:
        """Read the rows of this set again from their files, in the files' order, a row that was split only once."""
        wanted = set(zip(self._cache.file[self._index].tolist(), self._cache.line[self._index].tolist()))
        number = {path: i for i, path in reversed(list(enumerate(self.source.files)))}
        for row in read_rows(self.source.source, **self.source.reading):
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
        lines = [f"{report['data']}: {summary(report)}"]
        if "val_file" in report:
            lines.append(f"{report['val_file']}: {summary(report['val'])}")
        for name in ("train", "dev"):
            numbers = (report[f"{name}_rows"], report[f"{name}_tokens"], report[f"{name}_trained_tokens"])
            lines.append("{}: {:,} rows, {:,} tokens, {:,} of them learnt".format(name, *numbers))
        return "\n".join(lines)


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
    roles: Collection[str] = ("assistant",),
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Data:
    """Return the train and dev rows of ``path`` (a file, a folder, several), tokenised.

    ``on_long`` says what becomes of rows of more than ``max_length`` tokens: "drop", "truncate" (a prompt loses its
    start; rows whose answer does not fit are dropped) or "error". Texts are split into rows of ``max_length`` tokens
    instead, each row starting with the last token of the one before, so that every token is predicted once.
    ``val_file``: dev rows of their own, none of which may be among the others; else ``val_size`` of the rows, at least
    one, chosen by ``seed`` (of plain text files: of the rows they were split into; 0: no dev rows).
    ``roles``: whose turns of a conversation are learnt. ``cache_dir``: in place of AFINA_CACHE. ``progress``: show a
    bar when it takes longer than a second.

    Raises DataError for everything that is wrong with the files or leaves nothing to learn from.
    """
    if on_long not in ON_LONG:
        raise DataError(f"on_long is {on_long!r}: expected one of {', '.join(ON_LONG)}")
    if max_length < 2 or not 0 <= val_size < 1:
        raise DataError(f"max_length {max_length} must be 2 or more, val_size {val_size} at least 0 and below 1")

    chat = tokenizer.chat_template is not None
    reading = {"columns": dict(columns or {}), "skip_bad_lines": skip_bad_lines, "chat": chat, "roles": sorted(roles)}

    try:
        caches = (cache_dir or cache_folder()) / "tokens"
    except RuntimeError as problem:
        raise DataError(f"there is no folder for the token cache ({problem}): set AFINA_CACHE to one") from problem

    def tokens(source: Source) -> tuple[DataSource, TokenCache]:
        data_source = DataSource(source, reading)
        work = Tokenise(data_source, tokenizer, max_length, on_long, train_on_prompt, progress)
        return data_source, work.cache(caches)

    train_source, cache = tokens(path)
    report = dict(cache.report, data=train_source.name)
    if val_file is None:
        dev_source, dev_cache, split = train_source, cache, (val_size, seed)
        train_index, dev_index = split_rows(cache.unit, val_size, seed, train_source.name)
    else:
        dev_source, dev_cache = tokens(val_file)
        split = (0.0, 0)
        _refuse_overlap(cache, dev_cache, train_source.name, dev_source.name)
        ours, theirs = cache.report["schema"], dev_cache.report["schema"]
        if ours != theirs:
            raise DataError(
                f"{dev_source.name}: its rows are {theirs}, those of {train_source.name} are {ours}: the dev loss "
                "would be of another task; bring both into one schema"
            )
        report |= {"val_file": dev_source.name, "val": dev_cache.report}
        train_index, dev_index = np.arange(len(cache.length)), np.arange(len(dev_cache.length))
    train = TokenSet(cache, train_index, sha256(cache.key, "train", *split), train_source)
    dev = TokenSet(dev_cache, dev_index, sha256(dev_cache.key, "dev", *split), dev_source)
    for name, token_set in (("train", train), ("dev", dev)):
        report[f"{name}_rows"] = len(token_set)
        report[f"{name}_tokens"] = int(token_set.lengths.sum(dtype=np.int64))
        report[f"{name}_trained_tokens"] = int(token_set.loss_tokens.sum(dtype=np.int64))
    return Data(train, dev, report)


def permutation(size: int, *seed: int) -> NDArray[np.int64]:
    """A permutation of ``size`` numbers that is the same in every version of numpy.

    numpy promises that for the raw bits of a bit generator, not for `Generator.permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence([number % 2**64 for number in seed])).random_raw(size)
    return np.argsort(raw, kind="stable")


def split_rows(unit: NDArray[Any], val_size: float, seed: int, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Numbers of the train and the dev rows. ``unit``, rising from 0, says which of them were one row in the file:
    those stay on one side. Raises DataError, which ``name`` opens, where there are not enough for two sides."""
    units = int(unit[-1]) + 1
    if units < 2 and val_size:
        raise DataError(f"{name}: only one usable row, and a dev set needs one too: add rows, or name a val_file")
    chosen = np.zeros(units, np.bool_)
    if val_size:
        chosen[permutation(units, seed)[: min(units - 1, max(1, round(units * val_size)))]] = True
    in_dev = chosen[unit]
    return np.flatnonzero(~in_dev), np.flatnonzero(in_dev)


def _refuse_overlap(train: TokenCache, dev: TokenCache, one: str, other: str) -> None:
    both = np.flatnonzero(np.isin(dev.digest, train.digest))
    if len(both):
        count = len(np.unique(dev.unit[both]))
        lines = list(dict.fromkeys(dev.line[both[:1000]].tolist()))
        listed = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        raise DataError(
            f"{other}: {count:,} dev rows are also in {one} (lines {listed}): the dev loss would not be of "
            "unseen rows; remove them from one of the two files, or leave val_file out"
        )
