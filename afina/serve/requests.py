"""What a client may ask for, read from the body of its request: completions, chat, and what stands beside them.

The fields and their defaults are those of OpenAI's API (https://platform.openai.com/docs/api-reference), with the
sampling settings of `afina generate` beside them. A field that is accepted does something, or asks for nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.engine.sampling import Sampling
from afina.loaders.data.conversations import Unfit, read_conversation, read_tools
from afina.loaders.jsonfile import show
from afina.serve.errors import RequestError
from afina.serve.fields import Fields

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_TOP = 20  # alternatives of a token
MAX_BIASES = 1024
GREEDY_BELOW = 1e-4  # a temperature: dividing logits by less would leave the range of float32
DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI has it; an answer may fill the context
MOST_TOKENS = 2**31 - 1
_IGNORED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")

Prompt = str | list[int]


@dataclass(frozen=True)
class Talk:
    """Messages, and the functions that may be called in the answer to them."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None


@dataclass(frozen=True)
class Ask:
    """What both kinds of generation share: which model writes how many texts of each prompt, and what is sent back.

    ``max_tokens``: None for as many as fit; 0 for none. ``sampling``: keywords of `Sampling`, without it.
    """

    model: str | None
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    logprobs: int | None
    sampling: dict[str, Any]

    def samplings(self, max_new_tokens: int) -> list[Sampling]:
        """How each of the n texts of a prompt is sampled: by a seed of its own."""
        seed = self.sampling["seed"]
        each = [self.sampling | {"seed": (seed + i) % 2**63} for i in range(self.n)]
        return [Sampling(max_new_tokens=max_new_tokens, logprobs=self.logprobs, **keywords) for keywords in each]


@dataclass(frozen=True)
class Completion(Ask):
    """``/v1/completions``: each prompt is continued, and comes back before its continuation with ``echo``."""

    prompts: tuple[Prompt, ...]
    echo: bool


@dataclass(frozen=True)
class Chat(Ask):
    """``/v1/chat/completions``: the messages are answered."""

    talk: Talk


def read_completion(body: dict[str, Any], most: int) -> Completion:
    """A request for completions of at most ``most`` texts. Raises RequestError."""
    fields = Fields(body)
    prompts = read_prompts(fields, most)
    echo = fields.flag("echo")
    fields.only("suffix", "", why="text after the completion is not supported")
    logprobs = fields.integer("logprobs", 0, MAX_TOP)
    tokens = fields.integer("max_tokens", 0 if echo else 1, MOST_TOKENS)
    common = _common(fields, DEFAULT_MAX_TOKENS if tokens is None else tokens, logprobs)
    fields.only("best_of", 1, common["n"], why="choosing among more texts than n is not supported")
    fields.done()
    _check_texts(len(prompts) * common["n"], most, "prompt" if len(prompts) > 1 else "n")
    return Completion(**common, prompts=prompts, echo=echo)


def read_chat(body: dict[str, Any], most: int) -> Chat:
    """A request for at most ``most`` answers to messages. Raises RequestError."""
    fields = Fields(body)
    talk = read_talk(fields)
    tokens = [fields.integer(name, 1, MOST_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_TOP)
    if top and not wanted:
        raise RequestError("top_logprobs is given without logprobs: set logprobs to true", "top_logprobs")
    if form := fields.object("response_format"):
        form.only("type", "text", why="only text is written; ask for JSON in the prompt")
        form.done()
    fields.only("parallel_tool_calls", True, False, why="expected true or false")
    fields.only("modalities", ["text"], why="only text is written")
    common = _common(fields, tokens[0] if tokens[0] is not None else tokens[1], (top or 0) if wanted else None)
    fields.done()
    _check_texts(common["n"], most, "n")
    return Chat(**common, talk=talk)


def read_prompts(fields: Fields, most: int) -> tuple[Prompt, ...]:
    """The prompts of a completion: a text, token ids, or a list of either."""
    value = fields.any("prompt")
    expected = "a text, a list of texts, a list of token ids or a list of such lists"
    if isinstance(value, str) or (isinstance(value, list) and value and _is_id(value[0])):
        prompts: Sequence[Any] = [value]
    elif isinstance(value, list) and value:
        prompts = value
    else:
        raise fields.wrong("prompt", expected)
    _check_texts(len(prompts), most, "prompt")
    for number, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_id, prompt)))):
            where = f"prompt.{number}" if prompts is value else "prompt"
            raise RequestError(f"{where} is neither a text nor a list of token ids; expected {expected}", "prompt")
    return tuple(prompts)


