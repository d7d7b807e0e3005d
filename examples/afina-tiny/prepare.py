"""Prepare the training of afina-tiny: split the books into train and dev, train the tokenizer on the train books.

    python examples/afina-tiny/prepare.py BOOKS OUT

BOOKS is a folder of plain-text books. OUT gets train/ and dev/ (links to the books) and tokenizer/. The books named in
HELD_OUT are never trained on: the first is the test book that nothing here reads, the second the dev set.
"""

from __future__ import annotations

import sys
from pathlib import Path

from afina.loaders.text.train_bpe import train_bpe

HELD_OUT = ("treasure-island", "peter-pan")
VOCAB_SIZE = 4096
SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def main() -> None:
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"usage: python {sys.argv[0]} BOOKS OUT (BOOKS: a folder of .txt files)")
    books, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    for name in ("train", "dev"):
        (out / name).mkdir(parents=True, exist_ok=True)
    texts = []
    for book in sorted(books.glob("*.txt")):
        if book.stem == HELD_OUT[0]:
            continue
        link = out / ("dev" if book.stem == HELD_OUT[1] else "train") / book.name
        link.unlink(missing_ok=True)
        link.symlink_to(book)
        if book.stem != HELD_OUT[1]:
            texts.append(book.read_text(encoding="utf-8"))
    tokenizer = train_bpe(
        texts, VOCAB_SIZE, special_tokens=SPECIALS, eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save(out / "tokenizer")
    print(f"{len(texts)} training books, a tokenizer of {tokenizer.vocab_size} tokens in {out / 'tokenizer'}")


if __name__ == "__main__":
    main()
