"""Forced tool calls are calls, in every family's way, with the arguments that the schema wants."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from hasten.engine.grammar import MOST_CALLS, Calls, answer_grammar, checked_tools
from hasten.errors import UsageError
from hasten.models import gguf_tokenizer
from hasten.models.tokenizer import Tokenizer
from hasten.models.tool_calls import ToolStyle
from masked_vocabulary import Vocabulary, bits
from tiny_tokenizers import byte_level, byte_level_metadata
from whole_calls import parse_tool_calls

MARKS = ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>")
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time.now", "description": "no arguments"}},
]
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>\n{'name': x}",
    "hermes_list": "{{ tools }}<tool_call>[{'name': x}]</tool_call>",
    "llama": "{{ tools }}<|python_tag|>",
    "mistral": "{{ tools }}[TOOL_CALLS] [",
    "mistral_args": "{{ tools }}[TOOL_CALLS]f[ARGS]",
    "phi": "<|tool|><|tool_call|>",
    "described": "{{ messages }}",
}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.QWEN2), "qwen2")
    metadata["tokens"] = [*metadata["tokens"], *MARKS]
    metadata["token_type"] = [*metadata["token_type"], *[3] * len(MARKS)]  # control tokens, skipped in decode
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}


def answer(vocabulary: Vocabulary, style: ToolStyle, rng: random.Random, only: str | None = None) -> str:
    """A forced answer as the server sees it: through the tokenizer's own text stream."""
    functions = checked_tools(TOOLS)
    named = functions if only is None else {only: functions[only]}
    grammar = answer_grammar(None, Calls(named, True, MOST_CALLS if only is None else 1, style))
    assert grammar is not None
    ids = vocabulary.draw(vocabulary.compiler.compile(grammar).start(), rng)
    stream = vocabulary.tokenizer.stream(keep=style.keep_ids)
    return "".join([*(stream.push(i) for i in ids), stream.flush()])


