"""What may be asked, field by field: types, ranges, names; every refusal is a 400 that names its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from afina.serve.answers import _line
from afina.serve.app import json_response
from afina.serve.errors import RequestError
from afina.serve.requests import DEFAULT_MAX_TOKENS, read_chat, read_completion

MOST = 8
HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "look"}}


def refused(kind: str, **body: Any) -> RequestError:
    read = read_chat if kind == "chat" else read_completion
    with pytest.raises(RequestError) as caught:
        read(({"messages": HELLO} if kind == "chat" else {"prompt": "a"}) | body, MOST)
    error = caught.value
    assert error.status == 400
    assert error.body["error"]["type"] == "invalid_request_error"
    assert "\n" not in error.message
    return error


NUMBERS: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 2, False), "top_p": (0, 1, False), "min_p": (0, 1, False),
    "repetition_penalty": (0.01, 10, False), "presence_penalty": (-2, 2, False), "frequency_penalty": (-2, 2, False),
    "top_k": (-1, 2**31 - 1, True), "n": (1, 128, True), "seed": (-(2**63), 2**63 - 1, True),
    "max_tokens": (1, 2**31 - 1, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_a_type_and_a_range(kind: str, name: str) -> None:
    low, high, whole = NUMBERS[name]
    wrong = [low - 1, high + 1, 10**400, -(10**400), 1e300, "1", True, [], [1], {}]
    for value in [*wrong, *([low + 0.5, 1.0] if whole else [])]:
        error = refused(kind, **{name: value})
        assert error.param == name
        assert "expected a" in error.message
        assert len(error.message) < 300


@pytest.mark.parametrize("name", ["stream", "logprobs", "echo"])
def test_flags_are_true_or_false(name: str) -> None:
    kind = "completion" if name == "echo" else "chat"
    for value in (0, 1, "true", [], {}):
        assert refused(kind, **{name: value}).param == name


def test_null_is_as_good_as_absent() -> None:
    names = [*NUMBERS, "stream", "stop", "logit_bias", "stream_options", "logprobs", "model", "user"]
    nothing = dict.fromkeys(names)
    one, other = read_completion({"prompt": "a"} | nothing, MOST), read_completion({"prompt": "a"}, MOST)
    assert one.max_tokens == DEFAULT_MAX_TOKENS
    for asked in (one, other):
        asked.sampling.pop("seed")  # each its own
    assert one == other
    assert read_chat({"messages": HELLO} | nothing | {"tools": None}, MOST).max_tokens is None


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("completion", {"prompt": None}, "prompt"), ("completion", {"prompt": []}, "prompt"),
    ("completion", {"prompt": {}}, "prompt"), ("completion", {"prompt": 1}, "prompt"),
    ("completion", {"prompt": [1, "a"]}, "prompt"), ("completion", {"prompt": ["a", 1]}, "prompt"),
    ("completion", {"prompt": [True]}, "prompt"), ("completion", {"prompt": [1.0]}, "prompt"),
    ("completion", {"prompt": [[1], [None]]}, "prompt"), ("completion", {"prompt": [["a"]]}, "prompt"),
    ("completion", {"prompt": ["a"] * 9}, "prompt"), ("completion", {"prompt": ["a"] * 3, "n": 3}, "prompt"),
    ("completion", {"n": 9}, "n"), ("chat", {"n": 9}, "n"), ("completion", {"max_tokens": 0}, "max_tokens"),
    ("completion", {"suffix": "b"}, "suffix"), ("completion", {"best_of": 2}, "best_of"),
    ("completion", {"logprobs": True}, "logprobs"), ("completion", {"logprobs": 21}, "logprobs"),
    ("completion", {"messages": HELLO}, "messages"), ("chat", {"prompt": "a"}, "prompt"),
    ("chat", {"echo": True}, "echo"), ("chat", {"messages": []}, "messages"), ("chat", {"messages": "a"}, "messages"),
    ("chat", {"messages": [1]}, "messages"), ("chat", {"messages": [{}]}, "messages"),
    ("chat", {"messages": [{"role": "nobody", "content": "a"}]}, "messages"),
    ("chat", {"messages": [{"role": [], "content": "a"}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": 1}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ("chat", {"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "messages"),
    ("chat", {"top_logprobs": 2}, "top_logprobs"), ("chat", {"logprobs": 1}, "logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ("chat", {"tools": {}}, "tools"),
    ("chat", {"tools": [{}]}, "tools"), ("chat", {"tools": [CALL], "tool_choice": "required"}, "tool_choice"),
    ("chat", {"tool_choice": CALL}, "tool_choice"), ("chat", {"response_format": "text"}, "response_format"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format.type"),
    ("chat", {"max_completion_tokens": 0}, "max_completion_tokens"), ("chat", {"modalities": ["audio"]}, "modalities"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("chat", {"stream": True, "stream_options": 1}, "stream_options"),
    ("chat", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("chat", {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ("chat", {"stop": ""}, "stop"), ("chat", {"stop": [""]}, "stop"), ("chat", {"stop": ["a"] * 17}, "stop"),
    ("chat", {"stop": "a" * 257}, "stop"), ("chat", {"stop": [1]}, "stop"), ("chat", {"stop": {"a": 1}}, "stop"),
    ("chat", {"logit_bias": []}, "logit_bias"), ("chat", {"logit_bias": {"a": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {"-1": 1}}, "logit_bias"), ("chat", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("chat", {"logit_bias": {"1": True}}, "logit_bias"), ("chat", {"logit_bias": {"²": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"), ("chat", {"model": 1}, "model"),
    ("chat", {"temprature": 1}, "temprature"), ("chat", {"\n": 1}, "\n"), ("chat", {"a" * 99: 1}, "a" * 60),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_fields_are_named(number: int) -> None:
    kind, body, param = WRONG[number]
    assert refused(kind, **body).param == param


def test_a_misspelt_field_is_answered_with_its_name() -> None:
    assert refused("chat", temprature=1).message == (
        "temprature is no field of this request (did you mean 'temperature'?)"
    )


def test_prompts_in_every_form() -> None:
    for prompt, expected in (
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
    ):
        assert read_completion({"prompt": prompt}, MOST).prompts == expected
    assert read_completion({"prompt": "a", "echo": True, "max_tokens": 0}, MOST).max_tokens == 0


def test_tools_reach_the_template_unless_none_may_be_called() -> None:
    assert read_chat({"messages": HELLO, "tools": [CALL]}, MOST).talk.tools == (CALL,)
    assert read_chat({"messages": HELLO, "tools": [CALL], "tool_choice": "none"}, MOST).talk.tools is None
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert read_chat({"messages": parts}, MOST).talk.messages[0]["content"] == "Hello"


def test_each_of_n_texts_has_its_seed() -> None:
    asked = read_chat({"messages": HELLO, "n": 3, "seed": 2**63 - 2, "temperature": 1e-30}, MOST)
    samplings = asked.samplings(5)
    assert [s.seed for s in samplings] == [2**63 - 2, 2**63 - 1, 0]
    assert {(s.temperature, s.max_new_tokens) for s in samplings} == {(0.0, 5)}
    assert read_chat({"messages": HELLO, "seed": -1}, MOST).sampling["seed"] == 2**63 - 1
    assert len({read_chat({"messages": HELLO}, MOST).sampling["seed"] for _ in range(8)}) == 8
    assert read_chat({"messages": HELLO, "top_p": 0}, MOST).samplings(1)[0].temperature == 0


def test_names_of_bytes_that_are_no_utf8_are_answered() -> None:
    """As the name of a folder, or of ``--adapter``, on the command line."""
    card = {"id": "a\udcffé"}
    for answer in (json_response(card).body, _line(card).removeprefix(b"data: "), RequestError("a\udcff").to_json()):
        assert b"\\udcff" in bytes(answer)
    assert json.loads(bytes(json_response(card).body).decode()) == card
    assert json.loads(_line(card).removeprefix(b"data: ").decode()) == card
