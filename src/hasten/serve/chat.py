"""`POST /v1/chat/completions`: the body, the form of the answer, the way between."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from hasten.engine.request import Output, Request
from hasten.models.tool_calls import ArgumentsDelta, CallStarted, TextDelta, ToolEvent
from hasten.serve.body import JsonObject, SamplingFields, Text
from hasten.serve.call import refused
from hasten.serve.generate import asker_of, respond
from hasten.serve.metrics import Tally
from hasten.serve.prepare import Asker, ToolPlan, grammar_of, offered, plan_of
from hasten.serve.shape import Part, Shape, TokenTexts, dumps, joined

if TYPE_CHECKING:
    from hasten.serve.service import Exchange

FunctionName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[a-zA-Z0-9_.\-]+$")]


class TextPart(TypedDict):
    """A part of a message; text is all a text model reads."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=10_000, fail_fast=True)]


class CalledFunction(TypedDict):
    """A call the assistant made."""

    name: FunctionName
    arguments: Text  # JSON


class ToolCall(TypedDict):
    """A call and the id its result refers to."""

    id: Text
    type: Literal["function"]
    function: CalledFunction


class PlainMessage(TypedDict):
    """Instructions (`developer` is the newer word for `system`), or what the user says."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: NotRequired[Text | None]


class AssistantMessage(TypedDict):
    """What the assistant said: text, calls, or both."""

    role: Literal["assistant"]
    content: NotRequired[Content | None]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(max_length=1000, fail_fast=True)] | None]
    refusal: NotRequired[None]
    annotations: NotRequired[Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None]
    audio: NotRequired[None]
    function_call: NotRequired[None]
    name: NotRequired[Text | None]


class ToolMessage(TypedDict):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: NotRequired[Text | None]  # of the function, which the call has said already


Message = Annotated[PlainMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(TypedDict):
    """A function the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: NotRequired[Text | None]
    parameters: NotRequired[JsonObject | None]
    strict: NotRequired[bool | None]


class Tool(TypedDict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(TypedDict):
    """The function of a named choice."""

    name: FunctionName


class NamedToolChoice(TypedDict):
    """This function and no other."""

    type: Literal["function"]
    function: NamedFunction


class PlainFormat(TypedDict):
    """Plain text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(TypedDict):
    """A named JSON schema; answers always follow it, whatever `strict` says."""

    name: FunctionName
    schema: JsonObject
    description: NotRequired[Text | None]
    strict: NotRequired[bool | None]


class JsonSchemaFormat(TypedDict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(SamplingFields):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = Field(None, description="names the model's template reads")
    add_generation_prompt: bool | None = None
    store: Literal[False] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=16, fail_fast=True)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = Field(
        None, max_length=512, description="one process has one cache: always hit"
    )


class ChatShape(Shape):
    """`/v1/chat/completions`.

    Args:
        request: what is asked of the engine.
        tools: how its tools are served; None: there are none.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, texts: TokenTexts, tally: Tally, request: Request, tools: ToolPlan | None
    ) -> None:
        super().__init__(model, texts, tally, request.n)
        self._readers = [tools.reader() for _ in range(request.n)] if tools is not None else []
        self._with_logprobs = request.logprobs is not None

    def _entries(self, part: Part, output: Output) -> list[str]:
        return [self.texts.chat(one) for one in output.logprobs]

    def _chunk(self, number: int, part: Part, output: Output) -> str:
        events = ""
        if not part.opened:
            part.opened = True
            events = self._delta(number, '"role":"assistant","content":""')
            if 0 in self.prompt_logprobs:
                head = events[: -len(self.tail)]
                events = f'{head[:-1]},"prompt_logprobs":{dumps(self.prompt_logprobs.pop(0))}}}{self.tail}'
        if self._readers:
            return events + self._read(number, part, output)
        if output.text or output.logprobs:
            content = f'"content":{encode_basestring(output.text)}'
            events += self._delta(number, content, self._logprobs(part, output))
        if output.finish_reason is not None:
            events += self._finish(number, output.finish_reason, output.stop)
        return events

    def _read(self, number: int, part: Part, output: Output) -> str:
        """Events of an answer that may call tools."""
        reader, events, logprobs = self._readers[number], [], self._logprobs(part, output)
        news = reader.push(output.text)
        if output.finish_reason is not None:
            news = [*news, *reader.flush()]
        for one in news:
            events.append(self._delta(number, _delta_of(one), logprobs))
            logprobs = "null"
            part.called = part.called or isinstance(one, CallStarted)
        if logprobs != "null":
            events.append(self._delta(number, '"content":""', logprobs))
        if output.finish_reason is not None:
            called = part.called and output.finish_reason == "stop"
            reason = "tool_calls" if called else output.finish_reason
            events.append(self._finish(number, reason, output.stop))
        return "".join(events)

    def _logprobs(self, part: Part, output: Output) -> str:
        entries = self._entries(part, output)
        return f'{{"content":[{",".join(entries)}],"refusal":null}}' if entries else "null"

    def _delta(self, number: int, delta: str, logprobs: str = "null") -> str:
        return (
            f'{self.head}{{"index":{number},"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":null}}'
            f"{self.tail}"
        )

    def _finish(self, number: int, reason: str, stop: str | int | None) -> str:
        return (
            f'{self.head}{{"index":{number},"delta":{{}},"logprobs":null,"finish_reason":"{reason}",'
            f'"stop_reason":{dumps(stop)}}}{self.tail}'
        )

    def _choice(self, number: int, part: Part) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": part.text,
            "refusal": None,
            "annotations": [],
        }
        reason = part.finish
        if self._readers:
            reader = self._readers[number]
            text, calls = _gathered([*reader.push(part.text), *reader.flush()])
            message["content"] = text or (None if calls else "")
            if calls:
                message["tool_calls"] = calls
                reason = "tool_calls" if reason == "stop" else reason
        logprobs = {"content": joined(part.logprobs), "refusal": None}
        return {
            "index": number,
            "message": message,
            "logprobs": logprobs if self._with_logprobs else None,
            "finish_reason": reason,
            "stop_reason": part.stop,
        }

    def document(self) -> dict[str, Any]:
        """The response in one piece; vLLM puts the prompt's logprobs beside the choices."""
        document = super().document()
        if 0 in self.prompt_logprobs:
            document["prompt_logprobs"] = self.prompt_logprobs[0]
        return document


