"""Where the turns of a conversation stand in the text that a chat template wrote, and what of each is trained.

A template's pieces (`ChatTemplate.pieces`) say for which message each was written. Of an assistant's turn that is
trained which the model will have to write: what follows the generation prompt, up to and with the tokens that end the
turn. A turn of which the template leaves something out is an error, not a turn that is trained in part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from afina.errors import DataError
from afina.loaders.text.chat_template import numbered

if TYPE_CHECKING:
    from afina.loaders.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


def find_turns(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, trained: Set[int]
) -> tuple[str, dict[int, list[Span]]]:
    """Return the text of a conversation and, for each message of ``trained`` by its number, its trained ranges.

    ``messages`` and ``tools``: as `Tokenizer.checked` returns them. The text is the template's, ended with the
    end-of-text token where the template leaves its last turn open. Raises DataError naming the message.
    """
    pieces = tokenizer.template.pieces(messages, tools=tools)
    written = "".join([part for part, _ in pieces])
    text = tokenizer.with_bos(written, glue="")
    runs = _runs(pieces, len(text) - len(written))
    _check_all_written(tokenizer, messages, tools, text)
    spans: dict[int, list[Span]] = {}
    end = 0
    for number in sorted(trained):
        found = runs.get(number) or _between(tokenizer, messages, tools, number, text)
        where = f"message {number + 1} ({messages[number]['role']})"
        if not found:
            raise DataError(f"{where}: the chat template of {tokenizer.where} writes nothing for it: leave the row out")
        _check_whole(tokenizer, messages, number, " ".join([text[a:b] for a, b in found]))
        first, last = found[0], found[-1]
        found[0] = (max(_start(tokenizer, messages, tools, number, text, first), end), first[1])
        stop = _end(tokenizer, text, last)
        if number == len(messages) - 1 and (eos := tokenizer.eos_token):
            if stop is None and not text[last[1] :].strip():
                text += eos  # a template that never ends its last turn would teach the model never to stop
            if text[last[1] if stop is None else stop :].strip() == eos:  # the end of the text
                stop = len(text.rstrip())
        stop = last[1] if stop is None else stop
        found[-1] = (found[-1][0], stop)
        spans[number] = [(a, b) for a, b in found if a < b]
        if not spans[number]:
            raise DataError(f"{where}: the chat template of {tokenizer.where} leaves nothing of it to learn")
        end = stop
    return text, spans


def _runs(pieces: Iterable[tuple[str, int | None]], shift: int) -> dict[int, list[Span]]:
    """The ranges of the text that were written for each message, neighbours joined. ``shift``: of all places."""
    runs: dict[int, list[Span]] = {}
    at, before = shift, None
    for part, number in pieces:
        if part and number is not None:
            mine = runs.setdefault(number, [])
            if before == number:
                mine[-1] = (mine[-1][0], at + len(part))
            else:
                mine.append((max(at, 0), at + len(part)))
        before = number if part else before
        at += len(part)
    return runs


def _prompt(tokenizer: Tokenizer, messages: Messages, tools: Tools | None, number: int) -> str | None:
    """What generation is given to write message ``number``; None where the template refuses such a conversation."""
    if not number:
        return None
    try:
        return tokenizer.with_bos(
            tokenizer.template.render(messages[:number], tools=tools, add_generation_prompt=True), glue=""
        )
    except DataError:
        return None


def _between(tokenizer: Tokenizer, messages: Messages, tools: Tools | None, number: int, text: str) -> list[Span]:
    """A turn that a template writes outside its loop: where the conversation up to it, and with it, begin the text."""
    try:
        before, through = (
            tokenizer.with_bos(tokenizer.template.render(messages[:end], tools=tools), glue="")
            for end in (number, number + 1)
        )
    except DataError:
        return []
    found = text.startswith(before) and text.startswith(through) and len(before) < len(through)
    return [(len(before), len(through))] if found else []


def _start(tokenizer: Tokenizer, messages: Messages, tools: Tools | None, number: int, text: str, turn: Span) -> int:
    """Where what the model writes begins in a ``turn``: behind the generation prompt."""
    if messages[number]["role"] != "assistant":
        content = str(messages[number]["content"] or "").strip()
        return max(text.find(content, *turn), turn[0]) if content else turn[0]
    header = tokenizer.template.generation_prompt
    prompt = _prompt(tokenizer, messages, tools, number)
    if prompt is not None and text.startswith(prompt) and turn[0] <= len(prompt) <= turn[1]:
        # Some templates open no turn behind another one of the assistant's.
        unopened = bool(header) and not prompt.endswith(header) and text.startswith(header, len(prompt))
        return len(prompt) + unopened * len(header)
    # What came before is written in another way here, or the prompt opens a thought that this turn has not: what both
    # begin with, up to the end of a line or of a control token.
    same = _common(header, text[turn[0] : turn[1]])
    if len(same) < len(header):
        ends = [match.end() for match in tokenizer.special_pattern.finditer(header)]
        same = same[: max([end for end in ends if end <= len(same)] + [same.rfind("\n") + 1])]
    return turn[0] + len(same)


def _end(tokenizer: Tokenizer, text: str, turn: Span) -> int | None:
    """Where a ``turn`` ends with a control token, which may be written with what follows; None where none does."""
    body = text[turn[0] : turn[1]].rstrip()
    tokens = list(tokenizer.special_pattern.finditer(body))
    if tokens and tokens[-1].end() == len(body):
        return turn[0] + len(body)
    rest = text[turn[1] :]
    after = tokenizer.special_pattern.match(rest, len(rest) - len(rest.lstrip()))
    if after and tokenizer.token_id(after[0]) in tokenizer.eos_ids:
        return turn[1] + after.end()  # some templates end every turn but the last
    return None


def _common(one: str, other: str) -> str:
    """The longest text that both start with."""
    size = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:size]


# What a template leaves out


def _check_whole(tokenizer: Tokenizer, messages: Messages, number: int, turn: str) -> None:
    """Raise DataError for what the template did not write of an assistant's message into its turn."""
    message = messages[number]
    for what, value in _parts(message, last=all(m["role"] != "user" for m in messages[number:])):
        if not _holds(turn, value):
            raise DataError(
                f"message {number + 1} ({message['role']}): the chat template of {tokenizer.where} does not write "
                f"{what} as it stands: leave it out, or use a chat template that writes it"
            )


