"""How far the model is given an assistant's turn: what a template opens it with is not the model's to write.

What generation is given for a turn is the template's text of the messages before it, with the generation prompt. To
render that for every turn takes the square of their number. So it is done for the turns at the beginning of a
conversation, for the last one, and for the first that stands behind messages of other roles than any before it; what a
long conversation's other turns are opened with is known from those that stand behind the same roles. Where the last
turn shows that this is not all that the template looks at, every turn is rendered, and a conversation that is too long
for that is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from afina.errors import DataError

if TYPE_CHECKING:
    from afina.loaders.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

RENDERED = 64  # messages at the beginning of a conversation whose turns are all rendered
MAX_RENDERED = 60_000  # messages that are rendered for the further turns of one, all together: some seconds
_BEFORE = 2  # messages before a turn whose roles say what it is opened with


class Openings:
    """Where the model's part begins in the turns of one conversation, whose ``text`` the template wrote."""

    def __init__(self, tokenizer: Tokenizer, messages: Messages, tools: Tools | None, text: str) -> None:
        self._tokenizer, self._template = tokenizer, tokenizer.template
        self._messages, self._tools, self._text = messages, tools, text
        self._left = MAX_RENDERED
        self._known: dict[tuple[Any, ...], str | None] = {}  # what stands before a turn -> what opens it
        self._mixed: set[tuple[Any, ...]] = set()  # what stands before turns that are opened in several ways

    def starts(self, turns: Mapping[int, Span]) -> dict[int, int]:
        """The place in the text where the model's part of each message begins, by number; ``turns`` [a, b) likewise."""
        found = {number: self._start(number, turns[number]) for number in sorted(turns)}
        last = max(turns, default=0)
        if last >= RENDERED and found[last] != self._rendered(last, turns[last]):
            return {number: self._rendered(number, turns[number]) for number in sorted(turns)}
        return found

    def spend(self, number: int) -> None:
        """Account for a rendering of so many messages. Raises DataError where a conversation takes too many."""
        if number < RENDERED:
            return
        self._left -= number
        if self._left < 0:
            raise DataError(
                f"the chat template of {self._tokenizer.where} writes turns in too many ways to find them all among "
                f"{len(self._messages):,} messages: split the conversation"
            )

    def _start(self, number: int, turn: Span) -> int:
        behind = self._behind(number)
        if number < RENDERED or behind in self._mixed or behind not in self._known:
            return self._rendered(number, turn)
        opening = self._known[behind]
        return self._likely(turn) if opening is None else self._opened(opening, turn)

    def _behind(self, number: int) -> tuple[Any, ...]:
        before = self._messages[max(0, number - _BEFORE) : number]
        return tuple([(message["role"], bool(message.get("tool_calls"))) for message in before])

    def _rendered(self, number: int, turn: Span) -> int:
        """As ``start``, from what generation is given to write the message."""
        self.spend(number)
        prompt, behind = self._prompt(number), self._behind(number)
        if prompt is None:
            return self._likely(turn)
        if not prompt.startswith(self._text[: turn[0]]):
            self._known.setdefault(behind, None)
            return self._likely(turn)
        opening = prompt[turn[0] :]
        if (self._known.get(behind) or opening) != opening:
            self._mixed.add(behind)
        self._known[behind] = opening
        return self._opened(opening, turn)

    def _opened(self, opening: str, turn: Span) -> int:
        """Where the model's part begins in a turn that it is given with ``opening``, if it is that which is written."""
        place = turn[0] + len(opening)
        if place > turn[1] or not self._text.startswith(opening, turn[0]):
            return self._likely(turn)
        header = self._template.generation_prompt
        # Some templates open no turn behind another one of the assistant's.
        unopened = bool(header) and not self._text.endswith(header, 0, place) and self._text.startswith(header, place)
        return place + unopened * len(header)

    def _prompt(self, number: int) -> str | None:
        """What generation is given to write a message; None where the template refuses such a conversation."""
        if not number:
            return None
        try:
            text = self._template.render(self._messages[:number], tools=self._tools, add_generation_prompt=True)
        except DataError:
            return None
        return self._tokenizer.with_bos(text, glue="")

    def _likely(self, turn: Span) -> int:
        """Where the model's part begins in a turn before which the text is not what generation is given (what came
        before is written in another way there, or the prompt opens a thought that this turn has not): behind what it
        has in common with the usual header, up to the end of a line or of a control token."""
        header, text = self._template.generation_prompt, self._text[turn[0] : turn[1]]
        pairs = enumerate(zip(header, text))
        size = next((i for i, (a, b) in pairs if a != b), min(len(header), len(text)))
        if size < len(header):
            ends = [match.end() for match in self._tokenizer.special_pattern.finditer(header)]
            size = max([end for end in ends if end <= size] + [header.rfind("\n", 0, size) + 1])
        return turn[0] + size
