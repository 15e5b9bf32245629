"""`/v1/responses`: create, retrieve, delete; the body, and the answer in one piece or as typed events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from hasten.models.tool_calls import ArgumentsDelta, CallStarted, TextDelta, ToolEvent
from hasten.serve.body import DrawingFields, JsonObject, Text
from hasten.serve.call import refused
from hasten.serve.chat import (
    ChatRequest,
    Function,
    FunctionName,
    JsonSchema,
    NamedFunction,
    PlainFormat,
    prepare_chat,
)
from hasten.serve.generate import asker_of, respond
from hasten.serve.kept import StoredResponse
from hasten.serve.metrics import Tally
from hasten.serve.shape import Answer, News, TokenTexts, dumped, dumps, joined

if TYPE_CHECKING:
    from hasten.engine.request import Output, Request
    from hasten.models.tool_calls import ToolCallStream
    from hasten.serve.call import Problem
    from hasten.serve.prepare import ToolPlan
    from hasten.serve.service import Exchange

Label = Annotated[str, Field(max_length=512)]


class InputText(TypedDict):
    """Text in a message; an answer that comes back as input has its own word for it."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: NotRequired[Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None]
    logprobs: NotRequired[list[Any] | None]


Content = Text | Annotated[list[InputText], Field(min_length=1, max_length=10_000, fail_fast=True)]


class Item(TypedDict):
    """What every item of a conversation may have: answers come back as input."""

    id: NotRequired[Text | None]
    status: NotRequired[Literal["in_progress", "completed", "incomplete"] | None]


class InputMessage(Item):
    """A message of the conversation."""

    type: NotRequired[Literal["message"]]
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCall(Item):
    """A call the model made."""

    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Text


class FunctionCallOutput(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content


def _kind(item: Any) -> str:
    return str(item.get("type", "message")) if isinstance(item, dict) else ""


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="should be an object of type message, function_call or function_call_output",
    ),
]


class OfFunction(TypedDict):
    """Comes first, so that a wrong type is named before what it lacks."""

    type: Literal["function"]


class FunctionTool(OfFunction, Function):
    """A function the model may call."""


class FunctionChoice(OfFunction, NamedFunction):
    """This function and no other."""


class JsonSchemaText(JsonSchema):
    """JSON that follows a schema; answers always follow it, whatever `strict` says."""

    type: Literal["json_schema"]


class TextOptions(TypedDict, total=False):
    """The form of the text."""

    format: Annotated[PlainFormat | JsonSchemaText, Field(discriminator="type")] | None


