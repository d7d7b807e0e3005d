"""Recipes on the disk: a YAML file of settings, read with the line of each, so that a message can say where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import ConfigError

if TYPE_CHECKING:
    import yaml

MAX_RECIPE_BYTES = 1 << 20


def read_yaml(path: Path, what: str = "recipe") -> list[tuple[str, str, Any]]:
    """The (where, key, value) triples of a YAML file (``what`` it is), in order. Raises ConfigError."""
    import yaml

    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 (byte {error.start})"
        model = what == "recipe" and path.suffix not in (".yaml", ".yml")
        mend = f"; a model is named with --model {path}" * model
        raise ConfigError(f"{path}: the {what} cannot be read: {reason}; expected a YAML file{mend}") from None
    if len(raw) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes is no {what}; expected a YAML file of settings")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: found no settings; expected lines of the form learning_rate: 5e-5")
        triples = []
        for key, line, node in _keys(path, root):
            if isinstance(node, yaml.MappingNode):
                _keys(path, node)
            where = f"{path}, line {line}: {key}"
            try:
                triples.append((where, key, loader.construct_object(node, deep=True)))
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                # The reader takes it on trust that a text is what its tag says, or what it looks like.
                kind = node.tag.rpartition(":")[2]
                reason = f" ({error})" if isinstance(error, ValueError) else ""
                raise ConfigError(f"{where}: no {kind:.40}{reason:.100}: mend it, or put quotes around it") from None
        return triples
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{at}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None


def _keys(path: Path, mapping: yaml.MappingNode) -> list[tuple[str, int, yaml.Node]]:
    """(key, line, value) of a YAML mapping; a key that comes twice is refused (YAML's reader keeps the last)."""
    keys = []
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise ConfigError(f"{path}, line {line}: a list or a mapping stands where a name was expected")
        keys.append((key.value, line, value))
    lines: dict[str, int] = {}
    for key, line, _ in keys:
        if key in lines:
            raise ConfigError(f"{path}, line {line}: {key} is given a second time, after line {lines[key]}: keep one")
        lines[key] = line
    return keys