@pytest.mark.parametrize("name", TEMPLATES)
def test_forced_calls_are_calls(name: str, trained: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(trained | {"tokenizer.chat_template": TEMPLATES[name]})
    vocabulary, style = Vocabulary(tokenizer), tokenizer.tool_style("llama")
    assert style.name == ("hermes" if name == "described" else name) and style.described == (
        name == "described"
    )
    counts = set()
    for seed in range(25):
        rng = random.Random(seed)
        content, calls = parse_tool_calls(answer(vocabulary, style, rng), style)
        assert content == "" and calls
        counts.add(len(calls))
        for call in calls:
            arguments = json.loads(call.arguments)
            if call.name == "weather":
                assert isinstance(arguments["city"], str) and arguments.get("days", 0) <= 9
            else:
                assert call.name == "time.now" and arguments == {}
        text = answer(vocabulary, style, rng, "weather")
        content, calls = parse_tool_calls(text, style)
        assert content == "" and [call.name for call in calls] == ["weather"]
    assert counts == {1} if name == "llama" else max(counts) > 1


def test_nothing_is_forced_where_the_model_may_choose() -> None:
    assert answer_grammar(None) is None


def spelled(vocabulary: Vocabulary, style: ToolStyle, text: str) -> bool:
    """Whether a free grammar lets a whole answer be written: marks as their tokens, the rest as it may."""
    grammar = answer_grammar(None, Calls(checked_tools(TOOLS), False, MOST_CALLS, style))
    assert grammar is not None
    state, rest = vocabulary.compiler.compile(grammar).start(), text.encode()
    marks = {mark.encode(): token for mark, token in style.special.items()}
    while rest:
        allowed = bits(state.masks(())[0])
        special = next((mark for mark in marks if rest.startswith(mark)), None)
        words = {vocabulary.values[token]: token for token in allowed if token not in marks.values()}
        part = special or next((one for one in sorted(words, key=len) if one and rest.startswith(one)), None)
        if part is None or (special and marks[special] not in allowed):
            return False
        state.accept([marks[special] if special else words[part]])
        rest = rest[len(part) :]
    return bool(vocabulary.ends & set(bits(state.masks(())[0])))


CALLS = {
    "hermes": "Well.{op}\n{{call}}\n</tool_call>",
    "hermes_list": "Well. {op}[{{call}}]</tool_call>",
    "llama": "{{call}}",
    "mistral": "Well.{op} [{{call}}]",
    "mistral_args": "Well.{op}weather[ARGS]{{arguments}}",
    "phi": "Well.{op}[{{call}}]<|/tool_call|>",
    "described": "<tool_call>\n{{call}}\n</tool_call>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_free_answer_is_text_or_follows_the_schemas(name: str, trained: dict[str, Any]) -> None:
    """What a strict tool asks for where the model may choose."""
    tokenizer = Tokenizer.from_gguf(trained | {"tokenizer.chat_template": TEMPLATES[name]})
    vocabulary, style = Vocabulary(tokenizer), tokenizer.tool_style("llama")
    for text in ("", "It rains.", 'Take {"name": 3} and\n\n <b>', "f() { return }", " \n 1, 2"):
        assert spelled(vocabulary, style, text), text
    shape = CALLS[name].replace("{op}", style.opening)

    def answered(arguments: str) -> bool:
        call = f'{{"name": "weather", "{style.arguments_key}": {arguments}}}'
        text = shape.replace("{{call}}", call).replace("{{arguments}}", arguments)
        return spelled(vocabulary, style, text)

    assert answered('{"city": "x"}') and answered('{"city": "x", "days": 3}')
    for wrong in ('{"town": "x"}', '{"city": 3}', "{}", '{"city": "x", "days": 30}', '{"city": "x", "a": 1}'):
        assert not answered(wrong), wrong
    for before in ("", "\n", "```json\n", "```\n", " ```json"):  # what is read as a call is no free text
        assert not spelled(vocabulary, style, before + '{"name": "weather", "arguments": {"town": "x"}}')
        whole = f'{before}{{\n "name": "weather",\n "{style.arguments_key}": {{\n  "city": "x"\n }}\n}}'
        assert spelled(vocabulary, style, whole) == (not style.bare), before
    for text in ("```json\n[1]\n```", "```python\n{}", "`{`", "```jso", "```js\nlet a = {}"):
        assert spelled(vocabulary, style, text), text


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([*TOOLS, {"type": "function", "function": {"name": TOOLS[0]["function"]["name"]}}], "two functions"),
        ([{"type": "web_search"}], "web_search"),
        (["weather"], "str"),
        ("weather", "list"),
        ([{"type": "function", "function": {"name": "a b"}}], "a b"),
        ([{"type": "function", "function": {"name": "f", "parameters": [1]}}], "no JSON schema"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
            "no object",
        ),
        ([{"type": "function", "function": {"name": str(i)}} for i in range(257)], "at most 256"),
    ],
)
def test_what_is_wrong_is_named(tools: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        checked_tools(tools)
    assert caught.value.hint


def test_a_wrong_schema_is_named_with_its_function() -> None:
    with pytest.raises(UsageError, match=r"'f': .*'requierd'") as caught:
        answer_grammar(None, Calls({"f": {"requierd": []}}, forced=True))
    assert caught.value.hint


@pytest.mark.demo
def test_demo_style() -> None:
    from hasten.models.gguf import GgufFile
    from hasten.models.source import demo_file

    tokenizer = Tokenizer.from_gguf(GgufFile.open(demo_file().path).metadata)
    style = tokenizer.tool_style("qwen2")
    assert style == ToolStyle() and "<tools>" in tokenizer.apply_chat(
        [{"role": "user", "content": "x"}], tools=TOOLS
    )
    vocabulary = Vocabulary(tokenizer, padding=0)
    text = answer(vocabulary, style, random.Random(0))
    assert text.startswith("<tool_call>\n") and parse_tool_calls(text, style)[1]
