"""Quantisation in blocks: the dynamic code is that of bitsandbytes, and every value takes the nearest in its block."""

from __future__ import annotations

import json

import pytest
import torch
from golden_nf4 import GOLDEN, digest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import DEVICE, DRAWN, draw

from afina.kernels.blockwise import dynamic_code, from_blocks, midpoints, to_blocks


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_code(signed: bool) -> None:
    code = dynamic_code(signed, DEVICE)
    assert digest(code) == json.loads(GOLDEN.read_text())["dynamic_codes"]["signed" if signed else "unsigned"]
    assert code.shape == (256,)
    assert (code[1:] > code[:-1]).all()
    assert 0.0 in code
    assert code[-1] == 1


@DRAWN
@given(
    count=st.sampled_from([0, 1, 15, 16, 17, 100]), size=st.sampled_from([1, 16, 64]), signed=st.booleans(),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)  # fmt: skip
def test_every_value_takes_the_nearest_code(count: int, size: int, signed: bool, scale: float) -> None:
    values = draw(count, dtype=torch.float32).to(DEVICE) * scale
    if not signed:
        values = values.abs()
    code = dynamic_code(signed, DEVICE)
    codes, absmax = to_blocks(values, midpoints(code), size)
    blocks = -(-count // size)
    assert codes.shape == (blocks, size)
    assert absmax.shape == (blocks,)
    got = from_blocks(codes.view(-1)[:count], absmax, code, size)
    for start in range(0, count, size):
        block = values[start : start + size].double()
        largest = block.abs().max()
        assert absmax[start // size] == largest
        nearest = (block[:, None] - code.double() * largest).abs().min(dim=1).values
        held = got[start : start + size].double()
        # A value is scaled by a rounded reciprocal and compared with a rounded midpoint, and its code times absmax is
        # rounded: four roundings of half an eps, some of which count twice.
        rounding = 4 * torch.finfo(torch.float32).eps * (block.abs() + held.abs())
        assert ((held - block).abs() <= nearest + rounding).all()


def test_zeros_and_denormal_blocks_stay_finite() -> None:
    values = torch.tensor([0.0, 0.0, 1e-42, -1e-42, 3.0, -1.0], device=DEVICE)
    code = dynamic_code(True, DEVICE)
    codes, absmax = to_blocks(values, midpoints(code), 2)
    got = from_blocks(codes.view(-1), absmax, code, 2)
    assert got.isfinite().all()
    assert torch.equal(got[:2], values[:2])
    assert (got[2:4].abs() <= 1e-42).all()
    assert (got[4:] - values[4:]).abs().max() <= 3.0 * (code[1:] - code[:-1]).max() / 2
