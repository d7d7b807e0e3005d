"""What the tests leave out of Triton's interpreter changes nothing: each launch finds the language ready, and leaves it
as it was."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from afina.kernels.launch import jit, tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@jit
def _twice(x):
    return x + x


@jit
def _kernel(x, out, BLOCK: tl.constexpr, BROKEN: tl.constexpr):
    """Functions of this file and of Triton's own, each of them called more than once."""
    at = tl.arange(0, BLOCK)
    loaded = _twice(_twice(tl.load(x + at)))
    total = tl.sum(loaded, 0) + tl.sum(loaded * 0, 0)
    tl.store(out + at, tl.where(at < tl.cdiv(BLOCK, 2), loaded, total))
    if BROKEN:
        tl.store(out + at, tl.load(x + tl.arange(0, BLOCK + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_every_launch_is_the_first(dtype: torch.dtype) -> None:
    x = torch.arange(8).to(dtype)
    expected = torch.cat([4 * x[:4], (4 * x).sum().repeat(4)])
    for broken in (False, False, True, False):
        out = torch.zeros_like(x)
        if broken:
            with pytest.raises(InterpreterError, match="power of 2"):
                _kernel[(2,)](x, out, 8, broken)
        else:
            _kernel[(2,)](x, out, 8, broken)
        assert torch.equal(out, expected)


def test_a_launch_leaves_the_language_as_it_was() -> None:
    """But for what functions of Triton's own files replace in theirs, which Triton leaves so."""
    before = dict(inspect.getmembers(tl))
    for _ in range(2):
        _kernel[(1,)](torch.arange(8.0), torch.zeros(8), 8, False)
        after = dict(inspect.getmembers(tl))
        assert not [name for name, found in after.items() if found is not before[name]]


def test_types_are_those_that_triton_makes() -> None:
    shape = [core.constexpr(4), 8]
    first, again, other = (core.block_type(kind, shape) for kind in (tl.float32, tl.float32, tl.int32))
    assert (again.name, again.numel, list(again.shape)) == (first.name, 32, [4, 8])
    assert first == again != other
    assert "fp32" in again.name
    assert "int32" in other.name
    with pytest.raises(TypeError, match="0d"):
        core.block_type(tl.float32, [])
    values = core.tuple([3, again.shape])
    assert str(values.type) == str(core._type_for_tuple_values([3, again.shape]))


def test_a_function_looks_for_what_to_replace_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    plain = interpreter._patch_builtin

    def counted(place: Any, builder: Any, scope: Any) -> None:
        files.append(place)
        plain(place, builder, scope)

    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    found = []
    for _ in range(2):
        files.clear()
        _kernel[(4,)](torch.arange(8.0), torch.zeros(8), 8, False)
        found.append(len(files))
    assert found[0] == found[1] <= 12, "one look at each part of the language for this file and for Triton's own"
