"""`/v1/responses`: create, retrieve, delete; the body, and the answer in one piece or as typed events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from hasten.models.answers import ArgumentsDelta, CallStarted, TextDelta, ThoughtDelta, ToolEvent
from hasten.serve.body import DrawingFields, JsonObject, Text
from hasten.serve.call import refused
from hasten.serve.chat import (
    ChatRequest,
    Function,
    JsonSchema,
    NamedFunction,
    PlainFormat,
    SaidName,
    counted,
    prepare_chat,
)
from hasten.serve.generate import STOPPED, asker_of, make, respond
from hasten.serve.kept import StoredResponse
from hasten.serve.metrics import Tally
from hasten.serve.shape import Answer, News, TokenTexts, dumped, dumps, event, joined
from hasten.serve.spelling import flat_format, flat_tool, labels, spelled_chat, spelled_items

if TYPE_CHECKING:
    from hasten.engine.request import Output, Request
    from hasten.serve.call import Problem
    from hasten.serve.kept import ResponseStore
    from hasten.serve.prepare import Reading
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
    name: SaidName
    arguments: Text


class FunctionCallOutput(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content


class ReasoningItem(Item):
    """What the model thought before."""

    type: Literal["reasoning"]
    summary: NotRequired[list[Any] | None]
    content: NotRequired[list[Any] | None]
    encrypted_content: NotRequired[Text | None]


class ItemReference(TypedDict):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: Text


def _kind(item: Any) -> str:
    return str(item.get("type", "message")) if isinstance(item, dict) else ""


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="should be an object of type message, function_call, function_call_output, "
        "reasoning or item_reference",
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
    """JSON that follows a schema; answers follow it whatever `strict` says, as far as a grammar can."""

    type: Literal["json_schema"]


class TextOptions(TypedDict, total=False):
    """The form of the text."""

    format: Annotated[PlainFormat | JsonSchemaText, Field(discriminator="type")] | None
    verbosity: Literal["low", "medium", "high"] | None


Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponseRequest(DrawingFields):
    """The body of `/v1/responses`."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=10_000, fail_fast=True)]
    instructions: Text | None = None
    previous_response_id: str | None = Field(None, max_length=100)
    store: bool | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Label] | None = Field(None, max_length=16)
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: Annotated[list[Included], Field(max_length=16, fail_fast=True)] | None = None
    text: TextOptions | None = None
    reasoning: JsonObject | None = Field(None, description="effort; summary and others are taken")
    tools: Annotated[list[FunctionTool], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled", "auto"] | None = None
    background: bool | None = Field(None, description="answer at once, and make the response meanwhile")
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Label | None = None
    chat_template_kwargs: JsonObject | None = None

    @classmethod
    def understood(cls, document: dict[str, Any], ignored: set[str]) -> dict[str, Any]:
        """A request in OpenAI's words of today."""
        found = spelled_chat({**document, "messages": None}, ignored)
        if isinstance(document.get("input"), list):
            found["input"] = spelled_items(document["input"], ignored)
        if isinstance(found.get("tools"), list):
            found["tools"] = [flat_tool(tool) for tool in found["tools"]]
        choice = found.get("tool_choice")
        if isinstance(choice, Mapping):
            found["tool_choice"] = flat_tool(choice)
        if isinstance(found.get("include"), list):
            served = get_args(Included)
            ignored.update(f"include.{one}" for one in found["include"] if one not in served)
            found["include"] = [one for one in found["include"] if one in served]
        if document.get("store") is True:
            found["store"] = True
            ignored.discard("store")
        form = found["text"].get("format") if isinstance(found.get("text"), Mapping) else None
        if isinstance(form, Mapping) and form.get("type") == "json_schema" and form.get("strict") is None:
            found["text"] = {**found["text"], "format": {k: v for k, v in form.items() if k != "strict"}}
        wanted = found.pop("response_format", None)
        if wanted is not None and form is None and found.get("text") is None:
            found["text"] = {"format": flat_format(wanted)}
        if isinstance(found.get("metadata"), Mapping):
            found["metadata"] = labels(found["metadata"])
        return super().understood(found, ignored)


class ResponseShape(Answer):
    """One response.

    Args:
        fields: what the document says beside status, output and usage: the request's own values.
        reading: how the answer is read.
        streamed: it goes out as it comes.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        texts: TokenTexts,
        tally: Tally,
        reading: Reading,
        streamed: bool = False,
    ) -> None:
        super().__init__(texts, tally, bool(reading.form.checked))
        self.id = f"resp_{secrets.token_hex(16)}"
        self.output: list[dict[str, Any]] = []
        self._fields = fields
        self._reading = reading
        self._reader = None if reading.is_plain else reading.reader(streamed)
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._sequence = 0
        self._thought_tokens = 0  # of answers so far: those whose step gave nothing but a thought
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
                said = any(item["type"] != "reasoning" for item in self.output)
                if not said or (self._logprobs and self._is_open("message")):
                    events += self._add_text("")
                self._status = "completed" if output.finish_reason == "stop" else "incomplete"
                if self._is_open("message"):
                    self._reading.form.violations("".join(self._pieces), output.finish_reason)
                events += self._close(self._status)
        return "".join(events).encode("utf-8", "replace")

    def last(self) -> bytes:
        return self._event(f"response.{self._status}", response=self.document()).encode("utf-8", "replace")

    def failed(self, problem: Problem) -> bytes:
        self._status = "cancelled" if problem.code == STOPPED else "failed"
        self._error = (
            None if problem.code == STOPPED else {"code": "server_error", "message": problem.message}
        )
        if problem.code == STOPPED:
            self._close("incomplete")
        return self._event("response.failed", response=self.document()).encode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        details = {"reasoning_tokens": self._thought_tokens}
        usage = {**self.tally.usage("input", "output"), "output_tokens_details": details}
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
        news = self._reader.read(output.text, output.finish_reason)
        if news and all(isinstance(one, ThoughtDelta) for one in news):
            self._thought_tokens += len(output.token_ids)
        return news

    def _follow(self, one: ToolEvent) -> list[str]:
        if isinstance(one, TextDelta):
            return self._add_text(one.text)
        self._logprobs = []  # calls and thoughts have none
        if isinstance(one, ThoughtDelta):
            return self._add_thought(one.text) if self._reading.thoughts else []
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
        return [*events, event(delta, kind)]

    def _add_thought(self, text: str) -> list[str]:
        events = []
        if not self._is_open("reasoning"):
            events = self._close("completed")
            item = {"id": f"rs_{secrets.token_hex(16)}", "type": "reasoning", "status": "in_progress"}
            self.output.append({**item, "summary": [], "content": []})
            events.append(self._item_event("response.output_item.added", item=self.output[-1]))
        self._pieces.append(text)
        kind = "response.reasoning_text.delta"
        return [*events, self._part_event(kind, delta=text)]

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
        elif item["type"] == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": text}]
            events = [self._part_event("response.reasoning_text.done", text=text)]
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
        return event(dumps(document), kind)


Messages = list[dict[str, Any]]


async def create(exchange: Exchange) -> None:
    """Answer; what is stored can be continued by `previous_response_id`."""
    spec = await exchange.body(ResponseRequest)
    if spec.background and (spec.stream or spec.store is False):
        said = "background can only be used when `store` is true and `stream` is not"
        raise refused(said, "background", None)
    service, owner = exchange.service, exchange.call.client
    earlier, given = _given(exchange, spec)
    async with service.pool.use(spec.model) as served:

        def prepare() -> tuple[Request, Reading, Messages, dict[str, Any], int]:
            asked, told = _as_told(spec, earlier, given)
            request, reading = prepare_chat(asked, asker_of(exchange, served))
            fields = fields_of(spec, served.name, request)
            size = len(dumped(told)) + len(dumped(fields)) if fields["store"] else 0
            return request, reading, told, fields, size

        request, reading, told, fields, size = await exchange.work(prepare)
        exchange.note_form(reading.form)
        tally = exchange.tally(served.name)
        shape = ResponseShape(fields, served.texts, tally, reading, bool(spec.stream))

        def keep() -> None:
            if fields["store"]:
                messages = [*told, *messages_of(shape.output)]
                bytes_ = size + 2 * len(dumped(shape.output))
                task = asyncio.current_task() if spec.background else None
                stored = StoredResponse(owner, shape.document(), messages, bytes_, task)
                service.stored.add(shape.id, stored)

        if spec.background:
            task = asyncio.get_running_loop().create_task(make(exchange, spec, request, shape, keep))
            queued = {**shape.document(), "status": "queued"}
            service.stored.add(shape.id, StoredResponse(owner, queued, told, size, task))
            await exchange.json(queued)
            return
        await respond(exchange, served, spec, [request], shape, keep)


async def cancel(exchange: Exchange) -> None:
    """Stop a response that is made in the background; one that has ended stays as it is."""
    name, owner = exchange.scope["path_params"]["response_id"], exchange.call.client
    if not await exchange.service.stored.stop(name, owner):
        raise refused("Cannot cancel a synchronous response.", "response_id", None)
    await exchange.json(exchange.service.stored.get(name, owner).document)


async def input_tokens(exchange: Exchange) -> None:
    """Tokens of what the request would answer, tools and the conversation before it included."""
    spec = await exchange.body(ResponseRequest)
    asked = await exchange.work(partial(_as_told, spec, *_given(exchange, spec)))
    count = await counted(exchange, asked[0].model_copy(update={"model": spec.model}))
    await exchange.json({"object": "response.input_tokens", "input_tokens": count})


Given = str | Sequence[Mapping[str, Any]]


def _given(exchange: Exchange, spec: ResponseRequest) -> tuple[Sequence[Mapping[str, Any]], Given]:
    """The messages of the conversation so far, and what is asked now.

    Raises:
        Problem: 404, it names a response or an item that is not stored.
    """
    stored, owner = exchange.service.stored, exchange.call.client
    earlier: Sequence[Mapping[str, Any]] = ()
    if spec.previous_response_id is not None:
        before = stored.get(spec.previous_response_id, owner, "previous_response_id")
        if before.is_open:
            said = f"the response {spec.previous_response_id[:100]!r} is not ready yet; ask again later"
            raise refused(said, "previous_response_id", "response_not_ready")
        earlier = before.messages
    return earlier, spec.input if isinstance(spec.input, str) else _dereferenced(spec.input, stored, owner)


def _as_told(
    spec: ResponseRequest, earlier: Sequence[Mapping[str, Any]], given: Given
) -> tuple[ChatRequest, Messages]:
    """The same question as a chat request, and its messages without the instructions."""
    told = [*map(dict, earlier), *messages_of(given)]
    return as_chat(spec, told), told


def _dereferenced(
    items: Sequence[Mapping[str, Any]], stored: ResponseStore, owner: str
) -> list[Mapping[str, Any]]:
    """Items with those that are named by id in their place.

    Raises:
        Problem: 404, no stored response has such an item.
    """
    found = []
    for number, item in enumerate(items):
        if item.get("type") == "item_reference":
            item = stored.item(item["id"], owner, f"input.{number}.id")
        found.append(item)
    return found


async def retrieve(exchange: Exchange) -> None:
    name = exchange.scope["path_params"]["response_id"]
    await exchange.json(exchange.service.stored.get(name, exchange.call.client).document)


async def delete(exchange: Exchange) -> None:
    name = exchange.scope["path_params"]["response_id"]
    await exchange.service.stored.stop(name, exchange.call.client)
    exchange.service.stored.remove(name, exchange.call.client)
    await exchange.json({"id": name, "object": "response", "deleted": True})


def messages_of(given: Given) -> Messages:
    """Items as chat messages; calls join the assistant's message before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: Messages = []
    thought = ""
    for item in given:
        kind = item.get("type", "message")
        if kind == "reasoning":
            parts = item.get("content") or item.get("summary") or ()
            thought = "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
        elif kind == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None, **_thinking(thought)})
                thought = ""
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item["call_id"], "type": "function", "function": call})
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
            )
        else:
            said = {"role": item["role"], "content": _text(item["content"])}
            if item["role"] == "assistant":
                said, thought = {**said, **_thinking(thought)}, ""
            messages.append(said)
    return messages


