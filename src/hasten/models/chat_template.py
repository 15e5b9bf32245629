"""Chat templates: the Jinja source a model carries, run in a sandbox (templates are code from strangers).

The environment offers what `transformers` documents for templates, so the same template gives the same text:
https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from hasten.errors import TokenizerError, UsageError
from hasten.models.tool_calls import is_described, template_of

if TYPE_CHECKING:
    import jinja2

    from hasten.models.template_limits import LimitedEnvironment

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]

RAW_HINT = "use --raw to send text without a template"
# What code inside a template can raise besides jinja2's own errors.
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


def render(
    templates: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Messages as the text the model was trained on.

    Args:
        templates: Jinja source by name; `default` is used, or `tool_use` where tools are given and it exists.
        messages: each with `role` and `content`, and what else the template reads.
        special_tokens: `bos_token`, `eos_token` ... as the template may name them.
        tools: function descriptions for templates that read them.
        variables: further names the template reads (`enable_thinking`).

    Raises:
        UsageError: the messages are not a non-empty list of mappings of plain values.
        TokenizerError: there is no template, or it is not valid, refuses the messages, or does not end within
            the bounds of `template_limits`.
    """
    import jinja2

    check(messages)
    from hasten.models.template_limits import limited

    template = _compile(_choose(templates, tools is not None))
    names = {
        "messages": _plain(messages),
        "tools": None if tools is None else _plain(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **(special_tokens or {}),
        **_plain(variables or {}),
    }
    try:
        text: str = limited(lambda: template.render(names))
    except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
        reason = str(error) or type(error).__name__
        raise TokenizerError(
            f"the model's chat template does not take these messages: {reason}",
            hint=f"check the roles and their order (many templates take no system message), or {RAW_HINT}",
        ) from error
    return text


def in_any_form(write: Callable[[Messages], str], messages: Sequence[Mapping[str, Any]]) -> str:
    """What `write` makes of the first form of the messages that the template takes.

    Templates differ in what they refuse: arguments of calls as a mapping or as text, a second system message
    or one in the middle, two messages of one role. If a template refuses a conversation, it gets another form
    that means the same: system messages joined at the start, turns of one role joined.

    Args:
        write: `render` with all its other arguments.
        messages: a list that `check` let pass.

    Raises:
        UsageError, TokenizerError: as `render`, for the form that was given.
    """
    first: TokenizerError | None = None
    for form in _forms(messages):
        try:
            text = write(form)
        except TokenizerError as error:
            first = first or error
            continue
        if not _is_python(text, form):
            return text
        first = first or TokenizerError("the template writes the arguments of calls as Python does")
    assert first is not None
    raise first


def _forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[Messages]:
    """The same conversation in other forms, the given one first; the others are made when they are needed."""
    given = [dict(message) for message in messages]
    yield given
    joined = _one_system(given)
    turns = _alternating(joined)
    seen = [given]
    for form in (_with_texts(given), joined, _with_texts(joined), turns, _alternating(_no_system(joined))):
        if form not in seen:
            seen.append(form)
            yield form


def _with_texts(chat: Sequence[dict[str, Any]]) -> Messages:
    """Arguments of calls as JSON text."""

    def texted(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        {**message, "tool_calls": [texted(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in chat
    ]


_LOOKED_FOR = 8  # arguments of calls at either end of a conversation: a template writes all of them alike


def _is_python(text: str, chat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a template that joins texts wrote a mapping as Python shows it, which is no JSON."""
    calls = [call for message in chat for call in message.get("tool_calls") or ()]
    few = calls if len(calls) <= 2 * _LOOKED_FOR else [*calls[:_LOOKED_FOR], *calls[-_LOOKED_FOR:]]
    for arguments in (call["function"]["arguments"] for call in few):
        shown = str(dict(arguments)) if isinstance(arguments, Mapping) and arguments else ""
        if shown and shown in text and shown != json.dumps(arguments, ensure_ascii=False):
            return True
    return False


def _one_system(chat: Sequence[dict[str, Any]]) -> Messages:
    """All system messages as one at the start."""
    told = [message for message in chat if message.get("role") == "system"]
    if not told or told == list(chat[:1]):
        return list(chat)
    rest = [message for message in chat if message.get("role") != "system"]
    return [{**told[0], "content": _together(told)}, *rest]


def _alternating(chat: Sequence[dict[str, Any]]) -> Messages:
    """Neighbours of one role as one message."""
    runs: list[list[dict[str, Any]]] = []
    for message in chat:
        last = runs[-1][-1] if runs else {}
        plain = not (message.get("tool_calls") or last.get("tool_calls"))
        if plain and last.get("role") == message.get("role") != "tool":
            runs[-1].append(message)
        else:
            runs.append([message])
    return [run[0] if len(run) == 1 else {**run[0], "content": _together(run)} for run in runs]


def _together(messages: Sequence[Mapping[str, Any]]) -> str:
    texts = (message.get("content") for message in messages)
    return "\n\n".join(text for text in texts if isinstance(text, str) and text)


def _no_system(chat: Sequence[dict[str, Any]]) -> Messages:
    """The system message as words of the user, for templates that know no such role."""
    return [{**message, "role": "user"} if message.get("role") == "system" else message for message in chat]


def check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise UsageError unless the messages are a non-empty list of mappings."""
    if (
        isinstance(messages, (str, bytes))
        or not messages
        or not all(isinstance(m, Mapping) for m in messages)
    ):
        raise UsageError(
            "a chat needs at least one message, each a mapping with role and content",
            hint='for example [{"role": "user", "content": "Hello"}]',
        )


def _choose(templates: Mapping[str, str], with_tools: bool) -> str:
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        names = ", ".join(sorted(templates))
        raise TokenizerError(f"the model has no default chat template, only {names}", hint=RAW_HINT)
    raise TokenizerError("the model has no chat template", hint=RAW_HINT)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().bounded(source)
    except (jinja2.TemplateError, SyntaxError, MemoryError, *_TEMPLATE_FAULTS) as error:
        # SyntaxError: Python compiles what Jinja made, and allows 20 blocks inside each other
        said = getattr(error, "msg", None) or str(error) or type(error).__name__
        raise TokenizerError(
            f"the model's chat template is no valid Jinja: {said}",
            hint=f"repair the template, or {RAW_HINT}",
        ) from error


@functools.cache
def _environment() -> LimitedEnvironment:
    import jinja2.ext

    from hasten.models.template_limits import LimitedEnvironment, guarded

    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = guarded("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _generation_tag() -> type[jinja2.ext.Extension]:
    """`{% generation %}` marks what the assistant wrote, for training; here it only lets its body through."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; models were trained on plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _plain(value: Any) -> Any:
    """The same data in plain types, so that a template holds no object with methods that do things."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise UsageError(
        f"a chat message holds a value of type {type(value).__name__}",
        hint="use text, numbers, lists and mappings",
    )


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
    chat = [_plain_message(message) for message in messages]
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


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(message)
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if "content" in plain or plain.get("tool_calls") or plain.get("role") == "assistant":
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
