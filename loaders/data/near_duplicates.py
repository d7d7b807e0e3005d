"""Rows that say nearly the same, among any number of them, in little memory: MinHash, banding, and an exact check.

A text is the set of its pieces of five characters, white space and case aside, and two texts are as similar as the
Jaccard index of their sets: shared pieces over all pieces. MinHash (Broder 1997) makes of a set a few numbers of which
two sets share about that part. Rows that agree in a whole band of them are candidates (locality-sensitive hashing:
Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3), and the similarity of candidates is computed
from their texts, which wait in a file on the disk.

A pair is near when the prompts are that similar, and the answers too; a short answer (a label) must be the same, and
so must all numbers, since "a pass for 3 days" and "a pass for 5 days" are two facts. And they must be that similar both
with and without the pieces that a tenth of the rows have: an instruction that stands in all of them, say, would make
everything similar, and what little is left of a row of common words would make it similar to anything.
"""

from __future__ import annotations

import os
import re
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIMILARITY = 0.8
PIECE = 5  # characters
BANDS, BAND = 16, 5  # at a similarity of 0.8 a pair is missed once in 600 times, at 0.5 it is a candidate in 40 %
MARGIN = 0.16  # of the estimate from 80 hashes, whose standard error is 0.045 at 0.8
NEIGHBOURS = 8  # candidates of a row in a band, before it, besides the band's first row
LONGEST = 1 << 16  # characters of a text that are compared
SHORT_ANSWER = 40  # characters: as long as this, an answer must be the same
COMMON, SAMPLE, ENOUGH = (
    0.1,
    4096,
    50,
)  # pieces that so many of a sample of rows have count for nothing; fewer rows: all
BATCH = 1 << 17  # characters hashed at once; their arrays fit a cache
PAIRS = 1 << 14  # pairs whose signatures are compared at once

_NUMBER = re.compile(r"\d+")
_TABLE = 1 << 22  # places of the table of common pieces: a few thousand in four million hit another one in 1000 times
Hashes = NDArray[np.uint32]


class Pairs(NamedTuple):
    """Pairs of rows, (N,) int64 each, ``later`` > ``earlier``, and their similarity (N,) float32."""

    later: NDArray[np.int64]
    earlier: NDArray[np.int64]
    similarity: NDArray[np.float32]

    def where(self, mask: NDArray[np.bool_]) -> Pairs:
        """Those of the pairs for which the mask (N,) is true."""
        return Pairs(self.later[mask], self.earlier[mask], self.similarity[mask])

    @classmethod
    def none(cls) -> Pairs:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


