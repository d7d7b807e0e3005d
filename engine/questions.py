"""From rows to what a model is asked: prompts with examples before them, and options as the model would write them.

Prompts and answers are those of training (``loaders/text/render.py``): a model is measured on what it has learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from afina.engine.likelihood import Pair, encode_pairs
from afina.errors import DataError, TokenizerError, nearest
from afina.loaders.text.encode import encode_rendered
from afina.loaders.text.render import Example, render_example

if TYPE_CHECKING:
    from afina.loaders.text.tokenizer import Tokenizer

SHOT_END = "\n\n"  # between the examples before a prompt of plain text


def answer_of(example: Example) -> str | None:
    """What a row says should be answered: its completion, or the assistant's last turn; None where it says nothing."""
    if example.messages is not None:
        last = example.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else None
    return example.completion or None


def answers_of(examples: Sequence[Example], task: str) -> list[str]:
    """The answer of each row. Raises DataError naming a row that has none."""
    found = []
    for example in examples:
        answer = answer_of(example)
        if answer is None:
            raise DataError(f"{name_of(example)}: has no answer to compare with; task {task} needs one in every row")
        found.append(answer)
    return found


def name_of(example: Example) -> str:
    """How a message calls a row."""
    return example.where or "a row"


def prompt_of(example: Example) -> str:
    """What a row asks, as people read it: its prompt, or the message before the answer."""
    if example.messages is None:
        return example.prompt if example.prompt is not None else example.text or ""
    return str(_asked(example)[-1]["content"] or "")


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """The row with solved rows before its prompt: as earlier turns of its conversation, behind its system message, or
    as text. Raises DataError where they are not of the row's kind, or have no answer."""
    if not shots:
        return example
    answers_of(shots, "with examples before each prompt")
    if any((shot.messages is None) != (example.messages is None) for shot in shots):
        raise DataError(f"{name_of(shots[0])}: an example for {name_of(example)} must be of the same schema")
    if example.messages is None:
        before = "".join(f"{shot.prompt}{shot.completion}{SHOT_END}" for shot in shots)
        return dataclasses.replace(example, prompt=before + (example.prompt or ""))
    own = list(example.messages)
    head = [message for message in own[:1] if message["role"] == "system"]
    turns = [message for shot in shots for message in shot.messages or () if message["role"] != "system"]
    return dataclasses.replace(example, messages=(*head, *turns, *own[len(head) :]), trained=None)


def options_of(examples: Sequence[Example], answers: Sequence[str], given: Sequence[str] | None) -> list[list[str]]:
    """What each row may be answered with: the options ``given``, or the row's candidates, or all answers of the rows.

    Raises DataError naming the row whose answer is not among its options, or whose options are not distinct.
    """
    common = _distinct(given, "the options") if given else sorted({answer.strip() for answer in answers})
    found = []
    for example, answer in zip(examples, answers, strict=True):
        options = common
        if not given and example.candidates is not None:
            options = _distinct(example.candidates, f"{name_of(example)}: candidates")
        if answer.strip() not in options:
            shown = ", ".join(options[:8]) + (", ..." if len(options) > 8 else "")
            raise DataError(
                f"{name_of(example)}: its answer {answer.strip()!r} is not among the options ({shown})"
                f"{nearest(answer.strip(), options)}: add it to them, or mend the row"
            )
        found.append(options)
    if not given and len(common) < 2 and not any(example.candidates for example in examples):
        raise DataError(
            f"every row is answered {common[0]!r}: nothing to choose from; name the labels there are with --options"
        )
    return found


def candidates_of(examples: Sequence[Example], answers: Sequence[str]) -> list[list[str]]:
    """The candidates of each row, which must bring them. Raises DataError naming the row."""
    for example in examples:
        if example.candidates is None:
            raise DataError(
                f"{name_of(example)}: has no candidates; task retrieve needs in every row a list of texts under "
                "'candidates', the answer among them (or use task generate)"
            )
    return options_of(examples, answers, None)


def _distinct(options: Sequence[str], what: str) -> list[str]:
    bare = [option.strip() for option in options]
    twice = next((option for number, option in enumerate(bare) if option in bare[:number] or not option), None)
    if twice is not None:
        raise DataError(f"{what} hold {repr(twice) + ' twice' if twice else 'an empty text'}: leave it out")
    return bare


def option_pairs(tokenizer: Tokenizer, example: Example, answer: str, options: Sequence[str]) -> list[Pair]:
    """The ids of the row's prompt and of each option behind it, with what ends an answer.

    The end (of the turn, of the text) makes options that begin another one comparable: "card" is not likelier than
    "card lost" only because it is a part of it. Options of plain text begin as the row's own ``answer`` does.
    """
    if example.messages is None:
        lead = answer[: len(answer) - len(answer.lstrip())]
        end = tokenizer.token_id(tokenizer.eos_token)
        if end is None:
            raise TokenizerError(f"{tokenizer.where}: no end-of-text token: set eos_token in tokenizer_config.json")
        context, encoded = encode_pairs(tokenizer, example.prompt or "", [lead + option for option in options])
        return [(tuple(context), (*ids, end)) for ids in encoded]
    asked = _asked(example)
    rows = [
        dataclasses.replace(
            example,
            messages=(*asked, {"role": "assistant", "content": option}),
            trained=frozenset({len(asked)}),
        )
        for option in options
    ]
    rendered = [render_example(tokenizer, row) for row in rows]
    pairs = []
    for ids, mask in zip(*encode_rendered(tokenizer, rendered)):
        first, last = int(mask.argmax()), len(mask) - int(mask[::-1].argmax())
        pairs.append((tuple(ids[:first].tolist()), tuple(ids[first:last].tolist())))
    return pairs


def _asked(example: Example) -> Sequence[Mapping[str, Any]]:
    """The messages before the answer."""
    messages = example.messages or ()
    return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "assistant" else messages
