"""Chat templates for the tests: minimal forms that write the same text as the stock ones they are named after."""

from __future__ import annotations

import json
import re
from typing import Any

from afina.loaders.text.tokenizer import Tokenizer
from afina.loaders.text.train_bpe import train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen2.5 writes a system prompt of its own where there is none.
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# SmolLM2 writes its default system prompt inside the loop.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + "
    "'<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Qwen3 strips the thinking of earlier turns and writes an empty one in a last turn without.
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# No special token anywhere, and no generation prompt.
PLAIN = "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
# Ends every turn but the last.
LAST_OPEN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if not loop.last %}{{ eos_token + '\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ eos_token + '\\nassistant:' }}{% endif %}"
)
# {% generation %} and macros, as newer templates have.
MACROS = """{% macro turn(role, content) %}
<|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro %}
{% for m in messages %}
{% if m.role == 'assistant' %}
{% generation %}
{{- turn('assistant', m.content) -}}
{% endgeneration %}
{% else %}
{{- turn(m.role, m.content) -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""
# Opens the generated turn with a thought that its history does not show: no prefix of what is trained.
REASONER = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
TEMPLATES = {
    "chatml": CHATML,
    "qwen2.5": QWEN25,
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "phi3": PHI3,
    "qwen3": QWEN3,
    "plain": PLAIN,
    "last_open": LAST_OPEN,
    "macros": MACROS,
    "reasoner": REASONER,
}
# The control tokens of all of them, for one tokenizer that serves every test.
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
]

# Rows of every kind that real files have: messages and tools. Every text in them is unlike the others.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "the city"},
                    "days": {"type": "integer", "description": "how many"},
                },
                "required": ["city"],
            },
        },
    }
]


def tool_call(number: str = "call00001", **arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments or {"city": 'Päris "x"', "days": 3}}
    return {"id": number, "type": "function", "function": function}


def turn(role: str, content: str | None, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def result_turn(content: str, number: str = "call00001") -> dict[str, Any]:
    return turn("tool", content, tool_call_id=number, name="get_weather")


_SYSTEM, _ASK, _ASK_AGAIN = turn("system", "Be kind to Zoe."), turn("user", "one q"), turn("user", "two q")
_FIRST, _SECOND = turn("assistant", "first answer"), turn("assistant", "second answer")
_OTHER_CALL = tool_call("call00002", city="Rome", days=1)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "plain": ([_ASK, _FIRST, _ASK_AGAIN, _SECOND], None),
    "system": ([_SYSTEM, _ASK, _FIRST, _ASK_AGAIN, _SECOND], None),
    "spaces": (
        [
            *(turn("user", " one q "), turn("assistant", " first answer \n")),
            *(turn("user", "two q\n"), turn("assistant", "second answer  ")),
        ],
        None,
    ),
    "two turns in a row": ([_ASK, _FIRST, _SECOND, _ASK_AGAIN, turn("assistant", "third answer")], None),
    "tools, not called": ([_SYSTEM, _ASK, _FIRST], TOOLS),
    "call, content empty": ([_ASK, turn("assistant", "", tool_calls=[tool_call()])], TOOLS),
    "call, content null": ([_ASK, turn("assistant", None, tool_calls=[tool_call()])], TOOLS),
    "call after a text": ([_ASK, turn("assistant", "Let me look.", tool_calls=[tool_call()])], TOOLS),
    "two calls at once": ([_ASK, turn("assistant", None, tool_calls=[tool_call(), _OTHER_CALL])], TOOLS),
    "call, result, answer": (
        [
            *(_SYSTEM, _ASK, turn("assistant", None, tool_calls=[tool_call()]), result_turn('{"sky": "blue"}')),
            *(turn("assistant", "It is fine."), _ASK_AGAIN, turn("assistant", "bye now")),
        ],
        TOOLS,
    ),
    "calls in two turns": (
        [
            *(turn("user", "good day"), turn("assistant", "hello you"), _ASK),
            *(turn("assistant", None, tool_calls=[tool_call()]), result_turn("blue")),
            *(turn("assistant", None, tool_calls=[_OTHER_CALL]), result_turn("grey", "call00002")),
            turn("assistant", "It is mixed."),
        ],
        TOOLS,
    ),
    "reasoning": ([_ASK, turn("assistant", "first answer", reasoning_content="I think so.")], None),
    "reasoning in two turns": (
        [
            *(_ASK, turn("assistant", "first answer", reasoning_content="I think one.")),
            *(_ASK_AGAIN, turn("assistant", "second answer", reasoning_content="I think two.")),
        ],
        None,
    ),
    "<think> in the content": ([_ASK, turn("assistant", "<think>\nI think so.\n</think>\n\nfirst answer")], None),
    "reasoning before a call": (
        [
            *(_ASK, turn("assistant", None, reasoning_content="I must look.", tool_calls=[tool_call()])),
            *(result_turn("blue"), turn("assistant", "It is fine.", reasoning_content="So fine.")),
        ],
        TOOLS,
    ),
}

# What looks like a control token in the source of a template.
_CONTROL = re.compile(
    r"<\|[^|>\s'\"]{1,40}\|?>|<｜[^｜>]{1,40}｜>|<[a-z_]+\|>|\[/?[A-Z_]{2,25}\]|</?s>|<(?:start|end)_of_turn>|<sep>"
    r"|<(?:beginning|end)_of_sentence>|\[e~\[|\]~b\]|\]~!b\[|<seed:[a-z_]+>|</?role>|</?assistant>|<SPECIAL_\d+>"
)
# What ends an assistant's turn in one template or another; the first that a template has is its eos_token.
_ENDS = (
    *("<|im_end|>", "<|assistant_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<｜end▁of▁sentence｜>"),
    *("</s>", "<|END_OF_TURN_TOKEN|>", "<seed:eos>", "<end_of_sentence>", "<｜hy_eos:opensource｜>", "</assistant>"),
    *("[e~[", "<|endoftext|>"),
)


def template_tokenizer(template: str) -> Tokenizer:
    """A byte-level tokenizer with the control tokens that a chat template spells."""
    control = list(dict.fromkeys([*_CONTROL.findall(template), "<s>", "</s>"]))
    eos = next(token for token in _ENDS if token in control)
    trained = train_bpe(["hello world"] * 3, 256 + len(control) + 8, control, eos).files()["tokenizer.json"]
    config = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
    return Tokenizer({"tokenizer.json": trained, "tokenizer_config.json": json.dumps(config).encode()}, "the folder")
