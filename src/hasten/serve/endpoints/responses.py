"""`/v1/responses`: create, retrieve, delete."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.serve.generate import Question, asker_of, respond
from hasten.serve.logprobs import TokenTexts
from hasten.serve.prepare import prepare_chat
from hasten.serve.problem import Problem
from hasten.serve.protocol.chat import ChatRequest
from hasten.serve.protocol.response import ResponseRequest
from hasten.serve.response_shape import ResponseShape
from hasten.serve.shape import dumps
from hasten.serve.stored import StoredResponse
from hasten.serve.tally import Tally

if TYPE_CHECKING:
    from hasten.engine.request import Request
    from hasten.serve.exchange import Exchange
    from hasten.serve.tools import ToolPlan

Messages = list[dict[str, Any]]


async def create(exchange: Exchange) -> None:
    """Answer; what is stored can be continued by `previous_response_id`."""
    spec = await exchange.body(ResponseRequest)
    service, owner = exchange.service, exchange.call.client
    earlier: Sequence[Mapping[str, Any]] = ()
    if spec.previous_response_id is not None:
        earlier = service.stored.get(spec.previous_response_id, owner, "previous_response_id").messages
    async with service.pool.use(spec.model) as served:
        asker = asker_of(exchange)

        def prepare() -> tuple[_Turn, Request, ToolPlan | None]:
            told = [*map(dict, earlier), *messages_of(spec.input)]
            request, tools = prepare_chat(as_chat(spec, told), served, asker, service.options)
            fields = fields_of(spec, served.name)
            return _Turn(owner, told, fields, len(dumps(told)) + len(dumps(fields))), request, tools

        turn, request, tools = await exchange.work(prepare)
        shape = ResponseShape(
            turn.fields,
            TokenTexts(lambda: served.token_bytes),
            Tally(service.metrics, served.name, exchange.call),
            tools.reader() if tools else None,
        )

        def keep() -> None:
            if spec.store is not False:
                service.stored.add(shape.id, turn.stored(shape))

        await respond(exchange, Question(served, spec, [request], bool(spec.stream)), shape, keep)


@dataclass(frozen=True)
class _Turn:
    """What is known of a response before it is answered."""

    owner: str
    told: Messages  # the conversation up to the answer
    fields: Mapping[str, Any]
    size: int  # of both as JSON, bytes roughly

    def stored(self, shape: ResponseShape) -> StoredResponse:
        """The response with its answer."""
        messages = [*self.told, *messages_of(shape.output)]
        return StoredResponse(
            self.owner, shape.document(), messages, self.size + 2 * len(dumps(shape.output))
        )


async def retrieve(exchange: Exchange) -> None:
    """A stored response."""
    name = exchange.scope["path_params"]["response_id"]
    await exchange.json(exchange.service.stored.get(name, exchange.call.client).document)


async def delete(exchange: Exchange) -> None:
    """Forget a stored response."""
    name = exchange.scope["path_params"]["response_id"]
    exchange.service.stored.remove(name, exchange.call.client)
    await exchange.json({"id": name, "object": "response", "deleted": True})


def messages_of(given: str | Sequence[Mapping[str, Any]]) -> Messages:
    """Items as chat messages; calls join the assistant's message before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: Messages = []
    for item in given:
        kind = item.get("type", "message")
        if kind == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item["call_id"], "type": "function", "function": call})
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
            )
        else:
            messages.append({"role": item["role"], "content": _text(item["content"])})
    return messages


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def as_chat(spec: ResponseRequest, told: Messages) -> ChatRequest:
    """The same question as a chat request.

    Raises:
        Problem: fields contradict each other.
    """
    wanted = "message.output_text.logprobs" in (spec.include or ())
    if spec.top_logprobs is not None and not wanted:
        said = 'top_logprobs needs include: ["message.output_text.logprobs"]'
        raise Problem(400, said, param="top_logprobs", code="invalid_value")
    if spec.instructions:
        told = [{"role": "system", "content": spec.instructions}, *told]
    values: dict[str, Any] = {
        name: getattr(spec, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "seed",
            "user",
            "priority",
        )
    }
    for name in ("deadline_ms", "cache_salt", "chat_template_kwargs", "parallel_tool_calls"):
        values[name] = getattr(spec, name)
    choice: Any = spec.tool_choice
    if isinstance(choice, Mapping):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    form: Any = (spec.text or {}).get("format")
    if form is not None and form["type"] == "json_schema":
        form = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
    tools = [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in spec.tools or ()
    ]
    # checked already, field by field, so that errors carry the names of this endpoint
    return ChatRequest.model_construct(
        **values,
        messages=told,
        max_tokens=spec.max_output_tokens,
        logprobs=wanted,
        top_logprobs=spec.top_logprobs,
        response_format=form,
        tools=tools or None,
        tool_choice=choice,
    )


def fields_of(spec: ResponseRequest, model: str) -> dict[str, Any]:
    """The request's own values, as the response repeats them."""
    return {
        "created_at": int(time.time()),
        "model": model,
        "instructions": spec.instructions,
        "max_output_tokens": spec.max_output_tokens,
        "metadata": spec.metadata or {},
        "parallel_tool_calls": spec.parallel_tool_calls is not False,
        "previous_response_id": spec.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "store": spec.store is not False,
        "temperature": 1.0 if spec.temperature is None else spec.temperature,
        "text": spec.text or {"format": {"type": "text"}},
        "tool_choice": spec.tool_choice or "auto",
        "tools": spec.tools or [],
        "top_logprobs": spec.top_logprobs or 0,
        "top_p": 1.0 if spec.top_p is None else spec.top_p,
        "truncation": "disabled",
        "background": False,
        "service_tier": "default",
        "user": spec.user,
    }
