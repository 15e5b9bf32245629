"""`/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from typing_extensions import NotRequired, TypedDict

from hasten.serve.protocol.chat import FunctionName, JsonObjectFormat, TextFormat
from hasten.serve.protocol.sampling import Text
from hasten.serve.protocol.strict import STRICT, JsonObject, Strict

Label = Annotated[str, Field(max_length=512)]


class InputText(TypedDict):
    """Text in a message; an answer that comes back as input has its own word for it."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["input_text", "output_text"]
    text: Text
    annotations: NotRequired[Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None]
    logprobs: NotRequired[list[Any] | None]


class InputMessage(TypedDict):
    """A message of the conversation."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: NotRequired[Literal["message"]]
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputText], Field(min_length=1, max_length=10_000, fail_fast=True)]
    id: NotRequired[Text | None]
    status: NotRequired[Literal["in_progress", "completed", "incomplete"] | None]


class FunctionCall(TypedDict):
    """A call the model made."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Text
    id: NotRequired[Text | None]
    status: NotRequired[Literal["in_progress", "completed", "incomplete"] | None]


class FunctionCallOutput(TypedDict):
    """What a call gave."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Annotated[list[InputText], Field(min_length=1, max_length=10_000, fail_fast=True)]
    id: NotRequired[Text | None]
    status: NotRequired[Literal["in_progress", "completed", "incomplete"] | None]


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


class FunctionTool(TypedDict):
    """A function the model may call."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["function"]
    name: FunctionName
    description: NotRequired[Text | None]
    parameters: NotRequired[JsonObject | None]
    strict: NotRequired[bool | None]


class FunctionChoice(TypedDict):
    """This function and no other."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["function"]
    name: FunctionName


class JsonSchemaText(TypedDict):
    """JSON that follows a schema; answers always follow it, whatever `strict` says."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    type: Literal["json_schema"]
    name: FunctionName
    schema: JsonObject
    description: NotRequired[Text | None]
    strict: NotRequired[bool | None]


class TextOptions(TypedDict, total=False):
    """The form of the text."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None


class ResponseRequest(Strict):
    """The body of `/v1/responses`."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=10_000, fail_fast=True)]
    model: str | None = Field(None, max_length=1000)
    instructions: Text | None = None
    previous_response_id: str | None = Field(None, max_length=100)
    store: bool | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Label] | None = Field(None, max_length=16)
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16, fail_fast=True)] | None
    ) = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=256, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: Label | None = None
    prompt_cache_key: Label | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    deadline_ms: float | None = Field(None, gt=0)
    cache_salt: Label | None = None
    chat_template_kwargs: JsonObject | None = None
