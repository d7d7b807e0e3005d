"""Conversations of OpenAI's, TRL's and ShareGPT's files: one form for all, and what is learnt of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TOOLS, template_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from real_files import chat_templates

from afina.errors import DataError
from afina.loaders.data import conversations
from afina.loaders.data.conversations import ALIASES, Unfit, read_conversation, read_tools
from afina.loaders.data.rows import Row, read_rows

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


def rows(path: Path, *values: dict[str, Any], **reading: Any) -> list[Row]:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return list(read_rows(path, **reading))


# The same call as OpenAI, TRL, ShareGPT, LLaMA-Factory and OpenAI's older files spell it.
SPELLINGS: dict[str, list[dict[str, Any]]] = {
    "openai": [
        ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [CALL | {"function": CALL["function"] | {"arguments": '{"city": "Rome"}'}}],
        },
    ],
    "openai without content": [ASK, {"role": "assistant", "tool_calls": [CALL]}],
    "trl": [ASK, {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL["function"]}]}],
    "bare": [ASK, {"role": "assistant", "tool_calls": [CALL["function"]]}],
    "function_call": [
        ASK,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
        },
    ],
    "sharegpt": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Rome"}}'},
    ],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_call_is_the_same_call(spelling: str) -> None:
    messages, tools, learnt = read_conversation(SPELLINGS[spelling], TOOLS)
    assert messages[0] == ASK
    (call,) = messages[1].pop("tool_calls")
    assert messages[1] == {"role": "assistant", "content": None}
    assert call | {"id": "c1"} == CALL
    assert tools == tuple(TOOLS)
    assert learnt == {1}


def test_every_spelling_of_tools_is_the_same_tools() -> None:
    assert read_tools(TOOLS) == read_tools(json.dumps(TOOLS)) == read_tools([TOOLS[0]["function"]]) == tuple(TOOLS)
    assert read_tools(None) is read_tools([]) is read_tools("[]") is None


@pytest.mark.parametrize(
    ("role", "ours"),
    [
        *(("User", "user"), ("HUMAN", "user"), (" human ", "user"), ("Assistant", "assistant"), ("GPT", "assistant")),
        *(("bot", "assistant"), ("chatgpt", "assistant"), ("model", "assistant"), ("ai", "assistant")),
        *(("developer", "system"), ("System", "system"), ("tool", "tool"), ("function", "tool")),
        *(("observation", "tool"), ("tool_response", "tool")),
    ],
)
def test_roles_by_any_name(role: str, ours: str) -> None:
    for key, value in (("role", "content"), ("from", "value")):
        (message,), _, learnt = read_conversation([{key: role, value: "x"}])
        assert message == {"role": ours, "content": "x"}
        assert learnt == ({0} if ours == "assistant" else set())


def test_contents_in_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}, "three "]
    refusal = [{"type": "refusal", "refusal": "no"}]
    messages = read_conversation(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": refusal}]
    ).messages
    assert [message["content"] for message in messages] == ["one twothree", "no"]
    assert read_conversation([{"role": "assistant", "content": None, "refusal": "I can't."}]).messages == (
        {"role": "assistant", "content": "I can't."},
    )


def test_thoughts_by_any_name() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        (message,) = read_conversation([ANSWER | {key: "hm "}]).messages
        assert message == ANSWER | {"reasoning_content": "hm"}


def test_what_is_learnt() -> None:
    turns = [ASK, ANSWER | {"weight": 0}, ASK | {"train": True}, ANSWER | {"weight": 1}, ANSWER | {"train": False}]
    assert read_conversation(turns).learnt == {2, 3}
    assert read_conversation(turns, roles=("user",)).learnt == {0, 2}
    assert read_conversation(turns, roles=("user", "assistant")).learnt == {0, 2, 3}
    assert all(message.keys() == {"role", "content"} for message in read_conversation(turns).messages)


NAMES = st.sampled_from([*ALIASES, "User", " ai", "nobody", "", None, 3, ["user"]])
AWKWARD: list[Any] = [None, " a\r\n", "\u00e9\ufeff", "e\u0301", "\x00", 7, ["x"], "[]", "\ud800"]
CONTENTS = st.text(max_size=9) | st.sampled_from(AWKWARD)
KEYS = {"role": NAMES, "from": NAMES, "content": CONTENTS, "value": CONTENTS, "weight": st.just(1), "name": NAMES}
TURNS = st.fixed_dictionaries({}, optional=KEYS)


@settings(max_examples=400)
@given(st.lists(TURNS | st.just("no turn"), max_size=4), st.sampled_from([("assistant",), ("user", "tool"), ()]))
def test_plain_turns_are_read_as_all_others(turns: list[Any], roles: tuple[str, ...]) -> None:
    def read() -> Any:
        try:
            return read_conversation(turns, roles=roles)
        except Unfit as problem:
            return str(problem), problem.kind

    found = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "_said", lambda turn: None)
        assert read() == found


BAD = [
    ([], "the conversation is empty"),
    ([ASK, {"role": "assistant", "content": None}], "message 2 (assistant): content is missing or null"),
    ([ASK, {"role": "assistant"}], "message 2 (assistant): content is missing or null"),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "message 1 (user): content holds a part of type 'image_url'",
    ),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "a part of type 'input_audio': only text is read"),
    ([{"role": "user", "content": {"a": 1}}], "message 1 (user): content is an object: expected a text"),
    ([{"role": "asistant", "content": "x"}], "message 1: role 'asistant' (did you mean 'assistant'?): expected"),
    ([ASK | {"tool_calls": [CALL]}], "message 1 (user): has tool_calls, which only the assistant makes"),
    ([{"role": "assistant", "tool_calls": ["x"]}], "message 1 (assistant): tool call 1: is a text: expected an object"),
    ([{"role": "assistant", "tool_calls": [CALL, {"type": "custom"}]}], "tool call 2: type is 'custom'"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "tool call 1: has no name"),
    (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{city"}]}],
        "tool call 1: arguments: '{city' is no JSON (Expecting property name enclosed in double quotes): write it with",
    ),
    (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
        "arguments are a list: expected an obj",
    ),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}], "is no JSON ('NaN'"),
    ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '"\\ud800"'}]}], "half a character"),
    ([{"from": "function_call", "value": "f()"}], "message 1 (assistant): the call: 'f()' is no JSON"),
    ([ANSWER | {"weight": 2}], "message 1 (assistant): weight is 2: expected 0 or 1"),
    ([ANSWER | {"train": "no"}], "message 1 (assistant): train is 'no': expected true or false"),
    ([ANSWER | {"train_detail": []}], "message 1 (assistant): train_detail"),
]


@pytest.mark.parametrize(("turns", "found"), BAD)
def test_bad_turns_are_named(turns: list[Any], found: str) -> None:
    with pytest.raises(Unfit) as problem:
        read_conversation(turns)
    assert found in str(problem.value)


@pytest.mark.parametrize(
    ("tools", "found"),
    [
        ("get_weather", "tools: 'get_weather' is no JSON"),
        ({"name": "f"}, "tools is an object: expected a list"),
        (["f"], "tools: 1 is a text: expected an object"),
        ([{"type": "function", "function": {}}], "tools: 1 has no name"),
        ([{"description": "x"}], "tools: 1 has no name"),
    ],
)
def test_bad_tools_are_named(tools: Any, found: str) -> None:
    with pytest.raises(Unfit) as problem:
        read_conversation([ASK, ANSWER], tools)
    assert found in str(problem.value)


def test_files_of_openai_trl_and_sharegpt(tmp_path: Path) -> None:
    """From a line of a file to what is learnt of it, under a template that writes calls."""
    tokenizer = template_tokenizer(chat_templates()["Qwen-Qwen2.5-7B-Instruct"])
    result = {"role": "tool", "tool_call_id": "c1", "content": "22 C"}
    talk = [*SPELLINGS["openai"], result, ANSWER]
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    (openai,) = rows(
        tmp_path / "openai.jsonl", {"messages": talk, "tools": TOOLS, "parallel_tool_calls": False}, chat=True
    )
    turns = [*SPELLINGS["sharegpt"], {"from": "observation", "value": "22 C"}, {"from": "gpt", "value": "a"}]
    (sharegpt,) = rows(tmp_path / "sharegpt.jsonl", {"conversations": turns, "tools": json.dumps(TOOLS)}, chat=True)
    (trl,) = rows(tmp_path / "trl.jsonl", {"prompt": talk[:1], "completion": talk[1:], "tools": TOOLS}, chat=True)
    texts = [row.rendered(tokenizer) for row in (openai, sharegpt, trl)]
    assert texts[0] == texts[1] == texts[2]
    assert [texts[0].text[start:end] for start, end in texts[0].spans] == [call, "a<|im_end|>"]
    assert '"name": "get_weather", "description": "Weather of a city"' in texts[0].text


def test_rows_say_what_is_learnt(tmp_path: Path) -> None:
    tokenizer = template_tokenizer(chat_templates()["Qwen-Qwen2.5-7B-Instruct"])

    def learnt(row: dict[str, Any], **reading: Any) -> list[str]:
        (found,) = rows(tmp_path / "a.jsonl", row, chat=True, **reading)
        text = found.rendered(tokenizer)
        return [text.text[start:end].removesuffix("<|im_end|>") for start, end in text.spans]

    two = [ASK, {"role": "assistant", "content": "bad", "weight": 0}, ASK, {"role": "assistant", "content": "good"}]
    assert learnt({"messages": two}) == ["good"]
    assert learnt({"messages": two[2:] + two[:2]}) == ["good"]
    assert learnt({"messages": two}, roles=["user"]) == ["q", "q"]
    assert learnt({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}) == ["a"]
    assert learnt({"prompt": [ASK], "completion": [ANSWER | {"train": False}, ANSWER]}) == ["a"]
    assert learnt({"instruction": "q", "output": "a"}, roles=["user", "assistant"]) == ["q", "a"]
    with pytest.raises(DataError, match="no turn to learn from: all have weight 0 or train false"):
        learnt({"messages": two[:2]})
    with pytest.raises(DataError, match="line 1: no tool turn to learn from"):
        learnt({"messages": two}, roles=["tool"])


def test_rows_that_differ_in_what_is_learnt_are_no_duplicates(tmp_path: Path) -> None:
    found = rows(
        tmp_path / "a.jsonl",
        {"messages": [ASK, ANSWER, ASK, ANSWER]},
        {"messages": [ASK, ANSWER | {"weight": 0}, ASK, ANSWER]},
        {"messages": [ASK, ANSWER, ASK, ANSWER], "tools": TOOLS},
    )
    assert len({row.digest for row in found}) == 3
