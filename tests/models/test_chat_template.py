"""Chat templates against transformers, in a sandbox, with errors that say what to do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from jinja2.sandbox import SandboxedEnvironment

from hasten.errors import TokenizerError, UsageError
from hasten.models.chat_template import render

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """{%- set ns = namespace(system="", count=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = message['content'] %}
        {%- continue %}
    {%- endif %}
    {%- if (message['role'] == 'user') != (ns.count % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and ns.system %}
            {{- '[INST] ' + ns.system + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {%- generation %}
            {{- ' ' + message['content'] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
    {{ raise_exception('System role not supported') }}
{% endif %}
{% for message in messages %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "  Be brief. <b>&amp;</b> "}
TURNS = [
    {"role": "user", "content": " Größe? 你好 'quoted' \"both\" <tag> & "},
    {"role": "assistant", "content": "ja\n\n  so\n"},
    {"role": "user", "content": "{{ 7 * 7 }} {% if x %}"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "wetter", "description": "Gibt's <b> & ü", "parameters": {"a": 1}},
    }
]


@pytest.fixture(scope="module")
def reference() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])), **SPECIAL)


def outcome(render_it: Any) -> str:
    try:
        return str(render_it())
    except Exception as error:  # noqa: BLE001 - both sides must refuse, each with its own error
        return f"refused: {str(error).rsplit(': ', 1)[-1]}"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    "messages",
    [TURNS, [SYSTEM, *TURNS], TURNS[:1], TURNS[:2], [SYSTEM], TURNS[1:]],
    ids=lambda m: str(len(m)),
)
def test_equals_transformers(name: str, prompt: bool, messages: list[dict[str, str]], reference: Any) -> None:
    variables: dict[str, Any]
    for tools, variables in (
        (None, {}),
        (TOOLS, {"enable_thinking": False}),
        (None, {"date_string": "1 Jan 2000"}),
    ):
        expected = outcome(
            lambda tools=tools, variables=variables: reference.apply_chat_template(
                messages,
                tools=tools,
                chat_template=TEMPLATES[name],
                add_generation_prompt=prompt,
                tokenize=False,
                **variables,
            )
        )
        got = outcome(
            lambda tools=tools, variables=variables: render(
                {"default": TEMPLATES[name]},
                messages,
                add_generation_prompt=prompt,
                special_tokens=SPECIAL,
                tools=tools,
                variables=variables,
            )
        )
        assert got == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ {'a': 'ü<', 'b': [1, None, true]} | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "  {% if true %}\n  x\n  {% endif %}\ny\n",
        "{{ strftime_now('%Y') | length }}",
        "{{ dict(a=1) }}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}",
        "{{ undefined_name }}|{{ bos_token }}{{ documents }}{{ tools }}",
        "{{ messages[0].content.split('\\n')[0].strip() }}{{ 'x'.__class__ }}",
    ],
)
def test_environment_equals_transformers(source: str, reference: Any) -> None:
    expected = outcome(lambda: reference.apply_chat_template(TURNS, chat_template=source, tokenize=False))
    mine = outcome(
        lambda: render({"default": source}, TURNS, add_generation_prompt=False, special_tokens=SPECIAL)
    )
    assert mine == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{% set _ = messages.append(1) %}{{ messages }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ '%s' | format(raise_exception.__code__.co_consts) }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% include 'etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        text = render({"default": source}, TURNS)
        raise AssertionError(text)
    assert caught.value.hint and "--raw" in caught.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ messages[0] | nofilter }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ none.x.y }}",
        "{{ messages[99].role.x }}",
        "{{ 'a' + 1 }}",
        "{{ messages | sum }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in [1] %}" * 25 + "x" + "{% endfor %}" * 25,  # Python nests 20 blocks
        "{% for i in [1] %}" * 120 + "x" + "{% endfor %}" * 120,  # and indents 100 levels
        "{% if true %}" * 3000 + "x" + "{% endif %}" * 3000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=lambda source: source[:40],
)
def test_faults_in_templates_are_reported(source: str) -> None:
    with pytest.raises(TokenizerError, match="chat template") as caught:
        render({"default": source}, TURNS)
    assert caught.value.hint and "--raw" in caught.value.hint


