"""Conversations as files have them, brought into one form.

OpenAI's fine-tuning files, TRL's conversational rows and ShareGPT's differ in what they call a role, in how they spell
a tool call and in where they say what is learnt. Here they become messages of {role, content} with, where there are
any, `tool_calls` whose arguments are objects, and a set of the messages that are learnt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from afina.errors import nearest
from afina.loaders.data.files import clean_text
from afina.loaders.jsonfile import has_half_characters, show, strict_decoder

ROLES = ("system", "user", "assistant", "tool")
# What files call the roles, in any case; "call" is the turn of an assistant that is nothing but tool calls.
ALIASES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("developer",), "system"),
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_SPEAKERS = {name: role for name, role in ALIASES.items() if role != "call"}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys of a turn that are read here; others reach the template as they are.
_READ = {
    *("role", "from", "content", "value", "tool_calls", "function_call", "weight", "train", "training", "refusal"),
    *_REASONING,
}


_JSON = strict_decoder()


class Unfit(ValueError):
    """A row that cannot be used, and why. ``kind``: the reason without what is the row's own, to count by."""

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind or reason


class Conversation(NamedTuple):
    """Messages, the tools that may be called in them (or None), and which messages are learnt, by number from 0."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None
    learnt: frozenset[int]


def read_conversation(turns: Any, tools: Any = None, *, roles: Collection[str] = ("assistant",)) -> Conversation:
    """Return the turns of a row, and its tools, in one form.

    ``turns``: a list of {role, content} or {from, value}; content is a text, a list of text parts, or null beside tool
    calls. ``tools``: a list of JSON schemas, with or without {"type": "function", "function": ...} around each, or such
    a list as a JSON text. ``roles``: whose turns are learnt, but for those with ``weight: 0`` or ``train: false``; a
    turn with ``train: true`` is learnt whatever its role. Raises Unfit naming the message, from 1.

    https://developers.openai.com/api/docs/guides/supervised-fine-tuning, https://huggingface.co/docs/trl/dataset_formats
    """
    if not isinstance(turns, list) or not turns:
        raise Unfit(f"the conversation is {kind_of(turns)}: expected a list of {{role, content}}")
    messages: list[dict[str, Any]] = []
    learnt: set[int] = set()
    for number, turn in enumerate(turns):
        if (said := _said(turn)) is not None:
            messages.append(said)
            if said["role"] in roles:
                learnt.add(number)
            continue
        try:
            message = _message(turn)
            if _is_learnt(turn, message["role"] in roles):
                learnt.add(number)
        except Unfit as problem:
            raise Unfit(f"message {number + 1}{_speaker(turn)}: {problem}", problem.kind) from None
        messages.append(message)
    return Conversation(tuple(messages), read_tools(tools), frozenset(learnt))


def _speaker(turn: Any) -> str:
    role = role_of(turn)
    return f" ({'assistant' if role == 'call' else role})" if role in ALIASES.values() else ""


def role_of(turn: Any) -> Any:
    """The role of a turn by our name for it, or as the file has it where it is none."""
    if not isinstance(turn, dict):
        return None
    role = turn.get("role", turn.get("from"))
    return ALIASES.get(role.strip().lower(), role) if isinstance(role, str) else role


def _said(turn: Any) -> dict[str, Any] | None:
    """The message of a turn that is a role by a name of ours and a text, as nearly all are; None for any other."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(role, str) and isinstance(content, str) and (role := _SPEAKERS.get(role)) is not None:
        return {"role": role, "content": clean_text(content)}
    return None


def _message(turn: Any) -> dict[str, Any]:
    role = role_of(turn)
    if not isinstance(role, str) or role not in ALIASES.values():
        close = nearest(role.lower(), ALIASES) if isinstance(role, str) else ""
        expected = f"expected {', '.join(ROLES)} (or human, gpt, ...)"
        raise Unfit(f"role {show(role)}{close}: {expected}", f"a role that is none: {expected}")
    value = turn.get("content", turn.get("value"))
    if role == "call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(_decoded(value, "the call"))}
    calls = []
    if role == "assistant":
        calls = _calls(turn.get("tool_calls")) or _calls(turn.get("function_call"))
        value = turn.get("refusal") if value is None else value
    elif turn.get("tool_calls"):
        raise Unfit("has tool_calls, which only the assistant makes: check its role")
    message: dict[str, Any] = {"role": role, "content": None if value is None and calls else _content(value)}
    if calls:
        message["tool_calls"] = calls
    thought = next((turn[key] for key in _REASONING if turn.get(key)), None)
    if thought is not None:
        if not isinstance(thought, str):
            raise Unfit(f"reasoning is {kind_of(thought)}: expected a text")
        message["reasoning_content"] = clean_text(thought)
    if len(turn) > 2:  # what a template may read besides; Parquet has all keys in every turn
        message |= {key: item for key, item in turn.items() if key not in _READ and item is not None}
    return message


