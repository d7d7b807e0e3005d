"""The chat templates for tokenizers that bring none, and for those that are trained here.

Tools are shown and called in the form that Hermes and Qwen gave them: a schema a line behind the system's message, a
call as JSON between <tool_call> tags.
"""

# What the system says, with the tools behind it; and what the assistant says, with its calls behind it.
_MACROS = """\
{%- macro instructions(content) -%}
    {{- content | trim + '\\n\\nYou may call these functions:\\n' }}
    {%- for tool in tools %}
        {{- tool['function'] | tojson + '\\n' }}
    {%- endfor %}
    {{- 'A call is written so:\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>' }}
{%- endmacro %}
{%- macro answer(message) -%}
    {{- (message['content'] or '') | trim }}
    {%- for call in message['tool_calls'] %}
        {{- '\\n<tool_call>\\n{"name": ' + call['function']['name'] | tojson + ', "arguments": ' }}
        {{- call['function']['arguments'] | tojson + '}\\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}
"""
# A line with the role, the trimmed content, the end-of-text token. A newline ends the header, so that the answer starts
# a token of its own in every tokenizer.
DEFAULT_TEMPLATE = (
    _MACROS
    + """\
{%- if tools and messages[0]['role'] != 'system' %}
    {{- 'System:\\n' + instructions('') | trim + eos_token + '\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message['tool_calls'] %}
        {{- 'Assistant:\\n' + answer(message) | trim + eos_token + '\\n' }}
    {%- elif tools and loop.first and message['role'] == 'system' %}
        {{- 'System:\\n' + instructions(message['content']) + eos_token + '\\n' }}
    {%- else %}
        {{- message['role'] | capitalize + ':\\n' + message['content'] | trim + eos_token + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}
"""
)
# For tokenizers with one token a role, as in <|user|>Hello<|end|>; what a function gave is told by the user.
ROLE_TEMPLATE = (
    _MACROS
    + """\
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>' + instructions('') | trim + '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message['tool_calls'] %}
        {{- '<|assistant|>' + answer(message) | trim + '<|end|>' }}
    {%- elif tools and loop.first and message['role'] == 'system' %}
        {{- '<|system|>' + instructions(message['content']) + '<|end|>' }}
    {%- elif message['role'] in ['system', 'user', 'assistant'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|user|><tool_response>\\n' + message['content'] | trim + '\\n</tool_response><|end|>' }}
    {%- else %}
        {{- raise_exception('the roles are system, user, assistant and tool, not ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
)