def read_talk(fields: Fields) -> Talk:
    """The messages of a chat and its tools, as the rows of training have them. Raises RequestError."""
    value, tools, choice = (fields.any(name) for name in ("messages", "tools", "tool_choice"))
    try:
        given = read_tools(tools)
    except Unfit as problem:
        raise RequestError(str(problem), "tools") from problem
    if choice not in (None, "auto", "none"):
        told = "the model itself chooses whether to call a function; expected auto or none"
        raise RequestError(f"tool_choice is {show(choice)}: {told}", "tool_choice", code="unsupported")
    try:
        messages = read_conversation(value).messages
    except Unfit as problem:
        raise RequestError(f"messages: {problem}", "messages") from problem
    if messages[-1]["role"] == "assistant":
        told = "the last message is the assistant's own; expected one that it can answer"
        raise RequestError(f"messages: {told}", "messages")
    return Talk(messages, None if choice == "none" else given)


def _common(fields: Fields, max_tokens: int | None, logprobs: int | None) -> dict[str, Any]:
    stream = fields.flag("stream")
    options = fields.object("stream_options")
    usage = False
    if options is not None:
        if not stream:
            raise RequestError("stream_options is given without stream: set stream to true", "stream_options")
        usage = options.flag("include_usage")
        options.ignored(("include_obfuscation",))
        options.done()
    temperature = fields.number("temperature", 0, 2, 1.0)
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    top_p = fields.number("top_p", 0, 1, 1.0)
    if top_p == 0:
        temperature = 0.0  # nothing but the likeliest is left
    top_k = fields.integer("top_k", -1, MOST_TOKENS)
    penalty = fields.number("repetition_penalty", 0.01, 10, 1.0)
    sampling = {
        "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
        "top_p": top_p or None,
        "top_k": top_k if top_k is not None and top_k > 0 else None,
        "min_p": fields.number("min_p", 0, 1, 0.0) or None,
        "repetition_penalty": penalty,
        "presence_penalty": fields.number("presence_penalty", -2, 2, 0.0),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2, 0.0),
        "logit_bias": _biases(fields),
        "stop": _stops(fields),
        "seed": secrets.randbits(63) if seed is None else seed % 2**63,
    }
    fields.ignored(_IGNORED)
    return {
        "model": fields.text("model"),
        "n": fields.integer("n", 1, 128) or 1,
        "stream": stream,
        "include_usage": usage,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "sampling": sampling,
    }


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.any("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops)
    if not good or len(stops) > MAX_STOPS:
        raise fields.wrong("stop", f"a text of 1 to {MAX_STOP_LENGTH} characters, or at most {MAX_STOPS} of them")
    return tuple(stops)


def _biases(fields: Fields) -> dict[int, float]:
    """What is added to the logit of a token, by its id, which JSON can only write as a text."""
    value = fields.any("logit_bias")
    expected = f"an object of at most {MAX_BIASES} token ids, each with a number from -100 to 100"
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise fields.wrong("logit_bias", expected)
    found = {}
    for key, bias in value.items():
        number = not isinstance(bias, bool) and isinstance(bias, int | float) and -100 <= bias <= 100
        if not (key.isascii() and key.isdecimal() and len(key) < 10) or not number:
            raise RequestError(f"logit_bias: {show(key)} has {show(bias)}; expected {expected}", "logit_bias")
        found[int(key)] = float(bias)
    return found


def _check_texts(count: int, most: int, param: str) -> None:
    if count > most:
        raise RequestError(f"{param} asks for {count} texts at once; this server writes {most} at most", param)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
