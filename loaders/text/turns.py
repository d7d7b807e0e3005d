"""Where the turns of a conversation stand in the text that a chat template wrote, and what of each is trained.

A template's pieces (`ChatTemplate.pieces`) say for which message each was written. Of an assistant's turn that is
trained which the model will have to write: what follows the generation prompt, up to and with the tokens that end the
turn. A turn of which the template leaves something out is an error, not a turn that is trained in part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

from afina.errors import DataError
from afina.loaders.text.opaque import numbered
from afina.loaders.text.openings import Messages, Openings, Span, Tools
from afina.loaders.text.written import Search

if TYPE_CHECKING:
    from afina.loaders.text.tokenizer import Tokenizer

# A SLOT, also as JSON spells it. Contents have no more digits than that in place of their number.
_MARK = re.compile(r"(?:\ue001|\\ue001)([0-9]{1,9})(?:\ue002|\\ue002)")


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
    search = Search()
    _check_all_written(tokenizer, messages, tools, text, search)
    openings = Openings(tokenizer, messages, tools, text)
    found = {n: runs.get(n) or _between(tokenizer, messages, tools, n, text, openings) for n in sorted(trained)}
    last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for number, ranges in found.items():
        if not ranges:
            raise DataError(
                f"message {number + 1} ({messages[number]['role']}): the chat template of {tokenizer.where} writes "
                "nothing for it: leave the row out"
            )
        turn = " ".join([text[a:b] for a, b in ranges])
        _check_whole(tokenizer, messages, number, turn, search, last=number > last_user)
    starts = openings.starts({n: ranges[0] for n, ranges in found.items() if messages[n]["role"] == "assistant"})
    spans: dict[int, list[Span]] = {}
    end = 0
    for number, ranges in found.items():
        first, last = ranges[0], ranges[-1]
        start = starts[number] if number in starts else _content_start(messages[number], text, first)
        ranges[0] = (max(start, end), first[1])
        stop = _end(tokenizer, text, last)
        if number == len(messages) - 1 and (eos := tokenizer.eos_token):
            if stop is None and not text[last[1] :].strip():
                text += eos  # a template that never ends its last turn would teach the model never to stop
            if text[last[1] if stop is None else stop :].strip() == eos:  # the end of the text
                stop = len(text.rstrip())
        stop = last[1] if stop is None else stop
        ranges[-1] = (ranges[-1][0], stop)
        spans[number] = [(a, b) for a, b in ranges if a < b]
        if not spans[number]:
            where = f"message {number + 1} ({messages[number]['role']})"
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


def _between(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, number: int, text: str, openings: Openings
) -> list[Span]:
    """A turn that a template writes outside its loop: where the conversation up to it, and with it, begin the text."""
    openings.spend(2 * number)
    try:
        before, through = (
            tokenizer.with_bos(tokenizer.template.render(messages[:end], tools=tools), glue="")
            for end in (number, number + 1)
        )
    except DataError:
        return []
    found = text.startswith(before) and text.startswith(through) and len(before) < len(through)
    return [(len(before), len(through))] if found else []


def _content_start(message: Mapping[str, Any], text: str, turn: Span) -> int:
    """Where the content of a message that is not the assistant's begins in its ``turn``."""
    content = str(message["content"] or "").strip()
    return max(text.find(content, *turn), turn[0]) if content else turn[0]


def _end(tokenizer: Tokenizer, text: str, turn: Span) -> int | None:
    """Where a ``turn`` ends with a control token, which may be written with what follows; None where none does."""
    body = text[turn[0] : turn[1]].rstrip()
    tokens = list(tokenizer.special_pattern.finditer(body))
    if tokens and tokens[-1].end() == len(body):
        return turn[0] + len(body)
    place = turn[1]
    while text[place : place + 1].isspace():
        place += 1
    after = tokenizer.special_pattern.match(text, place)
    if after and tokenizer.token_id(after[0]) in tokenizer.eos_ids:
        return after.end()  # some templates end every turn but the last
    return None


# What a template leaves out


def _check_whole(
    tokenizer: Tokenizer, messages: Messages, number: int, turn: str, search: Search, *, last: bool
) -> None:
    """Raise DataError for what the template did not write of a message into its turn; ``last``: as in `_parts`."""
    message = messages[number]
    search.into(turn)
    for what, value in _parts(message, last=last):
        if not search.holds(value):
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
            what = f"the argument {key!r} of tool call {place}"
            for leaf in (key, *_leaves(value)):
                yield what, leaf


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


def _check_all_written(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None, text: str, search: Search
) -> None:
    """Raise DataError for a message that the template drops, and for tools that it does not show to the model."""
    search.into(text)
    for tool in tools or ():
        if not search.holds(name := tool["function"]["name"]):
            raise DataError(
                f"tools: the chat template of {tokenizer.where} does not write {name!r}: leave the tools out, or use a "
                "chat template that shows them to the model"
            )
    marks = numbered([message["role"] for message in messages])
    marked = [m if m["role"] == "assistant" else {**m, "content": mark["content"]} for m, mark in zip(messages, marks)]
    try:
        written = {int(mark[1]) for mark in _MARK.finditer(tokenizer.template.render(marked, tools=tools))}
    except DataError:  # the template looks at contents, and goes no further than it must
        return
    for number, message in enumerate(messages):
        if message["role"] != "assistant" and number not in written:
            raise DataError(
                f"message {number + 1} ({message['role']}): the chat template of {tokenizer.where} does not write it: "
                "leave it out, or use a chat template that does"
            )
