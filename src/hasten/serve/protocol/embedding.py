"""`/v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hasten.serve.protocol.completion import TokenIds
from hasten.serve.protocol.sampling import Text
from hasten.serve.protocol.strict import Strict


class EmbeddingRequest(Strict):
    """The body of `/v1/embeddings`; `pooling` and `add_special_tokens` are extensions."""

    model: str | None = Field(None, max_length=1000)
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    add_special_tokens: bool | None = None
    user: str | None = Field(None, max_length=512)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    deadline_ms: float | None = Field(None, gt=0)
    cache_salt: str | None = Field(None, max_length=512)
