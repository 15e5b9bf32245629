"""Chats with tools through the templates of every family; contents in parts; what is no text is refused."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import Any

import pytest
from test_chat_template import GEMMA

from hasten.errors import TokenizerError, UsageError
from hasten.models.chat_template import in_any_form, prepared, render
from hasten.models.tool_calls import is_described

# The parts of the published templates that tools touch.
QWEN = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0]['role'] == 'system' %}
{{- messages[0]['content'] }}{%- endif %}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}"""
LLAMA = """{%- if tools is not none %}{{- "Environment: ipython\\n" }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary}' }}{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}{{- raise_exception("only single calls") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- if builtin_tools is defined %}{{- "<|python_tag|>" }}{%- endif %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' + (tool_call.arguments | tojson) + "}" }}
    {%- else %}{{- "<|start_header_id|>ipython\\n\\n" + message.content }}{%- endif %}
{%- endfor %}"""
MISTRAL = """{%- if tools is not none %}{{- "[AVAILABLE_TOOLS] " + (tools | tojson) }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{{- ", " if not loop.last else "]" }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- else %}{{- ' ' + message.content }}{%- endif %}
{%- endfor %}"""
PHI4 = """{%- for message in messages %}{%- if message['role'] == 'system' and 'tools' in message %}
{{- '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}{%- else %}
{{- '<|' + message['role'] + '|>' + message['content'] }}{%- endif %}{%- endfor %}"""
SMOLLM3 = """{%- if xml_tools %}{{- xml_tools | tojson }}<tool_call>{"name":{%- endif %}
{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}"""
PLAIN = """{%- for message in messages %}{%- if message.role not in ('system', 'user', 'assistant') %}
{{- raise_exception('unknown role') }}{%- endif %}
{{- '<|' + message.role + '|>\\n' + message.content + '\\n' }}{%- endfor %}"""

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]
ASKED = {"role": "user", "content": [{"type": "text", "text": "Rain in"}, {"type": "text", "text": "Köln?"}]}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_0123456789abcdef",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
        }
    ],
}
TOLD = {"role": "tool", "tool_call_id": "call_0123456789abcdef", "content": '{"rain": true}'}
CHAT = [ASKED, CALLED, TOLD]


def text_of(template: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    templates = {"default": template}
    chat, more = prepared(messages, tools, templates)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return render(templates, chat, tools=tools, special_tokens=special, variables=more)


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (QWEN, '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'),
        (LLAMA, '{"name": "weather", "parameters": {"city": "Köln"}}'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}, "id": "'),
        (GEMMA, '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'),
        (PLAIN, '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'),
    ],
    ids=["qwen", "llama", "mistral", "gemma", "plain"],
)
def test_a_chat_with_tools_renders(template: str, call: str) -> None:
    asked = [{"role": "user", "content": "Rain in Köln?"}]
    text = text_of(template, CHAT, TOOLS)
    assert '"weather"' in text_of(template, asked, TOOLS) and call in text
    assert "Rain in\nKöln?" in text and '{"rain": true}' in text


def test_tools_reach_templates_that_name_them_otherwise() -> None:
    asked = [{"role": "user", "content": "x"}]
    assert "<|tool|>[{" in text_of(PHI4, asked, TOOLS) and "<|user|>x" in text_of(PHI4, asked, TOOLS)
    assert '"weather"' in text_of(SMOLLM3, asked, TOOLS)


def test_templates_without_tools_are_told_in_words() -> None:
    assert is_described({"default": PLAIN}) and is_described({"default": GEMMA})
    assert not is_described({"default": QWEN}) and not is_described({"default": PLAIN, "tool_use": QWEN})
    system = {"role": "system", "content": "Be brief."}
    text = text_of(PLAIN, [system, ASKED], TOOLS)
    assert text.startswith("<|system|>\nBe brief.\n\n# Tools") and text.count("<|system|>") == 1
    assert "<|user|>" not in text_of(GEMMA, [ASKED], TOOLS) and "# Tools" in text_of(GEMMA, [ASKED], TOOLS)
    again = [*CHAT, {"role": "tool", "content": "2"}, {"role": "user", "content": "And?"}]
    assert text_of(PLAIN, again, TOOLS).count("<|user|>") == 2, "results and the next question are one turn"
    assert "Köln" in text_of(PLAIN, CHAT), "an old call is kept where no tools are sent any more"


def test_ids_for_mistral_are_short_and_fit_together() -> None:
    chat, _ = prepared(CHAT, TOOLS, {"default": MISTRAL})
    short = chat[1]["tool_calls"][0]["id"]
    assert len(short) == 9 and short.isalnum() and chat[2]["tool_call_id"] == short
    assert CALLED["tool_calls"][0]["id"] == "call_0123456789abcdef", "the caller's messages are left alone"


def test_plain_chats_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": "x", "name": "n"}]
    assert prepared(messages, None, {"default": QWEN}) == (messages, {})
    developer = [{"role": "developer", "content": "x"}]
    assert prepared(developer, None, {"default": QWEN})[0] == [{"role": "system", "content": "x"}]


def call(function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "'text'"),
        ({"role": "user", "content": ["x"]}, "'str'"),
        (call({"name": "f", "arguments": "{"}), "'f' are no JSON object"),
        (call({"name": "f", "arguments": "[1]"}), "'f' are no JSON object"),
        (call(None), "no function"),
    ],
)
def test_what_a_model_cannot_read_is_named(message: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        text_of(QWEN, [message])
    assert caught.value.hint


def test_long_histories_cost_no_more_than_their_length() -> None:
    """8,000 calls took 12 s in a request: each one's arguments were looked for in all of the text."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    said = {"role": "user", "content": "x" * 1500}
    refusing = (
        "{% for m in messages %}{% if not loop.first and m.role == 'user' %}{{ raise_exception('no') }}"
    )
    refusing += "{% endif %}{{ m.content }}{% endfor %}"
    for template, messages in (
        ("{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}", [said, *[called] * 12_000]),
        (refusing, [said] * 8000),
    ):
        began = time.monotonic()
        chat, _ = prepared(messages, None, {"default": template})
        with contextlib.suppress(TokenizerError):
            in_any_form(partial(render, {"default": template}), chat)
        assert time.monotonic() - began < 8  # 1 s
