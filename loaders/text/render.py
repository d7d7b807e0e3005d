"""THE renderer: examples to text with the ranges that are trained.

Training, evaluation, generation, chat and serving all take their text from here, so they cannot disagree. The text
holds its special tokens (one BOS at most, the end of the text or of the turn), and is tokenised once as a whole
(`encode.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from afina.errors import DataError, TokenizerError
from afina.loaders.text.opaque import SLOT, Opaque, numbered
from afina.loaders.text.openings import Messages, Tools
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.turns import find_turns

MAX_MESSAGES = 5_000  # of a conversation
_KEPT_LAYOUT = 100  # messages of the longest conversation whose layout may serve again: 4,096 of them are kept
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Example:
    """One row: exactly one of ``text``, ``prompt`` with ``completion``, or ``messages``; ``where`` it was read.

    ``messages``: {role, content}; an assistant's may have ``tool_calls`` ({id, type, function: {name, arguments}} with
    an object of arguments; content may then be None) and ``reasoning_content``. ``tools``: what may be called, as JSON
    schemas. ``trained``: which messages are learnt, by number from 0 (None: all of the assistant). ``candidates``:
    texts of which one is the answer, for tasks that choose; training does not read them.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    trained: frozenset[int] | None = None
    where: str = ""
    candidates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given = (self.text is not None, self.prompt is not None or self.completion is not None, bool(self.messages))
        if sum(given) != 1 or (self.prompt is None) != (self.completion is None):
            raise DataError(f"{self.where or 'row'}: expected one of text, prompt with completion, or messages")


@dataclass(frozen=True)
class Rendered:
    """Text with its special tokens, and the ranges [start, end) of its characters that are trained."""

    text: str
    spans: Spans


def render_example(tokenizer: Tokenizer, example: Example, *, train_on_prompt: bool = False) -> Rendered:
    """Return the text of a row and its trained ranges.

    text: everything, the end-of-text token included. prompt and completion: the completion and the end-of-text token.
    messages: each turn of the assistant (or those of ``trained``) from where its generation prompt ends (so, what the
    model will have to write, tool calls and thoughts too) up to and with its end-of-turn tokens; other roles' from
    where their content starts. ``train_on_prompt``: everything but BOS. A control token spelt in a message is data (see
    `Tokenizer.render`); in a text, prompt or completion it is taken as meant. Raises DataError naming the row.
    """
    if example.messages is not None:
        try:
            text, spans = _conversation(tokenizer, example, train_on_prompt)
        except DataError as problem:
            raise DataError(f"{example.where or 'row'}: {problem}") from problem
    elif example.text is not None:
        text, train_on_prompt = _ended(tokenizer, tokenizer.with_bos(example.text)), True
    else:
        both = (example.prompt or "") + (example.completion or "")
        text = tokenizer.with_bos(both)
        start = len(text) - len(both) + len((example.prompt or "").rstrip(" "))
        text = _ended(tokenizer, text)
        spans = ((start, len(text)),)
    if train_on_prompt:
        bos = tokenizer.bos_token or ""
        has_bos = tokenizer.adds_bos or (example.messages is not None and bos != tokenizer.eos_token)
        spans = ((len(bos) if has_bos and text.startswith(bos) else 0, len(text)),)
    return Rendered(text, spans)


def render_prompt(tokenizer: Tokenizer, prompt: Example | Messages | str, *, tools: Tools | None = None) -> str:
    """Return what the model is given before it writes: the text of `render_example` up to the last trained range.

    A plain text or prompt loses its trailing spaces: tokenizers join a space to the word after it, so training and
    generation agree only when the answer brings its own space. Of messages, a final assistant turn is the answer.
    ``tools``: what the model may call, where ``prompt`` is messages; a row brings its own.
    """
    if isinstance(prompt, Example):
        if prompt.messages is None:
            prompt = prompt.prompt if prompt.prompt is not None else prompt.text or ""
        else:
            try:
                return render_prompt(tokenizer, prompt.messages, tools=prompt.tools)
            except DataError as problem:
                raise DataError(f"{prompt.where or 'row'}: {problem}") from problem
    if isinstance(prompt, str):
        return tokenizer.with_bos(prompt.rstrip(" "))
    answered = bool(prompt) and prompt[-1].get("role") == "assistant"
    return tokenizer.render(prompt[:-1] if answered else prompt, tools=tools, add_generation_prompt=True)


