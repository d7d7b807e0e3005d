"""Answers in the shape of OpenAI's: whole, and as server-sent events while they are written."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from afina.serve.requests import Chat, Completion

if TYPE_CHECKING:
    from afina.serve.tokens import Speller
    from afina.serve.worker import Text, Writing

DONE = b"data: [DONE]\n\n"


class Answer:
    """The answer to one request for texts; ``echoed``: the texts of the prompts, where they are to come
    before what is written."""

    def __init__(
        self, asked: Chat | Completion, writing: Writing, speller: Speller | None, echoed: Sequence[str] = ()
    ) -> None:
        self.asked, self.writing, self.echoed = asked, writing, echoed
        self._speller = speller
        self._chat = isinstance(asked, Chat)
        self._empty = asked.max_tokens == 0  # nothing is asked for but the prompt: the one token written is not sent
        kind, prefix = ("chat.completion", "chatcmpl-") if self._chat else ("text_completion", "cmpl-")
        self._head = {
            "id": prefix + secrets.token_hex(12),
            "object": kind + (".chunk" if self._chat and asked.stream else ""),
            "created": int(time.time()),
            "model": writing.served.name,
        }
        # What has been sent of each text: characters, tokens with their logprobs, and whether it was opened and ended.
        self._sent = [_Sent() for _ in writing.texts]

    # Whole

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(number, text) for number, text in enumerate(self.writing.texts)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _choice(self, number: int, text: Text) -> dict[str, Any]:
        finish = "length" if self._empty else text.finish_reason
        logprobs = self._logprobs(text, 0)
        if self._chat:
            message = {"role": "assistant", "content": text.text, "refusal": None}
            return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": finish}
        written = "" if self._empty else text.text
        if self.echoed:
            written = self._echo(text) + written
            before = self._prompt_logprobs(text)
            if before is not None and logprobs is not None:
                before = {name: column + logprobs[name] for name, column in before.items()}
            logprobs = before
        return {"index": number, "text": written, "logprobs": logprobs, "finish_reason": finish}

    def _usage(self) -> dict[str, Any]:
        texts = self.writing.texts
        each = texts[:: self.asked.n]  # the prompt of n texts is counted once
        prompt, written = sum(t.row.prompt_tokens for t in each), 0 if self._empty else sum(t.tokens for t in texts)
        cached = sum(t.row.cached_tokens for t in each)
        total = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        return total | {"prompt_tokens_details": {"cached_tokens": cached}}

    # In pieces

    def opening(self) -> bytes:
        """What is sent before anything is written: in a chat, who speaks."""
        if not self._chat:
            return b""
        first = {
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
        return b"".join(self._event({"index": number, **first}) for number in range(len(self.writing.texts)))

    def pieces(self) -> bytes:
        """What has been written since the last call, as events."""
        return b"".join(self._events())

    def _events(self) -> Iterator[bytes]:
        for number, (text, sent) in enumerate(zip(self.writing.texts, self._sent, strict=True)):
            finish = text.finish_reason
            if sent.ended or finish == "error":  # whose error ends the stream
                continue
            if not self._chat and self.echoed and not sent.opened:
                if not text.tokens and finish is None:
                    continue  # the log-probabilities of the prompt are not there yet
                sent.opened = True
                yield self._event(self._piece(number, self._echo(text), self._prompt_logprobs(text), None))
            delta = "" if self._empty else text.text[sent.characters :]
            if not delta and finish is None:
                continue
            logprobs = self._logprobs(text, sent.tokens)
            sent.tokens = self._known(text)
            sent.characters = len(text.text)
            sent.ended = finish is not None
            ended = "length" if finish is not None and self._empty else finish
            if self._chat and (delta or logprobs):  # as OpenAI does, the reason comes by itself after the last text
                yield self._event(self._piece(number, delta, logprobs, None))
                delta, logprobs = "", None
            if not self._chat or ended:
                yield self._event(self._piece(number, delta, logprobs, ended))

    def closing(self) -> bytes:
        """What is sent when all texts are done."""
        if not self.asked.include_usage:
            return DONE
        return _line({**self._head, "choices": [], "usage": self._usage()}) + DONE

    def _piece(self, number: int, delta: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        if self._chat:
            said = {"content": delta} if finish is None else {}
            return {"index": number, "delta": said, "logprobs": logprobs, "finish_reason": finish}
        return {"index": number, "text": delta, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choice: dict[str, Any]) -> bytes:
        return _line({**self._head, "choices": [choice]} | ({"usage": None} if self.asked.include_usage else {}))

    # Log-probabilities

    def _known(self, text: Text) -> int:
        """How many of a text's tokens have log-probabilities to show: those that are in it, and for completions the
        end token too, as vLLM has it. lm-evaluation-harness relies on a token behind the prompt that it scores."""
        if text.finish_reason is None:
            return text.tokens
        return text.tokens if self._chat else len(text.row.logprobs)

    def _logprobs(self, text: Text, first: int) -> dict[str, Any] | None:
        """Of the tokens from ``first`` on."""
        if self._speller is None or self._empty:
            return None
        found = text.row.logprobs[first : self._known(text)]
        if not found:
            return None
        if self._chat:
            return {"content": self._speller.chat(found), "refusal": None}
        return self._speller.columns(found, self._start(text))

    def _prompt_logprobs(self, text: Text) -> dict[str, Any] | None:
        return None if self._speller is None else self._speller.columns(text.row.prompt_logprobs or ())

    def _start(self, text: Text) -> int:
        return len(self._echo(text)) if self.echoed else 0

    def _echo(self, text: Text) -> str:
        return self.echoed[self.writing.texts.index(text) // self.asked.n]


@dataclass
class _Sent:
    characters: int = 0
    tokens: int = 0
    opened: bool = False
    ended: bool = False


def _line(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode(errors="backslashreplace") + b"\n\n"
