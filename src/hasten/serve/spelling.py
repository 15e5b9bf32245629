"""Chats as other servers and older clients spell them, in OpenAI's words of today.

What is understood was seen in histories, editors and agents: contents as lists, null or nothing; calls with
an index and without a type, their arguments as an object; `functions`; tools in Anthropic's form; thoughts
under several names. Fields of messages that are outputs (`finish_reason`, `id`, `cache_control`) ask for
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_KEPT = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_HEARD = ("refusal", "function_call", "prefix", "partial")  # of messages: read elsewhere, so not "ignored"
_ROLES = {"function": "tool", "model": "assistant", "ai": "assistant", "human": "user"}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "summary_text")
_THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_text")


def spelled_chat(document: Mapping[str, Any], ignored: set[str]) -> dict[str, Any]:
    """The body of a chat in OpenAI's words; what it lacks or has wrong is left for the check to name.

    Args:
        document: the body.
        ignored: gets the names of what is left out.
    """
    found = dict(document)
    messages = found.get("messages")
    if isinstance(messages, list):
        found["messages"] = spelled_messages(messages, ignored)
        last = messages[-1] if messages else None
        if isinstance(last, Mapping) and last.get("role") == "assistant" and _is_begun(last):
            found.setdefault("continue_final_message", True)
    _functions(found)
    if isinstance(found.get("tools"), list):
        found["tools"] = spelled_tools(found["tools"], ignored) or None
    if "tool_choice" in found:
        _choice(found)
    if not found.get("tools") and found.get("tool_choice") in ("auto", "none"):
        del found["tool_choice"]
    for name, same in (
        ("max_thinking_tokens", "thinking_budget"),
        ("thinking_token_budget", "thinking_budget"),
    ):
        if isinstance(found.get(name), int):
            found.setdefault(same, found.pop(name))
    return spelled_switches(found, ignored)


def _is_begun(message: Mapping[str, Any]) -> bool:
    """Whether an answer is to go on with a message, in the words of Mistral and Moonshot."""
    return message.get("prefix") is True or message.get("partial") is True


def spelled_switches(document: Mapping[str, Any], ignored: set[str]) -> dict[str, Any]:
    """Fields with values that this server has one way for, of any request that generates."""
    found = dict(document)
    if found.get("store") is True:
        ignored.add("store")
        del found["store"]
    if found.get("service_tier") not in (None, "auto", "default"):
        ignored.add("service_tier")
        del found["service_tier"]
    if isinstance(found.get("prompt_cache_key"), str) and len(found["prompt_cache_key"]) > 512:
        del found["prompt_cache_key"]
    _user(found, ignored)
    _stop(found)
    if isinstance(found.get("stream_options"), Mapping):
        found["stream_options"] = {k: v for k, v in found["stream_options"].items() if v is not None}
    _thoughts(found)
    if isinstance(found.get("logit_bias"), list):  # llama.cpp's pairs
        found["logit_bias"] = {
            str(pair[0]): (-100 if pair[1] is False else pair[1])
            for pair in found["logit_bias"]
            if isinstance(pair, list) and len(pair) == 2
        }
    if found.get("top_p") == 0 and not isinstance(found["top_p"], bool):
        found["top_p"] = 1e-6  # the likeliest token alone, as OpenAI has it
    if isinstance(found.get("seed"), int) and abs(found["seed"]) >= 2**63:
        found["seed"] %= 2**63
    if found.get("min_tokens") == 0:
        del found["min_tokens"]
    if found.pop("do_sample", None) is False:
        found["temperature"] = 0
    _form(found)
    return found


def _user(found: dict[str, Any], ignored: set[str]) -> None:
    user = found.get("user")
    if isinstance(user, str):
        found["user"] = user[:512]  # agents put objects as text there
    elif isinstance(user, int):
        found["user"] = str(user)
    elif isinstance(user, Mapping | list):
        del found["user"]
        ignored.add("user")


def _stop(found: dict[str, Any]) -> None:
    """Stop texts without those that say nothing."""
    if isinstance(found.get("stop"), list):
        found["stop"] = [one for one in found["stop"] if one not in ("", None)]
    elif found.get("stop") == "":
        del found["stop"]


def _thoughts(found: dict[str, Any]) -> None:
    """Switches of thoughts that others have under one name, as a word or as a truth."""
    if isinstance(found.get("reasoning"), str):
        found.setdefault("reasoning_effort", found.pop("reasoning"))
    elif isinstance(found.get("reasoning"), bool):
        found["reasoning"] = {"enabled": found["reasoning"]}
    if isinstance(found.get("thinking"), str):
        found["thinking"] = {"type": found["thinking"]}
    think = found.pop("think", None)  # Ollama's
    if isinstance(think, bool):
        found.setdefault("enable_thinking", think)
    elif isinstance(think, str):
        found.setdefault("reasoning_effort", think)
    if found.get("reasoning_format") == "hidden":  # Groq's
        found.setdefault("include_reasoning", False)


def _form(found: dict[str, Any]) -> None:
    """What an answer must match, whatever the field is called: Ollama's `format`, TGI's `grammar`."""
    form = found.get("response_format")
    if form is None and found.get("format") not in (None, ""):
        form = found.pop("format")
        form = {"type": "json_schema", "schema": form} if isinstance(form, Mapping) else form
    if isinstance(form, str):
        form = {"type": form}
    if isinstance(form, Mapping):
        form = spelled_format(form)
        kind = form.get("type")
        text = form.get(kind, form.get("pattern")) if isinstance(kind, str) else None
        if not kind:
            form = None
        elif kind in ("regex", "grammar") and isinstance(text, str):
            found[f"guided_{kind}"], form = text, None
    found["response_format"] = form
    grammar = found.get("grammar")
    if isinstance(grammar, Mapping):
        found["guided_regex" if grammar.get("type") == "regex" else "guided_json"] = grammar.get("value")
        del found["grammar"]


def spelled_messages(messages: Sequence[Any], ignored: set[str]) -> list[Any]:
    """Messages in OpenAI's words."""
    spelled: list[Any] = []
    waiting: dict[str, None] = {}  # ids of the last calls that have no result yet
    for message in messages:
        if not isinstance(message, Mapping):
            spelled.append(message)
            waiting = {}
            continue
        spelled.append(said := _message(message, next(iter(waiting), None), ignored))
        if said.get("role") == "tool":
            waiting.pop(str(said.get("tool_call_id")), None)
        else:
            waiting = dict.fromkeys(_call_ids(said))
    return spelled


