"""What a text may go on with: what followed when its latest tokens last stood in it.

Texts repeat names, phrases and code. A guess costs little to check: it runs as one more row of the same step, and holds
if the token that the row then chooses by itself is the guessed one (prompt lookup, Saxena 2023; LLMA, Yang et al. 2023,
https://arxiv.org/abs/2304.04487). What a row chooses does not depend on the other rows, so guesses change no text.
"""

from __future__ import annotations

from collections.abc import Sequence

LATEST = 2  # tokens that must have stood there before
SLOW = 0.9  # how much of the rate of right guesses is from before the latest one
LEAST = 0.3  # the rate below which guesses are made only where they cost nothing


class Guesses:
    """The tokens of a row so far, and where each pair of neighbours stood last."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.rate = 0.5
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Take the next token. Only then is it known what follows the ones before."""
        if len(self.ids) >= LATEST:
            self.after[tuple(self.ids[-LATEST:])] = len(self.ids)
        self.ids.append(token)

    def next(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may follow; a text that repeats itself up to its end goes on doing so."""
        at = self.after.get(tuple(self.ids[-LATEST:]))
        if at is None:
            return []
        found, period = self.ids[at : at + count], len(self.ids) - at
        while len(found) < count:
            found.append(found[-period])
        return found

    def was(self, right: bool) -> None:
        """Learn whether a guess was right."""
        self.rate = SLOW * self.rate + (1 - SLOW) * right
