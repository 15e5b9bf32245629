"""Tool calls of one request: what the model is told, what it must write, and what reads its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.serve.problem import Problem

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar
    from hasten.models.tool_calls import ToolCallStream, ToolStyle
    from hasten.serve.pool import Served

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolPlan:
    """How a request's tools are served."""

    style: ToolStyle
    grammar: Grammar | None  # None: the model decides freely
    names: tuple[str, ...] = ()  # of the functions offered: a call without its marks counts if it names one

    def reader(self) -> ToolCallStream:
        """Reads one answer."""
        from hasten.models.tool_calls import ToolCallStream

        return ToolCallStream(self.style, self.names)


def offered(tools: Tools | None, choice: str | Mapping[str, Any] | None) -> Tools | None:
    """The tools the model is told of: none where it must not call any.

    Raises:
        Problem: a choice without tools, or of a tool that is not there.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise Problem(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
        return None
    if isinstance(choice, Mapping):
        names = [tool["function"]["name"] for tool in tools]
        wanted = choice["function"]["name"]
        if wanted not in names:
            said = f"tool_choice names {wanted!r}; the tools are {', '.join(names)}"
            raise Problem(400, said[:500], param="tool_choice", code="invalid_value")
    return None if choice == "none" else tools


def plan_of(served: Served, tools: Tools, choice: str | Mapping[str, Any] | None, parallel: bool) -> ToolPlan:
    """The plan for tools that are offered. In a worker thread."""
    from hasten.engine.tool_grammar import tool_grammar

    model = served.model
    style = model.tokenizer.tool_style(model.config.architecture)
    grammar = tool_grammar(tools, choice or "auto", parallel, style)  # type: ignore[arg-type]
    return ToolPlan(style, grammar, tuple(tool["function"]["name"] for tool in tools))
