"""Everything hostile that the harness knows, each case under limits of the kernel: python tests/faults/bombs.py

Prints a line for each case that fell and a count for each kind; the exit status is 1 where any fell. ``--only KIND``
runs one kind, ``--seed`` and ``--rounds`` say which random cases are made and how many of each kind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import small_files
import wrong_types
from limits import run_limited
from template_bombs import BOMBS, HONEST, TALK

from afina.errors import AfinaError
from afina.loaders.text.chat_template import ChatTemplate


class Case(NamedTuple):
    name: str
    run: Callable[[], object]
    refused: bool | None  # whether it must be refused; None: that, or accepted
    seconds: int = 5
    megabytes: int = 1024
    count: int = 1  # of files or values that it tries


def templates(seed: int, rounds: int) -> Iterator[Case]:
    for name, source in (BOMBS | HONEST).items():
        load = partial(ChatTemplate, TALK + source, "folder", {"bos_token": "<s>", "eos_token": "</s>"})
        yield Case(name, load, name in BOMBS, 2, 256)


def files(seed: int, rounds: int) -> Iterator[Case]:
    for name, run, refused in small_files.cases():
        yield Case(name, run, refused)


def values(kind: str, seed: int, rounds: int) -> Iterator[Case]:
    for name, run, count in wrong_types.batches(kind, seed, rounds):
        yield Case(name, run, False, 60, count=count)


KINDS: dict[str, Callable[[int, int], Iterator[Case]]] = {"templates": templates, "files": files}
KINDS |= {kind: partial(values, kind) for kind in wrong_types.KINDS}


def fallen(case: Case) -> str | None:
    """What a case did that it must not, or None."""
    outcome = run_limited(case.run, seconds=case.seconds, megabytes=case.megabytes, typed=AfinaError)
    right = {True: ("refused",), False: ("accepted",), None: ("refused", "accepted")}[case.refused]
    if outcome.verdict.startswith(right):
        return None
    return f"{case.name}: {outcome.verdict} ({outcome.seconds:.2f} s, {outcome.megabytes:.0f} MB)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args()
    status = 0
    for kind, cases in KINDS.items():
        if options.only in (None, kind):
            fell = total = 0
            for case in cases(options.seed, options.rounds):
                total += case.count
                if line := fallen(case):
                    fell += (
                        1
                        if case.count == 1
                        else int(line.partition("untyped: FellError: ")[2].split()[0] or case.count)
                    )
                    print(f"  {line}"[:400])
                    status = 1
            print(f"{kind}: {total - fell:,} of {total:,} right", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
