"""The templates for tokenizers without one: every kind of row, in the words that transformers renders too."""

from __future__ import annotations

import pytest
from chat_templates import CONVERSATIONS
from transformers import PreTrainedTokenizerFast

from afina.errors import DataError
from afina.loaders.text.render import Example, render_example
from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import train_bpe

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Päris \\"x\\"", "days": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}\n</tool_call>'
LEARNT = {
    "plain": ["first answer", "second answer"],
    "system": ["first answer", "second answer"],
    "spaces": ["first answer", "second answer"],
    "two turns in a row": ["first answer", "second answer", "third answer"],
    "tools, not called": ["first answer"],
    "call, content empty": [CALL],
    "call, content null": [CALL],
    "call after a text": ["Let me look.\n" + CALL],
    "two calls at once": [CALL + "\n" + OTHER],
    "call, result, answer": [CALL, "It is fine.", "bye now"],
    "calls in two turns": ["hello you", CALL, OTHER, "It is mixed."],
    "<think> in the content": ["<think>\nI think so.\n</think>\n\nfirst answer"],
}


@pytest.fixture(scope="module", params=["default", "roles"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    special = ["<|endoftext|>", *(ROLES if request.param == "roles" else [])]
    return train_bpe(["hello world"] * 3, 300, special, "<|endoftext|>")


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_every_kind_of_row(tokenizer: Tokenizer, kind: str) -> None:
    messages, tools = CONVERSATIONS[kind]
    example = Example(messages=tuple(messages), tools=tools and tuple(tools))
    if kind not in LEARNT:  # a thought besides the content: no model that these templates are for knows a place for it
        with pytest.raises(DataError, match="does not write its reasoning_content"):
            render_example(tokenizer, example)
        return
    row = render_example(tokenizer, example)
    end = "<|end|>" if tokenizer.token_id("<|end|>") is not None else "<|endoftext|>"
    assert [row.text[a:b] for a, b in row.spans] == [said + end for said in LEARNT[kind]]
    template = tokenizer.chat_template or tokenizer._default_template()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend, eos_token=tokenizer.eos_token, chat_template=template
    )
    assert row.text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)


def test_tools_are_shown_behind_what_the_system_says(tokenizer: Tokenizer) -> None:
    for kind, system in (("call, result, answer", "Be kind to Zoe.\n\n"), ("call, content null", "")):
        messages, tools = CONVERSATIONS[kind]
        text = tokenizer.render(messages, tools=tools)
        assert f"{system}You may call these functions:\n" + '{"name": "get_weather", "description": "Wea' in text
        assert text.count("You may call") == 1
        assert tokenizer.render(messages).count("You may call") == 0
