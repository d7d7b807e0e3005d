"""Flip bits of a token cache, one at a time, and count what a run then trains on.

    python tests/faults/cache_flips.py [--every N] [--seed S]      (a few minutes with every bit, N = 1)

A cache of a few rows is made; every Nth bit of its manifest and of its arrays, from a random first one, is flipped, the
rows are asked for again, and the bit is put back. The cache must be made again, with the tokens that it had.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as pytest has it

from tiny_model import tiny_tokenizer

from afina.loaders.data.dataset import Data, prepare

ROWS = '{"prompt": "question %d?", "completion": " answer %d"}\n'


def contents(data: Data) -> list[Any]:
    """All that a run takes from its rows."""
    sets = [data.train, data.dev]
    rows = [(*(array.tolist() for array in rows.row(n)), rows.where(n)) for rows in sets for n in range(len(rows))]
    report = {name: value for name, value in data.report.items() if name != "cached"}
    return [rows, [rows.lengths.tolist() + rows.loss_tokens.tolist() for rows in sets], data.fingerprint, report]


def bits(folder: Path, every: int, first: int) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit) of every Nth bit of a folder's files."""
    number = 0
    for path in sorted(folder.iterdir()):
        for offset in range(path.stat().st_size):
            for bit in range(8):
                if number % every == first:
                    yield path, offset, bit
                number += 1


def count(folder: Path, *, every: int, seed: int = 0) -> Counter[str]:
    """What became of a run after each flip: "made again", "other tokens or counts", "believed", or an error."""
    source, tokenizer = folder / "rows.jsonl", tiny_tokenizer()
    source.write_text("".join(ROWS % (n, n) for n in range(3)))

    def rows() -> Data:
        return prepare(source, tokenizer, max_length=64, val_size=0.4, cache_dir=folder / "cache", progress=False)

    expected = contents(rows())
    (cache,) = (folder / "cache" / "tokens").iterdir()
    found: Counter[str] = Counter()
    for path, offset, bit in bits(cache, every, random.Random(seed).randrange(every)):
        whole = path.read_bytes()
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1 :])
        try:
            data = rows()
            again = "believed" if data.report["cached"] else "made again"
            found[again if contents(data) == expected else "other tokens or counts"] += 1
        except Exception as problem:
            found[type(problem).__name__] += 1
            path.write_bytes(whole)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Flip bits of a token cache and count what becomes of a run.")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(dict(count(Path(place), every=options.every, seed=options.seed)))
