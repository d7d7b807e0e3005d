"""The reader of GGUF files: what the `gguf` package writes, and every damaged file refused in one bounded line."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_files
import torch
from gguf_files import ARRAY, BOOL, FLOAT32, FLOAT64, INT32, STRING, UINT8, UINT32, UINT64, Field, Raw, build, gguf

from afina.errors import ConfigError, WeightsError
from afina.loaders.weights import gguf_file
from afina.loaders.weights.gguf_file import KINDS, MAX_FIELDS, MAX_STRINGS, MAX_TENSORS, GGUFFile

BLOCKS = [kind for kind, (block, _) in KINDS.items() if block > 1]


def number_of(kind: str) -> int:
    return int(gguf.GGMLQuantizationType[kind])


def blocks(kind: str, count: int) -> bytes:
    """Random blocks of a type with scales that are finite: the float16s at the start, of Q6_K at the end."""
    rng = np.random.default_rng(0)
    size = KINDS[kind][1]
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    scales = rng.normal(size=(count, 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        raw[:, -2:] = scales[:, :2]
    else:
        width = 2 if kind in ("Q8_0", "Q4_0", "Q5_0") else 4
        raw[:, :width] = scales[:, :width]
    return raw.tobytes()


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def plain(name: str, *shape: int) -> Raw:
    return Raw(name, shape, 0, floats(*shape).tobytes())


def write(path: Path, *arguments: Any, **options: Any) -> Path:
    path.write_bytes(build(*arguments, **options).data)
    return path


def refused(path: Path, *expected: str) -> str:
    """The message of the WeightsError: one bounded line with the file, what was found, and how to mend it."""
    with pytest.raises(WeightsError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert message.startswith(f"{path}: ")
    assert len(message.rsplit(": ", 1)[1]) > 10
    for text in expected:
        assert text in message
    return message


# --- Sound files ------------------------------------------------------------------------------------------------------


def test_what_the_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values: dict[str, Any] = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000, "int32": -2_000_000,
        "uint64": 2**63, "int64": -(2**62), "float32": 1e-5, "float64": 1e-5, "bool": True, "string": "é 😀\n",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    arrays = {"ints": [1, -2, 3], "floats": [0.5, 1.5], "bools": [True, False], "texts": ["a", "", "中"]}
    for name, array in arrays.items():
        writer.add_array(f"x.{name}", array)
    tensors = {"one": floats(5), "two": floats(3, 7), "half": floats(2, 3, 4).astype(np.float16)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert {key.removeprefix("x."): value for key, value in file.fields.items() if key[2:] in values} == values
    for key, value in values.items():
        assert type(file.fields[f"x.{key}"]) is type(value)
    for key, array in arrays.items():
        assert list(file.fields[f"x.{key}"]) == array
    assert isinstance(file.fields["x.ints"], np.ndarray)
    assert file.fields["x.bools"].dtype == np.bool_
    assert file.names() == ["half", "one", "two"]
    for name, tensor in tensors.items():
        assert file.shape(name) == tensor.shape
        assert file.kind(name) == ("F16" if name == "half" else "F32")
        assert np.array_equal(file.read(name).numpy(), tensor)
        assert np.array_equal(file.read(name, slice(1, 2)).numpy(), tensor[1:2])


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantised_tensors_are_dequantised_by_the_package(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, size = KINDS[kind]
    assert (block, size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = blocks(kind, 3 * 6)
    tensors = [Raw("x", (6, 3 * block), number_of(kind), raw), plain("after", 3)]
    file = GGUFFile(write(tmp_path / "m", [], tensors))
    expected = gguf.quants.dequantize(
        np.frombuffer(raw, dtype=np.uint8).reshape(6, -1), gguf.GGMLQuantizationType[kind]
    )
    assert (file.kind("x"), file.dtype("x"), file.shape("x")) == (kind, torch.float32, (6, 3 * block))
    assert np.array_equal(file.read("after").numpy(), floats(3))
    for limit in (gguf_file.DEQUANTIZED, 4 * block, 4 * 3 * block):  # whatever the pieces
        monkeypatch.setattr(gguf_file, "DEQUANTIZED", limit)
        assert np.array_equal(file.read("x").numpy(), expected)
        assert np.array_equal(file.read("x", slice(2, 5)).numpy(), expected[2:5])
        fused = torch.zeros(10, 3 * block, dtype=torch.bfloat16)
        file.read_into("x", fused[1:7])
        assert torch.equal(fused[1:7], torch.from_numpy(expected).bfloat16())
        turned = torch.zeros(3 * block, 8)
        file.read_into("x", turned[:, 1:7], transpose=True)
        assert torch.equal(turned[:, 1:7], torch.from_numpy(expected).t())
        assert not turned[:, [0, 7]].any()
        more = torch.zeros(6, 3 * block)
        file.read_into("x", more, add=1.0)
        assert np.array_equal(more.numpy(), expected + np.float32(1))


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    x = torch.randn(4, 6).bfloat16()
    file = GGUFFile(write(tmp_path / "m", [], [Raw("x", (4, 6), 30, x.view(torch.uint8).numpy().tobytes())]))
    assert torch.equal(file.read("x"), x)
    assert file.dtype("x") == torch.bfloat16


@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_alignments(version: int, tmp_path: Path) -> None:
    tensors = [plain("a", 3), plain("b", 5)]
    for alignment in (8, 32, 4096):
        fields = [Field("general.alignment", UINT32, alignment)]
        file = GGUFFile(write(tmp_path / "m", fields, tensors, version=version, alignment=alignment))
        assert np.array_equal(file.read("b").numpy(), floats(5))
    assert GGUFFile(write(tmp_path / "m", [], tensors)).names() == ["a", "b"]
    with (tmp_path / "m").open("ab") as out:
        out.write(bytes(12))  # the last tensor's padding, which some writers leave out
    assert np.array_equal(GGUFFile(tmp_path / "m").read("b").numpy(), floats(5))
    assert GGUFFile(write(tmp_path / "empty", [], [])).names() == []


def test_tensors_may_be_listed_in_another_order(tmp_path: Path) -> None:
    data = build([], [plain("a", 8), plain("b", 8)])
    swapped = bytearray(data.data)
    offsets = [at for what, at, _ in data.numbers if what == "offset"]
    for at, value in zip(offsets, (32, 0)):
        swapped[at : at + 8] = struct.pack("<Q", value)
    (tmp_path / "m").write_bytes(swapped)
    file = GGUFFile(tmp_path / "m")
    assert file.entries["a"].offset == file.entries["b"].offset + 32


@pytest.mark.slow
def test_real_vocabularies() -> None:
    for name, path in real_files.vocabularies().items():
        if name not in ("llama-spm", "gpt-2"):  # the package takes half a minute for the largest
            assert GGUFFile(path).fields["tokenizer.ggml.tokens"]
            continue
        ours, theirs = GGUFFile(path).fields, gguf.GGUFReader(path).fields
        assert len(ours) == len(theirs) - 3
        for key, value in ours.items():
            expected = theirs[key].contents()
            if isinstance(value, np.ndarray):
                assert value.tolist() == expected
            else:
                assert np.float32(value) == np.float32(expected) if isinstance(value, float) else value == expected


def test_nan_and_inf_are_named(tmp_path: Path) -> None:
    x = floats(20, 10)
    x[13, 7] = np.nan
    scale = bytearray(blocks("Q4_1", 4))
    scale[40:42] = np.float16(np.inf).tobytes()
    tensors = [Raw("x", (20, 10), 0, x.tobytes()), Raw("q", (4, 32), 3, bytes(scale))]
    file = GGUFFile(write(tmp_path / "m", [], tensors))
    for name, at in (("x", "element 137"), ("q", "element 64")):
        out = torch.empty(file.shape(name))
        with pytest.raises(WeightsError, match=rf"tensor '{name}' holds NaN or Inf .*{at}.*--allow-nonfinite"):
            file.read_into(name, out)
        file.read_into(name, out, finite=False)
        assert not out.isfinite().all()


def test_wrong_requests(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path / "m", [], [plain("weight", 4, 6), Raw("q", (64,), 3, blocks("Q4_1", 2))]))
    with pytest.raises(WeightsError, match=r"no tensor 'weigth' .did you mean 'weight'"):
        file.read("weigth")
    with pytest.raises(WeightsError, match=r"'weight' has shape \(4, 6\) where shape \(6, 4\) was expected"):
        file.read_into("weight", torch.empty(6, 4))
    for name, rows in (("weight", slice(0, 4, 2)), ("q", slice(16, 48))):
        with pytest.raises(ValueError, match="rows"):
            file.read(name, rows)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [plain("x", 4, 6), Raw("h", (8,), 1, bytes(16)), Raw("q", (32,), 3, blocks("Q4_1", 1))]
    file = GGUFFile(write(tmp_path / "m", [], tensors))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert np.array_equal(file.read("x").numpy(), floats(4, 6))
    assert not file.read("h").any()
    with pytest.raises(ConfigError, match=r"pip install 'afina\[gguf\]'$"):
        file.read("q")


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m", [], [plain("x", 1000)])
    file = GGUFFile(path)

    class Slow(FileIO):
        def readinto(self, buffer: Any) -> int | None:
            return super().readinto(memoryview(buffer)[:7])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: Slow(path))
        assert np.array_equal(GGUFFile(path).read("x").numpy(), floats(1000))  # reads that come in parts
    os.truncate(path, 2000)
    for action in (lambda: file.read("x"), lambda: list(file.stored("x"))):
        with pytest.raises(WeightsError, match="ended while"):
            action()
    path.unlink()
    with pytest.raises(WeightsError, match=r"cannot be read .No such file"):
        file.read("x")


# --- Damaged files ----------------------------------------------------------------------------------------------------

GOOD = [
    Field("general.architecture", STRING, "llama"), Field("n", UINT32, 3), Field("t", ARRAY, (STRING, ["a", "b"])),
    Field("s", ARRAY, (FLOAT32, [0.5])),
]  # fmt: skip
TENSORS = [plain("a", 2, 4), plain("b", 3)]
Q4 = Raw("q", (2, 32), 2, bytes(36))


def claim(what: str, place: int, value: int, form: str = "Q") -> Callable[[], bytes]:
    """A file in which the ``place``-th number of a kind claims something else."""

    def make() -> bytes:
        built = build(GOOD, TENSORS)
        at = [at for kind, at, _ in built.numbers if kind == what][place]
        raw = bytearray(built.data)
        raw[at : at + struct.calcsize(form)] = struct.pack("<" + form, value)
        return bytes(raw)

    return make


def made(*arguments: Any, **options: Any) -> Callable[[], bytes]:
    return lambda: build(*arguments, **options).data


def field(kind: int, value: Any) -> Callable[[], bytes]:
    return made([Field("key", kind, value)], [])


def shaped(*shape: int, kind: int = 0) -> Callable[[], bytes]:
    return made([], [Raw("x", shape, kind, bytes(64))])


DAMAGE: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "empty": (lambda: b"", ["is no GGUF file", "b''"]),
    "magic": (made(GOOD, TENSORS, magic=b"GGML"), ["is no GGUF file", "b'GGML'"]),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer", "git lfs pull"]),
    "version 1": (made(GOOD, TENSORS, version=1), ["has version 1, supported are 2 and 3"]),
    "version 4": (made(GOOD, TENSORS, version=4), ["has version 4"]),
    "big-endian": (made(GOOD, TENSORS, version=3 << 24), ["is big-endian", "gguf-convert-endian"]),
    "many tensors": (claim("count", 0, 2**40), ["claims 1,099,511,627,776 tensors, at most"]),
    "some tensors": (claim("count", 0, 9), ["claims 9 tensors, at most"]),
    "many keys": (claim("count", 1, 2**63), ["claims 9,223,372,036,854,775,808 keys, at most"]),
    "a tensor more": (claim("count", 0, 3), ["dimensions, expected 1 to 4"]),
    "key length": (claim("length", 0, 2**62), ["key 1 is a text of 4,611,686,018,427,387,904 bytes", "65,535"]),
    "key past the end": (claim("length", 0, 5000), ["is truncated: key 1 needs 5,000 bytes"]),
    "value length": (claim("length", 1, 2**62), ["general.architecture is a text of", "67,108,864"]),
    "value past the end": (claim("length", 1, 5000), ["is truncated: general.architecture needs 5,000 bytes"]),
    "text of an array": (claim("length", 4, 2**62), ["is truncated: t needs 4,611,686,018,427,387,912 bytes"]),
    "array of texts": (claim("count", 2, 2**61), ["t is an array of 2,305,843,009,213,693,952 texts, at most"]),
    "array of floats": (claim("count", 3, 2**60), ["is truncated: s needs 4,611,686,018,427,387,904 bytes"]),
    "type of a value": (claim("type", 0, 13, "I"), ["general.architecture has the unknown type 13"]),
    "type of an array": (claim("type", 3, 13, "I"), ["t has the unknown type 13"]),
    "nested array": (field(ARRAY, (ARRAY, [])), ["key is an array of arrays"]),
    "key twice": (made([*GOOD, GOOD[0]], []), ["key 'general.architecture' is given twice"]),
    "no key": (made([Field("", UINT64, 1)], []), ["key 1 is '', expected printable ASCII"]),
    "key of two lines": (made([Field("a\nb", UINT8, 1)], []), ["key 1 is 'a\\nb'"]),
    "key not ASCII": (made([Field("é", UINT8, 1)], []), ["key 1 is 'é'"]),
    "bool": (field(BOOL, 2), ["key is a bool but holds 2"]),
    "bools": (field(ARRAY, (BOOL, [0, 1, 7])), ["key is an array of bools but holds 7"]),
    "not UTF-8": (field(STRING, b"ab\xff"), ["key: byte 2 of a text is not UTF-8"]),
    "array not UTF-8": (field(ARRAY, (STRING, ["a", b"\xc3"])), ["key: byte 0 of text 1 is not UTF-8"]),
    "alignment 0": (made([Field("general.alignment", UINT32, 0)], []), ["general.alignment = 0, expected a power"]),
    "alignment 24": (made([Field("general.alignment", UINT32, 24)], []), ["general.alignment = 24"]),
    "alignment huge": (made([Field("general.alignment", UINT64, 2**60)], []), ["general.alignment = 1152921504"]),
    "alignment text": (made([Field("general.alignment", STRING, "32")], []), ["general.alignment = '32'"]),
    "alignment float": (made([Field("general.alignment", FLOAT64, 32.0)], []), ["general.alignment = 32.0"]),
    "tensor twice": (made([], [plain("a", 2), plain("a", 2)]), ["tensor 'a' is given twice"]),
    "long name": (made([], [plain("x" * 65, 2)]), ["the name of tensor 1 is a text of 65 bytes, at most 64"]),
    "no dimensions": (made([], [Raw("x", (), 0, bytes(4))]), ["'x' has 0 dimensions, expected 1 to 4"]),
    "five dimensions": (shaped(1, 1, 1, 1, 1), ["'x' has 5 dimensions"]),
    "zero": (shaped(2, 0), ["'x' has the impossible shape (2, 0)"]),
    "overflow": (shaped(2**32, 2**32), ["'x' has the impossible shape"]),
    "overflow of bytes": (shaped(2**61), ["is truncated", "tensor 'x' ends at"]),
    "unknown type": (shaped(2, 4, kind=77), ["'x' has the unknown type 77", "use a file in F32, F16, BF16, Q8_0"]),
    "type not read": (shaped(2, 32, kind=20), ["'x' has the type IQ4_NL, which is not supported", "Q6_K"]),
    "integers": (shaped(2, 4, kind=26), ["'x' has the type I32"]),
    "part of a block": (shaped(2, 16, kind=2), ["'x' is Q4_0 with rows of 16, expected a multiple of 32"]),
    "truncated": (lambda: build(GOOD, TENSORS).data[:-1], ["is truncated", "tensor 'b' ends at"]),
    "trailing": (lambda: build(GOOD, TENSORS).data + bytes(200), ["has trailing bytes"]),
    "misaligned": (claim("offset", 1, 40), ["'b' is not aligned: it begins at byte 40, expected 32"]),
    "hole": (claim("offset", 1, 64), ["'b' leaves a hole before it: it begins at byte 64, expected 32"]),
    "overlap": (claim("offset", 1, 0), ["'b' overlaps the tensor before it: it begins at byte 0, expected 32"]),
    "offset past the end": (claim("offset", 1, 2**63), ["'b' leaves a hole"]),
    "first not at 0": (claim("offset", 0, 32), ["it begins at byte 32, expected 0"]),
    "quantisation version": (
        made([Field("general.quantization_version", UINT32, 1)], [Q4]),
        ["general.quantization_version = 1, expected 2, since tensor 'q' is Q4_0"],
    ),
    "file type": (
        made([Field("general.file_type", UINT32, 0)], [plain("a", 2), Q4]),
        ["general.file_type = 0 says that all is F32, but tensor 'q' is Q4_0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    make, expected = DAMAGE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(make())
    refused(path, *expected)


def test_the_good_file_is_good(tmp_path: Path) -> None:
    assert GGUFFile(write(tmp_path / "m", GOOD, TENSORS)).names() == ["a", "b"]
    assert GGUFFile(write(tmp_path / "m", [Field("general.quantization_version", UINT32, 2)], [Q4])).kind("q") == "Q4_0"


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = build(GOOD, TENSORS).data
    for kept in range(len(data)):
        (tmp_path / "m").write_bytes(data[:kept])
        refused(tmp_path / "m")


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        refused(tmp_path / name, "no such file")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, fields, tensors, expected in (
        ("MAX_FIELDS", GOOD, [], "claims 4 keys, at most 3"),
        ("MAX_TENSORS", [], [plain(name, 1) for name in "abcd"], "claims 4 tensors, at most 3"),
        ("MAX_STRINGS", [Field("t", ARRAY, (STRING, list("abcd")))], [], "t is an array of 4 texts, at most 3"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gguf_file, limit, 3)
            refused(write(tmp_path / "m", fields, tensors), expected)
    two = [Field(key, ARRAY, (STRING, ["a", "b"])) for key in "tu"]  # of all arrays together
    monkeypatch.setattr(gguf_file, "MAX_STRINGS", 3)
    refused(write(tmp_path / "m", two, []), "u is an array of 2 texts")
    monkeypatch.setattr(gguf_file, "MAX_HEADER", 100)
    refused(write(tmp_path / "m", [Field("t", STRING, "x" * 90)], []), "header of more than 100 bytes")


# --- Fuzzing ----------------------------------------------------------------------------------------------------------

ODD = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 32, 33, 64, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
ODD += [2**40, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def sound() -> Iterator[Callable[[bytes], bool]]:
    """Reads a file of these bytes, all tensors included, and tells whether it is sound; only a WeightsError may say
    no."""
    descriptor = os.memfd_create("fuzz")  # thousands of files, none on a disk
    path = Path(f"/proc/self/fd/{descriptor}")

    def check(content: bytes) -> bool:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        message = ""
        try:
            file = GGUFFile(path)
            for name in file.names():
                file.read(name)
        except WeightsError as problem:
            message = str(problem)
        assert "\n" not in message
        assert len(message) < 1000
        return not message

    yield check
    os.close(descriptor)


@pytest.mark.slow
def test_fuzzed_files(sound: Callable[[bytes], bool]) -> None:
    """20,000 files, mutated where their numbers stand and anywhere: in bounded time, and memory for what is there."""
    rng = random.Random(0)
    arrays = [Field(f"a{kind}", ARRAY, (kind, [1, 0, 1])) for kind in (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)]
    fields = [*GOOD, *arrays, Field("general.alignment", UINT32, 32), Field("i", INT32, -1), Field("f", FLOAT32, 1e-5)]
    quantized = [Raw(kind, (2, KINDS[kind][0]), number_of(kind), blocks(kind, 2)) for kind in ("Q4_1", "Q6_K", "Q8_0")]
    good = build(fields, [*TENSORS, *quantized])
    assert sound(good.data)
    header = good.data.index(floats(2, 4).tobytes())
    accepted = 0
    start = time.process_time()
    for _ in range(20_000):
        raw = bytearray(good.data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            change = rng.randrange(6)
            where = rng.randrange(header)
            if change <= 2:
                _, at, size = rng.choice(good.numbers)
                value = rng.choice(ODD) if rng.random() < 0.7 else rng.getrandbits(64)
                raw[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
            elif change == 3:
                raw[where % len(raw)] ^= 1 << rng.randrange(8)
            elif change == 4:
                del raw[where : where + rng.choice((1, 4, 8, 2000))]
            else:
                raw[where:where] = raw[where : where + rng.choice((1, 4, 8, 40))]
            if not raw:
                break
        accepted += sound(bytes(raw))
    assert 200 < accepted < 8000, accepted  # other values and names make other sound files
    assert time.process_time() - start < 60


MEMORY = """
import os, resource, struct, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gguf_files import *
from afina.errors import WeightsError
from afina.loaders.weights.gguf_file import *

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

