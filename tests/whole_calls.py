"""Tool calls of a whole answer, as a client would put its stream together."""

from __future__ import annotations

from collections.abc import Collection

from hasten.models.answers import CallStarted, TextDelta, ToolCallStream
from hasten.models.tool_calls import ToolCall, ToolStyle


def parse_tool_calls(text: str, style: ToolStyle, names: Collection[str] = ()) -> tuple[str, list[ToolCall]]:
    """Content and calls of a whole answer: what the stream gives, put together."""
    stream = ToolCallStream(style, names)
    content, names, arguments = "", [], []
    for event in [*stream.push(text), *stream.flush()]:
        if isinstance(event, TextDelta):
            content += event.text
        elif isinstance(event, CallStarted):
            names.append(event.name)
        else:
            arguments.append(event.text)
    return content, [ToolCall(*pair) for pair in zip(names, arguments, strict=True)]