def _thinking(thought: str) -> dict[str, str]:
    return {"reasoning_content": thought} if thought else {}


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def as_chat(spec: ResponseRequest, told: Messages) -> ChatRequest:
    """The same question as a chat request.

    Raises:
        Problem: fields contradict each other.
    """
    wanted = "message.output_text.logprobs" in (spec.include or ())
    if spec.top_logprobs and not wanted:
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
        reasoning=spec.reasoning,
    )


def _without_type(thing: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in thing.items() if key != "type"}


def fields_of(spec: ResponseRequest, model: str, request: Request) -> dict[str, Any]:
    """The request's own values, as the response repeats them."""
    return {
        "created_at": int(time.time()),
        "model": model,
        "instructions": spec.instructions,
        "max_output_tokens": spec.max_output_tokens,
        "metadata": spec.metadata or {},
        "parallel_tool_calls": spec.parallel_tool_calls is not False,
        "previous_response_id": spec.previous_response_id,
        "reasoning": {"effort": None, "summary": None, **(spec.reasoning or {})},
        "store": spec.store is not False,
        "temperature": request.sampling.temperature,
        "text": spec.text or {"format": {"type": "text"}},
        "tool_choice": spec.tool_choice or "auto",
        "tools": spec.tools or [],
        "top_logprobs": spec.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": spec.truncation or "disabled",
        "background": spec.background is True,
        "service_tier": "default",
        "user": spec.user,
    }
