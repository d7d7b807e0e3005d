"""Spilt registers are counted where a kernel reaches for them again and again."""

from __future__ import annotations

import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))

from machine_code import local_accesses

CODES = {
    "no loop but the jump to itself at the end": (
        ("STL [R1], R2", "FADD R3, R3, R4", "LDL R2, [R1]", "BRA 0x30"),
        (2, 4),
    ),
    "a loop from 1 to 2": (("STL [R1], R2", "FADD R3, R3, R4", "@P0 BRA 0x10", "LDL R2, [R1]"), (0, 2)),
    "one whose jump has two conditions": (
        ("STL [R1], R2", "LDL.LU R3, [R1]", "@!P0 BRA P1, 0x10", "EXIT"),
        (1, 2),
    ),
    "an outer loop around an inner one, from 1 to 2": (
        ("LDL R2, [R1]", "FADD R3, R3, R4", "@P0 BRA 0x10", "@P1 BRA 0x0"),
        (0, 2),
    ),
    "two inner loops": (
        ("LDL R3, [R1]", "LDL R2, [R1]", "@P0 BRA 0x10", "STL [R1], R2", "@P0 BRA 0x30", "@P1 BRA 0x0", "EXIT"),
        (2, 4),
    ),
    "a loop of products from 1 to 4, with a wait in it, and its rest moved to 6": (
        ("STL [R1], R2", "HGMMA R2", "@!P0 BRA 0x60", "LDL R2, [R1]", "@P1 BRA 0x10", "EXIT", "@!P0 BRA 0x60",
         "STL [R1], R2", "BRA 0x30"),
        (2, 7),
    ),
    "a loop without products beside one with": (
        ("LDL R2, [R1]", "@P0 BRA 0x0", "HGMMA R2", "@P0 BRA 0x20", "EXIT"),
        (0, 2),
    ),
    "threads that part and meet again at 4, in a loop": (
        ("STL [R1], R2", "BSSY B0, 0x50", "@P0 BRA 0x40", "LDL R2, [R1]", "BSYNC B0", "@P1 BRA 0x10", "EXIT"),
        (1, 5),
    ),
    "a warpgroup's work, where a register says": (
        ("BRX R2 -0x2e0", "LDL R2, [R1]", "@P0 BRA 0x10", "RET.REL.NODEC R4"),
        (1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CODES)
def test_spills_count_where_they_are_repeated_most(name: str) -> None:
    code, count = CODES[name]
    sass = "\n".join(f"        /*{16 * i:04x}*/    {text} ;   /* 0x0 */" for i, text in enumerate(code))
    assert local_accesses(sass) == count
