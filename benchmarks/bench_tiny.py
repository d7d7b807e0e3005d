"""What afina-tiny has learnt of English: bits per byte on a held-out book, beside models that only count.

    python benchmarks/bench_tiny.py [--model afina-tiny] [--book treasure-island]

The baselines learn from the same books that the model was trained on, and are measured on the same held-out bytes:
an interpolated byte n-gram model of orders 5 and 6 (Witten and Bell 1991), which learns nothing while it is tested,
and xz (LZMA, 64 MiB window), which may also copy from the held-out book itself. One JSON line goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REPO = Path(__file__).resolve().parent.parent
BOOKS = REPO.parent / "shared" / "data" / "books"
HELD_OUT = ("treasure-island", "peter-pan")  # test, dev: never trained on


def packed(data: NDArray[np.uint8], width: int) -> NDArray[np.uint64]:
    """The ``width`` (at most 8) bytes that end at each position as one integer; before the start are zeros."""
    out = np.zeros(len(data), dtype=np.uint64)
    for back in range(width):
        shifted = np.zeros_like(out)
        shifted[back:] = data[: len(data) - back]
        out |= shifted << np.uint64(8 * back)
    return out


def counts_at(keys: NDArray[np.uint64], counts: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """counts of ``wanted`` among the sorted ``keys``; 0 where absent."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, counts[place], 0)


def ngram_bits_per_byte(train: bytes, test: bytes, order: int) -> float:
    """Witten-Bell: p_k(c | h) = (n(hc) + t(h) p_{k-1}(c | h')) / (n(h) + t(h)), t(h) = kinds of bytes seen after h."""
    seen, asked = np.frombuffer(train, np.uint8), np.frombuffer(test, np.uint8)
    probability = np.full(len(asked), 1 / 256)
    for k in range(1, order + 1):
        grams, gram_counts = np.unique(packed(seen, k), return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(gram_counts, first)
        kinds = np.diff(np.append(first, len(grams)))
        wanted = packed(asked, k)
        n_hc = counts_at(grams, gram_counts, wanted)
        n_h = counts_at(contexts, totals, wanted >> np.uint64(8))
        t_h = counts_at(contexts, kinds, wanted >> np.uint64(8))
        known = n_h > 0
        probability[known] = ((n_hc + t_h * probability) / np.maximum(1, n_h + t_h))[known]
    return float(-np.log2(probability).mean())


def xz_bits_per_byte(train: bytes, test: bytes) -> float:
    """Growth of the compressed training text when the test text is put behind it."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 64 << 20}]
    size = [len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters)) for text in (train, train + test)]
    return 8 * (size[1] - size[0]) / len(test)


def model_bits_per_byte(source: str, test: bytes, context: int) -> tuple[float, float]:
    """(bits per byte, nats per token) of a model that reads ``test`` in windows, each token with at least half of
    ``context`` tokens before it (but for the first window)."""
    import torch

    import afina

    model, tokenizer = afina.load_model(source), afina.load_tokenizer(source)
    ids = [*tokenizer.eos_ids[:1], *tokenizer.encode(test.decode(), add_special=False)]
    total, half = 0.0, context // 2
    with torch.no_grad():
        for start in range(0, len(ids) - 1, half):
            window = torch.tensor([ids[max(0, start - half) : start + half + 1]])
            labels = window.clone()
            labels[:, : min(start, half) + 1] = -100
            total += model.loss(window, labels, reduction="sum").item()
    return total / math.log(2) / len(test), total / (len(ids) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="afina-tiny")
    parser.add_argument("--book", default=HELD_OUT[0], help="held-out book (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    if not BOOKS.is_dir():
        sys.exit(f"no books at {BOOKS}")
    train = b"\n".join(p.read_bytes() for p in sorted(BOOKS.glob("*.txt")) if p.stem not in HELD_OUT)
    test = (BOOKS / f"{args.book}.txt").read_bytes()
    started = time.perf_counter()
    result: dict[str, object] = {"book": args.book, "bytes": len(test), "trained_on_bytes": len(train)}
    for order in (5, 6):
        result[f"ngram_{order}_bits_per_byte"] = round(ngram_bits_per_byte(train, test, order), 4)
    result["xz_bits_per_byte"] = round(xz_bits_per_byte(train, test), 4)
    if args.model != "none":
        bits, nats = model_bits_per_byte(args.model, test, args.context)
        result |= {"model": args.model, "model_bits_per_byte": round(bits, 4), "nats_per_token": round(nats, 4)}
    print(json.dumps(result | {"seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
