"""Everything hostile that the harness knows, each case under limits of the kernel: python tests/faults/bombs.py

Prints a line for each case that fell and a count for each kind; the exit status is 1 where any fell. ``--only KIND``
runs one kind, ``--seed`` and ``--rounds`` say which random cases are made and how many.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

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


def templates() -> Iterator[Case]:
    def load(source: str) -> Callable[[], object]:
        return lambda: ChatTemplate(TALK + source, "folder", {"bos_token": "<s>", "eos_token": "</s>"})

    for name, source in (BOMBS | HONEST).items():
        yield Case(name, load(source), name in BOMBS, 2, 256)


KINDS: dict[str, Callable[[int, int], Iterator[Case]]] = {"templates": lambda seed, rounds: templates()}


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
            results = [fallen(case) for case in cases(options.seed, options.rounds)]
            for line in filter(None, results):
                print(line)
                status = 1
            print(f"{kind}: {results.count(None)} of {len(results)} right")
    return status


if __name__ == "__main__":
    sys.exit(main())
