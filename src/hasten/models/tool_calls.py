"""Tool calls: which way of writing them a model was taught, and reading them out of text as it comes.

The chat template shows the way.
The families and where their ways are written down:

- hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one each call. Templates of Qwen 2.5,
  Qwen 3, SmolLM 3 and Hermes (https://github.com/NousResearch/Hermes-Function-Calling).
- hermes_list: the same with a JSON list between the marks. Template of SmolLM 2.
- llama: `{"name": ..., "parameters": {...}}` as the whole message, perhaps after `<|python_tag|>`. Llama
  3.1 to 3.3 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1).
- mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, and mistral_args:
  `[TOOL_CALLS]name[ARGS]{...}` (https://github.com/mistralai/mistral-common).
- phi: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`. Template of Phi-4-mini.
- qwen_xml: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`, values as
  plain text. Template of Qwen3-Coder.
- pythonic: `[name(key=value, ...), ...]` as the whole message. Templates of Llama 3.2 and 4
  (https://www.llama.com/docs/model-cards-and-prompt-formats/llama4).
- harmony: messages to functions in gpt-oss's channels: `hasten.models.answers`.

Templates of Gemma 3, OLMo 2 and Phi-3 know no tools: these models are told of them in words (`described`), in
hermes' way.
"""

from __future__ import annotations

import ast
import json
import math
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

StyleName = Literal[
    "hermes", "hermes_list", "llama", "mistral", "mistral_args", "phi", "qwen_xml", "pythonic", "harmony"
]

_MARKS: dict[StyleName, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "hermes_list": ("<tool_call>", "</tool_call>"),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "phi": ("<|tool_call|>", "<|/tool_call|>"),
    "qwen_xml": ("<tool_call>", "</tool_call>"),
    "pythonic": ("<|python_start|>", "<|python_end|>"),
    "harmony": ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>", "<|call|>"),
}


@dataclass(frozen=True)
class ToolStyle:
    """One model's way. `special` are those of its marks that decode would leave out, with their ids."""

    name: StyleName = "hermes"
    described: bool = False  # the template knows no tools: they are put into words
    spaced: bool = False  # mistral: a space between mark and list
    special: Mapping[str, int] = field(default_factory=dict)
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of the arguments, where known

    @property
    def opening(self) -> str:
        """What a call begins with; llama's may be missing."""
        return _MARKS[self.name][0]

    @property
    def closing(self) -> str | None:
        """What a call ends with; None where it goes on to the end of the answer."""
        closed = ("hermes", "hermes_list", "phi", "qwen_xml", "pythonic")
        return _MARKS[self.name][1] if self.name in closed else None

    @property
    def bare(self) -> bool:
        """Whether an answer that is nothing but JSON is a call."""
        return self.name in ("llama", "pythonic")

    @property
    def arguments_key(self) -> str:
        """The arguments' name in the call's JSON."""
        return "parameters" if self.name == "llama" else "arguments"

    @property
    def keep_ids(self) -> tuple[int, ...]:
        """Special tokens that a text stream must let through: `tokenizer.stream(keep=style.keep_ids)`."""
        return tuple(sorted(self.special.values()))


def tool_style(templates: Mapping[str, str], architecture: str, special: Mapping[str, int]) -> ToolStyle:
    """The way of a model's chat template.

    Args:
        templates: the model's, by name.
        architecture: as the model's; decides where a template leaves it open.
        special: the ids of the special tokens; marks may be among them.
    """
    name, described, spaced = _read(template_of(templates), architecture)
    return ToolStyle(name, described, spaced, {m: special[m] for m in _MARKS[name] if m in special})


def template_of(templates: Mapping[str, str]) -> str:
    """The template that chats with tools use."""
    return templates.get("tool_use") or templates.get("default") or ""


def is_described(templates: Mapping[str, str]) -> bool:
    """Whether tools must be put into words because the template knows none."""
    return "tool_use" not in templates and _read(template_of(templates), "")[1]


def is_harmony(template: str) -> bool:
    """Whether the model writes gpt-oss's channels."""
    return "<|channel|>" in template and "<|message|>" in template


