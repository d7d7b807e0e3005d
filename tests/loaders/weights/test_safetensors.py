"""Safetensors both ways against the format's own library; every damaged file refused in one line."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from afina.errors import WeightsError
from afina.loaders.weights import safetensors
from afina.loaders.weights.safetensors import (
    DTYPES,
    INDEX,
    MAX_HEADER,
    MAX_TENSORS,
    SINGLE,
    SafetensorsFile,
    SafetensorsFolder,
    read_safetensors,
    save_tensors,
    write_safetensors,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3
    if dtype == torch.bool:
        return x > 0
    return x.to(dtype) if dtype.is_floating_point or dtype.is_complex else x.abs().to(dtype)


def every_dtype() -> dict[str, Tensor]:
    """Odd sizes, a scalar, an empty tensor, and names that JSON must escape."""
    tensors = {f"{name.lower()}.weight": values(dtype, 3, 5) for name, dtype in reversed(DTYPES.items())}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), 'é"\\\n\x01\x7f/😀': torch.ones(2)}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, dtype and shape included."""
    raw = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def model_folder(folder: Path, **tensors: Tensor) -> Path:
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return folder


def shards(folder: Path, *contents: dict[str, Tensor], weight_map: dict[str, Any] | None = None) -> Path:
    """Shards a.safetensors, b.safetensors ... and their index."""
    places = {}
    for letter, tensors in zip("abc", contents):
        save_file(tensors, folder / f"{letter}.safetensors")
        places.update(dict.fromkeys(tensors, f"{letter}.safetensors"))
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": places if weight_map is None else weight_map})
    )
    return folder


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def refused(action: Callable[[], Any], *expected: str) -> str:
    """The message of the WeightsError: one bounded line that says where, what, and after the last colon how to mend."""
    with pytest.raises(WeightsError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert len(message.rsplit(": ", 1)[1]) > 10
    for text in expected:
        assert text in message
    return message


# Writing and reading against the library


def test_files_are_those_of_the_library_byte_for_byte(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == save(tensors, {"format": "pt"})
    write_safetensors(tmp_path / "x.safetensors", {})
    assert (tmp_path / "x.safetensors").read_bytes() == save({})


def test_library_reads_ours_and_we_read_the_librarys(tmp_path: Path) -> None:
    tensors = every_dtype()
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, tensors, {"format": "pt", "step": "3"})
    save_file(tensors, theirs, {"format": "pt", "step": "3"})
    for found in (load_file(ours), read_safetensors(theirs), read_safetensors(ours)):
        assert found.keys() == tensors.keys()
        assert all(same(found[name], x) for name, x in tensors.items())
    assert SafetensorsFile(theirs).metadata == SafetensorsFile(ours).metadata == {"format": "pt", "step": "3"}


@pytest.mark.parametrize("piece", [8, 24, 200, 2**20])
def test_strided_tensors_are_written_as_if_contiguous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(safetensors, "PIECE", piece)
    x = values(torch.float32, 6, 8)
    views = {"t": x.t(), "rows": x[1:4], "every": x[::2, ::3], "cube": x.view(3, 2, 8).transpose(0, 1), "one": x[:, 2]}
    views |= {"wide": x.expand(2, 6, 8), "grad": x.clone().requires_grad_()}
    write_safetensors(tmp_path / SINGLE, views)
    found = load_file(tmp_path / SINGLE)
    assert all(same(found[name], view.detach()) for name, view in views.items())


def test_refuses_to_write_what_no_reader_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / SINGLE
    with pytest.raises(ValueError, match="__metadata__"):
        write_safetensors(path, {"__metadata__": torch.ones(1)})
    with pytest.raises(ValueError, match="complex128"):
        write_safetensors(path, {"x": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="twice"):
        save_tensors([("x", torch.ones(1)), ("x", torch.ones(1))], tmp_path)
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 2)
    refused(lambda: write_safetensors(path, {name: torch.ones(1) for name in "abc"}), str(path), "3 tensors")
    assert list(tmp_path.iterdir()) == []


def test_save_tensors_one_file_or_shards(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": values(torch.float32, 4, 4) + i for i in range(5)}  # 64 bytes each
    tensors["big"] = values(torch.bfloat16, 20, 20)
    total = sum(x.numel() * x.itemsize for x in tensors.values())

    assert save_tensors(tensors.items(), tmp_path) == [tmp_path / SINGLE]
    whole = SafetensorsFolder(tmp_path)
    assert SafetensorsFile(tmp_path / SINGLE).metadata == {"format": "pt"}
    fingerprint = whole.fingerprint()

    files = save_tensors(iter(tensors.items()), tmp_path, max_shard_bytes=128)
    assert [path.name for path in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)] + [INDEX]
    assert sorted(files) == sorted(tmp_path.iterdir())  # the single file that would hide the shards is gone
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": total}
    for path in files[:-1]:
        assert [n for n, shard in index["weight_map"].items() if shard == path.name] == sorted(load_file(path))
    sizes = [sum(x.numel() * x.itemsize for x in load_file(path).values()) for path in files[:-1]]
    assert sizes == [128, 128, 64, 800]  # full up to the limit; what exceeds it alone has a shard of its own

    opened = SafetensorsFolder(tmp_path)
    assert opened.names() == sorted(tensors)
    assert all(same(opened.read(name), x) for name, x in tensors.items())
    assert opened.fingerprint() == fingerprint

    save_tensors(tensors.items(), tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / SINGLE]


def test_fingerprint_sees_names_dtypes_shapes_and_every_byte(tmp_path: Path) -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    flipped = base["b"].clone()
    flipped.view(torch.uint8)[-1] ^= 1
    variants = [base, {"a": base["a"], "c": base["b"]}, {**base, "a": base["a"].view(3, 2)}, {**base, "b": flipped}]
    variants += [{**base, "a": base["a"].view(torch.int32)}]
    found = [SafetensorsFolder(model_folder(tmp_path, **tensors)).fingerprint() for tensors in variants]
    assert len(set(found)) == len(variants)
    assert SafetensorsFolder(model_folder(tmp_path, **base)).fingerprint() == found[0]


def test_a_save_that_fails_changes_nothing(tmp_path: Path) -> None:
    save_tensors([("x", torch.zeros(4))], tmp_path)
    before = (tmp_path / SINGLE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # as a full disk: a write that fails half way
    try:
        refused(lambda: save_tensors([("x", torch.ones(500_000))], tmp_path), SINGLE, "cannot be written", "free space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {SINGLE: before}
    refused(lambda: save_tensors([("x", torch.ones(1))], tmp_path / "absent"), "cannot be written", "No such file")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def logged_rename(path: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    save_tensors([("x", torch.ones(1))], tmp_path)
    assert events[0].startswith(f"{SINGLE}.tmp-")
    assert events[1:] == [f"rename to {SINGLE}", tmp_path.name]


# Reading into existing memory


@pytest.mark.parametrize(("stored", "wanted"), list(itertools.product(FLOATS, FLOATS[:4])))
def test_read_into_converts_as_torch_does(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    x = values(stored, 7, 11)
    opened = SafetensorsFolder(model_folder(tmp_path, x=x))
    out = torch.empty(7, 11, dtype=wanted)
    opened.read_into("x", out)
    assert same(out, x.to(wanted))
    assert (opened.names(), opened.shape("x"), opened.dtype("x")) == (["x"], (7, 11), stored)


@pytest.mark.parametrize("piece", [8, 40, 300, 2**20])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_read_into_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, wanted: torch.dtype) -> None:
    monkeypatch.setattr(safetensors, "PIECE", piece)
    x = values(torch.float32, 6, 10)
    opened = SafetensorsFolder(model_folder(tmp_path, x=x, line=x[:, 0].contiguous(), cube=x.view(2, 3, 10).clone()))

    fused = torch.zeros(12, 10, dtype=wanted, requires_grad=True)  # rows of a fused matrix, a parameter
    opened.read_into("x", fused[3:9])
    assert same(fused[3:9].detach(), x.to(wanted))
    assert not fused[:3].any()
    assert not fused[9:].any()

    turned = torch.zeros(10, 8, dtype=wanted)
    opened.read_into("x", turned[:, 1:7], transpose=True)
    assert same(turned[:, 1:7], x.t().to(wanted))
    assert not turned[:, [0, 7]].any()

    part = torch.zeros(2, 10, dtype=wanted)
    opened.read_into("x", part, rows=slice(3, 5))
    assert same(part, x[3:5].to(wanted))
    opened.read_into("x", part.t(), rows=slice(4, None), transpose=True)
    assert same(part, x[4:].to(wanted))

    mixed = torch.zeros(2, 3, 10, dtype=wanted)  # the file's rows are (3, 2) groups, ours (2, 3)
    opened.read_into("x", mixed.transpose(0, 1))
    assert same(mixed, x.view(3, 2, 10).transpose(0, 1).to(wanted))

    sparse = torch.zeros(6, 30, dtype=wanted)
    opened.read_into("x", sparse[:, ::3])
    assert same(sparse[:, ::3], x.to(wanted))
    assert torch.count_nonzero(sparse) == torch.count_nonzero(x)

    line = torch.zeros(6, 2, dtype=wanted)
    opened.read_into("line", line[:, 1])
    assert same(line[:, 1], x[:, 0].to(wanted))

    cube = torch.zeros(3, 2, 10, dtype=wanted)
    opened.read_into("cube", cube.transpose(0, 1))
    assert same(cube.transpose(0, 1), x.view(2, 3, 10).to(wanted))


def test_wrong_names_shapes_and_dtypes(tmp_path: Path) -> None:
    opened = SafetensorsFolder(model_folder(tmp_path, weight=torch.ones(4, 6), ids=torch.ones(4, 6, dtype=torch.int8)))
    path = str(tmp_path / SINGLE)
    for shape in [(6, 4), (4, 5), (24,), (4, 6, 1), (1, 24), (2, 2, 2, 3)]:
        refused(partial(opened.read_into, "weight", torch.empty(shape)), path, "'weight'", "(4, 6)", str(shape))
    refused(lambda: opened.read_into("weight", torch.empty(4, 6), transpose=True), "(4, 6)", "transpose")
    refused(lambda: opened.read_into("weight", torch.empty(4, 6), rows=slice(1, 4)), "(3, 6)")
    with pytest.raises(ValueError, match="rows"):
        opened.read_into("weight", torch.empty(2, 6), rows=slice(0, 4, 2))
    refused(lambda: opened.read_into("ids", torch.empty(4, 6)), "'ids'", "torch.int8", "torch.float32")
    refused(lambda: opened.read_into("weight", torch.empty(4, 6, dtype=torch.int8)), "torch.float32", "torch.int8")
    refused(lambda: opened.read("weigth"), str(tmp_path), "no tensor 'weigth'", "did you mean 'weight'")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: float) -> None:
    monkeypatch.setattr(safetensors, "PIECE", 64)
    x = values(dtype, 20, 10)
    x[13, 7] = bad
    if x[13, 7].float().isfinite():
        pytest.skip(f"{dtype} has no {bad}")
    opened = SafetensorsFolder(model_folder(tmp_path, good=torch.ones(3), bad=x))
    opened.read("good")
    for action in (lambda: opened.read("bad"), lambda: opened.read_into("bad", torch.empty(20, 10).double())):
        refused(action, SINGLE, "tensor 'bad'", "NaN or Inf", "element 137", "--allow-nonfinite")
    allowed = SafetensorsFolder(tmp_path, allow_nonfinite=True)
    assert same(allowed.read("bad"), x)
    assert same(read_safetensors(tmp_path / SINGLE)["bad"], x)


def test_large_but_finite_values_pass_and_overflow_is_refused(tmp_path: Path) -> None:
    tensors = {
        "f32": torch.full((9,), 3e38),  # their sum overflows
        "f16": torch.full((9,), 6e4, dtype=torch.float16),
        "over": torch.tensor([1.0, 7e4]),
    }
    opened = SafetensorsFolder(model_folder(tmp_path, **tensors))
    assert all(same(opened.read(name), x) for name, x in tensors.items())
    for name in ("over", "f32"):
        out = torch.empty_like(tensors[name], dtype=torch.float16)
        refused(partial(opened.read_into, name, out), f"'{name}'", "too large for torch.float16", "bfloat16")
    out = torch.empty(2, dtype=torch.bfloat16)
    opened.read_into("over", out)
    assert same(out, tensors["over"].bfloat16())


def test_a_bool_is_0_or_1(tmp_path: Path) -> None:
    raw_file(tmp_path / SINGLE, {"mask": entry(0, 3, dtype="BOOL")}, b"\x00\x01\x02")
    refused(lambda: SafetensorsFolder(tmp_path).read("mask"), "'mask'", "BOOL")


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    opened = SafetensorsFolder(model_folder(tmp_path, x=torch.ones(1000)))
    os.truncate(tmp_path / SINGLE, 2000)
    refused(lambda: opened.read("x"), SINGLE, "ended while")
    refused(opened.fingerprint, SINGLE, "ended while")
    (tmp_path / SINGLE).unlink()
    refused(lambda: opened.read("x"), SINGLE, "cannot be read (No such file")
    refused(opened.fingerprint, SINGLE, "cannot be read (No such file")


def test_reads_that_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FileIO):
        def readinto(self, buffer: Any) -> int | None:
            return super().readinto(memoryview(buffer)[:3])

    opened = SafetensorsFolder(model_folder(tmp_path, x=values(torch.float32, 5, 5)))
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Slow(path))
    assert same(opened.read("x"), values(torch.float32, 5, 5))


# Damaged files

GOOD = {"a": entry(0, 8, [2], "F32"), "b": entry(8, 12)}
ENTRY = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "truncated data": (GOOD, bytes(11), "is truncated"),
    "trailing bytes": (GOOD, bytes(13), "has trailing bytes"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlaps the tensor before it"),
    "same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "'b' overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "'b' leaves a hole before it"),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8), "'a' leaves a hole before it"),
    "past the end": ({"a": entry(0, 80)}, bytes(8), "is truncated"),
    "offsets over 2**63": ({"a": entry(2**64, 2**64 + 4)}, bytes(8), "does not fill its data_offsets"),
    "offsets reversed": ({"a": entry(8, 4, [4])}, bytes(8), "does not fill its data_offsets"),
    "negative offset": ({"a": entry(-4, 0)}, bytes(8), "no list of at most 2 whole numbers"),
    "one offset": ({"a": {**entry(0, 4), "data_offsets": [4]}}, bytes(4), "does not fill"),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, bytes(4), "no list of at most 2"),
    "offsets not numbers": ({"a": {**entry(0, 4), "data_offsets": ["0", "4"]}}, bytes(4), "no list of at most 2"),
    "offsets float": ({"a": {**entry(0, 4), "data_offsets": [0, 4.0]}}, bytes(4), "no list of at most 2"),
    "offsets bool": ({"a": {**entry(0, 1), "data_offsets": [False, True]}}, bytes(1), "no list of at most 2"),
    "shape of other size": ({"a": entry(0, 8, [3], "F32")}, bytes(8), "'a' F32 [3] does not fill"),
    "shape overflowing": ({"a": entry(0, 8, [2**62, 4, 2])}, bytes(8), "does not fill its data_offsets [0, 8]"),
    "shape with 2**64": ({"a": entry(0, 0, [0, 2**64])}, b"", "does not fill"),
    "negative shape": ({"a": entry(0, 4, [-2, -2])}, bytes(4), "[-2, -2] is no list of at most 64"),
    "shape no list": ({"a": {**entry(0, 4), "shape": 4}}, bytes(4), "4 is no list of at most 64"),
    "shape of 65 dimensions": ({"a": entry(0, 1, [1] * 65)}, bytes(1), "no list of at most 64"),
    "unknown dtype": ({"a": entry(0, 4, dtype="Q4_K")}, bytes(4), "unknown dtype 'Q4_K': expected one of U64"),
    "dtype no string": ({"a": entry(0, 4, dtype=["F32"])}, bytes(4), "unknown dtype ['F32']"),
    "key missing": ({"a": {"dtype": "U8", "shape": [4]}}, bytes(4), "expected dtype, shape, data_offsets"),
    "key too many": ({"a": {**entry(0, 4), "x": 1}}, bytes(4), "expected dtype, shape, data_offsets"),
    "entry no object": ({"a": [0, 4]}, bytes(4), "'a' is [0, 4] in the header"),
    "name twice": (f"{{{ENTRY},{ENTRY}}}", b"", "key 'a' is given twice"),
    "key twice": ('{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "'dtype' is given twice"),
    "metadata no map": ({"__metadata__": []}, b"", "not a map of strings"),
    "metadata not strings": ({"__metadata__": {"step": 3}}, b"", "not a map of strings"),
    "bad JSON": ('{"a": ', b"", "header: line 1: not valid JSON"),
    "no JSON": ("\0" * 16, b"", "not valid JSON"),
    "empty header": ("", b"", "the file is empty"),
    "no object": ("[]", b"", "JSON object {...} was expected"),
    "NaN": ('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', b"", "'NaN' is not a finite number"),
    "number of 5,000 digits": ('{"a":%s}' % ("9" * 5000), b"", "integer too long"),
    "deep nesting": ("[" * 5000 + "]" * 5000, b"", "nested deeper"),
    "not UTF-8": (b'{"\xff": 1}', b"", "byte 2 is not UTF-8"),
    "lone surrogate": ('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "half a character"),
    "endless name": ({"x" * 100_000: entry(0, 4, [3])}, bytes(4), "does not fill"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(tmp_path: Path, case: str) -> None:
    header, data, expected = HEADERS[case]
    path = raw_file(tmp_path / SINGLE, header.encode() if isinstance(header, str) else header, data)
    before = path.read_bytes()
    refused(lambda: SafetensorsFolder(tmp_path), str(path), expected)
    refused(lambda: read_safetensors(path), str(path), expected)
    assert path.read_bytes() == before


def test_the_good_header_is_good(tmp_path: Path) -> None:
    raw_file(tmp_path / SINGLE, GOOD, bytes(12))
    assert SafetensorsFolder(tmp_path).names() == ["a", "b"]


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 20])
def test_truncated_within_the_header(tmp_path: Path, kept: int) -> None:
    model_folder(tmp_path, x=torch.ones(4))
    os.truncate(tmp_path / SINGLE, kept)
    refused(lambda: SafetensorsFolder(tmp_path), SINGLE, "is truncated", f"{kept} bytes")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(lambda: SafetensorsFolder(tmp_path), "Git LFS pointer", "git lfs pull")
    torch.save({"x": torch.ones(3)}, path)
    refused(lambda: SafetensorsFolder(tmp_path), "zip archive", "convert")
    path.unlink()
    path.mkdir()
    refused(lambda: SafetensorsFolder(tmp_path), SINGLE, "no such file")


def test_huge_headers_are_refused_before_they_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / SINGLE
    tensors = dict.fromkeys(map(str, range(MAX_TENSORS)), entry(0, 0))
    raw_file(path, {"__metadata__": {"format": "pt"}, **tensors})
    assert len(SafetensorsFolder(tmp_path).names()) == MAX_TENSORS

    monkeypatch.setattr(safetensors, "parse_json", lambda *_, **__: pytest.fail("parsed"))
    raw_file(path, b"{}", length=MAX_HEADER + 1)
    refused(lambda: SafetensorsFolder(tmp_path), "header of 16,777,217 bytes", "16,777,216")
    raw_file(path, b"{}", length=2**64 - 1)
    refused(lambda: SafetensorsFolder(tmp_path), "header of 18,446,744,073,709,551,615 bytes")
    tensors["one more"] = entry(0, 0)
    for content in (tensors, {"__metadata__": {}, **tensors}):
        raw_file(path, content)
        refused(lambda: SafetensorsFolder(tmp_path), "more than 100,000 tensors")
    for part in (b'"a":1,', b"[],", b"{},"):
        raw_file(path, b"[" + part * (MAX_HEADER // len(part) - 1) + b"]")
        refused(lambda: SafetensorsFolder(tmp_path), "more than 100,000 tensors")


# Folders and indexes


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        refused(lambda: SafetensorsFolder(tmp_path), name, "pickles", "never opened", "convert", "save_pretrained")
        (tmp_path / name).rename(tmp_path / SINGLE)  # nor under another name
        refused(lambda: SafetensorsFolder(tmp_path), SINGLE)
        (tmp_path / SINGLE).unlink()
    assert list(tmp_path.iterdir()) == []


def test_folders_without_weights(tmp_path: Path) -> None:
    refused(lambda: SafetensorsFolder(tmp_path), str(tmp_path), SINGLE, INDEX, "found nothing")
    (tmp_path / "config.json").touch()
    refused(lambda: SafetensorsFolder(tmp_path), "found config.json")
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    refused(lambda: SafetensorsFolder(tmp_path), "holds a.safetensors but neither", f"rename it {SINGLE}")
    save_file({"y": torch.ones(1)}, tmp_path / "b.safetensors")
    refused(lambda: SafetensorsFolder(tmp_path), "holds a.safetensors, b.safetensors but neither", "download the index")
    refused(lambda: SafetensorsFolder(tmp_path / "absent"), "absent")


def test_shards(tmp_path: Path) -> None:
    opened = SafetensorsFolder(shards(tmp_path, {"x": torch.ones(2)}, {"y": torch.zeros(3)}))
    assert opened.names() == ["x", "y"]
    assert same(opened.read("y"), torch.zeros(3))


ONE = {"x": torch.ones(2)}
INDEXES: dict[str, tuple[list[dict[str, Tensor]], Any, list[str]]] = {
    "path up": ([ONE], {"x": "../a.safetensors"}, [INDEX, "'../a.safetensors' is no plain .safetensors file name"]),
    "path down": ([ONE], {"x": "sub/a.safetensors"}, [INDEX, "no plain"]),
    "absolute path": ([ONE], {"x": "/etc/a.safetensors"}, [INDEX, "no plain"]),
    "backslashes": ([ONE], {"x": "..\\a.safetensors"}, [INDEX, "no plain"]),
    "NUL": ([ONE], {"x": "a\0.safetensors"}, [INDEX, "no plain"]),
    "empty": ([ONE], {"x": ""}, [INDEX, "no plain"]),
    "two lines": ([ONE], {"x": "a\nb.safetensors"}, [INDEX, "no plain"]),
    "parent": ([ONE], {"x": ".."}, [INDEX, "no plain"]),
    "pickle": ([ONE], {"x": "pytorch_model.bin"}, [INDEX, "no plain"]),
    "no string": ([ONE], {"x": 3}, [INDEX, "gives no file name for 'x'"]),
    "missing shard": ([ONE], {"x": "a.safetensors", "y": "b.safetensors"}, [INDEX, "b.safetensors: no such file"]),
    "absent from its shard": ([ONE], {"x": "a.safetensors", "y": "a.safetensors"}, [INDEX, "'y' in a.safetensors"]),
    "in two shards": ([ONE, ONE], {"x": "a.safetensors", "y": "b.safetensors"}, ["b.safetensors: holds tensor 'x'"]),
    "in another shard": ([ONE, {"y": ONE["x"]}], {"x": "b.safetensors", "y": "b.safetensors"}, [INDEX, "'x' in b"]),
    "not listed": ([{**ONE, "z": torch.ones(1)}], {"x": "a.safetensors"}, ["'z'", "does not list"]),
    "no map": ([ONE], [], [INDEX, "weight_map"]),
    "empty map": ([ONE], {}, [INDEX, "weight_map"]),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_damaged_indexes(tmp_path: Path, case: str) -> None:
    contents, weight_map, expected = INDEXES[case]
    (tmp_path / "sub").mkdir()
    model = tmp_path / "sub"
    save_file(ONE, tmp_path / "a.safetensors")
    shards(model, *contents, weight_map=weight_map)
    refused(lambda: SafetensorsFolder(model), *expected)


def test_indexes_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"x": "a.safetensors",\n "x": "b.safetensors"}}')
    refused(lambda: SafetensorsFolder(tmp_path), INDEX, "line 1, 2: key 'x' is given twice")
    (tmp_path / INDEX).write_text("<html>")
    refused(lambda: SafetensorsFolder(tmp_path), INDEX, "line 1: not valid JSON")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {str(i): "a.safetensors" for i in range(MAX_TENSORS + 1)}}))
    refused(lambda: SafetensorsFolder(tmp_path), INDEX, "100,001 tensors")
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).symlink_to("nowhere")
    refused(lambda: SafetensorsFolder(tmp_path), INDEX, "no such file")


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    outside, model = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    model.mkdir()
    save_file(ONE, outside / "a.safetensors")

    (model / SINGLE).symlink_to(outside / "a.safetensors")
    refused(lambda: SafetensorsFolder(model), str(model / SINGLE), "link out of its folder", str(outside))
    (model / SINGLE).unlink()
    shards(model, weight_map={"x": "a.safetensors"})
    (model / "a.safetensors").symlink_to("../outside/a.safetensors")
    refused(lambda: SafetensorsFolder(model), "a.safetensors: is a link out of its folder")
    (model / "a.safetensors").unlink()
    (model / "a.safetensors").symlink_to("a.safetensors")  # a loop
    refused(lambda: SafetensorsFolder(model), "a.safetensors")

    (model / "a.safetensors").unlink()
    save_file(ONE, model / "real.safetensors")
    (model / "a.safetensors").symlink_to("real.safetensors")  # within the folder
    assert SafetensorsFolder(model).names() == ["x"]
    (tmp_path / "short").symlink_to(model)  # the folder itself may be a link
    assert SafetensorsFolder(tmp_path / "short").names() == ["x"]


