"""The tokenizer of a model, whatever it lies in: a folder in the HF layout, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from afina.loaders.text.gguf_tokenizer import tokenizer_from_gguf
from afina.loaders.text.tokenizer import Tokenizer, read_tokenizer, tokenizer_place
from afina.loaders.weights.gguf_file import GGUFFile


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Return the tokenizer of a model: a folder, a run folder, a GGUF file, a hub id or "afina-tiny".

    A folder that holds tokenizer files and no model (no config.json) is accepted too. An adapter without any has its
    base's. Raises TokenizerError, and WeightsError for a model that is not there or a damaged GGUF file.
    """
    place = tokenizer_place(source)
    if place.is_file():
        return tokenizer_from_gguf(GGUFFile(place).fields, str(place))
    return read_tokenizer(place)
