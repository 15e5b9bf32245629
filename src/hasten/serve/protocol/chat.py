"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from hasten.serve.protocol.sampling import SamplingFields, Text
from hasten.serve.protocol.strict import STRICT, JsonObject

FunctionName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[a-zA-Z0-9_.\-]+$")]


class TextPart(TypedDict):
    """A part of a message; text is all a text model reads."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1, max_length=10_000, fail_fast=True)]


class CalledFunction(TypedDict):
    """A call the assistant made."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    name: FunctionName
    arguments: Text  # JSON


class ToolCall(TypedDict):
    """A call and the id its result refers to."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    id: Text
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(TypedDict):
    """Instructions; `developer` is the newer word for `system`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    role: Literal["system", "developer"]
    content: Content
    name: NotRequired[Text | None]


class UserMessage(TypedDict):
    """What the user says."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    role: Literal["user"]
    content: Content
    name: NotRequired[Text | None]


class AssistantMessage(TypedDict):
    """What the assistant said: text, calls, or both."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
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

    __pydantic_config__ = STRICT  # type: ignore[misc]
    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: NotRequired[Text | None]  # of the function, which the call has said already


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(TypedDict):
    """A function the model may call; `parameters` is a JSON schema."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    name: FunctionName
    description: NotRequired[Text | None]
    parameters: NotRequired[JsonObject | None]
    strict: NotRequired[bool | None]


class Tool(TypedDict):
    """A tool; functions are the only kind."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["function"]
    function: Function


class NamedFunction(TypedDict):
    """The function of a named choice."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    name: FunctionName


class NamedToolChoice(TypedDict):
    """This function and no other."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["function"]
    function: NamedFunction


class TextFormat(TypedDict):
    """Plain text."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["text"]


class JsonObjectFormat(TypedDict):
    """Any JSON object."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["json_object"]


class JsonSchema(TypedDict):
    """A named JSON schema; answers always follow it, whatever `strict` says."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    name: FunctionName
    schema: JsonObject
    description: NotRequired[Text | None]
    strict: NotRequired[bool | None]


class JsonSchemaFormat(TypedDict):
    """JSON that follows a schema."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


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