def _parts(message: Mapping[str, Any], *, last: bool) -> Iterator[tuple[str, Any]]:
    """What a template must write of a message; ``last``: no user's message follows, so the thoughts too."""
    content = (message["content"] or "").strip()
    thought, mark, answer = content.rpartition("</think>")
    if mark:
        content = answer.strip()
        if last:
            yield "its thought (<think>)", thought.partition("<think>")[2].strip() or thought.strip()
    yield "its content", content
    if last and message.get("reasoning_content"):
        yield "its reasoning_content", message["reasoning_content"].strip()
    for place, call in enumerate(message.get("tool_calls") or (), 1):
        yield f"the name of tool call {place}", call["function"]["name"]
        for key, value in call["function"]["arguments"].items():
            for leaf in (key, *_leaves(value)):
                yield f"the argument {key!r} of tool call {place}", leaf


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _holds(text: str, value: Any) -> bool:
    """Whether ``value`` stands in ``text``, as it is or as JSON spells it."""
    if isinstance(value, str):
        spelled = {value, *(json.dumps(value, ensure_ascii=flag)[1:-1] for flag in (False, True))}
    else:
        spelled = {json.dumps(value), str(value)}
    return any(one in text for one in spelled)


def _check_all_written(tokenizer: Tokenizer, messages: Messages, tools: Tools | None, text: str) -> None:
    """Raise DataError for a message that the template drops, and for tools that it does not show to the model."""
    for tool in tools or ():
        if not _holds(text, name := tool["function"]["name"]):
            raise DataError(
                f"tools: the chat template of {tokenizer.where} does not write {name!r}: leave the tools out, or use a "
                "chat template that shows them to the model"
            )
    marked = [m if m["role"] == "assistant" else {**m, "content": mark} for m, mark in zip(messages, _marks(messages))]
    try:
        found = tokenizer.template.render(marked, tools=tools)
    except DataError:  # the template looks at contents, and goes no further than it must
        return
    for number, message in enumerate(marked):
        if message["role"] != "assistant" and not _holds(found, message["content"]):
            raise DataError(
                f"message {number + 1} ({message['role']}): the chat template of {tokenizer.where} does not write it: "
                "leave it out, or use a chat template that does"
            )


def _marks(messages: Messages) -> list[str]:
    return [message["content"] for message in numbered([message["role"] for message in messages])]