class Texts:
    """Texts of rows in a nameless file on the disk, two bytes a character, and what of them stays in memory (20 bytes
    a row). Rows are numbered as they are added. Close it, or use it as a context."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: where the file lies (default: the system's for such files). Raises OSError."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it is the context itself)
        self._prompt, self._answer = array("i"), array("i")  # lengths in UTF-16 units
        self._facts = array("I"), array("I")  # hashes of the numbers and of the answer
        self._end = 0
        self._starts = array("q")

    def __len__(self) -> int:
        return len(self._prompt)

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, prompt: str, answer: str) -> None:
        """Add a row. A row that is one text is a prompt without an answer."""
        prompt, answer = (" ".join(text[:LONGEST].casefold().split()) for text in (prompt, answer))
        numbers = zlib.crc32(" ".join(_NUMBER.findall(f"{prompt}\n{answer}")).encode())
        # Each text has a piece at least, so that none is an empty set.
        parts = [text.ljust(PIECE).encode("utf-16-le", "replace") if text else b"" for text in (prompt, answer)]
        if not any(parts):
            parts[0] = " ".ljust(PIECE).encode("utf-16-le")
        self._starts.append(self._end)
        self._end += self._file.write(parts[0] + parts[1]) // 2
        self._prompt.append(len(parts[0]) // 2)
        self._answer.append(len(parts[1]) // 2)
        self._facts[0].append(numbers)
        self._facts[1].append(zlib.crc32(answer.encode(errors="replace")))

    def select(self, rows: NDArray[np.int64]) -> Selection:
        """The texts of some rows, by rising number; texts added later are not among them."""
        self._file.flush()
        lengths = np.stack([np.asarray(self._prompt)[rows], np.asarray(self._answer)[rows]], axis=1)
        characters = np.memmap(self._file, np.uint16, "r", shape=(self._end,)) if self._end else np.empty(0, np.uint16)
        numbers, answers = (np.asarray(fact)[rows] for fact in self._facts)
        return Selection(characters, np.asarray(self._starts)[rows], lengths, numbers, answers)


class Selection(NamedTuple):
    """The texts of N rows: ``characters`` (UTF-16 units on the disk), where each row's ``starts`` (N,) among them, the
    ``lengths`` of its prompt and its answer (N, 2), and hashes of its ``numbers`` and its ``answers`` (N,)."""

    characters: NDArray[np.uint16]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    numbers: NDArray[np.uint32]
    answers: NDArray[np.uint32]


class Pieces(NamedTuple):
    """Hashed pieces of the texts of rows: (P,) uint32, and of each its part, twice the row's place plus 0 for the
    prompt and 1 for the answer: (P,) int32, rising."""

    hashes: Hashes
    parts: NDArray[np.int32]


class NearDuplicates:
    """The near-duplicates among the rows of a selection: `pairs` finds them.

    Memory: 190 bytes a row besides the texts' 20, and some MB. The same texts and ``seed`` give the same pairs.
    """

    def __init__(self, texts: Selection, *, similarity: float = SIMILARITY, seed: int = 0) -> None:
        self.texts, self.similarity = texts, similarity
        # Raw bits of a bit generator are the same in every version of numpy.
        raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(2 * BANDS * BAND).astype(np.uint32)
        self.factors, self.masks = raw[: BANDS * BAND] | np.uint32(1), raw[BANDS * BAND :]
        self.common = np.zeros(_TABLE, np.bool_)

    def pairs(self) -> Pairs:
        """Return pairs of near-duplicates, by the later row. Of many that are near one another not all pairs are
        there, but each row is in one with an earlier one of them."""
        rows = len(self.texts.starts)
        if rows < 2:
            return Pairs.none()
        self.common = self._common()
        signatures = np.empty((rows, BANDS * BAND), np.uint16)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:

            def sign(batch: slice) -> None:
                signatures[batch] = self._signatures(batch)

            for _ in pool.map(sign, self._batches()):
                pass
            candidates = _candidates(signatures, self.texts.numbers, self.similarity - MARGIN)
            found = list(pool.map(self._compared, self._parcels(candidates)))
        later, earlier, similarity = (np.concatenate(columns) for columns in zip(Pairs.none(), *found))
        order = np.lexsort((earlier, later))
        return Pairs(later[order], earlier[order], similarity[order])

    def _batches(self) -> Iterator[slice]:
        starts, at = self.texts.starts, 0
        while at < len(starts):
            end = max(at + 1, int(np.searchsorted(starts, starts[at] + BATCH)))
            yield slice(at, end)
            at = end

    def _parcels(self, candidates: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The pairs, later * rows + earlier, in parcels of about BATCH characters, or of one pair."""
        pairs = np.stack(np.divmod(candidates, len(self.texts.starts)))
        sizes = np.zeros(len(candidates), np.int64)
        for rows in pairs:
            sizes += self.texts.lengths[rows].sum(axis=1)
        parcel = np.cumsum(sizes) // BATCH
        for part in np.split(pairs, np.flatnonzero(np.diff(parcel)) + 1, axis=1):
            if part.size:
                yield part[0], part[1]

    def _common(self) -> NDArray[np.bool_]:
        """A table of the pieces that many of a sample of rows have."""
        table = np.zeros(_TABLE, np.bool_)
        rows = len(self.texts.starts)
        if rows < ENOUGH:
            return table
        sample = np.unique(np.linspace(0, rows - 1, SAMPLE).astype(np.int64))
        counts = np.zeros(_TABLE, np.uint16)
        for at in range(0, len(sample), 8):
            hashes, parts = self._pieces(sample[at : at + 8], rare=False)
            places = np.unique(((parts >> 1).astype(np.int64) << 32) | (hashes % _TABLE)) & 0xFFFFFFFF
            np.add.at(counts, places, 1)
        return counts > COMMON * len(sample)

    def _pieces(self, rows: NDArray[np.int64], *, rare: bool) -> Pieces:
        """The pieces of some rows; ``rare``: without the common ones, but with all of a part that has no others."""
        texts = self.texts
        lengths = texts.lengths[rows].reshape(-1).astype(np.int64)  # prompt, answer, prompt, ...
        starts = np.repeat(texts.starts[rows], 2)
        starts[1::2] += lengths[::2]
        held = np.flatnonzero(lengths)
        lengths, starts = lengths[held], starts[held]
        sizes = lengths - PIECE + 1
        first = np.cumsum(sizes) - sizes
        places = np.arange(int(sizes.sum())) + np.repeat(starts - first, sizes)
        characters = texts.characters
        if np.all(rows[1:] - rows[:-1] == 1):  # one stretch of the file is read faster than its characters by number
            characters = np.asarray(characters[places[0] : places[-1] + PIECE])
            places -= places[0]
        hashes = np.zeros(len(places), np.uint32)
        for offset in range(PIECE):
            hashes *= np.uint32(0x01000193)
            hashes += characters[places + offset] if offset else characters[places]
        parts = np.repeat(held, sizes).astype(np.int32)
        hashes = _mixed(hashes ^ ((parts & 1).astype(np.uint32) * np.uint32(0x9E3779B9)))
        keep = ~self.common[hashes % _TABLE] if rare else np.ones(len(hashes), np.bool_)
        if not keep.all():
            keep |= np.repeat(~np.logical_or.reduceat(keep, first), sizes)
            hashes, parts = hashes[keep], parts[keep]
        return Pieces(hashes, parts)

    def _signatures(self, batch: slice) -> NDArray[np.uint16]:
        """The MinHash signatures of some rows, (rows, hashes), 16 bits of each minimum."""
        hashes, parts = self._pieces(np.arange(batch.start, batch.stop), rare=True)
        firsts = np.searchsorted(parts, 2 * np.arange(batch.stop - batch.start))
        signatures = np.empty((len(firsts), len(self.factors)), np.uint16)
        turned = np.empty_like(hashes)
        for i, (factor, mask) in enumerate(zip(self.factors, self.masks)):
            np.bitwise_xor(hashes, mask, out=turned)
            np.multiply(turned, factor, out=turned)
            # The low bits of a minimum tell sets apart, the high ones are zeros.
            signatures[:, i] = _mixed(np.minimum.reduceat(turned, firsts)) >> np.uint32(16)
        return signatures

    def _compared(self, pairs: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Pairs:
        """Those of the pairs that are near by their texts, and how similar."""
        later, earlier = pairs
        rows, place = np.unique(np.concatenate(pairs), return_inverse=True)
        later_at, earlier_at = place[: len(later)], place[len(later) :]
        pieces = [self._pieces(rows, rare=True), self._pieces(rows, rare=False)]
        texts = self.texts
        least = np.ones(len(later), np.float32)
        for hashes, parts in pieces[: 1 + self.common.any()]:
            keys = np.unique((parts.astype(np.int64) << 32) | hashes)
            bounds = np.searchsorted(keys, np.arange(2 * len(rows) + 1, dtype=np.int64) << 32)
            sizes = np.diff(bounds)
            for part in (0, 1):
                one, other = 2 * later_at + part, 2 * earlier_at + part
                ours, theirs = (_gathered(keys, bounds[which], sizes[which]) for which in (one, other))
                shared = np.bincount(np.intersect1d(ours, theirs, assume_unique=True) >> 32, minlength=len(later))
                union = sizes[one] + sizes[other] - shared
                least = np.minimum(least, np.where(union > 0, shared / np.maximum(union, 1), 1.0).astype(np.float32))
        short = np.maximum(texts.lengths[later, 1], texts.lengths[earlier, 1]) <= SHORT_ANSWER
        near = (least >= self.similarity) & (~short | (texts.answers[later] == texts.answers[earlier]))
        return Pairs(later[near], earlier[near], least[near])


def kept_rows(rows: int, pairs: Pairs) -> NDArray[np.int64]:
    """Return for each of the rows the kept one that it repeats, or -1 where it is kept itself: (rows,) int64.

    The first of those that are near one another is kept; a row is left out only for one that is kept.
    """
    repeats = np.full(rows, -1, np.int64)
    for later, earlier in zip(pairs.later.tolist(), pairs.earlier.tolist()):
        if repeats[later] < 0 and repeats[earlier] < 0:
            repeats[later] = earlier
    return repeats


def _mixed(hashes: Hashes) -> Hashes:
    """Every bit depends on every other (the last steps of MurmurHash3)."""
    hashes = hashes ^ (hashes >> np.uint32(16))
    hashes *= np.uint32(0x85EBCA6B)
    hashes ^= hashes >> np.uint32(13)
    hashes *= np.uint32(0xC2B2AE35)
    hashes ^= hashes >> np.uint32(16)
    return hashes


def _candidates(signatures: NDArray[np.uint16], numbers: NDArray[np.uint32], least: float) -> NDArray[np.int64]:
    """Return pairs, as later * rows + earlier, that share a band and are similar by their signatures.

    In a band that many rows share, a row is paired with the first of them and with the NEIGHBOURS before it.
    """
    rows = len(signatures)
    found = [np.empty(0, np.int64)]
    for band in range(BANDS):
        key = np.zeros(rows, np.uint32)
        for column in signatures[:, band * BAND : (band + 1) * BAND].T:
            key = _mixed(key * np.uint32(31) + column)
        key ^= _mixed(numbers)  # rows of other numbers are no candidates
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        opens = np.ones(rows, np.bool_)
        opens[1:] = ordered[1:] != ordered[:-1]
        place = np.arange(rows)
        leader = np.maximum.accumulate(np.where(opens, place, 0))
        for back in range(1, NEIGHBOURS + 2):
            before = np.flatnonzero(place - leader >= back)
            other = before - back if back <= NEIGHBOURS else leader[before]
            later, earlier = order[before], order[other]
            # An estimate from the signatures spares most comparisons of texts.
            for at in range(0, len(later), PAIRS):
                one, two = later[at : at + PAIRS], earlier[at : at + PAIRS]
                alike = (signatures[one] == signatures[two]).mean(axis=1) >= least
                found.append(one[alike] * rows + two[alike])
        found = [np.unique(np.concatenate(found))]
    return found[0]


def _gathered(keys: NDArray[np.int64], starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The hashes in keys[start : start + size] of one range after the other, with the range's number above bit 32."""
    places = np.arange(int(sizes.sum())) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return (np.repeat(np.arange(len(sizes)), sizes) << 32) | (keys[places] & 0xFFFFFFFF)