def _call_ids(message: Mapping[str, Any]) -> list[str]:
    calls = message.get("tool_calls")
    ids = [call.get("id") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    return [one for one in ids if isinstance(one, str)]


def _message(message: Mapping[str, Any], waiting: str | None, ignored: set[str]) -> dict[str, Any]:
    """A message in OpenAI's words; `waiting` is the call that a result without an id belongs to."""
    found = dict(message)
    said = str(found.get("role")).lower()
    role = _ROLES.get(said, said if said in _KEPT else found.get("role"))
    found["role"] = role
    thoughts: list[str] = []
    found["content"] = _content(found.get("content"), thoughts)
    if role == "assistant":
        _assistant(found, thoughts)
    elif role == "tool":
        if not isinstance(found["content"], str | list):
            found["content"] = json.dumps(found["content"], ensure_ascii=False)
        if not isinstance(found.get("tool_call_id"), str):
            found["tool_call_id"] = waiting or "call_0"
    kept = _KEPT.get(str(role))
    if kept is None:
        return found
    for name in [name for name in found if name not in kept]:
        value = found.pop(name)
        if value not in (None, "", [], {}) and name not in _HEARD:
            ignored.add(f"messages.{name}")
    return {name: value for name, value in found.items() if value is not None or name == "content"}


def _content(content: Any, thoughts: list[str]) -> Any:
    """Text of null, parts of any text form; other parts stay and are named by the check."""
    if content is None:
        return ""
    if isinstance(content, Mapping) and "text" in content:
        content = [content]
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind in _THOUGHT_PARTS:
            thoughts.append(str(part.get("thinking") or part.get("text") or part.get("reasoning") or ""))
        elif kind in _TEXT_PARTS:
            text = part.get("text", part.get("refusal"))
            parts.append({"type": "text", "text": "" if text is None else text})
        else:
            parts.append(part)
    return parts or ""


def _assistant(found: dict[str, Any], thoughts: list[str]) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(found.get(name), str):
            thoughts.insert(0, found[name])
            del found[name]
            break
    said = "\n".join(thought for thought in thoughts if thought)
    if said:
        found["reasoning_content"] = said
    if isinstance(found.get("refusal"), str) and found["refusal"] and not found["content"]:
        found["content"] = found["refusal"]
    calls = found.get("tool_calls")
    old = found.get("function_call")
    if not calls and isinstance(old, Mapping):
        calls = [{"function": old}]
    if isinstance(calls, list) and calls:
        found["tool_calls"] = [_call(call, number) for number, call in enumerate(calls) if call is not None]
    else:
        found.pop("tool_calls", None)


def _call(call: Any, number: int) -> Any:
    """A call with id, type and arguments as JSON text."""
    if not isinstance(call, Mapping):
        return call
    custom = call.get("custom")
    if isinstance(custom, Mapping):  # a tool that takes a text
        call = {**call, "function": {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}}
    function = call.get("function", call if "name" in call else None)
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = function.get("arguments", function.get("input"))
    if not isinstance(arguments, str):
        arguments = "{}" if arguments is None else json.dumps(arguments, ensure_ascii=False)
    name = call.get("id")
    return {
        "id": name if isinstance(name, str) and name else f"call_{number}",
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _functions(found: dict[str, Any]) -> None:
    """`functions` and `function_call`, the names of tools until 2023."""
    functions = found.pop("functions", None)
    choice = found.pop("function_call", None)
    if isinstance(functions, list) and functions and not found.get("tools"):
        found["tools"] = [{"type": "function", "function": function} for function in functions]
        if isinstance(choice, Mapping):
            found.setdefault("tool_choice", {"type": "function", "function": {"name": choice.get("name")}})
        elif isinstance(choice, str):
            found.setdefault("tool_choice", choice)


def spelled_tools(tools: Sequence[Any], ignored: set[str]) -> list[Any]:
    """Functions, in the nested form; tools of other types are left out and said."""
    kept: list[Any] = []
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            kept.append(tool)
            continue
        if number and tool == tools[number - 1]:  # sent twice
            continue
        kind = tool.get("type")
        inner = tool.get("function")
        if isinstance(inner, Mapping) and kind in (None, "function"):
            kept.append({"type": "function", "function": _function(inner)})
        elif kind == "namespace" and isinstance(tool.get("tools"), list):
            kept += spelled_tools(tool["tools"], ignored)
        elif kind in (None, "function", "custom") and "name" in tool and "format" not in tool:
            if kind == "custom" and not ("input_schema" in tool or "parameters" in tool):
                ignored.add("tools.custom")
            else:
                kept.append({"type": "function", "function": _function(tool)})
        elif kind == "function" or kind is None:
            kept.append(dict(tool))  # wrong, and named by the check
        else:
            ignored.add(f"tools.{kind}")
    return kept


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("parameters", tool.get("input_schema"))
    kept = {"name": tool.get("name"), "description": tool.get("description"), "strict": tool.get("strict")}
    if not isinstance(kept["strict"], bool):
        del kept["strict"]
    if schema is not None:
        kept["parameters"] = schema
    return kept


_WORDS = {"any": "required", "": "auto", "auto": "auto", "none": "none", "required": "required"}


def _choice(found: dict[str, Any]) -> None:
    """`tool_choice` as a word or a function; a list of allowed tools shortens the list of tools."""
    choice = found["tool_choice"]
    tools = found["tools"] if isinstance(found.get("tools"), list) else []
    if isinstance(choice, str):
        names = [_name_of(tool) for tool in tools]
        named = {"type": "function", "function": {"name": choice}} if choice in names else choice
        found["tool_choice"] = _WORDS.get(choice, named)
        return
    if not isinstance(choice, Mapping):
        return
    if not choice:
        del found["tool_choice"]
        return
    kind = choice.get("type")
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools")
        allowed = inner if isinstance(inner, Mapping) else choice
        listed = allowed.get("tools")
        few = {str(_name_of(tool)) for tool in listed} if isinstance(listed, list) else set()
        found["tools"] = [tool for tool in tools if str(_name_of(tool)) in few]
        found["tool_choice"] = _WORDS.get(str(allowed.get("mode", "auto")), "auto")
    elif isinstance(kind, str) and kind in _WORDS:
        found["tool_choice"] = _WORDS[kind]
        if choice.get("disable_parallel_tool_use") is True:
            found.setdefault("parallel_tool_calls", False)
    elif kind in ("function", "tool", "custom", None) and _name_of(choice) is not None:
        found["tool_choice"] = {"type": "function", "function": {"name": _name_of(choice)}}


def _name_of(tool: Any) -> Any:
    """What a tool or a choice names, nested or not; None of what is no object."""
    inner = tool.get("function") if isinstance(tool, Mapping) else None
    outer = inner if isinstance(inner, Mapping) else tool
    return outer.get("name") if isinstance(outer, Mapping) else None


def spelled_format(form: Mapping[str, Any]) -> dict[str, Any]:
    """`response_format`, also with the schema beside the type as llama.cpp's server and others take it."""
    kind, schema = form.get("type"), form.get("schema", form.get("value"))
    inner = form.get("json_schema")
    if kind in ("json", "json_object", "json_schema") and schema is not None and inner is None:
        kept = {name: form[name] for name in ("name", "strict", "description") if form.get(name) is not None}
        return {"type": "json_schema", "json_schema": {**kept, "schema": schema}}
    if kind == "json_schema" and isinstance(inner, Mapping) and "schema" not in inner:
        if "type" in inner or "properties" in inner or "$ref" in inner:
            return {"type": "json_schema", "json_schema": {"schema": inner}}
        return {"type": "json_object"}
    if kind == "json_schema" and isinstance(inner, Mapping) and not isinstance(inner.get("strict"), bool):
        return {"type": kind, "json_schema": {key: value for key, value in inner.items() if key != "strict"}}
    if kind == "json":
        return {"type": "json_object"}
    return dict(form)


_ITEM_KEPT = {
    "message": ("type", "role", "content", "id", "status"),
    "function_call": ("type", "call_id", "name", "arguments", "id", "status"),
    "function_call_output": ("type", "call_id", "output", "id", "status"),
    "reasoning": ("type", "summary", "content", "encrypted_content", "id", "status"),
    "item_reference": ("type", "id"),
}
_LIKE_CALLS = {"custom_tool_call": "input", "local_shell_call": "action", "mcp_call": "arguments"}
_LEFT_OUT = (
    "compaction", "compaction_summary", "context_compaction", "item_list", "ghost_snapshot", "other",
    "mcp_list_tools", "mcp_approval_request", "mcp_approval_response", "tool_search_output",
)  # fmt: skip
"""Types of items that belong to tools and services of others."""
_TEXT_ITEMS = ("input_text", "output_text", "text")
_STATUS = ("in_progress", "completed", "incomplete")


def flat_tool(tool: Any) -> Any:
    """A function without its inner object, as `/v1/responses` has it."""
    inner = tool.get("function") if isinstance(tool, Mapping) else None
    return {"type": "function", **inner} if isinstance(inner, Mapping) else tool


def flat_format(form: Mapping[str, Any]) -> dict[str, Any]:
    """`response_format` as `text.format` of `/v1/responses`."""
    inner = form.get("json_schema")
    return {"name": "answer", **inner, "type": "json_schema"} if isinstance(inner, Mapping) else dict(form)


def labels(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata within OpenAI's bounds: it comes back with the response and does nothing else."""
    few = list(metadata.items())[:16]
    said = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in few)
    return {key[:64]: value[:512] for key, value in said}


def spelled_items(items: Sequence[Any], ignored: set[str]) -> list[Any]:
    """Items of `/v1/responses` in its own words; items of tools that are not served are left out."""
    spelled: list[Any] = []
    for item in items:
        found = _item(item, ignored) if isinstance(item, Mapping) else item
        if found is not None:
            spelled.append(found)
    return spelled


def _item(item: Mapping[str, Any], ignored: set[str]) -> dict[str, Any] | None:
    found = dict(item)
    kind = found.get("type") or ("message" if "role" in found else "item_reference")
    found["type"] = kind
    if not isinstance(kind, str):
        return found  # it is wrong: the check of the body says so
    if kind in _LIKE_CALLS:
        given = found.get(_LIKE_CALLS[kind])
        text = given if isinstance(given, str) and kind == "mcp_call" else json.dumps({"input": given})
        name = found.get("name") or kind.removesuffix("_call")
        found = {"type": "function_call", "call_id": found.get("call_id") or found.get("id"), "name": name}
        return {**found, "arguments": text}
    if kind.endswith("_call_output"):
        found["type"] = kind = "function_call_output"
    if kind not in _ITEM_KEPT:
        if kind in _TEXT_ITEMS and isinstance(found.get("text"), str):
            role = "assistant" if kind == "output_text" else "user"
            return {"type": "message", "role": role, "content": found["text"]}
        if kind.endswith("_call") or kind in _LEFT_OUT:
            ignored.add(f"input.{kind}")
            return None
        return found
    _item_contents(found)
    for name in [name for name in found if name not in _ITEM_KEPT[kind]]:
        if found.pop(name) not in (None, "", [], {}):
            ignored.add(f"input.{name}")
    if found.get("status") not in _STATUS:
        found.pop("status", None)
    if not isinstance(found.get("id"), str) and kind != "item_reference":
        found.pop("id", None)
    return found


def _item_contents(found: dict[str, Any]) -> None:
    kind = found["type"]
    if kind == "message":
        found["content"] = _input_parts(found.get("content"))
    elif kind == "function_call_output":
        output = _input_parts(found.get("output"))
        found["output"] = output if isinstance(output, str | list) else json.dumps(output, ensure_ascii=False)
    elif kind == "function_call":
        if not isinstance(found.get("arguments"), str):
            found["arguments"] = json.dumps(found.get("arguments") or {}, ensure_ascii=False)
        if not isinstance(found.get("call_id"), str):
            found["call_id"] = str(found.get("id") or "call_0")


def _input_parts(content: Any) -> Any:
    thoughts: list[str] = []
    parts = _content(content, thoughts)
    if not isinstance(parts, list):
        return parts
    return [
        {**part, "type": "input_text"} if isinstance(part, Mapping) and part.get("type") == "text" else part
        for part in parts
    ]
