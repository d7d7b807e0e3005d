"""Where a model comes from: a local folder, a run folder, the package itself or the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from afina.errors import WeightsError, nearest
from afina.loaders.jsonfile import show

BUILT_IN = "afina-tiny"
# Weights, configs, tokenizers and templates of the repository's top folder; never code or pickles.
ALLOWED = ("model*.safetensors", "adapter_model.safetensors", "*.json", "merges.txt", "*.jinja")
IGNORED = ("*/*",)
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve(source: str | Path) -> Path:
    """Return the local folder of a model, downloaded first when ``source`` is on the hub.

    ``source``: a folder with config.json (or an adapter's, with adapter_config.json); a run folder (its best model);
    "afina-tiny"; or "owner/name", with a branch, tag or commit as "owner/name@revision". A folder wins over a hub name.
    Raises WeightsError.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _local(path)
        if path.exists():
            raise WeightsError(f"{path}: is a file: pass the folder that holds config.json and model.safetensors")
        if str(source) == BUILT_IN:
            return Path(str(importlib.resources.files("afina"))) / "data" / BUILT_IN
        near = nearest(path.name, [BUILT_IN, *(os.listdir(path.parent) if path.parent.is_dir() else ())])
    except (OSError, RuntimeError) as problem:  # RuntimeError: ~name of no user
        reason = getattr(problem, "strerror", None) or problem
        raise WeightsError(
            f"{show(str(source))}: cannot be read ({reason}): check the path and its rights"
        ) from problem
    match = _HUB_ID.fullmatch(source) if isinstance(source, str) and not source.startswith((".", "-")) else None
    if match:
        return _download(match["id"], match["revision"], near)
    raise WeightsError(
        f"{show(str(source))}: no such model{near}: expected a folder, {BUILT_IN!r} or a hub name 'owner/name'"
    )


def _local(folder: Path) -> Path:
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder
    best = folder / "best"
    if (folder / "run.json").is_file():
        if (best / "config.json").is_file() or (best / "adapter_config.json").is_file():
            return best
        raise WeightsError(f"{folder}: is a run without a best model yet: train it to its first evaluation")
    names = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    inner = sorted(item.parent.name for item in folder.glob("*/config.json"))
    mend = f"did you mean {str(folder / inner[0])!r}?" if inner else "pass the folder of a model"
    raise WeightsError(f"{folder}: no config.json (found {found or 'an empty folder'}): {mend}")


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