def test_a_missing_template_is_named() -> None:
    with pytest.raises(TokenizerError, match="no chat template"):
        render({}, TURNS)
    with pytest.raises(TokenizerError, match="only rag"):
        render({"rag": "x"}, TURNS)


@pytest.mark.parametrize("messages", [[], "hello", ["hello"], [{"role": "user", "content": object()}]])
def test_bad_messages_are_usage_errors(messages: list[Mapping[str, Any]]) -> None:
    with pytest.raises(UsageError) as caught:
        render({"default": CHATML}, messages)
    assert caught.value.hint


def doubling(step: str, after: str = "") -> str:
    """A template that takes a step sixty times."""
    loop = "{% for i in range(60) %}" + step + "{% endfor %}"
    return "{% set ns = namespace(s='xx') %}" + loop + after


RUNAWAYS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    doubling("{% set ns.s = ns.s ~ ns.s %}"),
    doubling("{% set ns.s = ns.s + ns.s %}"),
    doubling("{% set ns.s = [ns.s, ns.s] %}", "{{ ns.s }}"),
    doubling("{% set ns.s = (ns.s, ns.s) %}", "{{ ns.s == ns.s }}"),
    doubling("{% set ns.s = {'a': ns.s, 'b': ns.s} %}", "{{ ns.s | tojson }}"),
    doubling("{% set ns.s = dict(a=ns.s, b=ns.s) %}"),
    doubling("{% set ns.s = ns.s | replace('x', ns.s) %}"),
    doubling("{% set ns.s = ns.s.replace('x', ns.s) %}"),
    doubling("{% set ns.s = ns.s.join(ns.s) %}"),
    doubling("{% set ns.s = ns.s | join(ns.s) %}"),
    doubling("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    doubling("{% set ns.s = '{0}{0}'.format(ns.s) %}"),
    doubling("{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
    doubling("{% set ns.s = ns.s.translate({120: ns.s}) %}"),
    "{{ 'x' * 10 ** 10 }}",
    "{{ 2 ** (10 ** 9) }}{{ 1 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999d}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ 'x'.center(10 ** 10) }}{{ 1 }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ ('a\\n' * 100000) | indent(100000) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "{% set x = range(99999) | map('string') | map('center', 99999) | list %}",
    "{% set x = ''.join(range(99999) | map('string') | map('center', 99999)) %}",
    "{% macro m() %}" + "x" * 10_000 + "{% endmacro %}"
    "{% set x %}{% for i in range(99999) %}{{ m() }}{% endfor %}{% endset %}",
    "{% set x %}{% for i in range(99999) %}" + "y" * 10_000 + "{% endfor %}{% endset %}",
    "x" * (2 << 20),
    "{% set x = [" + "1," * 400_000 + "] %}",
    "{{ " + "1+" * 400_000 + "1 }}",
]


@pytest.mark.parametrize("source", RUNAWAYS, ids=lambda source: source[:40])
def test_no_template_runs_away(source: str) -> None:
    started = time.process_time()
    with pytest.raises(TokenizerError, match="chat template") as caught:
        render({"default": source}, TURNS)
    assert time.process_time() - started < 8
    assert caught.value.hint and "--raw" in caught.value.hint


def test_long_chats_stay_within_the_bounds() -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " * 100} for i in range(3000)]
    for template in (CHATML, LLAMA3):
        text = render({"default": template}, turns, special_tokens=SPECIAL)
        assert text.count("turn 2999") == 100
    whole = render({"default": CHATML}, [{"role": "user", "content": "x" * 4_000_000}])
    assert len(whole) > 4_000_000


def test_loops_still_know_where_they_are() -> None:
    source = (
        "{% for x in 'abc' %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
        "{{ loop.previtem }}{{ loop.nextitem }}|{% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}none{% endfor %}"
        "{% for k, v in {'a': [1, 2]}.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    )
    plain = SandboxedEnvironment().from_string(source).render()
    assert render({"default": source}, TURNS) == plain
