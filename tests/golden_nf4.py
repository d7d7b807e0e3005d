"""Writes tests/golden/nf4.json: weights as bitsandbytes packs and unpacks them, for test_nf4.py to compare bits with.

    python -m venv /tmp/bnb && /tmp/bnb/bin/pip install torch bitsandbytes    # no GPU needed
    /tmp/bnb/bin/python tests/golden_nf4.py

The weights come from a formula in exact arithmetic, so that the file needs to hold results only: in hexadecimal where
they are short, else their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("golden") / "nf4.json"
CASES = [("float32", (5, 67)), ("bfloat16", (301, 61)), ("float16", (64, 300))]


def weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values spread over (-1, 1), denser near 0."""
    count = torch.Size(shape).numel()
    spread = (torch.arange(1, count + 1) * 2654435761 % 2**32).double() / 2**31 - 1
    return (spread * spread * spread).to(dtype).view(shape)


def digest(x: Tensor) -> str:
    data = bytes(x.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist())
    return data.hex() if len(data) <= 200 else "sha256:" + hashlib.sha256(data).hexdigest()


def main() -> None:
    import bitsandbytes
    from bitsandbytes import functional

    cases = []
    for dtype, shape in CASES:
        w = weight(shape, getattr(torch, dtype))
        for double in (True, False):
            packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
            restored = functional.dequantize_4bit(packed, state)
            found = {"packed": packed, "absmax": state.absmax, "code": state.code, "dequantized": restored}
            if double:
                nested = state.state2
                found |= {"offset": state.offset, "nested_absmax": nested.absmax, "nested_code": nested.code}
            bits = {name: digest(x) for name, x in found.items()}
            cases.append({"dtype": dtype, "shape": shape, "double_quant": double} | bits)
    codes = {name: digest(functional.create_dynamic_map(signed=name == "signed")) for name in ("signed", "unsigned")}
    made = {
        "bitsandbytes": bitsandbytes.__version__,
        "torch": torch.__version__,
        "dynamic_codes": codes,
        "cases": cases,
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
