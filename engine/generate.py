"""Text from a model, for one prompt or many: thin layers over ``Batcher``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from afina.engine.batcher import Batcher
from afina.engine.row import Row
from afina.engine.sampler import TokenLogprob
from afina.engine.sampling import Sampling
from afina.errors import DataError
from afina.loaders.text.render import Example, render_prompt
from afina.loaders.text.turns import Tools

if TYPE_CHECKING:
    from afina.engine.model import GPT
    from afina.loaders.text.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Example  # continued as it is; chat messages to answer; a row of data


class Completion(NamedTuple):
    """What a model wrote, how many tokens it took, and how likely each was, if the sampling asks for that."""

    text: str
    tokens: int
    logprobs: Sequence[TokenLogprob] = ()


def generate(model: GPT, tokenizer: Tokenizer, prompt: Prompt, *, tools: Tools | None = None, **sampling: Any) -> str:
    """Return the model's continuation of a text, or its answer to chat messages; keywords are those of ``Sampling``.

    ``tools``: the functions that the model may call in its answer to messages, as JSON schemas. Raises ConfigError for
    a wrong keyword value, DataError for a prompt that is empty or longer than the context.
    """
    return generate_batch(model, tokenizer, [prompt], tools=tools, **sampling)[0]


def generate_batch(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    tools: Tools | None = None,
    batch_size: int = 32,
    **sampling: Any,
) -> list[str]:
    """``generate`` for many prompts, ``batch_size`` at a time; the texts are in the order of the prompts."""
    names = ["the prompt"] if len(prompts) == 1 else [f"prompt {i + 1}" for i in range(len(prompts))]
    rows = [
        encode_prompt(model, tokenizer, prompt, tools=tools, where=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    done = complete(model, tokenizer, rows, Sampling(**sampling), batch_size=batch_size)
    return [completion.text for completion in done]


def complete(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], sampling: Sampling, *, batch_size: int = 32
) -> Iterator[Completion]:
    """The completions of encoded prompts, in order, as they are done; ``batch_size`` rows run at a time."""
    if not prompts:
        return
    batcher = Batcher(model, tokenizer, max_rows=min(batch_size, len(prompts)))
    rows = [batcher.submit(prompt, sampling) for prompt in prompts]
    for row in rows:
        while row.finish_reason is None:
            batcher.step()
        yield Completion(_text(row), len(row.new), row.logprobs)


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    tools: Tools | None = None,
    batcher: Batcher | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """``generate`` in pieces as they become certain: no half character, and no part of a stop string.

    ``batcher``: one of this model to run in; what it remembers of earlier prompts is not computed again.
    """
    batcher = batcher or Batcher(model, tokenizer, max_rows=1)
    row = batcher.submit(encode_prompt(model, tokenizer, prompt, tools=tools), Sampling(**sampling))
    sent = ""
    try:
        while row.finish_reason is None:
            batcher.step()
            text = _text(row)
            if len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
                sent = text
    finally:
        batcher.cancel(row)


def _text(row: Row) -> str:
    """What a row says; what went wrong in it is raised."""
    if row.error is not None:
        raise row.error
    return row.text


def encode_prompt(
    model: GPT, tokenizer: Tokenizer, prompt: Prompt, *, tools: Tools | None = None, where: str = "the prompt"
) -> list[int]:
    """The token ids of a prompt as training rendered it; DataError when it is empty or fills the model's context."""
    ids = list(tokenizer.encode(render_prompt(tokenizer, prompt, tools=tools), add_special=False))
    limit = model.config.max_positions
    if not ids:
        raise DataError(f"{where} is empty; expected at least one token to continue")
    if len(ids) >= limit:
        raise DataError(f"{where} has {len(ids)} tokens and the model reads {limit} at most: shorten it")
    return ids