def _delta_of(one: ToolEvent) -> str:
    """A piece of an answer as the inside of a `delta`."""
    if isinstance(one, TextDelta):
        return f'"content":{encode_basestring(one.text)}'
    call = _begun(one) if isinstance(one, CallStarted) else {"function": {"arguments": one.text}}
    return f'"tool_calls":[{dumps({"index": one.index, **call})}]'


def _begun(one: CallStarted) -> dict[str, Any]:
    return {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": ""}}


def _gathered(news: Sequence[ToolEvent]) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls of a whole answer."""
    text = ""
    calls: list[dict[str, Any]] = []
    for one in news:
        if isinstance(one, TextDelta):
            text += one.text
        elif isinstance(one, CallStarted):
            calls.append(_begun(one))
        elif isinstance(one, ArgumentsDelta):
            calls[one.index]["function"]["arguments"] += one.text
    return text, calls


async def chat(exchange: Exchange) -> None:
    spec = await exchange.body(ChatRequest)
    check(spec)
    async with exchange.service.pool.use(spec.model) as served:
        request, tools = await exchange.work(partial(prepare_chat, spec, asker_of(exchange, served)))
        shape = ChatShape(served.name, served.texts, exchange.tally(served.name), request, tools)
        shape.report(spec.stream_options, len(request.prompt))
        await respond(exchange, served, spec, [request], shape)


def check(spec: ChatRequest) -> None:
    """What one field alone cannot tell.

    Raises:
        Problem: fields contradict each other.
    """
    if spec.max_tokens is not None and spec.max_completion_tokens is not None:
        raise refused("max_tokens and max_completion_tokens are both given", "max_tokens", None)
    if spec.top_logprobs is not None and not spec.logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs", None)
    if spec.stream_options is not None and not spec.stream:
        raise refused("stream_options needs stream: true", "stream_options", None)


def prepare_chat(spec: ChatRequest, asker: Asker) -> tuple[Request, ToolPlan | None]:
    """The engine's request for a conversation, and what reads calls from its answer. In a worker thread."""
    served = asker.served
    tools = offered(spec.tools, spec.tool_choice)
    plan = plan_of(served, tools, spec.tool_choice, spec.parallel_tool_calls is not False) if tools else None
    grammar = grammar_of(spec, spec.response_format)
    if plan is not None and plan.grammar is not None:
        if grammar is not None:
            raise refused("an answer that must call a tool can follow no other format", "tool_choice", None)
        grammar = plan.grammar
    text = asker.chat_text(spec.messages, tools, spec.add_generation_prompt, spec.chat_template_kwargs)
    asker.check_length(text)
    prompt = asker.chat_tokens(text)
    asked = spec.max_tokens if spec.max_completion_tokens is None else spec.max_completion_tokens
    request = asker.request(
        spec,
        prompt,
        max_new_tokens=asker.limit(asked, len(prompt)),
        logprobs=(spec.top_logprobs or 0) if spec.logprobs else None,
        grammar=grammar,
        keep_special=plan.style.keep_ids if plan is not None else (),
    )
    return request, plan
