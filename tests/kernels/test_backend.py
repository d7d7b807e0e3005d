"""The choice of a backend, and the document boundaries of a packed batch."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from afina.kernels.activation import swiglu
from afina.kernels.backend import check_floating, check_like, check_shape, choose, document_offsets

X = torch.ones(2, 4)


@pytest.mark.parametrize(("backend", "variable"), [(None, None), (None, ""), (None, "torch"), ("torch", "triton")])
def test_torch_is_chosen(backend: str | None, variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFINA_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("AFINA_BACKEND", variable)
    assert choose("glu", backend, X) == "torch"
    assert swiglu(X, backend=backend).shape == (2, 2)


@pytest.mark.parametrize("name", ["cuda", "Torch"])
def test_others_are_refused_where_they_were_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_BACKEND", "torch")
    with pytest.raises(ValueError, match=f"^backend: expected one of triton, torch, found '{name}'"):
        swiglu(X, backend=name)
    monkeypatch.setenv("AFINA_BACKEND", name)
    with pytest.raises(ValueError, match=f"^AFINA_BACKEND: expected one of triton, torch, found '{name}'"):
        swiglu(X)


def test_triton_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU or in the interpreter; float64 goes to torch unless Triton was asked for by name."""
    x = X.to(DEVICE)
    assert choose("glu", "triton", x) == "triton"
    monkeypatch.setenv("AFINA_BACKEND", "triton")
    assert choose("glu", None, x) == "triton"
    assert choose("glu", None, x.double()) == "torch"
    with pytest.raises(ValueError, match=r"^backend: 'triton' computes in .*, found torch\.float64; use 'torch'"):
        choose("glu", "triton", x.double())


def test_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afina.kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^backend: 'triton' needs a GPU, found a tensor on cpu; use 'torch', or set"):
        choose("glu", "triton", X)
    monkeypatch.setenv("AFINA_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"^AFINA_BACKEND: 'triton' needs a GPU"):
        choose("glu", None, X)


def test_checks_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^x: expected a floating point tensor, found torch\.int64"):
        check_floating("x", torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^x: expected y's dtype torch\.float32, found torch\.float16"):
        check_like("x", X.half(), "y", X)
    with pytest.raises(ValueError, match=r"^x: expected on y's device cpu, found on meta"):
        check_like("x", X.to("meta"), "y", X)
    with pytest.raises(ValueError, match=r"^x: expected shape \(4, 2\), found \(2, 4\)"):
        check_shape("x", X, (4, 2))


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 3], [0, 0, 1, 3, 3]])
def test_document_offsets(offsets: list[int]) -> None:
    assert document_offsets(torch.tensor(offsets, dtype=torch.int32), offsets[-1]) == tuple(offsets)


@pytest.mark.parametrize("offsets", [[1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [3], [0, *([1, 2] * 9), 3]])
def test_bad_document_offsets(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens: .* <= 3, never falling") as caught:
        document_offsets(torch.tensor(offsets, dtype=torch.int32), 3)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_document_offsets_are_int32_in_one_dimension(dtype: torch.dtype) -> None:
    for bad in (torch.tensor([0, 3], dtype=dtype), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(0).int()):
        with pytest.raises(ValueError, match=r"^cu_seqlens: expected an int32 tensor"):
            document_offsets(bad, 3)