def _read(template: str, architecture: str) -> tuple[StyleName, bool, bool]:
    """Style, described, spaced."""
    if is_harmony(template):
        return "harmony", False, False
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral", False, "[TOOL_CALLS] [" in template
    if "<|tool_call|>" in template or "<|tool|>" in template:
        return "phi", False, False
    if "<function=" in template and "<parameter=" in template:
        return "qwen_xml", False, False
    if "<|python_start|>" in template or "func_name1(params_name1=" in template:
        return "pythonic", False, False
    if "<tool_call>" in template and "<function=" not in template:
        as_list = "<tool_call>[" in template.replace("\\n", "").replace(" ", "")
        return "hermes_list" if as_list else "hermes", False, False
    if "<|python_tag|>" in template or (architecture == "llama" and '"parameters"' in template):
        return "llama", False, False
    return "hermes", True, False


# Mistral's newer way: a name before its arguments.
NAMED_CALL = re.compile(r"\s*([\w.:/-]+)(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?\s*(?=\{)")
_BETWEEN = " \t\r\n;,"


@dataclass(frozen=True)
class ToolCall:
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


def new_call_id(style: ToolStyle) -> str:
    """A name for a call; Mistral's templates take nothing but nine letters and digits."""
    letters = string.ascii_letters + string.digits
    if style.name.startswith("mistral"):
        return "".join(secrets.choice(letters) for _ in range(9))
    return "call_" + secrets.token_hex(12)


def read_calls(body: str, style: ToolStyle, bare: bool = False) -> tuple[list[ToolCall], str] | None:
    """The calls between a style's marks.

    Args:
        bare: there were no marks, so an object without arguments is no call.

    Returns:
        The calls and the text after them; None where the body is no call.
    """
    if style.name == "qwen_xml":
        return _xml_calls(body, style)
    if style.name == "pythonic":
        return _python_calls(body)
    calls: list[ToolCall] = []
    rest = body.lstrip()
    while rest:
        named = NAMED_CALL.match(rest) if style.name.startswith("mistral") else None
        try:
            value, end = _DECODER.raw_decode(rest, named.end() if named else 0)
        except (ValueError, RecursionError):
            break
        if named:
            value = {"name": named.group(1), "arguments": value}
        found = [_call(item, style, bare) for item in (value if isinstance(value, list) else [value])]
        good = [call for call in found if call is not None]
        if not good or len(good) < len(found):
            break
        calls += good
        rest = rest[end:]
        after = rest.lstrip(_BETWEEN)
        if after.startswith(style.opening):
            after = after[len(style.opening) :].lstrip()
        if after and after[0] not in "{[" and not (style.name == "mistral_args" and NAMED_CALL.match(after)):
            break
        rest = after
    return (calls, rest) if calls else None


_FUNCTION = re.compile(r"\s*<function=([^>\s]+)\s*>(.*?)(?:</function>|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)\s*>\n?(.*?)\n?\s*</parameter>", re.DOTALL)


def _xml_calls(body: str, style: ToolStyle) -> tuple[list[ToolCall], str] | None:
    """Calls whose arguments are plain text between tags; what the schema does not call text is JSON."""
    found = _FUNCTION.match(body)
    if found is None:
        return None
    name, inner = found.group(1), found.group(2)
    rules = (style.schemas.get(name) or {}).get("properties") or {}
    arguments = {key: _typed(text, rules.get(key)) for key, text in _PARAMETER.findall(inner)}
    return [ToolCall(name, json.dumps(arguments, ensure_ascii=False))], body[found.end() :]


def _typed(text: str, rule: Any) -> Any:
    """A value written as plain text: a text where the schema says so or where it is no JSON."""
    kinds = rule.get("type") if isinstance(rule, Mapping) else None
    if kinds == "string":
        return text
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


_WORDS = {"true": True, "false": False, "null": None}


def _python_calls(body: str) -> tuple[list[ToolCall], str] | None:
    """Calls written as a Python list of calls with named arguments; nothing of it is run."""
    text = body.strip()
    try:
        tree = ast.parse(text if text.startswith("[") else f"[{text}]", mode="eval").body
        assert isinstance(tree, ast.List)
        calls = [ToolCall(_dotted(one), _keywords(one)) for one in tree.elts]
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
        return None
    return (calls, "") if calls else None


def _dotted(call: ast.expr) -> str:
    assert isinstance(call, ast.Call) and not call.args, "no call with named arguments"
    return ast.unparse(call.func)


def _keywords(call: ast.expr) -> str:
    assert isinstance(call, ast.Call)
    values = {}
    for one in call.keywords:
        assert one.arg is not None, "an argument without a name"
        values[one.arg] = _literal(one.value)
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def _literal(node: ast.expr) -> Any:
    """The value of a Python literal, in which JSON's words count too."""
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(ast.literal_eval(k)): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k
        }
    return ast.literal_eval(node)


def _call(value: Any, style: ToolStyle, bare: bool) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not _is_name(value.get("name")):
        return None
    given = [value[key] for key in (style.arguments_key, "arguments", "parameters") if key in value]
    if bare and not given:
        return None  # any JSON object with a name is no call
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text if _is_unicode(text) else json.dumps(arguments))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != "" and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no JSON number that can be written again")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, strict=False)
