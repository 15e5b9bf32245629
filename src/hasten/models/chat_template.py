"""Chat templates: the Jinja source a model carries, run in a sandbox (templates are code from strangers).

The environment offers what `transformers` documents for templates, so the same template gives the same text:
https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from hasten.errors import TokenizerError, UsageError

if TYPE_CHECKING:
    import jinja2

    from hasten.models.template_limits import LimitedEnvironment

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

    template, literal = _compile(_choose(templates, tools is not None))
    try:
        with limited(literal):
            text: str = template.render(
                messages=_plain(messages),
                tools=None if tools is None else _plain(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**(special_tokens or {}), **_plain(variables or {})},
            )
    except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
        reason = str(error) or type(error).__name__
        raise TokenizerError(
            f"the model's chat template does not take these messages: {reason}",
            hint=f"check the roles and their order (many templates take no system message), or {RAW_HINT}",
        ) from error
    return text


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
def _compile(source: str) -> tuple[jinja2.Template, int]:
    """The template, and the characters of plain text in it."""
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
