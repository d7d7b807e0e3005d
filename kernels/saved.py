"""What an op keeps for its backward pass, as each op declares it beside its public function in a function `saved`."""

from __future__ import annotations

from typing import NamedTuple


class Saved(NamedTuple):
    """What one call keeps. The sizes follow from shapes, dtype and backend alone, so nothing need run to know them.

    `tensors`: the op's inputs and outputs, by name, that it keeps as they are; others may keep the same memory, which
    then counts once. `row_bytes`: what it keeps beside them for each row (a token, or a row of a matrix), and `bytes`
    however many rows there are.
    """

    tensors: tuple[str, ...]
    row_bytes: int = 0
    bytes: int = 0
