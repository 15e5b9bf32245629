"""The fields that chat and plain completions share: sampling, limits and what an answer must match."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from hasten.serve.protocol.strict import STRICT, JsonObject, Strict

Text = Annotated[str, Field(max_length=16_000_000)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class StreamOptions(TypedDict, total=False):
    """What a stream reports besides the answer."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    include_usage: bool  # a last chunk with the usage of the request
    continuous_usage_stats: bool  # vLLM's: with include_usage, the usage so far in every chunk


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: one of these."""

    json_: JsonObject | Text | None = Field(None, alias="json", description="JSON schema")
    regex: Text | None = None
    choice: Annotated[list[StopText], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    grammar: Text | None = Field(None, description="Lark grammar")
    json_object: bool | None = None


class SamplingFields(Strict):
    """Sampling and limits. Names without an OpenAI meaning are vLLM's; `deadline_ms` is ours."""

    model: str | None = Field(None, max_length=1000, description="a name of /v1/models; default: the first")
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1 is all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenName, Bias] | None = Field(None, max_length=10_000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = Field(None, description="go on past the end token: for benchmarks")
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="users share the machine evenly")
    priority: int | None = Field(None, ge=-(2**31), lt=2**31, description="higher runs first")
    deadline_ms: float | None = Field(None, gt=0, description="from arrival to the last token")
    cache_salt: str | None = Field(
        None, max_length=512, description="shares computed prompts with this salt alone"
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    guided_json: JsonObject | Text | None = Field(None, description="JSON schema")
    guided_regex: Text | None = None
    guided_choice: Annotated[list[StopText], Field(min_length=1, max_length=1000, fail_fast=True)] | None = (
        None
    )
    guided_grammar: Text | None = Field(None, description="Lark grammar")
    structured_outputs: StructuredOutputs | None = None