def test_snapshots_of_the_hub_cache_link_to_their_own_blobs(tmp_path: Path) -> None:
    def linked(folder: str, target: str) -> Path:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / SINGLE).symlink_to(target)
        return tmp_path / folder

    for place in ("models--o--n/blobs", "models--o--other/blobs", "plain/blobs", "models--o--n/refs"):
        (tmp_path / place).mkdir(parents=True)
        save_file(ONE, tmp_path / place / "00ff")
    mine = linked("models--o--n/snapshots/1", "../../blobs/00ff")
    assert SafetensorsFolder(mine).names() == ["x"]
    (tmp_path / "link").symlink_to(mine)
    assert SafetensorsFolder(tmp_path / "link").names() == ["x"]
    for folder, target in (
        ("models--o--n/snapshots/2", "../../refs/00ff"),
        ("models--o--n/snapshots/3", "../../../models--o--other/blobs/00ff"),
        ("models--o--n/mine/4", "../../blobs/00ff"),
        ("plain/snapshots/5", "../../blobs/00ff"),
    ):
        refused(partial(SafetensorsFolder, linked(folder, target)), f"{folder}/{SINGLE}: is a link out of its folder")


# Fuzzing


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bytes], bool]]:
    """A function that reads a file of these bytes and tells whether it is sound; only a WeightsError may say no."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)  # thousands of contents of one file

    def check(content: bytes) -> bool:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        message = ""
        try:
            read_safetensors(path)
        except WeightsError as problem:
            message = str(problem)
        assert "\n" not in message
        assert len(message) < 1000
        return not message

    yield check
    os.close(descriptor)


SMALL = st.integers(-1, 9) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400])
JSON = st.recursive(
    st.none() | st.booleans() | SMALL | st.floats() | st.text(max_size=4) | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "f32", ""]) | JSON,
        "shape": st.lists(SMALL, max_size=4) | JSON,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2) | JSON,
    }
)
FILE_HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=4), ENTRIES | JSON, max_size=4
)


@settings(max_examples=700)
@given(
    header=FILE_HEADERS | JSON, data=st.binary(max_size=12), shift=st.sampled_from([0] * 6 + [-1, 1, 8, 2**40, 2**63])
)
def test_fuzzed_headers(sound: Callable[[bytes], bool], header: Any, data: bytes, shift: int) -> None:
    raw = json.dumps(header).encode()
    sound(max(0, len(raw) + shift).to_bytes(8, "little") + raw + data)


def test_fuzzed_bytes(sound: Callable[[bytes], bool]) -> None:
    rng = random.Random(0)
    good = save({"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.int8)}, {"format": "pt"})
    header = 8 + int.from_bytes(good[:8], "little")
    accepted = 0
    start = time.process_time()
    for _ in range(5000):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            where = rng.randrange(header)
            change = rng.randrange(4)
            if change == 0:
                raw[where] ^= 1 << rng.randrange(8)
            elif change == 1:
                raw[where] = rng.choice(b'0123456789-{}[]",:.eE\\u ')
            elif change == 2:
                del raw[where : where + rng.randint(1, 4)]
            else:
                raw[where:where] = raw[where : where + rng.randint(1, 9)]
        accepted += sound(bytes(raw))
    assert 0 < accepted < 1000  # a changed name or metadata is still a sound file
    assert time.process_time() - start < 10


MEMORY = """
import os, sys, time
from pathlib import Path
import torch
from afina.errors import WeightsError
from afina.loaders.weights import safetensors
from afina.loaders.weights.safetensors import SafetensorsFolder, MAX_HEADER, read_safetensors, save_tensors
torch.set_num_threads(1)
folder = Path(sys.argv[1])

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def peak(action):  # bytes that the action needed at its worst above what the process held before
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before
"""


def in_process(folder: Path, script: str) -> str:
    """Run a script after MEMORY in a fresh process, where peak memory can be measured."""
    command = [sys.executable, "-c", MEMORY + textwrap.dedent(script), str(folder)]
    # What is freed goes back to the system at once; kept for reuse, it would hide what the next step takes.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_worst_headers_take_little_memory_and_time(tmp_path: Path) -> None:
    script = """
        parts = [b'[1],', b'[],', b'{},', b'"a":1,', b'1000,', b'"",', b'"a" ', b'1e9,', b'[[', b'"\\u00e9",', b'null,']
        entry = b'"%d":{"dtype":"U8","shape":[0,%s0],"data_offsets":[0,0]},'
        descriptor = os.open(folder / "attack", os.O_RDWR | os.O_CREAT)
        def attack(raw):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, len(raw).to_bytes(8, "little") + raw, 0)
            start = time.process_time()
            try:
                safetensors.SafetensorsFile(folder / "attack")
            except WeightsError as problem:
                assert len(str(problem)) < 1000
            assert time.process_time() - start < 3, raw[:40]
        for part in parts:
            for opening, closing in ((b'{"a":[', b'0]}'), (b'{', b'}')):
                raw = opening + part * ((MAX_HEADER - 20) // len(part)) + closing
                used = peak(lambda: attack(raw))
                assert used < 300e6, (used, raw[:40])
        most = b'{' + b''.join(entry % (i, b'0,' * 40) for i in range(99_999)) + entry[:-1] % (99_999, b'') + b'}'
        used = peak(lambda: attack(most))
        assert used < 300e6, used
        print("done")
    """
    assert in_process(tmp_path, script) == "done\n"


def test_reading_needs_its_target_and_one_buffer_and_writing_only_a_buffer(tmp_path: Path) -> None:
    script = """
        x = {f"{i}.weight": torch.full((4096, 2048), 1.0 + i).bfloat16() for i in range(4)}  # 64 MiB
        turned = {name: tensor.t() for name, tensor in x.items()}
        def load(rows, names, dtype, transpose):
            opened = SafetensorsFolder(folder)
            target = torch.empty(len(names), *((rows, 2048) if transpose else (2048, rows)), dtype=dtype)
            for name, out in zip(names, target):
                opened.read_into(name, out, transpose=transpose)
                assert torch.equal(out[-1, -1], x[name][-1, -1].to(dtype))
            opened.fingerprint()
        ways = ((torch.float32, False), (torch.bfloat16, True), (torch.float32, True))
        x["warm"] = torch.ones(64, 2048).bfloat16()  # the library's own pages come into memory with their first use
        save_tensors([("warm", x["warm"].t())], folder)
        for dtype, transpose in ways:
            load(64, ["warm"], dtype, transpose)
        save_tensors([("warm", x.pop("warm"))], folder)
        slack = 12 * 2**20  # less than one tensor
        used = peak(lambda: save_tensors(x.items(), folder, max_shard_bytes=40 * 2**20))
        assert used < slack, used
        used = peak(lambda: save_tensors(turned.items(), folder))
        assert used < slack, used
        for dtype, transpose in ways:
            used = peak(lambda: load(4096, list(x), dtype, transpose))
            target = 2**25 * dtype.itemsize
            assert target * 0.9 < used < target + slack, (used, target)
        print("done")
    """
    assert in_process(tmp_path, script) == "done\n"
