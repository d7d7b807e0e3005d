"""Tokens as answers show them: the text of each, its bytes, and its log-probability beside those of the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from afina.engine.token_view import LETTER_BYTES, TokenPieces

if TYPE_CHECKING:
    from afina.engine.sampler import TokenLogprob
    from afina.loaders.text.tokenizer import Tokenizer

LEAST = -9999.0  # for minus infinity, which JSON does not have


class Speller:
    """Spells the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pieces = TokenPieces(tokenizer)

    def bytes_of(self, number: int) -> list[int]:
        """The bytes that a token stands for, also where they are no whole character."""
        name = self.tokenizer.token(number) or ""
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return [int(name[3:5], 16)]
        if self.tokenizer.byte_level and name and LETTER_BYTES.keys() >= set(name):
            return [LETTER_BYTES[letter] for letter in name]
        return list(self.pieces[number].encode())

    def chat(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """As ``/v1/chat/completions`` has them."""
        return [
            self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(i, value) for i, value in one.top]}
            for one in logprobs
            if one.logprob is not None
        ]

    def _entry(self, number: int, logprob: float) -> dict[str, Any]:
        return {"token": self.pieces[number], "logprob": max(logprob, LEAST), "bytes": self.bytes_of(number)}

    def columns(self, logprobs: Sequence[TokenLogprob], start: int = 0) -> dict[str, list[Any]]:
        """As ``/v1/completions`` has them; ``start``: where the text begins that the offsets are counted in. null for
        the first token of a prompt, which nothing predicts."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logprobs:
            top: dict[str, float] | None = None
            if one.logprob is not None:
                top = {}
                for number, value in (*one.top, (one.token, one.logprob)):  # the token itself, likely or not
                    top[self.pieces[number]] = max(top.get(self.pieces[number], LEAST), value)
            values = (self.pieces[one.token], None if one.logprob is None else max(one.logprob, LEAST), top)
            for column, each in zip(shown.values(), (*values, start + one.offset), strict=True):
                column.append(each)
        return shown
