"""OpenAI's chat messages as chat templates want them."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.errors import UsageError
from hasten.models.tools.style import is_described, template_of

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]

_TEXT_PARTS = ("text", "input_text", "output_text")
_ALPHABET = string.ascii_letters + string.digits
_DESCRIPTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def prepared(
    messages: Sequence[Mapping[str, Any]], tools: Tools | None, templates: Mapping[str, str]
) -> tuple[Messages, dict[str, Any]]:
    """Messages with text contents and parsed arguments; tools put where this model's template reads them.

    Args:
        messages: as OpenAI's API takes them; other keys are left alone.
        tools: OpenAI's function descriptions.
        templates: the model's, by name.

    Returns:
        The messages, and names that the template reads besides `tools`.

    Raises:
        UsageError: a content part that is no text, or a call's arguments that are no JSON object.
    """
    chat = [_plain(message) for message in messages]
    template = template_of(templates)
    if "[TOOL_CALLS]" in template:
        _shorten_ids(chat)
    if tools is None and not any(m.get("role") == "tool" or m.get("tool_calls") for m in chat):
        return chat, {}
    if is_described(templates):
        return _described(chat, tools, template), {}
    if tools and "<|tool|>" in template:  # Phi-4-mini reads them from the system message
        _system(chat)["tools"] = json.dumps(list(tools), ensure_ascii=False)
    if tools and "xml_tools" in template:  # SmolLM 3's name for them
        return chat, {"xml_tools": list(tools)}
    return chat, {}


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(message)
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if "content" in plain or plain.get("tool_calls"):
        plain["content"] = _text(plain.get("content"))
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    else:
        plain["tool_calls"] = [_parsed(call) for call in plain["tool_calls"]]
    return plain


def _text(content: Any) -> Any:
    """One text of a list of parts; other values stay, the template says what it thinks of them."""
    if content is None:
        return ""
    if not isinstance(content, (list, tuple)):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UsageError(
                f"a message has a content part of type {str(kind)[:40]!r}; this model reads text alone",
                hint='send content as text, or as parts like {"type": "text", "text": "Hello"}',
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _parsed(call: Any) -> Any:
    """A call whose arguments are values, as templates want, not the API's JSON text."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise UsageError(
            "a tool call of a message has no function",
            hint='send {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{}"}}',
        )
    function = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise UsageError(
            f"the arguments of the tool call {str(function.get('name'))[:80]!r} are no JSON object",
            hint="send back the arguments as they came, or {} if the call was malformed",
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _shorten_ids(chat: Messages) -> None:
    """Mistral's templates take ids of nine letters and digits; others are mapped to such, equal to equal."""
    import hashlib

    def short(identity: Any) -> Any:
        if not isinstance(identity, str) or (len(identity) == 9 and identity.isalnum()):
            return identity
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()
        return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:9])

    for message in chat:
        if "tool_call_id" in message:
            message["tool_call_id"] = short(message["tool_call_id"])
        if message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in message["tool_calls"]]


def _system(chat: Messages) -> dict[str, Any]:
    if not chat or chat[0].get("role") != "system":
        chat.insert(0, {"role": "system", "content": ""})
    return chat[0]


def _described(chat: Messages, tools: Tools | None, template: str) -> Messages:
    """Tools, calls and results in words, in roles that every template knows."""
    told: Messages = []
    for message in chat:
        role, content = message.get("role"), message.get("content", "")
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        elif message.get("tool_calls"):
            calls = [_written(call["function"]) for call in message["tool_calls"]]
            content = "\n".join([content, *calls] if content else calls)
        if role == "user" and told and told[-1]["role"] == "user":
            told[-1]["content"] = (
                f"{told[-1]['content']}\n{content}"  # many templates want turns to alternate
            )
        else:
            rest = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
            told.append({**rest, "role": role, "content": content})
    if tools:
        words = _DESCRIPTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        no_system = "System role not supported" in template and told and told[0]["role"] == "user"
        place = told[0] if no_system else _system(told)
        parts = [words, place["content"]] if no_system else [place["content"], words]
        place["content"] = "\n\n".join(part for part in parts if part)
    return told


def _written(function: Mapping[str, Any]) -> str:
    call = {"name": function.get("name"), "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
