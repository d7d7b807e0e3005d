"""A small tokenizer of SentencePiece's kind: spaces are spelt "▁", and decoding strips the space of a first word."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

SCHEMES = ("always", "first", "never")


def metaspace_files(scheme: str) -> dict[str, bytes]:
    """The files of the tokenizer. ``scheme``: which words get a space put before them: every first word after a
    special token ("always"), the first of the text ("first"), or as the older normalizer does it ("never")."""
    merges = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁he", "ll"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehlnorwy"]
    tokens += [left + right for left, right in merges]
    backend = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "never":  # the older form: a normalizer that also marks what follows a special token
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:3]])
    backend.post_processor = with_bos(backend)
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def with_bos(backend: tokenizers.Tokenizer) -> processors.PostProcessor:
    """A post-processor as HF's files have it: it trims spaces off offsets and puts <s> in front."""
    bos = ("<s>", backend.token_to_id("<s>"))
    template = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [bos])
    return processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