def _ended(tokenizer: Tokenizer, text: str) -> str:
    if tokenizer.eos_token is None:
        raise TokenizerError(f"{tokenizer.where}: no end-of-text token: set eos_token in tokenizer_config.json")
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _conversation(tokenizer: Tokenizer, example: Example, any_role: bool) -> tuple[str, Spans]:
    if len(example.messages or ()) > MAX_MESSAGES:
        raise DataError(
            f"{len(example.messages or ()):,} messages, expected at most {MAX_MESSAGES:,}: split the conversation"
        )
    messages = tokenizer.checked(example.messages or ())
    roles = tuple([message["role"] for message in messages])
    trained = example.trained
    if trained is None:
        trained = frozenset(number for number, role in enumerate(roles) if role == "assistant")
    if not trained and not any_role:
        raise DataError(f"no assistant turn to learn from (roles: {', '.join(roles)})")
    thought = tokenizer.template.opened_thought
    if not example.tools and not any(
        len(message) > 2 or (thought and message["content"].lstrip().startswith(thought)) for message in messages
    ):
        # Role and content, nothing else that a template could read: what is known of these roles may serve again. (But
        # where a content brings the thought that the generation prompt opens, it is learnt from behind that only.)
        contents = [message["content"] for message in messages]
        layout = (_kept_layout if len(roles) <= _KEPT_LAYOUT else _layout)(tokenizer, roles, trained)
        if layout.opaque is not None and layout.opaque.holds(contents):
            return layout.fill(contents)
        text = tokenizer.with_bos(tokenizer.template.render(messages), glue="")
        for variant in (contents, [content.strip() for content in contents]):
            filled = layout.fill(variant)
            if filled[0] == text + layout.closing:
                return filled
    text, turns = find_turns(tokenizer, messages, tokenizer.unmarked(example.tools), trained)
    return text, tuple(span for number in sorted(turns) for span in turns[number])


@dataclass(frozen=True)
class _Layout:
    """What a template writes for a sequence of roles: the text around the contents, which message is at each place,
    and the trained ranges as pairs (contents before, other characters before).

    ``closing``: text added to what the template writes. A template may look at contents, so a layout holds for a row
    only where filling it gives the text that the template writes for the row. For contents for which ``opaque`` holds
    that is known; where there are other ones, or it is None, the row is rendered and the texts are compared.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    closing: str
    opaque: Opaque | None

    def fill(self, contents: list[str]) -> tuple[str, Spans]:
        ordered = [contents[number] for number in self.order]
        parts = [""] * (2 * len(ordered) + 1)
        parts[::2], parts[1::2] = self.literals, ordered
        sizes = [0, *accumulate(map(len, ordered))]
        return "".join(parts), tuple([(sizes[a] + i, sizes[b] + j) for (a, i), (b, j) in self.spans])


def _layout(tokenizer: Tokenizer, roles: tuple[str, ...], trained: frozenset[int]) -> _Layout:
    plain = tokenizer.render(numbered(roles))
    slots = list(SLOT.finditer(plain))
    order = [int(slot[1]) for slot in slots]
    times = Counter(order)
    for number, role in enumerate(roles):
        if times[number] != 1:
            how = f"writes message {number + 1} ({role}) {times[number]} times, not once"
            raise DataError(f"the chat template of {tokenizer.where} {how}: leave it out, or use another template")
    text, found = find_turns(tokenizer, numbered(roles), None, trained)
    ends = [slot.end() for slot in slots]
    sizes = list(accumulate([len(slot[0]) for slot in slots], initial=0))

    def mark(position: int) -> tuple[int, int]:
        before = bisect_right(ends, position)
        return before, position - sizes[before]

    return _Layout(
        literals=tuple(SLOT.split(text)[::2]),
        order=tuple(order),
        spans=tuple((mark(start), mark(end)) for number in sorted(found) for start, end in found[number]),
        closing=text[len(plain) :],
        opaque=_opaque(tokenizer, roles, plain),
    )


def _opaque(tokenizer: Tokenizer, roles: tuple[str, ...], plain: str) -> Opaque | None:
    """For which contents the text is known to be ``plain``, what these roles give with SLOTs, but for the SLOTs."""
    found = tokenizer.template.opaque(roles)
    if found is None or tokenizer.with_bos(found.text, glue="") != plain:
        return None
    first, bos = SLOT.split(plain, 1)[0], tokenizer.bos_token
    # One BOS too many is taken off, so a content that goes on with one may not follow at once.
    return None if bos and tokenizer.adds_bos and bos.startswith(first.removeprefix(bos)) else found


_kept_layout = lru_cache(maxsize=4096)(_layout)
