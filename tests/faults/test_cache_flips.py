"""The short form of cache_flips.py, which says at its top how to run the long one."""

from __future__ import annotations

from pathlib import Path

import cache_flips


def test_no_flipped_bit_of_a_token_cache_reaches_a_run(tmp_path: Path) -> None:
    found = cache_flips.count(tmp_path, every=499)
    assert found.keys() == {"made again"}
    assert found["made again"] > 12