def _content(value: Any) -> str:
    if isinstance(value, str):
        return clean_text(value)
    if not isinstance(value, list) or not value:
        raise Unfit(f"content is {kind_of(value)}: expected a text")
    texts = []
    for part in value:
        text: Any = part
        if isinstance(part, dict):
            kind = part.get("type", "text")
            if kind not in _TEXT_PARTS:
                raise Unfit(f"content holds a part of type {show(kind)}: only text is read, so leave the row out")
            text = part.get(_TEXT_PARTS[kind])
        if not isinstance(text, str):
            raise Unfit(f"content holds a part that is {kind_of(text)}: expected a text")
        texts.append(text)
    return clean_text("".join(texts))


def _is_learnt(turn: Mapping[str, Any], by_role: bool) -> bool:
    if turn.get("train_detail") is not None:
        raise Unfit("train_detail, which trains a part of a turn, is not read: use train")
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise Unfit(f"weight is {show(weight)}: expected 0 or 1")
    train = turn.get("train", turn.get("training"))
    if train is not None and not isinstance(train, bool):
        raise Unfit(f"train is {show(train)}: expected true or false")
    return (by_role if train is None else train) and weight != 0


# Tools


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects."""
    if value is None or value == []:
        return []
    found = []
    for place, call in enumerate(value if isinstance(value, list) else [value], 1):
        try:
            found.append(_call(call))
        except Unfit as problem:
            raise Unfit(f"tool call {place}: {problem}", f"tool call: {problem.kind}") from None
    return found


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Unfit(f"is {kind_of(call)}: expected an object {{type, function}}")
    if (kind := call.get("type") or "function") != "function":
        raise Unfit(f"type is {show(kind)}: expected 'function'")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
        raise Unfit("has no name: expected a function {name, arguments}")
    arguments = _decoded(function.get("arguments", function.get("parameters")) or {}, "arguments")
    if not isinstance(arguments, dict):
        raise Unfit(f"arguments are {kind_of(arguments)}: expected an object, or its JSON text")
    given = {"id": call["id"]} if call.get("id") is not None else {}
    return {**given, "type": "function", "function": {"name": name, "arguments": arguments}}


def _decoded(value: Any, what: str) -> Any:
    """A value that may be given as its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        decoded = _JSON.decode(value)
    except (ValueError, RecursionError) as problem:
        reason = "nested too deeply" if isinstance(problem, RecursionError) else getattr(problem, "msg", problem)
        found = f"{what}: {show(value[:60])} is no JSON ({reason})"
        raise Unfit(f"{found}: write it with json.dumps", f"{what}: no JSON") from None
    if "\\u" in value and has_half_characters(decoded):
        raise Unfit(f"{what}: a \\u escape is half a character (a lone surrogate)")
    return decoded


def read_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Return tools in one form, as `read_conversation` takes them; None where there are none. Raises Unfit."""
    value = _decoded(value, "tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise Unfit(f"tools is {kind_of(value)}: expected a list of {{type, function}}")
    found = []
    for place, tool in enumerate(value, 1):
        if not isinstance(tool, dict):
            raise Unfit(f"tools: {place} is {kind_of(tool)}: expected an object {{type, function}}")
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Unfit(f"tools: {place} has no name: expected a function {{name, description, parameters}}")
        found.append(tool)
    return tuple(found)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing or null"
    if value == []:
        return "empty"
    names: Iterable[tuple[type, str]] = (
        *((bool, "true or false"), (int, "a number"), (float, "a number")),
        *((str, "a text"), (list, "a list"), (dict, "an object")),
    )
    return dict(names).get(type(value), type(value).__name__)