class ResponseRequest(DrawingFields):
    """The body of `/v1/responses`."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=10_000, fail_fast=True)]
    instructions: Text | None = None
    previous_response_id: str | None = Field(None, max_length=100)
    store: bool | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Label] | None = Field(None, max_length=16)
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16, fail_fast=True)] | None
    ) = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Label | None = None
    chat_template_kwargs: JsonObject | None = None


class ResponseShape(Answer):
    """One response.

    Args:
        fields: what the document says beside status, output and usage: the request's own values.
        reader: finds tool calls; None: there are no tools.
    """

    def __init__(
        self, fields: Mapping[str, Any], texts: TokenTexts, tally: Tally, reader: ToolCallStream | None
    ) -> None:
        super().__init__(texts, tally)
        self.id = f"resp_{secrets.token_hex(16)}"
        self.output: list[dict[str, Any]] = []
        self._fields = fields
        self._reader = reader
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._sequence = 0
        self._pieces: list[str] = []  # of the open item: text or arguments
        self._logprobs: list[str] = []  # of tokens whose text is held back or comes with the next; JSON
        self._said: list[str] = []  # of the open item

    def take(self, news: Sequence[News]) -> None:
        """Note outputs; the events they would be are made and dropped, which costs little."""
        self.chunks(news)

    def chunks(self, news: Sequence[News]) -> bytes:
        events: list[str] = []
        if self._sequence == 0:
            events.append(self._event("response.created", response=self.document()))
            events.append(self._event("response.in_progress", response=self.document()))
        for which, output in news:
            self.tally.take(which, output)
            self._logprobs += [self.texts.chat(one) for one in output.logprobs]
            for one in self._read(output):
                events += self._follow(one)
            if output.finish_reason is not None:
                if not self.output or (self._logprobs and self._is_open("message")):
                    events += self._add_text("")
                self._status = "completed" if output.finish_reason == "stop" else "incomplete"
                events += self._close(self._status)
        return "".join(events).encode("utf-8", "replace")

    def last(self) -> bytes:
        return self._event(f"response.{self._status}", response=self.document()).encode("utf-8", "replace")

    def failed(self, problem: Problem) -> bytes:
        self._status = "failed"
        self._error = {"code": "server_error", "message": problem.message}
        return self._event("response.failed", response=self.document()).encode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        usage = {**self.tally.usage("input", "output"), "output_tokens_details": {"reasoning_tokens": 0}}
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "status": self._status,
            "error": self._error,
            "incomplete_details": cut,
            **self._fields,
            "output": [dict(item) for item in self.output],
            "usage": None if self._status == "in_progress" else usage,
        }

    def _read(self, output: Output) -> list[ToolEvent]:
        if self._reader is None:
            return [TextDelta(output.text)] if output.text or output.logprobs else []
        news = self._reader.push(output.text)
        return [*news, *self._reader.flush()] if output.finish_reason is not None else news

    def _follow(self, one: ToolEvent) -> list[str]:
        if isinstance(one, TextDelta):
            return self._add_text(one.text)
        self._logprobs = []  # a call has none
        if isinstance(one, CallStarted):
            return [*self._close("completed"), self._open_call(one)]
        return [self._add_arguments(one)]

    def _add_text(self, text: str) -> list[str]:
        events = []
        if not self._is_open("message"):
            events = self._close("completed")
            item = {"id": f"msg_{secrets.token_hex(16)}", "type": "message", "status": "in_progress"}
            self.output.append({**item, "role": "assistant", "content": []})
            events.append(self._item_event("response.output_item.added", item=self.output[-1]))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append(self._part_event("response.content_part.added", part=part))
            self.output[-1]["content"] = [part]
        self._pieces.append(text)
        entries, self._logprobs = self._logprobs, []
        self._said += entries
        kind = "response.output_text.delta"
        head = f'"item_id":"{self.output[-1]["id"]}","output_index":{len(self.output) - 1},"content_index":0'
        body = f'"type":"{kind}","sequence_number":{self._sequence},{head}'
        self._sequence += 1
        delta = f'{{{body},"delta":{encode_basestring(text)},"logprobs":[{",".join(entries)}]}}'
        return [*events, f"event: {kind}\ndata: {delta}\n\n"]

    def _open_call(self, call: CallStarted) -> str:
        item = {"id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "status": "in_progress"}
        self.output.append({**item, "call_id": call.id, "name": call.name, "arguments": ""})
        return self._item_event("response.output_item.added", item=self.output[-1])

    def _add_arguments(self, delta: ArgumentsDelta) -> str:
        self._pieces.append(delta.text)
        return self._item_event(
            "response.function_call_arguments.delta", item_id=self.output[-1]["id"], delta=delta.text
        )

    def _is_open(self, kind: str) -> bool:
        return (
            bool(self.output)
            and self.output[-1]["type"] == kind
            and self.output[-1]["status"] == "in_progress"
        )

    def _close(self, status: str) -> list[str]:
        """End the item that is open, if one is."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return []
        item, text = self.output[-1], "".join(self._pieces)
        self._pieces = []
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            kind = "response.function_call_arguments.done"
            events = [self._item_event(kind, item_id=item["id"], name=item["name"], arguments=text)]
        else:
            part = item["content"][0]
            part["text"], part["logprobs"], self._said = text, joined(self._said), []
            kind = "response.output_text.done"
            events = [self._part_event(kind, text=text, logprobs=part["logprobs"])]
            events.append(self._part_event("response.content_part.done", part=part))
        return [*events, self._item_event("response.output_item.done", item=item)]

    def _part_event(self, kind: str, **fields: Any) -> str:
        return self._item_event(kind, item_id=self.output[-1]["id"], content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> str:
        return self._event(kind, output_index=len(self.output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        document = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {kind}\ndata: {dumps(document)}\n\n"


Messages = list[dict[str, Any]]


async def create(exchange: Exchange) -> None:
    """Answer; what is stored can be continued by `previous_response_id`."""
    spec = await exchange.body(ResponseRequest)
    service, owner = exchange.service, exchange.call.client
    earlier: Sequence[Mapping[str, Any]] = ()
    if spec.previous_response_id is not None:
        earlier = service.stored.get(spec.previous_response_id, owner, "previous_response_id").messages
    async with service.pool.use(spec.model) as served:
        fields = fields_of(spec, served.name)

        def prepare() -> tuple[Request, ToolPlan | None, Messages, int]:
            told = [*map(dict, earlier), *messages_of(spec.input)]
            request, tools = prepare_chat(as_chat(spec, told), asker_of(exchange, served))
            return request, tools, told, len(dumped(told)) + len(dumped(fields)) if fields["store"] else 0

        request, tools, told, size = await exchange.work(prepare)
        tally = exchange.tally(served.name)
        shape = ResponseShape(fields, served.texts, tally, tools.reader() if tools else None)

        def keep() -> None:
            if fields["store"]:
                messages = [*told, *messages_of(shape.output)]
                bytes_ = size + 2 * len(dumped(shape.output))
                service.stored.add(shape.id, StoredResponse(owner, shape.document(), messages, bytes_))

        await respond(exchange, served, spec, [request], shape, keep)


async def retrieve(exchange: Exchange) -> None:
    name = exchange.scope["path_params"]["response_id"]
    await exchange.json(exchange.service.stored.get(name, exchange.call.client).document)


async def delete(exchange: Exchange) -> None:
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
        raise refused('top_logprobs needs include: ["message.output_text.logprobs"]', "top_logprobs")
    if spec.instructions:
        told = [{"role": "system", "content": spec.instructions}, *told]
    same = [*DrawingFields.model_fields, "chat_template_kwargs", "parallel_tool_calls", "top_logprobs"]
    choice: Any = spec.tool_choice
    if isinstance(choice, Mapping):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    form: Any = (spec.text or {}).get("format")
    if form is not None and form["type"] == "json_schema":
        form = {"type": "json_schema", "json_schema": _without_type(form)}
    # checked already, field by field, so that errors carry the names of this endpoint
    return ChatRequest.model_construct(
        **{name: getattr(spec, name) for name in same},
        messages=told,
        max_tokens=spec.max_output_tokens,
        logprobs=wanted,
        response_format=form,
        tools=[{"type": "function", "function": _without_type(tool)} for tool in spec.tools or ()] or None,
        tool_choice=choice,
    )


def _without_type(thing: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in thing.items() if key != "type"}


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