descriptor = os.memfd_create("attack")
def attack(*pieces, size=0):
    '''Open a file that is mostly header, or has size bytes in all, and see what it takes at the worst.'''
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, 0)
    for piece in pieces:
        os.write(descriptor, piece)
    os.ftruncate(descriptor, max(size, os.lseek(descriptor, 0, 1)))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    try:
        GGUFFile(Path(f"/proc/self/fd/{descriptor}"))
        outcome = "accepted"
    except WeightsError as problem:
        outcome = str(problem)
        assert len(outcome) < 1000
    print(f"{outcome[-90:]}: {(memory('VmHWM') - before) / 1e6:.0f} MB, {time.process_time() - start:.2f} s")
    assert memory("VmHWM") - before < 600e6
    assert time.process_time() - start < 10
"""


@pytest.mark.slow
def test_the_worst_headers_take_little_memory_and_time(tmp_path: Path) -> None:
    script = """
        def start(tensors, keys):
            return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)
        def text(value):
            return struct.pack("<Q", len(value)) + value
        def array(kind, count):
            return text(b"key") + struct.pack("<IIQ", 9, kind, count)
        attack(start(0, 1), array(8, 2**60), bytes(1000))
        attack(start(0, 1), array(8, MAX_STRINGS), text(b"ab") * MAX_STRINGS)
        attack(start(0, 1), array(8, MAX_STRINGS), b"".join(text(b"%05d" % (i % 10**5)) for i in range(MAX_STRINGS)))
        attack(start(0, 1), array(8, MAX_STRINGS + 1), text(b"") * (MAX_STRINGS + 1))
        attack(start(0, 1), array(0, 2**30), bytes(2**20))
        attack(start(0, 1), array(12, 2**23 - 100), bytes(2**26 - 800))
        attack(start(0, 1), text(b"key") + struct.pack("<I", 8), text(b"x" * (2**26 - 200)))
        attack(start(0, MAX_FIELDS), b"".join(text(b"%05d" % i) + struct.pack("<IB", 0, 1) for i in range(MAX_FIELDS)))
        one = struct.pack("<IQIQ", 1, 8, 0, 0)
        names = b"".join(text(b"%05d" % i) + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(MAX_TENSORS))
        attack(start(MAX_TENSORS, 0), names, bytes(-(len(names) + 24) % 32), bytes(32 * MAX_TENSORS))
        attack(start(1, 0), text(b"x"), struct.pack("<IQQIQ", 2, 2**30, 2**30, 0, 0), bytes(64))
        attack(start(1, 0), text(b"x"), struct.pack("<IQIQ", 1, 2**28, 0, 0), bytes(8), size=64 + 2**30)
    """
    assert MAX_FIELDS * 20 < 2**26
    assert MAX_STRINGS * 10 < 2**26
    assert MAX_TENSORS <= 100_000
    command = [sys.executable, "-c", MEMORY + textwrap.dedent(script), str(Path(__file__).parents[2])]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 0, done.stderr + done.stdout
    print(done.stdout)
    assert done.stdout.count("\n") == 11
    assert done.stdout.count("accepted") == 7, done.stdout
